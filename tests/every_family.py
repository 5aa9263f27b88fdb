"""Every family of `AutoModelForCausalLM`: a tiny random model of each, and what `generate()` does with a draft."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pard_hf import PardDraftModel, with_pard, without_pard

VOCAB_SIZE = 100
MOST_LAYERS = 4
NEW_TOKENS, NUM_ASSISTANT_TOKENS = 20, 5
SECONDS = 60  # For one call of `generate()`.
FAULTS = ("WRONG", "CRASH", "SILENT")
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
# Batch size and settings of `generate()`.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one text": (1, {}),
    "ragged batch": (3, {}),
    "tree": (1, {"assistant_tree_size": 8}),
    "batch of trees": (3, {"assistant_tree_size": 8}),
    "same seed": (1, {"do_sample": True}),
}
# Those in which the family drafts for itself, too.
OWN_DRAFT = ("one text", "batch of trees")
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
    # Sparse attention that reads all keys: where it has to choose, models of this size have ties to choose from, and
    # plain `generate()` depends on how many tokens a forward has.
    r"index_topk|keep_window": 64,
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
    **{"head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
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
    "dory": {
        "layer_types": TWO_KINDS,
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note_text": {f"swa_{name}": value for name, value in LATENT.items()},
    "gemma3n_text": {"layer_types": TWO_KINDS, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {f"indexer_{name}": value for name, value in INDEXER.items()},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"num_buckets": 4, "hash_seed": 0, "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (16, 16)},
    "xlm": {"is_encoder": False, "causal": True},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"attention_hidden_size": 64, "attention_head_dim": 16},
        **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
}


def families() -> dict[str, type[PreTrainedConfig]]:
    """Config classes of the installed transformers' mapping, by name."""
    classes = (known for known in MODEL_FOR_CAUSAL_LM_MAPPING if known.__module__.startswith("transformers."))
    return {config_class.__name__: config_class for config_class in classes}


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
    if "use_sliding_window" in fields:
        changes |= {"use_sliding_window": True, "sliding_window": 9}
    if "sliding_window" in fields and set(fields.get("layer_types") or ()) == {"full_attention"}:
        changes["layer_types"] = ["sliding_attention", "full_attention"]
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
    """The first model whose text is not a few tokens over and over: how large weights must be differs by family."""
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


class RecitingLM(LlamaForCausalLM):
    """Proposes the texts it is given, every fourth token as a second guess only.

    Rounds accept a few tokens and reject the rest; trees go on from nodes that do not stand beside their parents.
    """

    texts: list[list[int]]

    def forward(self, input_ids=None, position_ids=None, logits_to_keep=0, **kwargs):
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        logits = torch.full_like(output.logits, -10.0)
        for row, positions in enumerate(position_ids.expand(len(input_ids), -1).tolist()):
            text = self.texts[row % len(self.texts)]
            for column, position in enumerate(positions):
                token = text[position + 1] if position + 1 < len(text) else 3
                logits[row, column, token] = 10.0
                logits[row, column, 4 + token % 7] += 0.0 if position % 4 else 21.0
        output.logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        return output


def reciting_draft(vocab_size: int) -> PardDraftModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=256, pad_token_id=0, **sizes)
    return PardDraftModel.from_causal_lm(RecitingLM(config).eval(), vocab_size - 1, NUM_ASSISTANT_TOKENS)


@dataclass
class Verdict:
    """What `generate()` with a draft did for one family: by case, who decoded, or what went wrong."""

    family: str
    model: str = ""
    loops: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    as_draft: str = ""
    not_run: str = ""

    @property
    def served(self) -> str:
        """The loop of a single text, or `"in part"` where that is ours and other cases are not served by it."""
        if self.not_run:
            return "not run"
        loop = next((loop for loop in self.loops.values() if loop in FAULTS), self.loops["one text"])
        return "in part" if loop == "own" and set(self.loops.values()) != {"own"} else loop

    @property
    def row(self) -> str:
        """Its line in the table of `docs/compatibility.md`."""
        return f"| `{self.family}` | " + " | ".join(self.loops.get(case, "not run") for case in CASES) + " |"

    @property
    def why(self) -> str:
        """What kept it from our loop, without the names of its classes."""
        words = self.not_run or self.reason or (self.as_draft and f"As a draft: {self.as_draft}")
        return re.sub(r"`\w+Config`", "`<config>`", words.replace(f"`{self.model}`", "`<model>`")).rstrip(".")


def sweep(family: str) -> Verdict:
    """Compare `generate()` with drafts of two kinds to plain `generate()`, in every case."""
    verdict = Verdict(family)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with time_limit():
                target = varied_model(families()[family])
                plain = {case: plain_text(target, *settings) for case, settings in CASES.items()}
        except Exception as error:
            verdict.not_run = in_words(error)
            return verdict
        verdict.model = type(target).__name__
        vocab_size = target.config.get_text_config().vocab_size
        reciting, itself = reciting_draft(vocab_size), None
        try:
            itself = PardDraftModel.from_causal_lm(copy.deepcopy(target), vocab_size - 1, NUM_ASSISTANT_TOKENS)
        except ValueError as error:
            verdict.as_draft = in_words(error)
        for case, (batch_size, settings) in CASES.items():
            padding = (prompts(batch_size)["attention_mask"] == 0).sum(-1).tolist()
            reciting.texts = [text[start:] for text, start in zip(plain[case].tolist(), padding, strict=True)]
            loop, words = drafted(target, reciting, plain[case], batch_size, settings)
            if itself is not None and case in OWN_DRAFT and loop not in FAULTS:
                loop_of_its_own, other_words = drafted(target, itself, plain[case], batch_size, settings)
                if loop_of_its_own in FAULTS:
                    loop, words = loop_of_its_own, f"as its own draft: {other_words}"
                elif loop_of_its_own != loop:
                    verdict.as_draft = other_words
            verdict.loops[case] = loop
            if loop in FAULTS and verdict.served == loop or not verdict.reason:
                verdict.reason = words
    return verdict


