"""Metrics of predictions and labels.

Accuracy, F1 and Matthews' correlation come from a table of counts; the correlations of a regression
come from the values. The module does not know tasks, splits or models.
"""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor


def confusion(predictions: Tensor, labels: Tensor, num_labels: int) -> np.ndarray:
    """Count rows by label and prediction.

    Args:
        predictions: class ids, (N,).
        labels: class ids, (N,).
        num_labels: the number of classes C.

    Returns:
        Counts as floats, (C, C): a row of the table is a label, a column is a prediction.
    """
    cells = (labels * num_labels + predictions).bincount(minlength=num_labels**2)
    return cells.reshape(num_labels, num_labels).double().numpy()


def _accuracy(table: np.ndarray) -> np.ndarray:
    return np.trace(table, axis1=-2, axis2=-1) / table.sum((-2, -1))


def _f1(table: np.ndarray) -> np.ndarray:
    hits, misses, alarms = table[..., 1, 1], table[..., 1, 0], table[..., 0, 1]
    return 2 * hits / np.maximum(2 * hits + misses + alarms, 1)


def _f1_by_class(table: np.ndarray) -> np.ndarray:
    """Return the F1 of each class, (..., C, C) -> (..., C); 0 for a class without rows."""
    hits = np.diagonal(table, axis1=-2, axis2=-1)
    return 2 * hits / np.maximum(table.sum(-1) + table.sum(-2), 1)


def _f1_macro(table: np.ndarray) -> np.ndarray:
    # A class that is neither a label nor an answer of any row does not count, as in torchmetrics.
    present = table.sum(-1) + table.sum(-2) > 0
    return _f1_by_class(table).sum(-1) / present.sum(-1)


def _f1_weighted(table: np.ndarray) -> np.ndarray:
    return (_f1_by_class(table) * table.sum(-1)).sum(-1) / table.sum((-2, -1))


def _matthews(table: np.ndarray) -> np.ndarray:
    """Return Matthews' correlation for any number of classes (R_K; Gorodkin 2004, equation 8)."""
    rows, labels, predictions = table.sum((-2, -1)), table.sum(-1), table.sum(-2)
    covariance = np.trace(table, axis1=-2, axis2=-1) * rows - (labels * predictions).sum(-1)
    margins = (rows**2 - (labels**2).sum(-1)) * (rows**2 - (predictions**2).sum(-1))
    # A constant prediction has no correlation with anything. Its score is 0, as in scikit-learn.
    return covariance / np.sqrt(np.maximum(margins, 1))


# Metrics of a table of labels and predictions, (..., C, C) -> (...). The bootstrap has many tables,
# and torchmetrics takes rows, so the formulas are here; a test compares them with torchmetrics.
# GLUE's F1 is the binary one: class 1 is the positive class (MRPC "equivalent", QQP "duplicate").
TABLE_METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "f1_weighted": _f1_weighted,
    "matthews": _matthews,
}


def _of_table(name: str) -> Callable[[Tensor, Tensor], float]:
    def metric(predictions: Tensor, labels: Tensor) -> float:
        num_labels = max(int(predictions.max()), int(labels.max()), 1) + 1
        return float(TABLE_METRICS[name](confusion(predictions, labels, num_labels)))

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
    **{name: _of_table(name) for name in TABLE_METRICS},
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
