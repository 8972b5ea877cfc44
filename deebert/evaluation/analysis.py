"""A comparison of the ramps of a record beyond their scores, to see which layers look redundant.

Two ramps with the same score may be right on different rows, so that an exit rule could gain. They
may also be wrong on the same rows, so that an ensemble cannot gain. The module computes on the
logits of every ramp, and knows nothing of models, files or exit thresholds.
Shapes: N rows, L layers (= ramps), C labels.
"""

import math

import torch
from torch import Tensor

from deebert.data.tasks import Task
from deebert.exits import curves, rules
from deebert.exits.records import Record
from deebert.reporting.split_results import (
    Analysis,
    Correlations,
    EnsembleScore,
    Oracle,
    RampAnalysis,
    ReliabilityBin,
)

NUM_BINS = 15  # of a reliability diagram; Guo et al. 2017


def analysis(record: Record, task: Task) -> Analysis:
    """Compute the oracle, the overthinking rate, and the ramps' agreement, errors and calibration.

    Args:
        record: the logits of every ramp for the rows, with labels or without.
        task: the task.

    Returns:
        The analysis, with None where a value is undefined. Without labels only `agreement` is
        defined. For a regression only `agreement`, `error_correlation` and `ensemble` without
        `vote` are defined.
    """
    predictions_NL = task.predict(record.logits_NLC)
    if task.is_regression:
        agreement_L = correlation(predictions_NL.double())[-1]
    else:
        agreement_L = (predictions_NL == predictions_NL[:, -1:]).double().mean(0)
    agreements = _plain(agreement_L)
    ramps = [
        RampAnalysis(layer, agreement, None, None, None, None)
        for layer, agreement in enumerate(agreements, 1)
    ]
    if record.labels_N is None:
        return Analysis(None, None, ramps, None, None)

    labels_N = record.labels_N.to(task.target_dtype())
    ensembles = ensemble(record.logits_NLC, labels_N, task)
    if task.is_regression:
        errors_NL = predictions_NL.double() - labels_N[:, None].double()
        return Analysis(None, None, ramps, _correlations(errors_NL), ensembles)

    right_NL = predictions_NL == labels_N[:, None]
    confidence_NL = record.logits_NLC.double().softmax(-1).amax(-1)
    columns = zip(
        agreements,
        confidence_NL.unbind(1),
        right_NL.unbind(1),
        _plain([*map(auroc, confidence_NL.unbind(1), right_NL.unbind(1))]),
        _plain(right_NL[~right_NL[:, -1]].double().mean(0)),  # NaN if the last is never wrong
        strict=True,
    )
    ramps = [
        RampAnalysis(layer, agreement, area, *calibration(confidence_N, right_N), share)
        for layer, (agreement, confidence_N, right_N, area, share) in enumerate(columns, 1)
    ]
    return Analysis(
        _oracle(record, predictions_NL, labels_N, task),
        (right_NL.any(1) & ~right_NL[:, -1]).double().mean().item(),
        ramps,
        _correlations((~right_NL).double()),
        ensembles,
    )


def _correlations(errors_NL: Tensor) -> Correlations:
    return [_plain(row) for row in correlation(errors_NL)]


def correlation(values_NL: Tensor) -> Tensor:
    """Compute the Pearson correlation of columns: (N, L) -> (L, L), NaN if a column is constant."""
    centred_NL = values_NL - values_NL.mean(0)
    unit_NL = centred_NL / centred_NL.norm(dim=0)
    # A constant column is not exactly 0 once centred, since its mean may be rounded.
    unit_NL[:, values_NL.amin(0) == values_NL.amax(0)] = math.nan
    return (unit_NL.T @ unit_NL).clamp(-1, 1)


