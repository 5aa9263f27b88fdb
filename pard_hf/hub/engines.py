"""Check whether vLLM and TensorRT-LLM would load a checkpoint as a parallel draft, by a table of rules.

Read in the source of vLLM 0.16.0, 0.32.0 and 0.33.0: `v1/spec_decode/` (mask token, M-RoPE, layers),
`config/speculative.py` (method, vocabulary, `n_predict`), `transformers_utils/config.py` (M-RoPE) and
`config/model.py` (quantization, positions); and of TensorRT-LLM: `_torch/models/modeling_speculative.py`
(PARDForCausalLM). `make test-engines` runs vLLM; TensorRT-LLM is not run. The architectures that they implement are
not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..draft.mask_token import check_mask_token
from ..draft.model import OTHER_MASK_KEYS, legacy_rope
from ..draft.packaged import WEIGHTS_FILE, is_packaged
from ..host import compare_tokenizers
from .checkpoint import (
    DRAFT_FILES,
    TARGET_FILES,
    is_known_model,
    load_tokenizer,
    local_folder,
    read_json,
    tensor_shapes,
    text_config,
    tokenizer_files,
    vocab_size,
    vocabulary_rows,
)

# Words in a draft's name, case aside, that decide the method in vLLM before `"method": "draft_model"` does.
METHODS_BY_NAME = {"eagle-": "eagle", "eagle3": "eagle3", "dflash": "dflash", "dspark": "dspark"}
# `SpeculativeConfig.hf_config_override` turns each of these, of a target as of a draft, into its MTP layers.
MTP_MODEL_TYPES = frozenset(
    "bailing_hybrid deepseek_v3 deepseek_v32 deepseek_v4 deepseek_v41 dots3_note ernie4_5_moe exaone_moe "
    "gemma4_assistant gemma4_unified_assistant glm5_next glm_moe_dsa hy_v3 hy_v4 inkling_mm_model inkling_model "
    "intern_s2_preview interns2_mobius kimi_k3 longcat_flash minimax_m3_vl pangu_ultra_moe qwen3_5 qwen3_5_moe "
    "qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text step3p5 step3p7 step5 step5_vl".split()
)
MTP_ARCHITECTURES = frozenset(
    "BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM BailingMoeV3VLForConditionalGeneration Glm4MoeForCausalLM "
    "Glm4MoeLiteForCausalLM GlmOcrForConditionalGeneration MiMoForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM "
    "MiMoV2OmniForCausalLM MiniMaxM3SparseForConditionalGeneration MistralLarge3ForCausalLM "
    "NemotronH_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3 Step3p5ForCausalLM "
    "Step3p7ForConditionalGeneration Step5ForCausalLM Step5ForConditionalGeneration".split()
)
# `quant_method`s that 0.32 and 0.33 read. 0.16 also read `bitsandbytes` and `gguf`.
QUANTIZATIONS = frozenset(
    "auto-round auto_awq auto_gptq awq awq_marlin compressed-tensors deepseek_v4_fp8 experts_int8 fp8 fp8_per_block "
    "fp8_per_channel fp8_per_tensor gpt_oss_mxfp4 gptq gptq_marlin humming inc int8_per_channel_weight_only "
    "modelopt modelopt_fp4 modelopt_mixed modelopt_mxfp8 moe_wna16 mxfp4 mxfp8 nvfp4_per_token online quark "
    "torchao".split()
)
# Keys of a config that bound the positions; the smallest value holds.
POSITION_KEYS = (
    "max_position_embeddings n_positions max_seq_len seq_length model_max_length max_target_positions "
    "max_sequence_length max_seq_length seq_len".split()
)
# Ropes whose factor is in the number of positions already.
SCALED_ROPES = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
# Used by transformers 4 where the top level of a config has no `rope_theta`.
DEFAULT_ROPE_THETA = 10000.0

Engine = Literal["vLLM", "TensorRT-LLM"]
# As shown to users, with the releases that the rules cover.
ENGINES: dict[Engine, str] = {"vLLM": "vLLM >= 0.16", "TensorRT-LLM": "TensorRT-LLM"}
BOTH: Literal["both"] = "both"
BLOCKING, NOTE = True, False  # Whether a finding is blocking.


@dataclass(frozen=True)
class Finding:
    """A violated rule, with a message that tells what to do and names no folder.

    It is blocking where some release of the engine refuses the checkpoint or drafts wrongly from it.
    """

    engine: Engine | Literal["both"]
    is_blocking: bool
    message: str


class Draft:
    """The files of a draft and its target, each read once; a `…_problem` is the error message of a failed read."""

    def __init__(self, config: dict[str, Any], folder: Path, name: str, target_folder: Path | None):
        self.config, self.folder, self.name, self.target_folder = config, folder, name, target_folder
        self.text = text_config(config)
        self.mask_token_id = config.get("pard_token")
        self.vocab_size, self.vocab_problem = tried(vocab_size, config)
        num_drafts = (tried(read_json, folder, "generation_config.json")[0] or {}).get("num_assistant_tokens")
        self.num_drafts = num_drafts if isinstance(num_drafts, int) else None
        inner = config.get("text_config")
        parts = (config, inner) if isinstance(inner, dict) else (config,)
        found = [part.get("quantization_config", part.get("compression_config")) for part in parts]
        self.quantization = [quantization_method(part) for part in found if part is not None][:1]
        self.shapes, self.weight_problem = tried(engine_shapes, folder)
        self.rows: dict[str, int | None] = {}  # Of embedding and LM head, by the names of their tensors.
        self.model_problem = None
        if self.shapes and self.vocab_size:
            rows, self.model_problem = tried(vocabulary_rows, folder, self.shapes)
            self.rows = rows or {}
        self.target = {} if target_folder is None else read_json(target_folder, "config.json")
        self.tokenizer, self.tokenizer_problem = tried(load_tokenizer, folder)
        self.difference = None
        if self.tokenizer is not None and target_folder is not None and tokenizer_files(target_folder):
            self.difference = compare_tokenizers(self.tokenizer, load_tokenizer(target_folder))


def tried(read: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """Return what a function reads, or `None`, and the message of its error, or `None`."""
    try:
        return read(*arguments), None
    except ValueError as error:
        return None, str(error)


def engine_shapes(folder: Path) -> dict[str, list[int]]:
    """Read the shapes of a checkpoint's tensors; raise a `ValueError` for the small form, which no engine reads."""
    if is_packaged(folder):
        raise ValueError(
            f"{WEIGHTS_FILE} holds the draft in 8 bit, without what it shares with its target, as only this package "
            "reads it: run `pard export --target …`, which writes it whole."
        )
    return tensor_shapes(folder)


