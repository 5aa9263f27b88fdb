"""Training works, resumes as the same run, and refuses what it cannot train."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from device import DEVICE, torch
from families import load_draft, make_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainerCallback

from pard_hf import DecodingStats, PardDraftModel
from pard_hf.evaluation.acceptance import AcceptanceEvaluator
from pard_hf.training import trainer as trainer_module
from pard_hf.training.collator import pack_rows
from pard_hf.training.objective import check_attention
from pard_hf.training.trainer import STEP_PARTS, TrainingClock, last_checkpoint

accelerate = pytest.importorskip("accelerate")
from pard_hf import PardTrainer, PardTrainingArguments  # noqa: E402

ROWS = [{"input_ids": [1, *[(5 * start + 7 * i) % 80 + 3 for i in range(14)], 2]} for start in range(8)]


def make_trainer(folder, max_steps, rows=ROWS, trainer=None, **arguments):
    torch.manual_seed(0)
    draft = PardDraftModel.from_causal_lm(make_model("llama", initializer_range=0.05), 99, 5)
    settings = {
        "max_steps": max_steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": DEVICE.type == "cpu",
        "num_draft_tokens": 5,
        "save_strategy": "no",
        **arguments,
    }
    return PardTrainer(draft, PardTrainingArguments(str(folder), **settings), train_dataset=rows, **(trainer or {}))


def losses_of(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def accepted(draft):
    """Mean number of leading proposals that are right, over every anchor of every row."""
    counts = []
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]])
        for anchor in range(4, 10):
            proposals = draft.draft(ids[:, : anchor + 1], num_assistant_tokens=5).argmax(-1)[0]
            counts.append((proposals == ids[0, anchor + 1 : anchor + 6]).long().cumprod(0).sum().item())
    return sum(counts) / len(counts)


def test_training_teaches_all_depths(tmp_path):
    """On eight rows learned by heart a whole block of proposals becomes right."""
    trainer = make_trainer(tmp_path, max_steps=150)
    before = accepted(trainer.model)

    trainer.train()

    assert before < 0.5
    assert accepted(trainer.model.eval()) > 4


def test_accumulation_is_a_larger_batch(tmp_path):
    """Loss is a mean over labels, so 4 rows at once are 2 + 2 accumulated: same trajectory."""
    one = make_trainer(tmp_path, max_steps=6, logging_steps=1)
    two = make_trainer(
        tmp_path, max_steps=6, logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    one.train()
    two.train()

    torch.testing.assert_close(losses_of(one), losses_of(two), atol=2e-3, rtol=2e-3)


def test_checkpointing_recomputes_the_same(tmp_path):
    plain, checkpointed = (
        make_trainer(tmp_path, max_steps=3, logging_steps=1, gradient_checkpointing=on) for on in (False, True)
    )
    plain.train()
    checkpointed.train()

    torch.testing.assert_close(losses_of(plain), losses_of(checkpointed), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", ["ce", "cat"])
def test_bfloat16_trains_alike(tmp_path, objective):
    target = make_model("llama", seed=5, initializer_range=0.3)
    settings = {"logging_steps": 1, "objective": objective, "trainer": {"target": target}}
    full, half = (make_trainer(tmp_path, max_steps=3, bf16=bf16, **settings) for bf16 in (False, True))
    full.train()
    half.train()

    torch.testing.assert_close(losses_of(full), losses_of(half), atol=0.05, rtol=0.05)
    assert half.model.dtype == torch.float32  # bf16 is for computing; weights keep their precision


def test_packed_rows_train(tmp_path):
    rows = pack_rows([{**row, "loss_mask": [1] * len(row["input_ids"])} for row in ROWS], 40)
    trainer = make_trainer(tmp_path, max_steps=150, rows=rows, per_device_train_batch_size=2)

    trainer.train()

    assert accepted(trainer.model.eval()) > 4


@pytest.mark.parametrize("objective", ["kd", "cat"])
def test_a_teacher_is_followed(tmp_path, objective):
    """On text that says nothing, the draft learns what the target would say; the target stays as it is."""
    target = make_model("llama", seed=5, initializer_range=0.3)
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    trainer = make_trainer(tmp_path, 150, objective=objective, logging_steps=1, trainer={"target": target})

    trainer.train()

    losses = losses_of(trainer)
    assert losses[-5:].mean() < 0.6 * losses[:5].mean()
    for name, weight in target.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("objective", ["ce", "kd", "cat"])
def test_teachers_may_be_offloaded(tmp_path, objective):
    """Between two forwards their weights lie on the meta device, which is not where ids go."""
    runs = []
    for is_offloaded in (False, True):
        target = make_model("llama", seed=5, initializer_range=0.3)
        if is_offloaded:
            accelerate.cpu_offload(target, execution_device=DEVICE)
        evaluator = AcceptanceEvaluator(target, {"some": [[1, 8, 15]]}, 4, 8)
        trainer = make_trainer(
            tmp_path, 2, objective=objective, logging_steps=1, eval_strategy="steps", eval_steps=2,
            trainer={"target": target, "evaluator": evaluator},
        )  # fmt: skip
        trainer.train()
        runs.append([losses_of(trainer), torch.tensor(trainer.state.log_history[-2]["eval_acceptance_length"])])

    torch.testing.assert_close(*runs)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_interrupted_run_resumes_as_the_same_run(tmp_path):
    """Interrupting loses nothing since the last checkpoint, and the resumed run ends in the same weights."""
    saving = {"save_strategy": "steps", "save_steps": 5, "data_seed": 3}
    whole = make_trainer(tmp_path / "whole", 12, **saving)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", 12, **saving)
    stopped.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        stopped.train()

    resumed = make_trainer(tmp_path / "stopped", 12, **saving)
    resumed.train(resume_from_checkpoint=True)

    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, msg=name)
    assert PardDraftModel.from_pretrained(tmp_path / "stopped" / "checkpoint-10").mask_token_id == 99
    assert resumed.clock.metrics()["num_rows"] == whole.clock.metrics()["num_rows"]


def test_best_draft_between_two_saves_is_kept(tmp_path):
    found = iter([(0, 0, 9), (0, 9), (9, 1), (9, 1)])
    trainer = make_trainer(
        tmp_path,
        8,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        trainer={"evaluator": lambda draft, part: {"some": DecodingStats(next(found), 18)}},
    )

    trainer.train()

    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    kept = load_draft(tmp_path / "checkpoint-2").state_dict()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, kept[name]), name


@pytest.mark.slow
def test_workers_drop_the_same_rows(tmp_path):
    """Also those that live on from one epoch to the next."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    one, two = (make_trainer(tmp_path, 6, logging_steps=1, **settings) for settings in ({}, workers))
    one.train()
    two.train()

    torch.testing.assert_close(losses_of(one), losses_of(two))


