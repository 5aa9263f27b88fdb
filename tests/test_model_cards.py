"""Cards say what files say: rendered again they are the same, their metadata is the Hub's, their snippets run."""

import json
import re
from pathlib import Path

import pytest
import yaml
from documents import has_smollm2
from families import MASK_TOKEN_ID, make_draft, make_model
from huggingface_hub import ModelCard

import pard_hf
from pard_hf.cli import main
from pard_hf.draft.known_drafts import KNOWN_DRAFTS
from pard_hf.hub.model_card import (
    BUNDLED,
    PUBLISHED,
    SMOLLM2_DRAFT,
    CardSource,
    all_names,
    card_source,
    draft_card,
    model_card,
)

ROOT = Path(pard_hf.__file__).parent.parent
CARDS = ROOT / "model_cards"
RESULTS = ROOT / "benchmarks" / "results"
# https://huggingface.co/docs/hub/repositories-licenses, as far as used
LICENSES = {"mit", "apache-2.0", "unknown"}


def committed(name):
    return CARDS / f"{name.split('/')[-1]}.md"


@pytest.fixture(params=all_names())
def name(request):
    return request.param


def test_there_is_one_card_a_model():
    assert {path.name for path in CARDS.iterdir()} == {committed(name).name for name in all_names()}
    assert len(all_names()) == len(KNOWN_DRAFTS) + 3


def test_committed_cards_are_what_their_inputs_give(name):
    """Results may be measured anew: `make cards` then writes the cards anew."""
    rendered = str(model_card(card_source(name, [RESULTS])))

    assert committed(name).read_text() == rendered, "run `make cards`"


def test_metadata_is_what_the_hub_takes(name):
    """Rules of https://huggingface.co/docs/hub/model-cards; `huggingface_hub` parses evaluation results strictly."""
    card = ModelCard.load(committed(name))
    data = card.data.to_dict()

    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] in LICENSES
    assert {"pard", "speculative-decoding"} <= set(data["tags"])
    assert ("base_model" in data) == ("base_model_relation" in data)
    assert data.get("base_model_relation") in (None, "finetune", "adapter", "quantized", "merge")
    for result in card.data.eval_results or ():
        assert result.metric_type in ("acceptance_length", "acceptance_rate", "speedup")
        assert isinstance(result.metric_value, float)
        assert {"num_assistant_tokens", "device", "dtype", "file"} <= result.metric_args.keys()
    assert yaml.safe_load(committed(name).read_text().split("---")[1]) == data


@pytest.mark.parametrize("known", KNOWN_DRAFTS, ids=lambda known: known.name)
def test_base_models_and_licences_are_those_of_the_table(known):
    data = ModelCard.load(committed(known.name)).data.to_dict()

    assert data.get("base_model") == known.base_model
    assert data["license"] == (known.license or "unknown")


