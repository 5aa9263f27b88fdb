"""The headline: output never depends on draft quality.

Everything runs in float32, where plain `generate` and ours agree to the token.
"""

import pytest
from device import torch
from families import (
    FAMILIES,
    add_head,
    make_draft,
    make_model,
    make_prompts,
    make_scripted_draft,
    make_self_draft,
    texts_of,
)

from pard_hf import PardGenerationMixin, with_pard, without_pard

NEW_TOKENS = 30
COUNTS = [1, 2, 5, 12]


def plain(target, **kwargs):
    """Plain greedy `generate`, whether or not the target has the mixin."""
    return target.generate(do_sample=False, **kwargs)


def drafts_for(target, prompts, expected, num_assistant_tokens):
    """Drafts of every quality: random, the target's own weights, right up to position i and wrong after it."""
    yield make_draft(make_model("llama", seed=5), num_assistant_tokens)
    yield make_self_draft(without_pard(target), num_assistant_tokens)
    script = texts_of(expected, prompts["attention_mask"])
    for first_miss in {0, 1, num_assistant_tokens // 2, num_assistant_tokens}:
        yield make_scripted_draft(script, first_miss, num_assistant_tokens)


@pytest.mark.parametrize("num_assistant_tokens", COUNTS)
@pytest.mark.parametrize("family", FAMILIES)
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
@pytest.mark.parametrize("family", FAMILIES)
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
        yield add_head(make_self_draft(without_pard(target), num_assistant_tokens), strength)


@pytest.mark.parametrize("tree_size", [0, 1, 7, 64])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
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
    """At the length asked for, and at end tokens inside a block."""
    target, prompts = make_model("qwen2"), make_prompts(batch_size)
    free = plain(target, **prompts, max_new_tokens=60)
    draft = add_head(make_self_draft(target), 0.05)
    ends = [int(free[row, 18 + new_tokens + row]) for row in range(batch_size)]
    for stop in ({"max_new_tokens": new_tokens}, {"max_new_tokens": 40, "eos_token_id": ends}):
        expected = plain(without_pard(target), **prompts, **stop)

        got = plain(with_pard(target), **prompts, **stop, assistant_model=draft, assistant_tree_size=tree_size)

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