def plain_text(target: PreTrainedModel, batch_size: int, settings: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(5)
    settings = {name: value for name, value in settings.items() if not name.startswith("assistant")}
    output = target.generate(
        **prompts(batch_size), **GREEDY | settings, return_dict_in_generate=True, output_logits=True
    )
    if not all(torch.isfinite(logits).all() for logits in output.logits):
        raise ArithmeticError("logits are not finite")
    return output.sequences


def drafted(
    target: PreTrainedModel, draft: PardDraftModel, plain: torch.Tensor, batch_size: int, settings: dict[str, Any]
) -> tuple[str, str]:
    """Who decoded, and why not our loop; or what went wrong."""
    torch.manual_seed(5)
    try:
        with time_limit(), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            output = with_pard(target).generate(
                **prompts(batch_size), **GREEDY | settings, assistant_model=draft, return_dict_in_generate=True
            )
    except Exception as error:
        # Words of ours say what was expected; any other exception is an accident.
        is_refusal = isinstance(error, ValueError) and str(error).startswith("Expected ")
        return ("refused" if is_refusal else "CRASH"), in_words(error)
    finally:
        without_pard(target)
    stats = output.stats
    if not torch.equal(output.sequences, plain):
        return "WRONG", f"{stats.loop} loop: {first_difference(output.sequences, plain)}"
    if (stats.num_rounds > 0) != (stats.loop != "none"):
        return "WRONG", f"{stats.num_rounds} rounds by the loop {stats.loop!r}"
    if stats.loop == "none" and not any(stats.fallback_reason in str(warning.message) for warning in seen):
        return "SILENT", stats.fallback_reason
    return ("own" if stats.loop == "lockstep" else stats.loop), stats.fallback_reason or ""


def first_difference(sequences: torch.Tensor, plain: torch.Tensor) -> str:
    if sequences.shape != plain.shape:
        return f"{tuple(sequences.shape)} for {tuple(plain.shape)}"
    row, column = (sequences != plain).nonzero()[0].tolist()
    return f"row {row} differs from column {column} on"


def in_words(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if words.startswith("Expected ") else f"{type(error).__name__}: {words}"


class time_limit:
    """Raise a `TimeoutError` in what takes longer than `SECONDS`."""

    def __enter__(self):
        signal.signal(signal.SIGALRM, self.ring)
        signal.alarm(SECONDS)

    def ring(self, *_):
        raise TimeoutError(f"took more than {SECONDS} s")

    def __exit__(self, *_):
        signal.alarm(0)


def sweep_all(names: list[str]) -> list[Verdict]:
    """Sweep families in processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=prepare_process) as pool:
        return list(pool.map(sweep, names))


def prepare_process() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


HEADER = """# Compatibility: every family

Every entry of `AutoModelForCausalLM` in transformers `{version}`: a tiny random model of each, whose text varies, with
a draft whose proposals are right in part and with itself as draft, against plain `generate()` of the untouched model.
`make compatibility` runs this and writes this page, `make test-families` compares.

| | families |
|---|---|
{counts}

- **own**: our loop, the text of plain `generate()`.
- **stock**: the assisted loop of transformers, with a warning that tells why, the text of plain `generate()`. It takes
  one text at a time, and chains for trees.
- **none**: the draft is not used, with a warning that tells why.
- **refused**: a `ValueError` that tells why, before anything is touched.
- **not run**: plain `generate()` does not run a tiny model of this class on a text.

| config class | {cases} |
|---|{dashes}
{rows}

## Why not by our loop

{reasons}
"""
KINDS = {
    "own": "served by our loop",
    "in part": "served by our loop in part of the cases",
    "stock": "served by the assisted loop of transformers",
    "none": "generated without the draft",
    "refused": "refused",
    "not run": "not run",
    **{fault: fault for fault in FAULTS},
}


def page(verdicts: list[Verdict]) -> str:
    """The text of `docs/compatibility.md`."""
    counts = Counter(verdict.served for verdict in verdicts)
    lines = [f"| {words} | {counts[kind]} |" for kind, words in KINDS.items() if counts[kind]]
    return HEADER.format(
        version=transformers.__version__,
        counts="\n".join([*lines, f"| all | {len(verdicts)} |"]),
        cases=" | ".join(CASES),
        dashes="---|" * len(CASES),
        rows="\n".join(verdict.row for verdict in verdicts),
        reasons="\n".join(reasons(verdicts)),
    )


def reasons(verdicts: list[Verdict]) -> list[str]:
    """What kept families from our loop, each with its families."""
    names: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.why:
            names.setdefault(verdict.why, []).append(f"`{verdict.family}`")
    points = (f"- {why}: {', '.join(families)}" for why, families in sorted(names.items()))
    return [textwrap.fill(point, 119, subsequent_indent="  ", break_on_hyphens=False) for point in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="names of config classes; all of the mapping by default")
    parser.add_argument("--write", type=Path, help="file for the page; on the screen by default")
    arguments = parser.parse_args()
    text = page(sweep_all(arguments.families or sorted(families(), key=str.lower)))
    if arguments.write:
        arguments.write.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
