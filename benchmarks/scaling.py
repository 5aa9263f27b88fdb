"""Enlarge a pair to the shapes of a big one, so that it computes the same function at a real checkpoint's cost.

    python benchmarks/scaling.py --shapes llama-3.1-8b llama-3.2-1b --dtype bfloat16 --output scaled.json

measures the enlarged pair as `pard bench` does. A model that grows and computes the same: idea of
https://huggingface.co/papers/1511.05641.

The small model's residual stream is the first coordinates of the big one's, and the others stay exactly zero: new
weights that meet only zeros are random. A new head or MLP unit is silenced where that takes fewest zeros, on the way
in (its value or `up_proj` row reads nothing), so that its output projection is random too and the bytes read are real.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from pard_hf.draft.correction_head import CorrectionHead
from pard_hf.draft.model import PardDraftModel
from pard_hf.evaluation.benchmark import Benchmark, BenchmarkSettings, run_benchmark, run_metadata
from pard_hf.evaluation.prompts import load_prompt_sets
from pard_hf.evaluation.report import make_console, progress_bar, show_cell
from pard_hf.generation.mixin import with_pard
from pard_hf.host import num_positions
from pard_hf.loading import Pair, check_device, default_device, load_pair, weight_dtype
from script import add_pair, command, finish, parser_of

# Coordinates of the residual stream that hold a constant where the vocabulary grows: see `widen_vocabulary`.
NUM_CONSTANTS = 2
# Far above the logits of any small model, far below what float32 and bfloat16 hold; float16 gets what it holds.
PENALTY = 2.0**32


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, named as in its config; `architecture` is `"llama"` or `"qwen2"`."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool


# The first four as published; the last two are a pair that a CPU can run, of about 1.2 B and 0.15 B parameters.
SHAPES = {
    "llama-3.1-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-3.2-1b": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "qwen2.5-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "qwen2.5-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "cpu-1.2b": Shape("llama", 2048, 5632, 24, 32, 8, 64, 32000, False),
    "cpu-0.15b": Shape("llama", 1024, 2816, 10, 16, 8, 64, 32000, True),
}


def enlarge_pair(pair: Pair, target_shape: Shape | str, draft_shape: Shape | str, **kwargs: Any) -> Pair:
    """Enlarge both models of a pair, see [`enlarge`]; the same tokens are accepted.

    >>> big = enlarge_pair(load_pair(dtype="float32"), "llama-3.1-8b", "llama-3.2-1b", dtype=torch.bfloat16)
    """
    draft = enlarge(pair.draft, draft_shape, **kwargs)
    return Pair(with_pard(enlarge(pair.target, target_shape, **kwargs)), draft, pair.tokenizer)


@torch.no_grad()
def enlarge(
    model: PreTrainedModel,
    shape: Shape | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_position_embeddings: int | None = None,
) -> Any:
    """Make a model of a shape, or a name in `SHAPES`, that computes the same function as a small Llama.

    Equal up to rounding, for ids of the small vocabulary; ids beyond it can never win and are not to be fed. Load the
    small model in float32, and the one rounding is to `dtype`. A [`PardDraftModel`] stays one. Where the key-value
    heads of the shape cannot hold the small model's (no two in one, which has each rotary frequency once), the result
    has as few more as divide the heads. New weights have the magnitude of the small model's and differ between
    devices. `dtype` and `device` default to the small model's, positions to 32768 or the small model's if it has more.

    Raises:
        ValueError: The shape is unknown or cannot hold the small model, or the small model is no plain Llama.
    """
    config = enlarged_config(model, shape, max_position_embeddings)
    big = empty_model(config, dtype or model.dtype, device or model.device)
    generator = torch.Generator(big.device).manual_seed(seed)
    widen_norm(big.model.norm.weight, model.model.norm.weight, generator)
    widen_vocabulary(big, model, generator)
    for index, layer in enumerate(big.model.layers):
        # A layer beyond the small model's gets weights as large as those of one it has, and writes zeros.
        source = model.model.layers[index % len(model.model.layers)]
        fill_layer(layer, source, generator)
        if index < len(model.model.layers):
            copy_attention(layer.self_attn, source.self_attn)
            copy_mlp(layer.mlp, source.mlp)
    big.generation_config = copy.deepcopy(model.generation_config)
    if isinstance(model, PardDraftModel):
        PardDraftModel.from_causal_lm(big, model.mask_token_id, model.num_assistant_tokens)
        if model.correction_head is not None:
            big.correction_head = enlarge_head(model.correction_head, big, generator)
    return big


def enlarged_config(model: PreTrainedModel, shape: Shape | str, max_position_embeddings: int | None = None) -> Any:
    """Make the config of [`enlarge`]'s result; raises its errors."""
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ValueError(f"Expected a name of {', '.join(SHAPES)}, got {shape!r}. Pass a `Shape` for other sizes.")
        shape = SHAPES[shape]
    small, is_llama = model.config, isinstance(model, LlamaForCausalLM)
    if not is_llama or small.attention_bias or small.mlp_bias or small.rope_parameters["rope_type"] != "default":
        raise ValueError(
            f"Expected a `LlamaForCausalLM` without biases and with default rotary embeddings, got {small}. Enlarge "
            "the bundled pair, or another plain Llama."
        )
    check_shape(small, shape)
    sizes = asdict(shape) | {"num_key_value_heads": enough_key_value_heads(small, shape)}
    architecture = sizes.pop("architecture")
    squares = NUM_CONSTANTS * constant_value(small) ** 2 if shape.vocab_size > small.vocab_size else 0.0
    return AutoConfig.for_model(
        architecture,
        **sizes,
        # Scaled as the mean square is, now taken over more coordinates; the constant ones add their own squares.
        rms_norm_eps=(small.hidden_size * small.rms_norm_eps - squares) / shape.hidden_size,
        rope_parameters=dict(small.rope_parameters),
        hidden_act=small.hidden_act,
        max_position_embeddings=max_position_embeddings or max(small.max_position_embeddings, 32768),
        **{name: getattr(small, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def check_shape(small: PreTrainedConfig, shape: Shape) -> None:
    """Raise a `ValueError` unless a small Llama fits into the shape."""
    if shape.architecture not in ("llama", "qwen2"):
        raise ValueError(f"Expected the architecture 'llama' or 'qwen2', got {shape.architecture!r}. Choose one.")
    for name in set(asdict(shape)) - {"architecture", "num_key_value_heads", "tie_word_embeddings"}:
        least, size = getattr(small, name), getattr(shape, name)
        if size < least:
            raise ValueError(f"Expected `{name}` to be at least the small model's {least}, got {size}. Raise it.")
    if shape.head_dim % small.head_dim:
        raise ValueError(
            f"Expected `head_dim` to be a multiple of the small model's {small.head_dim}, which has the same rotary "
            f"frequencies, got {shape.head_dim}. Choose a multiple."
        )
    if shape.tie_word_embeddings and not small.tie_word_embeddings:
        raise ValueError("Expected an untied shape for a model with untied embeddings, got a tied one. Untie it.")
    spare = shape.hidden_size - small.hidden_size
    if shape.vocab_size > small.vocab_size and (spare < NUM_CONSTANTS or small.rms_norm_eps <= 0):
        raise ValueError(
            f"Expected {NUM_CONSTANTS} more hidden coordinates and a positive `rms_norm_eps` for a larger vocabulary, "
            f"got {spare} more and {small.rms_norm_eps}. Raise them, or keep {small.vocab_size} ids."
        )


def enough_key_value_heads(small: PreTrainedConfig, shape: Shape) -> int:
    """Return the shape's key-value heads, or the fewest above that can hold the small model's."""
    num_heads = shape.num_attention_heads
    for num in range(shape.num_key_value_heads, num_heads):
        if num_heads % num == 0 and small.num_key_value_heads * num_copies(small, num_heads // num) <= num:
            return num
    return num_heads


def num_copies(small: PreTrainedConfig, group_size: int) -> int:
    """Count the key-value heads that each of the small model's becomes, if one serves `group_size` query heads."""
    return math.ceil(small.num_attention_heads / small.num_key_value_heads / group_size)


def constant_value(small: PreTrainedConfig) -> float:
    """Return a power of two, exact in any dtype; the squares of all constants are at most half of what `eps` adds."""
    return 2.0 ** math.floor(math.log2(small.hidden_size * small.rms_norm_eps / (2 * NUM_CONSTANTS)) / 2)


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Make a model whose weights have memory and no values yet: billions are not initialised twice."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    # Frequencies are no weights: they were computed on the meta device, which computes nothing.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


def fill(weight: Any, source: torch.Tensor, generator: torch.Generator) -> None:
    """Fill with random values of the source's magnitude."""
    weight.normal_(0.0, source.float().square().mean().sqrt().item(), generator=generator)


def fill_layer(layer: Any, source: Any, generator: torch.Generator) -> None:
    """Fill a layer so that it writes zeros whatever it reads: norms of the source, no values, no MLP units."""
    for name, weight in layer.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif name.endswith("norm.weight"):
            widen_norm(weight, source.get_parameter(name), generator)
        else:
            fill(weight, source.get_parameter(name), generator)
    for silent, old in ((layer.self_attn.v_proj, source.self_attn.v_proj), (layer.mlp.up_proj, source.mlp.up_proj)):
        silent.weight[:, : old.in_features] = 0


def widen_norm(weight: Any, source: torch.Tensor, generator: torch.Generator) -> None:
    """Undo that the mean square is now taken over more coordinates; the constant ones are not read."""
    num_old = len(source)
    fill(weight, source, generator)
    weight[:num_old] = source.float() * math.sqrt(num_old / len(weight))
    weight[num_old : num_old + NUM_CONSTANTS] = 0


def widen_vocabulary(big: Any, small: Any, generator: torch.Generator) -> None:
    """Copy embeddings and LM head; fill the head so that no new id wins.

    A new row is a copy of an old one less a penalty times a constant: whatever the text, its logit is below that old
    row's, and by far. The constant comes from two coordinates that hold the same value at every token and that no
    layer reads or writes. The last norm gives them opposite signs: in a head that is the embedding, old rows hold
    that value twice, and it cancels. `rms_norm_eps` is smaller by their squares, so norms give what they gave.
    """
    source, embedding, head = small.model.embed_tokens.weight, big.model.embed_tokens.weight, big.lm_head.weight
    num_old, hidden_size = source.shape
    constants = slice(hidden_size, hidden_size + NUM_CONSTANTS)
    fill(embedding, source, generator)
    if head is not embedding:
        fill(head, small.lm_head.weight, generator)
        head[:num_old, :hidden_size] = small.lm_head.weight
        head[:num_old, constants] = 0
    embedding[:num_old] = 0
    embedding[:num_old, :hidden_size] = source
    if len(head) > num_old:
        signs = head.new_tensor([1.0, -1.0])
        embedding[:num_old, constants] = constant_value(small.config)
        # A large weight, or float16 could not hold enough of the penalty.
        big.model.norm.weight[constants] = signs * 2.0**8
        head[num_old:, :hidden_size] = head[torch.arange(num_old, len(head)) % num_old, :hidden_size]
        head[num_old:, constants] = -signs * min(PENALTY, torch.finfo(head.dtype).max / 2)


def copy_attention(attention: Any, source: Any) -> None:
    """Copy the source's heads among those of a silent attention.

    A head's old dimension `i` of each half goes to `i * ratio`, where the rotary frequency is the same. In the other
    dimensions queries are zero and values silent, so keys may be random there.
    """
    small, hidden_size, dim = source.config, source.q_proj.in_features, source.head_dim
    big_dim, ratio = attention.head_dim, attention.head_dim // dim
    group, big_group = source.num_key_value_groups, attention.num_key_value_groups
    copies = num_copies(small, big_group)
    num_live = small.num_key_value_heads * copies
    old = torch.arange(small.num_attention_heads)
    heads = (old // group * copies + old % group // big_group) * big_group + old % group % big_group
    rotary = (torch.arange(dim // 2) * ratio + torch.tensor([[0], [big_dim // 2]])).flatten()
    projections = [(getattr(source, name), getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")]
    # Each of shape (heads, head_dim, hidden_size), the big ones where they read the old coordinates.
    query, key, value = (old.weight.float().unflatten(0, (-1, dim)) for old, _ in projections)
    queries, keys, values = (new.weight.unflatten(0, (-1, big_dim))[..., :hidden_size] for _, new in projections)
    queries[heads] = 0
    # Scores are divided by the root of a larger dimension.
    queries[heads[:, None], rotary] = (query * math.sqrt(ratio)).to(queries)
    keys[:num_live, rotary] = key.repeat_interleave(copies, 0).to(keys)
    values[:num_live, :dim] = value.repeat_interleave(copies, 0).to(values)
    outputs = attention.o_proj.weight.unflatten(1, (-1, big_dim))
    # New query heads that share a value which is not silent write nothing.
    outputs[:, : num_live * big_group, :dim] = 0
    outputs[:hidden_size, heads, :dim] = source.o_proj.weight.unflatten(1, (-1, dim)).to(outputs)


def enlarge_head(small: CorrectionHead, big: Any, generator: torch.Generator) -> CorrectionHead:
    """Make a correction head that reads the old coordinates only; new tokens are never candidates."""
    with torch.device("meta"):
        head = CorrectionHead(big.config.vocab_size, big.config.hidden_size, small.rank, small.num_candidates)
    head.to(big.dtype).to_empty(device=big.device)
    for name, weight in head.named_parameters():
        source = small.get_parameter(name)
        fill(weight, source, generator)
        weight[tuple(slice(0, size) for size in source.shape)] = source.to(weight)
    head.gate.weight[:, small.hidden_size : small.hidden_size + NUM_CONSTANTS] = 0
    return head.eval()


def copy_mlp(mlp: Any, source: Any) -> None:
    """Copy the source's units to the first of a silent MLP."""
    num_units, hidden_size = source.gate_proj.weight.shape
    mlp.gate_proj.weight[:num_units, :hidden_size] = source.gate_proj.weight
    mlp.up_proj.weight[:num_units, :hidden_size] = source.up_proj.weight
    mlp.down_proj.weight[:, :num_units] = 0
    mlp.down_proj.weight[:hidden_size, :num_units] = source.down_proj.weight


def load_enlarged(args: Any) -> Pair:
    """Load the pair that the flags name, and enlarge it on its device."""
    device = args.device or default_device()
    check_device(device)
    small = load_pair(args.target, args.draft, "float32", "cpu")
    dtype = weight_dtype(small.target.name_or_path, args.dtype, device)
    # Rotary embeddings have no last position; without `--context` the enlarged pair has plenty.
    positions = None
    if args.context is not None:
        positions = max(args.context + args.max_new_tokens, num_positions(small.target.config))
    return enlarge_pair(small, *args.shapes, dtype=dtype, device=device, max_position_embeddings=positions)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs=2, required=True, metavar=("TARGET", "DRAFT"), help=", ".join(SHAPES))
    add_pair(parser)
    parser.add_argument("--device")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run's --output")
    parser.add_argument("--prompts", nargs="+", default=["demo"])
    for field in fields(BenchmarkSettings):
        flag = "--assistant-tree-size" if field.name == "tree_size" else f"--{field.name.replace('_', '-')}"
        options: dict[str, Any] = {"type": str if field.name == "routes" else int, "default": field.default}
        parser.add_argument(flag, dest=field.name, nargs="+" if isinstance(field.default, tuple) else None, **options)
    args = parser.parse_args()
    if args.output and args.output.is_dir():
        parser.error(f"Expected a file for --output, got the folder {args.output}.")
    chosen = {field.name: getattr(args, field.name) for field in fields(BenchmarkSettings)}
    settings = BenchmarkSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})
    sets = load_prompt_sets(args.prompts)
    pair = load_enlarged(args)
    metadata = run_metadata(pair, settings, sys.argv[1:], args.target, args.draft)
    metadata |= {"command": command(), "scale": args.shapes}
    console = make_console(is_error=True)
    with progress_bar(console) as advance:
        benchmark = Benchmark(pair, settings, advance)
        result = run_benchmark(benchmark, sets, metadata, args.output, args.resume, partial(show_cell, console))
    finish(result, None)


if __name__ == "__main__":
    main()
