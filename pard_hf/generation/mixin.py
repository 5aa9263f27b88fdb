"""Where `generate()` of transformers, with a draft or `prompt_lookup_num_tokens`, meets our loop.

Only here are the private methods of transformers overridden.
"""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, GenerationMode, MaxLengthCriteria

from ..draft.model import PardDraftModel
from ..host import (
    CACHE_NAME,
    cache_in,
    input_device,
    is_callers,
    is_refused_by_stock_loop,
    subclass_named_as,
    warn_once,
    warn_where_untested,
    with_cache_renamed,
)
from .candidate_generator import CopyCandidateGenerator, PardCandidateGenerator, StockSampling
from .compilation import compiled_steps, schedule_for
from .config import (
    CALL_ARGUMENTS,
    DEFAULT_DEPTH,
    OPTIONS,
    PardGenerateOutput,
    check_options,
    largest_choice,
    text_sources,
)
from .decoder import PardDecoder, RatioTestDecoder, end_tokens, max_length
from .lockstep import LockstepDecoder
from .memory import AssistantMemory, sources_of
from .recurrent import is_hybrid
from .sampling import Noise, is_prefix_free, is_stateless
from .sources import COMPONENTS, accepted_by_source, encode_references
from .stats import DecodingStats
from .validation import (
    check_call_arguments_unused,
    check_mode,
    check_pair,
    check_prompt,
    full_attention_mask,
    unsupported_by_any_loop,
    unsupported_by_own_loop,
    unsupported_by_stock_loop,
)

# Criteria that a decoder decides on the device, row by row; any other is called as plain `generate` calls it.
KNOWN_CRITERIA = {EosTokenCriteria, MaxLengthCriteria}


