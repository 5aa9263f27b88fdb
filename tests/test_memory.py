"""What is remembered from call to call: by its owner only, for one target, in a file that is whole or refused."""

import copy
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from device import IS_FAKE, torch
from fake_device import FakeCuda
from families import make_draft, make_model, make_prompts, make_self_draft
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

from pard_hf import AssistantMemory, bundled_pair, with_pard, without_pard
from pard_hf.generation.compilation import compile_cache_of

NEW_TOKENS = 24
LOOKUP = {"prompt_lookup_num_tokens": 6}


def generate(target, prompts, **kwargs):
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **LOOKUP}
    return with_pard(target).generate(**prompts, **{**arguments, **kwargs})


def plain(target, prompts, **kwargs):
    return without_pard(target).generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)


def contents(memory):
    return {name: tensor.clone() for name, tensor in vars(memory.tables).items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def alike(one, other):
    """Learned from the same texts, up to the order in which a device adds counts up."""
    return all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def used_memory(target, prompts=None):
    memory = AssistantMemory(target)
    generate(target, prompts or make_prompts(1), assistant_memory=memory)
    return memory


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.1}, {"assistant_sources": ["successors"]}])
def test_second_call_proposes_better_and_says_the_same(batch_size, more):
    target, prompts = make_model("llama"), make_prompts(batch_size)
    expected = plain(target, prompts, **{k: v for k, v in more.items() if "assistant" not in k})
    memory = AssistantMemory(with_pard(target))

    outputs = [generate(target, prompts, assistant_memory=memory, **more) for _ in range(2)]
    without = generate(target, prompts, **more)

    assert all(torch.equal(output.sequences, expected) for output in [*outputs, without])
    assert outputs[0].stats == without.stats
    assert outputs[1].stats.acceptance_length > outputs[0].stats.acceptance_length
    assert outputs[1].stats.accepted_by_source["successors"] > outputs[0].stats.accepted_by_source["successors"]


def test_memory_pays_on_the_bundled_target():
    """Beside a draft as well."""
    target = AutoModelForCausalLM.from_pretrained(bundled_pair().target)
    inputs = AutoTokenizer.from_pretrained(bundled_pair().target)("The boy went to the river", return_tensors="pt")
    expected, memory = plain(target, inputs), AssistantMemory(target)

    rounds = []
    for _ in range(2):
        output = generate(target, inputs, assistant_memory=memory)
        rounds.append(output.stats.num_rounds)
        assert torch.equal(output.sequences, expected)
    alone = generate(target, inputs, assistant_model=make_self_draft(without_pard(target)), assistant_memory=memory)

    assert rounds[1] < rounds[0]
    assert torch.equal(alone.sequences, expected)


def test_memory_alone_asks_for_its_use():
    target = make_model("llama")
    memory = AssistantMemory(target)

    output = generate(target, make_prompts(1), prompt_lookup_num_tokens=None, assistant_memory=memory)

    assert output.stats.loop == "own"
    assert memory.num_tokens > 0


def test_calls_without_a_memory_do_not_meet():
    target, prompts = make_model("llama"), make_prompts(1)
    draft = make_draft(make_model("llama", seed=5))

    first = [generate(target, prompts, assistant_model=model).stats for model in (None, draft)]
    again = [generate(target, prompts, assistant_model=model).stats for model in (None, draft)]

    assert first == again


def test_memories_do_not_meet():
    target, prompts = make_model("llama"), make_prompts(1)
    memories = [AssistantMemory(target), AssistantMemory(target)]
    generate(target, prompts, assistant_memory=memories[0])

    assert same(contents(memories[1]), contents(AssistantMemory(target)))
    generate(target, prompts, assistant_memory=memories[1])
    assert alike(*map(contents, memories))


def test_clear_forgets_everything():
    target = make_model("llama")
    memory = used_memory(target)
    assert memory.num_tokens > 0
    assert not same(contents(memory), contents(AssistantMemory(target)))

    memory.clear()

    assert memory.num_tokens == 0
    assert same(contents(memory), contents(AssistantMemory(target)))