def test_eager_attention_trains_alike(tmp_path):
    losses = []
    for attention in ("sdpa", "eager"):
        trainer = make_trainer(tmp_path, max_steps=3, logging_steps=1)
        trainer.model.set_attn_implementation(attention)
        trainer.train()
        losses.append(losses_of(trainer))

    torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)


def test_untrainable_models_are_refused(tmp_path):
    arguments = PardTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")

    with pytest.raises(ValueError, match="from_causal_lm"):
        PardTrainer(make_model("llama"), arguments)
    with pytest.raises(ValueError, match="without one"):
        PardTrainer(PardDraftModel.from_causal_lm(make_model("mistral"), 99), arguments)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        PardTrainer(
            PardDraftModel.from_causal_lm(make_model("llama"), 99),
            PardTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", retention_rate=7.0),
        )


def test_what_could_not_be_saved_is_not_trained(tmp_path, tiny_draft):
    """Said before the first step, not at the first checkpoint."""
    tiny_draft.model.layers[1].mlp.extra = torch.nn.Linear(3, 3)

    with pytest.raises(ValueError, match="mlp.extra.*another draft"):
        PardTrainer(tiny_draft, PardTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


def test_flex_attention_is_refused_by_the_device_that_trains(tmp_path):
    """A draft still lies on the CPU when it is handed over; the trainer moves it."""
    draft = PardDraftModel.from_causal_lm(make_model("llama", attn_implementation="flex_attention"), 99)

    check_attention(draft, device=torch.device("cuda"))
    with pytest.raises(ValueError, match="backward pass, got a CPU"):
        PardTrainer(draft, PardTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


def test_evaluation_is_the_decoding_loop(tmp_path):
    """The draft learns what its target says; blocks grow, the best checkpoint is kept, table and plot are written."""
    target = make_model("llama", seed=5, initializer_range=0.3)
    prompts = {"early": [row["input_ids"][:4] for row in ROWS[:4]], "late": [row["input_ids"][:7] for row in ROWS[4:]]}
    answers = target.generate(torch.tensor(prompts["early"]), max_new_tokens=20, do_sample=False)
    evaluator = AcceptanceEvaluator(target, prompts, num_assistant_tokens=4, max_new_tokens=20, batch_size=3)
    trainer = make_trainer(
        tmp_path,
        90,
        rows=[{"input_ids": row} for row in answers.tolist()],
        eval_strategy="steps",
        eval_steps=30,
        save_strategy="steps",
        save_steps=30,
        save_total_limit=1,
        load_best_model_at_end=True,
        logging_steps=10,
        trainer={"evaluator": evaluator},
    )

    trainer.train()

    table = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    lengths = [float(line["eval_early_acceptance_length"]) for line in table if line["eval_early_acceptance_length"]]
    means = [float(line["eval_acceptance_length"]) for line in table if line["eval_acceptance_length"]]
    assert len(lengths) == 3
    assert lengths[-1] > 3 > lengths[0] or lengths[0] > 3
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    best = [30, 60, 90][max(range(3), key=lambda i: (means[i], -i))]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert (tmp_path / f"checkpoint-{best}" / "trainer_state.json").exists()
    kept = load_draft(tmp_path / f"checkpoint-{best}")
    assert evaluator(kept)["early"] == evaluator(trainer.model)["early"]
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2
    assert sum(stats.num_tokens for stats in evaluator(kept).values()) == 8 * 20


def test_loss_that_is_not_finite_names_its_rows(tmp_path):
    rows = [{**row, "source": f"rows.jsonl line {number}"} for number, row in enumerate(ROWS, start=1)]
    trainer = make_trainer(tmp_path, 4, rows=rows, save_strategy="steps", save_steps=1)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.model.embed_tokens.weight.data.fill_(float("nan"))

    trainer.add_callback(Spoil())

    with pytest.raises(FloatingPointError, match="step 3, got nan"):
        trainer.train()

    report = json.loads((tmp_path / "not_finite.0.json").read_text())
    assert report["step"] == 3
    assert len(report["rows"]) == 4
    assert all(source.startswith("rows.jsonl line ") for source in report["rows"])


@pytest.mark.parametrize("content", [None, "{"])
def test_full_disk_costs_the_steps_since_the_last_checkpoint(tmp_path, monkeypatch, content):
    """A checkpoint that was not written to its end is not resumed from, and written again."""
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, 6, **saving)
    write = type(trainer.state).save_to_json

    def fail_late(state, path):
        if "checkpoint-4" not in path:
            return write(state, path)
        if content is not None:
            Path(path).write_text(content)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(trainer.state), "save_to_json", fail_late)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()

    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = make_trainer(tmp_path, 6, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert [folder.name for folder in tmp_path.glob("*") if folder.is_dir()] == ["checkpoint-6"]


def test_the_clock_counts_where_the_batch_is_and_waits_for_nothing():
    """On a device a step adds up there; only what is logged is read. A fake tensor refuses to be read or mixed."""
    with FakeTensorMode():
        rows = [torch.zeros((2, 3), dtype=torch.long, device="cuda") for _ in range(2)]
        clock = TrainingClock()
        clock.count(*rows)
        clock.count(*rows)

    clock = TrainingClock(num_tokens=5, num_rows=7)
    clock.count(torch.tensor([[0, 1, 1, -1]]), torch.tensor([[0, 0, 1, 0]]))
    clock.count(torch.tensor([[0, -1]]), torch.tensor([[0, 0]]))
    counts, parts = {"num_tokens": 8, "num_rows": 11}, dict.fromkeys(STEP_PARTS, 0.0)
    assert clock.metrics() == {"train_seconds": 0.0, **{f"{part}_seconds": 0.0 for part in parts}, **counts}
    assert clock.state()["attributes"] == {"parts": parts, **counts}


def test_the_log_says_where_the_time_went(tmp_path):
    """Parts of a step add up to its time, rates are of that time, and a resumed run goes on counting."""
    saving = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    make_trainer(tmp_path, 2, **saving).train()
    trainer = make_trainer(tmp_path, 4, **saving)
    trainer.train(resume_from_checkpoint=True)

    first, last = (one for one in trainer.state.log_history if "loss" in one and one["step"] in (2, 4))
    for name in STEP_PARTS:
        assert 0 < first[f"{name}_seconds"] < last[f"{name}_seconds"]
    parts = [last[f"{name}_seconds"] for name in STEP_PARTS]
    assert sum(parts) == pytest.approx(last["train_seconds"], abs=0.003)
    for name in ("tokens", "rows"):
        rate = last[f"num_{name}"] / last["train_seconds"]
        assert last[f"{name}_per_second"] == pytest.approx(rate, rel=0.05)


def test_each_part_of_a_step_is_timed_apart(tmp_path, monkeypatch):
    """By a clock that only moves where batches are fetched, and in the backward passes of two batches a step."""
    trainer, clock = make_trainer(tmp_path, 3, gradient_accumulation_steps=2), SimpleNamespace(now=1.0)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slowed(function, seconds):
        def slow(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)

        return slow

    for owner, name, seconds in (
        (trainer, "get_batch_samples", 1),
        (trainer, "compute_loss", 0.25),
        (trainer.accelerator, "backward", 0.5),
        (trainer.optimizer or trainer.create_optimizer(), "step", 2),
    ):
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name), seconds))
    trainer.train()

    assert trainer.clock.parts == {"fetch": 3, "forward": 1.5, "backward": 3, "optimizer": 6}


