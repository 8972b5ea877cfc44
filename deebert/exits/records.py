"""A record: the logits of every ramp for the rows of one split. Every analysis works on records.

The module knows nothing of models, tasks or files (`hub.record_files` reads and writes records).
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deebert.errors import UserError
from deebert.models.quantization import Quantization


@dataclass(frozen=True)
class Record:
    """Logits of every ramp for N rows of a split, in the order of the rows.

    Attributes:
        split: name of the split.
        logits_NLC: (N, L, C) float32; the last ramp is the final classifier.
        labels_N: (N,) class ids or values; None where the split carries no labels.
        index_N: (N,) position of each row in its split.
        length_N: (N,) number of tokens.
        group_N: (N,) values of the task's group column (difficulty grade), or None.
        learned_score_NL: (N, L) learned exit scores, or None where the ramps have none.
        precision: the precision of the model that gave the logits, such as bfloat16.
        quantization: how the model was rounded, if the precision is int8.
    """

    split: str
    logits_NLC: Tensor
    labels_N: Tensor | None
    index_N: Tensor
    length_N: Tensor
    group_N: Tensor | None = None
    learned_score_NL: Tensor | None = None
    precision: str = "float32"
    quantization: Quantization | None = None

    @property
    def num_layers(self) -> int:
        return self.logits_NLC.shape[1]

    def __len__(self) -> int:
        return len(self.index_N)

    def rows(self, chosen: Tensor) -> "Record":
        """Return a record of some of the rows, which indices or a mask (N,) select."""
        changes: Any = {name: values[chosen] for name, values in self.tensors().items()}
        return replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by the names of their attributes."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: values for name, values in columns.items() if isinstance(values, Tensor)}

    def check(self) -> None:
        """Check that all logits are finite.

        Raises:
            UserError: logits are not finite.
        """
        if not (finite := self.logits_NLC.isfinite().flatten(1).all(1)).all():
            raise UserError(
                f"{(~finite).sum()} of {len(self)} rows of split {self.split!r} have logits that "
                "are not finite: training diverged; lower stages.1.lr or stages.2.lr"
            )

    @classmethod
    def from_batches(
        cls, split: str, batches: list[dict[str, Tensor]], precision: str = "float32"
    ) -> "Record":
        """Join the outputs of the evaluation steps of all processes, in row order, each row once.

        A row may come twice, because processes that share a split get equally many batches.

        Args:
            split: name of the split.
            batches: `logits`, `index` and `length` of each batch, and where they exist `labels`,
                `group` and `learned_score`.
            precision: the precision of the model.
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
            joined["learned_score"][rows].float() if "learned_score" in joined else None,
            precision,
        )


def unlike(ours: Record, theirs: Record) -> str | None:
    """Describe a clear difference between the rows of two splits; None if there is none.

    Thresholds that are chosen on one of two different splits may not fit the other. Two
    Kolmogorov-Smirnov tests compare what is known of a row without its label: its length, and the
    largest probability at full depth. An example is GLUE's SST-2, which has phrases in train and
    sentences in validation.
    """
    from scipy import stats  # not at the top, because the import takes a second

    largest = [torch.softmax(r.logits_NLC[:, -1], -1).amax(-1).numpy() for r in (ours, theirs)]
    lengths = [r.length_N.numpy() for r in (ours, theirs)]
    for name, (a, b) in (("tokens", lengths), ("largest probability at full depth", largest)):
        test = stats.ks_2samp(a, b)
        if test.pvalue < 0.0005 and test.statistic > 0.1:  # not by chance, and by enough to matter
            return f"{name} {np.mean(a):.3g} against {np.mean(b):.3g} on average"
    return None
