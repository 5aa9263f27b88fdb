"""The formulas, by hand."""

from pard_hf import DecodingStats


def test_formulas():
    stats = DecodingStats(histogram=(2, 1, 0, 1), num_drafted=12)

    assert stats.num_rounds == 4
    assert stats.num_accepted == 4
    assert stats.num_tokens == 8
    assert stats.acceptance_length == 2.0
    assert stats.acceptance_rate == 4 / 12
    assert stats.position_acceptance == (0.5, 0.25, 0.25)


def test_merging_is_addition():
    merged = DecodingStats((1, 2), 6) + DecodingStats((0, 1, 5), 24) + DecodingStats()

    assert merged == DecodingStats((1, 3, 5), 30)
    assert merged.record(num_accepted=3, num_drafted=4) == DecodingStats((1, 3, 5, 1), 34)


def test_nothing_ran():
    assert DecodingStats().acceptance_length == 0.0
    assert DecodingStats().acceptance_rate == 0.0
    assert DecodingStats().position_acceptance == ()
