"""Acceptance is counted alike by the decoding loop and by replaying its texts."""

import pytest
from device import to_device, torch
from families import make_draft, make_model

from benchmarks.replay import autoregressive, next_token_accuracy, replay
from pard_hf.evaluation.acceptance import AcceptanceEvaluator

PROMPTS = [[1, 5, 9], [1, 7], [1, 30, 31, 32, 33], [1, 60, 61]]


@pytest.fixture
def pair():
    """A draft that is right now and then: the target itself, with some noise."""
    target = make_model("llama")
    target.generation_config.eos_token_id = [5, 40, 41]
    draft = make_draft(make_model("llama"))
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return target, draft


def test_replay_counts_what_the_loop_counts(pair):
    target, draft = pair
    evaluator = AcceptanceEvaluator(target, {"some": PROMPTS}, 4, max_new_tokens=25, batch_size=1)
    [stats] = evaluator(draft).values()

    def propose(batch):
        return draft.draft(**to_device(batch), num_assistant_tokens=4).argmax(-1)

    counted = replay(propose, PROMPTS, evaluator.texts["some"], batch_size=3)

    assert stats.num_accepted > 0
    assert counted.histogram == stats.histogram
    assert counted.num_tokens == sum(map(len, evaluator.texts["some"]))


def test_a_model_that_is_the_target_is_always_right(pair):
    target, _ = pair
    answers = [
        target.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=17)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]

    stats = replay(autoregressive(target, 3), PROMPTS, answers)

    assert stats.num_accepted == stats.num_drafted


def test_next_token_accuracy_is_counted_by_hand(pair):
    target, _ = pair
    prompts, answers = [[1, 5, 9], [1, 7], [1, 8, 8, 8]], [[30], [7, 7, 7, 8, 9, 10], []]

    def right(text, end):
        return int(target(torch.tensor([text[:end]])).logits[0, -1].argmax()) == text[end]

    of_prompts = [right(prompt, end) for prompt in prompts for end in range(1, len(prompt))]
    of_answers = [
        right(prompt + answer, len(prompt) + position)
        for prompt, answer in zip(prompts, answers, strict=True)
        for position in range(len(answer))
    ]

    found = next_token_accuracy(target, prompts, answers)

    assert found == pytest.approx((sum(of_prompts) / len(of_prompts), sum(of_answers) / len(of_answers)))


def test_shares_of_processes_are_all_prompts(pair):
    target, draft = pair
    evaluator = AcceptanceEvaluator(target, {"some": PROMPTS}, 4, max_new_tokens=25)
    whole = evaluator(draft)["some"]

    assert evaluator(draft, (0, 2))["some"] + evaluator(draft, (1, 2))["some"] == whole
    assert type(target).__mro__[1].__name__ != "PardGenerationMixin"  # left as it was
