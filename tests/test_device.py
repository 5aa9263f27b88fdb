"""A decoding round and a training step on one device: on CUDA where there is one, else on its stand-in.

The stand-in refuses operands on two devices, and inside a decoder's `run` every value that reaches the host by another
way than `to_host`. What a test plants shows that it does.
"""

from contextlib import nullcontext

import pytest
import torch
from fake_device import FakeCuda, HostTransferError, MixedDevicesError, watch
from families import add_head, make_decoder, make_draft, make_model, make_prompts, make_self_draft

from pard_hf import AssistantMemory, DataCollatorForPard, with_pard, without_pard
from pard_hf.generation.batch import to_host
from pard_hf.generation.decoder import PardDecoder
from pard_hf.generation.sources import Tables
from pard_hf.training.collator import pack_rows
from pard_hf.training.objective import Objective
from pard_hf.training.trainer import TrainingClock

only_stand_in = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device waits and says nothing")


@pytest.fixture(autouse=True)
def device(monkeypatch):
    # Compiled rounds are tested elsewhere; here they run as they stand, ahead of the host as on CUDA.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with nullcontext() if torch.cuda.is_available() else FakeCuda():
        yield


def on_cuda(batch):
    return {name: values.cuda() if isinstance(values, torch.Tensor) else values for name, values in batch.items()}


class Streamer:
    def __init__(self):
        self.said = []

    def put(self, tokens):
        self.said += tokens.flatten().tolist()

    def end(self):
        pass


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20}
LOOKUP = {"prompt_lookup_num_tokens": 4, "assistant_reference_texts": [[7, 8, 9]]}
CALLS = {
    "chain": (1, {}),
    "tree": (1, {"assistant_tree_size": 12}),
    "head": (1, {}),
    "tree with a head": (3, {"assistant_tree_size": 12}),
    "batch": (3, {}),
    "rows that leave": (4, {"eos_token_id": list(range(3, 30))}),
    "sampled": (1, SAMPLED),
    "sampled tree": (1, {**SAMPLED, "assistant_tree_size": 8}),
    "lockstep": (3, {"repetition_penalty": 1.3}),
    "lockstep tree": (3, {"repetition_penalty": 1.3, "assistant_tree_size": 8, "eos_token_id": [3, 4, 5, 6]}),
    "lockstep sampled": (3, {**SAMPLED, "repetition_penalty": 1.3}),
    "scores": (2, {"output_scores": True, "output_logits": True}),
    "eager attention": (2, {}),
    "all sources in a batch": (3, LOOKUP),
    "all sources sampled": (1, {**SAMPLED, **LOOKUP}),
    "all sources in lockstep": (3, {**LOOKUP, "repetition_penalty": 1.3, "eos_token_id": [3, 4, 5, 6]}),
    "lookup without a draft": (3, {**LOOKUP, "eos_token_id": list(range(3, 30))}),
    "lookup without a draft sampled": (1, {**SAMPLED, **LOOKUP}),
    "adaptive lookup without a draft": (1, {**LOOKUP, "num_assistant_tokens_schedule": "adaptive"}),
    "adaptive": (1, {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "adaptive"}),
}


AHEAD = [
    "batch",
    "tree with a head",
    "rows that leave",
    "sampled",
    "lockstep",
    "scores",
    "all sources in a batch",
]


@pytest.mark.parametrize(("name", "disable_compile"), [(n, True) for n in CALLS] + [(n, False) for n in AHEAD])
def test_decoding_stays_on_the_device(name, disable_compile):
    """Whole calls, with the text of plain `generate`; values leave the device through one function."""
    batch_size, arguments = CALLS[name]
    target, prompts = make_model("llama").cuda(), on_cuda(make_prompts(batch_size))
    if name == "eager attention":
        target.set_attn_implementation("eager")
    draft = None if "without a draft" in name else make_self_draft(target)
    if "head" in name:
        add_head(draft, 0.3)
    if "sources" in name or "lookup" in name:
        arguments = {**arguments, "assistant_memory": AssistantMemory(target)}
    arguments = {"max_new_tokens": 14, "do_sample": False, "disable_compile": disable_compile, **arguments}
    torch.manual_seed(2)
    plain = {key: arguments[key] for key in arguments if "assistant" not in key and "lookup" not in key}
    expected = target.generate(**prompts, **plain, return_dict_in_generate=True)

    torch.manual_seed(2)
    with watch(PardDecoder.run, through=to_host):
        output = with_pard(target).generate(
            **prompts, **arguments, assistant_model=draft, return_dict_in_generate=True
        )

    assert output.sequences.is_cuda
    assert torch.equal(output.sequences, expected.sequences)
    assert output.stats.loop == ("lockstep" if "lockstep" in name else "own")


