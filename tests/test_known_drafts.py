"""Which published draft serves a target, told from what can be read of it without its weights."""

import json

import pytest
from families import make_draft, make_model
from transformers import AutoConfig

from pard_hf import PardDraftModel
from pard_hf.draft.known_drafts import DEEPSEEK_TURN, KNOWN_DRAFTS, known_draft_for

LLAMA_3, LLAMA_4, DEEPSEEK, QWEN_2_5, QWEN_3 = (draft.name for draft in KNOWN_DRAFTS)
IM_START = "<|im_start|>"


def save_target(folder, model_type, vocab_size, tokens=None):
    """A config, and the tokenizer files as far as they are read here: special tokens and where they stand."""
    folder.mkdir(parents=True)
    config = {"model_type": model_type, "vocab_size": vocab_size}
    if model_type == "llama4":
        config = {"model_type": model_type, "text_config": {"model_type": "llama4_text", "vocab_size": vocab_size}}
    (folder / "config.json").write_text(json.dumps(config))
    if tokens is not None:
        added = [{"id": index, "content": token} for index, token in enumerate(tokens)]
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    return folder


@pytest.mark.parametrize(
    ("model_type", "vocab_size", "tokens", "expected"),
    [
        ("llama", 128256, ["<|start_header_id|>"], LLAMA_3),
        ("llama", 128256, None, LLAMA_3),
        ("llama4", 202048, None, LLAMA_4),
        ("llama4_text", 202048, None, LLAMA_4),
        ("qwen2", 151936, [IM_START], QWEN_2_5),
        ("qwen2", 152064, [IM_START], QWEN_2_5),
        ("qwen2", 151936, [DEEPSEEK_TURN], DEEPSEEK),
        ("qwen2", 152064, [DEEPSEEK_TURN], DEEPSEEK),
        ("qwen3", 151936, [IM_START], QWEN_3),
        ("qwen3_moe", 151936, None, QWEN_3),
    ],
)
def test_config_and_tokenizer_tell(tmp_path, model_type, vocab_size, tokens, expected):
    """Qwen2.5 and DeepSeek's distillations of it share configs, padding included: the tokenizer decides."""
    folder = save_target(tmp_path / "target", model_type, vocab_size, tokens)

    assert known_draft_for(folder).name == expected
    assert known_draft_for(str(folder)).name == expected


@pytest.mark.parametrize(
    ("name", "family", "vocab_size", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama", 128256, LLAMA_3),
        ("meta-llama/Meta-Llama-3-8B", "llama", 128256, LLAMA_3),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2", 152064, QWEN_2_5),
        ("Qwen/Qwen2.5-Coder-0.5B", "qwen2", 151936, QWEN_2_5),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen2", 152064, DEEPSEEK),
        ("Qwen/Qwen3-8B", "qwen3", 151936, QWEN_3),
    ],
)
def test_a_live_model_is_known_by_its_name(name, family, vocab_size, expected):
    """Nothing is downloaded for it: the Hub id in its config tells one family from another."""
    target = make_model(family, vocab_size=vocab_size)
    target.config._name_or_path = name

    assert known_draft_for(target).name == expected


def test_every_example_is_one_of_the_targets():
    import re

    for draft in KNOWN_DRAFTS:
        serving = [other.name for other in KNOWN_DRAFTS if re.fullmatch(other.targets, draft.example)]
        assert serving == [draft.name]


def test_live_model_without_a_name_may_be_of_two_families():
    with pytest.raises(ValueError, match=f"`{DEEPSEEK}`.* and `{QWEN_2_5}`.*by name"):
        known_draft_for(make_model("qwen2", vocab_size=151936))


@pytest.mark.parametrize(
    ("model_type", "vocab_size", "tokens", "near"),
    [
        ("llama", 128260, None, LLAMA_3),  # a fine-tune that added tokens
        ("llama", 128256, [DEEPSEEK_TURN], LLAMA_3),  # DeepSeek-R1-Distill-Llama
        ("qwen3", 151936, [DEEPSEEK_TURN], QWEN_3),  # DeepSeek-R1-0528-Qwen3-8B
        ("qwen2", 151665, None, QWEN_2_5),  # cut to the tokenizer
    ],
)
def test_what_comes_near_is_named_and_not_loaded(tmp_path, model_type, vocab_size, tokens, near):
    folder = save_target(tmp_path / "target", model_type, vocab_size, tokens)

    with pytest.raises(ValueError, match="comes near") as error:
        PardDraftModel.for_target(folder)
    assert near in str(error.value)
    assert "pard train" in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "vocab_size"), [("llama", 32000), ("gemma2", 256000), ("qwen2_5_vl", 152064), ("gpt2", 50257)]
)
def test_unknown_families_are_told_how_to_train(tmp_path, model_type, vocab_size):
    folder = save_target(tmp_path / "target", model_type, vocab_size)

    with pytest.raises(ValueError, match="pard data --target target .*pard train --base") as error:
        PardDraftModel.for_target(folder)
    assert model_type in str(error.value)
    assert str(vocab_size) in str(error.value)
    assert "comes near" not in str(error.value)


@pytest.mark.parametrize("target", [None, 5, AutoConfig])
def test_what_is_no_target_is_refused(target):
    with pytest.raises(ValueError, match="a model, a folder or a Hub id"):
        known_draft_for(target)


def test_folder_without_config_is_refused(tmp_path):
    for nowhere in (tmp_path, "./nowhere"):
        with pytest.raises((ValueError, OSError), match=str(nowhere)):
            known_draft_for(nowhere)


def test_a_draft_is_no_target_of_itself():
    """`for_target` is a class method: an instance is as good, and its own weights play no part."""
    draft = make_draft(make_model("llama"))

    with pytest.raises(ValueError, match="Known drafts serve"):
        draft.for_target(draft)
