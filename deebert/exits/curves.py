"""Record + exit rule -> score, cost and saving for each threshold, or for an operating point.

cost ratio = mean exit layer / number of layers; expected saving = 1 - cost ratio;
speed-up = 1 / cost ratio. (Other systems print one of these under the name of another.)
Arithmetic on records: the module knows no model, no file and no target.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deebert.data.metrics import COUNT_METRICS, Counts
from deebert.data.tasks import Task
from deebert.errors import UserError, is_number
from deebert.exits import risk_control
from deebert.exits.drift_monitor import exit_cells
from deebert.exits.records import Record
from deebert.exits.rules import ExitScores, Rule, exit_layer
from deebert.reporting.split_results import (
    LengthBin,
    Measured,
    Outcome,
    Point,
    RampScore,
    Thresholds,
)

# The sweep of the original code (castorini/DeeBERT, scripts/eval_entropy.sh). It ends above
# ln 2 = 0.693, the largest entropy of two classes: at 0.7 every row leaves at the first ramp.
PAPER_THRESHOLDS = (0.0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
LENGTH_BINS = 8
TRADE_OFF_POINTS = 60
MOST_DRAWN = 100  # labels, up to which the bootstrap draws pairs that do not occur


@dataclass(frozen=True)
class OperatingPoint:
    """A rule, with its temperatures and prior if it has any, and thresholds for it."""

    rule: Rule
    thresholds: Thresholds

    def __call__(self, record: Record, task: Task) -> tuple[Tensor, Tensor]:
        """Return the exit layer and the prediction of each row: (N,), (N,)."""
        exit_scores = exit_scores_of(self.rule, record)
        layer_N = exit_layer(exit_scores.score_NL, self.thresholds)
        return layer_N, answered(exit_scores, task, layer_N)


def default_thresholds(num_labels: int) -> list[float]:
    """Return the paper's thresholds, continued in steps of 0.1 to just above ln(num_labels).

    For a regression (1 output) it is full depth only, because thresholds have the label's unit.
    """
    if num_labels == 1:
        return [0.0]
    end = math.floor(math.log(num_labels) * 10) + 1
    return [*PAPER_THRESHOLDS, *(tenth / 10 for tenth in range(8, end + 1))]


def check_thresholds(thresholds: Any, flag: str) -> list[float]:
    """Return one number or a list of numbers as a list of floats >= 0.

    Args:
        thresholds: a value from the user.
        flag: name of the setting, for messages.

    Raises:
        UserError: a value is not a number, below 0, or not finite.
    """
    listed = list(thresholds) if isinstance(thresholds, list | tuple) else [thresholds]
    if not listed:
        raise UserError(f"{flag}=[] is empty; give numbers >= 0, e.g. {flag}=[0,0.1,0.3]")
    for value in listed:
        if not is_number(value) or not math.isfinite(value) or value < 0:
            raise UserError(
                f"{flag}={value} is not a threshold: it must be a number >= 0 (0 never exits; for "
                "entropy everything leaves at layer 1 above ln(number of labels))"
            )
    return [float(value) for value in listed]


def ramp_table(record: Record, task: Task) -> list[RampScore]:
    """Return the score of each ramp on all rows, and the cost ratio if all rows leave there."""
    table = []
    for layer in range(1, record.num_layers + 1):
        predictions_N = task.predict(record.logits_NLC[:, layer - 1])
        score, scores = scored(task, predictions_N, record.labels_N)
        table.append(RampScore(layer, score, scores, layer / record.num_layers))
    return table


def answered(exit_scores: ExitScores, task: Task, layer_N: Tensor) -> Tensor:
    """Return the prediction for each row if it leaves at these layers: (N,) -> (N,)."""
    rows = torch.arange(len(layer_N))
    return task.predict(exit_scores.answer_NLC[rows, layer_N - 1])


def outcome(record: Record, task: Task, layer_N: Tensor, predictions_N: Tensor) -> Outcome:
    """Return score, cost and exits of rows that leave at these layers with these predictions."""
    score, scores = scored(task, predictions_N, record.labels_N)
    cost_ratio = layer_N.double().mean().item() / record.num_layers
    mean_exit_layer = None
    if record.group_N is not None:
        mean_exit_layer = {
            str(group): layer_N[record.group_N == group].double().mean().item()
            for group in record.group_N.unique().tolist()
        }
    return Outcome(
        score=score,
        scores=scores,
        cost_ratio=cost_ratio,
        expected_saving=1 - cost_ratio,
        speed_up=1 / cost_ratio,
        exit_counts=layer_N.bincount(minlength=record.num_layers + 1)[1:].tolist(),
        mean_exit_layer=mean_exit_layer,
    )


def measured(record: Record, task: Task, layer_N: Tensor, predictions_N: Tensor) -> Measured:
    """Return an `outcome`, and how it differs from full depth."""
    full_N = task.predict(record.logits_NLC[:, -1])
    disagreement = excess = None
    if not task.is_regression:
        disagreement = (predictions_N != full_N).double().mean().item()
        if (labels_N := record.labels_N) is not None:
            wrong = (predictions_N != labels_N).double() - (full_N != labels_N).double()
            excess = wrong.mean().item()
    return Measured(
        **vars(outcome(record, task, layer_N, predictions_N)),
        full_depth_score=scored(task, full_N, record.labels_N)[0],
        disagreement=disagreement,
        excess=excess,
    )


def expected(
    record: Record,
    task: Task,
    operating_point: OperatingPoint,
    num_new: int,
    cross_fitted_N: Tensor | None = None,
    folds: int = 5,
) -> Measured:
    """Return what an operating point should show on unseen rows, from its calibration rows.

    Args:
        record: the calibration rows.
        task: the task of the rows.
        operating_point: rule and thresholds.
        num_new: number of unseen rows that the intervals are for.
        cross_fitted_N: if the labels of these rows were used to choose the operating point: the
            prediction of each row by an operating point that was chosen without it.
        folds: number of folds that `cross_fitted_N` was made with.

    Returns:
        What `measured` gives on the calibration rows, with 95 % intervals.
    """
    layer_N, predictions_N = operating_point(record, task)
    if cross_fitted_N is not None:
        predictions_N = cross_fitted_N
    result = measured(record, task, layer_N, predictions_N)
    deviation = (layer_N.double() / record.num_layers).std(correction=0).item()
    saving = result.expected_saving
    interval = risk_control.mean_interval(saving, deviation, len(record), num_new)
    result = replace(result, interval=within(*interval, 0, 1 - 1 / record.num_layers))
    if record.labels_N is None or result.score is None:
        return result
    labels_N = record.labels_N.to(task.target_dtype())
    deviation = score_deviation(task, predictions_N, labels_N)
    num_seen = float(len(record))
    if cross_fitted_N is not None:
        # The folds are not independent: each chooses on rows that the others are scored on. Nadeau
        # and Bengio (2003) add the ratio of scored and choosing rows to 1 / folds.
        num_seen /= 1 + folds / (folds - 1)
    interval = risk_control.mean_interval(result.score, deviation, num_seen, num_new)
    return replace(result, score_interval=within(*interval, task.lowest_score, 1))


def curve(record: Record, task: Task, rule: Rule, thresholds: list[Thresholds]) -> list[Point]:
    """Return an `outcome` for each threshold."""
    exit_scores = exit_scores_of(rule, record)
    points = []
    for threshold in thresholds:
        layer_N = exit_layer(exit_scores.score_NL, threshold)
        predictions_N = answered(exit_scores, task, layer_N)
        at_threshold = outcome(record, task, layer_N, predictions_N)
        points.append(Point(threshold=threshold, **vars(at_threshold)))
    return points


def exit_scores_of(rule: Rule, record: Record) -> ExitScores:
    """Return the exit scores of a record, with the final classifier's answer at the last layer.

    So full depth is the same for all rules, and guarantees refer to it.
    """
    exit_scores = rule(record.logits_NLC, record.learned_score_NL)
    answers = torch.cat([exit_scores.answer_NLC[:, :-1], record.logits_NLC[:, -1:]], 1)
    return ExitScores(exit_scores.score_NL, answers)


def exits_of(record: Record, operating_point: OperatingPoint) -> NDArray[np.int64]:
    """Return the exits of rows as a test of drift reads them (`drift_monitor.exit_cells`)."""
    exit_scores = exit_scores_of(operating_point.rule, record)
    layer_N = exit_layer(exit_scores.score_NL, operating_point.thresholds)
    answer_NC = exit_scores.answer_NLC[torch.arange(len(layer_N)), layer_N - 1]
    probabilities_NC = (
        answer_NC.softmax(-1).numpy() if operating_point.rule.num_labels > 1 else None
    )
    return exit_cells(layer_N.numpy(), probabilities_NC)


def savings(exit_scores: ExitScores, thresholds: Thresholds) -> Tensor:
    """Return the saving of each row: (N,) between 0 and 1 - 1/L."""
    num_layers = exit_scores.score_NL.shape[1]
    return 1 - exit_layer(exit_scores.score_NL, thresholds).double() / num_layers


def thresholds_for(score_NL: Tensor, savings: list[float]) -> list[float]:
    """Return global thresholds that save these shares of the layers on these rows, or little more.

    With threshold t, a row leaves at the first ramp at which the running minimum of its scores is
    under t. So the saving is the distribution function of all running minima. A threshold lies in
    the middle of the widest gap between two of these that costs a thousandth of saving at most:
    rounding errors (another batch, other kernels) change no exit.

    Args:
        score_NL: exit scores.
        savings: shares of the layers.

    Returns:
        A threshold for each saving, 0 for a saving of 0.
    """
    num_rows, num_layers = score_NL.shape
    least_NL = score_NL[:, :-1].nan_to_num(nan=torch.inf, posinf=torch.inf).cummin(1).values
    steps, counts = least_NL[least_NL.isfinite()].unique(return_counts=True)
    reached = counts.cumsum(0)

    end = steps[-1:] * 1.01 + 1e-6
    gaps = torch.cat([steps, end]).diff()
    slack = num_rows * num_layers // 1000

    def above(i: int) -> float:
        allowed = int(torch.searchsorted(reached, reached[i] + slack, right=True))
        i += int(gaps[i : max(allowed, i + 1)].argmax())
        return between(steps[i].item(), (steps[i] + gaps[i]).item())

    thresholds = []
    for saving in savings:
        needed = math.ceil(saving * num_rows * num_layers - 1e-6)
        i = int(torch.searchsorted(reached, needed)) if needed > 0 else -1
        thresholds.append(above(min(i, len(steps) - 1)) if i >= 0 and len(steps) else 0.0)
    return thresholds


def between(low: float, high: float) -> float:
    """Return a threshold that `low` is under and `high` is not, near their middle.

    It has as few digits as possible, so that the printed number is the threshold itself.
    """
    middle = (low + high) / 2
    for digits in range(2, 10):
        short = float(f"{middle:.{digits}g}")
        if np.float32(low) < np.float32(short) <= np.float32(high):
            return short
    return high


def score_deviation(task: Task, predictions_N: Tensor, labels_N: Tensor, draws: int = 400) -> float:
    """Return the standard error of the task's score, times sqrt(N).

    A classification metric depends only on how many rows have which pair of label and prediction,
    so the bootstrap draws these numbers from a multinomial. The error of a correlation is Fisher's.

    Args:
        task: the task; its first metric is the score.
        predictions_N: predictions (N,).
        labels_N: labels (N,).
        draws: number of draws.
    """
    if task.is_regression:
        correlation = min(abs(task.score(predictions_N, labels_N)), 0.9999)
        return 1 - correlation**2
    kinds, metric = task.num_labels, task.metrics[0]
    if kinds > MOST_DRAWN and metric == "accuracy":  # the error of a share is known
        share = (predictions_N == labels_N).double().mean().item()
        return math.sqrt(share * (1 - share))
    pair_N = labels_N * kinds + predictions_N
    if kinds > MOST_DRAWN:  # of kinds^2 pairs, those that occur
        pair_K, rows_K = pair_N.unique(return_counts=True)
    else:
        pair_K, rows_K = torch.arange(kinds**2), pair_N.bincount(minlength=kinds**2)
    # One more row, spread over the pairs: a perfect score on a few rows has an error, too.
    share_K = rows_K.double().numpy() + 1 / len(pair_K)
    drawn = np.random.default_rng(0).multinomial(len(labels_N), share_K / share_K.sum(), draws)
    counts = Counts.of(pair_K // kinds, pair_K % kinds, kinds, torch.from_numpy(drawn).double())
    return float(COUNT_METRICS[metric](counts).std()) * math.sqrt(len(labels_N))


def within(low: float, high: float, least: float, most: float) -> list[float]:
    """Return the part of an interval that lies between `least` and `most`."""
    return [max(low, least), min(high, most)]


def trade_off(record: Record, task: Task, rule: Rule) -> tuple[list[Point], list[LengthBin]]:
    """Return points that are spread evenly over the saving, and the bins of input lengths.

    Each point has the mean exit layer for each bin and, with labels, a 95 % interval of the score.
    """
    exit_scores = exit_scores_of(rule, record)
    edges = record.length_N.double().quantile(torch.linspace(0, 1, LENGTH_BINS + 1).double())
    edges = edges.round().unique()
    bin_N = torch.bucketize(record.length_N.double(), edges[1:-1], right=True)
    bins = [
        LengthBin(
            low=int(edges[i].item()),
            high=int(edges[min(i + 1, len(edges) - 1)].item()),
            count=int((bin_N == i).sum().item()),
        )
        for i in range(max(1, len(edges) - 1))
    ]
    most = savings(exit_scores, math.inf).mean().item()
    evenly = [most * step / TRADE_OFF_POINTS for step in range(TRADE_OFF_POINTS + 1)]
    points = []
    for threshold in sorted(set(thresholds_for(exit_scores.score_NL, evenly))):
        layer_N = exit_layer(exit_scores.score_NL, threshold)
        predictions_N = answered(exit_scores, task, layer_N)
        at_threshold = outcome(record, task, layer_N, predictions_N)
        interval = None
        if record.labels_N is not None and (score := at_threshold.score) is not None:
            labels_N = record.labels_N.to(task.target_dtype())
            width = 1.96 * score_deviation(task, predictions_N, labels_N)
            width /= math.sqrt(len(record))
            interval = within(score - width, score + width, task.lowest_score, 1)
        by_length = [
            layer_N[bin_N == i].double().mean().item() if length_bin.count else None
            for i, length_bin in enumerate(bins)
        ]
        points.append(
            Point(
                threshold=threshold,
                **vars(at_threshold),
                mean_exit_layer_by_length=by_length,
                score_interval=interval,
            )
        )
    return points, bins


def scored(
    task: Task, predictions_N: Tensor, labels_N: Tensor | None
) -> tuple[float | None, dict[str, float]]:
    """Return the score (the task's first metric) and all metrics; None and {} without labels."""
    if labels_N is None:
        return None, {}
    scores = task.scores(predictions_N, labels_N.to(task.target_dtype()))
    return scores[task.metrics[0]], scores