def test_config_and_model_are_left_as_they_were():
    """The memory does not enter the config of the model, nor the one that a caller passes."""
    target, prompts = with_pard(make_model("llama")), make_prompts(1)
    memory, config = AssistantMemory(target), copy.deepcopy(target.generation_config)
    before = target.generation_config.to_dict(), set(vars(target.generation_config)), set(vars(config))

    generate(target, prompts, assistant_memory=memory, assistant_reference_texts=[[5, 6]], generation_config=config)
    generate(target, prompts, assistant_memory=memory, assistant_reference_texts=[[5, 6]])

    after = target.generation_config.to_dict(), set(vars(target.generation_config)), set(vars(config))
    assert after == before
    assert memory.num_tokens > 0


@pytest.mark.parametrize("name", ["assistant_memory", "assistant_reference_texts"])
def test_other_assistants_take_no_memory(name):
    """Their loop would look up instead of asking them."""
    target = with_pard(make_model("llama"))
    value = AssistantMemory(target) if name == "assistant_memory" else [[5, 6]]

    with pytest.raises(ValueError, match=f"a `PardDraftModel` or no assistant for `{name}`, got `LlamaForCausalLM`"):
        generate(target, make_prompts(1), assistant_model=make_model("llama", seed=3), **{name: value})


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_memory_is_used_inside_and_outside_of_inference_mode(mode, tmp_path):
    target, prompts = make_model("llama"), make_prompts(1)
    with torch.inference_mode(mode == "inference"):
        memory = used_memory(target)
        memory.save(tmp_path / "memory")
        loaded = AssistantMemory.load(tmp_path / "memory", target)

    for one in (memory, loaded):
        with torch.inference_mode(mode != "inference"):
            generate(target, prompts, assistant_memory=one)
            one.clear()
        generate(target, prompts, assistant_memory=one)


# Files.


def test_file_holds_the_same_bits(tmp_path):
    target, prompts = make_model("llama"), make_prompts(1)
    memory = used_memory(target)
    memory.save(tmp_path / "memory.safetensors")

    loaded = AssistantMemory.load(tmp_path / "memory.safetensors", target)

    assert same(contents(memory), contents(loaded))
    assert [path.name for path in tmp_path.iterdir()] == ["memory.safetensors"]
    stats = [generate(target, prompts, assistant_memory=one).stats for one in (memory, loaded)]
    assert stats[0] == stats[1]
    assert alike(contents(memory), contents(loaded))
    assert loaded.num_bytes == sum(tensor.nbytes for tensor in contents(memory).values())
    loaded.save(str(tmp_path / "memory.safetensors"))
    assert same(contents(AssistantMemory.load(str(tmp_path / "memory.safetensors"), target)), contents(loaded))


def test_file_is_whole_or_not_written(tmp_path, monkeypatch):
    target = make_model("llama")
    path, memory = tmp_path / "memory.safetensors", used_memory(target)
    memory.save(path)
    before = path.read_bytes()

    def fail(path, data):
        with path.open("wb") as file:
            file.write(data[:99])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    generate(target, make_prompts(2), assistant_memory=memory)
    with pytest.raises(OSError, match="No space"):
        memory.save(path)

    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    memory.clear()  # It is not left locked.


def test_missing_file_is_an_os_error(tmp_path):
    target = make_model("llama")
    with pytest.raises(OSError, match="missing"):
        AssistantMemory.load(tmp_path / "missing", target)
    with pytest.raises(OSError, match="missing"):
        AssistantMemory(target).save(tmp_path / "missing" / "memory")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "header", "token", "probability"])
def test_damaged_file_is_refused(tmp_path, damage):
    target, path = make_model("llama"), tmp_path / "memory"
    used_memory(target).save(path)
    data = path.read_bytes()
    if damage in ("token", "probability"):
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        if damage == "token":
            tensors["after_two"][7, 1] = 100  # No token of this vocabulary: it would stop the device.
        else:
            tensors["after_one"][7, 9] = float("nan")
        save_file(tensors, path, metadata)
    else:
        path.write_bytes(
            {"cut": data[:-100], "garbage": bytes(64), "empty": b"", "header": data[:9] + b"?" + data[10:]}[damage]
        )

    with pytest.raises(ValueError, match="Expected a memory that `AssistantMemory.save` wrote, got .*Begin a new one"):
        AssistantMemory.load(path, target)


