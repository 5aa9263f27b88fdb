"""The correction head: what it computes, how it is saved, whose it is, and how it is trained."""

import copy
import json
import pickle
import shutil

import pytest
from device import DEVICE, IS_FAKE, to_device, torch
from families import add_head, load_draft, make_draft, make_model, make_prompts
from safetensors import safe_open
from test_trainer import make_trainer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pard_hf import PardDraftModel, PardTrainer, PardTrainingArguments, with_pard
from pard_hf.draft.addons import ADDON_FILES, SETTINGS_FILE, WEIGHTS_FILE
from pard_hf.draft.correction_head import CorrectedPositions, CorrectionHead
from pard_hf.host import without_head
from pard_hf.hub.export import export_draft
from pard_hf.training.cod import build_rows, keep_rows
from pard_hf.training.objective import correction_of


@pytest.fixture
def headed():
    return add_head(make_draft(make_model("llama", seed=5)), 0.5)


def test_correction_is_the_formula():
    """W (E[x] * sigmoid(G h)), one row at a time."""
    torch.manual_seed(0)
    head = CorrectionHead(11, 6, rank=3)
    torch.nn.init.normal_(head.output.weight)
    head.to(DEVICE)
    hidden, previous = torch.randn(4, 6), torch.tensor([3, 0, 10, 3])

    got = head(hidden, previous)

    for row in range(4):
        gate = 1 / (1 + torch.exp(-(head.gate.weight @ hidden[row] + head.gate.bias)))
        torch.testing.assert_close(got[row], head.output.weight @ (head.previous.weight[previous[row]] * gate))


def test_chain_takes_the_best_after_the_one_before():
    torch.manual_seed(0)
    head = CorrectionHead(20, 6, rank=3)
    torch.nn.init.normal_(head.output.weight)
    head.to(DEVICE)
    hidden, scores = torch.randn(2, 5, 6), torch.randn(2, 5, 20)

    with torch.no_grad():
        tokens, rows = CorrectedPositions(head, hidden, scores).chain(lambda logits: logits.argmax(-1))

        for row in range(2):
            token = scores[row, 0].argmax()
            assert tokens[row, 0] == token
            for depth in range(1, 5):
                wanted = scores[row, depth] + head(hidden[row, depth], token)
                torch.testing.assert_close(rows[row, depth], wanted)
                token = wanted.argmax()
                assert tokens[row, depth] == token


def test_wider_targets_have_rows_without_a_correction():
    head = CorrectionHead(8, 6, rank=3)
    torch.nn.init.normal_(head.output.weight)
    head.to(DEVICE)
    scores = torch.nn.functional.pad(torch.randn(1, 3, 8), (0, 4), value=-torch.inf)

    with torch.no_grad():
        tokens, _ = CorrectedPositions(head, torch.randn(1, 3, 6), scores).chain(lambda logits: logits.argmax(-1))

    assert tokens.max() < 8


def test_head_lies_beside_an_ordinary_checkpoint(headed, tmp_path):
    plain = make_draft(make_model("llama", seed=5))
    plain.save_pretrained(tmp_path / "plain")

    headed.save_pretrained(tmp_path / "headed")

    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "headed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    ids = make_prompts(1)["input_ids"]
    loaded = load_draft(tmp_path / "headed")
    assert torch.equal(loaded.draft(ids), headed.draft(ids))
    assert loaded.correction_head.rank == 8
    left_off = load_draft(tmp_path / "headed", correction_head=False)
    assert torch.equal(left_off.draft(ids), plain.draft(ids))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "headed").num_parameters() == plain.num_parameters()


def test_saving_without_a_head_leaves_none_of_an_earlier_one(headed, tmp_path):
    headed.save_pretrained(tmp_path)
    assert (tmp_path / ADDON_FILES[0]).exists()

    make_draft(make_model("llama", seed=6)).save_pretrained(tmp_path)

    assert not any((tmp_path / name).exists() for name in ADDON_FILES)
    assert PardDraftModel.from_pretrained(tmp_path).correction_head is None


def test_weights_that_name_no_head_leave_it_its_own(headed, tmp_path):
    weights = {name: tensor for name, tensor in headed.state_dict().items() if "correction_head" not in name}

    headed.save_pretrained(tmp_path, state_dict=weights)

    ids = make_prompts(1)["input_ids"]
    assert torch.equal(load_draft(tmp_path).draft(ids), headed.draft(ids))


def test_head_follows_a_draft_that_grows(headed, tmp_path):
    headed.resize_token_embeddings(112)

    headed.save_pretrained(tmp_path)

    assert PardDraftModel.from_pretrained(tmp_path).correction_head.vocab_size == 112