@pytest.mark.parametrize("arguments", [{}, SAMPLED, LOOKUP])
def test_streamed_call_stays_on_the_device(arguments):
    target, prompts = make_model("llama").cuda(), on_cuda(make_prompts(1))
    streamer = Streamer()

    with watch(PardDecoder.run, through=to_host):
        output = with_pard(target).generate(
            **prompts, max_new_tokens=12, streamer=streamer, assistant_model=make_self_draft(target), **arguments
        )

    assert streamer.said == output[0].tolist()


@pytest.mark.parametrize("arguments", [{"do_sample": True, "verification": "ratio_test"}, {"do_sample": True}])
def test_sampled_batch_stays_on_the_device(arguments):
    target, prompts = make_model("llama").cuda(), on_cuda(make_prompts(3))

    with watch(PardDecoder.run, through=to_host):
        output = with_pard(target).generate(
            **prompts, max_new_tokens=12, eos_token_id=None, assistant_model=make_self_draft(target), **arguments
        )

    assert output.shape == (3, 30)


def test_second_turn_stays_on_the_device():
    target, prompts = make_model("llama").cuda(), on_cuda(make_prompts(2))
    draft, texts = make_self_draft(target), []
    arguments = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    with watch(PardDecoder.run, through=to_host):
        for more in ({}, {"assistant_model": draft}, LOOKUP):
            first = with_pard(target).generate(**prompts, **arguments, **more)
            columns = torch.full((2, 4), 7, device="cuda")
            ids = torch.cat([first.sequences, columns], dim=1)
            mask = torch.cat([prompts["attention_mask"], ids.new_ones(2, 13)], dim=1)
            again = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
            texts.append(target.generate(**again, **arguments, **more).sequences.tolist())

    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("looks_up", [False, True])
@pytest.mark.parametrize("arguments", [{}, SAMPLED])
def test_stock_loop_stays_on_the_device(arguments, looks_up):
    """Of an untouched target, and the one that `with_pard` takes where its own cannot serve."""
    target, prompts = make_model("llama").cuda(), on_cuda(make_prompts(1))
    draft = make_self_draft(target)
    more = {"prompt_lookup_num_tokens": 4} if looks_up else {"assistant_model": draft}
    arguments = {"max_new_tokens": 12, "do_sample": False, **arguments}
    torch.manual_seed(2)
    expected = target.generate(**prompts, **arguments)

    torch.manual_seed(2)
    ours = with_pard(target).generate(
        **prompts, **arguments, **more, output_hidden_states=True, return_dict_in_generate=True
    )

    assert torch.equal(ours.sequences, expected)
    assert ours.stats.loop == "stock"
    if not arguments["do_sample"]:
        assert torch.equal(without_pard(target).generate(**prompts, **arguments, assistant_model=draft), expected)


def decode(kind):
    """A greedy call by a decoder of a kind."""
    target = make_model("llama").cuda()
    prompts = on_cuda(make_prompts(2))
    decoder = make_decoder(target, make_self_draft(target), prompts, 12, kind, num_assistant_tokens=4)
    with torch.no_grad():
        decoder.run()
    return decoder.sequences()


class Peeking(PardDecoder):
    """Looks at a value where none is due."""

    def look(self, scores):
        raise NotImplementedError

    def verify(self, proposals, scores, choice):
        self.look(scores)
        return super().verify(proposals, scores, choice)


LOOKS = {
    "cpu": lambda scores: scores.cpu(),
    "to": lambda scores: scores[0, 0, 0].to("cpu", torch.float64),
    "item": lambda scores: scores.max().item(),
    "int": lambda scores: int(scores.argmax()),
    "bool": lambda scores: bool((scores > 0).any()),
    "tolist": lambda scores: scores.tolist(),
    "copy": lambda scores: torch.empty(scores.shape).copy_(scores),
    "nonzero": lambda scores: scores.nonzero(),
    "mask as an index": lambda scores: scores[scores > 0],
    "equal": lambda scores: torch.equal(scores, scores),
    "unique": lambda scores: scores.argmax(-1).unique(),
}


@only_stand_in
@pytest.mark.parametrize("look", LOOKS)
def test_planted_transfer_is_found(look):
    class Planted(Peeking):
        def look(self, scores):
            LOOKS[look](scores)

    with pytest.raises(HostTransferError, match="through `to_host` only"), watch(PardDecoder.run, through=to_host):
        decode(Planted)
    assert decode(Planted).shape == (2, 30)  # Where nobody watches it is slow, and right.


def test_equal_tokens_of_a_round_are_remembered_in_their_order():
    """A device writes to one row of a table in no order: the likelier node must not depend on it."""
    torch.manual_seed(0)
    previous, tokens, logits = torch.full((2, 9), 3), torch.randint(4, 6, (2, 9)), torch.randn(2, 9, 12)
    there, here = Tables.empty(12, torch.device("cuda", 0)), Tables.empty(12, torch.device("cpu"))

    there.observe(previous.cuda(), tokens.cuda(), logits.cuda())
    here.observe(previous, tokens, logits)

    for found, wanted in zip(vars(there).values(), vars(here).values(), strict=True):
        torch.testing.assert_close(found.cpu(), wanted)


