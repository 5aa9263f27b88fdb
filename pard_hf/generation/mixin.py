"""Where we meet transformers: `generate(assistant_model=draft)` on a target that knows about PARD.

Translates one `generate()` call into a `DecodingRequest`, and back. Only here are the host's private methods touched.
"""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from ..draft.model import PardDraftModel
from ..host import (
    CACHE_NAME,
    cache_in,
    end_token_ids,
    input_device,
    is_callers,
    is_refused_by_stock_loop,
    pad_token_id,
    subclass_named_as,
    warn_once,
    warn_where_untested,
    with_host_names,
)
from .candidate_generator import PardCandidateGenerator, StockSampling
from .compilation import schedule_for, steps_for
from .config import VERIFICATIONS, PardGenerateOutput, settings_for, settings_of_call, with_draft_defaults
from .decoder import DecodingRequest, PardDecoder
from .lockstep import KNOWN_CRITERIA, decoder_for
from .sampling import Noise, is_stateless
from .stats import DecodingStats
from .validation import (
    check_mode,
    check_pair,
    check_prompt,
    full_attention_mask,
    unsupported_by_any_loop,
    unsupported_by_own_loop,
    unsupported_by_stock_loop,
)


class PardGenerationMixin(GenerationMixin):
    """Makes `generate(assistant_model=draft)` run our loop: batches, sampling, every stopping rule.

    With another assistant, or none, `generate` is the host's. Put it first among the bases of a model class, or use
    [`with_pard`] on a live model.

    >>> class MyModel(PardGenerationMixin, LlamaForCausalLM): ...
    """

    @property
    def device(self) -> torch.device:
        """Where inputs go; offloaded weights lie on the meta device between two forwards."""
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
        verification: str = VERIFICATIONS[0],
        assistant_tree_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as the host's `generate` does, faster when `assistant_model` is a [`PardDraftModel`].

        Args:
            assistant_model ([`PardDraftModel`], *optional*):
                The draft; the output does not depend on it.
            num_assistant_tokens (`int`, *optional*):
                K, proposals a round; defaults to the draft's `generation_config`.
            verification (`str`, *optional*, defaults to `"sample_and_match"`):
                How sampled tokens are verified: `"sample_and_match"` (the tokens of plain `generate` under the same
                seed) or `"ratio_test"` (speculative sampling; the same distribution).
            assistant_tree_size (`int`, *optional*):
                N, nodes of the tree that the target verifies in a round; 0 for a chain of K proposals. Defaults to the
                `assistant_tree_size` of the generation config, the target's own or the draft's, and else to 0.

        Returns:
            As the host's `generate`; with `return_dict_in_generate=True` a [`PardGenerateOutput`], which has `.stats`.

        Raises:
            ValueError: The call or the pair of models cannot be served; nothing was changed.
        """
        kwargs = with_host_names(kwargs)
        settings = settings_for(
            verification, assistant_tree_size, (generation_config, self.generation_config), assistant_model, kwargs
        )
        is_drafted = isinstance(assistant_model, PardDraftModel)
        if is_drafted:
            warn_where_untested()
            generation_config = with_draft_defaults(assistant_model, generation_config, kwargs)
        elif hasattr(getattr(assistant_model, "config", None), "pard_token"):
            warnings.warn(
                "This assistant is a PARD draft that was loaded as an ordinary model: it drafts token by token. Load "
                "it with `PardDraftModel.from_pretrained` to draft all tokens in one forward.",
                stacklevel=2,
            )
        reset = settings_of_call.set(settings)
        try:
            output = super().generate(
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
        finally:
            settings_of_call.reset(reset)
        if is_drafted and not settings.was_seen:
            warn_unused("This way of generating takes no draft")
        return output

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        """Refuse what cannot be served before anything is touched; batches and padded vocabularies are welcome."""
        draft = generation_mode_kwargs.get("assistant_model")
        if not isinstance(draft, PardDraftModel):
            return super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        check_mode(self, generation_config)
        check_pair(
            self,
            draft,
            generation_config.num_assistant_tokens,
            generation_mode_kwargs.get("tokenizer"),
            generation_mode_kwargs.get("assistant_tokenizer"),
        )

    def _assisted_decoding(
        self,
        input_ids: torch.Tensor,
        inputs_tensor: torch.Tensor | None = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        if isinstance(assistant_model, PardDraftModel):
            return self._pard_decoding(input_ids, assistant_model, **kwargs)
        return super()._assisted_decoding(
            input_ids,
            inputs_tensor=inputs_tensor,
            assistant_model=assistant_model,
            assistant_tokenizer=assistant_tokenizer,
            tokenizer=tokenizer,
            **kwargs,
        )

    def _pard_decoding(
        self,
        input_ids: torch.Tensor,
        draft: PardDraftModel,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Choose the route: our loop, that of transformers, or no draft at all where neither is exact."""
        settings = settings_of_call.get()
        settings.was_seen.append(True)
        mask = full_attention_mask(input_ids, generation_config, model_kwargs)
        max_length = min(c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria))
        check_prompt(self, draft, input_ids, mask, max_length, model_kwargs)
        prepared = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            "streamer": streamer,
        }
        length = mask.shape[1] + max_length - input_ids.shape[1]
        no_draft = unsupported_by_any_loop(self, length, generation_config, model_kwargs)
        no_slots = unsupported_by_own_loop(
            self, draft, mask, length, generation_config, synced_gpus, model_kwargs, settings.keywords
        )
        if no_draft is None and no_slots is None:
            request = self._request(input_ids, mask, max_length, **prepared, model_kwargs=model_kwargs)
            with steps_for(self, draft, generation_config) as steps:
                schedule = schedule_for(self, draft, generation_config, steps, request.tree_size)
                decoder = decoder_for(request)(self, draft, request, steps, schedule)
                decoder.run()
                return self._collect(decoder, generation_config, model_kwargs)
        prepared["synced_gpus"] = synced_gpus
        if no_draft is None:
            no_draft = unsupported_by_stock_loop(self)
        stock_is_exact = (
            no_draft is None
            and len(input_ids) == 1
            and input_ids.shape[1] > 0
            and model_kwargs["use_cache"]
            and not is_callers(cache_in(model_kwargs))
            and {type(criterion) for criterion in stopping_criteria} <= KNOWN_CRITERIA
            and is_stateless(logits_processor)
        )
        if stock_is_exact and no_slots is not None:
            chain = "; a chain is drafted instead of a tree" if settings.tree_size else ""
            if settings.verification == "ratio_test" and generation_config.do_sample:
                chain += "; tokens are verified by sample-and-match"
            warn_once(f"{no_slots}: drafting in the assisted loop of transformers{chain}.")
            return self._stock_loop(input_ids, draft, prepared, model_kwargs, no_slots)
        reason = no_draft or no_slots or "There is no loop for this call"
        warn_unused(reason)
        output = self._sample(input_ids, **prepared, **model_kwargs)
        return with_stats(output, DecodingStats(loop="none", fallback_reason=reason))

    def _request(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        max_length: int,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> DecodingRequest:
        """What `generate()` prepared, as our loop reads it."""
        ends = [c.eos_token_id.to(input_ids.device) for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        returns_dict, past = generation_config.return_dict_in_generate, cache_in(model_kwargs)
        return DecodingRequest(
            input_ids=input_ids,
            attention_mask=mask,
            num_assistant_tokens=generation_config.num_assistant_tokens,
            max_length=max_length,
            pad_token_id=pad_token_id(generation_config),
            eos_token_id=torch.cat(ends) if ends else None,
            inputs_embeds=model_kwargs.get("inputs_embeds"),
            past=past,
            do_sample=generation_config.do_sample,
            ratio_test=generation_config.do_sample and settings_of_call.get().verification == "ratio_test",
            tree_size=settings_of_call.get().tree_size,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            output_scores=returns_dict and generation_config.output_scores,
            output_logits=returns_dict and generation_config.output_logits,
            returns_cache=returns_dict or is_callers(past),
        )

    def _collect(self, decoder: PardDecoder, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
        """Hand a finished decoder's results over as plain `generate` would."""
        if decoder.request.streamer is not None:
            decoder.request.streamer.end()
        cache = cache_in(model_kwargs)
        if decoder.request.returns_cache:
            # A static cache made for this call was never filled; what was asked back is what happened.
            cache = cache if isinstance(cache, DynamicCache) else DynamicCache(config=self.config)
            decoder.extend_past(cache)
        if not generation_config.return_dict_in_generate:
            return decoder.sequences()
        return PardGenerateOutput(
            sequences=decoder.sequences(),
            scores=decoder.outputs(0) if decoder.request.output_scores else None,
            logits=decoder.outputs(1) if decoder.request.output_logits else None,
            stats=decoder.stats,
            compile_seconds=decoder.steps.compile_seconds,
            **{CACHE_NAME: cache},
        )

    def _stock_loop(
        self,
        input_ids: torch.Tensor,
        draft: PardDraftModel,
        prepared: dict[str, Any],
        model_kwargs: dict[str, Any],
        reason: str,
    ) -> Any:
        """Serve by the assisted loop of transformers a call that our cache cannot.

        Sampled tokens are drawn by us, with the noise plain `generate` would draw: that loop only compares.
        """
        sampling = None
        if prepared["generation_config"].do_sample:
            noise = Noise(input_ids.device, is_ordered=True)
            config = copy.copy(prepared["generation_config"])
            sampling = StockSampling(
                prepared["logits_processor"], noise, input_ids.shape[1], keeps_scores=bool(config.output_scores)
            )
            config.do_sample = False
            prepared = {**prepared, "logits_processor": sampling.processors(), "generation_config": config}
            if prepared["streamer"] is not None:
                prepared["streamer"] = sampling.streamer(prepared["streamer"])
        past = cache_in(model_kwargs)
        if is_refused_by_stock_loop(past):
            config = copy.copy(prepared["generation_config"])
            config.cache_implementation = None
            prepared = {**prepared, "generation_config": config}
            past = DynamicCache(config=self.config)
            model_kwargs = {**model_kwargs, CACHE_NAME: past}
        if type(past) is DynamicCache and all(type(layer) is DynamicLayer for layer in past.layers):
            # Layers as they are written: half of an encoder-decoder leaves some unused, and those cannot be cropped.
            model_kwargs = {**model_kwargs, CACHE_NAME: DynamicCache()}
        bound = BoundDraft(draft, sampling, [])
        output = super()._assisted_decoding(input_ids, **prepared, assistant_model=bound, **model_kwargs)
        if sampling is not None:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            sampling.advance(sequences.shape[1])
            if not isinstance(output, torch.Tensor) and output.scores is not None:
                output.scores = sampling.scores(sequences.shape[1])
        return with_stats(output, replace(bound.generators[0].stats, fallback_reason=reason))

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        bound = kwargs.get("assistant_model")
        if not isinstance(bound, BoundDraft):
            return super()._get_candidate_generator(*args, **kwargs)
        config = kwargs["generation_config"]
        generator = PardCandidateGenerator(
            bound.draft,
            config.num_assistant_tokens,
            config.max_length,
            self.config.get_text_config().vocab_size,
            kwargs["model_kwargs"].get("attention_mask"),
            bound.sampling,
            end_token_ids(config),
        )
        bound.generators.append(generator)
        return generator


@dataclass
class BoundDraft:
    """A draft on its way through the stock loop, and the generators made from it: the loop does not return them."""

    draft: PardDraftModel
    sampling: StockSampling | None
    generators: list[PardCandidateGenerator]


def with_stats(output: Any, stats: DecodingStats) -> Any:
    """Add statistics to what the host returned, where that is more than a tensor."""
    if not isinstance(output, GenerateDecoderOnlyOutput):
        return output
    return PardGenerateOutput(**output, stats=stats)


def warn_unused(reason: str) -> None:
    """Say that a call was given a draft and did without."""
    warnings.warn(
        f"{reason}; generating without the draft: the same output, only slower.", stacklevel=level_of_caller()
    )


def level_of_caller() -> int:
    """The stack level, as `warnings.warn` counts it, of the code that called `generate()`."""
    packages = (__package__.partition(".")[0], "transformers", "torch")
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in packages:
        frame, level = frame.f_back, level + 1
    return level


def with_pard(target: PreTrainedModel) -> PreTrainedModel:
    """Give a live model our `generate(assistant_model=draft)`, in place.

    Weights, config, hooks and the class name stay as they are; [`without_pard`] takes it back. A model that already
    has it is returned unchanged.

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
    """The subclass of `base` with the mixin, named as `base`: a saved config names its class."""
    return subclass_named_as(base, PardGenerationMixin, pard_class)
