"""Any call in any combination: our loop says what plain `generate` of the untouched model says.

`PARD_FUZZ_EXAMPLES` calls are drawn from the seed `PARD_FUZZ_SEED`; both stand in the last lines of a run. A call that
fails is printed as the smallest one like it that fails too.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from device import torch
from families import (
    FAMILIES,
    HYBRIDS,
    TARGETS,
    WINDOW,
    add_head,
    character_tokenizer,
    make_draft,
    make_model,
    make_scripted_draft,
    make_self_draft,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pard_hf import AssistantMemory, PardDraftModel, with_pard
from pard_hf.generation.cache import attention_windows
from pard_hf.generation.sampling import Noise, count_emitted

NUM_EXAMPLES, SEED = int(os.environ.get("PARD_FUZZ_EXAMPLES", 200)), int(os.environ.get("PARD_FUZZ_SEED", 0))
# Where faults are planted: as many as a run of the tests makes.
ENOUGH = 200
# What the installed transformers calls a cache; ours is called by either name.
NEW_NAME = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
HOST_KEYWORD = "cache" if NEW_NAME else "past_key_values"
# Texts come close to any of the windows and pass most of them.
LONGEST_PROMPT, MOST_TOKENS = 9, 12


class CountingProcessor(LogitsProcessor):
    """Looks at the number of its calls and at the whole batch."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores.index_fill(1, (input_ids[:, -1].sum() + torch.arange(self.calls)) % 90, -torch.inf)


class RememberingProcessor(LogitsProcessor):
    """Forbids the last token of every call so far, in the row it stood in, and writes in place."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids[:, -1:])
        return scores.scatter_(1, torch.cat(self.seen, dim=1), -torch.inf)


class StopAtSum(StoppingCriteria):
    """Ends a row where its last two tokens add up to a multiple of five."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -2:].sum(-1) % 5 == 0


