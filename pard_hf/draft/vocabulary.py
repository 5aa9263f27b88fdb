"""The LM head apart from a model's forward, and drafting over a part of the vocabulary.

VocabTrim, https://huggingface.co/papers/2506.22694: tokens that a target hardly ever emits need no draft logit.
One that is never proposed costs the rest of a round, not the token: the target verifies over its whole vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..host import input_device

Head = Callable[[torch.Tensor], torch.Tensor]


def head_of(model: PreTrainedModel, head: Head | None = None) -> Head:
    """Return the function from last hidden states to logits: the LM head (or `head`), then the family's transform.

    Gemma caps logits, Cohere multiplies and Granite divides them; `check_head` refuses families that do otherwise.
    """
    config, head = model.config.get_text_config(), head or model.get_output_embeddings()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden) if scale == 1.0 else head(hidden) * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return logits_of


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise a `ValueError` where the logits of a model's forward differ from those of `head_of`."""
    was_training = model.training
    ids = torch.tensor([[1, 2]], device=input_device(model))
    expected = model.eval()(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    got = head_of(model)(hidden).float()
    model.train(was_training)
    if not torch.allclose(got, expected, atol=1e-2, rtol=1e-2):
        raise ValueError(
            f"Expected the logits of `{type(model).__name__}` to be its LM head's output, got others (largest "
            f"difference {(got - expected).abs().max():.3g}). Take another base."
        )


class TrimmedVocabulary(nn.Module):
    """A copy of the LM head's rows for `token_ids` (`[num_kept]`, ascending), the ids that may be proposed."""

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
        """Map last hidden states `[..., hidden_size]` to logits `[..., vocab_size]`, -inf at tokens not kept."""
        kept = head_of(model, self.head)(hidden.to(self.head.weight.device))
        whole = kept.new_full((*kept.shape[:-1], self.vocab_size), -torch.inf)
        return whole.index_copy(-1, self.token_ids, kept)


def kept_token_ids(
    kept: Iterable[int] | str | Path, vocab_size: int, mask_token_id: int, keep: int | None = None
) -> torch.Tensor:
    """Return the ids to keep, ascending and without the mask token, which is never proposed.

    `kept`, `keep` and errors are those of [`PardDraftModel.trim_vocabulary`].
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
    """Read how often a target emitted each token id, from the JSON file that `pard data` writes."""
    try:
        counts = json.loads(file.read_text(encoding="utf-8"))["token_counts"]
        return {int(token): int(count) for token, count in counts.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected a JSON object with `token_counts` in `{file.name}`, got something else. `pard data` writes one."
        ) from error
