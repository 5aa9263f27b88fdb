"""Packed rows: nothing lost, nothing cut, little room wasted, and the same loss."""

import random

import pytest
from device import to_device, torch
from families import make_model

from pard_hf import PardDraftModel
from pard_hf.training.collator import DataCollatorForPard, pack_rows
from pard_hf.training.objective import Objective


def rows_of_lengths(lengths, seed=0):
    source = random.Random(seed)
    return [
        {
            "input_ids": [source.randrange(3, 90) for _ in range(length)],
            "loss_mask": [0, *(int(source.random() < 0.8) for _ in range(length - 2)), 1],
            "source": f"row {number}",
        }
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("length", [16, 40, 64])
def test_every_row_is_in_one_sequence(length):
    rows = rows_of_lengths([random.Random(1).randrange(2, 41) for _ in range(50)] + [41])

    packed = pack_rows(rows, length)

    texts = []
    for sequence in packed:
        assert len(sequence["input_ids"]) == len(sequence["loss_mask"]) == sum(sequence["text_lengths"])
        assert len(sequence["input_ids"]) <= length or len(sequence["text_lengths"]) == 1
        ids = iter(sequence["input_ids"])
        texts += [[next(ids) for _ in range(size)] for size in sequence["text_lengths"]]
    assert sorted(texts) == sorted(row["input_ids"] for row in rows)
    assert sorted(name for sequence in packed for name in sequence["source"].split("; ")) == sorted(
        row["source"] for row in rows
    )


def test_little_room_is_left():
    rows = rows_of_lengths([random.Random(2).randrange(2, 200) for _ in range(400)])

    packed = pack_rows(rows, 512)

    assert sum(len(row["input_ids"]) for row in rows) > 0.97 * 512 * (len(packed) - 1)


@pytest.mark.parametrize("length", [24, 64])
@pytest.mark.parametrize("name", ["ce", "kd", "cat"])
def test_packed_loss_is_the_unpacked_loss(name, length):
    """Also where the sequences of a batch hold different numbers of tokens."""
    draft = PardDraftModel.from_causal_lm(make_model("llama", initializer_range=0.2), 99, 5)
    target = make_model("llama", seed=3, hidden_size=48)
    objective = Objective(name, target=target)
    collator = DataCollatorForPard(99, num_draft_tokens=4)
    rows = rows_of_lengths([9, 5, 14, 2, 8, 7])
    packed = pack_rows(rows, length)
    assert len({len(sequence["input_ids"]) for sequence in packed}) == len(packed)
    losses, gradients = [], []
    for examples in (rows, packed):
        draft.zero_grad()
        loss = draft(objective=objective, batch=to_device(collator(examples)))
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad.clone() for n, p in draft.named_parameters()})

    torch.testing.assert_close(losses[0], losses[1])
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, atol=1e-5, rtol=1e-4, msg=parameter)
