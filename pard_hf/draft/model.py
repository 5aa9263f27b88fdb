"""The parallel draft model: an ordinary causal LM plus one reserved vocabulary entry, the mask token.

On disk it is AMD's checkpoint (https://huggingface.co/papers/2504.18583): an ordinary directory whose config holds
`pard_token` and `spd_type: "pard"`; in Python the id is `mask_token_id`.

Shapes: B batch size, K `num_assistant_tokens`, V vocabulary size of the draft.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
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
from .addons import (
    ADDONS,
    CORRECTION_HEAD,
    TRIMMED_VOCABULARY,
    WEIGHTS_FILE,
    is_addon_weight,
    load_addons,
    save_addons,
    without_addons,
)
from .correction_head import CorrectedPositions, CorrectionHead
from .known_drafts import known_draft_for
from .mask_token import check_mask_token, ids_named_in
from .vocabulary import TrimmedVocabulary, check_head, head_of, kept_token_ids

logger = logging.getLogger(__name__)

DEFAULT_NUM_ASSISTANT_TOKENS = 12
# Keys under which other tools look for a mask token, some before `pard_token`: a checkpoint holds none of them.
OTHER_MASK_KEYS = ("mask_token_id", "ptd_token_id", "dspark_noise_token_id", "dflash_config")
# Arguments of `push_to_hub` that `save_pretrained(push_to_hub=True)` takes.
PUSH_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")
# The name in the card of a draft that has not been pushed.
UNNAMED_DRAFT = "FOLDER-OR-HUB-ID"
TAGS = ("pard", "speculative-decoding", "parallel-drafting")
CARD = """
# {repo_id}

