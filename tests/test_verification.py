"""Small cases worked out by hand, and batched results against single rows."""

from device import torch

from pard_hf.generation.sampling import (
    count_emitted,
    count_matched,
    sample_with_noise,
    verify_greedy,
    verify_ratio_test,
    verify_sample_and_match,
)


def scores_of(tokens, vocab_size=10):
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab_size).float() * 20


def test_matched_tokens_are_a_prefix():
    drafted = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 9]])
    chosen = torch.tensor([[1, 2, 3, 4]] * 4)

    assert count_matched(drafted, chosen).tolist() == [3, 1, 0, 2]


def test_no_drafts_match_nothing():
    assert count_matched(torch.empty(2, 0, dtype=torch.long), torch.tensor([[4], [5]])).tolist() == [0, 0]


def test_greedy_emits_the_targets_choice_after_the_match():
    tokens, num_matched = verify_greedy(torch.tensor([[1, 2, 3], [1, 5, 3]]), scores_of([[1, 2, 3, 4], [1, 2, 3, 4]]))

    assert num_matched.tolist() == [3, 1]
    assert [row[: n + 1] for row, n in zip(tokens.tolist(), num_matched.tolist(), strict=True)] == [
        [1, 2, 3, 4],
        [1, 2],
    ]


def test_sample_with_noise_is_multinomial():
    """`torch.multinomial` of one draw is `argmax(p / e)` with one row of exponential noise."""
    for seed in range(50):
        scores = torch.randn(1, 30)
        torch.manual_seed(seed)
        expected = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        torch.manual_seed(seed)
        assert torch.equal(sample_with_noise(scores, torch.empty(1, 30).exponential_()), expected)


def test_batched_rows_equal_single_rows():
    drafted, scores, noise = torch.randint(0, 4, (16, 3)), torch.randn(16, 4, 4), torch.empty(16, 4, 4).exponential_()

    tokens, num_matched = verify_sample_and_match(drafted, scores, noise)

    for row in range(16):
        one = slice(row, row + 1)
        single, count = verify_sample_and_match(drafted[one], scores[one], noise[one])
        assert torch.equal(single, tokens[one])
        assert torch.equal(count, num_matched[one])


def test_ratio_test_accepts_everything_when_the_laws_are_equal():
    scores = torch.randn(200, 4, 6)
    drafted = torch.multinomial(scores[:, :-1].softmax(-1).flatten(0, 1), 1).view(200, 3)

    tokens, num_matched = verify_ratio_test(drafted, scores[:, :-1], scores)

    assert num_matched.tolist() == [3] * 200
    assert torch.equal(tokens[:, :3], drafted)


def test_ratio_test_accepts_nothing_when_the_laws_are_disjoint():
    drafted = torch.tensor([[1, 2]] * 50)

    tokens, num_matched = verify_ratio_test(drafted, scores_of([[1, 2]] * 50) * 9, scores_of([[3, 4, 5]] * 50) * 9)

    assert num_matched.tolist() == [0] * 50
    assert tokens[:, 0].tolist() == [3] * 50


def test_emitted_tokens_end_at_the_first_end_token_or_at_the_budget():
    tokens = torch.tensor([[4, 7, 5, 7], [4, 5, 6, 7], [7, 4, 5, 6], [4, 5, 6, 6], [4, 7, 5, 5]])
    num_matched = torch.tensor([3, 2, 3, 3, 0])
    remaining = torch.tensor([9, 9, 0, 2, 1])

    num_emitted, is_finished = count_emitted(tokens, num_matched, remaining, torch.tensor([7, 8]))

    assert num_emitted.tolist() == [2, 3, 0, 2, 1]
    assert is_finished.tolist() == [True, False, True, True, True]
    assert count_emitted(tokens, num_matched, remaining, None)[0].tolist() == [4, 3, 0, 2, 1]