class PardGenerationMixin(GenerationMixin):
    """Make `generate(assistant_model=draft)` and `generate(prompt_lookup_num_tokens=10)` run our loop.

    Otherwise `generate` is that of transformers. Put it first among the bases of a model class,
    or use [`with_pard`] on a live model.

    >>> class MyModel(PardGenerationMixin, LlamaForCausalLM): ...
    """

    @property
    def device(self) -> torch.device:
        """Return the device of inputs; offloaded weights are on the meta device between two forwards."""
        device: torch.device = super().device
        return device if device.type != "meta" else input_device(self)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, faster with a [`PardDraftModel`] or `prompt_lookup_num_tokens`, or both.

        Args:
            assistant_model ([`PardDraftModel`], *optional*):
                The draft; the output does not depend on it.
            num_assistant_tokens (`int`, *optional*):
                K, proposals a round; defaults to the draft's `generation_config`.
            prompt_lookup_num_tokens (`int`, *optional*):
                Propose, with the draft or alone, what followed the last tokens earlier in the text, and what the
                target found likeliest after them; paths have at most this many tokens.
            assistant_memory ([`AssistantMemory`], *optional*):
                What is remembered of the target from call to call; nothing by default.
            assistant_reference_texts (`list[str]` or `list[list[int]]`, *optional*):
                Further texts to copy from; strings need `tokenizer`.
            kwargs:
                Any argument of `generate`, and the options of [`PardGenerationConfig`].

        Returns:
            As transformers; with `return_dict_in_generate=True` a [`PardGenerateOutput`], which has `.stats`.

        Raises:
            ValueError: The call or the pair of models cannot be served; nothing was changed.
        """
        kwargs = with_cache_renamed(kwargs)
        if kwargs.get("assistant_reference_texts") is not None:
            texts, vocab_size = kwargs["assistant_reference_texts"], self.config.get_text_config().vocab_size
            references = encode_references(texts, kwargs.get("tokenizer"), vocab_size)
            kwargs["assistant_reference_texts"] = references
        if isinstance(assistant_model, PardDraftModel):
            generation_config = with_draft_defaults(assistant_model, generation_config, kwargs)
            if kwargs.get("custom_generate") is not None:
                warn_unused("This way of generating takes no draft")
        elif hasattr(getattr(assistant_model, "config", None), "pard_token"):
            warnings.warn(
                "This assistant is a PARD draft that was loaded as an ordinary model: it drafts token by token. Load "
                "it with `PardDraftModel.from_pretrained` to draft all tokens in one forward.",
                stacklevel=2,
            )
        return super().generate(
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            synced_gpus,
            assistant_model,
            *args,
            **kwargs,
        )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Merge the options of the call as transformers does, ours among them.

        What is returned is a copy made for the call. Like transformers, which notes the length of the mask there, it
        carries what the decoding method is not told: which model arguments are the caller's, and not transformers'.
        """
        options = {name: kwargs.pop(name) for name in (*OPTIONS, *CALL_ARGUMENTS) if name in kwargs}
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name in OPTIONS:
            value = options.get(name)
            setattr(config, name, getattr(config, name, None) if value is None else value)
        for name in CALL_ARGUMENTS:
            setattr(config, f"_{name}", options.get(name))
        asks = config.assistant_sources or any(options.get(name) is not None for name in CALL_ARGUMENTS)
        if asks and config.prompt_lookup_num_tokens is None:
            config.prompt_lookup_num_tokens = DEFAULT_DEPTH
        config._caller_arguments = sorted(model_kwargs)
        return config, model_kwargs

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        """Refuse what cannot be served before anything is changed; batches and padded vocabularies are served."""
        draft: Any = generation_mode_kwargs.get("assistant_model")
        config = generation_config
        is_drafted = isinstance(draft, PardDraftModel)
        if is_drafted and config.assistant_tree_size is None:
            config.assistant_tree_size = getattr(draft.generation_config, "assistant_tree_size", None)
        check_options(config)
        looks_up = draft is None and text_sources(config) and generation_mode == GenerationMode.ASSISTED_GENERATION
        if not is_drafted and (not looks_up or self.config.is_encoder_decoder):
            check_call_arguments_unused(config, draft, generation_mode)
            return super()._validate_generation_mode(generation_mode, config, generation_mode_kwargs)
        check_mode(self, config, is_drafted)
        if is_hybrid(self.config):
            if config.assistant_tree_size:
                warn_once("A layer with a state reads one path: chains are proposed instead of trees.")
            config.assistant_tree_size = 0
        check_memory(self, config._assistant_memory)
        if not is_drafted:
            if config.verification == "ratio_test" and config.do_sample:
                warn_once("The ratio test needs the distribution of a draft: tokens are verified by sample-and-match.")
                config.verification = None
            return None
        tokenizers = (generation_mode_kwargs.get(name) for name in ("tokenizer", "assistant_tokenizer"))
        check_pair(self, draft, config.num_assistant_tokens, *tokenizers)
        if config.verification == "ratio_test" and (config.assistant_tree_size or text_sources(config)):
            warn_once("The ratio test is made for one path of the draft: a chain is drafted instead of a tree.")
            config.assistant_tree_size, config.assistant_sources = 0, []
        if generation_mode != GenerationMode.ASSISTED_GENERATION:
            warn_unused("This way of generating takes no draft")

    def _assisted_decoding(
        self, input_ids: torch.Tensor, inputs_tensor: Any = None, assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        is_ours = assistant_model is None and text_sources(kwargs["generation_config"])
        if isinstance(assistant_model, PardDraftModel) or (is_ours and not self.config.is_encoder_decoder):
            return self._pard_decoding(input_ids, assistant_model, **kwargs)
        models = {"inputs_tensor": inputs_tensor, "assistant_model": assistant_model}
        return super()._assisted_decoding(input_ids, **models, **kwargs)

    def _pard_decoding(
        self,
        input_ids: torch.Tensor,
        draft: PardDraftModel | None,
        generation_config: GenerationConfig,
        logits_processor: Any,
        stopping_criteria: Any,
        streamer: Any = None,
        synced_gpus: bool = False,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Choose the loop: ours, that of transformers, or plain decoding where neither is exact."""
        warn_where_untested()
        config, prepared = generation_config, {"logits_processor": logits_processor, "streamer": streamer}
        prepared |= {"stopping_criteria": stopping_criteria, "generation_config": config}
        mask, longest = full_attention_mask(input_ids, config, model_kwargs), max_length(stopping_criteria)
        check_prompt(self, draft, input_ids, mask, longest, model_kwargs)
        length = mask.shape[1] + longest - input_ids.shape[1]
        no_draft = unsupported_by_any_loop(self, length, config, model_kwargs)
        no_slots = unsupported_by_own_loop(
            self, draft, mask, length, config, synced_gpus, model_kwargs, config._caller_arguments
        )
        if no_draft is None and no_slots is None:
            return self._own_loop(input_ids, draft, mask, prepared, model_kwargs)
        prepared["synced_gpus"] = synced_gpus
        if not self._is_stateful:
            no_draft = no_draft or unsupported_by_stock_loop(self)
        stock_is_exact = (
            no_draft is None
            and not self._is_stateful
            and len(input_ids) == 1
            and input_ids.shape[1] > 0
            and model_kwargs["use_cache"]
            and not is_callers(cache_in(model_kwargs))
            and {type(criterion) for criterion in stopping_criteria} <= KNOWN_CRITERIA
            and is_stateless(logits_processor)
        )
        if stock_is_exact and no_slots is not None:
            return self._stock_loop(input_ids, draft, prepared, model_kwargs, no_slots)
        reason = no_draft or no_slots or "There is no loop for this call"
        warn_unused(reason, "the draft" if draft is not None else "prompt lookup")
        output = self._sample(input_ids, **prepared, **model_kwargs)
        return with_stats(output, DecodingStats(loop="none", fallback_reason=reason))

    def _own_loop(
        self,
        input_ids: torch.Tensor,
        draft: PardDraftModel | None,
        mask: torch.Tensor,
        prepared: dict[str, Any],
        model_kwargs: dict[str, Any],
    ) -> Any:
        """Decode over our cache, with a draft, other sources, or both."""
        config, past = prepared["generation_config"], cache_in(model_kwargs)
        decoder_type = decoder_class(**prepared, batch_size=len(input_ids))
        largest = largest_choice(config, draft is not None, len(input_ids))
        with (
            compiled_steps(self, draft, config) as compiled,
            sources_of(self, draft, config, compiled, input_ids.device) as sources,
        ):
            inputs = {"inputs_embeds": model_kwargs.get("inputs_embeds"), "past": past, "sources": sources}
            schedule = schedule_for(self, draft, config, compiled, largest, sources is not None)
            decoder = decoder_type(self, draft, input_ids, mask, compiled, schedule, **inputs, **prepared)
            decoder.run()
            if prepared["streamer"] is not None:
                prepared["streamer"].end()
            if decoder.returns_cache:
                # A static cache made for this call was never filled; what is returned is what was decoded.
                past = past if isinstance(past, DynamicCache) else DynamicCache(config=self.config)
                decoder.extend(past)
            if not config.return_dict_in_generate:
                return decoder.sequences()
            return PardGenerateOutput(
                sequences=decoder.sequences(),
                scores=None if decoder.scores is None else decoder.scores.columns(),
                logits=None if decoder.logits is None else decoder.logits.columns(),
                stats=decoder.stats,
                compile_seconds=decoder.compile_seconds,
                round_times=decoder.times,
                **{CACHE_NAME: past},
            )

    def _stock_loop(
        self,
        input_ids: torch.Tensor,
        draft: PardDraftModel | None,
        prepared: dict[str, Any],
        model_kwargs: dict[str, Any],
        reason: str,
    ) -> Any:
        """Serve by the assisted loop of transformers a call that our cache cannot; without a draft by its lookup.

        Sampled tokens are drawn by us, with the noise plain `generate` would draw: that loop only compares.
        """
        config = copy.copy(prepared["generation_config"])
        if draft is None:
            changes = "; one continuation is copied from the text, and nothing else proposes"
        elif text_sources(config):
            changes = "; only the draft proposes, a chain"
        else:
            changes = "; a chain is drafted instead of a tree" if config.assistant_tree_size else ""
        if config.verification == "ratio_test" and config.do_sample:
            changes += "; tokens are verified by sample-and-match"
        warn_once(f"{reason}: drafting in the assisted loop of transformers{changes}.")
        prepared = {**prepared, "generation_config": config}
        sampling = None
        if config.do_sample:
            noise = Noise(input_ids.device, is_ordered=True)
            keeps_scores = bool(config.output_scores)
            sampling = StockSampling(prepared["logits_processor"], noise, input_ids.shape[1], keeps_scores)
            config.do_sample, prepared["logits_processor"] = False, sampling.processors()
            if prepared["streamer"] is not None:
                prepared["streamer"] = sampling.streamer(prepared["streamer"])
        past = cache_in(model_kwargs)
        if is_refused_by_stock_loop(past):
            config.cache_implementation, past = None, DynamicCache(config=self.config)
        if type(past) is DynamicCache and all(type(layer) is DynamicLayer for layer in past.layers):
            # Layers as they are written: half of an encoder-decoder leaves some unused, and those cannot be cropped.
            past = DynamicCache()
        model_kwargs = {**model_kwargs, CACHE_NAME: past}
        ends = end_tokens(prepared["stopping_criteria"], input_ids.device)
        if draft is None:
            sizes = config.prompt_lookup_num_tokens, config.max_matching_ngram_size or 2, config.max_length
            generator: Any = CopyCandidateGenerator(ends, *sizes, sampling=sampling)
        else:
            sizes = config.num_assistant_tokens, config.max_length, self.config.get_text_config().vocab_size
            generator = PardCandidateGenerator(draft, *sizes, model_kwargs.get("attention_mask"), sampling, ends)
        # The loop hands its assistant to `_get_candidate_generator` and does nothing else with it.
        output = super()._assisted_decoding(input_ids, **prepared, assistant_model=generator, **model_kwargs)
        if sampling is not None:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            sampling.advance(sequences.shape[1])
            if not isinstance(output, torch.Tensor) and output.scores is not None:
                output.scores = sampling.scores(sequences.shape[1])
        stats = replace(generator.stats, fallback_reason=reason)
        if text_sources(config):
            source = "copy" if draft is None else "draft"
            by_component = [stats.num_accepted if name == source else 0 for name in COMPONENTS]
            stats = replace(stats, accepted_by_source=accepted_by_source(by_component))
        return with_stats(output, stats)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator = kwargs.get("assistant_model")
        if isinstance(generator, PardCandidateGenerator | CopyCandidateGenerator):
            return generator
        return super()._get_candidate_generator(*args, **kwargs)


def with_draft_defaults(
    draft: PardDraftModel, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerationConfig | None:
    """Set the draft's K where the call has none: transformers' own default is 20. May change `kwargs`."""
    if kwargs.get("num_assistant_tokens") is not None:
        return generation_config
    kwargs.pop("num_assistant_tokens", None)
    if generation_config is None:
        kwargs["num_assistant_tokens"] = draft.num_assistant_tokens
    elif generation_config.num_assistant_tokens is None:
        generation_config = copy.deepcopy(generation_config)
        generation_config.num_assistant_tokens = draft.num_assistant_tokens
    return generation_config


def decoder_class(
    generation_config: Any,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    streamer: Any,
    batch_size: int,
) -> type[PardDecoder]:
    """Choose independent rows where nothing reads the prefix or waits for a whole column, else lockstep."""
    is_ragged = (
        {type(criterion) for criterion in stopping_criteria} <= KNOWN_CRITERIA
        and is_prefix_free(logits_processor)
        and (streamer is None or batch_size == 1)
    )
    if not generation_config.do_sample or generation_config.verification != "ratio_test":
        return PardDecoder if is_ragged else LockstepDecoder
    if not is_ragged:
        raise ValueError(
            "Expected rows that may advance on their own with `verification='ratio_test'`, got a batch with a "
            "streamer, or a processor or criterion that looks at the prefix (repetition penalty, stop string). "
            "Use the default, `verification='sample_and_match'`."
        )
    return RatioTestDecoder


def check_memory(target: PreTrainedModel, memory: Any) -> None:
    """Raise a `ValueError` if a call's memory is none, or that of another target."""
    if isinstance(memory, AssistantMemory):
        memory.check(target)
    elif memory is not None:
        raise ValueError(
            f"Expected `assistant_memory` to be an `AssistantMemory`, got {memory!r}. Load a saved one with "
            "`AssistantMemory.load(path, target)`."
        )


def with_stats(output: Any, stats: DecodingStats) -> Any:
    """Add statistics to what transformers returned, where that is more than a tensor."""
    if not isinstance(output, GenerateDecoderOnlyOutput):
        return output
    return PardGenerateOutput(**output, stats=stats)


def warn_unused(reason: str, unused: str = "the draft") -> None:
    """Warn that a call was given a draft, or asked for prompt lookup, and does without."""
    warnings.warn(
        f"{reason}; generating without {unused}: the same output, only slower.", stacklevel=level_of_caller()
    )


def level_of_caller() -> int:
    """Return the stack level, as `warnings.warn` counts it, of the code that called `generate()`."""
    packages = (__package__.partition(".")[0], "transformers", "torch")
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in packages:
        frame, level = frame.f_back, level + 1
    return level


def with_pard(target: PreTrainedModel) -> PreTrainedModel:
    """Give a live model our `generate(assistant_model=draft)`, in place.

    Weights, config, hooks and the class name do not change; [`without_pard`] undoes it. A model that already has it is
    returned unchanged.

    Args:
        target ([`PreTrainedModel`]):
            A decoder-only model that can generate.

    Raises:
        ValueError: The object is not a model of transformers that can generate.
    """
    if isinstance(target, PardGenerationMixin):
        return target
    if not isinstance(target, PreTrainedModel) or not isinstance(target, GenerationMixin):
        raise ValueError(
            f"Expected a transformers model that can generate, got `{type(target).__name__}`. Wrapped models (PEFT, "
            "torch.compile) are to be unwrapped first, for example with `.get_base_model()`."
        )
    base: Any = type(target)
    target.__class__ = pard_class(base)
    return target


def without_pard(target: PreTrainedModel) -> PreTrainedModel:
    """Undo [`with_pard`], in place; a model without it is returned unchanged."""
    if isinstance(target, PardGenerationMixin):
        base = type(target).__bases__[-1]
        if pard_class(base) is not type(target):
            raise ValueError(
                f"Expected a model that `with_pard` changed, got `{type(target).__name__}`, whose own class has the "
                "mixin. Load the model under its base class instead."
            )
        target.__class__ = base
    return target


@cache
def pard_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the subclass of `base` with the mixin, named as `base`: a saved config names its class."""
    return subclass_named_as(base, PardGenerationMixin, pard_class)
