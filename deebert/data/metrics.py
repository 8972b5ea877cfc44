"""Metrics of predictions and labels.

Accuracy, F1 and Matthews' correlation come from counts of rows for each class; the correlations of
a regression come from the values. The module does not know tasks, splits or models.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
from torch import Tensor


class Counts(NamedTuple):
    """Numbers of rows for each class, as floats (..., C). The bootstrap has many draws of them.

    Attributes:
        hits: the rows with this label that get this answer.
        labels: the rows with this label.
        predictions: the rows that get this answer.
    """

    hits: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray

    @classmethod
    def of(
        cls, labels_K: Tensor, predictions_K: Tensor, num_labels: int, rows: Tensor | None = None
    ) -> Self:
        """Count the rows of K pairs of a label and a prediction.

        Args:
            labels_K: class ids.
            predictions_K: class ids.
            num_labels: the number of classes C.
            rows: the number of rows with each pair, (..., K) of double; None for one row a pair.
        """
        right_K = labels_K == predictions_K
        rows_K = [rows if rows is None else rows[..., right_K], rows, rows]
        ids_K = [labels_K[right_K], labels_K, predictions_K]
        return cls(*(_sums(*each, num_labels) for each in zip(ids_K, rows_K, strict=True)))


def _sums(ids_K: Tensor, rows: Tensor | None, num_labels: int) -> np.ndarray:
    """Sum the rows of each class: (K,), (..., K) -> (..., C)."""
    if rows is None:
        return ids_K.bincount(minlength=num_labels).double().numpy()
    return rows.new_zeros(*rows.shape[:-1], num_labels).index_add(-1, ids_K, rows).numpy()


def _accuracy(counts: Counts) -> np.ndarray:
    return counts.hits.sum(-1) / counts.labels.sum(-1)


def _f1_by_class(counts: Counts) -> np.ndarray:
    return 2 * counts.hits / np.maximum(counts.labels + counts.predictions, 1)


def _f1(counts: Counts) -> np.ndarray:
    return _f1_by_class(counts)[..., 1]


def _f1_macro(counts: Counts) -> np.ndarray:
    # A class that is neither a label nor an answer of any row does not count, as in torchmetrics.
    present = counts.labels + counts.predictions > 0
    return _f1_by_class(counts).sum(-1) / present.sum(-1)


def _f1_weighted(counts: Counts) -> np.ndarray:
    return (_f1_by_class(counts) * counts.labels).sum(-1) / counts.labels.sum(-1)


def _matthews(counts: Counts) -> np.ndarray:
    """Return Matthews' correlation for any number of classes (R_K; Gorodkin 2004, equation 8)."""
    hits, labels, predictions = counts
    rows = labels.sum(-1)
    covariance = hits.sum(-1) * rows - (labels * predictions).sum(-1)
    margins = (rows**2 - (labels**2).sum(-1)) * (rows**2 - (predictions**2).sum(-1))
    # A constant prediction has no correlation with anything. Its score is 0, as in scikit-learn.
    return covariance / np.sqrt(np.maximum(margins, 1))  # torch's root is rounded less well


# Metrics of counts, (..., C) -> (...). torchmetrics takes rows, and would be slow for the draws of
# the bootstrap, so the formulas are here; a test compares them with torchmetrics.
# GLUE's F1 is the binary one: class 1 is the positive class (MRPC "equivalent", QQP "duplicate").
COUNT_METRICS: dict[str, Callable[[Counts], np.ndarray]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "f1_weighted": _f1_weighted,
    "matthews": _matthews,
}


def _of_counts(name: str) -> Callable[[Tensor, Tensor], float]:
    def metric(predictions: Tensor, labels: Tensor) -> float:
        num_labels = max(int(predictions.max()), int(labels.max()), 1) + 1
        return float(COUNT_METRICS[name](Counts.of(labels, predictions, num_labels)))

    return metric


def _correlation(name: str) -> Callable[[Tensor, Tensor], float]:
    def metric(predictions: Tensor, labels: Tensor) -> float:
        from torchmetrics import functional  # the import takes 2 s, and few commands need it

        if len(predictions) < 2 or predictions.min() == predictions.max():
            return 0.0  # no correlation is defined; torchmetrics would warn and return NaN
        value = getattr(functional, name)(predictions.double(), labels.double()).item()
        return 0.0 if math.isnan(value) else value

    return metric


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    **{name: _of_counts(name) for name in COUNT_METRICS},
    "pearson": _correlation("pearson_corrcoef"),
    "spearman": _correlation("spearman_corrcoef"),
}
BINARY = ("f1",)  # one of two classes is the positive one
REGRESSION = ("pearson", "spearman")


def fitting(num_labels: int | None) -> list[str]:
    """Return the metrics that fit a number of classes; None stands for a regression."""
    return [
        name
        for name in METRICS
        if (name in REGRESSION) == (num_labels is None) and (name not in BINARY or num_labels == 2)
    ]
