"""Losses in chunks are the losses of the whole, and each is what its definition says."""

import math

import pytest
from device import DEVICE, IS_FAKE, to_device, torch
from families import make_model

from pard_hf import PardDraftModel
from pard_hf.draft.vocabulary import check_head
from pard_hf.training import losses
from pard_hf.training.collator import DataCollatorForPard
from pard_hf.training.losses import confidence_weights, divergence, negative_log_acceptance, row_loss, total_variation
from pard_hf.training.objective import Objective

EXAMPLES = [{"input_ids": list(range(3, 20)), "loss_mask": [0] * 5 + [1] * 12}, {"input_ids": [40, 7, 9, 33, 2]}]


@pytest.fixture
def pair():
    draft = PardDraftModel.from_causal_lm(make_model("llama", initializer_range=0.2), 99, 5)
    return draft, make_model("llama", seed=3, hidden_size=48, initializer_range=0.2)


def set_chunk_size(monkeypatch, size):
    for name in ("CHUNK_SIZE", "CUDA_CHUNK_SIZE"):
        monkeypatch.setattr(losses, name, size)


def test_weights_are_products_of_gold_probabilities():
    """By hand: row (a, d) is reached when tokens a+1 … a+d are all said."""
    probabilities = torch.tensor([0.9, 0.5, 0.25, 0.8, 0.1])
    anchors, depths = torch.tensor([0, 0, 1, 2, -1]), torch.tensor([0, 2, 3, 1, 0])

    weights = confidence_weights(probabilities.log(), anchors, depths)

    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5 * 0.25, 0.25 * 0.8 * 0.1, 0.8, 1.0]))


