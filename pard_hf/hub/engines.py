"""What vLLM alone makes of a draft: which method it takes it for, and what it refuses of one.

Read in the source of vLLM 0.16.0, 0.32.0 and 0.33.0, which is not run here: `config/speculative.py` (method,
`n_predict`), `v1/spec_decode/` (M-RoPE, layers), `transformers_utils/config.py` (what counts as M-RoPE),
`config/model.py` (quantization, positions).

Whether vLLM and TensorRT-LLM would load a checkpoint as a parallel draft, and what is wrong if not.

Knows what the two engines read of a draft; runs neither. Sources: vLLM `v1/spec_decode/llm_base_proposer.py` (mask
token) and `config/speculative.py` (vocabulary), 0.16 to 0.33; TensorRT-LLM `_torch/models/modeling_speculative.py`
(PARDForCausalLM). What vLLM alone makes of a draft is in `vllm`. Whether an engine implements the draft's architecture
is in its own list, which is not read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..draft.mask_token import check_mask_token
from ..draft.model import OTHER_MASK_KEYS
from .checkpoint import (
    DRAFT_FILES,
    TARGET_FILES,
    is_known_model,
    legacy_rope,
    load_tokenizer,
    local_folder,
    read_json,
    tensor_shapes,
    text_config,
    tokenizer_files,
    vocab_size,
    vocabulary_tensors,
    weight_files,
)

# Words that vLLM looks for in the draft's name, in small letters, and the method that it then takes.
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
# Keys of a config that say how many positions a model was made for; the smallest holds.
POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Ropes whose factor is in the number of positions already.
SCALED_ROPES = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


def vllm_rules(name: str, config: dict[str, Any], num_drafts: int | None) -> Iterator[tuple[bool, str]]:
    """Say what vLLM alone would do with a draft other than drafting with it, each with whether it keeps it from that.

    Args:
        name (`str`):
            What `"model"` of `--speculative-config` will be: folder or Hub id.
        config (`dict[str, Any]`):
            The draft's config.json.
        num_drafts (`int`, *optional*):
            K, where the draft says it.
    """
    yield from name_rules(name)
    yield from mtp_rules(config)
    yield from layer_rules(config)
    yield from n_predict_rules(config, num_drafts)
    yield from quantization_rules(config)


def name_rules(name: str) -> Iterator[tuple[bool, str]]:
    """The name decides before `"method": "draft_model"` does."""
    for is_given, text in ((True, name), (False, str(Path(name).absolute()) if Path(name).is_dir() else "")):
        for word, method in METHODS_BY_NAME.items():
            if word in text.lower():
                where = "draft's name" if is_given else "draft's absolute path, if you pass that,"
                yield (
                    is_given,
                    f"The {where} should hold none of {', '.join(map(repr, METHODS_BY_NAME))}, got one with {word!r}: "
                    f"vLLM takes the draft for one of method {method!r}, whatever `method` says. Rename the folder or "
                    "repository.",
                )
                return


def mtp_rules(config: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Families with layers for multi-token prediction (MTP): vLLM looks for those layers in any draft of them."""
    kind = str(config.get("model_type"))
    architecture = str((config.get("architectures") or [None])[0])
    num_layers = config.get("num_nextn_predict_layers")
    if (
        kind in MTP_MODEL_TYPES
        or architecture in MTP_ARCHITECTURES
        or kind.split("_")[-1] == "mtp"
        or "exaone4_5" in kind
        or (kind in ("nemotron_h", "nemotron_h_puzzle") and isinstance(num_layers, int) and num_layers > 0)
    ):
        yield (
            True,
            f"Expected a draft of a family that vLLM serves as `draft_model`, got {kind!r} ({architecture}), of which "
            "it takes the layers for multi-token prediction (MTP) only, whatever `method` says: use the draft in "
            "transformers, or take a base model of another family.",
        )


