"""The pair that ships with the package: small enough, loadable, and what its card says."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pard_hf
from pard_hf import PardDraftModel, bundled_pair, load_pair
from pard_hf.host import without_head

ROOT = Path(pard_hf.__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "bundled_pair.json"


@pytest.fixture(scope="module")
def pair():
    return load_pair(dtype="float32")


def test_sizes(pair):
    files = [file for path in bundled_pair() for file in Path(path).rglob("*.safetensors")]

    assert sum(file.stat().st_size for file in files) <= 40e6
    assert max(file.stat().st_size for file in files) <= 15e6
    assert pair.target.num_parameters() >= 6 * without_head(pair.draft).num_parameters()
    assert pair.target.config.num_hidden_layers >= 12
    assert pair.draft.config.num_hidden_layers >= 4


def test_draft_has_the_layout_engines_load():
    config = json.loads((Path(bundled_pair().draft) / "config.json").read_text())

    assert config["spd_type"] == "pard"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert PardDraftModel.from_pretrained(bundled_pair().draft).mask_token_id == config["pard_token"]


def test_mask_token_is_never_produced(pair):
    assert pair.draft.mask_token_id not in pair.tokenizer.get_vocab().values()
    assert pair.draft.mask_token_id < pair.target.config.vocab_size


PROMPTS = [
    'def add(a, b):\n    """Return the sum of a and b."""\n',
    "Sara has 4 bags with 6 apples each. She eats 3 apples. How many apples are left?\n",
    "class Stack:\n",
]


def encode(pair, prompt):
    return pair.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)


def test_real_text_is_identical_and_drafted(pair):
    """Both tiers, on words: same text as plain `generate`, in fewer target forwards."""
    untouched = AutoModelForCausalLM.from_pretrained(bundled_pair().target, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        inputs = encode(pair, prompt)
        plain = untouched.generate(**inputs, max_new_tokens=48, do_sample=False)
        tier_1 = untouched.generate(**inputs, max_new_tokens=48, do_sample=False, assistant_model=pair.draft)
        tier_2 = pair.target.generate(
            **inputs, max_new_tokens=48, do_sample=False, assistant_model=pair.draft, return_dict_in_generate=True
        )
        assert torch.equal(plain, tier_1)
        assert torch.equal(plain, tier_2.sequences)
        assert tier_2.stats.num_rounds < tier_2.stats.num_tokens


def test_a_batch_of_real_text_is_identical(pair):
    inputs = pair.tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)

    plain = pair.target.generate(**inputs, max_new_tokens=32, do_sample=False)
    ours = pair.target.generate(**inputs, max_new_tokens=32, do_sample=False, assistant_model=pair.draft)

    assert torch.equal(plain, ours)


def test_it_learned_to_stop(pair):
    inputs = encode(pair, PROMPTS[1])

    text = pair.target.generate(**inputs, max_new_tokens=160, do_sample=False, assistant_model=pair.draft)

    assert text[0, -1] == pair.tokenizer.eos_token_id


def test_template_is_the_training_template(pair):
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "#### 4"}]

    ids = pair.tokenizer.apply_chat_template(messages, return_dict=False)

    assert ids == [0, *pair.tokenizer("2 + 2?\n#### 4", add_special_tokens=False)["input_ids"], 1]


def figures_of_pair(name):
    """Every figure of a prompt set in the pair's own result, as documents write it."""
    part = json.loads(RESULTS.read_text())["sets"][name]
    acceptance, routes = part["acceptance"], part["speed"]["routes"].values()
    yield from (f"{acceptance[key]:.2f}" for key in ("acceptance_length", "acceptance_rate"))
    yield from (f"{acceptance[f'repeated_4gram_share{of}']:.3f}" for of in ("", "_of_references"))
    yield from (str(acceptance["num_prompts"]), f"{acceptance['identical_share']:.0%}")
    yield from (f"{route['speedup']:.2f}" for route in routes)


def test_every_figure_is_in_the_results():
    """Rows of the pair's tables are made of what the benchmarks wrote."""
    text = (ROOT / "pard_hf" / "bundled" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", text, flags=re.MULTILINE)

    assert len(rows) >= 2
    for name, cells in rows:
        assert {cell.strip() for cell in cells.split("|")} <= set(figures_of_pair(name)), name
