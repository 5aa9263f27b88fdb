"""Sampling: the very tokens of plain `generate` under the same seed, and its distribution for batches."""

import pytest
from device import torch
from families import add_head, make_draft, make_model, make_prompts, make_scripted_draft, make_self_draft, texts_of

from pard_hf import AssistantMemory, PardDraftModel, with_pard, without_pard

WARPERS = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1, "temperature": 1.5},
    {"typical_p": 0.8, "epsilon_cutoff": 1e-3},
    {"repetition_penalty": 1.3, "temperature": 0.8},
]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("arguments", WARPERS, ids=str)
def test_same_seed_same_tokens(arguments, family):
    """Noise is drawn in the order plain `generate` draws it, whatever the draft proposes."""
    target, prompts = make_model(family), make_prompts(1)
    arguments = {"max_new_tokens": 30, "do_sample": True, **arguments}
    for seed in range(3):
        torch.manual_seed(seed)
        expected = without_pard(target).generate(**prompts, **arguments)
        script = texts_of(expected, prompts["attention_mask"])
        drafts = [make_self_draft(target), make_scripted_draft(script, 5), make_scripted_draft(script, 2)]
        for draft in drafts:
            torch.manual_seed(seed)
            got = with_pard(target).generate(**prompts, **arguments, assistant_model=draft)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("tree_size", [0, 4, 24])
@pytest.mark.parametrize("arguments", WARPERS, ids=str)
def test_same_seed_same_tokens_with_trees_and_heads(arguments, tree_size, family):
    """All nodes of a depth share their noise, so the path that is taken has that of plain `generate`."""
    target, prompts = make_model(family), make_prompts(1)
    arguments = {"max_new_tokens": 30, "do_sample": True, **arguments}
    for seed in range(2):
        torch.manual_seed(seed)
        expected = without_pard(target).generate(**prompts, **arguments)
        state = torch.get_rng_state()
        for draft in (make_self_draft(target), add_head(make_self_draft(target), 0.5)):
            torch.manual_seed(seed)
            got = with_pard(target).generate(
                **prompts, **arguments, assistant_model=draft, assistant_tree_size=tree_size
            )
            assert torch.equal(got, expected)
            assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arguments", [{}, WARPERS[1], WARPERS[3], WARPERS[-1]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_same_seed_same_tokens_with_text_sources(arguments, family):
    """Copied, remembered, and beside drafts: the text, and the generator, of plain `generate`."""
    target, prompts = make_model(family), make_prompts(1)
    arguments, memory = {"max_new_tokens": 20, "do_sample": True, **arguments}, AssistantMemory(target)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = without_pard(target).generate(**prompts, **arguments)
        state = torch.get_rng_state()
        for sources in (
            {"prompt_lookup_num_tokens": 5},
            {"prompt_lookup_num_tokens": 4, "assistant_memory": memory},
            {"assistant_memory": memory, "assistant_reference_texts": expected},
            {"prompt_lookup_num_tokens": 3, "assistant_model": add_head(make_self_draft(target), 0.5)},
        ):
            torch.manual_seed(seed)
            got = with_pard(target).generate(**prompts, **arguments, **sources, return_dict_in_generate=True)
            assert torch.equal(got.sequences, expected)
            assert torch.equal(torch.get_rng_state(), state)
            if "assistant_reference_texts" in sources:
                assert got.stats.num_accepted > 10


@pytest.mark.parametrize("tree_size", [0, 16])
def test_same_seed_same_batch_in_lockstep_with_trees(tree_size):
    target, prompts = make_model("llama"), make_prompts(3)
    draft = add_head(make_self_draft(target), 0.3)
    arguments = {"max_new_tokens": 20, "do_sample": True, "repetition_penalty": 1.2, "eos_token_id": [3, 4, 5, 6]}
    torch.manual_seed(0)
    expected = target.generate(**prompts, **arguments)

    for sources in ({}, {"prompt_lookup_num_tokens": 4, "assistant_reference_texts": expected}):
        torch.manual_seed(0)
        got = with_pard(target).generate(
            **prompts, **arguments, **sources, assistant_model=draft, assistant_tree_size=tree_size
        )
        assert torch.equal(got, expected)