class StopAtCall(StoppingCriteria):
    """Ends all rows at its fourth call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= 4, device=input_ids.device)


# Arguments of `generate`, made afresh for each call: what keeps a state is not shared.
PREFIX_FREE: dict[str, Callable[[], dict[str, Any]]] = {
    "suppress_tokens": lambda: {"suppress_tokens": list(range(5, 40))},
    "renormalize_logits": lambda: {"renormalize_logits": True},
    "remove_invalid_values": lambda: {"remove_invalid_values": True},
}
LOOKING: dict[str, Callable[[], dict[str, Any]]] = {
    "repetition_penalty": lambda: {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": lambda: {"no_repeat_ngram_size": 1},
    "min_new_tokens": lambda: {"min_new_tokens": 5},
    "bad_words_ids": lambda: {"bad_words_ids": [[5], [7, 8]]},
    "forced_eos_token_id": lambda: {"forced_eos_token_id": 4},
    "begin_suppress_tokens": lambda: {"begin_suppress_tokens": list(range(3, 60))},
    "sequence_bias": lambda: {"sequence_bias": [[[20], 4.0], [[21, 22], 6.0]]},
    "guidance_scale": lambda: {"guidance_scale": 1.4},
    "counting": lambda: {"logits_processor": LogitsProcessorList([CountingProcessor()])},
    "remembering": lambda: {"logits_processor": LogitsProcessorList([RememberingProcessor()])},
}
CRITERIA: dict[str, Callable[[], dict[str, Any]]] = {
    "at sum": lambda: {"stopping_criteria": StoppingCriteriaList([StopAtSum()])},
    "at call": lambda: {"stopping_criteria": StoppingCriteriaList([StopAtCall()])},
    "stop_strings": lambda: {"stop_strings": list("ABCDEFGH") + ["ab"], "tokenizer": tokenizer()},
}


@dataclass(frozen=True)
class Call:
    """A conversation with a pair: all that is drawn."""

    family: str
    sizes: tuple[tuple[str, Any], ...] = ()
    # Of each row; the longest has no padding.
    prompt_lengths: tuple[int, ...] = (1,)
    new_tokens: int = 1
    num_assistant_tokens: int = 1
    tree_size: int | None = 0
    is_adaptive: bool = False
    # "self", the family of a random one, the first wrong proposal of one that knows the text, or none.
    draft: str | int | None = "self"
    head: float | None = None
    # What copies and remembers: the depth of lookup (or none), its sources, whether the memory is that of calls
    # before, and the row of the text, made wrong here and there, to copy from.
    lookup: int | None = None
    sources: tuple[str, ...] | None = None
    keeps_memory: bool = False
    reference: int | None = None
    # (row, column) of the tokens in the text without an end that are made end tokens.
    ends_at: tuple[tuple[int, int], ...] = ()
    processors: tuple[str, ...] = ()
    criteria: str | None = None
    sampling: tuple[tuple[str, Any], ...] | None = None
    seed: int = 0
    has_streamer: bool = False
    # Before it all, the same call with a streamer that is interrupted at this put.
    broken_at: int | None = None
    has_outputs: bool = False
    returns_dict: bool = True
    # Tokens of a second turn on the first one's cache; 0 for none, and how that cache is passed.
    turn: int = 0
    cache_keyword: str = "past_key_values"
    brings_cache: bool = False
    only_new_ids: bool = False

    @property
    def looks_up(self) -> bool:
        """Whether anything but a draft proposes."""
        asks = self.lookup is not None or self.keeps_memory or self.reference is not None
        return bool(self.sources) or (self.sources is None and asks)

    @property
    def is_lockstep(self) -> bool:
        """Whether the rows of a batch advance together."""
        looking = set(LOOKING) if self.ends_at else set(LOOKING) - {"min_new_tokens"}
        looks = self.criteria is not None or not looking.isdisjoint(self.processors)
        return looks or (self.has_streamer and len(self.prompt_lengths) > 1)

    @property
    def is_deterministic(self) -> bool:
        """Whether the very tokens are promised: sampled rows that advance on their own keep the distribution only."""
        return self.sampling is None or len(self.prompt_lengths) == 1 or self.is_lockstep


def sizes_of(family: str) -> list[tuple[tuple[str, Any], ...]]:
    """Changes to a family's tiny model, each on its own."""
    base = (FAMILIES | HYBRIDS)[family][2]
    layers = "num_hidden_layers" if "num_hidden_layers" in base else "n_layer"
    types = ("conv", "full_attention", "conv") if family in HYBRIDS else ("sliding_attention",)
    other = {layers: len(types), "layer_types": types} if "layer_types" in base else {layers: 1}
    changes: list[dict[str, Any]] = [{}, other, {"attn_implementation": "eager"}]
    if "num_key_value_heads" in base:
        changes += [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}]
    if WINDOW.keys() <= base.keys():
        changes += [{"sliding_window": window} for window in (2, 3, 5)]
    return [tuple(change.items()) for change in changes]


