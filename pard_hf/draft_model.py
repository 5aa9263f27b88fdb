"""The parallel draft model: an ordinary causal LM plus one reserved vocabulary entry.

Knows how a draft checkpoint looks on disk and how K proposals come out of one forward. Knows nothing of verification
or of the target. The on-disk layout is that of https://huggingface.co/papers/2504.18583 (AMD's drafts): an ordinary
directory whose config holds `pard_token` and `spd_type: "pard"`; in Python the id is `mask_token_id`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from .drafting import DraftingModel, num_until_end
from .host import CACHE_NAME, cache_in
from .hub.errors import hub_errors
from .language_model_head import check_head
from .loadable import check_loadable
from .parts import CORRECTION_HEAD, PARTS, TRIMMED_VOCABULARY, is_of_part, load_parts, save_parts, without_parts
from .positions import check_num_assistant_tokens, croppable_cache
from .subclass import subclass_named_as
from .trimmed_vocabulary import TrimmedVocabulary, kept_token_ids

DEFAULT_NUM_ASSISTANT_TOKENS = 12
# What `save_pretrained(push_to_hub=True)` may say of the upload.
PUSH_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")
# Keys under which other tools look for a mask token, some before `pard_token`: a checkpoint holds none of them.
OTHER_MASK_KEYS = ("mask_token_id", "ptd_token_id", "dspark_noise_token_id", "dflash_config")


class PardDraftModel(DraftingModel):
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
        correction_head: bool = True,
        trimmed_vocabulary: bool = True,
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
            correction_head (`bool`, *optional*, defaults to `True`) and trimmed_vocabulary (`bool`, *optional*):
                Whether to load these where the checkpoint has them.
            kwargs:
                Anything `AutoModelForCausalLM.from_pretrained` takes. Weights must be safetensors unless
                `use_safetensors=False` says otherwise: pickled weights can run code.

        Raises:
            OSError: There is no such checkpoint, the Hub keeps it closed, or it cannot be reached.
            ValueError: The checkpoint has no mask token, or one outside its vocabulary, or a correction head or
                trimmed vocabulary that belongs to another draft.
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
        wanted = {CORRECTION_HEAD: correction_head, TRIMMED_VOCABULARY: trimmed_vocabulary}
        with hub_errors(pretrained_model_name_or_path, kwargs.get("revision")):
            parts = tuple(part for part, is_wanted in wanted.items() if is_wanted)
            load_parts(draft, pretrained_model_name_or_path, parts, **kwargs)
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
        # It no longer follows from the model's config; one that does loses keys the host does not know when loaded.
        generation_config._from_model_config = False
        if not isinstance(model, PardDraftModel):
            base: Any = type(model)
            model.__class__ = draft_class(base)
        for part in PARTS:
            if not hasattr(model, part):
                setattr(model, part, None)
        return model

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """Save as the base model does; correction head and trimmed vocabulary get files of their own beside it.

        Raises:
            ValueError: The weights are not those that the base model's class would load (live adapters, say).
        """
        weights = state_dict or {}
        if state_dict is not None:
            state_dict = {name: tensor for name, tensor in weights.items() if not is_of_part(name)}
        is_pushed = kwargs.pop("push_to_hub", False)  # The host would upload before the parts are there.
        hub = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        with without_parts(self):
            if state_dict or state_dict is None:  # DeepSpeed hands over an empty one and writes the weights itself.
                check_loadable(self, self.state_dict() if state_dict is None else state_dict)
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        # The host reports a path that is a file, and saves nothing.
        if is_main_process and Path(save_directory).is_dir():
            save_parts(self, Path(save_directory), weights)
            if is_pushed:
                self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), token=kwargs.get("token"), **hub)

    def trim_vocabulary(self, token_ids: Iterable[int] | str | Path, keep: int | None = None) -> PardDraftModel:
        """Draft over some tokens only, in place: a smaller head product, and the output stays what it was.

        Args:
            token_ids (`Iterable[int]` or `str`):
                The ids that may be proposed, or a file of counts as `pard data` writes it.
            keep (`int`, *optional*):
                How many of them, the most frequent first; all by default.

        Raises:
            ValueError: No id is left, one lies outside the vocabulary, or the file holds no counts.
        """
        check_head(self)
        vocab_size = self.config.get_text_config().vocab_size
        self.trimmed_vocabulary = TrimmedVocabulary(
            self, kept_token_ids(token_ids, vocab_size, self.mask_token_id, keep)
        )
        return self

    def push_to_hub(self, repo_id: str, tokenizer: Any = None, **kwargs: Any) -> Any:
        """Upload the draft as engines load it, with tokenizer and card; see [`~pard_hf.hub.upload.push_draft`]."""
        from .hub.upload import push_draft

        return push_draft(self, repo_id, tokenizer, **kwargs)

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
        **others: Any,
    ) -> GenerateDecoderOnlyOutput:
        """Answer one call of the stock loop; `max_new_tokens` is K, fewer near the end.

        Scores are returned as the proposals were drawn from them: the host's ratio test needs their very law.
        """
        past: DynamicCache | None = cache_in(others)
        if past is None:
            past = croppable_cache(self.config)
        drafted = self.draft(input_ids, attention_mask, max_new_tokens, past).float()
        num_prompt_tokens = input_ids.shape[1]
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
        # Older versions of transformers (5.17) have a loop that looks for an end at the last token of a block only.
        num_kept = num_until_end(input_ids[:, num_prompt_tokens:], generation_config.eos_token_id)
        input_ids, scores = input_ids[:, : num_prompt_tokens + num_kept], scores[:num_kept]
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, **{CACHE_NAME: past})


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