def test_weights_keep_small_differences_of_long_texts():
    logprobs = torch.full((8192,), -9.0)
    logprobs[-3:] = -0.001

    weights = confidence_weights(logprobs, torch.tensor([8188]), torch.tensor([3]))

    torch.testing.assert_close(weights, torch.tensor([0.997004]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_divergence_is_the_definition(temperature):
    draft, target = torch.randn(7, 11), torch.randn(7, 13)

    p, q = (x[:, :11].div(temperature).softmax(-1) for x in (target, draft))
    by_hand = (p * (p / q).log()).sum(-1) * temperature**2

    torch.testing.assert_close(divergence(draft, target, temperature), by_hand)
    assert (divergence(draft, draft) < 1e-6).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_variation_and_acceptance_are_the_definitions(temperature):
    draft, target = torch.randn(7, 11), torch.randn(7, 13)

    p, q = (x[:, :11].div(temperature).softmax(-1) for x in (target, draft))
    acceptance = torch.minimum(p, q).sum(-1)

    torch.testing.assert_close(total_variation(draft, target, temperature), 1 - acceptance)
    torch.testing.assert_close(negative_log_acceptance(draft, target, temperature), -acceptance.log())


def test_each_loss_is_least_where_it_says():
    """Of all mixtures of two fixed distributions, each loss likes best the one that its definition likes best."""
    torch.manual_seed(0)
    target, one, other = (torch.randn(1, 9).mul(2) for _ in range(3))
    p = target.softmax(-1)
    mixed = torch.stack([(one.softmax(-1) * w + other.softmax(-1) * (1 - w)).log() for w in torch.linspace(0, 1, 101)])
    accepted = torch.minimum(p, mixed.exp()).sum(-1).flatten()

    least = {
        loss: int(loss(mixed, target).argmin()) for loss in (divergence, total_variation, negative_log_acceptance)
    }

    assert least[total_variation] == least[negative_log_acceptance] == int(accepted.argmax())
    assert accepted[least[divergence]] < accepted.max()  # Else the three were the same.


@pytest.mark.parametrize("loss", [divergence, total_variation, negative_log_acceptance])
def test_free_logits_learn_the_distribution(loss):
    torch.manual_seed(0)
    target, logits = torch.randn(5, 8), torch.zeros(5, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        loss(logits, target).sum().backward()
        optimizer.step()

    assert torch.minimum(target.softmax(-1), logits.softmax(-1)).sum(-1).min() > 0.97


@pytest.mark.parametrize("chunk_size", [1, 300, 10**6])
def test_chunks_are_the_whole(monkeypatch, chunk_size):
    """Values and gradients, for chunks of one row, of some, and one of all."""
    head, target_head = (torch.nn.Linear(size, 50, bias=False).to(DEVICE) for size in (8, 6))
    hidden, target_hidden = torch.randn(23, 8, requires_grad=True), torch.randn(9, 6)
    labels, index, weights = torch.randint(0, 50, (23,)), torch.randint(0, 9, (23,)), torch.rand(23)
    logits = head(hidden)
    cross_entropy = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
    kl = (divergence(logits, target_head(target_hidden)[index]) * weights).sum()
    expected = torch.autograd.grad(3 * (0.5 * cross_entropy + 2.0 * kl), [hidden, head.weight])

    set_chunk_size(monkeypatch, chunk_size)
    loss_weights = (0.5, 2.0)
    total = row_loss(head, hidden, labels, 50, [head.weight], weights, target_head, target_hidden, index, loss_weights)
    got = torch.autograd.grad(3 * total, [hidden, head.weight])

    torch.testing.assert_close(total, 0.5 * cross_entropy + 2.0 * kl)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(IS_FAKE, reason="torch has no autocast for a device that is not there")
def test_gradients_of_many_chunks_are_as_near_as_of_one(monkeypatch):
    """Under autocast each chunk's gradient is rounded once; their sum, for a head or tied embeddings, is not."""
    head = torch.nn.Linear(32, 100, bias=False).to(DEVICE)
    hidden, labels = torch.randn(512, 32), torch.randint(0, 100, (512,))

    def gradient_of(chunk_size, dtype=None):
        set_chunk_size(monkeypatch, chunk_size)
        with torch.autocast(DEVICE.type, dtype or torch.bfloat16, enabled=dtype is None):
            loss = row_loss(head, hidden, labels, 100, [head.weight])
        return torch.autograd.grad(loss, head.weight)[0]

    exact = gradient_of(10**6, torch.float32)
    one, many = ((gradient_of(size) - exact).norm() / exact.norm() for size in (10**6, 200))
    assert many < 1.5 * one < 0.005


def test_logits_of_all_rows_never_exist(monkeypatch, pair):
    draft, target = pair
    set_chunk_size(monkeypatch, 400)
    sizes = []
    for model in pair:
        model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))

    Objective("cat", target=target)(draft, to_device(DataCollatorForPard(99)(EXAMPLES))).backward()

    assert max(sizes) <= 400 < sum(sizes)


@pytest.mark.parametrize(
    ("name", "decay"),
    [("ce", None), ("kd", None), ("cat", None), ("tv", None), ("lk", None), ("ce", 2.0), ("tv", 4.0)],
)
def test_objective_is_its_formula(pair, name, decay):
    """One row at a time, by the models' own forwards: no packing, no chunks, no shared teacher."""
    draft, target = pair
    collator = DataCollatorForPard(99, num_draft_tokens=4)
    objective = Objective(name, target=target, depth_decay=decay)
    loss = draft(objective=objective, batch=to_device(collator(EXAMPLES)))

    total, num_labels = 0.0, 0
    for example in EXAMPLES:
        rows = collator([example])
        ids = torch.tensor([example["input_ids"]])
        p = target(ids).logits[0].log_softmax(-1)
        for anchor, depth, label in zip(*(rows[n][0].tolist() for n in ("anchors", "depths", "labels")), strict=True):
            if label == -100:
                continue
            num_labels += 1
            read = torch.cat([ids[:, : anchor + 1], torch.full((1, depth), 99)], dim=1)
            q = draft(read).logits[0, -1].log_softmax(-1)
            ce, kl = -q[label], (p[anchor + depth].exp() * (p[anchor + depth] - q)).sum()
            accepted = torch.minimum(p[anchor + depth].exp(), q.exp()).sum()
            taught = {"tv": 0.1 * ce + 0.9 * (1 - accepted), "lk": 0.1 * ce - accepted.log()}
            said = [p[i - 1, ids[0, i]] for i in range(anchor + 1, anchor + depth + 1)]
            weight = torch.stack(said).sum().exp() if said and name == "cat" else 1.0
            weight = weight * (1.0 if decay is None else math.exp(-depth / decay))
            total = total + weight * (ce if name == "ce" else taught.get(name, 0.1 * ce + kl))

    torch.testing.assert_close(loss, total / num_labels, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ce", "kd", "cat", "tv", "lk"])
def test_batches_of_a_step_add_up(pair, name):
    draft, target = pair
    objective, collator = Objective(name, target=target), DataCollatorForPard(99)
    whole = to_device(collator(EXAMPLES))
    num_items = (whole["labels"] != -100).sum()

    batches = [to_device(collator([example])) for example in EXAMPLES]
    parts = sum(draft(objective=objective, batch=batch, num_items=num_items) for batch in batches)

    torch.testing.assert_close(draft(objective=objective, batch=whole), parts)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "qwen2"])
def test_heads_of_families_are_known(family):
    check_head(make_model(family))


def test_unknown_head_is_refused():
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    whole = type(model).forward

    class Doubled(type(model)):
        def forward(self, *args, **kwargs):
            output = whole(self, *args, **kwargs)
            output.logits = output.logits * 2
            return output

    model.__class__ = Doubled
    with pytest.raises(ValueError, match="its LM head's output"):
        check_head(model)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"name": "mse"}, "one of ce, kd, cat, tv, lk"),
        ({"name": "kd"}, "Expected a target"),
        ({"temperature": 0.0}, "above 0"),
        ({"depth_decay": 0.0}, "above 0"),
        ({"cross_entropy_weight": 0.0}, "one of them positive"),
        ({"divergence_weight": 1.0}, "no teacher"),
    ],
)
def test_impossible_objectives_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        Objective(**settings)