def layer_rules(config: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Draft models need positions of one number a token, and layers whose caches are all of one kind."""
    if has_mrope(config):
        yield (
            True,
            "Expected a draft with one position a token, got `mrope_section` (M-RoPE) in config.json, which vLLM "
            "refuses in draft models: take a base model without it.",
        )
    kinds = text_config(config).get("layer_types")
    kinds = sorted(set(map(str, kinds))) if isinstance(kinds, list) else []
    if len(kinds) > 1 and "chunked_attention" not in kinds:  # Chunks switch off the groups by themselves.
        is_local = kinds == ["full_attention", "sliding_attention"]
        remedy = "start vLLM with `--disable-hybrid-kv-cache-manager`" if is_local else "take a base model with one"
        yield (
            True,
            f"Expected a draft with layers of one kind, got {', '.join(kinds)}: vLLM wants the caches of all its "
            f"layers in one group and stops at its start otherwise. As it is, {remedy}.",
        )


def has_mrope(config: dict[str, Any]) -> bool:
    """Whether a config, or the language model's inside it, says how positions are divided into sections."""
    thinker = config.get("thinker_config")
    inner = thinker.get("text_config") if isinstance(thinker, dict) else None
    for part in (config, text_config(config), config.get("text_config"), inner):
        if not isinstance(part, dict):
            continue
        for rope in (part, *ropes(part)):
            if any(isinstance(rope.get(key), list) for key in ("mrope_section", "xdrope_section")):
                return True
    return False


def ropes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rope of a config, in the words of transformers 5 or 4; one for each kind of layer where they differ."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict):
            yield rope
            yield from (part for part in rope.values() if isinstance(part, dict))


def n_predict_rules(config: dict[str, Any], num_drafts: int | None) -> Iterator[tuple[bool, str]]:
    """`n_predict` is a word of other drafts for their own number of tokens; vLLM wants K to fit it."""
    value = config.get("n_predict")
    if value is None:
        return
    fits = value == 1
    if type(value) is int and value > 1 and num_drafts is not None:
        fits = num_drafts <= value or num_drafts % value == 0
    yield (
        not fits,
        f"Expected no `n_predict` in config.json, got {value!r}: vLLM refuses a larger `num_speculative_tokens` that "
        "is no multiple of it, and takes it where none is given. Run `pard export`, or remove it.",
    )


def quantization_rules(config: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Quantized weights are read by the methods that vLLM knows."""
    inner = config.get("text_config")
    parts = (config, inner) if isinstance(inner, dict) else (config,)
    found = [part.get("quantization_config", part.get("compression_config")) for part in parts]
    quantization = next((part for part in found if part is not None), None)
    if quantization is None:
        return
    method = quantization_method(quantization)
    if not method:
        yield (
            False,
            "`quantization_config` should name a `quant_method`, got none: vLLM reads the weights as not quantized. "
            "Name it, or remove the key where they are not.",
        )
    elif method not in QUANTIZATIONS:
        yield (
            True,
            f"Expected weights that are not quantized or a `quant_method` that vLLM 0.33 knows, got {method!r}: "
            "quantize the draft with one of those, such as 'compressed-tensors', 'awq', 'gptq' or 'fp8'.",
        )


def quantization_method(quantization: Any) -> str | None:
    """The method's name as vLLM reads it."""
    if not isinstance(quantization, dict):
        return None
    producer, inner = quantization.get("producer"), quantization.get("quantization")
    is_modelopt = isinstance(producer, dict) and producer.get("name") == "modelopt"
    if is_modelopt and isinstance(inner, dict) and inner.get("quant_algo"):
        return "modelopt"
    method = quantization.get("quant_method")
    return method.lower().replace("compressed_tensors", "compressed-tensors") if isinstance(method, str) else None


def max_model_len(config: dict[str, Any], tokenizer_folder: Path) -> float:
    """Say for how many positions vLLM takes a model to be made: infinite where nothing says it.

    Args:
        config (`dict[str, Any]`):
            The model's config.json.
        tokenizer_folder (`Path`):
            Folder of the target, whose tokenizer serves draft and target.
    """
    config = text_config(config)
    numbers = [config.get(key) for key in POSITION_KEYS]
    try:
        numbers.append(read_json(tokenizer_folder, "tokenizer_config.json").get("model_max_length"))
    except ValueError:
        pass
    factor = 1.0
    for rope in ropes(config):
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "longrope" and isinstance(original := config.get("original_max_position_embeddings"), int):
            return float(original)
        if kind not in SCALED_ROPES and "gemma3" not in str(config.get("model_type")):
            factor = rope.get("factor") or factor
    # Tokenizers that know no limit are saved with one of 10 ** 30.
    said = [float(number) for number in numbers if isinstance(number, int | float) and number < 10**15]
    return min(said, default=float("inf")) * factor


Engine = Literal["vLLM", "TensorRT-LLM"]
# In the words of a reader, with the releases meant.
ENGINES: dict[Engine, str] = {"vLLM": "vLLM >= 0.16", "TensorRT-LLM": "TensorRT-LLM"}
# What config classes of transformers 4 take where a config does not say it on the top level.
DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Finding:
    """One thing about a checkpoint that an engine's user should know.

    Args:
        engine (`str`):
            `"vLLM"`, `"TensorRT-LLM"` or `"both"`.
        is_blocking (`bool`):
            Whether the engine refuses the checkpoint or drafts wrongly from it, at least in some of its releases.
        message (`str`):
            What is wrong and what to do, without the names of folders.
    """

    engine: Engine | Literal["both"]
    is_blocking: bool
    message: str


def check_draft(draft: str | Path, target: str | Path | None = None, name: str | None = None) -> list[Finding]:
    """Say whether the engines would load a checkpoint as a parallel draft. Weights are not loaded, only their headers.

    Of the tensors, the embedding and the head are compared with the config; [`export_draft`] compares them all.

    Args:
        draft (`str`):
            Folder or Hub id of the draft; one on the Hub is downloaded.
        target (`str`, *optional*):
            Folder or Hub id of the target it is to serve with; only its config and tokenizer are read.
        name (`str`, *optional*, defaults to `draft`):
            Folder or Hub id that vLLM will be given, which decides there what kind of draft it is.

    Returns:
        A list of [`Finding`]; empty where there is nothing to say.

    Raises:
        OSError: There is no such draft or target.
        ValueError: The target's config cannot be read.

    >>> would_load(check_draft("my-draft", target="Qwen/Qwen2.5-7B-Instruct"), "vLLM")
    """
    folder = local_folder(draft, DRAFT_FILES)
    target_folder = None if target is None else local_folder(target, TARGET_FILES)
    target_config = None if target_folder is None else read_json(target_folder, "config.json")
    try:
        config = read_json(folder, "config.json")
    except ValueError as error:
        return [Finding("both", True, str(error))]
    findings = [*mask_findings(config), *config_findings(config), *weight_findings(folder, config)]
    num_drafts = num_drafts_of(folder)
    findings += [
        Finding("vLLM", *said) for said in vllm_rules(str(draft) if name is None else name, config, num_drafts)
    ]
    if target_folder is not None and target_config is not None:
        findings += target_findings(config, target_config, target_folder)
    findings += [*generation_findings(num_drafts), *tokenizer_findings(folder, config, target_folder)]
    return sorted(findings, key=lambda finding: not finding.is_blocking)


def would_load(findings: list[Finding], engine: Engine) -> bool:
    """Whether no finding keeps the engine from drafting with the checkpoint."""
    return not any(finding.is_blocking and finding.engine in (engine, "both") for finding in findings)


def mask_findings(config: dict[str, Any]) -> Iterator[Finding]:
    """The mask token: one integer, `pard_token`, on the top level, and no key that is read before it."""
    mask_token_id = config.get("pard_token")
    if mask_token_id is None:
        where = next((key for key, part in config.items() if isinstance(part, dict) and "pard_token" in part), None)
        yield Finding(
            "both",
            True,
            f"`pard_token` stands in `{where}`, and engines read the top level of config.json: move it there."
            if where
            else "config.json has no `pard_token`, the mask token's id: train a draft with `pard train`, or add it.",
        )
        return
    if type(mask_token_id) is not int:
        yield Finding("both", True, f"`pard_token` should be an integer, got {mask_token_id!r}: put the mask's id.")
    for key in OTHER_MASK_KEYS:
        if config.get(key) is not None or (key == "dspark_noise_token_id" and key in config):  # null is read, too
            yield stray_key_finding(key, config[key], mask_token_id)


def stray_key_finding(key: str, value: Any, mask_token_id: Any) -> Finding:
    """What another mask key does: only `ptd_token_id` is read after `pard_token`."""
    if key == "ptd_token_id":
        return Finding(
            "vLLM", False, "config.json holds `ptd_token_id`, which vLLM reads after `pard_token`: remove it."
        )
    if key == "dflash_config":
        value = value.get("mask_token_id", mask_token_id) if isinstance(value, dict) else None
    since = "releases after 0.16" if key == "dflash_config" else "later releases, 0.33 among them,"
    return Finding(
        "vLLM",
        value != mask_token_id,
        f"config.json holds `{key}`, which vLLM reads before `pard_token` ({since} do): run `pard export`, or remove "
        "it.",
    )


def config_findings(config: dict[str, Any]) -> Iterator[Finding]:
    """The rest of config.json: architecture, vocabulary, rope and the kind of draft."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        yield Finding(
            "both", True, "config.json names no architecture: put the base model's class in `architectures`."
        )
    elif not str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel")):
        yield Finding(
            "both",
            True,
            f"The architecture should be a causal LM (…ForCausalLM), got {architectures[0]!r}: put the base model's "
            "class in `architectures`.",
        )
    try:
        size, mask_token_id = vocab_size(config), config.get("pard_token")
        if type(mask_token_id) is int and not 0 <= mask_token_id < size:
            yield Finding(
                "both",
                True,
                f"`pard_token` should be an id in [0, {size}), got {mask_token_id}: put the id the draft was trained "
                "with.",
            )
    except ValueError as error:
        yield Finding("both", True, str(error))
    yield from rope_findings(text_config(config))
    if config.get("spd_type") != "pard":
        yield Finding(
            "both", False, f"`spd_type` should be 'pard', got {config.get('spd_type')!r}: engines do not ask for it."
        )


def rope_findings(config: dict[str, Any]) -> Iterator[Finding]:
    """Engines on transformers 4 do not read `rope_parameters` (https://github.com/vllm-project/vllm/pull/44158)."""
    unsaid = {key: value for key, value in legacy_rope(config).items() if key not in config}
    if unsaid and unsaid != {"rope_theta": DEFAULT_ROPE_THETA}:
        yield Finding(
            "both",
            True,
            f"config.json says {', '.join(f'`{key}`' for key in unsaid)} in `rope_parameters` only, and engines that "
            f"run on transformers 4 silently take their defaults (theta {DEFAULT_ROPE_THETA:.0f}): run `pard export`, "
            "which writes both.",
        )


def weight_findings(folder: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """Weights: whole safetensors files, with as many vocabulary rows as the config says."""
    try:
        if not weight_files(folder):
            yield no_safetensors_finding(folder)
            return
        shapes = tensor_shapes(folder)
    except ValueError as error:
        yield Finding("both", True, str(error))
        return
    try:
        size, names = vocab_size(config), vocabulary_tensors(folder)
    except ValueError as error:
        if "vocab_size" not in str(error):  # that one is the config's finding
            # The engines may know a model this transformers does not; a known one they read as it does.
            yield Finding("both", is_known_model(config), str(error))
        return
    for name in names:
        # Checkpoints of the model without its head, and of one inside another, have other prefixes.
        found = next((key for key in shapes if f".{key}".endswith(f".{name}") or name.endswith(f".{key}")), None)
        if found is None:
            yield Finding("both", True, f"The weights hold no {name}: save the checkpoint again.")
        elif (num_rows := (shapes[found] or [0])[0]) != size:
            yield Finding(
                "both",
                True,
                f"{found} has {num_rows} rows, and config.json says `vocab_size` {size}: correct the latter.",
            )
            return


def no_safetensors_finding(folder: Path) -> Finding:
    if not [*folder.glob("*.bin"), *folder.glob("*.pt")]:
        return Finding("both", True, "The checkpoint has no weights: expected model.safetensors. Save it again.")
    return Finding(
        "both",
        False,
        "The weights are pickled only, and pickle can run code. If you trust them, write safetensors with "
        "`PardDraftModel.from_pretrained(…, use_safetensors=False).save_pretrained(…)`.",
    )


def target_findings(config: dict[str, Any], target_config: dict[str, Any], target_folder: Path) -> Iterator[Finding]:
    """Draft and target beside each other: the same number of vocabulary rows, positions enough."""
    num_rows, size = vocab_size(target_config), text_config(config).get("vocab_size")
    if size != num_rows:
        yield Finding(
            "vLLM",
            True,
            f"vLLM wants the draft's `vocab_size` to equal the target's {num_rows}, got {size}: run "
            "`pard export --target …`.",
        )
    reach, needed = (max_model_len(side, target_folder) for side in (config, target_config))
    if reach < needed < float("inf"):
        yield Finding(
            "both",
            False,
            f"The draft was made for {reach:.0f} positions and the target for {needed:.0f}: vLLM drafts for no text "
            f"of a batch while one of them is longer. Serve texts up to {reach:.0f} only (vLLM: `--max-model-len "
            f"{reach:.0f}`, TensorRT-LLM: `max_seq_len`).",
        )
    if target_config.keys() & {"vision_config", "audio_config"}:
        yield Finding(
            "vLLM",
            False,
            "The target reads images or sound: vLLM 0.16 refuses a draft model beside it, and later releases draft "
            "from its text alone.",
        )


def num_drafts_of(folder: Path) -> int | None:
    """K as the draft says it, None where it does not."""
    try:
        num_drafts = read_json(folder, "generation_config.json").get("num_assistant_tokens")
    except ValueError:
        return None
    return num_drafts if isinstance(num_drafts, int) else None


def generation_findings(num_drafts: int | None) -> Iterator[Finding]:
    """K is a flag of the engines; the draft says which one it was made for."""
    if num_drafts is None:
        yield Finding(
            "both",
            False,
            "generation_config.json names no `num_assistant_tokens`: choose K yourself (`num_speculative_tokens` in "
            "vLLM, `max_draft_len` in TensorRT-LLM), 8 to 12 for most drafts.",
        )


def tokenizer_findings(folder: Path, config: dict[str, Any], target_folder: Path | None) -> Iterator[Finding]:
    """One tokenizer for both, and a mask token it never produces. Engines load the target's."""
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        yield Finding("both", False, f"{error} Engines take the target's, but nobody can compare the two.")
        return
    if type(config.get("pard_token")) is int:
        try:
            check_mask_token(tokenizer, config["pard_token"])
        except ValueError as error:
            yield Finding("both", True, str(error))
    if target_folder is None:
        return
    if not tokenizer_files(target_folder):
        yield Finding("both", False, "The target has no tokenizer to compare the draft's with: check it yourself.")
        return
    yield from vocabulary_findings(tokenizer, load_tokenizer(target_folder))


def vocabulary_findings(tokenizer: Any, target_tokenizer: Any) -> Iterator[Finding]:
    """Ids mean the same tokens for both; tokens only one of them has are never proposed, or never accepted."""
    ours, theirs = (
        {index: token for token, index in side.get_vocab().items()} for side in (tokenizer, target_tokenizer)
    )
    differing = sorted(index for index in ours.keys() & theirs.keys() if ours[index] != theirs[index])
    if differing:
        index = differing[0]
        yield Finding(
            "both",
            True,
            f"Draft and target must share a tokenizer: id {index} is {ours[index]!r} for the draft and "
            f"{theirs[index]!r} for the target. Take a draft of the target's family.",
        )
    elif ours.keys() != theirs.keys():
        number = len(ours.keys() ^ theirs.keys())
        yield Finding(
            "both",
            False,
            f"{number} token{'s' * (number > 1)} of one tokenizer, draft's or target's, unknown to the other: drafts "
            "stop there.",
        )
