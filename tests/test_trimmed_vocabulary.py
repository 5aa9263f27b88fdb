"""Drafting over a part of the vocabulary: fewer proposals to choose from, the same text."""

import json

import pytest
from device import torch
from families import add_head, load_draft, make_draft, make_model, make_prompts, make_self_draft

from pard_hf import PardDraftModel, with_pard
from pard_hf.draft.vocabulary import head_of, kept_token_ids

KEPT = [3, 5, 8, 13, 21, 34, 55, 89]


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "gpt2"])
def test_kept_tokens_have_the_logits_they_had(family):
    draft = make_draft(make_model(family, seed=5))
    ids = make_prompts(2)["input_ids"]
    whole = draft.draft(ids)

    trimmed = draft.trim_vocabulary(KEPT).draft(ids)

    torch.testing.assert_close(trimmed[..., KEPT], whole[..., KEPT], atol=1e-5, rtol=1e-5)
    others = [token for token in range(100) if token not in KEPT]
    assert (trimmed[..., others] == -torch.inf).all()


def test_head_product_is_of_the_kept_rows():
    """Nothing but the kept rows is multiplied with."""
    draft = make_draft(make_model("llama", seed=5)).trim_vocabulary(KEPT)
    draft.get_output_embeddings().forward = None  # Would fail if it were called.

    assert head_of(draft, draft.trimmed_vocabulary.head)(torch.randn(2, 32)).shape == (2, len(KEPT))
    assert set(draft.draft(make_prompts(1)["input_ids"]).argmax(-1).flatten().tolist()) <= set(KEPT)


@pytest.mark.parametrize("tree_size", [0, 12])
@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_is_that_of_plain_generate(batch_size, has_head, tree_size):
    target, prompts = make_model("llama"), make_prompts(batch_size)
    expected = target.generate(**prompts, max_new_tokens=30, do_sample=False)
    draft = make_self_draft(target).trim_vocabulary(KEPT)
    if has_head:
        add_head(draft, 0.3)

    arguments = {"max_new_tokens": 30, "do_sample": False, "assistant_model": draft}
    got = with_pard(target).generate(**prompts, **arguments, assistant_tree_size=tree_size)

    assert torch.equal(got, expected)


def test_all_that_is_said_is_enough():
    """A draft that keeps what the target says loses nothing."""
    target, prompts = make_model("llama"), make_prompts(1)
    said = target.generate(**prompts, max_new_tokens=40, do_sample=False)[0, 18:].tolist()
    kwargs = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    stats = [
        with_pard(target).generate(**prompts, **kwargs, assistant_model=draft).stats
        for draft in (make_self_draft(target), make_self_draft(target).trim_vocabulary(set(said)))
    ]

    assert stats[1].acceptance_length >= stats[0].acceptance_length


def test_it_is_saved_beside_the_checkpoint(tmp_path):
    draft = make_draft(make_model("llama", seed=5))
    draft.save_pretrained(tmp_path / "whole")
    draft.trim_vocabulary(KEPT).save_pretrained(tmp_path / "trimmed")

    ids = make_prompts(1)["input_ids"]
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "trimmed" / name).read_bytes()
    loaded = load_draft(tmp_path / "trimmed")
    assert loaded.trimmed_vocabulary.token_ids.tolist() == KEPT
    assert torch.equal(loaded.draft(ids), draft.draft(ids))
    whole = PardDraftModel.from_pretrained(tmp_path / "trimmed", trimmed_vocabulary=False)
    assert whole.trimmed_vocabulary is None


def test_one_of_another_vocabulary_is_refused(tmp_path):
    make_draft(make_model("llama", seed=5)).trim_vocabulary(KEPT).save_pretrained(tmp_path)
    settings = tmp_path / "trimmed_vocabulary/config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "vocab_size": 128}))

    with pytest.raises(ValueError, match="trimmed vocabulary of 100 tokens, got one of 128"):
        PardDraftModel.from_pretrained(tmp_path)


def test_counts_choose_the_most_frequent(tmp_path):
    counts = tmp_path / "answers.jsonl.counts.json"
    counts.write_text(json.dumps({"token_counts": {"7": 5, "9": 50, "4": 5, "99": 70, "12": 1}}))

    assert kept_token_ids(counts, 100, mask_token_id=99, keep=3).tolist() == [4, 7, 9]
    assert kept_token_ids(str(counts), 100, mask_token_id=99).tolist() == [4, 7, 9, 12]


@pytest.mark.parametrize(
    ("kept", "keep", "message"),
    [([], None, "got none"), ([99], None, "got none"), ([3, 100], None, "got 100"), ([-1], None, "got -1"),
     ([3], 0, "keep")],
)  # fmt: skip
def test_bad_ids_are_refused(kept, keep, message):
    draft = make_draft(make_model("llama", seed=5))

    with pytest.raises(ValueError, match=message):
        draft.trim_vocabulary(kept, keep)

    assert draft.trimmed_vocabulary is None


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"token_counts": {"a": 1}}'])
def test_files_without_counts_are_refused(tmp_path, content):
    (tmp_path / "counts.json").write_text(content)

    with pytest.raises(ValueError, match="token_counts"):
        make_draft(make_model("llama", seed=5)).trim_vocabulary(tmp_path / "counts.json")
