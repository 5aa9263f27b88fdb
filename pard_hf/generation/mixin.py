"""Where we meet transformers: `generate(assistant_model=draft)` on a target that knows about PARD.

Translates one `generate()` call into a `DecodingRequest`, and back. Only here are the host's private methods touched.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from ..draft_model import PardDraftModel
from ..subclass import subclass_named_as
from .attention import packed_attention
from .call import VERIFICATIONS, settings_for, settings_of_call, with_draft_defaults
from .candidate_generator import PardCandidateGenerator
from .checks import check_mode, check_pair, check_prompt, full_attention_mask, why_no_draft, why_not_slots
from .compilation import schedule_for, steps_for, warn_once
from .decoding import PardDecoder
from .lockstep import KNOWN_CRITERIA, decoder_for
from .output import PardGenerateOutput
from .request import DecodingRequest
from .stats import DecodingStats

logger = logging.getLogger(__name__)


class PardGenerationMixin(GenerationMixin):
    """Makes `generate(assistant_model=draft)` run our loop: batches, sampling, every stopping rule.

    With another assistant, or none, `generate` is the host's. Put it first among the bases of a model class, or use
    [`with_pard`] on a live model.

    >>> class MyModel(PardGenerationMixin, LlamaForCausalLM): ...
    """

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
        settings = settings_for(
            verification, assistant_tree_size, (generation_config, self.generation_config), assistant_model
        )
        if isinstance(assistant_model, PardDraftModel):
            generation_config = with_draft_defaults(assistant_model, generation_config, kwargs)
        reset = settings_of_call.set(settings)
        try:
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
        finally:
            settings_of_call.reset(reset)

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
        """Choose the route: our loop, the host's, or no draft at all where neither is exact."""
        mask = full_attention_mask(input_ids, generation_config, model_kwargs)
        max_length = min(c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria))
        check_prompt(self, draft, input_ids, mask, max_length, model_kwargs)
        prepared = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            "streamer": streamer,
        }
        no_draft = why_no_draft(self, mask.shape[1] + max_length - input_ids.shape[1], generation_config)
        no_slots = why_not_slots(self, draft, mask, generation_config, synced_gpus, model_kwargs)
        if no_draft is None and no_slots is None:
            request = self._request(input_ids, mask, max_length, **prepared, model_kwargs=model_kwargs)
            with packed_attention(self, draft), steps_for(self, draft, generation_config) as steps:
                schedule = schedule_for(self, draft, generation_config, steps, request.tree_size)
                decoder = decoder_for(request)(self, draft, request, steps, schedule)
                decoder.run()
                return self._collect(decoder, generation_config, model_kwargs)
        prepared["synced_gpus"] = synced_gpus
        stock_is_exact = (
            no_draft is None
            and len(input_ids) == 1
            and input_ids.shape[1] > 0
            and model_kwargs["use_cache"]
            and not getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False)
            and {type(criterion) for criterion in stopping_criteria} <= KNOWN_CRITERIA
        )
        if stock_is_exact:
            logger.info("%s; using the stock assisted loop.", no_slots)
            if settings_of_call.get().tree_size:
                warn_once(f"{no_slots}: a chain is drafted instead of a tree.")
            return self._stock_loop(input_ids, draft, prepared, model_kwargs)
        logger.warning("%s; generating without the draft: the same output, only slower.", no_draft or no_slots)
        return with_stats(self._sample(input_ids, **prepared, **model_kwargs), DecodingStats())

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
        pad, returns_dict = generation_config._pad_token_tensor, generation_config.return_dict_in_generate
        return DecodingRequest(
            input_ids=input_ids,
            attention_mask=mask,
            num_assistant_tokens=generation_config.num_assistant_tokens,
            max_length=max_length,
            pad_token_id=None if pad is None else int(pad),
            eos_token_id=torch.cat(ends) if ends else None,
            inputs_embeds=model_kwargs.get("inputs_embeds"),
            past_key_values=model_kwargs.get("past_key_values"),
            do_sample=generation_config.do_sample,
            ratio_test=generation_config.do_sample and settings_of_call.get().verification == "ratio_test",
            tree_size=settings_of_call.get().tree_size,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            output_scores=returns_dict and generation_config.output_scores,
            output_logits=returns_dict and generation_config.output_logits,
            returns_cache=returns_dict or getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False),
        )

    def _collect(self, decoder: PardDecoder, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
        """Hand a finished decoder's results over as plain `generate` would."""
        if decoder.request.streamer is not None:
            decoder.request.streamer.end()
        cache = model_kwargs.get("past_key_values")
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
            past_key_values=cache,
            stats=decoder.stats,
            compile_seconds=decoder.steps.compile_seconds,
        )

    def _stock_loop(
        self, input_ids: torch.Tensor, draft: PardDraftModel, prepared: dict[str, Any], model_kwargs: dict[str, Any]
    ) -> Any:
        """Serve by the host's assisted loop a call that our cache cannot."""
        generators: list[PardCandidateGenerator] = []
        output = super()._assisted_decoding(
            input_ids, **prepared, assistant_model=BoundDraft(draft, generators), **model_kwargs
        )
        return with_stats(output, generators[0].stats)

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
        )
        bound.generators.append(generator)
        return generator


@dataclass
class BoundDraft:
    """A draft on its way through the stock loop, and the generators made from it: the loop does not return them."""

    draft: PardDraftModel
    generators: list[PardCandidateGenerator]


def with_stats(output: Any, stats: DecodingStats) -> Any:
    """Add statistics to what the host returned, where that is more than a tensor."""
    if not isinstance(output, GenerateDecoderOnlyOutput):
        return output
    return PardGenerateOutput(**output, stats=stats)


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
