"""What vLLM alone makes of a draft: which method it takes it for, and what it refuses of one.

Read in the source of vLLM 0.16.0, 0.32.0 and 0.33.0, which is not run here: `config/speculative.py` (method,
`n_predict`), `v1/spec_decode/` (M-RoPE, layers), `transformers_utils/config.py` (what counts as M-RoPE),
`config/model.py` (quantization, positions).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checkpoint import read_json, text_config

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