def figures(value):
    """Every number in a JSON value."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from figures(part)
    elif isinstance(value, float):
        yield value


def test_figures_of_the_bundled_pair_are_in_the_results():
    """By another way than the renderer's: every decimal in the tables is one of the JSON's, rounded."""
    known = {
        f"{figure:.2f}" for path in RESULTS.glob("bundled_*.json") for figure in figures(json.loads(path.read_text()))
    }
    for name in ("bundled-draft", "bundled-target"):
        rows = re.findall(r"^\| `\w+` \|.*$", committed(name).read_text(), flags=re.MULTILINE)
        assert len(rows) >= 2
        for row in rows:
            assert set(re.findall(r"\d+\.\d+", row)) <= known, row


@pytest.mark.parametrize(("name", "card"), [("bundled", "bundled-draft"), ("smollm2", SMOLLM2_DRAFT)])
def test_cards_quote_the_run_of_an_engine(name, card):
    """Rounds and texts of a draft in vLLM, and no card that says so without one."""
    runs = [json.loads(file.read_text()) for file in RESULTS.glob(f"engines_{name}*.json")]
    text = committed(card).read_text()

    assert runs
    assert all(f"{run['engine']} ran target and draft" in text for run in runs)
    for name, found in (item for run in runs for item in run["sets"].items()):
        rounds = f"{found['vllm']['num_rounds']} | {found['ours']['num_rounds']}"
        assert f"| `{name}` | {found['num_prompts']} | 100% | 100% | {rounds} |" in text
        assert found["same_as_ours"] == 1.0
    assert "Neither engine was run" not in text
    assert all("Neither engine was run" in committed(draft.name).read_text() for draft in KNOWN_DRAFTS)


def test_figures_of_smollm2s_draft_are_those_of_its_result():
    known = {f"{figure:.2f}" for figure in figures(json.loads((RESULTS / "draft_smollm2.json").read_text()))}
    rows = re.findall(r"^\| `\w+` \|.*\.\d.*$", committed(SMOLLM2_DRAFT).read_text(), flags=re.MULTILINE)

    assert len(rows) == 3
    for row in rows:
        assert set(re.findall(r"\d+\.\d+", row)) <= known, row


@pytest.mark.parametrize("known", KNOWN_DRAFTS, ids=lambda known: known.name)
def test_figures_of_others_are_marked_as_theirs(known):
    """With source and hardware, below the words that say so; what we did not measure says that."""
    text = committed(known.name).read_text()
    ours, theirs = text.split("## Published by its authors\n\nTheirs, not measured here.")

    assert ours.endswith("## Measured with pard-hf\n\nNot measured.\n\n")
    for figure in PUBLISHED.get(known.name, ()):
        start = " | ".join(figure[key] for key in ("target", "hardware", "engine", "prompts", "speedup"))
        end = f"{figure['source']} |"
        assert any(line.startswith(f"| {start} |") and line.endswith(end) for line in theirs.splitlines())
    assert PUBLISHED.get(known.name) or "None that we have read." in theirs


@pytest.mark.parametrize("known", KNOWN_DRAFTS, ids=lambda known: known.name)
def test_cards_and_docs_agree_on_which_drafts_need_an_export(known):
    """vLLM wants the target's number of rows, and a checkpoint has one such number for targets that have several."""
    has_export = f"pard export {known.name} --target {known.example}" in committed(known.name).read_text()
    lines = (ROOT / "docs" / "serving.md").read_text().splitlines()
    [said] = [line for line in lines if line.startswith(f"| `{known.name}` |")]

    assert has_export == (len(known.vocab_sizes) > 1)
    assert said.endswith("| `pard export` |" if has_export else "| unchanged |")
    assert all(f"{size:,}" in said for size in known.vocab_sizes)


def test_no_card_names_a_folder_of_this_machine(name):
    assert str(Path.home()) not in committed(name).read_text()
    assert str(ROOT) not in committed(name).read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_transformers_snippets_run(name, stand_ins, capsys):
    snippet, engine = blocks(committed(name).read_text(), "python")
    if name == SMOLLM2_DRAFT and not has_smollm2():
        pytest.skip("SmolLM2 is not here")

    exec(compile(snippet, committed(name).name, "exec"), {})

    assert "def fibonacci(n):" in capsys.readouterr().out
    assert "assistant_model=draft" in snippet
    assert "with_pard(target)" in snippet or "load_pair(" in snippet
    compile(engine, committed(name).name, "exec")


def test_engine_snippets_name_draft_and_k(name):
    """The settings vLLM and TensorRT-LLM read, as JSON a shell hands over."""
    text = committed(name).read_text()
    shell = "".join(blocks(text, "bash"))
    config = json.loads(re.search(r"'(\{.*\})'", shell).group(1))

    assert config["method"] == "draft_model"
    assert config["parallel_drafting"] is True
    assert config["num_speculative_tokens"] == (8 if name in (*BUNDLED, SMOLLM2_DRAFT) else 12)
    served = config["model"]
    assert served == name or f"--output {served}" in shell
    engine = blocks(text, "python")[-1]
    assert "PARDDecodingConfig" in engine
    assert f'speculative_model="{served}"' in engine


# Cards of checkpoints


PROVENANCE = {
    "command": "pard train --base small --data answers.jsonl",
    "commit": "abc1234",
    "versions": {"torch": "2.13"},
    "device": "CPU",
    "base": "org/small",
    "target": "org/large",
    "step": 30,
    "settings": {"mask_token_id": 99, "num_draft_tokens": 8, "retention_rate": 0.7, "min_retention_rate": 0.2},
    "counts": {"num_rows": 1200, "num_tokens": 34567},
    "data": [
        {"file": "answers.jsonl", "sha256": "0", "manifest": {"sources": [{"source": "hub:org/set:train:prompt"}]}},
        {"file": "more.jsonl", "sha256": "0", "manifest": None},
    ],
    "metrics": {"eval_code_acceptance_length": 2.345, "eval_code_position_acceptance_1": 0.71},
}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "my-draft"
    make_draft(make_model("llama"), 4).save_pretrained(folder)
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
    return folder


