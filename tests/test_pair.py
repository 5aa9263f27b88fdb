"""Loading a pair: what `dtype="auto"` means on which device, and a real model by name."""

import json

import pytest
import torch
from families import make_draft, make_model

from pard_hf import bundled_pair, load_pair, loading
from pard_hf.cli import main
from pard_hf.loading import weight_dtype


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch):
    """A CPU that multiplies fast in bfloat16: speed is no reason to give up equal texts."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": True})


@pytest.fixture
def folders(tmp_path, bundled_like_tokenizer):
    """A pair whose checkpoints say float16."""
    make_model("llama", max_position_embeddings=256).to(torch.float16).save_pretrained(tmp_path / "target")
    make_draft(make_model("llama", max_position_embeddings=256), 4).save_pretrained(tmp_path / "draft")
    for name in ("target", "draft"):
        bundled_like_tokenizer.save_pretrained(tmp_path / name)
    return str(tmp_path / "target"), str(tmp_path / "draft")


def dtypes(pair):
    return [model.dtype for model in (pair.target, pair.draft)]


def test_auto_is_float32_on_a_cpu(folders):
    assert dtypes(load_pair(device="cpu")) == [torch.float32] * 2
    assert dtypes(load_pair(*folders, device="cpu")) == [torch.float32] * 2
    assert dtypes(load_pair(*folders, dtype="bfloat16", device="cpu")) == [torch.bfloat16] * 2


def test_auto_is_the_checkpoints_dtype_elsewhere(folders):
    """The device `meta` is not a CPU, and every machine has it."""
    assert dtypes(load_pair(device="meta")) == [torch.bfloat16] * 2
    assert dtypes(load_pair(*folders, device="meta")) == [torch.float16] * 2
    assert dtypes(load_pair(*folders, dtype=torch.float32, device="meta")) == [torch.float32] * 2


def test_the_dtype_is_known_before_loading(folders):
    for device in ("cpu", "meta"):
        for dtype in ("auto", "bfloat16", torch.float64):
            loaded = load_pair(*folders, dtype=dtype, device=device).target.dtype
            assert weight_dtype(folders[0], dtype, device) == loaded
    assert weight_dtype(bundled_pair().target, "auto", "cuda:0") == torch.bfloat16
    with pytest.raises(ValueError, match="Expected a dtype such as"):
        weight_dtype(folders[0], "float33", "cpu")


def test_commands_measure_in_float32_on_a_cpu(folders, capsys):
    pair = ["--target", folders[0], "--draft", folders[1], "--device", "cpu", "--max-new-tokens", "4"]
    settings = ["--limit", "1", "--repeats", "1", "--routes", "tier2"]

    assert main(["demo", *pair, "--repeats", "1"]) == 0
    assert "· float32 ·" in capsys.readouterr().out
    assert main(["bench", *pair, *settings, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"


def test_commands_do_without_a_draft(folders, capsys, monkeypatch):
    """By its folder, or by its name: nothing else is downloaded, and a result tells of no draft."""
    monkeypatch.setattr(loading, "smollm2_folder", lambda: folders[0])
    settings = ["--device", "cpu", "--max-new-tokens", "8"]

    for target in (folders[0], "smollm2"):
        assert main(["generate", "abcabcabc", "--target", target, "--lookup", "--json", *settings]) == 0
        assert json.loads(capsys.readouterr().out)["num_new_tokens"] == 8
    measured = ["--limit", "1", "--repeats", "1", "--routes", "tier2,lookup", "--lookup", "6"]
    assert main(["bench", "--target", "smollm2", *settings, *measured, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    [cell] = result["cells"]
    assert (result["target"], result["prompt_lookup_num_tokens"]) == ("smollm2", 6)
    assert "draft" not in result
    assert [route["route"] for route in cell["routes"]] == ["ar", "lookup"]
    assert "PARD tier 2: not served: it needs a draft" in captured.err


@pytest.mark.parametrize(("device", "bytes_per_weight"), [("cpu", 4), ("meta", 2)])
def test_the_web_demo_counts_the_bytes_that_will_be_loaded(monkeypatch, device, bytes_per_weight):
    room = pytest.importorskip("demo.room")
    paths = bundled_pair()
    num_weights = sum(map(room.num_weights, map(room.Path, paths)))
    needed = room.needed_memory(paths, device)
    assert needed == pytest.approx(bytes_per_weight * num_weights, rel=0.05)
    monkeypatch.setattr(room, "total_memory", lambda device: needed - 1)

    with pytest.raises(ValueError, match="Expected models of less than"):
        room.needed_memory(paths, device)