def nested_mask_token(draft: Draft) -> str | None:
    """Find the key of the part of config.json that holds `pard_token` where the top level does not."""
    parts = draft.config.items() if draft.mask_token_id is None else ()
    return next((key for key, part in parts if isinstance(part, dict) and "pard_token" in part), None)


def keys_before_pard_token(draft: Draft, is_same: bool) -> str:
    """List keys that vLLM reads before `pard_token` and that hold the same id, or another one."""
    found = []
    for key in (key for key in OTHER_MASK_KEYS if key in draft.config and key != "ptd_token_id"):
        value = draft.config[key]
        if draft.mask_token_id is None or (value is None and key != "dspark_noise_token_id"):  # Its null is read.
            continue
        if key == "dflash_config":
            value = value.get("mask_token_id", draft.mask_token_id) if isinstance(value, dict) else None
        if (value == draft.mask_token_id) == is_same:
            found.append(f"`{key}`")
    return ", ".join(found)


def mask_token_outside(draft: Draft) -> tuple[int, int] | None:
    size, mask = draft.vocab_size, draft.mask_token_id
    return (size, mask) if size and type(mask) is int and not 0 <= mask < size else None


def produced_mask_token(draft: Draft) -> str | None:
    if draft.tokenizer is None or type(draft.mask_token_id) is not int:
        return None
    return tried(check_mask_token, draft.tokenizer, draft.mask_token_id)[1]


