"""Drafting over a part of the vocabulary: a smaller head product, and the output stays what it was.

VocabTrim, https://huggingface.co/papers/2506.22694: tokens that a target hardly ever says need no logit of the
draft's. A token that is never proposed costs a round its rest; no token is ever lost, for the target verifies over
all of its own. Knows a head's rows; knows nothing of decoding and of files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from .language_model_head import head_of


class TrimmedVocabulary(nn.Module):
    """The rows of a draft's head that are kept.

    Args:
        model ([`PreTrainedModel`]):
            The draft, whose rows are copied; they do not follow it through training.
        token_ids (`torch.LongTensor` of shape `(num_kept,)`):
            Ids that may be proposed, ascending.
    """

    token_ids: torch.Tensor

    def __init__(self, model: PreTrainedModel, token_ids: torch.Tensor):
        super().__init__()
        head = model.get_output_embeddings()
        self.vocab_size = head.weight.shape[0]
        token_ids = token_ids.to(head.weight.device)
        self.register_buffer("token_ids", token_ids)
        with torch.no_grad():
            bias = getattr(head, "bias", None)
            self.head = nn.Linear(head.weight.shape[1], len(token_ids), bias is not None, device="meta")
            self.head.weight = nn.Parameter(head.weight[token_ids].clone(), requires_grad=False)
            if bias is not None:
                self.head.bias = nn.Parameter(bias[token_ids].clone(), requires_grad=False)

    def logits(self, model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        """From last hidden states `(..., hidden_size)` to logits `(..., vocab_size)`, -inf where nothing was kept."""
        kept = head_of(model, self.head)(hidden.to(self.head.weight.device))
        whole = kept.new_full((*kept.shape[:-1], self.vocab_size), -torch.inf)
        return whole.index_copy(-1, self.token_ids, kept)


def kept_token_ids(
    kept: Iterable[int] | str | Path, vocab_size: int, mask_token_id: int, keep: int | None = None
) -> torch.Tensor:
    """Ids to keep, ascending.

    Args:
        kept (`Iterable[int]` or `str`):
            The ids, or a file of counts as `pard data` writes it: a JSON object with `token_counts`, from ids to how
            often the target said them.
        vocab_size (`int`) and mask_token_id (`int`):
            Of the draft; its mask token is never proposed.
        keep (`int`, *optional*):
            How many, the most frequent first; all of them by default.

    Raises:
        ValueError: There are none, one lies outside the vocabulary, or the file holds no counts.
    """
    if isinstance(kept, str | Path):
        counts = read_counts(Path(kept))
        ids = sorted(counts, key=lambda token: (-counts[token], token))
    else:
        ids = list(dict.fromkeys(int(token) for token in kept))
    wrong = [token for token in ids if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(f"Expected token ids in [0, {vocab_size}), the draft's vocabulary, got {wrong[0]}.")
    if keep is not None and keep < 1:
        raise ValueError(f"Expected `keep` of at least 1, got {keep}.")
    ids = [token for token in ids if token != mask_token_id][:keep]
    if not ids:
        raise ValueError("Expected token ids to keep, got none.")
    return torch.tensor(sorted(ids))


def read_counts(file: Path) -> dict[int, int]:
    """Counts of tokens from a JSON file."""
    try:
        counts = json.loads(file.read_text(encoding="utf-8"))["token_counts"]
        return {int(token): int(count) for token, count in counts.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected a JSON object with `token_counts` in `{file.name}`, got something else. `pard data` writes one."
        ) from error