@st.composite
def calls(draw: Any) -> Call:
    family = draw(st.sampled_from(sorted(TARGETS)))
    lengths = draw(st.lists(st.integers(1, LONGEST_PROMPT), min_size=1, max_size=4))
    new_tokens = draw(st.integers(1, MOST_TOKENS))
    places = st.tuples(st.integers(0, len(lengths) - 1), st.integers(0, new_tokens - 1))
    draft = draw(
        st.one_of(st.none(), st.just("self"), st.sampled_from(["llama", "gpt2", "mistral"]), st.integers(0, 8))
    )
    names = st.sampled_from([None, None, *PREFIX_FREE, *LOOKING])
    processors = st.tuples(names, names).map(lambda pair: tuple(name for name in dict.fromkeys(pair) if name))
    warpers = st.sampled_from([(), (("temperature", 0.6),), (("top_k", 0),), (("top_p", 0.8), ("temperature", 1.5))])
    call = Call(
        family=family,
        sizes=draw(st.sampled_from(sizes_of(family))),
        prompt_lengths=tuple(lengths),
        new_tokens=new_tokens,
        num_assistant_tokens=draw(st.sampled_from([1, 2, 3, 4, 5, 8])),
        tree_size=draw(st.sampled_from([None, 0, 1, 4, 9, 33])),
        is_adaptive=draw(st.integers(0, 9)) == 9,
        draft=draft,
        head=None if draft is None or isinstance(draft, int) else draw(st.sampled_from([None, 0.05, 3.0])),
        lookup=draw(st.one_of(st.none(), st.integers(1, 12))),
        sources=draw(st.sampled_from([None, None, ("copy",), ("successors",), ("copy", "successors")])),
        keeps_memory=draw(st.booleans()),
        reference=draw(st.one_of(st.none(), st.integers(0, 3))),
        ends_at=tuple(draw(st.lists(places, max_size=3, unique=True))),
        processors=draw(st.one_of(st.just(()), processors)),
        criteria=draw(st.one_of(st.none(), st.none(), st.sampled_from(sorted(CRITERIA)))),
        sampling=draw(st.one_of(st.none(), warpers)),
        seed=draw(st.integers(0, 3)),
        has_streamer=draw(st.booleans()),
        broken_at=draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, 4))),
        has_outputs=draw(st.booleans()),
        returns_dict=draw(st.booleans()),
        turn=draw(st.sampled_from([0, 0, 1, 4])),
        cache_keyword=draw(st.sampled_from(["past_key_values", "cache"])),
        brings_cache=draw(st.booleans()),
        only_new_ids=draw(st.booleans()),
    )
    if call.draft == "self" and family in HYBRIDS:
        call = replace(call, draft="llama")
    if call.draft is None and not call.looks_up:
        call = replace(call, lookup=5)
    if call.num_assistant_tokens not in (2, 4, 8):
        call = replace(call, is_adaptive=False)
    if "forced_eos_token_id" in call.processors:  # Another may forbid that token: nothing is left to sample then.
        call = replace(call, processors=("forced_eos_token_id",))
    return call if call.is_deterministic else replace(call, sampling=None)


@cache
def tokenizer() -> Any:
    return character_tokenizer("éßø", padding_side="left")


@cache
def models(family: str, sizes: tuple[tuple[str, Any], ...]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The untouched model and a target of ours with its weights."""
    changes = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes}
    plain = make_model(family, **changes)
    return plain, with_pard(copy.deepcopy(plain))


@cache
def parallel_draft(family: str, sizes: tuple[tuple[str, Any], ...] | None, head: float | None) -> PardDraftModel:
    """A draft with the target's own weights, or a random one of some family, maybe with a head of any opinions."""
    draft = make_draft(make_model(family, seed=5)) if sizes is None else make_self_draft(models(family, sizes)[0])
    return draft if head is None else add_head(draft, head)


@cache
def knowing_draft() -> PardDraftModel:
    return make_scripted_draft([], 0)


class Recorder:
    """A streamer that keeps what it is given, until a user is said to press Ctrl-C."""

    def __init__(self, broken_at: int | None = None) -> None:
        self.puts: list[Any] = []
        self.broken_at = broken_at

    def put(self, value: torch.Tensor) -> None:
        if len(self.puts) == self.broken_at:
            raise KeyboardInterrupt
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.puts.append("end")


def prompts_of(call: Call) -> dict[str, torch.Tensor]:
    longest = max(call.prompt_lengths)
    ids = torch.randint(3, 99, (len(call.prompt_lengths), longest), generator=torch.Generator().manual_seed(call.seed))
    mask = (torch.arange(longest) >= longest - torch.tensor(call.prompt_lengths).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def text_of(said: torch.Tensor) -> torch.Tensor:
    """1 for the new tokens of each row, 0 for the padding behind them."""
    return (said != 0).long().flip(1).cummax(1).values.flip(1)


def next_turn(call: Call, prompts: dict[str, torch.Tensor], sequences: torch.Tensor) -> dict[str, torch.Tensor]:
    """The whole text or its new ids, with a mask over everything: rows that ended early have padding in the middle."""
    mask, said = prompts["attention_mask"], sequences[:, prompts["input_ids"].shape[1] :]
    more = torch.randint(3, 99, (len(mask), call.turn), generator=torch.Generator().manual_seed(call.seed + 1))
    ids = torch.cat([sequences[:, -1:] if call.only_new_ids else sequences, more], dim=1)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, text_of(said), torch.ones_like(more)], dim=1)}