def architecture(draft: Draft) -> str | None:
    """Return the class that engines look up, or `None`."""
    names = draft.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def other_architecture(draft: Draft) -> str | None:
    name = architecture(draft)
    return None if name is None or name.endswith(("ForCausalLM", "LMHeadModel")) else repr(name)


def rope_of_transformers_5_only(draft: Draft) -> str:
    """List the missing rope keys without which an engine on transformers 4 uses other values."""
    missing = {key: value for key, value in legacy_rope(draft.text).items() if key not in draft.text}
    return "" if missing == {"rope_theta": DEFAULT_ROPE_THETA} else ", ".join(f"`{key}`" for key in missing)


def has_pickled_weights(draft: Draft) -> bool:
    return any(path for pattern in ("*.bin", "*.pt") for path in draft.folder.glob(pattern))


def other_number_of_rows(draft: Draft) -> tuple[str, int, int] | None:
    size, rows = draft.vocab_size, draft.rows.items()
    return next(((name, number, size) for name, number in rows if number not in (None, size)), None)


def method_by_name(text: str) -> tuple[str, str] | None:
    """Find a word in a name that decides vLLM's method, and that method."""
    return next((found for found in METHODS_BY_NAME.items() if found[0] in text.lower()), None)


def method_by_absolute_path(draft: Draft) -> tuple[str, str] | None:
    is_folder = method_by_name(draft.name) is None and Path(draft.name).is_dir()
    return method_by_name(str(Path(draft.name).absolute())) if is_folder else None


def has_mtp_layers(config: dict[str, Any]) -> bool:
    """Return whether vLLM uses a model, also as a draft, for its multi-token prediction (MTP) layers only."""
    kind = str(config.get("model_type"))
    num_layers = config.get("num_nextn_predict_layers")
    return (
        kind in MTP_MODEL_TYPES
        or str((config.get("architectures") or [None])[0]) in MTP_ARCHITECTURES
        or kind.split("_")[-1] == "mtp"
        or "exaone4_5" in kind
        or (kind in ("nemotron_h", "nemotron_h_puzzle") and isinstance(num_layers, int) and num_layers > 0)
    )


def has_mrope(draft: Draft) -> bool:
    """Return whether the config, or one inside it, divides positions into sections."""
    thinker = draft.config.get("thinker_config")
    inner = thinker.get("text_config") if isinstance(thinker, dict) else None
    parts = [part for part in (draft.config, draft.text, draft.config.get("text_config"), inner) if part]
    return any(
        isinstance(rope.get(key), list)
        for part in parts if isinstance(part, dict)
        for rope in (part, *ropes(part))
        for key in ("mrope_section", "xdrope_section")
    )  # fmt: skip


def ropes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Iterate over the ropes of a config, by the names of transformers 5 and 4; layers may have several."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict):
            yield rope
            yield from (part for part in rope.values() if isinstance(part, dict))


def mixed_layers(draft: Draft) -> tuple[str, str] | None:
    """List layers of several kinds, and a remedy; with chunked attention vLLM forms no groups of caches."""
    kinds = draft.text.get("layer_types")
    kinds = sorted(set(map(str, kinds))) if isinstance(kinds, list) else []
    if len(kinds) < 2 or "chunked_attention" in kinds:
        return None
    is_local = kinds == ["full_attention", "sliding_attention"]
    remedy = "start vLLM with `--disable-hybrid-kv-cache-manager`" if is_local else "take a base model with one"
    return ", ".join(kinds), remedy


def n_predict(draft: Draft, fits: bool) -> str | None:
    """Show an `n_predict` that K fits (or does not)."""
    value, k = draft.config.get("n_predict"), draft.num_drafts
    is_multiple = type(value) is int and value > 1 and k is not None and (k <= value or k % value == 0)
    return None if value is None or (value == 1 or is_multiple) != fits else repr(value)