A parallel draft model ([PARD](https://huggingface.co/papers/2504.18583)) that proposes {num_assistant_tokens} tokens
in one forward{addons}.

```python
from pard_hf import PardDraftModel, with_pard

draft = PardDraftModel.from_pretrained("{repo_id}", dtype="auto")
output = with_pard(target).generate(**inputs, assistant_model=draft)
```
"""


def saved_mask_token(config: Any, name: Any) -> int:
    """Return the mask token of a checkpoint's config; raise a `ValueError` that names the checkpoint without one."""
    mask_token_id: int | None = getattr(config, "pard_token", None)
    if mask_token_id is None:
        raise ValueError(
            f"Expected a PARD checkpoint, but the config of `{name}` has no `pard_token`. Pass `mask_token_id=` "
            "(an id the tokenizer never produces), or load a draft made by `pard train`."
        )
    return mask_token_id


class PardDraftModel(PreTrainedModel):
    """A causal LM adapted to propose several tokens in one forward pass.

    Fed `K - 1` mask tokens after the last real token, it proposes at the last `K` positions. An instance is the base
    model under a subclass of its own class: state-dict names, forward and `config.architectures` stay the same.

    >>> draft = PardDraftModel.from_pretrained("amd/PARD-Qwen2.5-0.5B", dtype="auto")
    >>> output = target.generate(**inputs, assistant_model=draft, max_new_tokens=64)
    """

    correction_head: CorrectionHead | None
    trimmed_vocabulary: TrimmedVocabulary | None
    takes_num_logits: bool  # Whether the forward takes `logits_to_keep`; an attribute, since compiled steps read it.

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.takes_num_logits = "logits_to_keep" in names_in_forwards(cls.__mro__)

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
                K, proposals a round; defaults to the checkpoint's, or to 12.
            correction_head and trimmed_vocabulary (`bool`, *optional*, defaults to `True`):
                Whether to load these add-ons where the checkpoint has them.
            kwargs:
                Go to `AutoModelForCausalLM.from_pretrained`; `use_safetensors` defaults to `True`, since pickled
                weights can run code.

        Raises:
            OSError: There is no such checkpoint, access to it is refused, or the Hub cannot be reached.
            ValueError: The checkpoint has no mask token, one outside its vocabulary, or an add-on of another draft.
        """
        name = pretrained_model_name_or_path
        loaded = AutoModelForCausalLM.from_pretrained(name, *args, **{"use_safetensors": True, **kwargs})
        model, *info = loaded if kwargs.get("output_loading_info") else (loaded,)
        if mask_token_id is None:
            mask_token_id = saved_mask_token(model.config, name)
        if num_assistant_tokens is None:
            num_assistant_tokens = model.generation_config.num_assistant_tokens or DEFAULT_NUM_ASSISTANT_TOKENS
        draft = cls.from_causal_lm(model, mask_token_id, num_assistant_tokens)
        wanted = {CORRECTION_HEAD: correction_head, TRIMMED_VOCABULARY: trimmed_vocabulary}
        load_addons(draft, name, tuple(addon for addon in ADDONS if wanted[addon]), **kwargs)
        return (draft, *info) if info else draft  # type: ignore[return-value]

    @classmethod
    def for_target(cls, target: PreTrainedModel | str, **kwargs: Any) -> PardDraftModel:
        """Load the published draft of a target: a loaded model, a folder or a Hub id.

        `kwargs` go to `from_pretrained`. A `ValueError` where no draft is known tells how to train one.
        """
        return cls.from_pretrained(known_draft_for(target, **kwargs).name, **kwargs)

    @classmethod
    def from_causal_lm(
        cls,
        model: PreTrainedModel,
        mask_token_id: int,
        num_assistant_tokens: int = DEFAULT_NUM_ASSISTANT_TOKENS,
    ) -> PardDraftModel:
        """Make a loaded causal LM a draft, in place.

        Args:
            model ([`PreTrainedModel`]):
                A decoder-only model with an LM head. The same object is returned.
            mask_token_id (`int`):
                Vocabulary id that stands for a token not yet known; one the tokenizer never produces.
            num_assistant_tokens (`int`, *optional*, defaults to 12):
                K, proposals a round, kept in the draft's `generation_config`.

        Raises:
            ValueError: The id is outside the vocabulary, K is not positive, or the model is an encoder-decoder.
        """
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"Expected a transformers model, got `{type(model).__name__}`.")
        vocab_size = model.config.get_text_config().vocab_size
        if model.config.is_encoder_decoder:
            raise ValueError(f"Expected a decoder-only draft, got the encoder-decoder `{type(model).__name__}`.")
        if type(mask_token_id) is not int or not 0 <= mask_token_id < vocab_size:
            raise ValueError(
                f"Expected `mask_token_id` to be an id in [0, {vocab_size}), got {mask_token_id!r}. Pass an unused id "
                "of the vocabulary, often one of the rows that only pad it."
            )
        check_num_assistant_tokens(num_assistant_tokens, model.config)
        for key in OTHER_MASK_KEYS:
            model.config.__dict__.pop(key, None)
        model.config.pard_token = mask_token_id
        model.config.spd_type = "pard"
        config = model.generation_config
        config.num_assistant_tokens = num_assistant_tokens
        # The stock loop would otherwise change K from round to round and cut proposals by the draft's confidence.
        config.num_assistant_tokens_schedule = "constant"
        config.assistant_confidence_threshold = 0.0
        config._from_model_config = False  # Else loading would drop keys that transformers does not have.
        if not isinstance(model, PardDraftModel):
            base: Any = type(model)
            model.__class__ = draft_class(base)
        for addon in ADDONS:
            if not hasattr(model, addon):
                setattr(model, addon, None)
        return model

    @property
    def device(self) -> torch.device:
        """Return the device of inputs; offloaded weights are on the meta device between two forwards."""
        return input_device(self)

    @property
    def mask_token_id(self) -> int:
        """Return the id fed at positions to predict (`pard_token` on disk)."""
        return self.config.pard_token

    @property
    def num_assistant_tokens(self) -> int:
        """Return K, the default number of proposals a round."""
        return self.generation_config.num_assistant_tokens

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
            input_ids and attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The text so far, left-padded where the mask (*optional*) is 0.
            num_assistant_tokens (`int`, *optional*):
                K; defaults to the draft's own.
            past_key_values ([`DynamicCache`], *optional*):
                Cache over the first columns of `input_ids`, extended in place by real tokens only.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, K, vocab_size)`: the logits of the K positions after the text,
            -inf at the mask token. With a correction head each position depends on the best tokens before it.
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
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # The mask of an earlier call may be shorter or longer than the text; mask tokens are attended like text.
        num_missing = length + num_drafts - 1 - attention_mask.shape[1]
        visible = torch.nn.functional.pad(attention_mask, (0, num_missing), value=1)
        positions = (visible.cumsum(-1) - 1).clamp(min=0, max=num_positions(self.config) - 1)
        logits, hidden = self.position_logits(
            num_drafts,
            input_ids=self.readable(torch.cat([input_ids[:, num_past:], masks], dim=1)),
            attention_mask=None if bool(visible.all()) else visible,
            position_ids=positions[:, num_past:],
            use_cache=True,
            **{cache_argument(self): past_key_values},
        )
        past_key_values.crop(-(num_drafts - 1))
        return self.chain(self.proposal_scores(logits), hidden, best)[1]

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the base model does, but propose K tokens to the assisted loop of transformers.

        That loop calls once a round, with `generation_config.is_assistant` set.
        """
        generation_config = kwargs.get("generation_config")
        if isinstance(generation_config, GenerationConfig) and generation_config.is_assistant:
            return self._generate_as_assistant(*args, **kwargs)
        return super().generate(*args, **kwargs)

    def trim_vocabulary(self, token_ids: Iterable[int] | str | Path, keep: int | None = None) -> PardDraftModel:
        """Restrict proposals to some tokens, in place: a smaller product with the LM head, and the same output.

        Args:
            token_ids (`Iterable[int]` or `str`):
                The ids that may be proposed, or a file of counts as `pard data` writes it.
            keep (`int`, *optional*):
                How many of them, the most frequent first; all by default.

        Raises:
            ValueError: No id is left, one is outside the vocabulary, or the file holds no counts.
        """
        check_head(self)
        vocab_size = self.config.get_text_config().vocab_size
        kept = kept_token_ids(token_ids, vocab_size, self.mask_token_id, keep)
        self.trimmed_vocabulary = TrimmedVocabulary(self, kept)
        return self

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """Save the draft as serving engines load it, with its add-ons in subfolders.

        The config has one mask key, and its rope also under the keys of transformers 4.

        Raises:
            ValueError: The base model's class would not load these weights (unmerged adapters, say).
        """
        weights = state_dict or {}
        if state_dict is not None:
            state_dict = {name: tensor for name, tensor in weights.items() if not is_addon_weight(name)}
        is_pushed = kwargs.pop("push_to_hub", False)  # transformers would upload before the add-ons are written.
        push = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        with without_addons(self):
            if state_dict or state_dict is None:  # DeepSpeed passes an empty one and writes the weights itself.
                check_loadable(self, state_dict)
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        folder = Path(save_directory)
        if is_main_process and folder.is_dir():  # transformers logs a path that is a file, and saves nothing.
            save_addons(self, folder, weights)
            normalize_config(folder / "config.json")
            for file in (*folder.glob("*.safetensors"), *(folder / addon / WEIGHTS_FILE for addon in ADDONS)):
                if file.is_file():  # safetensors writes files that only their owner can read.
                    file.chmod((folder / "config.json").stat().st_mode)
            if is_pushed:
                self.push_to_hub(push.pop("repo_id", folder.name), token=kwargs.get("token"), **push)

    def push_to_hub(
        self,
        repo_id: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        commit_message: str = "Upload PARD draft",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: Iterable[str] | None = None,
    ) -> CommitInfo:
        """Upload the draft with its add-ons, tokenizer and card, in one commit.

        A missing repository is created, and `revision` branched from `main`. Files of add-ons that the draft does not
        have are deleted there, and an existing card is kept. `tokenizer` defaults to that of the checkpoint that the
        draft was loaded from. `pard check` lists the serving engines that can load the result.

        Raises:
            OSError: Access is refused.
            ValueError: The tokenizer produces the mask token; nothing is written.
        """
        api = HfApi(library_name="pard_hf", token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            tokenizer = self.own_tokenizer(token) if tokenizer is None else tokenizer
            if tokenizer is not None:
                check_mask_token(tokenizer, self.mask_token_id, ids_named_in(self.config, self.generation_config))
                tokenizer.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if not api.file_exists(repo_id, "README.md", revision=revision):
                self.write_card(Path(folder), repo_id, tags or ())
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=[f"{addon}/*" for addon in ADDONS],
            )

    def readable(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Replace ids beyond V, which a target with more padding rows may emit, by mask tokens."""
        return torch.where(input_ids < self.config.get_text_config().vocab_size, input_ids, self.mask_token_id)

    def position_logits(self, num_positions: int, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the forward; return the last positions' logits `[B, num_positions, V]` and hidden states.

        The hidden states `[B, num_positions, hidden_size]` are `None` without an add-on.
        """
        if self.correction_head is None and self.trimmed_vocabulary is None:
            if self.takes_num_logits:
                inputs["logits_to_keep"] = num_positions
            return self(**inputs).logits[:, -num_positions:], None
        hidden = self.base_model(**inputs).last_hidden_state[:, -num_positions:]
        if self.trimmed_vocabulary is not None:
            return self.trimmed_vocabulary.logits(self, hidden), hidden
        return head_of(self)(hidden), hidden

    def proposal_scores(self, logits: torch.Tensor, vocab_size: int | None = None) -> torch.Tensor:
        """Make draft logits `[..., V]` comparable with a target's: -inf at the mask token, `vocab_size` columns.

        Vocabularies of one tokenizer differ by padding rows, which are cut or filled with -inf.
        """
        # Filled on the device: a value of the host would be copied there in every round, and no capture allows that.
        masked = torch.full((), self.mask_token_id, device=logits.device)
        logits = logits.index_fill(-1, masked, -torch.inf)
        width = logits.shape[-1]
        if vocab_size in (None, width):
            return logits
        return torch.nn.functional.pad(logits, (0, vocab_size - width), value=-torch.inf)

    def chain(
        self, scores: torch.Tensor, hidden: torch.Tensor | None, choose: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose a token for each of the K positions; return tokens `[B, K]` and their logits `[B, K, V]`.

        `scores` come from [`proposal_scores`]; `choose` maps logits `[..., V]` to tokens `[...]`.
        """
        if self.correction_head is None or hidden is None:
            return choose(scores), scores
        return CorrectedPositions(self.correction_head, hidden, scores).chain(choose)

    def _generate_as_assistant(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        max_new_tokens: int,
        logits_processor: Any = (),
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput:
        """Propose `max_new_tokens` tokens; scores are the logits they were drawn from, as the ratio test needs."""
        past: DynamicCache | None = cache_in(kwargs)
        if past is None:
            past = croppable_cache(self.config)
        drafted = self.draft(input_ids, attention_mask, max_new_tokens, past).float()
        num_prompt_tokens = input_ids.shape[1]
        scores: tuple[torch.Tensor, ...] = ()
        for step in drafted.unbind(dim=1):
            for processor in logits_processor:
                step = processor(input_ids, step)
            if generation_config.do_sample:
                token = torch.multinomial(step.softmax(dim=-1), num_samples=1)
            else:
                token = step.argmax(dim=-1, keepdim=True)
            scores += (step,)
            input_ids = torch.cat([input_ids, token], dim=1)
        # transformers 5.17 looks for an end token at the last proposal only.
        num_kept = num_until_end(input_ids[:, num_prompt_tokens:], generation_config.eos_token_id)
        input_ids, scores = input_ids[:, : num_prompt_tokens + num_kept], scores[:num_kept]
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, **{CACHE_NAME: past})

    def own_tokenizer(self, token: bool | str | None) -> PreTrainedTokenizerBase | None:
        """Load the tokenizer of the checkpoint that the draft was loaded from, if it has one."""
        name, commit = self.config.name_or_path, getattr(self.config, "_commit_hash", None)
        try:
            return AutoTokenizer.from_pretrained(name, revision=commit or "main", token=token, trust_remote_code=False)
        except (OSError, ValueError):
            logger.warning("The draft is pushed without a tokenizer, as its checkpoint has none: pass `tokenizer=`.")
            return None

    def write_card(self, folder: Path, repo_id: str, tags: Iterable[str]) -> None:
        """Write the card and the provenance that `pard train` saved with the checkpoint, else a short card."""
        source = Path(self.config.name_or_path)
        is_trained_here = bool(self.config.name_or_path) and (source / "provenance.json").is_file()
        if is_trained_here:
            shutil.copyfile(source / "provenance.json", folder / "provenance.json")
        if is_trained_here and (source / "README.md").is_file():
            card = ModelCard((source / "README.md").read_text(encoding="utf-8").replace(UNNAMED_DRAFT, repo_id))
        else:
            data = ModelCardData(
                library_name="transformers", pipeline_tag="text-generation", tags=[*TAGS, "draft-model"]
            )
            if is_trained_here:
                base = json.loads((source / "provenance.json").read_text(encoding="utf-8")).get("base")
                data.base_model = base if base and "/" in base else None  # Not a folder.
            addons = "".join(f", with a {addon.replace('_', ' ')}" for addon in ADDONS if getattr(self, addon))
            text = CARD.format(repo_id=repo_id, num_assistant_tokens=self.num_assistant_tokens, addons=addons)
            card = ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
        card.data["tags"] = [*(card.data.get("tags") or ()), *tags]
        card.save(folder / "README.md")


def best(scores: torch.Tensor) -> torch.Tensor:
    """Return the most likely token of each position."""
    return scores.argmax(dim=-1)


def num_until_end(proposals: torch.Tensor, eos_token_id: torch.Tensor | list[int] | int | None) -> int:
    """Count the proposals `[1, K]` up to and including the first end token."""
    if eos_token_id is None:
        return proposals.shape[1]
    is_end = torch.isin(proposals[0], torch.as_tensor(eos_token_id, device=proposals.device))
    return int((is_end.cumsum(-1) - is_end.long() == 0).sum())


@cache
def draft_class(base: type[PreTrainedModel]) -> type[PardDraftModel]:
    """Make the drafting subclass of `base` under its name, so that a saved config names a known architecture.

    Its `forward(objective=…)` returns `objective(model, …)`: DDP and FSDP need the loss computed inside `forward`.
    """

    @wraps(base.forward)
    def forward(self: Any, *args: Any, objective: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if objective is None:
            return base.forward(self, *args, **kwargs)
        return objective(self, *args, **kwargs)

    made = subclass_named_as(base, PardDraftModel, draft_class)
    made.forward = forward
    return made


def normalize_config(file: Path) -> None:
    """Rewrite a `config.json` for engines: one mask key, and the rope also under the keys of transformers 4."""
    config = without_keys(json.loads(file.read_text(encoding="utf-8")), (*OTHER_MASK_KEYS, "n_predict"))
    config |= legacy_rope(config)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` as the top-level keys of transformers 4, which has none for ropes that vary by layer.

    >>> legacy_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}})
    {'rope_theta': 1000000.0}
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    keys = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in rope.items() if key not in keys}
    return keys


def without_keys(value: Any, keys: tuple[str, ...]) -> Any:
    """Copy a JSON value without the given keys, at any depth."""
    if isinstance(value, dict):
        return {key: without_keys(inner, keys) for key, inner in value.items() if key not in keys}
    return [without_keys(inner, keys) for inner in value] if isinstance(value, list) else value


def check_loadable(model: PreTrainedModel, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Raise a `ValueError` unless the weights have the names and shapes of a model made from the config.

    Others (an adapter, a parametrization) would not be loaded, and missing ones (of a removed layer) would be random.
    A quantized model is left to its quantizer; empty tensors, which stand for sharded ones, are compared by name.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    classes = classes if isinstance(classes, tuple) else (classes,)
    model_class = next((one for one in classes if isinstance(model, one)), type(model))
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=()):
            made = model_class(copy.deepcopy(model.config))
    except Exception as error:  # Code of the Hub may compute with its weights while it is made.
        logger.info("%s cannot be made on the meta device, so its weights are not checked: %s", model_class, error)
        return
    weights = model.state_dict() if weights is None else weights
    weights = {name: tensor for name, tensor in weights.items() if not is_addon_weight(name)}
    own, tied = made.state_dict(), getattr(made, "all_tied_weights_keys", None) or ()
    foreign = [n for n, tensor in weights.items() if n not in own or (tensor.numel() and tensor.shape != own[n].shape)]
    missing = [name for name in own if name not in weights and name not in tied]
    problems = [
        f"{len(names)} {what} (`{'`, `'.join(names[:3])}`{', …' * (len(names) > 3)})"
        for names, what in ((foreign, "that are not among them"), (missing, "missing"))
        if names
    ]
    if problems:
        raise ValueError(
            f"Expected the weights of `{model_class.__name__}` by its config, got {' and '.join(problems)}: saved, it "
            "would load as another draft. Merge adapters (`merge_and_unload()` of peft), remove parametrizations, and "
            "correct the config's sizes."
        )
