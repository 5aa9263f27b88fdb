"""From token sequences to batches of kept rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch

from .cod import attention_mask, build_rows, keep_rows


@dataclass
class DataCollatorForPard:
    """Builds the rows that conditional drop-token keeps, and nothing else.

    Args:
        mask_token_id (`int`):
            Id fed where a token is not known yet.
        num_draft_tokens (`int`, *optional*, defaults to 8):
            K_train: depths 0 … K_train - 1. At inference K may be larger; 1 is ordinary language modeling.
        retention_rate (`float`, *optional*, defaults to 0.7) and min_retention_rate (`float`, defaults to 0.2):
            Depth `d` keeps `max(r ** d, r_min)` of its rows.
        seed (`int`, *optional*, defaults to 0):
            Which rows are dropped follows from the seed and the batch, so a resumed run drops the same ones.
    """

    mask_token_id: int
    num_draft_tokens: int = 8
    retention_rate: float = 0.7
    min_retention_rate: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_draft_tokens < 1:
            raise ValueError(f"Expected `num_draft_tokens` of at least 1, got {self.num_draft_tokens}.")
        for name in ("retention_rate", "min_retention_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Expected `{name}` in [0, 1], got {getattr(self, name)}.")

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate examples with `input_ids` and, optionally, `loss_mask` (1 = learn this token; all by default).

        Returns:
            `input_ids`, `position_ids`, `labels` and `shift_labels` of shape `(batch_size, num_rows)`, and the boolean
            `attention_mask` of shape `(batch_size, 1, num_rows, num_rows)`. Labels are already shifted, hence the
            second name, by which the host's loss knows them.

        Raises:
            ValueError: An example is shorter than 2 tokens or its loss mask is of another length.
        """
        checksum = crc32(str(self.seed).encode())
        for example in examples:
            checksum = crc32(torch.tensor(example["input_ids"], dtype=torch.long).numpy().tobytes(), checksum)
        generator = torch.Generator().manual_seed(checksum)
        rows = [self.rows_of(example, generator) for example in examples]
        longest = max(len(row["anchors"]) for row in rows)
        # Padding rows carry anchor -1: no label, and no real row sees them.
        fill = {"input_ids": 0, "position_ids": 0, "labels": -100, "anchors": -1, "depths": 0}
        batch = {
            name: torch.stack(
                [torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows]
            )
            for name, value in fill.items()
        }
        mask = attention_mask(batch.pop("anchors"), batch.pop("depths"))
        return {**batch, "shift_labels": batch["labels"], "attention_mask": mask.unsqueeze(1)}

    def rows_of(self, example: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The kept rows of one example, with their anchors and depths."""
        ids = torch.tensor(example["input_ids"], dtype=torch.long)
        is_label = torch.tensor(example.get("loss_mask", [1] * len(ids)), dtype=torch.bool)
        if len(ids) < 2 or len(is_label) != len(ids):
            raise ValueError(
                f"Expected a training row of at least 2 tokens and a loss mask of its length, got {len(ids)} tokens "
                f"and a mask of {len(is_label)}. Drop such rows (`pard train` reports their lines)."
            )
        is_label[0] = False
        anchors, depths = keep_rows(
            is_label, self.num_draft_tokens, self.retention_rate, self.min_retention_rate, generator
        )
        return {
            **build_rows(ids, is_label, anchors, depths, self.mask_token_id),
            "anchors": anchors,
            "depths": depths,
        }