@pytest.mark.parametrize("other", ["a draft", "no metadata", "a later format", "other shapes", "a tensor less"])
def test_other_file_is_refused(tmp_path, other):
    target, path = make_model("llama"), tmp_path / "memory"
    used_memory(target).save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    if other == "a draft":
        tensors, metadata = {"weight": torch.zeros(3)}, {"format": "pt"}
    elif other == "no metadata":
        metadata = None
    elif other == "a later format":
        metadata["format"] = metadata["format"].replace(".1", ".2")
    elif other == "other shapes":
        tensors["weights"] = tensors["weights"][:, :-1].contiguous()
    else:
        del tensors["after_two"]
    save_file(tensors, path, metadata)

    with pytest.raises(ValueError, match="Expected a memory .*, got .*Begin a new one"):
        AssistantMemory.load(path, target)


# Another target.


def check_refused(target, memory, path, message):
    memory.save(path)
    before = contents(memory)
    with pytest.raises(ValueError, match=message):
        generate(target, make_prompts(1), assistant_memory=memory)
    with pytest.raises(ValueError, match=message):
        AssistantMemory.load(path, target)
    assert same(before, contents(memory))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (("qwen2", 0, {}), "class Qwen2ForCausalLM.*class LlamaForCausalLM"),
        (("llama", 0, {"vocab_size": 120}), "vocab_size 120.*vocab_size 100"),
        (("llama", 1, {}), "embeddings [0-9a-f]{16}.*embeddings [0-9a-f]{16}"),
    ],
)
def test_another_target_is_refused_by_name(target, message, tmp_path):
    family, seed, changes = target
    check_refused(make_model(family, seed, **changes), used_memory(make_model("llama")), tmp_path / "memory", message)


def test_grown_vocabulary_is_refused(tmp_path):
    target = make_model("llama")
    memory = used_memory(target)
    target.resize_token_embeddings(104)

    check_refused(target, memory, tmp_path / "memory", "vocab_size 104")


@pytest.mark.parametrize("wrapped", [False, True])
def test_copy_of_the_target_is_not_another(wrapped):
    """Nor is the model in another precision, or with the mixin."""
    target = make_model("llama")
    memory = used_memory(target)
    other = without_pard(copy.deepcopy(target))
    if wrapped:
        with_pard(other)

    memory.check(other)
    memory.check(other.bfloat16())


@pytest.mark.parametrize("memory", ["memory.safetensors", {}, True])
def test_what_is_no_memory_is_refused(memory):
    with pytest.raises(ValueError, match="Expected `assistant_memory` to be an `AssistantMemory`, got"):
        generate(make_model("llama"), make_prompts(1), assistant_memory=memory)


@pytest.mark.parametrize("with_draft", [False, True])
def test_beams_take_no_memory(with_draft):
    target = with_pard(make_model("llama"))
    more = {"assistant_model": make_draft(make_model("llama", seed=5))} if with_draft else {}

    with pytest.raises(ValueError, match="num_beams=1" if with_draft else "got beam_search"):
        generate(target, make_prompts(1), assistant_memory=AssistantMemory(target), num_beams=2, **more)


# One call at a time.


class Streamer:
    """Calls a function at some token."""

    def __init__(self, at, function):
        self.count, self.at, self.function = 0, at, function

    def put(self, tokens):
        self.count += 1
        if self.count == self.at:
            self.function()

    def end(self):
        pass


@pytest.mark.skipif(IS_FAKE, reason="the stand-in is of one thread")
def test_two_threads_on_one_memory_are_refused():
    target, prompts = make_model("llama"), make_prompts(1)
    memory, errors = AssistantMemory(target), []

    def meanwhile():
        try:
            generate(target, prompts, assistant_memory=memory)
        except ValueError as error:
            errors.append(str(error))

    def in_thread():
        thread = threading.Thread(target=meanwhile)
        thread.start()
        thread.join()

    output = generate(target, prompts, assistant_memory=memory, streamer=Streamer(9, in_thread))

    assert len(errors) == 1
    assert "that no other call is using" in errors[0]
    assert torch.equal(output.sequences, plain(target, prompts))
    assert memory.num_tokens > 0
    generate(target, prompts, assistant_memory=memory)


@pytest.mark.parametrize("action", ["generate", "save", "clear"])
def test_memory_in_use_is_not_touched(action, tmp_path):
    """From inside a streamer too."""
    target, prompts = make_model("llama"), make_prompts(1)
    memory = AssistantMemory(target)
    actions = {
        "generate": lambda: generate(target, prompts, assistant_memory=memory),
        "save": lambda: memory.save(tmp_path / "memory"),
        "clear": memory.clear,
    }

    with pytest.raises(ValueError, match="that no other call is using"):
        generate(target, prompts, assistant_memory=memory, streamer=Streamer(9, actions[action]))

    assert not list(tmp_path.iterdir())
    actions[action]()


