"""Which rows are kept, and that their packed forward is the inference forward."""

import pytest
import torch
from device import DEVICE, to_device
from torch.nn.attention.flex_attention import create_mask

from pard_hf.training import objective
from pard_hf.training.cod import attention_mask, build_rows, keep_rows
from pard_hf.training.collator import DataCollatorForPard, pack_rows

MASK = 99


def rows_of(is_label, **kwargs):
    settings = {"num_draft_tokens": 5, "retention_rate": 0.7, "min_retention_rate": 0.2, **kwargs}
    return keep_rows(torch.tensor(is_label, dtype=torch.bool), **settings)


@pytest.mark.parametrize("length", [2, 3, 7, 40])
@pytest.mark.parametrize("retention_rate", [0.3, 0.7, 1.0])
def test_kept_chains_are_complete(length, retention_rate):
    """A mask row can only be computed with every shallower row of its anchor."""
    kept = set(zip(*(t.tolist() for t in rows_of([1] * length, retention_rate=retention_rate)), strict=True))

    assert all((anchor, depth - 1) in kept for anchor, depth in kept if depth)
    assert all(anchor >= 0 and anchor + depth + 1 < length for anchor, depth in kept if depth)


def test_each_depth_keeps_its_share():
    anchors, depths = rows_of([1] * 101, num_draft_tokens=8)

    for depth in range(1, 8):
        whole = 101 - depth - 1
        assert (depths == depth).sum() == round(whole * max(0.7**depth, 0.2))
    assert (depths == 0).sum() == 101


def test_anchors_are_bounded():
    anchors, depths = rows_of([1] * 101, num_draft_tokens=8, max_anchors=30)

    assert len(set(anchors[depths > 0].tolist())) == 30
    for depth in range(1, 8):
        assert (depths == depth).sum() == min(round((101 - depth - 1) * max(0.7**depth, 0.2)), 30)
    assert (depths == 0).sum() == 101


def test_rows_that_attend_to_the_same_stand_together():
    """Blocks of 128 columns that no row of a block attends to are skipped; depth by depth, there are few."""
    length = 1024
    batch = DataCollatorForPard(MASK, multiple=128)([{"input_ids": list(range(length))}])
    anchors, depths, starts = (batch[name] for name in ("anchors", "depths", "starts"))
    by_depth = (depths * length + anchors + (depths < 1) * -length).argsort(-1)

    def attended(order):
        rows = [values.gather(1, order) for values in (anchors, depths, starts)]
        mask = attention_mask(*rows)[0]
        blocks = mask.unflatten(1, (-1, 128)).any(-1).unflatten(0, (-1, 128)).any(1)
        return blocks.float().mean().item()

    as_they_stand = torch.arange(anchors.shape[1])[None]
    assert attended(as_they_stand) < 0.75 * attended(by_depth)
    assert (depths[0, :length] == 0).all()


def test_nothing_is_dropped_at_rate_one():
    anchors, depths = rows_of([1] * 6, retention_rate=1.0)

    mask_rows = {(a, d) for a, d in zip(anchors.tolist(), depths.tolist(), strict=True) if d}
    assert mask_rows == {(a, d) for d in range(1, 5) for a in range(6) if a + d + 1 < 6}


