"""Recurrences over the few tokens of a round are those of the families, and so is the state after any first ones."""

import importlib

import pytest
from device import torch

from pard_hf.generation.recurrences import delta_rule, state_space

pytest.importorskip("transformers.models.kimi_linear")
BATCH, HEADS = 2, 4


def family(name: str):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def space_of(n: int):
    arguments = {
        "hidden_states": rand(BATCH, n, HEADS, 6), "dt": rand(BATCH, n, HEADS).exp(), "A": -rand(HEADS).exp(),
        "B": rand(BATCH, n, 2, 5), "C": rand(BATCH, n, 2, 5, seed=1), "D": rand(HEADS), "chunk_size": 8,
    }  # fmt: skip
    return arguments, rand(BATCH, HEADS, 6, 5)


def rule_of(n: int, decays: tuple[int, ...] = (), num_keys: int = HEADS, decay: float = 1.0):
    arguments = {
        "query": rand(BATCH, n, num_keys, 5), "key": rand(BATCH, n, num_keys, 5, seed=1),
        "value": rand(BATCH, n, HEADS, 6), "g": -decay * rand(BATCH, n, HEADS, *decays).exp(),
        "beta": rand(BATCH, n, HEADS, seed=1).sigmoid(), "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip
    return arguments, rand(BATCH, HEADS, 5, 6)


# A function over several tokens of a family, ours, and their arguments; strong decays would overflow one by one.
CASES = {
    "state space": (lambda: family("bamba").mamba2_chunk_scan, state_space, space_of),
    "delta rule": (lambda: family("qwen3_next").torch_recurrent_gated_delta_rule, delta_rule, rule_of),
    "grouped heads": (
        lambda: family("qwen3_next").torch_recurrent_gated_delta_rule, delta_rule, lambda n: rule_of(n, num_keys=2)
    ),
    "decay by channel": (
        lambda: family("kimi_linear").recurrent_kimi_delta_attention, delta_rule, lambda n: rule_of(n, (5,))
    ),
    "strong decay": (
        lambda: family("kimi_linear").recurrent_kimi_delta_attention, delta_rule, lambda n: rule_of(n, (5,), decay=40)
    ),
}  # fmt: skip


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("n", [1, 2, 9, 32])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_states_are_those_of_the_families(case, n, has_state):
    find, over_few, make = CASES[case]
    arguments, state = make(n)
    state = state if has_state else None
    names = (
        ("initial_states", "return_final_states") if case == "state space" else ("initial_state", "output_final_state")
    )

    output, advance = over_few(arguments, state)

    expected, _ = find()(**arguments, **dict(zip(names, (state, True), strict=True)))
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=2e-5)
    for num_entered in {1, n // 2 + 1, n}:
        inputs = {k: v[:, :num_entered] if getattr(v, "dim", int)() > 2 else v for k, v in arguments.items()}
        _, expected = find()(**inputs, **dict(zip(names, (state, True), strict=True)))
        enters = (torch.arange(n) < num_entered).expand(BATCH, n)
        torch.testing.assert_close(advance(enters), expected, atol=2e-5, rtol=2e-5)


def test_rows_advance_over_tokens_of_their_own():
    for over_few, make in ((state_space, space_of), (delta_rule, rule_of)):
        arguments, state = make(7)
        _, advance = over_few(arguments, state)

        both = advance(torch.tensor([[1] * 3 + [0] * 4, [0] * 7]).bool())

        first = advance(torch.tensor([[1] * 3 + [0] * 4] * 2).bool())
        torch.testing.assert_close(both[0], first[0])
        torch.testing.assert_close(both[1], state[1])
