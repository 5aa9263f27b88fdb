"""A draft of a target's own layers in a small form: without what it shares with the target, matrices in 8 bit.

Only drafts inside this package are stored so; a draft that is trained, saved or pushed is a full checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..io import whole_file
from .addons import CORRECTION_HEAD
from .correction_head import CorrectionHead
from .model import PardDraftModel

WEIGHTS_FILE = "packaged.safetensors"
SCALE = ".scale"  # What the name of a matrix's scales ends with.


def save_packaged(draft: PardDraftModel, folder: Path) -> None:
    """Write a draft's config and weights, but for its embedding and LM head, which are to be the target's."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = {id(weight) for module in shared_modules(draft) for weight in module.parameters()}
    packed: dict[str, torch.Tensor] = {}
    for name, weight in draft.named_parameters():
        if id(weight) not in shared:
            packed |= packed_in_8_bit(name, weight.detach().cpu())
    with whole_file(folder / WEIGHTS_FILE) as written:
        save_file(packed, written)
    draft.config.save_pretrained(folder)
    draft.generation_config.save_pretrained(folder)


def is_packaged(folder: str | Path) -> bool:
    """Return whether a folder holds a draft as [`save_packaged`] writes it."""
    return (Path(folder) / WEIGHTS_FILE).is_file()


def load_packaged(folder: str | Path, target: PreTrainedModel) -> PardDraftModel:
    """Load a draft that [`save_packaged`] wrote, in the dtype and on the device of its target.

    Embedding and LM head are the target's memory, under parameters of the draft's own.

    Raises:
        ValueError: The target has another vocabulary or hidden size.
    """
    config = AutoConfig.from_pretrained(folder)
    own, theirs = ((c.get_text_config().vocab_size, c.get_text_config().hidden_size) for c in (config, target.config))
    if own != theirs:
        raise ValueError(
            f"Expected the target this draft was made of, with a vocabulary and hidden size of {own}, got {theirs}. "
            "Load another draft."
        )
    weights = unpacked(load_file(Path(folder) / WEIGHTS_FILE))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=target.dtype)
    for module, of_target in zip(shared_modules(model), shared_modules(target), strict=True):
        module.weight = nn.Parameter(of_target.weight.detach(), requires_grad=False)
    model.tie_weights()
    generation_config = GenerationConfig.from_pretrained(folder)
    draft = PardDraftModel.from_causal_lm(model, config.pard_token, generation_config.num_assistant_tokens)
    gate = weights.get(f"{CORRECTION_HEAD}.gate.weight")
    if gate is not None:
        draft.correction_head = CorrectionHead(*own, rank=len(gate)).to(target.dtype)
    unknown = draft.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"Expected weights of `{type(draft).__name__}`, got others: {', '.join(unknown)}.")
    return draft.to(target.device).eval()


def shared_modules(model: Any) -> tuple[Any, Any]:
    """Return what a draft of a target's layers shares with that target."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def packed_in_8_bit(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round a matrix to 8 bit, each row by its largest value; leave anything else in 16."""
    if weight.ndim != 2:
        return {name: weight.to(torch.bfloat16)}
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return {name: (weight / scale).round().to(torch.int8), f"{name}{SCALE}": scale.half()}


def unpacked(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights that [`packed_in_8_bit`] rounded, matrices in float32."""
    weights = {}
    for name, weight in packed.items():
        if not name.endswith(SCALE):
            scale = packed.get(f"{name}{SCALE}")
            weights[name] = weight if scale is None else weight.float() * scale.float()
    return weights