def arguments_of(call: Call, ends: list[int] | None) -> dict[str, Any]:
    """What both get, with processors and criteria that have seen nothing yet."""
    arguments: dict[str, Any] = {"max_new_tokens": call.new_tokens, "do_sample": False, "eos_token_id": ends}
    for name in call.processors:
        arguments.update({**PREFIX_FREE, **LOOKING}[name]())
    if call.criteria is not None:
        arguments.update(CRITERIA[call.criteria]())
    if call.sampling is not None:
        arguments.update({"do_sample": True, **dict(call.sampling)})
    if call.returns_dict:
        arguments["return_dict_in_generate"] = True
        arguments.update({"output_scores": True, "output_logits": True} if call.has_outputs else {})
    return arguments


def generate(call: Call, model: PreTrainedModel, **arguments: Any) -> Any:
    torch.manual_seed(call.seed)
    return model.generate(**arguments)


def said_freely(call: Call, plain: PreTrainedModel, prompts: dict[str, torch.Tensor], past: Any) -> torch.Tensor:
    """The text as it would be if nothing but its length ended it."""
    arguments = arguments_of(replace(call, criteria=None, returns_dict=False), None)
    return generate(call, plain, **prompts, **arguments, **{HOST_KEYWORD: copy.deepcopy(past)})


@cache
def memory_of(family: str, sizes: tuple[tuple[str, Any], ...]) -> AssistantMemory:
    """What all calls of a target remember."""
    return AssistantMemory(models(family, sizes)[1])


def sources_of(call: Call, plain: PreTrainedModel, prompts: dict[str, torch.Tensor], past: Any) -> dict[str, Any]:
    """Arguments of a call that proposes from texts."""
    arguments: dict[str, Any] = {"prompt_lookup_num_tokens": call.lookup, "assistant_sources": call.sources}
    if call.keeps_memory:
        arguments["assistant_memory"] = memory_of(call.family, call.sizes)
    if call.reference is not None:
        text = said_freely(call, plain, prompts, past)[call.reference % len(call.prompt_lengths)]
        text[5::7] = 3
        arguments["assistant_reference_texts"] = [text, [7, 8, 9], []]
    return {name: value for name, value in arguments.items() if value is not None}


def draft_for(
    call: Call, plain: PreTrainedModel, prompts: dict[str, torch.Tensor], past: Any
) -> PardDraftModel | None:
    if call.draft is None:
        return None
    if call.draft == "self":
        return parallel_draft(call.family, call.sizes, call.head)
    if isinstance(call.draft, str):
        return parallel_draft(call.draft, None, call.head)
    draft, width = knowing_draft(), prompts["input_ids"].shape[1]
    free = said_freely(call, plain, prompts, past)
    mask = torch.nn.functional.pad(prompts["attention_mask"][:, -width:], (0, free.shape[1] - width), value=1)
    draft.script = [row[kept].tolist() for row, kept in zip(free, mask.bool(), strict=True)]
    draft.first_miss = call.draft
    return draft


def is_refused(call: Call, prompts: dict[str, torch.Tensor], past: Any) -> bool:
    """Whether our loop says no, in words: to padding inside a row that a window would count, or a state take in."""
    window = {**(FAMILIES | HYBRIDS)[call.family][2], **dict(call.sizes)}.get("sliding_window")
    mask = prompts["attention_mask"]
    if call.family in HYBRIDS:
        num_past = 0 if past is None else past.get_seq_length()
        return num_past > 0 and not bool(mask[:, num_past:].all())
    return window is not None and mask.shape[1] + call.new_tokens > window and bool((mask.diff(dim=1) < 0).any())