@pytest.mark.parametrize("disable_compile", [True, False])
def test_memory_outlives_a_streamer_that_raises(disable_compile):
    """What was learned until then is kept, and the next call may use it."""
    target, prompts = make_model("llama"), make_prompts(1)
    memory = AssistantMemory(target)

    def stop():
        raise KeyboardInterrupt

    config = {"compile_config": CompileConfig(backend="eager", mode="default"), "disable_compile": disable_compile}
    with pytest.raises(KeyboardInterrupt):
        generate(target, prompts, assistant_memory=memory, streamer=Streamer(15, stop), **config)

    learned = memory.num_tokens
    assert learned > 0
    generate(target, prompts, assistant_memory=memory, **config)
    assert memory.num_tokens >= learned


# Compiled, and on a device.


@pytest.mark.skipif(IS_FAKE, reason="there is nothing to compile for")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("with_draft", [False, True])
def test_memory_goes_into_compiled_calls_and_out_again(backend, with_draft):
    target, prompts = make_model("llama", num_hidden_layers=1), make_prompts(1)
    expected = plain(target, prompts)
    draft = make_draft(make_model("llama", seed=5, num_hidden_layers=1)) if with_draft else None
    memories = [AssistantMemory(target), AssistantMemory(target)]
    config = {"compile_config": CompileConfig(backend=backend, mode="default"), "disable_compile": False}

    def outputs(memory, **more):
        return [generate(target, prompts, assistant_model=draft, assistant_memory=memory, **more) for _ in range(2)]

    eager, compiled = outputs(memories[0]), outputs(memories[1], **config)
    others = generate(target, prompts, assistant_model=draft, **config)

    assert compile_cache_of(target, draft or target).failure is None
    assert all(torch.equal(output.sequences, expected) for output in [*eager, *compiled, others])
    assert compiled[0].stats == eager[0].stats
    assert compiled[1].stats.num_rounds < compiled[0].stats.num_rounds
    assert others.stats == eager[0].stats  # What a caller's memory held is not in the buffers of the next call.
    assert memories[1].num_tokens > 0


def a_device():
    """CUDA where there is one, else its stand-in."""
    return nullcontext() if torch.cuda.is_available() or IS_FAKE else FakeCuda()


def on_the_cpu(prompts):
    return {name: tensor.cpu() for name, tensor in prompts.items()}


@pytest.mark.parametrize("disable_compile", [True, False])
@pytest.mark.parametrize("with_draft", [False, True])
def test_memory_follows_its_target_to_a_device(monkeypatch, disable_compile, with_draft):
    """One that began on the CPU serves the target on a GPU and stays where it is."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    target, prompts = make_model("llama").cpu(), on_the_cpu(make_prompts(1))
    expected, memory = plain(target, prompts), used_memory(target, prompts)
    learned = memory.num_tokens
    with a_device():
        target.cuda()
        prompts = {name: tensor.cuda() for name, tensor in prompts.items()}
        more = {"assistant_model": make_self_draft(without_pard(target))} if with_draft else {}

        output = generate(target, prompts, assistant_memory=memory, disable_compile=disable_compile, **more)

        assert torch.equal(output.sequences.cpu(), expected)
        assert memory.tables.weights.device.type == "cpu"
        assert memory.num_tokens >= learned


@pytest.mark.parametrize("disable_compile", [True, False])
def test_ids_may_lie_beside_the_target(monkeypatch, disable_compile):
    """As `generate` allows; buffers of calls whose ids lay on the device are no others' then."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    target, prompts = make_model("llama").cpu(), on_the_cpu(make_prompts(1))
    expected = plain(target, prompts)
    with a_device():
        memory = AssistantMemory(target.cuda())
        for device in ("cuda", "cpu", "cuda"):
            inputs = {name: tensor.to(device) for name, tensor in prompts.items()}
            for more in ({"assistant_memory": memory}, {"assistant_reference_texts": [[5, 6]]}):
                output = generate(target, inputs, disable_compile=disable_compile, max_new_tokens=6, **more)
                assert torch.equal(output.sequences.cpu(), expected[:, : output.sequences.shape[1]])
