"""The headline: output never depends on draft quality.

Everything runs in float32, where plain `generate` and ours agree to the token.
"""

import pytest
from device import torch
from families import (
    HYBRIDS,
    TARGETS,
    add_head,
    make_draft,
    make_model,
    make_prompts,
    make_scripted_draft,
    make_self_draft,
    texts_of,
)

from pard_hf import AssistantMemory, PardGenerationMixin, with_pard, without_pard

NEW_TOKENS = 30
COUNTS = [1, 2, 5, 12]


def plain(target, **kwargs):
    """Plain greedy `generate`, whether or not the target has the mixin."""
    return target.generate(do_sample=False, **kwargs)


def best_draft(target, num_assistant_tokens=5):
    """A draft with the target's own weights; of a hybrid, which cannot draft, one that is random."""
    if target.config.model_type in HYBRIDS:
        return make_draft(make_model("llama", seed=6), num_assistant_tokens)
    return make_self_draft(without_pard(target), num_assistant_tokens)


def drafts_for(target, prompts, expected, num_assistant_tokens):
    """Drafts of every quality: random, the target's own weights, right up to position i and wrong after it."""
    yield make_draft(make_model("llama", seed=5), num_assistant_tokens)
    yield best_draft(target, num_assistant_tokens)
    script = texts_of(expected, prompts["attention_mask"])
    for first_miss in {0, 1, num_assistant_tokens // 2, num_assistant_tokens}:
        yield make_scripted_draft(script, first_miss, num_assistant_tokens)


@pytest.mark.parametrize("num_assistant_tokens", COUNTS)
@pytest.mark.parametrize("family", TARGETS)
def test_untouched_target_is_identical(family, num_assistant_tokens):
    """Tier 1: the stock loop with our draft says what plain `generate` says."""
    target, prompts = make_model(family), make_prompts(1)
    expected = plain(target, **prompts, max_new_tokens=NEW_TOKENS)

    for draft in drafts_for(target, prompts, expected, num_assistant_tokens):
        got = plain(target, **prompts, max_new_tokens=NEW_TOKENS, assistant_model=draft)
        assert torch.equal(got, expected)
    assert not isinstance(target, PardGenerationMixin)


@pytest.mark.parametrize(
    ("batch_size", "num_assistant_tokens"), [*((size, count) for size in (1, 3) for count in COUNTS), (8, 2), (8, 5)]
)
@pytest.mark.parametrize("family", TARGETS)
def test_batches_are_identical(family, batch_size, num_assistant_tokens):
    """Tier 2: rows of different lengths, each with its own accepted counts."""
    target, prompts = make_model(family), make_prompts(batch_size)
    expected = plain(target, **prompts, max_new_tokens=NEW_TOKENS)

    for draft in drafts_for(target, prompts, expected, num_assistant_tokens):
        got = plain(with_pard(target), **prompts, max_new_tokens=NEW_TOKENS, assistant_model=draft)
        assert torch.equal(got, expected)


def drafts_for_trees(target, prompts, expected, num_assistant_tokens, tree_size):
    """Drafts of every quality, with correction heads of any opinions where they can have one."""
    if tree_size:  # Chains without a head are compared above.
        yield from drafts_for(target, prompts, expected, num_assistant_tokens)
    yield add_head(make_draft(make_model("llama", seed=5), num_assistant_tokens), strength=3.0)
    for strength in (0.05, 3.0):
        yield add_head(best_draft(target, num_assistant_tokens), strength)


@pytest.mark.parametrize("tree_size", [0, 1, 7, 64])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", TARGETS)
def test_trees_and_heads_are_identical(family, batch_size, tree_size):
    target, prompts = make_model(family), make_prompts(batch_size)
    expected = plain(target, **prompts, max_new_tokens=20)

    for draft in drafts_for_trees(target, prompts, expected, 5, tree_size):
        got = plain(
            with_pard(target),
            **prompts,
            max_new_tokens=20,
            assistant_model=draft,
            assistant_tree_size=tree_size,
        )
        assert torch.equal(got, expected)


def text_sources(target, prompts, expected):
    """Arguments of calls that propose from texts: all sources and each alone, right and wrong, new and remembered."""
    script = texts_of(expected, prompts["attention_mask"])
    wrong = [[token if column % 4 else 3 + token % 90 for column, token in enumerate(text)] for text in script]
    memory = AssistantMemory(target)
    yield {"prompt_lookup_num_tokens": 5}
    copy = {"assistant_sources": ["copy"], "assistant_reference_texts": wrong}
    yield {**copy, "prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}
    yield {"assistant_sources": ["successors"], "assistant_memory": memory, "prompt_lookup_num_tokens": 2}
    yield {"assistant_memory": memory, "assistant_reference_texts": [*wrong, *script]}


@pytest.mark.parametrize(("batch_size", "tree_size"), [(1, 0), (1, 64), (3, 16)])
@pytest.mark.parametrize("family", TARGETS)
def test_text_sources_without_a_draft_are_identical(family, batch_size, tree_size):
    target, prompts = make_model(family), make_prompts(batch_size)
    expected, accepted = plain(target, **prompts, max_new_tokens=14), []

    for arguments in text_sources(target, prompts, expected):
        got = plain(
            with_pard(target),
            **prompts,
            **arguments,
            max_new_tokens=14,
            assistant_tree_size=tree_size,
            return_dict_in_generate=True,
        )
        assert torch.equal(got.sequences, expected)
        assert got.stats.loop == "own"
        assert sum(got.stats.accepted_by_source.values()) == got.stats.num_accepted
        accepted.append(got.stats.num_accepted)
    assert accepted[-1] > 7 * batch_size


@pytest.mark.parametrize(("batch_size", "tree_size"), [(1, None), (3, 32)])
@pytest.mark.parametrize("family", TARGETS)
def test_text_sources_beside_a_draft_are_identical(family, batch_size, tree_size):
    """One tree of all sources, with drafts and heads of any opinions."""
    target, prompts = make_model(family), make_prompts(batch_size)
    expected = plain(target, **prompts, max_new_tokens=14)
    script = texts_of(expected, prompts["attention_mask"])
    drafts = [
        make_draft(make_model("llama", seed=5), 2),
        add_head(best_draft(target), 3.0),
        make_scripted_draft(script, first_miss=3),
        add_head(make_draft(make_model("llama", seed=5)), 0.05),
    ]

    for draft, arguments in zip(drafts, text_sources(target, prompts, expected), strict=True):
        got = plain(
            with_pard(target),
            **prompts,
            **arguments,
            max_new_tokens=14,
            assistant_model=draft,
            assistant_tree_size=tree_size,
            return_dict_in_generate=True,
        )
        assert torch.equal(got.sequences, expected)
        assert got.stats.loop == "own"
        assert sum(got.stats.accepted_by_source.values()) == got.stats.num_accepted


@pytest.mark.parametrize("has_draft", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 3},
        {"prefix_allowed_tokens_fn": lambda row, ids: range(3, 60 + row)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_text_sources_in_lockstep_are_identical(arguments, batch_size, has_draft):
    """Rows advance together where code reads the prefix; end tokens come at a column of each row's own."""
    target, prompts = make_model("llama"), make_prompts(batch_size)
    free = plain(target, **prompts, **arguments, max_new_tokens=20)
    arguments = {**arguments, "eos_token_id": free[:, 28].tolist(), "max_new_tokens": 20}
    expected = plain(target, **prompts, **arguments)
    draft = make_scripted_draft(texts_of(free, prompts["attention_mask"]), first_miss=2) if has_draft else None

    for more in text_sources(target, prompts, free):
        got = plain(
            with_pard(target), **prompts, **arguments, **more, assistant_model=draft, return_dict_in_generate=True
        )
        assert torch.equal(got.sequences, expected)
        assert got.stats.loop == "lockstep"
        assert sum(got.stats.accepted_by_source.values()) == got.stats.num_accepted


@pytest.mark.parametrize("strength", [0.05, 3.0])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_untouched_target_is_identical_with_a_head(family, strength):
    target, prompts = make_model(family), make_prompts(1)
    expected = plain(target, **prompts, max_new_tokens=NEW_TOKENS)
    draft = add_head(make_self_draft(target), strength)

    got = plain(target, **prompts, max_new_tokens=NEW_TOKENS, assistant_model=draft)

    assert torch.equal(got, expected)


@pytest.mark.parametrize("tree_size", [0, 16])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("new_tokens", [1, 2, 6, 7, 13])
def test_trees_end_where_plain_generate_ends(new_tokens, batch_size, tree_size):
    """At the length asked for, and at end tokens inside a block; with a draft, copied texts, and both."""
    target, prompts = make_model("qwen2"), make_prompts(batch_size)
    free = plain(target, **prompts, max_new_tokens=60)
    draft = add_head(make_self_draft(target), 0.05)
    ends = [int(free[row, 18 + new_tokens + row]) for row in range(batch_size)]
    for stop in ({"max_new_tokens": new_tokens}, {"max_new_tokens": 40, "eos_token_id": ends}):
        expected = plain(without_pard(target), **prompts, **stop)
        copies = {"assistant_reference_texts": texts_of(free, prompts["attention_mask"])}

        for sources in ({"assistant_model": draft}, copies, {"assistant_model": draft, **copies}):
            got = plain(with_pard(target), **prompts, **stop, **sources, assistant_tree_size=tree_size)
            assert torch.equal(got, expected)


def test_head_that_corrects_nothing_changes_no_bit():
    """An untrained head, and none: the same rounds and the same proposals, to the bit."""
    target, prompts = with_pard(make_model("llama")), make_prompts(3)
    draft = make_draft(make_model("llama", seed=5))
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    chain = target.generate(**prompts, **kwargs, assistant_model=draft)
    proposals = draft.draft(prompts["input_ids"], prompts["attention_mask"])

    add_head(draft, strength=0.0)

    headed = target.generate(**prompts, **kwargs, assistant_model=draft)
    assert torch.equal(chain.sequences, headed.sequences)
    assert chain.stats == headed.stats
    assert all(map(torch.equal, chain.scores, headed.scores))
    assert torch.equal(proposals, draft.draft(prompts["input_ids"], prompts["attention_mask"]))


@pytest.mark.parametrize("tier", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("column", [0, 1, 4, 7])
def test_end_token_inside_a_block(tier, batch_size, column):
    """Output ends where plain `generate` ends, wherever in a block of proposals the end token stands."""
    if tier == 1 and batch_size > 1:
        pytest.skip("the stock loop has no batches")
    target, prompts = make_model("llama"), make_prompts(batch_size)
    free = plain(target, **prompts, max_new_tokens=NEW_TOKENS)
    ends = [int(free[row, 18 + column + row]) for row in range(batch_size)]
    stop = {"eos_token_id": ends, "max_new_tokens": NEW_TOKENS}
    expected = plain(target, **prompts, **stop)
    draft = make_scripted_draft(texts_of(free, prompts["attention_mask"]), first_miss=12, num_assistant_tokens=12)

    got = plain(with_pard(target) if tier == 2 else target, **prompts, **stop, assistant_model=draft)

    assert torch.equal(got, expected)
    assert expected.shape[1] < free.shape[1]


@pytest.mark.parametrize("tier", [1, 2])
@pytest.mark.parametrize("new_tokens", [1, 2, 6, 7, 12, 13, 14])
def test_max_length_cuts_a_block(tier, new_tokens):
    target, prompts = make_model("qwen2"), make_prompts(1)
    expected = plain(target, **prompts, max_length=18 + new_tokens)
    draft = make_scripted_draft(
        texts_of(plain(target, **prompts, max_new_tokens=60), prompts["attention_mask"]), 12, 12
    )

    target = with_pard(target) if tier == 2 else target
    got = plain(target, **prompts, max_length=18 + new_tokens, assistant_model=draft)

    assert torch.equal(got, expected)


def test_always_right_draft_emits_whole_blocks():
    """Every round but the last emits K + 1 tokens."""
    target, prompts = make_model("llama"), make_prompts(3)
    expected = plain(target, **prompts, max_new_tokens=NEW_TOKENS)
    draft = make_scripted_draft(texts_of(expected, prompts["attention_mask"]), first_miss=5)

    output = with_pard(target).generate(
        **prompts, max_new_tokens=NEW_TOKENS, assistant_model=draft, return_dict_in_generate=True
    )

    # 30 tokens a row are 5 rounds of 6; the bonus token of the last one is the 30th.
    assert output.stats.histogram == (0, 0, 0, 0, 0, 15)
    assert output.stats.acceptance_length == 6


@pytest.mark.parametrize("first_miss", range(6))
def test_quality_changes_rounds_only(first_miss):
    target, prompts = make_model("llama"), make_prompts(1)
    expected = plain(target, **prompts, max_new_tokens=NEW_TOKENS)
    draft = make_scripted_draft(texts_of(expected, prompts["attention_mask"]), first_miss)

    output = with_pard(target).generate(
        **prompts, max_new_tokens=NEW_TOKENS, assistant_model=draft, return_dict_in_generate=True
    )

    assert torch.equal(output.sequences, expected)
    assert output.stats.num_rounds == -(-NEW_TOKENS // (first_miss + 1))


@pytest.mark.parametrize("first_miss", [0, 2, 5])
def test_tiers_report_the_same_acceptance(first_miss):
    """Both tiers fuse the first verify with the prefill, so rounds and acceptance length agree."""
    target, prompts = make_model("qwen3"), make_prompts(1)
    expected = plain(target, **prompts, max_new_tokens=NEW_TOKENS)
    draft = make_scripted_draft(texts_of(expected, prompts["attention_mask"]), first_miss)
    verifies = []
    hook = target.register_forward_hook(lambda *_: verifies.append(1))
    plain(target, **prompts, max_new_tokens=NEW_TOKENS, assistant_model=draft)
    hook.remove()

    output = with_pard(target).generate(
        **prompts, max_new_tokens=NEW_TOKENS, assistant_model=draft, return_dict_in_generate=True
    )

    assert output.stats.num_rounds == len(verifies)
    assert output.stats.acceptance_length == NEW_TOKENS / len(verifies)


def test_eager_attention_is_identical():
    target = make_model("llama")
    target.set_attn_implementation("eager")
    prompts = make_prompts(3)
    draft = make_self_draft(target)
    expected = plain(target, **prompts, max_new_tokens=NEW_TOKENS)

    got = plain(with_pard(target), **prompts, max_new_tokens=NEW_TOKENS, assistant_model=draft)

    assert torch.equal(got, expected)