def test_same_seed_same_batch_in_lockstep():
    """With a processor that looks at the prefix even a batch draws as plain `generate` does."""
    target, prompts = make_model("llama"), make_prompts(3)
    draft = make_self_draft(target)
    arguments = {
        "max_new_tokens": 20,
        "do_sample": True,
        "repetition_penalty": 1.2,
        "eos_token_id": list(range(3, 12)),
    }
    torch.manual_seed(0)
    expected = target.generate(**prompts, **arguments)

    torch.manual_seed(0)
    got = with_pard(target).generate(**prompts, **arguments, assistant_model=draft)

    assert torch.equal(got, expected)


SMALL = {"vocab_size": 6, "initializer_range": 0.6}


def joint_law(target, prompt, temperature):
    """Exact probabilities of all `V ** 3` continuations of three tokens."""
    tokens = torch.cartesian_prod(*[torch.arange(target.config.vocab_size)] * 3)
    sequences = torch.cat([prompt.expand(len(tokens), -1), tokens], dim=1)
    with torch.no_grad():
        logits = target(sequences).logits[:, prompt.shape[1] - 1 : -1] / temperature
    return logits.softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1).prod(-1).double()


@pytest.mark.parametrize("tier", [1, 2])
@pytest.mark.parametrize("verification", ["sample_and_match", "ratio_test", "text sources"])
@pytest.mark.parametrize("draft_seed", [None, 8])
def test_distribution_is_that_of_plain_sampling(tier, verification, draft_seed):
    """Chi-square over the joint law of three tokens; a right implementation fails one seed in 10,000."""
    if tier == 1 and verification != "sample_and_match":
        pytest.skip("the stock loop has its own test")
    stats = pytest.importorskip("scipy.stats")
    # The stock loop takes one text at a time, and fewer cells need fewer of them.
    vocab_size = 4 if tier == 1 else 6
    small = {**SMALL, "vocab_size": vocab_size}
    temperature, prompt = 0.9, torch.tensor([[3, 1, 2]])
    target = make_model("llama", **small)
    draft = make_small_draft(make_model("llama", seed=draft_seed or 0, **small))
    law = joint_law(target, prompt, temperature)
    arguments = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": 3}
    torch.manual_seed(11)

    if tier == 1:
        runs = [target.generate(prompt, **arguments, assistant_model=draft) for _ in range(450)]
    else:
        with_pard(target)
        more = {"verification": verification, "assistant_model": draft}
        if verification == "text sources":  # Rows copy from what others drew, and learn from it.
            texts = torch.cartesian_prod(*[torch.arange(vocab_size)] * 2)
            more = {"assistant_memory": AssistantMemory(target), "assistant_reference_texts": texts}
            more |= {"assistant_tree_size": 4} if draft_seed is None else {"assistant_model": draft}
        runs = [target.generate(prompt.expand(500, -1), **arguments, **more) for _ in range(20)]

    samples = torch.cat(runs)[:, 3:]
    cells = (samples * torch.tensor([vocab_size**2, vocab_size, 1])).sum(-1)
    counts = torch.bincount(cells, minlength=vocab_size**3).double()
    expected = law * len(samples)
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < stats.chi2.ppf(1 - 1e-4, df=len(counts) - 1)


def make_small_draft(model):
    return PardDraftModel.from_causal_lm(model, mask_token_id=model.config.vocab_size - 1, num_assistant_tokens=2)


def test_draft_processors_shape_proposals_only():
    """Tier 1 hands the target's processors to the draft; the text stays that of plain sampling's law."""
    target, prompts = make_model("llama"), make_prompts(1)
    draft = make_draft(make_model("llama", seed=2))

    got = target.generate(**prompts, do_sample=True, top_k=5, max_new_tokens=12, assistant_model=draft)

    assert got.shape == (1, 30)


def test_generator_is_left_where_plain_generate_leaves_it():
    """A second sampled call after the first goes on with the same noise."""
    target, prompts = make_model("llama"), make_prompts(1)
    draft = make_self_draft(target)
    runs = []
    for arguments in ({}, {"assistant_model": draft}):
        target = with_pard(target) if arguments else without_pard(target)
        torch.manual_seed(0)
        runs.append(
            [
                target.generate(
                    **prompts, do_sample=True, eos_token_id=list(range(3, 9)), max_new_tokens=20, **arguments
                )
                for _ in range(3)
            ]
        )

    assert all(torch.equal(plain, ours) for plain, ours in zip(*runs, strict=True))