def quantization_method(quantization: Any) -> str | None:
    if not isinstance(quantization, dict):
        return None
    producer, inner = quantization.get("producer"), quantization.get("quantization")
    is_modelopt = isinstance(producer, dict) and producer.get("name") == "modelopt"
    if is_modelopt and isinstance(inner, dict) and inner.get("quant_algo"):
        return "modelopt"
    method = quantization.get("quant_method")
    return method.lower().replace("compressed_tensors", "compressed-tensors") if isinstance(method, str) else None


def other_vocab_size(draft: Draft) -> tuple[int, Any] | None:
    if draft.target_folder is None:
        return None
    ours, theirs = draft.text.get("vocab_size"), vocab_size(draft.target)
    return (theirs, ours) if ours != theirs else None


def fewer_positions(draft: Draft) -> tuple[float, float] | None:
    """Return the positions of draft and target where the draft's are fewer."""
    if draft.target_folder is None:
        return None
    ours, theirs = (max_model_len(config, draft.target_folder) for config in (draft.config, draft.target))
    return (ours, theirs) if ours < theirs < float("inf") else None


def max_model_len(config: dict[str, Any], tokenizer_folder: Path) -> float:
    """Count positions as vLLM does, from config and the target's tokenizer; infinite without a bound."""
    config = text_config(config)
    tokenizer_config = tried(read_json, tokenizer_folder, "tokenizer_config.json")[0] or {}
    numbers = [*(config.get(key) for key in POSITION_KEYS), tokenizer_config.get("model_max_length")]
    factor = 1.0
    for rope in ropes(config):
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "longrope" and isinstance(original := config.get("original_max_position_embeddings"), int):
            return float(original)
        if kind not in SCALED_ROPES and "gemma3" not in str(config.get("model_type")):
            factor = rope.get("factor") or factor
    # Tokenizers without a limit are saved with one of 10 ** 30.
    bounds = [float(number) for number in numbers if isinstance(number, int | float) and number < 10**15]
    return min(bounds, default=float("inf")) * factor


def tokens_of_one_side(draft: Draft) -> str | None:
    difference = draft.difference
    if difference is None or difference.conflict:
        return None
    number = difference.num_draft_only + difference.num_target_only
    return f"{number} token{'s' * (number > 1)}" if number else None


NAME = (
    f"should hold none of {', '.join(map(repr, METHODS_BY_NAME))}, got one with {{!r}}: vLLM takes it for a draft of "
    "method {!r}, whatever `method` is. Rename the folder or repository."
)
MASK_KEY = (
    "config.json holds {}, which vLLM (0.33, for one) reads before `pard_token`: run `pard export`, or remove it."
)
N_PREDICT = (
    "Expected no `n_predict` in config.json, got {}: vLLM defaults to it and refuses a larger "
    "`num_speculative_tokens` that is no multiple of it. Run `pard export`, or remove it."
)