def test_only_rows_with_context_and_a_wanted_token_are_labelled():
    """Prompt tokens (0) are read, never learned; the first anchor is the prompt's last token."""
    ids, is_label = torch.arange(10, 18), torch.tensor([0, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)

    anchors, depths = keep_rows(is_label, 4, 1.0, 1.0)
    rows = build_rows(ids, is_label, anchors, depths, MASK)

    got = {
        (a, d): label for a, d, label in zip(anchors.tolist(), depths.tolist(), rows["labels"].tolist(), strict=True)
    }
    learned = {row: label for row, label in got.items() if label != -100}
    assert learned == {
        (2, 0): 13, (3, 0): 14, (4, 0): 15, (6, 0): 17,
        (2, 1): 14, (3, 1): 15,
        (2, 2): 15,
    }  # fmt: skip
    assert all(a >= 2 for a, d in got if d)


def test_attention_mask_follows_the_definition():
    """Oracle written from the definition with plain loops, for odd sizes and padding rows."""
    anchors, depths = rows_of([0, 0] + [1] * 11, num_draft_tokens=4)
    anchors = torch.cat([anchors, torch.tensor([-1, -1])])
    depths = torch.cat([depths, torch.tensor([0, 0])])
    rows = list(zip(anchors.tolist(), depths.tolist(), strict=True))

    expected = [
        [(a < 0 and b < 0) or (a >= 0 and b >= 0 and ((e == 0 and b <= a) or (b == a and e <= d))) for b, e in rows]
        for a, d in rows
    ]

    assert torch.equal(attention_mask(anchors, depths), torch.tensor(expected))


def test_collated_batch_in_full():
    collator = DataCollatorForPard(MASK, num_draft_tokens=2, retention_rate=1.0)

    batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9], "loss_mask": [0, 1]}])

    assert batch["input_ids"].tolist() == [[5, 6, 7, MASK], [8, 9, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 1], [0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, -100, 7], [9, -100, -100, -100]]
    assert batch["anchors"].tolist() == [[0, 1, 2, 0], [0, 1, -1, -1]]
    assert batch["depths"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    mask = attention_mask(batch["anchors"], batch["depths"], batch["starts"])
    assert mask.any(-1).all()  # no row attends to nothing: that would be NaN


def test_end_token_is_learned_even_where_it_pads():
    batch = DataCollatorForPard(MASK, num_draft_tokens=1)([{"input_ids": [5, 2]}, {"input_ids": [5, 6, 7, 2]}])

    assert batch["labels"].tolist() == [[2, -100, -100, -100], [6, 7, 2, -100]]


def test_each_pass_drops_other_rows():
    collator = DataCollatorForPard(MASK)
    first = collator([{"input_ids": list(range(50))}])
    collator.epoch = 1

    assert not torch.equal(first["anchors"], collator([{"input_ids": list(range(50))}])["anchors"])


def test_what_a_text_keeps_is_its_own():
    """Whatever the batch: on more devices, or packed, a text keeps the same rows."""
    collator = DataCollatorForPard(MASK, num_draft_tokens=4)
    one, two = {"input_ids": list(range(20))}, {"input_ids": list(range(40, 71))}

    alone, both = collator([two]), collator([one, two])

    length = alone["anchors"].shape[1]
    assert torch.equal(alone["anchors"][0], both["anchors"][1, :length])
    assert (both["anchors"][1, length:] == -1).all()


def test_same_batch_drops_the_same_rows():
    """A resumed run must be the same run."""
    examples = [{"input_ids": list(range(50))}, {"input_ids": list(range(30, 60))}]
    collator = DataCollatorForPard(MASK, seed=3)

    first, again = collator(examples), collator(examples)
    other = DataCollatorForPard(MASK, seed=4)(examples)

    assert torch.equal(first["position_ids"], again["position_ids"])
    assert not torch.equal(first["position_ids"], other["position_ids"])


@pytest.mark.parametrize("example", [{"input_ids": [5]}, {"input_ids": [5, 6], "loss_mask": [1]}])
def test_unusable_example_is_refused(example):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        DataCollatorForPard(MASK)([example])


def test_packed_forward_is_the_inference_forward(tiny_draft):
    """At every kept row the packed training forward gives the logits that drafting gives there."""
    ids = torch.randint(3, 90, (1, 9)).to(DEVICE)
    anchors, depths = keep_rows(torch.tensor([0] + [1] * 8, dtype=torch.bool), 5, 1.0, 1.0)
    rows = build_rows(ids[0].cpu(), torch.ones(9, dtype=torch.bool), anchors, depths, tiny_draft.mask_token_id)
    rows = to_device({**rows, "mask": attention_mask(anchors, depths)})

    with torch.no_grad():
        packed = tiny_draft(
            input_ids=rows["input_ids"][None],
            position_ids=rows["position_ids"][None],
            attention_mask=rows["mask"][None, None],
        ).logits[0]

    for row, (anchor, depth) in enumerate(zip(anchors.tolist(), depths.tolist(), strict=True)):
        drafted = tiny_draft.draft(ids[:, : anchor + 1], num_assistant_tokens=depth + 1)[0, depth]
        expected = tiny_draft.proposal_scores(packed[row])
        torch.testing.assert_close(drafted, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(5, 2, 9), (1 + 6, 13), (3, 3, 3, 3)])
