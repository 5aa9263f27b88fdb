"""Every family of `AutoModelForCausalLM`: a tiny random model of each, and what `generate()` does with a draft there."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB_SIZE = 100
MOST_LAYERS = 4
NEW_TOKENS = 20
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
# Seeds and standard deviations, of matrices and of embeddings, to try.
DRAWS = (
    *((0, 0.25, 0.25), (0, 0.6, 0.25), (0, 0.25, 1.0), (0, 0.6, 1.0), (0, 1.0, 1.0), (0, 1.0, 0.1)),
    *((seed, scale, 1.0) for seed in (1, 2, 3) for scale in (0.25, 0.6)),
)
# How large a field of a config may be, by its name; the first pattern that fits decides.
LIMITS = {
    r"vocab_size|_vocab$|vocabulary_size": VOCAB_SIZE,
    r"max_position|max_seq|n_positions|n_ctx|_positions$|context_length|model_max_length": 256,
    r"^bos_token_id": 1,
    r"^(eos|forced_eos|decoder_start)_token_id": 2,
    r"^(pad|sep|cls|mask|unk|eod|im_end)_token_id": 0,
    r"_token_(id|index)$|_index$": 90,
    r"index_topk": 64,  # Below it a sparse attention reads all keys: past it, indexers of this size tie.
    r"window|local_attention$": 9,
    r"chunk_size|chunk_length|block_size": 16,
    r"(hidden|decoder|encoder|num|^n|mem|input|output)_?(hidden_)?(layers|layer|blocks)$|num_layers_per_stack": 2,
    r"(first_k|num)_dense|layer_offset": 1,
    r"period|pattern$|interval|every_n|sparse_step|layer_group_size": 2,
    r"^qk_head_dim": 16,
    r"adapter_.*(dim|size)": 32,
    r"(kv|key_value|query_group|num_key)_?(heads|groups)?$": 2,
    r"mamba_(n|num)_heads|^num_heads$|n_mamba_heads": 8,
    r"heads$|n_head$": 4,
    r"head_?dim$|d_head$|dim_head|kv_channels|head_size|headdim|rotary_dim|query_pre_attn_scalar": 8,
    r"_per_tok(en)?$|topk$|top_k|moe_k$": 2,
    r"n_groups?$|topk_group|expert_group|shared_experts|ngroups": 1,
    r"experts?$|expert_num": 4,
    r"rank$": 8,
    r"state_size|d_state": 8,
    r"intermediate|ffn|inner|mlp|^ff|dff|feed_forward": 48,
    r"(hidden|embed|embd|embedding|model|lru|attention).*(size|dim|width)$|n_embd|emb_dim|d_model|dim_model": 32,
}
TWO_KINDS = ["sliding_attention", "full_attention"] * 2
LATENT = {
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8},
    **{"head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}
INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 64, "compress_ratio": 4}
# What the rules leave open, by the config's `model_type`.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "dory": {"layer_types": TWO_KINDS, "num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note_text": {f"swa_{name}": value for name, value in LATENT.items()},
    "gemma3n_text": {"layer_types": TWO_KINDS, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {f"indexer_{name}": value for name, value in INDEXER.items()},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"num_buckets": 4, "hash_seed": 0, "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (16, 16)},
    "xlm": {"is_encoder": False, "causal": True},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
}


def families() -> dict[str, type[PreTrainedConfig]]:
    """Config classes of the installed transformers' mapping, by name."""
    return {config_class.__name__: config_class for config_class in MODEL_FOR_CAUSAL_LM_MAPPING}


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    return config_class(**tiny_fields(config_class()))


def tiny_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields with which a config of this class makes a tiny model, one layer of each kind it has (two at least)."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    changes: dict[str, Any] = {}
    num_layers = getattr(config, "num_hidden_layers", None)
    per_layer = {k: list(v) for k, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == num_layers}
    first_of_kind: dict[str, int] = {}
    for index, kind in enumerate(zip(*per_layer.values(), strict=True)):
        first_of_kind.setdefault(repr(kind), index)
    layers = sorted(first_of_kind.values())[:MOST_LAYERS]
    layers = layers * 2 if len(layers) == 1 else layers
    for name, value in fields.items():
        limit = next((limit for pattern, limit in LIMITS.items() if re.search(pattern, name)), None)
        if name in per_layer:
            values = [per_layer[name][index] for index in layers]
            changes[name] = [min(v, limit) if type(v) is int and limit else v for v in values]
        elif isinstance(value, PreTrainedConfig):
            changes[name] = type(value)(**tiny_fields(value))
        elif type(value) is int and limit is not None and value > limit:
            changes[name] = limit
    if layers:
        changes["num_hidden_layers"] = len(layers)
    if fields.get("head_dim", 0) is None:
        changes["head_dim"] = 8
    if "kv_lora_rank" in fields:  # Latent attention has a key for every query head.
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    if "tie_word_embeddings" in fields:  # Tied, most models of this size repeat the last token.
        changes["tie_word_embeddings"] = False
    if "is_decoder" in fields:
        changes["is_decoder"] = True
    return {**changes, **CHANGES.get(config.model_type, {})}


def tiny_model(
    config_class: type[PreTrainedConfig], seed: int, scale: float, embedding_scale: float
) -> PreTrainedModel:
    """A model with random weights, and no end token: every text has its full length."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(config_class), dtype=torch.float32).eval()
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            # Matrices are drawn anew; norms, gates and decay rates stay near the values they have.
            if parameter.ndim > 1 and abs(parameter.mean()) < 0.1:
                parameter.normal_(std=embedding_scale if parameter in embeddings else scale)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def varied_model(config_class: type[PreTrainedConfig]) -> PreTrainedModel:
    """The first model whose text is not a few tokens over and over: how large weights must be is the family's matter."""
    variety: dict[tuple[int, float, float], int] = {}
    for draw in DRAWS:
        model = tiny_model(config_class, *draw)
        variety[draw] = len(set(model.generate(**prompts(1), **GREEDY)[0, -NEW_TOKENS:].tolist()))
        if variety[draw] > NEW_TOKENS // 4:
            return model
    return tiny_model(config_class, *max(variety, key=lambda draw: variety[draw]))


def prompts(batch_size: int) -> dict[str, torch.Tensor]:
    """Ragged, padded on the left."""
    ids = torch.randint(3, VOCAB_SIZE - 1, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([torch.arange(12) >= padding for padding in (0, 5, 9)]).long()
    return {"input_ids": (ids * mask)[:batch_size], "attention_mask": mask[:batch_size]}
