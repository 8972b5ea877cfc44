"""Split one file of rows into a training part and a validation part, and say what is odd in them.

The same rows, share and seed give the same parts, so every stage and every evaluation sees the same
split. The module does not know files, tokens or models.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from deebert.errors import UserError

if TYPE_CHECKING:
    import datasets  # not when a task is read: the import takes a second

# A user is warned if the largest class has `UNEVEN` times the rows of the smallest, or a class has
# fewer than `FEW` rows to train on.
UNEVEN, FEW = 10, 10


class OwnFolder(str):
    """A folder with a file for each split. Its own files count, and no folder in it."""


@dataclass
class SplitFile:
    """A file that is split into the rows to train on and the rows to validate on.

    Attributes:
        path: the file.
        share: the share of the rows to validate on, between 0 and 1.
        seed: of the split.
        rows: all rows of the file, once `loading` has read them.
    """

    path: str
    share: float
    seed: int
    rows: "datasets.Dataset | None" = field(default=None, repr=False, compare=False)

    def parts(
        self, rows: "datasets.Dataset", *, by_label: bool
    ) -> "tuple[datasets.Dataset, datasets.Dataset]":
        """Split the rows; each class with two rows or more has one in each part.

        Args:
            rows: all rows of the file.
            by_label: whether each class is split for itself.

        Returns:
            The training rows and the validation rows, both in the order of the file.

        Raises:
            UserError: the rows are too few for two parts.
        """
        labels = np.array(rows["label"][:]) if by_label else np.zeros(len(rows))
        random = np.random.default_rng(self.seed)
        chosen: list[int] = []
        for label in np.unique(labels):
            of_label = np.flatnonzero(labels == label)
            if len(of_label) >= 2:  # a single row is trained on
                number = min(max(round(len(of_label) * self.share), 1), len(of_label) - 1)
                chosen += random.permutation(of_label)[:number].tolist()
        if not chosen:
            raise UserError(
                f"data.file={self.path}: {len(rows)} rows are too few to train and validate on"
            )
        rest = np.setdiff1d(np.arange(len(rows)), chosen)
        return rows.select(rest.tolist()), rows.select(sorted(chosen))


def summary(train: Sequence[int], validation: int, labels: Sequence[str] | None) -> str:
    """Say how many rows there are, and how many training rows each class has.

    Args:
        train: the labels of the training rows.
        validation: the number of validation rows.
        labels: the names of the classes, or None for a regression.
    """
    rows = f"{len(train):,} rows to train on, {validation:,} to validate on"
    if labels is None:
        return rows
    counts = Counter(train)
    most = [f"{labels[label]} {counts[label]:,}" for label in range(len(labels))][:10]
    return f"{rows}; labels: {', '.join(most)}{', ...' * (len(labels) > 10)}"


def oddities(
    train: "datasets.Dataset", validation: "datasets.Dataset", labels: Sequence[str] | None
) -> list[str]:
    """Return what a user should know of the rows: uneven classes, and texts in both parts.

    Args:
        train: the training rows.
        validation: the validation rows.
        labels: the names of the classes, or None for a regression.

    Returns:
        At most two sentences.
    """
    sentences = []
    if labels is not None:
        counts = {label: 0 for label in range(len(labels))} | Counter(train["label"][:])
        rarest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        if counts[rarest] < FEW or counts[rarest] * UNEVEN <= counts[largest]:
            sentences.append(
                f"the labels are uneven: {counts[rarest]:,} training rows of {labels[rarest]!r}, "
                f"{counts[largest]:,} of {labels[largest]!r}; accuracy says little of rare "
                "labels, and f1_macro says more"
            )
    seen = {*_texts(train)}
    if again := sum(texts in seen for texts in _texts(validation)):
        sentences.append(
            f"texts of training rows stand again in {again:,} of {len(validation):,} validation "
            "rows, so the score on new texts may be lower; remove the duplicates"
        )
    return sentences


def _texts(rows: "datasets.Dataset") -> list[tuple[Any, ...]]:
    """Return the texts of each row, with one space between two words."""
    columns = [rows[name][:] for name in ("text_a", "text_b") if name in rows.column_names]
    return [tuple(" ".join(text.split()) for text in texts) for texts in zip(*columns, strict=True)]
