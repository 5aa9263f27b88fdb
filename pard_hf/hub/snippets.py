"""How a draft is used: in transformers on both tiers, in vLLM, in TensorRT-LLM."""

from __future__ import annotations

TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from pard_hf import {names}

tokenizer = AutoTokenizer.from_pretrained({target})
target = AutoModelForCausalLM.from_pretrained({target}, dtype="auto", device_map="auto")
draft = PardDraftModel.from_pretrained({draft}, dtype="auto", device_map="auto")
inputs = tokenizer("def fibonacci(n):", return_tensors="pt", return_token_type_ids=False).to(target.device)

# The stock loop of transformers, on an untouched target
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=64)

# Our loop: batches, static cache, torch.compile
output = with_pard(target).generate(**inputs, assistant_model=draft, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""

VLLM = """```bash
{export}vllm serve {target} --speculative-config \\
  '{{"method": "draft_model", "model": "{draft}", "num_speculative_tokens": {num_drafts}, "parallel_drafting": true}}'
```"""

TENSORRT_LLM = """```python
from tensorrt_llm import LLM
from tensorrt_llm.llmapi import PARDDecodingConfig

llm = LLM(
    "{target}",
    speculative_config=PARDDecodingConfig(max_draft_len={num_drafts}, speculative_model="{draft}"),
)
```"""

EXPORTED = "served-draft"


def transformers_snippet(draft: str, target: str) -> str:
    """Both tiers. Names are Python expressions: quoted Hub ids, or attributes of `bundled_pair()`."""
    is_bundled = "bundled_pair()" in draft
    names = ", ".join(["PardDraftModel", *(["bundled_pair"] if is_bundled else []), "with_pard"])
    return TRANSFORMERS.format(names=names, draft=draft, target=target)


def engine_snippets(draft: str, target: str, num_drafts: int, is_exported: bool) -> str:
    """vLLM and TensorRT-LLM, on the checkpoint itself or on an exported one.

    Args:
        draft (`str`) and target (`str`):
            Hub ids or folders.
        num_drafts (`int`):
            K.
        is_exported (`bool`):
            Whether the checkpoint needs the target's vocabulary size first.
    """
    export = f"pard export {draft} --target {target} --output {EXPORTED}\n" if is_exported else ""
    served = EXPORTED if is_exported else draft
    vllm = VLLM.format(export=export, target=target, draft=served, num_drafts=num_drafts)
    tensorrt = TENSORRT_LLM.format(target=target, draft=served, num_drafts=num_drafts)
    reason = " It wants the target's vocabulary size, which `pard export` gives the draft." if is_exported else ""
    return f"vLLM, 0.16 and later.{reason}\n\n{vllm}\n\nTensorRT-LLM, PyTorch backend:\n\n{tensorrt}"
