"""What a teacher says of each token, stored with its answers, trains as the teacher itself does."""

import json

import numpy as np
import pytest
from device import torch
from families import make_model
from test_packing import rows_of_lengths

from pard_hf import PardDraftModel
from pard_hf.training.collator import DataCollatorForPard, pack_rows
from pard_hf.training.data import read_rows, tokenize_rows
from pard_hf.training.losses import DIVERGENCES, TopLogprobs
from pard_hf.training.objective import Objective
from pard_hf.training.responses import write_answers
from pard_hf.training.token_file import TokenFile, write_token_file
from pard_hf.training.top_logits import TopLogits, top_logits_of

ROWS = rows_of_lengths([9, 4, 17, 2, 12])


def top_of(logits: torch.Tensor, k: int) -> TopLogprobs:
    found = logits.log_softmax(-1).topk(k, -1)
    return TopLogprobs(found.indices, found.values)


@pytest.mark.parametrize("name", ["kd", "tv", "lk"])
def test_a_stored_distribution_is_the_whole_one_as_k_grows(name):
    """With all tokens it is exact; with fewer it is never farther, as the rest counts as one token."""
    logits, target = torch.randn(2, 50, 20, generator=torch.Generator().manual_seed(0)) * 3
    whole = DIVERGENCES[name](logits, target, 1.0)

    distances = [DIVERGENCES[name](logits, top_of(target, k), 1.0) for k in (1, 4, 12, 20)]

    torch.testing.assert_close(distances[-1], whole, atol=1e-4, rtol=1e-4)
    for nearer, farther in zip(distances, distances[1:], strict=False):
        assert (nearer <= farther + 1e-3).all()
    assert (distances[0] < whole - 1e-2).any()


def test_what_is_stored_are_the_probabilities_of_the_target(tiny_target, bundled_like_tokenizer, tmp_path):
    """At each token of each turn's answer, given all before it; padding of the vocabulary is left out."""
    tokenizer, out = bundled_like_tokenizer, tmp_path / "out.jsonl"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompts = [{"turns": ["ab", "cde"]}, {"prompt": "f"}]

    write_answers(tiny_target, tokenizer, prompts, out, max_new_tokens=6, top_logits=3, batch_size=2)

    for row in read_rows(out):
        [example] = tokenize_rows(tokenizer, [row], 200)
        ids, learned = torch.tensor([example["input_ids"]]), np.array(example["loss_mask"], dtype=bool)
        with torch.no_grad():
            logits = tiny_target(ids.to(tiny_target.device)).logits[0].cpu()
        logprobs = logits.log_softmax(-1)[:-1, : len(tokenizer)].topk(3, -1)
        expected = logprobs.indices[learned[1:]].numpy(), logprobs.values[learned[1:]].numpy()
        assert (example["top_ids"][learned] == expected[0]).all()
        assert (example["top_ids"][~learned] == -1).all()
        np.testing.assert_allclose(example["top_logprobs"][learned], expected[1], atol=5e-3, rtol=2e-3)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("objective", ["kd", "cat", "tv", "lk"])
def test_stored_logits_give_the_loss_and_gradients_of_the_target(objective, is_packed, tmp_path):
    target = make_model("llama", seed=1)
    draft = PardDraftModel.from_causal_lm(make_model("llama"), 99)
    rows = [with_top_logits(target, row) for row in ROWS]
    file = tmp_path / "rows"
    write_token_file(pack_rows(rows, 20) if is_packed else rows, file)
    batch = DataCollatorForPard(99, num_draft_tokens=4)(list(TokenFile(file)))
    batch = {name: values.to(draft.device) for name, values in batch.items() if name != "sources"}

    found = []
    for settings in ({"target": target}, {"is_stored": True}):
        draft.zero_grad()
        loss = Objective(objective, **settings)(draft, batch)
        loss.backward()
        found.append((loss.detach(), draft.base_model.layers[0].mlp.up_proj.weight.grad.clone()))

    torch.testing.assert_close(*found, atol=2e-3, rtol=5e-3)


def with_top_logits(target, row):
    """Store the whole distribution of a target at every token of a row but its first."""
    ids, size = list(row["input_ids"]), target.config.vocab_size
    [top] = top_logits_of(target, [ids[:1]], [ids[1:]], size, size)
    top_ids, top_logprobs = top.at([0] + [1] * (len(ids) - 1))
    return {**row, "top_ids": top_ids, "top_logprobs": top_logprobs}


def test_rows_with_other_teachers_are_refused(tmp_path):
    target = make_model("llama", seed=1)

    with pytest.raises(ValueError, match="of 100 tokens in all rows, as in the first, got 0"):
        write_token_file([with_top_logits(target, ROWS[0]), ROWS[1]], tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"top_logits": {"k": 2, "ids": "!"}}, "not those that `pard data` writes"),
        ({"top_logits": 3}, "not those that `pard data` writes"),
        ({"response_ids": [5, 6, 7]}, "of 2 tokens, its answers of 3"),
        ({"response_ids": None}, "no `response_ids`"),
    ],
)
def test_broken_teachers_are_named(bundled_like_tokenizer, tmp_path, change, problem):
    top = TopLogits(np.zeros((2, 2), "<i4"), np.zeros((2, 2), "<f2")).to_json()
    row = {"prompt": "a", "response": "bc", "response_ids": [5, 6], "top_logits": top, **change}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({name: value for name, value in row.items() if value is not None}))

    with pytest.raises(ValueError, match=problem):
        list(tokenize_rows(bundled_like_tokenizer, read_rows(file), 64))


def test_a_file_has_one_kind_of_rows(tiny_target, bundled_like_tokenizer, tmp_path):
    for before, now in ((2, 0), (0, 2)):
        out = tmp_path / f"{before}.jsonl"
        write_answers(tiny_target, bundled_like_tokenizer, [{"prompt": "a"}], out, max_new_tokens=2, top_logits=before)
        with pytest.raises(ValueError, match=f"`top_logits` was {before or None} and is {now or None}"):
            write_answers(
                tiny_target, bundled_like_tokenizer, [{"prompt": "b"}], out, max_new_tokens=2, top_logits=now
            )


def test_what_needs_the_whole_distribution_is_refused(tiny_target, bundled_like_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="temperature of 1 with stored"):
        Objective("kd", temperature=2.0, is_stored=True)
    with pytest.raises(ValueError, match="no `top_logits` with an endpoint"):
        write_answers(
            tiny_target,
            bundled_like_tokenizer,
            [{"prompt": "a"}],
            tmp_path / "o.jsonl",
            endpoint=object(),
            top_logits=2,
        )
