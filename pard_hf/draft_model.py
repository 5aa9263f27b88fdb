"""The parallel draft model: an ordinary causal LM plus one reserved vocabulary entry.

Knows how a draft checkpoint looks on disk and how K proposals come out of one forward. Knows nothing of verification
or of the target. The on-disk layout is that of https://huggingface.co/papers/2504.18583 (AMD's drafts): an ordinary
directory whose config holds `pard_token` and `spd_type: "pard"`; in Python the id is `mask_token_id`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from .hub.errors import hub_errors
from .subclass import subclass_named_as

DEFAULT_NUM_ASSISTANT_TOKENS = 12
# Keys under which other tools look for a mask token, some before `pard_token`: a checkpoint holds none of them.
OTHER_MASK_KEYS = ("mask_token_id", "ptd_token_id", "dspark_noise_token_id", "dflash_config")


class PardDraftModel(PreTrainedModel):
    """A causal LM adapted to propose several tokens in one forward pass.

    Feed `K - 1` mask tokens after the last real token and the last `K` rows of logits are the proposals. An instance
    is the base model itself under a subclass of its own class: state-dict names, forward and `config.architectures`
    stay the base model's, and everything `AutoModelForCausalLM` can do with it still works.

    >>> draft = PardDraftModel.from_pretrained("amd/PARD-Qwen2.5-0.5B", dtype="auto")
    >>> output = target.generate(**inputs, assistant_model=draft, max_new_tokens=64)
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *args: Any,
        mask_token_id: int | None = None,
        num_assistant_tokens: int | None = None,
        **kwargs: Any,
    ) -> PardDraftModel:
        """Load a draft from a directory or the Hub.

        Args:
            pretrained_model_name_or_path (`str`):
                Directory or Hub id of a PARD checkpoint.
            mask_token_id (`int`, *optional*):
                Overrides the checkpoint's `pard_token`.
            num_assistant_tokens (`int`, *optional*):
                Proposals a round; defaults to the checkpoint's, or to 12.
            kwargs:
                Anything `AutoModelForCausalLM.from_pretrained` takes. Weights must be safetensors unless
                `use_safetensors=False` says otherwise: pickled weights can run code.

        Raises:
            OSError: There is no such checkpoint, the Hub keeps it closed, or it cannot be reached.
            ValueError: The checkpoint has no mask token, or one outside its vocabulary.
        """
        kwargs.setdefault("use_safetensors", True)
        loading_info = kwargs.get("output_loading_info", False)
        with hub_errors(pretrained_model_name_or_path, kwargs.get("revision"), kwargs["use_safetensors"]):
            loaded = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, *info = loaded if loading_info else (loaded,)
        if mask_token_id is None:
            mask_token_id = getattr(model.config, "pard_token", None)
        if mask_token_id is None:
            raise ValueError(
                f"Expected a PARD checkpoint, but the config of `{pretrained_model_name_or_path}` has no `pard_token`."
                " Pass `mask_token_id=` (an id the tokenizer never produces), or load a draft made by `pard train`."
            )
        if num_assistant_tokens is None:
            num_assistant_tokens = model.generation_config.num_assistant_tokens or DEFAULT_NUM_ASSISTANT_TOKENS
        draft = cls.from_causal_lm(model, mask_token_id, num_assistant_tokens)
        return (draft, *info) if loading_info else draft  # type: ignore[return-value]

    @classmethod
    def for_target(cls, target: PreTrainedModel | str, **kwargs: Any) -> PardDraftModel:
        """Load the published draft of a target: a live model, a folder or a Hub id.

        `kwargs` go to `from_pretrained`. A `ValueError` says where none is known, and how to train one.
        """
        from .hub.known_drafts import known_draft_for

        return cls.from_pretrained(known_draft_for(target, **kwargs).name, **kwargs)

    @classmethod
    def from_causal_lm(
        cls,
        model: PreTrainedModel,
        mask_token_id: int,
        num_assistant_tokens: int = DEFAULT_NUM_ASSISTANT_TOKENS,
    ) -> PardDraftModel:
        """Turn a live causal LM into a draft, in place.

        Args:
            model ([`PreTrainedModel`]):
                A decoder-only model with a language-model head. The same object is returned.
            mask_token_id (`int`):
                Vocabulary id that stands for a token not yet known; one the tokenizer never produces.
            num_assistant_tokens (`int`, *optional*, defaults to 12):
                K, proposals a round, kept in the draft's `generation_config`.

        Raises:
            ValueError: The id lies outside the vocabulary, K is not positive, or the model is an encoder-decoder.
        """
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"Expected a transformers model, got `{type(model).__name__}`.")
        config = model.config.get_text_config()
        if model.config.is_encoder_decoder:
            raise ValueError(f"Expected a decoder-only draft, got the encoder-decoder `{type(model).__name__}`.")
        if type(mask_token_id) is not int or not 0 <= mask_token_id < config.vocab_size:
            raise ValueError(
                f"Expected `mask_token_id` to be an id in [0, {config.vocab_size}), got {mask_token_id!r}. Pass an "
                "unused id of the vocabulary, often one of the rows that only pad it."
            )
        check_num_assistant_tokens(num_assistant_tokens, model.config)
        for key in OTHER_MASK_KEYS:
            model.config.__dict__.pop(key, None)
        model.config.pard_token = mask_token_id
        model.config.spd_type = "pard"
        generation_config = model.generation_config
        generation_config.num_assistant_tokens = num_assistant_tokens
        # The stock loop would otherwise change K from round to round and cut proposals by the draft's confidence.
        generation_config.num_assistant_tokens_schedule = "constant"
        generation_config.assistant_confidence_threshold = 0.0
        if not isinstance(model, PardDraftModel):
            base: Any = type(model)
            model.__class__ = draft_class(base)
        return model

    def push_to_hub(self, repo_id: str, tokenizer: Any = None, **kwargs: Any) -> Any:
        """Upload the draft as engines load it, with tokenizer and card; see [`~pard_hf.hub.upload.push_draft`]."""
        from .hub.upload import push_draft

        return push_draft(self, repo_id, tokenizer, **kwargs)

    @property
    def mask_token_id(self) -> int:
        """The id fed at positions whose token is not known yet (`pard_token` on disk)."""
        return self.config.pard_token

    @property
    def num_assistant_tokens(self) -> int:
        """K, proposals a round, unless the call says otherwise."""
        return self.generation_config.num_assistant_tokens

    def readable(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Replace ids beyond the draft's vocabulary, which a target with more padding rows may say, by mask tokens."""
        return torch.where(input_ids < self.config.get_text_config().vocab_size, input_ids, self.mask_token_id)

    def proposal_scores(self, logits: torch.Tensor, vocab_size: int | None = None) -> torch.Tensor:
        """Make draft logits comparable with a target's: no mask token, `vocab_size` columns.

        Args:
            logits (`torch.FloatTensor` of shape `(..., draft_vocab_size)`):
                Draft logits.
            vocab_size (`int`, *optional*):
                The target's vocabulary size; a vocabulary that differs by padding rows is cut or filled with -inf.
        """
        logits = logits.index_fill(-1, torch.tensor(self.mask_token_id, device=logits.device), -torch.inf)
        width = logits.shape[-1]
        if vocab_size is None or vocab_size == width:
            return logits
        if vocab_size < width:
            return logits[..., :vocab_size]
        return torch.nn.functional.pad(logits, (0, vocab_size - width), value=-torch.inf)

    @torch.no_grad()
    def draft(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_assistant_tokens: int | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Propose K tokens in one forward.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The text so far; left-padded where `attention_mask` says so.
            attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for text, 0 for padding.
            num_assistant_tokens (`int`, *optional*):
                K; defaults to the draft's own.
            past_key_values ([`DynamicCache`], *optional*):
                Cache over the first columns of `input_ids`, extended in place. It is left with real tokens only:
                entries at masks were computed without knowing their neighbours.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, K, vocab_size)`: row `k` is about the token `k` places after the
            first new one; the mask token itself is never proposed.
        """
        num_drafts = self.num_assistant_tokens if num_assistant_tokens is None else num_assistant_tokens
        check_num_assistant_tokens(num_drafts, self.config)
        if input_ids.shape[1] == 0:
            raise ValueError("Expected at least one token to draft from, got none.")
        if past_key_values is None:
            past_key_values = croppable_cache(self.config)
        past_key_values.activate_past_recording()
        num_past, length = past_key_values.get_seq_length(), input_ids.shape[1]
        masks = input_ids.new_full((len(input_ids), num_drafts - 1), self.mask_token_id)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # Only as far as the text goes: masks are attended like text, and an older mask may cover more or less.
        visible = torch.nn.functional.pad(
            attention_mask, (0, length + num_drafts - 1 - attention_mask.shape[1]), value=1
        )
        positions = (visible.cumsum(-1) - 1).clamp(min=0, max=num_positions(self.config) - 1)
        output = self(
            input_ids=self.readable(torch.cat([input_ids[:, num_past:], masks], dim=1)),
            attention_mask=None if bool(visible.all()) else visible,
            position_ids=positions[:, num_past:],
            past_key_values=past_key_values,
            use_cache=True,
            logits_to_keep=num_drafts,
        )
        past_key_values.crop(-(num_drafts - 1))
        return self.proposal_scores(output.logits[:, -num_drafts:])

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Propose when a stock `generate()` asks, else generate as the base model does.

        The stock assisted loop calls its assistant's `generate` once a round with `generation_config.is_assistant`
        set; it gets K tokens from one forward. Everything else, a plain `draft.generate(...)` included, is the host's.
        """
        generation_config = kwargs.get("generation_config")
        if not (isinstance(generation_config, GenerationConfig) and generation_config.is_assistant):
            return super().generate(*args, **kwargs)
        return self._generate_as_assistant(*args, **kwargs)

    def _generate_as_assistant(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        max_new_tokens: int,
        logits_processor: Any = (),
        attention_mask: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        **_: Any,
    ) -> GenerateDecoderOnlyOutput:
        """Answer one call of the stock loop; `max_new_tokens` is K, fewer near the end.

        Scores are returned as the proposals were drawn from them: the host's ratio test needs their very law.
        """
        if past_key_values is None:
            past_key_values = croppable_cache(self.config)
        drafted = self.draft(input_ids, attention_mask, max_new_tokens, past_key_values).float()
        scores: tuple[torch.Tensor, ...] = ()
        for column in range(max_new_tokens):
            step = drafted[:, column]
            for processor in logits_processor:
                step = processor(input_ids, step)
            if generation_config.do_sample:
                token = torch.multinomial(step.softmax(dim=-1), num_samples=1)
            else:
                token = step.argmax(dim=-1, keepdim=True)
            scores += (step,)
            input_ids = torch.cat([input_ids, token], dim=1)
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, past_key_values=past_key_values)


@cache
def draft_class(base: type[PreTrainedModel]) -> type[PardDraftModel]:
    """The subclass of `base` that drafts; named as `base`, so that a saved config names a known architecture.

    Its `forward(objective=…)` returns what the objective makes of the model and the other arguments. Training needs
    its loss computed inside `forward`, which is all that wrappers like DDP and FSDP see; without an objective the
    forward is the base model's.
    """

    @wraps(base.forward)
    def forward(self: Any, *args: Any, objective: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if objective is None:
            return base.forward(self, *args, **kwargs)
        return objective(self, *args, **kwargs)

    made = subclass_named_as(base, PardDraftModel, draft_class)
    made.forward = forward
    return made


def croppable_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache from which the host may take back any number of entries.

    Sliding layers forget what lies before their window, and the stock loop takes back more than was proposed; keeping
    every entry costs memory and changes no mask.
    """
    cache = DynamicCache(config=config)
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return DynamicCache()
    return cache


def num_positions(config: PreTrainedConfig) -> int:
    """Positions a model was made for; without bound for the few configs that name none."""
    return getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)


def check_num_assistant_tokens(num_assistant_tokens: int, *configs: PreTrainedConfig) -> None:
    """Raise a `ValueError` unless K is a positive integer that fits the positions of every model."""
    if isinstance(num_assistant_tokens, bool) or not isinstance(num_assistant_tokens, int) or num_assistant_tokens < 1:
        raise ValueError(
            f"Expected `num_assistant_tokens` to be an integer of at least 1, got {num_assistant_tokens!r}."
        )
    for config in configs:
        positions = num_positions(config)
        if num_assistant_tokens >= positions:
            raise ValueError(
                f"Expected `num_assistant_tokens` below the {positions} positions of `{type(config).__name__}`, got "
                f"{num_assistant_tokens}. Common values are 4 to 16."
            )
