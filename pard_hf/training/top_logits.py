"""A teacher's most probable tokens at each token of an answer, stored with it so that no teacher runs in training."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from ..draft.vocabulary import head_of
from ..host import input_device
from .losses import chunks

IDS, LOGPROBS = np.dtype("<i4"), np.dtype("<f2")
# The id where a token has no teacher, as those of a prompt.
NO_TOKEN = -1


class TopLogits(NamedTuple):
    """The ids of the k most probable tokens, `[num_tokens, k]` int32, and their log-probabilities in float16."""

    ids: np.ndarray
    logprobs: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; values are the base64 form of their bytes, little-endian, row by row."""
        ids, logprobs = (base64.b64encode(values.tobytes()).decode() for values in self)
        return {"k": self.ids.shape[1], "ids": ids, "logprobs": logprobs}

    @classmethod
    def from_json(cls, value: Any) -> TopLogits:
        """Read what [`to_json`] wrote; a `ValueError` says what is wrong with another value."""
        try:
            found = [
                np.frombuffer(base64.b64decode(value[name], validate=True), dtype).reshape(-1, value["k"])
                for name, dtype in (("ids", IDS), ("logprobs", LOGPROBS))
            ]
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise ValueError(f"its `top_logits` are not those that `pard data` writes ({error!r})") from error
        if found[0].shape != found[1].shape:
            raise ValueError(f"its `top_logits` have {len(found[0])} rows of ids and {len(found[1])} of logprobs")
        return cls(*found)

    @classmethod
    def joined(cls, parts: Sequence[TopLogits]) -> TopLogits:
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def at(self, loss_mask: Sequence[int]) -> TopLogits:
        """Spread the last rows over the tokens that are learned; a template may have dropped earlier answers."""
        is_learned = np.array(loss_mask, dtype=bool)
        spread = TopLogits(
            np.full((len(is_learned), self.ids.shape[1]), NO_TOKEN, IDS),
            np.zeros((len(is_learned), self.ids.shape[1]), LOGPROBS),
        )
        for values, own in zip(spread, self, strict=True):
            values[is_learned] = own[len(own) - is_learned.sum() :]
        return spread


@torch.no_grad()
def top_logits_of(
    target: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]], k: int, num_ids: int
) -> list[TopLogits]:
    """Run a target once over answers, and keep the `k` most probable of the ids below `num_ids` at each token."""
    device, head = input_device(target), head_of(target)
    texts = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    # Padding on the right, which causal attention and recurrence do not see.
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
    hidden = target.base_model(input_ids=ids, use_cache=False).last_hidden_state
    found = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        before = hidden[index, len(prompt) - 1 : len(prompt) + len(answer) - 1]
        parts = []
        for rows in chunks(len(before), num_ids, before.device):
            top = head(before[rows]).float().log_softmax(dim=-1)[:, :num_ids].topk(k, dim=-1)
            parts.append(TopLogits(top.indices.cpu().numpy().astype(IDS), top.values.cpu().numpy().astype(LOGPROBS)))
        found.append(TopLogits.joined(parts))
    return found