def test_seed_makes_the_head(tmp_path):
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(heads))
        trainer = make_trainer(tmp_path, 1, correction_head="frozen", seed=seed)
        heads.append(trainer.model.correction_head.previous.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("mode", ["frozen", "joint"])
def test_batch_without_a_label_has_a_gradient_of_zero(tmp_path, mode):
    rows = [{"input_ids": [1, 5, 6, 7, 2], "loss_mask": [0] * 5}] * 8
    trainer = make_trainer(tmp_path, 1, rows, correction_head=mode)
    batch = {name: values for name, values in trainer.data_collator(rows[:2]).items() if name != "sources"}

    trainer.model(objective=trainer.objective, batch=to_device(batch)).backward()

    assert not any(parameter.grad.any() for parameter in trainer.model.correction_head.parameters())


def test_only_the_main_process_writes(headed, tmp_path):
    headed.save_pretrained(tmp_path, False)

    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.skipif(IS_FAKE, reason="the stand-in is not for files")
def test_copies_and_pickles_keep_their_own_head(headed):
    ids = make_prompts(1)["input_ids"]
    for twin in (copy.deepcopy(headed), pickle.loads(pickle.dumps(headed))):
        assert torch.equal(twin.draft(ids), headed.draft(ids))
        assert twin.correction_head is not headed.correction_head
    bare = without_head(headed)
    assert bare.correction_head is None
    assert headed.correction_head is not None
    assert bare.get_input_embeddings() is headed.get_input_embeddings()


def test_class_of_ones_own_has_a_place_for_a_head():
    class OwnDraft(PardDraftModel, LlamaForCausalLM):
        pass

    draft = PardDraftModel.from_causal_lm(OwnDraft(make_model("llama").config).to(DEVICE), 99, 5)

    assert draft.correction_head is None
    assert draft.draft(make_prompts(1)["input_ids"]).shape == (1, 5, 100)


def test_head_survives_16_bit(headed, tmp_path):
    headed.to(torch.bfloat16).save_pretrained(tmp_path)

    for dtype in (torch.float32, torch.bfloat16):
        assert PardDraftModel.from_pretrained(tmp_path, dtype=dtype).correction_head.gate.weight.dtype == dtype


def put_head_beside(headed, other, folder):
    headed.save_pretrained(folder / "headed")
    other.save_pretrained(folder / "other")
    shutil.copytree(folder / "headed/correction_head", folder / "other/correction_head")
    return folder / "other"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "another draft of the same shape"),
        ({"vocab_size": 108}, "vocab_size of 108, got one for 100"),
        ({"hidden_size": 64}, "hidden_size of 64, got one for 32"),
    ],
)
def test_head_of_another_draft_is_refused_by_name(headed, tmp_path, changes, message):
    folder = put_head_beside(headed, make_draft(make_model("llama", **{"seed": 5, **changes})), tmp_path)

    with pytest.raises(ValueError, match="correction head") as refused:
        PardDraftModel.from_pretrained(folder)

    assert message in str(refused.value)
    assert PardDraftModel.from_pretrained(folder, correction_head=False).correction_head is None