def state_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a call leaves as it was: class, mode, configs, and the memory of every weight and buffer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    memory = [(name, tensor.data_ptr(), tensor._version) for name, tensor in tensors]
    return type(model), model.training, model.config.to_dict(), model.generation_config.to_dict(), memory


def entries_of(past: Any, mask: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values of a cache where there is text, for padding holds anything; and the states of a hybrid."""
    layers = [layer for layer in past.layers if hasattr(layer, "keys")]
    states = [states for layer in layers for states in (layer.keys, layer.values)]
    mask = mask[:, : past.get_seq_length()]
    entries = [kept * mask[:, None, mask.shape[1] - kept.shape[2] :, None] for kept in states]
    return entries + [layer.conv_states[0] for layer in past.layers if hasattr(layer, "conv_states")]


def check(call: Call) -> None:
    """Run a call plainly and with its draft; all that can be seen from outside is the same."""
    plain, target = models(call.family, call.sizes)
    prompts, ends = prompts_of(call), None
    pasts = [DynamicCache(config=plain.config) if call.brings_cache else None for _ in range(2)]
    if call.ends_at:
        said = said_freely(call, plain, prompts, None)[:, max(call.prompt_lengths) :]
        ends = [int(said[place]) for place in call.ends_at]
    sequences, pasts = check_turn(call, plain, target, ends, prompts, pasts)
    if call.turn and pasts[0] is not None:
        check_turn(call, plain, target, ends, next_turn(call, prompts, sequences), pasts)


def check_turn(
    call: Call,
    plain: PreTrainedModel,
    target: PreTrainedModel,
    ends: list[int] | None,
    prompts: dict[str, torch.Tensor],
    pasts: list[Any],
) -> tuple[torch.Tensor, list[Any]]:
    """Compare one turn; returns its text, and the caches of both where they are to be had."""
    draft = draft_for(call, plain, prompts, pasts[0])
    ours = {
        **sources_of(call, plain, prompts, pasts[0]),
        "assistant_model": draft,
        "num_assistant_tokens": call.num_assistant_tokens,
        "assistant_tree_size": call.tree_size,
        **({"num_assistant_tokens_schedule": "adaptive"} if call.is_adaptive else {}),
    }
    given = {name: tensor.clone() for name, tensor in prompts.items()}
    changeable = [model for model in (target, draft) if model is not None]
    before = [state_of(model) for model in changeable]
    if call.broken_at is not None:
        broken, past = Recorder(call.broken_at), {call.cache_keyword: copy.deepcopy(pasts[1])}
        with suppress(KeyboardInterrupt):
            generate(call, target, **given, **arguments_of(call, ends), **ours, **past, streamer=broken)
        assert [state_of(model) for model in changeable] == before, "changed by a call that was interrupted"

    streamers = [Recorder() if call.has_streamer else None for _ in range(2)]
    is_plain = is_refused(call, prompts, pasts[0])
    past = {HOST_KEYWORD: pasts[0]}
    expected = generate(call, plain, **prompts, **arguments_of(call, ends), **past, streamer=streamers[0])
    expected_noise, past = torch.get_rng_state(), {call.cache_keyword: pasts[1]}
    refusal = pytest.warns(UserWarning, match="generating without") if is_plain else nullcontext()
    with warnings.catch_warnings(), refusal:
        if not is_plain:
            warnings.filterwarnings("error", "(?s).*generating without")
        got = generate(call, target, **given, **arguments_of(call, ends), **ours, **past, streamer=streamers[1])

    assert torch.equal(torch.get_rng_state(), expected_noise), "another random state"
    assert [state_of(model) for model in changeable] == before, "a model was changed"
    assert all(torch.equal(given[name], prompts[name]) for name in prompts), "the inputs were changed"
    if call.has_streamer:
        assert streamers[1].puts == streamers[0].puts
    sequences, text = (output.sequences if call.returns_dict else output for output in (expected, got))
    assert text.tolist() == sequences.tolist()
    if call.returns_dict:
        loop = "lockstep" if call.is_lockstep else "own"
        assert got.stats.loop == ("none" if is_plain else loop)
        assert got.stats.num_rounds > 0 or got.stats.loop == "none"
        assert (got.stats.accepted_by_source is not None) == (call.looks_up and got.stats.loop != "none")
        if got.stats.accepted_by_source is not None:
            assert sum(got.stats.accepted_by_source.values()) == got.stats.num_accepted
        pasts = [expected[HOST_KEYWORD], got[HOST_KEYWORD]]
        # What a processor wrote in place is in the raw logits of plain `generate`, and not in ours.
        names = ("scores",) if "remembering" in call.processors else ("scores", "logits")
        for name in names if call.has_outputs else ():
            check_outputs(got[name], expected[name], sequences[:, prompts["input_ids"].shape[1] :])
    if pasts[0] is not None:
        mask = next_turn(call, prompts, sequences)["attention_mask"]
        for mine, theirs in zip(*(entries_of(past, mask) for past in reversed(pasts)), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    return sequences, pasts


def check_outputs(got: Any, expected: Any, said: torch.Tensor) -> None:
    """Compare scores or logits up to the end of each row; behind it plain `generate` goes on to compute."""
    is_text = text_of(said).bool()
    for column, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        rows = is_text[:, column]
        torch.testing.assert_close(mine[rows], theirs[rows], atol=1e-3, rtol=1e-3)


def fuzz(count: int, start: int, phases: Any = tuple(Phase)) -> int:
    """Check `count` calls drawn from a seed; returns how many were checked."""
    num_checked = 0

    @seed(start)
    @settings(
        max_examples=count,
        phases=[phase for phase in phases if phase is not Phase.explain],
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def every_call(call: Call) -> None:
        nonlocal num_checked
        num_checked += 1
        check(call)

    every_call()
    return num_checked


@pytest.mark.slow
def test_any_call_says_what_plain_generate_says(record_property):
    record_property("fuzz", f"{NUM_EXAMPLES} calls to be drawn from seed {SEED}")

    num_checked = fuzz(NUM_EXAMPLES, SEED)

    record_property("fuzz", f"{num_checked} calls checked, 0 mismatches")
    assert num_checked == NUM_EXAMPLES


def wider_windows(config: Any) -> list[int | None]:
    """A window off by one."""
    return [window and window + 1 for window in attention_windows(config)]


def one_more(
    tokens: torch.Tensor, num_matched: torch.Tensor, remaining: torch.Tensor, ends: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token past an end token, where the round has one."""
    num_emitted, is_finished = count_emitted(tokens, num_matched, remaining, ends)
    most = torch.minimum(num_matched + 1, remaining)
    return torch.where(is_finished, torch.minimum(num_emitted + 1, most), num_emitted), is_finished


class TwiceDrawn(Noise):
    """Noise drawn twice for every token."""

    def at(self, position: int, vocab_size: int) -> torch.Tensor:
        return super().at(2 * position + 1, vocab_size)

    def use(self, num_positions: int) -> None:
        super().use(2 * num_positions)


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("pard_hf.generation.cache.attention_windows", wider_windows),
        ("pard_hf.generation.steps.count_emitted", one_more),
        ("pard_hf.generation.decoder.Noise", TwiceDrawn),
    ],
    ids=["window", "end", "noise"],
)
def test_planted_faults_are_found(monkeypatch, place, fault):
    """What would find a fault of ours finds these, in as many calls as a run of the tests makes."""
    monkeypatch.setattr(place, fault)

    with pytest.raises(AssertionError):
        fuzz(ENOUGH, SEED, [Phase.generate])