# Engine, severity, predicate, message. A predicate returns what fills the gaps of the message, or something falsy
# where the rule is met.
# fmt: off
RULES: tuple[tuple[Engine | Literal["both"], bool, Callable[[Draft], Any], str], ...] = (
    # Mask token
    (BOTH, BLOCKING, nested_mask_token,
     "`pard_token` stands in `{}`, but engines read the top level of config.json: move it there."),
    (BOTH, BLOCKING, lambda draft: draft.mask_token_id is None and not nested_mask_token(draft),
     "config.json has no `pard_token`, the mask token's id: train a draft with `pard train`, or add it."),
    (BOTH, BLOCKING, lambda draft: type(draft.mask_token_id) not in (int, type(None)) and repr(draft.mask_token_id),
     "`pard_token` should be an integer, got {}: put the mask token's id."),
    (BOTH, BLOCKING, mask_token_outside,
     "`pard_token` should be an id in [0, {}), got {}: put the id the draft was trained with."),
    (BOTH, BLOCKING, produced_mask_token, "{}"),
    ("vLLM", BLOCKING, lambda draft: keys_before_pard_token(draft, is_same=False), MASK_KEY),
    ("vLLM", NOTE, lambda draft: keys_before_pard_token(draft, is_same=True), MASK_KEY),
    ("vLLM", NOTE, lambda draft: draft.mask_token_id is not None and draft.config.get("ptd_token_id") is not None,
     "config.json holds `ptd_token_id`, which vLLM reads after `pard_token`: remove it."),
    # The rest of config.json
    (BOTH, BLOCKING, lambda draft: architecture(draft) is None,
     "config.json names no architecture: put the base model's class in `architectures`."),
    (BOTH, BLOCKING, other_architecture,
     "`architectures` should name a causal LM (…ForCausalLM), got {}: put the base model's class there."),
    (BOTH, BLOCKING, lambda draft: draft.vocab_problem, "{}"),
    (BOTH, BLOCKING, rope_of_transformers_5_only,  # https://github.com/vllm-project/vllm/pull/44158
     "config.json has {} in `rope_parameters` only, and engines that run on transformers 4 silently take their "
     f"defaults (theta {DEFAULT_ROPE_THETA:.0f}): run `pard export`, which writes both."),
    (BOTH, NOTE, lambda draft: draft.config.get("spd_type") != "pard" and repr(draft.config.get("spd_type")),
     "`spd_type` should be 'pard', got {}: engines do not ask for it."),
    # Weights. Engines may know a model that this transformers does not; a known one they read as it does.
    (BOTH, BLOCKING, lambda draft: draft.weight_problem, "{}"),
    (BOTH, BLOCKING, lambda draft: draft.shapes == {} and not has_pickled_weights(draft),
     "The checkpoint has no weights: expected model.safetensors. Save it again."),
    (BOTH, NOTE, lambda draft: draft.shapes == {} and has_pickled_weights(draft),
     "The weights are pickled only, and pickle can run code. If you trust them, write safetensors with "
     "`PardDraftModel.from_pretrained(…, use_safetensors=False).save_pretrained(…)`."),
    (BOTH, BLOCKING, lambda draft: is_known_model(draft.config) and draft.model_problem, "{}"),
    (BOTH, NOTE, lambda draft: not is_known_model(draft.config) and draft.model_problem, "{}"),
    (BOTH, BLOCKING, lambda draft: ", ".join(name for name, number in draft.rows.items() if number is None),
     "The weights hold no {}: save the checkpoint again."),
    (BOTH, BLOCKING, other_number_of_rows,
     "{} has {} rows, and config.json has `vocab_size` {}: correct the latter."),
    # vLLM's method and layers
    ("vLLM", BLOCKING, lambda draft: method_by_name(draft.name), f"The draft's name {NAME}"),
    ("vLLM", NOTE, method_by_absolute_path, f"The draft's absolute path, if you pass that, {NAME}"),
    ("vLLM", BLOCKING,
     lambda draft: has_mtp_layers(draft.config) and (draft.config.get("model_type"), architecture(draft)),
     "Expected a family that vLLM serves as `draft_model`, got {!r} ({}), of which it uses only the multi-token "
     "prediction (MTP) layers, whatever `method` is: use the draft in transformers, or a base of another family."),
    ("vLLM", BLOCKING, has_mrope,
     "Expected a draft with one position a token, got `mrope_section` (M-RoPE) in config.json, which vLLM refuses: "
     "take a base model without it."),
    ("vLLM", BLOCKING, mixed_layers,
     "Expected a draft with layers of one kind, got {}: vLLM starts only with the caches of all its layers in one "
     "group. To serve this draft, {}."),
    ("vLLM", BLOCKING, lambda draft: n_predict(draft, fits=False), N_PREDICT),
    ("vLLM", NOTE, lambda draft: n_predict(draft, fits=True), N_PREDICT),
    ("vLLM", NOTE, lambda draft: draft.quantization in ([None], [""]),
     "`quantization_config` should name a `quant_method`, got none: vLLM reads the weights as not quantized. Name it, "
     "or remove the key."),
    ("vLLM", BLOCKING,
     lambda draft: ", ".join(repr(method) for method in draft.quantization if method and method not in QUANTIZATIONS),
     "Expected no quantization or a `quant_method` that vLLM 0.33 reads, got {}: quantize the draft with one, such as "
     "'compressed-tensors', 'awq', 'gptq' or 'fp8'."),
    # Draft and target
    ("vLLM", BLOCKING, other_vocab_size,
     "vLLM wants the draft's `vocab_size` to equal the target's {}, got {}: run `pard export --target …`."),
    (BOTH, NOTE, fewer_positions,
     "The draft was made for {0:.0f} positions and the target for {1:.0f}: vLLM drafts for no text of a batch while "
     "one is longer. Limit texts (vLLM: `--max-model-len {0:.0f}`, TensorRT-LLM: `max_seq_len`)."),
    ("vLLM", NOTE, lambda draft: draft.target.keys() & {"vision_config", "audio_config"},
     "The target reads images or sound: vLLM 0.16 refuses a draft model for it, and later ones draft from text."),
    (BOTH, NOTE, lambda draft: draft.num_drafts is None,
     "generation_config.json names no `num_assistant_tokens`: choose K yourself (`num_speculative_tokens` in vLLM, "
     "`max_draft_len` in TensorRT-LLM), 8 to 12 for most drafts."),
    # Tokenizers
    (BOTH, NOTE, lambda draft: draft.tokenizer_problem,
     "{} Engines load the target's; the two were not compared."),
    (BOTH, NOTE,
     lambda draft: draft.target_folder is not None and draft.tokenizer is not None and draft.difference is None,
     "The target has no tokenizer to compare the draft's with: check it yourself."),
    (BOTH, BLOCKING, lambda draft: draft.difference is not None and draft.difference.conflict,
     "Draft and target must share a tokenizer: {}. Take a draft of the target's family."),
    (BOTH, NOTE, tokens_of_one_side,
     "{} of one tokenizer, draft's or target's, missing from the other: drafts stop there."),
)
# fmt: on


