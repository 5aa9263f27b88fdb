"""Started by `test_hub.py` with a cache and an address in its environment: calls in, what came of each as JSON out.

Reads a list of `[function, arguments]` from standard input. A process of its own, because `huggingface_hub` reads its
environment once.
"""

import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pard_hf import PardDraftModel, load_pair
from pard_hf.hub.engines import check_draft
from pard_hf.hub.export import export_draft


def described(draft):
    """A draft in values that JSON can hold, its proposals among them."""
    return [
        draft.mask_token_id,
        draft.num_assistant_tokens,
        draft.draft(torch.tensor([[5, 6, 7]])).argmax(-1).tolist(),
    ]


def load(name, revision="main"):
    return described(PardDraftModel.from_pretrained(name, revision=revision))


def load_for(target, num_assistant_tokens=None):
    return described(PardDraftModel.for_target(target, num_assistant_tokens=num_assistant_tokens))


def load_for_live(target):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target))
    return described(PardDraftModel.for_target(model))


def load_both(target, draft):
    load_pair(target, draft, device="cpu")


def encode(name, text):
    return AutoTokenizer.from_pretrained(name)(text)["input_ids"]


def check(name):
    return [finding.message for finding in check_draft(name)]


def export(name, output):
    return str(export_draft(name, output))


def outcome(name, arguments):
    try:
        return {"value": globals()[name](*arguments)}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "is_os_error": isinstance(error, OSError)}


print(json.dumps([outcome(*call) for call in json.load(sys.stdin)]))