@only_stand_in
def test_rounds_without_a_look_pass_the_watch():
    with watch(PardDecoder.run, through=to_host):
        assert decode(PardDecoder).shape == (2, 30)


MIXTURES = {
    "sum": lambda scores: scores + torch.zeros(scores.shape[-1]),
    "scalar of the host grows": lambda scores: torch.zeros(()).add_(scores.max()),
    "concatenation": lambda scores: torch.cat([scores, torch.zeros(scores.shape)]),
    "lookup": lambda scores: torch.zeros(100)[scores.argmax(-1)],
    "gather": lambda scores: scores.gather(-1, torch.zeros(1, 1, 1, dtype=torch.long)),
    "isin": lambda scores: torch.isin(scores.argmax(-1), torch.tensor([4])),
    "fill by index": lambda scores: scores.index_fill(-1, torch.tensor(4), 0.0),
    "linear": lambda scores: torch.nn.functional.linear(scores, torch.zeros(3, scores.shape[-1])),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_planted_mixture_is_refused(mixture):
    class Planted(Peeking):
        def look(self, scores):
            MIXTURES[mixture](scores)

    with pytest.raises(RuntimeError, match="same device|on the cpu or on|either on cpu"):
        decode(Planted)


def test_what_cuda_takes_from_the_host_is_taken():
    """Scalars, and indices into its tensors."""
    values = torch.arange(6.0, device="cuda")

    assert (values * torch.tensor(2.0) + torch.tensor(1)).tolist() == [1, 3, 5, 7, 9, 11]
    assert values[torch.tensor([1, 3])].tolist() == [1, 3]
    values[torch.tensor([1, 3])] = torch.tensor(8.0)
    assert values.tolist() == [0, 8, 2, 8, 4, 5]
    assert torch.where(values > 4, values, torch.tensor(0.0)).sum() == 21
    values.copy_(torch.zeros(6))
    assert not values.any()
    assert values.is_cuda


ROWS = [{"input_ids": [1, *[(5 * start + 7 * i) % 80 + 3 for i in range(9 + start)], 2]} for start in range(4)]
PACKED = pack_rows([{**row, "loss_mask": [1] * len(row["input_ids"])} for row in ROWS], 30)


def train_step(objective, has_head, rows, clock):
    """A step as the trainer makes it: collate, move, lose, go back, step, count. Returns the loss and the weights."""
    draft = make_draft(make_model("llama", initializer_range=0.2)).train()
    if has_head:
        add_head(draft, 0.3)
    target = make_model("llama", seed=3, hidden_size=48).requires_grad_(False)
    draft.cuda(), target.cuda()
    batch = on_cuda(DataCollatorForPard(99, num_draft_tokens=4)(rows))
    optimizer = torch.optim.AdamW(draft.parameters())
    loss = draft(objective=Objective(objective, target=target), batch=batch)
    loss.backward()
    optimizer.step()
    clock.count(batch["anchors"], batch["depths"])
    return loss, draft


@pytest.mark.parametrize("rows", [ROWS, PACKED], ids=["texts", "packed"])
@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("objective", ["ce", "kd", "cat"])
def test_training_step_stays_on_the_device(objective, has_head, rows):
    clock = TrainingClock()

    loss, draft = train_step(objective, has_head, rows, clock)

    assert loss.is_cuda
    assert loss.isfinite()
    assert all(parameter.grad.is_cuda for parameter in draft.parameters())
    assert clock.metrics()["num_tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert clock.metrics()["num_rows"] > clock.metrics()["num_tokens"]


class HostClock(TrainingClock):
    """Counts on the host, as it once did."""

    def count(self, anchors, depths):
        rows = torch.tensor(0)
        rows += (anchors >= 0).sum()


def test_clock_on_the_host_is_refused():
    with pytest.raises(RuntimeError, match="same device"):
        train_step("ce", False, ROWS, HostClock())


def test_trainers_loss_stays_on_the_device(tmp_path):
    """The trainer's own step: its objective, its clock, its optimizer."""
    pytest.importorskip("accelerate")
    from test_trainer import make_trainer

    trainer = make_trainer(tmp_path, 1, ROWS, correction_head="joint")
    trainer.model.cuda()
    batch = on_cuda(trainer.data_collator(ROWS))
    num_items = (batch["labels"] != -100).sum()
    optimizer = trainer.create_optimizer()

    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=num_items)
    loss.backward()
    optimizer.step()

    assert loss.isfinite()
    assert trainer.clock.metrics()["num_tokens"] == sum(len(row["input_ids"]) for row in ROWS)


@only_stand_in
def test_mixture_is_an_error_of_its_own():
    """So that a fault of the stand-in is not taken for one."""
    with pytest.raises(MixedDevicesError, match=r"`other` of shape \(2,\)"):
        torch.ones(2, device="cuda") + torch.ones(2)
