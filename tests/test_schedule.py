"""The adaptive schedule finds the best K from costs and acceptance alone, and never changes a text."""

import pytest
from device import torch
from families import add_head, make_decoder, make_draft, make_model, make_prompts, make_self_draft

from pard_hf import with_pard
from pard_hf.generation.schedule import COUNTS, Choice, RoundCosts, Schedule, check_schedule


def simulate(cost, share, most=16, rounds=400, batch_size=1):
    """Run a schedule on a machine where a round of K takes `cost(K)` and each position is accepted with `share`."""
    generator = torch.Generator().manual_seed(0)
    schedule, seconds, tokens, chosen = Schedule(most, costs=RoundCosts()), 0.0, 0, []
    for _ in range(rounds):
        choice = schedule.choose(batch_size)
        count, accepted = choice.num_drafts, 0
        while accepted < count and torch.rand(1, generator=generator).item() < share:
            accepted += 1
        schedule.record(batch_size, choice, cost(count), [accepted])
        seconds, tokens = seconds + cost(count), tokens + accepted + 1
        chosen.append(count)
    return tokens / seconds, chosen


def best_rate(cost, share, most=16):
    return max(sum(share**i for i in range(count + 1)) / cost(count) for count in COUNTS if count <= most)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("slope", [0.0, 0.05, 0.5])
def test_rate_comes_close_to_the_best(slope, share):
    def cost(count):
        return 1.0 + (0.2 + slope * count if count else 0.0)

    rate, _ = simulate(cost, share)

    assert rate >= 0.88 * best_rate(cost, share)


def test_useless_draft_is_left_alone():
    """Nothing is ever accepted: plain decoding, but for the rounds that find this out."""
    rate, chosen = simulate(lambda count: 1.0 + 0.25 * count, share=0.0)

    assert rate > 0.9
    assert chosen[-40:].count(0) >= 38


def test_costs_are_those_of_the_batch_size():
    costs = RoundCosts()
    for batch_size, slope in ((1, 0.01), (16, 2.0)):
        for count in (8, 0):
            for _ in range(4):
                costs.add_seconds(batch_size, Choice(count), 1.0 + slope * count)
    for _ in range(50):
        costs.add_accepted(Choice(8), 3)

    assert Schedule(8, costs=costs).choose(1) == Choice(4)  # All that is ever accepted, at the least cost.
    assert Schedule(8, costs=costs).choose(16) == Choice(0)


def test_unmeasured_counts_lie_on_a_line():
    costs = RoundCosts()
    for count, seconds in ((0, 1.0), (8, 3.0)):
        for _ in range(3):
            costs.add_seconds(1, Choice(count), seconds)

    assert costs.cost(1, Choice(4)) == pytest.approx(2.0)
    assert costs.cost(1, Choice(16)) == pytest.approx(5.0)
    assert costs.cost(2, Choice(4)) is None


def test_busy_moment_is_forgotten():
    """Rounds that were slow because of others do not keep a good count from being chosen for ever."""
    costs = RoundCosts()
    for count, seconds in ((8, 30.0), (0, 1.0)):
        for _ in range(9):
            costs.add_seconds(1, Choice(count), seconds)
    for _ in range(50):
        costs.add_accepted(Choice(8), 7)
    schedule, chosen = Schedule(8, costs=costs), []

    for _ in range(1000):
        choice = schedule.choose(1)
        count = choice.num_drafts
        chosen.append(count)
        schedule.record(1, choice, 1.0 + 0.1 * count, [min(count, 7)])

    assert chosen[:40].count(0) >= 38
    assert chosen[-100:].count(8) >= 90


def test_acceptance_is_that_of_the_rounds():
    costs = RoundCosts()
    for _ in range(400):
        costs.add_accepted(Choice(4), 2)

    assert costs.tokens(Choice(4)) == pytest.approx(3.0, abs=0.1)
    assert costs.tokens(Choice(0)) == 1.0


def simulate_trees(cost, tokens, most=64, rounds=600):
    """As `simulate`, where a tree of N nodes accepts `tokens(N)` on average."""
    generator = torch.Generator().manual_seed(0)
    schedule, seconds, said, chosen = Schedule(8, most, RoundCosts()), 0.0, 0, []
    for _ in range(rounds):
        choice = schedule.choose(1)
        mean = tokens(choice.tree_size) if choice.num_drafts else 0.0
        accepted = min(int(mean + torch.rand(1, generator=generator).item()), choice.num_drafts)
        schedule.record(1, choice, cost(choice.num_proposals), [accepted])
        seconds, said = seconds + cost(choice.num_proposals), said + accepted + 1
        chosen.append(choice)
    return said / seconds, chosen


