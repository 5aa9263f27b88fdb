"""What a round costs on targets with recurrent layers, beside a dense model of equal operations, and their states.

    python benchmarks/hybrids.py --output benchmarks/results/hybrids.json

Weights are random, and so are the draft's, so that nearly nothing is accepted: a round is a draft of K tokens and a
verify of K + 1. The dense model is a Llama of the same width and depth whose MLP is as wide as it takes for equally
many parameters. Plain steps and rounds of both take turns, eager ones and compiled layer by layer; the first tokens,
prefill among them, are timed apart and taken off, and compiling comes before. `round_over_dense` compares rounds,
`compiled_over_dense` compiled ones, `round_over_step` rounds with plain steps of the same model.
`state_bytes` is what states take a row, `kept_bytes` the inputs of the tokens of a round that may be rejected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, CompileConfig, LlamaConfig, PreTrainedModel

from pard_hf import PardDraftModel, with_pard, without_pard
from pard_hf.evaluation.metrics import ratios
from pard_hf.generation.compilation import compile_cache_of
from pard_hf.generation.recurrent import HybridCache, StateLayer
from pard_hf.generation.stats import now
from pard_hf.host import cache_in
from script import finish, parser_of, run_metadata

VOCAB_SIZE = 4096
FAMILIES = ("lfm2", "qwen3_next", "bamba", "mamba2")


def fields_of(family: str, width: int, num_layers: int) -> dict[str, Any]:
    """Choose what families name differently; heads of states are 64 wide."""
    kinds = {"lfm2": ["conv", "full_attention"], "qwen3_next": ["linear_attention", "full_attention"]}
    if family == "qwen3_next":
        heads = {f"linear_num_{kind}_heads": width // 64 for kind in ("key", "value")}
        heads |= {f"linear_{kind}_head_dim": 64 for kind in ("key", "value")} | {"head_dim": 64}
        heads["decoder_sparse_step"] = num_layers + 1  # No experts.
    elif family == "bamba":
        heads = {"mamba_n_heads": width // 32, "mamba_d_head": 64, "attn_layer_indices": list(range(1, num_layers, 2))}
    elif family == "mamba2":
        heads = {"num_heads": width // 32, "head_dim": 64, "n_groups": 1}
    else:
        heads = {}
    if family in kinds:
        heads["layer_types"] = kinds[family] * (num_layers // 2)
    return heads if family == "mamba2" else {**heads, "num_attention_heads": 8, "num_key_value_heads": 4}


def hybrid(family: str, width: int, num_layers: int) -> PreTrainedModel:
    """Make a model of a family, layers of its two kinds in turn."""
    sizes = {"hidden_size": width, "num_hidden_layers": num_layers, "vocab_size": VOCAB_SIZE}
    if family != "mamba2":
        sizes["intermediate_size"] = 3 * width
    config = CONFIG_MAPPING[family](**sizes, **fields_of(family, width, num_layers), tie_word_embeddings=False)
    return made(config)


def made(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def dense_like(model: PreTrainedModel) -> PreTrainedModel:
    """Make a Llama of the same width, depth and number of parameters."""
    width, num_layers = model.config.hidden_size, model.config.num_hidden_layers
    mlp = (model.num_parameters() - 2 * VOCAB_SIZE * width) // num_layers - 4 * width**2
    sizes = {"hidden_size": width, "num_hidden_layers": num_layers, "intermediate_size": max(mlp // (3 * width), 1)}
    return made(LlamaConfig(**sizes, vocab_size=VOCAB_SIZE, num_attention_heads=8))


def seconds_each(generate: Callable[..., Any], device: torch.device, num_tokens: int) -> float:
    """Time what comes after the first tokens; return seconds a forward of the target."""
    elapsed, rounds = [], []
    for length in (4, 4 + num_tokens):
        start = now(device)
        output = generate(max_new_tokens=length)
        elapsed.append(now(device) - start)
        rounds.append(length if getattr(output, "stats", None) is None else output.stats.num_rounds)
    return (elapsed[1] - elapsed[0]) / (rounds[1] - rounds[0])


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, functools.partial):
        yield from tensors_in(value.args)
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def num_bytes(layers: list[StateLayer], *names: str) -> int:
    """Sum the bytes of what layers hold under these names, each storage once."""
    held = [tensor for layer in layers for name in names for tensor in tensors_in(getattr(layer, name))]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())


def memory(target: PreTrainedModel, generate: Callable[..., Any], num_columns: int) -> dict[str, int]:
    """Measure states, and what is kept of a round, right after a verify of so many columns."""
    found: list[tuple[int, int]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = cache_in(kwargs)
        if not isinstance(cache, HybridCache) or kwargs["input_ids"].shape[1] != num_columns:
            return
        layers = cache.state_layers
        states = num_bytes(layers, "conv", "recurrent")
        found[:] = [(states, num_bytes(layers, "window", "advance", "conv", "recurrent") - states)]

    hook = target.register_forward_hook(look, with_kwargs=True)
    try:
        generate(max_new_tokens=12)
    finally:
        hook.remove()
    [(states, kept)] = found
    return {"state_bytes": states, "kept_bytes": kept}


def measure(family: str, args: Any, draft: PardDraftModel, prompt: torch.Tensor) -> dict[str, Any]:
    """Take the medians of plain steps and rounds, of a hybrid and its dense twin in turns."""
    target = hybrid(family, args.hidden_size, args.num_layers)
    models = {"hybrid": target, "dense": dense_like(target)}
    settings = {"do_sample": False, "return_dict_in_generate": True}

    def plain(model: PreTrainedModel, **arguments: Any) -> Any:
        return without_pard(model).generate(prompt, **settings, **arguments)

    def rounds(model: PreTrainedModel, **arguments: Any) -> Any:
        return with_pard(model).generate(prompt, assistant_model=draft, disable_compile=True, **settings, **arguments)

    def compiled(model: PreTrainedModel, **arguments: Any) -> Any:
        given = {"assistant_model": draft, "compile_config": CompileConfig(), **settings, **arguments}
        return with_pard(model).generate(prompt, **given)

    length = 4 + args.num_tokens  # The caches of what is measured, compiled here.
    texts = {
        name: [kind(m, max_new_tokens=length).sequences for kind in (plain, rounds, compiled)]
        for name, m in models.items()
    }
    ways = {
        f"{name}_{kind.__name__}": functools.partial(kind, model)
        for name, model in models.items()
        for kind in (plain, rounds, compiled)
    }
    failures = {name: compile_cache_of(model, draft).failure for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, generate in ways.items():
            seconds[name].append(seconds_each(generate, prompt.device, args.num_tokens))
    return {
        "num_parameters": {name: model.num_parameters() for name, model in models.items()},
        "is_identical": {name: all(torch.equal(text, one[0]) for text in one) for name, one in texts.items()},
        "compile_failure": failures,
        "milliseconds": {name: round(median(past) * 1e3, 3) for name, past in seconds.items()},
        "round_over_dense": round(median(ratios(seconds["hybrid_rounds"], seconds["dense_rounds"])), 3),
        "compiled_over_dense": round(median(ratios(seconds["hybrid_compiled"], seconds["dense_compiled"])), 3),
        "step_over_dense": round(median(ratios(seconds["hybrid_plain"], seconds["dense_plain"])), 3),
        "round_over_step": round(median(ratios(seconds["hybrid_rounds"], seconds["hybrid_plain"])), 3),
        "round_over_step_dense": round(median(ratios(seconds["dense_rounds"], seconds["dense_plain"])), 3),
        **memory(target, functools.partial(rounds, target), args.num_assistant_tokens + 1),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--num-assistant-tokens", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    drafting = made(LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    ))  # fmt: skip
    draft = PardDraftModel.from_causal_lm(drafting, VOCAB_SIZE - 1, args.num_assistant_tokens)
    prompt = torch.arange(3, 67)[None]
    result = {
        **run_metadata(drafting),
        **{name: getattr(args, name) for name in ("hidden_size", "num_layers", "num_assistant_tokens", "repeats")},
        "families": {family: measure(family, args, draft, prompt) for family in args.families},
    }
    finish(result, args.output)


if __name__ == "__main__":
    main()
