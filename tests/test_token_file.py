"""Rows read from a file of tokens train as the rows that were written."""

import pytest
from device import torch
from test_packing import rows_of_lengths

from pard_hf.training.collator import DataCollatorForPard, pack_rows
from pard_hf.training.token_file import TokenFile, write_token_file

ROWS = rows_of_lengths([9, 4, 17, 2, 12])


@pytest.mark.parametrize("examples", [ROWS, pack_rows(ROWS, 20)], ids=["alone", "packed"])
def test_batches_are_those_of_the_written_rows(tmp_path, examples):
    write_token_file(examples, tmp_path / "rows")
    read = TokenFile(tmp_path / "rows")
    collator = DataCollatorForPard(99)

    assert len(read) == len(examples)
    for index, example in enumerate(examples):
        expected, got = (collator([one]) for one in (example, read[index]))
        assert all(torch.equal(expected[name], got[name]) for name in ("input_ids", "labels", "anchors", "starts"))
        assert expected["sources"] == got["sources"]
        assert ("text_lengths" in example) == ("text_lengths" in read[index])  # A teacher asks the first for it.
    assert (read.num_texts, read.num_tokens) == (len(ROWS), 44)


def test_indices_are_those_of_a_sequence(tmp_path):
    write_token_file(ROWS, tmp_path / "rows")
    read = TokenFile(tmp_path / "rows")

    assert read[-1] == read[len(ROWS) - 1]
    for index in (len(ROWS), -len(ROWS) - 1):
        with pytest.raises(IndexError, match=f"Expected an index of {len(ROWS)} examples"):
            read[index]


def test_a_broken_write_leaves_no_file(tmp_path):
    with pytest.raises(KeyError):
        write_token_file([{"input_ids": [1, 2]}], tmp_path / "rows")

    assert list(tmp_path.iterdir()) == []


def test_packing_from_a_file_is_packing(tmp_path):
    write_token_file(ROWS, tmp_path / "rows")

    packed = pack_rows(TokenFile(tmp_path / "rows"), 20)

    assert packed == pack_rows(ROWS, 20)
