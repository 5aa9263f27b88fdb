"""Whether a live model comes back as it is when it is saved and loaded: the weights its class makes of its config.

Knows names and shapes; knows nothing of drafts. What the class does not have (an adapter, a parametrization) would be
left unread, and what it has and the model lacks (a layer taken out) would be made up at random.

From one forward of the draft to K proposals.

Knows the draft's logits and hidden states; knows nothing of how a draft is loaded, and nothing of verification.

The parallel draft model: an ordinary causal LM plus one reserved vocabulary entry.

Knows how a draft checkpoint looks on disk and how K proposals come out of one forward. Knows nothing of verification
or of the target. The on-disk layout is that of https://huggingface.co/papers/2504.18583 (AMD's drafts): an ordinary
directory whose config holds `pard_token` and `spd_type: "pard"`; in Python the id is `mask_token_id`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation import GenerateDecoderOnlyOutput

from ..host import (
    CACHE_NAME,
    cache_argument,
    cache_in,
    check_num_assistant_tokens,
    croppable_cache,
    input_device,
    names_in_forwards,
    num_positions,
    subclass_named_as,
)
from ..hub.errors import hub_errors
from .addons import (
    CORRECTION_HEAD,
    PARTS,
    TRIMMED_VOCABULARY,
    is_of_part,
    load_parts,
    needs_hidden_states,
    save_parts,
    without_parts,
)
from .correction_head import CorrectedPlaces, CorrectionHead
from .vocabulary import TrimmedVocabulary, check_head, head_of, kept_token_ids

logger = logging.getLogger(__name__)


def check_loadable(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise a `ValueError` where weights are others than those of the class and config that would load them.

    Args:
        model ([`PreTrainedModel`]):
            The model; one that is quantized is left to its quantizer.
        weights (`Mapping[str, torch.Tensor]`):
            Its state dict, of whole tensors or of empty ones, as they are where weights are sharded.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    made = made_of_config(model)
    if made is None:
        return
    own = made.state_dict()
    tied = set(getattr(made, "all_tied_weights_keys", None) or ())
    foreign = [
        name
        for name, tensor in weights.items()
        if name not in own or (tensor.numel() and tensor.shape != own[name].shape)
    ]
    missing = [name for name in own if name not in weights and name not in tied]
    if foreign or missing:
        raise ValueError(
            f"Expected the weights of `{type(made).__name__}` as its config has them, got "
            + " and ".join(
                f"{len(names)} {what} (`{'`, `'.join(names[:3])}`{', …' * (len(names) > 3)})"
                for names, what in ((foreign, "that are not among them"), (missing, "missing"))
                if names
            )
            + ": saved and loaded again it would be another draft. Merge adapters first (`merge_and_unload()` of "
            "peft), take parametrizations off, and let the config say how many layers and rows there are."
        )


def made_of_config(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model as loading its config makes it, without memory for weights; `None` where it cannot be made so."""
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    classes = classes if isinstance(classes, tuple) else (classes,)
    own = type(model)
    loading = next((one for one in classes if issubclass(own, one)), own)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=()):
            return loading(copy.deepcopy(model.config))
    except Exception as error:  # Code of the Hub may compute with its weights while it is made.
        logger.info("%s cannot be made without weights, so what is saved is not compared: %s", loading.__name__, error)
        return None


class DraftingModel(PreTrainedModel):
    """What makes a causal LM propose; see [`PardDraftModel`].

    A checkpoint may bring a `correction_head` and a `trimmed_vocabulary` beside the base model's weights.
    """

    correction_head: CorrectionHead | None
    trimmed_vocabulary: TrimmedVocabulary | None
    # Whether the forward can be asked for its last rows of logits only.
    takes_num_logits: bool

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.takes_num_logits = "logits_to_keep" in names_in_forwards(cls.__mro__)

    @property
    def device(self) -> torch.device:
        """Where inputs go; offloaded weights lie on the meta device between two forwards."""
        return input_device(self)

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

    def places(self, num_places: int, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the draft; logits `[B, num_places, V]` of the last places, and their hidden states where a head asks."""
        if not needs_hidden_states(self):
            if self.takes_num_logits:
                inputs["logits_to_keep"] = num_places
            return self(**inputs).logits[:, -num_places:], None
        hidden = self.base_model(**inputs).last_hidden_state[:, -num_places:]
        if self.trimmed_vocabulary is not None:
            return self.trimmed_vocabulary.logits(self, hidden), hidden
        return head_of(self)(hidden), hidden

    def chain(
        self, scores: torch.Tensor, hidden: torch.Tensor | None, choose: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose one token a place, `[B, K]`, and return the logits they were chosen from as well.

        Args:
            scores (`torch.FloatTensor` of shape `(batch_size, K, vocab_size)`):
                As [`proposal_scores`] returns them.
            choose (`Callable`):
                From logits `(..., vocab_size)` to tokens `(...)`.
        """
        if self.correction_head is None or hidden is None:
            return choose(scores), scores
        return CorrectedPlaces(self.correction_head, hidden, scores).chain(choose)

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
            first new one; the mask token itself is never proposed. With a correction head each row is about what
            follows the best tokens of the rows before it.
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
        logits, hidden = self.places(
            num_drafts,
            input_ids=self.readable(torch.cat([input_ids[:, num_past:], masks], dim=1)),
            attention_mask=None if bool(visible.all()) else visible,
            position_ids=positions[:, num_past:],
            use_cache=True,
            **{cache_argument(self): past_key_values},
        )
        past_key_values.crop(-(num_drafts - 1))
        return self.chain(self.proposal_scores(logits), hidden, best)[1]


def best(scores: torch.Tensor) -> torch.Tensor:
    """The most likely token of each place."""
    return scores.argmax(dim=-1)


def num_until_end(proposals: torch.Tensor, eos_token_id: torch.Tensor | list[int] | int | None) -> int:
    """How many proposals `[1, K]` there are up to the first end token, which counts."""
    if eos_token_id is None:
        return proposals.shape[1]
    is_end = torch.isin(proposals[0], torch.as_tensor(eos_token_id, device=proposals.device))
    return int((is_end.cumsum(-1) - is_end.long() == 0).sum())


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
        from ..hub.known_drafts import known_draft_for

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
        from ..hub.export import push_draft

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
