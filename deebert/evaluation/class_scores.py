"""The scores of each class: which answers the rows of a label get, and where these rows leave.

The module computes on records and on the thresholds that were chosen. It knows nothing of models
or files. Shapes: N rows, C classes.
"""

import torch
from torch import Tensor

from deebert.data.metrics import METRICS
from deebert.data.tasks import Task
from deebert.exits import calibration
from deebert.exits.curves import OperatingPoint
from deebert.exits.records import Record
from deebert.exits.rules import Rule
from deebert.reporting.class_results import OF_ALL_CLASSES, Classes, ClassScore, ClassScores
from deebert.reporting.results import Calibration

MOST_CONFUSED = 100  # classes, up to which the confusion matrix is kept: it grows with the square


def classes(
    record: Record, task: Task, exits: tuple[Tensor, Tensor] | None = None
) -> Classes | None:
    """Compute the scores of each class.

    Args:
        record: the rows.
        task: the task of the rows.
        exits: the exit layer and the prediction of each row at the operating point, or None.

    Returns:
        The scores; None without labels and for a regression.
    """
    if record.labels_N is None or task.labels is None:
        return None
    full_N = torch.full_like(record.index_N, record.num_layers)
    predictions_N = task.predict(record.logits_NLC[:, -1])
    return Classes(
        list(task.labels),
        class_scores(task, record.labels_N, full_N, predictions_N),
        exits and class_scores(task, record.labels_N, *exits),
    )


def class_scores(
    task: Task, labels_N: Tensor, layer_N: Tensor, predictions_N: Tensor
) -> ClassScores:
    """Compute the scores of each class from the true labels, the exit layers and the answers."""
    # Not at the top: a loaded model needs this module's package, and not torchmetrics.
    from torchmetrics.functional import classification as functional

    assert task.labels is not None
    labels_N, num_classes = labels_N.long(), task.num_labels
    pair = (predictions_N, labels_N, num_classes)
    columns = [
        getattr(functional, f"multiclass_{name}")(*pair, average=None).tolist()
        for name in ("precision", "recall", "f1_score")
    ]
    rows_C = labels_N.bincount(minlength=num_classes)
    mean_C = labels_N.bincount(layer_N.double(), num_classes) / rows_C
    layers = [None if mean != mean else mean for mean in mean_C.tolist()]  # NaN without rows
    is_kept = num_classes <= MOST_CONFUSED
    return ClassScores(
        confusion=functional.multiclass_confusion_matrix(*pair).tolist() if is_kept else [],
        **{name: METRICS[name](predictions_N, labels_N) for name in OF_ALL_CLASSES},
        per_class=[
            ClassScore(*values)
            for values in zip(task.labels, rows_C.tolist(), *columns, layers, strict=True)
        ],
    )


def exits_at(
    record: Record, task: Task, rule: Rule, calibrated: Calibration, *, is_first: bool
) -> tuple[Tensor, Tensor]:
    """Return the exit layer and the prediction of each row at a calibrated operating point.

    Args:
        record: the rows.
        task: the task of the rows.
        rule: the exit rule before its temperatures and prior were fitted.
        calibrated: the operating point.
        is_first: whether the rows are those that thresholds are cross-fitted over, if they are.
    """
    fit = {"temperatures": calibrated.temperatures, "prior": calibrated.prior}
    if not is_first or calibrated.fold_thresholds is None:
        return OperatingPoint(rule.fitted(**fit), calibrated.thresholds)(record, task)
    assert calibrated.fold_fits is not None
    fold_N = calibration.folds(len(record))
    layer_N = torch.empty_like(record.index_N)
    predictions_N = torch.empty_like(record.index_N)
    folds = zip(calibrated.fold_thresholds, calibrated.fold_fits, strict=True)
    for fold, (thresholds, fold_fit) in enumerate(folds):
        seen_N = fold_N == fold
        fitted = rule.uniform() if fold_fit is None else rule.fitted(**fold_fit)
        point = OperatingPoint(fitted, thresholds)
        layer_N[seen_N], predictions_N[seen_N] = point(record.rows(seen_N), task)
    return layer_N, predictions_N