def test_frozen_embeddings_stay(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, freeze_embeddings=True, correction_head="joint")
    draft = trainer.model
    frozen = (draft.get_input_embeddings(), draft.get_output_embeddings())
    before = [module.weight.clone() for module in frozen]
    layer = draft.model.layers[0].mlp.up_proj.weight.clone()

    trainer.train()

    assert all(torch.equal(module.weight, weight) for module, weight in zip(frozen, before, strict=True))
    assert not torch.equal(draft.model.layers[0].mlp.up_proj.weight, layer)
    assert draft.correction_head.output.weight.any()


def test_a_run_of_some_minutes_ends_when_they_are_over(tmp_path):
    """Every step counts a minute: the learning rate follows the clock down to zero."""

    class Minutes(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            trainer.clock.last -= 60

    trainer = make_trainer(tmp_path, 10**6, max_minutes=3.999, logging_steps=1, warmup_steps=2)
    trainer.callback_handler.callbacks.insert(0, Minutes())

    trainer.train()

    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert trainer.state.global_step == 4
    assert rates[0] == pytest.approx(5e-3, rel=0.2)  # The first step of the warm-up.
    assert rates[1] > rates[2] > rates[3]


def test_a_run_of_some_minutes_ends_at_its_steps_if_they_come_first(tmp_path):
    trainer = make_trainer(tmp_path, 2, max_minutes=60)

    trainer.train()

    assert trainer.state.global_step == 2