def test_packed_texts_do_not_attend_to_each_other(lengths):
    """Oracle from the definition: a row attends to what it attends to when its text is alone, and to nothing else."""
    collator = DataCollatorForPard(MASK, num_draft_tokens=4)
    texts = [torch.randint(3, 90, (length,)).tolist() for length in lengths]
    packed = collator([pack_rows([{"input_ids": t, "loss_mask": [1] * len(t)} for t in texts], sum(lengths))[0]])
    anchors, depths, starts = (packed[name][0].tolist() for name in ("anchors", "depths", "starts"))

    mask = attention_mask(packed["anchors"], packed["depths"], packed["starts"])[0]

    rows = list(zip(anchors, depths, starts, strict=True))
    expected = [[s == t and ((e == 0 and b <= a) or (b == a and e <= d)) for b, e, t in rows] for a, d, s in rows]
    assert torch.equal(mask, torch.tensor(expected))
    assert packed["position_ids"][0].tolist() == [a + d - s for a, d, s in rows]


def test_a_row_depends_only_on_what_it_attends_to(tiny_draft):
    """Changing a token changes exactly the rows that attend to it."""
    ids = torch.randint(3, 90, (13,)).tolist()
    collator = DataCollatorForPard(tiny_draft.mask_token_id, num_draft_tokens=4)
    lengths = [6, 7]
    example = {"input_ids": ids, "text_lengths": lengths}
    batch = to_device(collator([example]))
    mask = attention_mask(batch["anchors"], batch["depths"], batch["starts"])

    def hidden(input_ids):
        return tiny_draft.base_model(
            input_ids=input_ids, position_ids=batch["position_ids"], attention_mask=mask.unsqueeze(1)
        ).last_hidden_state[0]

    with torch.no_grad():
        before = hidden(batch["input_ids"])
        for column in range(13):
            changed = batch["input_ids"].clone()
            changed[0, column] = 95
            moved = (hidden(changed) - before).abs().amax(-1) > 1e-6
            assert torch.equal(moved, mask[0, :, column]), column


@pytest.mark.parametrize("length", [3, 9, 40])
def test_masks_for_kernels_are_the_rule(tiny_draft, length):
    """The additive mask, written in parts, and FlexAttention's rule say what `attention_mask` says."""
    texts = [{"input_ids": list(range(3, 3 + length)), "loss_mask": [1] * length} for _ in range(3)]
    collator = DataCollatorForPard(MASK, num_draft_tokens=4)
    batch = to_device(collator([pack_rows(texts, 3 * length)[0], {"input_ids": [5, 6, 7]}]))
    rows = (batch["anchors"], batch["depths"], batch["starts"])
    expected = attention_mask(*rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "MASK_CHUNK_SIZE", 7)
        additive = objective.row_mask(tiny_draft, *rows)
    blocks = objective.block_mask(*rows)

    assert torch.equal(additive[:, 0] == 0, expected)
    assert (additive[:, 0][~expected] == torch.finfo(torch.float32).min).all()
    shape = expected.shape
    assert torch.equal(create_mask(blocks.mask_mod, shape[0], 1, *shape[1:], device=DEVICE)[:, 0], expected)
