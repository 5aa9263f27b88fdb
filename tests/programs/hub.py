"""Started by `test_hub.py` with the address of a Hub in its environment: calls in, what came of each as JSON out.

Reads a list of `[function, arguments, keywords]` from standard input. A process of its own, because `huggingface_hub`
reads its environment once.
"""

import hashlib
import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pard_hf import PardDraftModel, load_pair
from pard_hf.hub.checkpoint import read_json
from pard_hf.hub.export import export_draft


def described(draft):
    """A draft in values that JSON can hold, its proposals among them."""
    ids = torch.tensor([[5, 6, 7]])
    return {
        "mask_token_id": draft.mask_token_id,
        "num_assistant_tokens": draft.num_assistant_tokens,
        "architecture": type(draft).__name__,
        "proposals": draft.draft(ids).argmax(-1).tolist(),
        "weights": hashlib.sha256(draft.lm_head.weight.detach().numpy().tobytes()).hexdigest(),
    }


def load(name, **keywords):
    return described(PardDraftModel.from_pretrained(name, **keywords))


def load_for(target, is_live=False, **keywords):
    if is_live:
        target = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target))
    return described(PardDraftModel.for_target(target, **keywords))


def push(folder, repo_id, with_tokenizer=True, **keywords):
    tokenizer = AutoTokenizer.from_pretrained(folder) if with_tokenizer else None
    PardDraftModel.from_pretrained(folder).push_to_hub(repo_id, tokenizer=tokenizer, **keywords)


def push_again(name, repo_id, **keywords):
    """From one repository to another; the tokenizer comes along from where the draft came from."""
    PardDraftModel.from_pretrained(name).push_to_hub(repo_id, **keywords)


def load_both(target, draft):
    load_pair(target, draft, device="cpu")


def encode(name, text):
    return AutoTokenizer.from_pretrained(name)(text)["input_ids"]


def export(name, output):
    return read_json(export_draft(name, output), "config.json")["pard_token"]


def outcome(name, arguments, keywords):
    try:
        return {"value": globals()[name](*arguments, **keywords)}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "is_os_error": isinstance(error, OSError)}


print(json.dumps([outcome(*call) for call in json.load(sys.stdin)]))
