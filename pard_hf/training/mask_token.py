"""Which ids may stand for a token not yet known: those a tokenizer never produces."""

from __future__ import annotations

from typing import Any


def check_mask_token(tokenizer: Any, mask_token_id: int) -> None:
    """Raise a `ValueError` for an id that text or the template may contain; reserved special tokens are fine."""
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    added = tokenizer.added_tokens_decoder.get(mask_token_id)
    is_reserved = added is not None and added.special and mask_token_id not in used
    if mask_token_id in tokenizer.get_vocab().values() and not is_reserved:
        raise ValueError(
            f"Expected a mask token the tokenizer never produces, got {mask_token_id}, which is "
            f"{tokenizer.convert_ids_to_tokens(mask_token_id)!r}. Take a reserved special token, or an id from "
            f"{len(tokenizer)} on where the model's vocabulary is larger."
        )