@pytest.mark.parametrize("damage", ["rank", "not json", "not safetensors", "no weights"])
def test_damaged_head_is_refused_by_name(headed, tmp_path, damage):
    headed.save_pretrained(tmp_path)
    settings, weights = (tmp_path / "correction_head" / name for name in (SETTINGS_FILE, WEIGHTS_FILE))
    if damage == "rank":
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "rank": 4}))
    elif damage == "not json":
        settings.write_text("{")
    elif damage == "not safetensors":
        weights.write_bytes(b"nothing")
    else:
        weights.unlink()

    with pytest.raises((ValueError, OSError), match="correction_head"):
        PardDraftModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["rank", "num_candidates"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_bad_sizes_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        CorrectionHead(10, 4, **{name: value})


@pytest.mark.parametrize("num_rows", [112, 104])
def test_export_brings_the_head_along(tmp_path, num_rows, bundled_like_tokenizer):
    model = make_model("llama", seed=5, vocab_size=104)
    headed = add_head(PardDraftModel.from_causal_lm(model, 101, 5), 0.5)
    headed.save_pretrained(tmp_path / "draft")
    bundled_like_tokenizer.save_pretrained(tmp_path / "draft")

    export_draft(tmp_path / "draft", tmp_path / "exported", pad_vocab_to=num_rows)

    exported = load_draft(tmp_path / "exported")
    ids = make_prompts(1)["input_ids"]
    assert exported.correction_head.vocab_size == num_rows
    assert torch.equal(exported.draft(ids).argmax(-1), headed.draft(ids).argmax(-1))


def test_training_reads_the_gold_token_before():
    """Each labelled mask row is corrected by the token before the one it predicts, and rows of depth 0 are not."""
    torch.manual_seed(0)
    ids, is_label = torch.randint(3, 90, (16,)).cpu(), torch.ones(16, dtype=torch.bool, device="cpu")
    anchors, depths = keep_rows(is_label, 5, 0.8, 0.3)
    rows = build_rows(ids, is_label, anchors, depths, 99)
    batch = {name: values.unsqueeze(0) for name, values in {**rows, "anchors": anchors, "depths": depths}.items()}
    batch, ids = to_device(batch), ids.to(DEVICE)
    draft = add_head(make_draft(make_model("llama")), 0.5)
    is_label = batch["labels"] != -100
    hidden = torch.randn(int(is_label.sum()), 32)

    got = correction_of(draft, batch, is_label)(hidden, slice(None))

    labelled = zip(anchors[is_label[0].cpu()].tolist(), depths[is_label[0].cpu()].tolist(), strict=True)
    for row, (anchor, depth) in enumerate(labelled):
        wanted = draft.correction_head(hidden[row], ids[anchor + depth])
        torch.testing.assert_close(got[row], wanted if depth else torch.zeros_like(wanted))


# What follows a token depends on that token alone, which only one that knows it can say.
CYCLES = [{"input_ids": [1, *[3 + (start + 7 * i) % 90 for i in range(16)], 2]} for start in range(24)]


@pytest.mark.parametrize("objective", ["ce", "kd", "cat"])
@pytest.mark.parametrize("mode", ["frozen", "joint"])
def test_training_teaches_the_head(tmp_path, mode, objective):
    """With a teacher that says what the rows say: the objectives want the same."""
    teacher = make_trainer(tmp_path / "teacher", 80, CYCLES, num_draft_tokens=1).model if objective != "ce" else None
    trainer = make_trainer(
        tmp_path, 60, CYCLES, trainer={"target": teacher}, correction_head=mode, correction_head_rank=32,
        learning_rate=1e-3, correction_head_learning_rate=1e-2, logging_steps=5, objective=objective,
    )  # fmt: skip
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}

    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # A teacher this young is unsure of everything, and an objective that asks it has little to gain.
    assert losses[-1] < (0.8 if objective == "ce" else 1.0) * losses[0]
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "correction_head.output.weight" in changed
    assert any(not name.startswith("correction_head") for name in changed) == (mode == "joint")


def test_rates_are_their_own(tmp_path):
    trainer = make_trainer(tmp_path, 1, correction_head="joint", learning_rate=1e-4)

    optimizer = trainer.create_optimizer()

    own = {id(parameter) for parameter in trainer.model.correction_head.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == (trainer.args.correction_head_learning_rate if id(parameter) in own else 1e-4)


def test_resumed_run_ends_in_the_same_head(tmp_path):
    arguments = {"correction_head": "frozen", "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", 4, **arguments)
    whole.train()
    make_trainer(tmp_path / "cut", 2, **arguments).train()
    resumed = make_trainer(tmp_path / "cut", 4, **arguments)

    resumed.train(resume_from_checkpoint=True)

    for mine, theirs in zip(
        resumed.model.correction_head.parameters(), whole.model.correction_head.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    with safe_open(tmp_path / "cut/checkpoint-4/model.safetensors", "pt") as weights:
        assert not any(name.startswith("correction_head") for name in weights.keys())


def test_training_without_a_head_leaves_an_old_one_off(tmp_path, headed):
    plain = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": DEVICE.type == "cpu"}
    frozen = PardTrainingArguments(**plain, correction_head="frozen", correction_head_rank=8)
    PardTrainer(headed, frozen, train_dataset=CYCLES)
    assert not headed.get_input_embeddings().weight.requires_grad
    PardTrainer(headed, PardTrainingArguments(**plain), train_dataset=CYCLES)
    assert headed.correction_head is None
    assert headed.get_input_embeddings().weight.requires_grad
    with pytest.raises(ValueError, match="frozen, joint"):
        make_trainer(tmp_path, 1, correction_head="sometimes")


def test_head_lengthens_blocks_of_text_that_needs_it(tmp_path):
    """Two texts that begin alike: a marginal mixes them, a place that knows the one before does not."""
    rows = [{"input_ids": [1, 5, first, *[first + i for i in range(1, 8)], 2]} for first in (10, 40)] * 4
    trainer = make_trainer(
        tmp_path, 120, rows, correction_head="joint", correction_head_rank=16, learning_rate=3e-3,
        correction_head_learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    draft = trainer.model.eval()

    proposals = draft.draft(torch.tensor([[1, 5]]), num_assistant_tokens=5).argmax(-1)[0].tolist()

    assert proposals in ([10, 11, 12, 13, 14], [40, 41, 42, 43, 44])


def test_target_says_the_same_with_a_head_from_a_folder(headed, tmp_path):
    headed.save_pretrained(tmp_path)
    target, prompts = make_model("llama"), make_prompts(2)
    expected = target.generate(**prompts, max_new_tokens=20, do_sample=False)

    got = with_pard(target).generate(
        **prompts, max_new_tokens=20, do_sample=False, assistant_model=load_draft(tmp_path)
    )

    assert torch.equal(got, expected)