@pytest.mark.parametrize(
    ("slope", "expected"),
    [(0.001, {32, 64}), (0.03, {4, 8, 16}), (0.8, {0})],
)
def test_tree_grows_as_far_as_rows_are_cheap(slope, expected):
    """Each doubling of the tree is worth less; what a row costs decides how far it pays."""

    def cost(num_rows):
        return 1.0 + (0.2 + slope * num_rows if num_rows else 0.0)

    def tokens(size):
        return 2.0 if size == 0 else {4: 1.8, 8: 2.5, 16: 3.0, 32: 3.4, 64: 3.8}[size]

    rate, chosen = simulate_trees(cost, tokens)

    sizes = [choice.tree_size for choice in chosen[-100:]]
    assert sum(size in expected for size in sizes) >= 80
    options = [(1.0, 0)] + [(1 + tokens(size), size or count) for size in (0, 4, 8, 16, 32, 64) for count in (8,)]
    assert rate >= 0.85 * max(said / cost(rows) for said, rows in options)


def test_trees_that_were_not_tried_lie_between_those_that_were():
    costs = RoundCosts()
    for _ in range(200):
        costs.add_accepted(Choice(8), 2)
        costs.add_accepted(Choice(8, 64), 6)

    lengths = [costs.tokens(Choice(8, size)) for size in (0, 4, 8, 16, 32, 64)]

    assert lengths == sorted(lengths)
    assert lengths[0] == pytest.approx(3.0, abs=0.1)
    assert lengths[-1] == pytest.approx(7.0, abs=0.1)


def test_exploring_compiles_nothing():
    """What promises most may have to be compiled; what is only explored is not."""
    costs = RoundCosts()
    schedule, chosen = Schedule(16, 64, costs), []
    for _ in range(600):
        choice = schedule.choose(1, lambda choice: choice in chosen)
        chosen.append(choice)
        schedule.record(1, choice, 1.0 + 0.001 * choice.num_proposals, [min(choice.num_drafts, 6)])

    assert len(set(chosen)) <= 6
    ends = {Choice(16, 64), Choice(16), Choice(0)}
    assert ends <= set(chosen)


def test_constant_stays():
    assert {Schedule(5).choose(size) for size in (1, 4)} == {Choice(5)}


@pytest.mark.parametrize(("name", "count", "message"), [("often", 8, "one of"), ("adaptive", 5, "adaptive schedule")])
def test_bad_schedules_are_refused(name, count, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(name, count)
    target, draft = make_model("llama"), make_draft(make_model("llama", seed=5))
    with pytest.raises(ValueError, match=message):
        with_pard(target).generate(
            **make_prompts(1), assistant_model=draft, num_assistant_tokens=count, num_assistant_tokens_schedule=name
        )


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("quality", "most", "tree_size"), [("self", 12, 0), ("random", 12, 0), ("headed", 8, 32)])
def test_adaptive_text_is_that_of_plain_generate(batch_size, quality, most, tree_size):
    """Choices change from round to round and plain rounds come between; the draft catches up each time."""
    target, prompts = make_model("llama"), make_prompts(batch_size)
    draft = {
        "self": lambda: make_self_draft(target),
        "random": lambda: make_draft(make_model("llama", seed=5)),
        "headed": lambda: add_head(make_self_draft(target), 0.3),
    }[quality]()
    expected = target.generate(**prompts, max_new_tokens=80, do_sample=False)

    for _ in range(3):
        output = with_pard(target).generate(
            **prompts,
            max_new_tokens=80,
            do_sample=False,
            assistant_model=draft,
            num_assistant_tokens=most,
            assistant_tree_size=tree_size,
            num_assistant_tokens_schedule="adaptive",
            return_dict_in_generate=True,
        )
        assert torch.equal(output.sequences, expected)
    assert output.stats.num_tokens == batch_size * 80


def test_plain_rounds_do_not_spoil_the_draft():
    """After rounds without the draft, a perfect one is as right as before."""
    target, prompts = make_model("llama"), make_prompts(1)
    draft = make_self_draft(target)

    class Alternating(Schedule):
        count = 0

        def choose(self, batch_size, is_ready):
            self.count += 1
            return Choice(0 if self.count % 3 else 1)

    decoder = make_decoder(target, draft, prompts, 60, num_assistant_tokens=1, schedule=Alternating(1))
    with torch.no_grad():
        decoder.run()

    # Every round with a draft accepts its one proposal, for the draft is the target itself.
    assert decoder.stats.num_drafted == decoder.stats.num_accepted > 10