def test_card_of_a_training_checkpoint():
    card = ModelCard(draft_card(PROVENANCE))
    data = card.data.to_dict()

    assert (data["base_model"], data["base_model_relation"]) == ("org/small", "finetune")
    assert data["datasets"] == ["org/set"]
    assert "| `code` | 2.35 | 0.71 |" in card.text
    for value in ("`pard train --base small --data answers.jsonl`", "8, 0.7, 0.2", "1,200, 34,567", "abc1234"):
        assert value in card.text
    assert '"org/large"' in card.text


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"base": None, "target": None, "settings": None, "counts": None, "data": None, "metrics": None},
        {"base": "folder: with 'odd\" words", "settings": {}, "data": [{"file": "x", "manifest": {"sources": [5]}}]},
        {"base": "a/b/c", "data": ["x", None], "versions": None, "metrics": {"loss": 1.0}},
        {"target": 'quoted "name"', "counts": {"num_rows": 5}, "metrics": {"eval_a_acceptance_length": 2.0}},
    ],
)
def test_card_of_a_checkpoint_never_fails(provenance):
    """It is written while training runs: whatever is missing or odd, a card comes out that can be read again."""
    card = ModelCard(draft_card(provenance))

    assert card.data.library_name == "transformers"
    assert "base_model" not in card.data.to_dict()


def test_card_command_renders_a_folder(checkpoint, capsys):
    assert main(["card", str(checkpoint), "--license", "mit", "--datasets", "org/a,org/b", "--language", "en"]) == 0

    card = ModelCard(capsys.readouterr().out)
    data = card.data.to_dict()
    assert (data["license"], data["datasets"], data["language"]) == ("mit", ["org/a", "org/b"], ["en"])
    assert f"| mask token (`pard_token`) | {MASK_TOKEN_ID} |" in card.text
    assert "| K, proposals a round | 4 |" in card.text
    assert "| layers × width | 2 × 32 |" in card.text
    assert str(checkpoint.parent) not in str(card)


def test_what_a_person_said_outlives_the_next_rendering(checkpoint, capsys):
    arguments = ["card", str(checkpoint), "--output", str(checkpoint / "README.md")]
    assert main([*arguments, "--license", "apache-2.0"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cards": ["README.md"]}
    assert main(arguments) == 0

    assert ModelCard.load(checkpoint / "README.md").data.license == "apache-2.0"


def test_results_of_a_folder_are_those_that_name_the_checkpoint(checkpoint, tmp_path):
    result = json.loads((RESULTS / "bundled_routes.json").read_text())
    folder = tmp_path / "results"
    folder.mkdir()
    for file, draft in (("mine.json", "my-draft"), ("other.json", "bundled")):
        (folder / file).write_text(json.dumps({**result, "draft": draft}))
    (folder / "enlarged.json").write_text(json.dumps({**result, "draft": "my-draft", "scale": ["a", "b"]}))
    (folder / "attention.json").write_text(json.dumps({"lengths": []}))

    source = card_source(str(checkpoint), [folder])

    assert [result["file"] for result in source.results] == ["mine.json"]
    assert model_card(source).data.eval_results


def test_missing_figures_are_said_to_be_missing():
    cell = {"prompts": "p", "num_prompts": 3, "batch_size": 1, "num_assistant_tokens": 8}
    routes = [{"route": "pld", "speedup": 1.25, "identical_share": 1.0}]
    result = {"file": "r.json", "cells": [{**cell, "routes": routes}]}

    text = str(model_card(CardSource(name="org/draft", results=(result,))))

    assert "| `p` | 3 | 1 | 8 | not measured | not measured | 1.25 | 100% |" in text
    assert "model-index" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a checkpoint or --all"),
        (["bundled-draft", "--all"], "a checkpoint or --all"),
        (["--all"], "--output"),
        (["--all", "--output", "cards", "--license", "mit"], "--license"),
        (["./nowhere"], "a folder or a Hub id"),
        (["bundled-draft", "--results", "nowhere.json"], "nowhere.json"),
        (["bundled-draft", "--results", str(ROOT / "pyproject.toml")], "got no JSON"),
        (["bundled-draft", "--results", str(RESULTS / "attention.json")], "`cells` or `sets`"),
    ],
)
def test_bad_input_ends_with_a_sentence(arguments, message, capsys):
    assert main(["card", *arguments]) == 2

    assert message in capsys.readouterr().err
