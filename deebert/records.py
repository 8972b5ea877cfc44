"""A record: the logits of every ramp for the rows of one split. What every analysis feeds on.

Knows nothing of models or tasks: arithmetic on it needs neither.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Record:
    """Logits of every ramp for N rows of a split, in the order of the rows.

    Attributes:
        split: name of the split.
        logits_NLC: (N, L, C) float32; the last ramp is the final classifier.
        labels_N: (N,) class ids or values; None where the split carries no labels.
        index_N: (N,) position of the row in its split.
        length_N: (N,) number of tokens.
        group_N: (N,) the task's group column (difficulty grade), or None.
    """

    split: str
    logits_NLC: Tensor
    labels_N: Tensor | None
    index_N: Tensor
    length_N: Tensor
    group_N: Tensor | None = None

    @property
    def num_layers(self) -> int:
        return self.logits_NLC.shape[1]

    def __len__(self) -> int:
        return len(self.index_N)

    @classmethod
    def from_batches(cls, split: str, batches: list[dict[str, Tensor]]) -> "Record":
        """Join the outputs of evaluation steps (of every process), in row order, each row once.

        A row may come twice: processes that share a split are given equally many batches.
        """
        joined = {key: torch.cat([batch[key].cpu() for batch in batches]) for key in batches[0]}
        order = joined["index"].argsort(stable=True)
        index = joined["index"][order]
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        rows = order[first]
        return cls(
            split,
            joined["logits"][rows].float(),
            joined["labels"][rows] if "labels" in joined else None,
            joined["index"][rows],
            joined["length"][rows],
            joined["group"][rows] if "group" in joined else None,
        )