def auroc(confidence_N: Tensor, right_N: Tensor) -> float:
    """Compute the area under the ROC curve of a ramp's confidence for being right.

    It is the probability that a right row has a higher confidence than a wrong row, where a tie
    counts half. For two classes it does not change with the temperature of the logits, unlike the
    calibration error. An exit rule on confidence needs a high value.

    Args:
        confidence_N: the confidence in each prediction.
        right_N: whether the prediction is right.

    Returns:
        The area; NaN if the ramp is always or never right.
    """
    # Not at the top: a loaded model needs this module, and neither torchmetrics nor matplotlib.
    from torchmetrics.functional.classification import binary_auroc

    if right_N.all() or not right_N.any():
        return math.nan
    return binary_auroc(confidence_N, right_N.long(), validate_args=False).item()


def calibration(confidence_N: Tensor, right_N: Tensor) -> tuple[float, list[ReliabilityBin]]:
    """Compare a ramp's confidence with how often it is right (Guo et al. 2017, section 2).

    Args:
        confidence_N: the confidence in each prediction.
        right_N: whether the prediction is right.

    Returns:
        The expected calibration error; and each non-empty bin of 15 bins of equal width (each
        without its lower end, with its upper end).
    """
    inner_edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=confidence_N.dtype)[1:-1]
    bin_N = torch.bucketize(confidence_N.contiguous(), inner_edges)
    counts = bin_N.bincount(minlength=NUM_BINS)
    filled = counts > 0
    confidences = (bin_N.bincount(confidence_N, minlength=NUM_BINS) / counts)[filled]
    accuracies = (bin_N.bincount(right_N.double(), minlength=NUM_BINS) / counts)[filled]
    gaps = (accuracies - confidences).abs()
    ece = ((gaps * counts[filled]).sum() / len(bin_N)).item()
    columns = (confidences.tolist(), accuracies.tolist(), counts[filled].tolist())
    return ece, [ReliabilityBin(*values) for values in zip(*columns, strict=True)]


def ensemble(logits_NLC: Tensor, labels_N: Tensor, task: Task) -> list[EnsembleScore]:
    """Compute the score of each ramp and of the ensemble of all ramps up to it.

    Args:
        logits_NLC: the logits of every ramp.
        labels_N: the labels.
        task: the task.
    """
    num_ramps_L1 = torch.arange(1, logits_NLC.shape[1] + 1)[:, None]
    single_NL = task.predict(logits_NLC)
    if task.is_regression:
        mean_NL = logits_NLC.double().squeeze(-1).cumsum(1) / num_ramps_L1.squeeze(1)
        vote_NL = None
    else:
        mean_NLC = logits_NLC.double().softmax(-1).cumsum(1) / num_ramps_L1
        votes_NLC = torch.nn.functional.one_hot(single_NL, logits_NLC.shape[-1]).cumsum(1)
        mean_NL = mean_NLC.argmax(-1)
        vote_NL = (votes_NLC + mean_NLC / 2).argmax(-1)  # under 1 vote, so it decides draws only
    return [
        EnsembleScore(
            layer + 1,
            task.score(single_NL[:, layer], labels_N),
            task.score(mean_NL[:, layer], labels_N),
            None if vote_NL is None else task.score(vote_NL[:, layer], labels_N),
        )
        for layer in range(logits_NLC.shape[1])
    ]


def _oracle(record: Record, predictions_NL: Tensor, labels_N: Tensor, task: Task) -> Oracle:
    """Compute score, saving and exits if each row left at the first ramp that is right."""
    wrong_NL = (predictions_NL != labels_N[:, None]).float()
    layer_N = rules.exit_layer(wrong_NL, 0.5)  # the first ramp that is not wrong
    chosen_N = predictions_NL.gather(1, layer_N[:, None] - 1).squeeze(1)
    outcome = curves.outcome(record, task, layer_N, chosen_N)
    return Oracle(outcome.score, outcome.expected_saving, outcome.exit_counts)


def _plain(values: Tensor | list[float]) -> list[float | None]:
    """Return values, (L,), as a list with None for NaN, which JSON does not have."""
    listed = values.tolist() if isinstance(values, Tensor) else values
    return [None if math.isnan(value) else value for value in listed]