def check_draft(draft: str | Path, target: str | Path | None = None, name: str | None = None) -> list[Finding]:
    """Check whether the engines would load a checkpoint as a parallel draft, from its files and weight headers.

    Of the tensors, only embedding and LM head are compared with the config; [`export_draft`] loads them all.

    Args:
        draft (`str`):
            Folder or Hub id of the draft; one on the Hub is downloaded.
        target (`str`, *optional*):
            Folder or Hub id of its target; only config and tokenizer are read.
        name (`str`, *optional*, defaults to `draft`):
            Folder or Hub id that vLLM will be given, which may decide its method.

    Returns:
        A list of [`Finding`], the blocking ones first.

    Raises:
        OSError: There is no such draft or target, or the Hub cannot be reached.
        ValueError: The target's config or tokenizer cannot be read.

    >>> would_load(check_draft("my-draft", target="Qwen/Qwen2.5-7B-Instruct"), "vLLM")
    """
    folder = local_folder(draft, DRAFT_FILES)
    target_folder = None if target is None else local_folder(target, TARGET_FILES)
    config, problem = tried(read_json, folder, "config.json")
    if problem is not None:
        return [Finding(BOTH, BLOCKING, problem)]
    checked = Draft(config, folder, str(draft) if name is None else name, target_folder)
    findings = []
    for engine, is_blocking, find, message in RULES:
        if found := find(checked):
            gaps = found if isinstance(found, tuple) else (found,)
            findings.append(Finding(engine, is_blocking, message.format(*gaps)))
    return sorted(findings, key=lambda finding: not finding.is_blocking)


def would_load(findings: list[Finding], engine: Engine) -> bool:
    """Return whether no finding keeps the engine from drafting with the checkpoint."""
    return not any(finding.is_blocking and finding.engine in (engine, BOTH) for finding in findings)
