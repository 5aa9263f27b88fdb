"""Training works, resumes as the same run, and refuses what it cannot train."""

import json

import pytest
import torch
from families import make_model
from transformers import TrainerCallback

from pard_hf import PardDraftModel, PardTrainer, PardTrainingArguments
from pard_hf.training.mask_token import check_mask_token
from pard_hf.training.run import train_draft

ROWS = [{"input_ids": [1, *[(5 * start + 7 * i) % 80 + 3 for i in range(14)], 2]} for start in range(8)]


def make_trainer(folder, max_steps, **arguments):
    torch.manual_seed(0)
    draft = PardDraftModel.from_causal_lm(make_model("llama", initializer_range=0.05), 99, 5)
    settings = {
        "max_steps": max_steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "num_draft_tokens": 5,
        "save_strategy": "no",
        **arguments,
    }
    return PardTrainer(draft, PardTrainingArguments(str(folder), **settings), train_dataset=ROWS)


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
    one = make_trainer(tmp_path, max_steps=6, logging_steps=1, retention_rate=1.0)
    two = make_trainer(
        tmp_path,
        max_steps=6,
        logging_steps=1,
        retention_rate=1.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    losses = []
    for trainer in (one, two):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=2e-3, rtol=2e-3)


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


def test_eager_attention_trains_alike(tmp_path):
    losses = []
    for attention in ("sdpa", "eager"):
        trainer = make_trainer(tmp_path, max_steps=3, logging_steps=1)
        trainer.model.set_attn_implementation(attention)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-3, rtol=1e-3)


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


def test_base_and_rows_become_a_draft(tmp_path, bundled_like_tokenizer):
    base, data, out = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "draft"
    make_model("llama", vocab_size=104).save_pretrained(base)
    bundled_like_tokenizer.save_pretrained(base)
    data.write_text("\n".join(json.dumps({"prompt": "ab", "response": "cdefgh"}) for _ in range(8)))
    arguments = {"max_steps": 4, "save_steps": 2, "use_cpu": True, "per_device_train_batch_size": 2}

    train_draft(str(base), [data], out, 102, max_length=64, disable_tqdm=True, **arguments)

    draft = PardDraftModel.from_pretrained(out)
    assert draft.mask_token_id == 102
    assert (out / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="within the 128 positions"):
        train_draft(str(base), [data], out, 102, max_length=129, **arguments)
    train_draft(str(base), [data], out, 102, max_length=64, disable_tqdm=True, restart=True, **arguments)
    assert (out / "checkpoints.1" / "checkpoint-4").is_dir()  # moved aside, not gone on from
    with pytest.raises(ValueError, match="never produces"):
        train_draft(str(base), [data], out, 50, **arguments)


def test_reserved_tokens_may_be_masks(bundled_like_tokenizer):
    """Llama-3 has no free id; AMD takes one of its reserved special tokens."""
    bundled_like_tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})

    check_mask_token(bundled_like_tokenizer, bundled_like_tokenizer.convert_tokens_to_ids("<|reserved_0|>"))
    for used in ("</s>", "<pad>", "A"):
        with pytest.raises(ValueError, match="never produces"):
            check_mask_token(bundled_like_tokenizer, bundled_like_tokenizer.convert_tokens_to_ids(used))
