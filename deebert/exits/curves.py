"""Record + exit rule -> score, cost and saving for each threshold. No model, no files.

cost ratio = mean exit layer / number of layers; expected saving = 1 - cost ratio;
speed-up = 1 / cost ratio. (Other systems print one under another's name.)
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deebert.data.metrics import TABLE_METRICS, confusion
from deebert.data.tasks import Task
from deebert.errors import UserError, is_number
from deebert.exits.records import Record
from deebert.exits.rules import ExitScores, Rule, exit_layer

# The sweep of the original code (castorini/DeeBERT, scripts/eval_entropy.sh). It ends above
# ln 2 = 0.693, the largest entropy of two classes: at 0.7 everything leaves at the first ramp.
PAPER_THRESHOLDS = (0.0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
LENGTH_BINS = 8
TRADE_OFF_POINTS = 60

Thresholds = float | list[float]  # one for all ramps, or L-1


def default_thresholds(num_labels: int) -> list[float]:
    """The paper's list, continued in steps of 0.1 until ln(num_labels) is passed.

    For a regression (1 output) only full depth: by how much values change is in its own units.
    """
    if num_labels == 1:
        return [0.0]
    end = math.floor(math.log(num_labels) * 10) + 1
    return [*PAPER_THRESHOLDS, *(tenth / 10 for tenth in range(8, end + 1))]


def check_thresholds(thresholds: Any, flag: str) -> list[float]:
    """One number or a list of numbers -> a list of floats >= 0.

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


def ramp_table(record: Record, task: Task) -> list[dict[str, Any]]:
    """Score of every ramp on all rows, and the cost ratio of stopping there."""
    return [
        {
            "layer": layer,
            **scored(task, task.predict(record.logits_NLC[:, layer - 1]), record.labels_N),
            "cost_ratio": layer / record.num_layers,
        }
        for layer in range(1, record.num_layers + 1)
    ]


def answered(exit_scores: ExitScores, task: Task, layer_N: Tensor) -> Tensor:
    """What each row is answered with when it leaves at these layers: (N,) -> (N,).

    At the last layer the final classifier answers, alone.
    """
    rows = torch.arange(len(layer_N))
    return task.predict(exit_scores.answer_NLC[rows, layer_N - 1])


def outcome(record: Record, task: Task, layer_N: Tensor, predictions_N: Tensor) -> dict[str, Any]:
    """Score, cost and exits of rows that left at these layers with these predictions.

    Returns:
        `score` (None without labels), `scores` (all metrics), `cost_ratio`, `expected_saving`,
        `speed_up`, `exit_counts` (L numbers), and for a task with a group column `mean_exit_layer`
        by group.
    """
    cost_ratio = layer_N.double().mean().item() / record.num_layers
    found = {
        **scored(task, predictions_N, record.labels_N),
        "cost_ratio": cost_ratio,
        "expected_saving": 1 - cost_ratio,
        "speed_up": 1 / cost_ratio,
        "exit_counts": layer_N.bincount(minlength=record.num_layers + 1)[1:].tolist(),
    }
    if record.group_N is not None:
        found["mean_exit_layer"] = {
            str(group): layer_N[record.group_N == group].double().mean().item()
            for group in record.group_N.unique().tolist()
        }
    return found


def curve(
    record: Record, task: Task, rule: Rule, thresholds: list[Thresholds]
) -> list[dict[str, Any]]:
    """An `outcome` for each threshold, which stands in it as `threshold`."""
    exit_scores = exit_scores_of(rule, record)
    found = []
    for threshold in thresholds:
        layer_N = exit_layer(exit_scores.score_NL, threshold)
        predictions_N = answered(exit_scores, task, layer_N)
        found.append({"threshold": threshold, **outcome(record, task, layer_N, predictions_N)})
    return found


def exit_scores_of(rule: Rule, record: Record) -> ExitScores:
    """The rule's verdict, with the final classifier's own answer at full depth, whatever the rule.

    So that full depth is the same for all rules, and what a promise is measured against.
    """
    exit_scores = rule(record.logits_NLC, record.learned_score_NL)
    answers = torch.cat([exit_scores.answer_NLC[:, :-1], record.logits_NLC[:, -1:]], 1)
    return ExitScores(exit_scores.score_NL, answers)


def savings(exit_scores: ExitScores, thresholds: Thresholds) -> Tensor:
    """The saving of each row: (N,) between 0 and 1 - 1/L."""
    num_layers = exit_scores.score_NL.shape[1]
    return 1 - exit_layer(exit_scores.score_NL, thresholds).double() / num_layers


def thresholds_for(score_NL: Tensor, savings: list[float]) -> list[float]:
    """Global thresholds that save these shares of the layers on these rows, and hardly more.

    A row with threshold t saves a layer for each ramp up to which the smallest score is under t, so
    the saving is the distribution function of these running minima. A threshold lies in the middle
    of the widest gap between two of them that costs a thousandth of saving at most, so that
    rounding elsewhere (another batch, other kernels) turns no exit.
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

    found = []
    for saving in savings:
        needed = math.ceil(saving * num_rows * num_layers - 1e-6)
        i = int(torch.searchsorted(reached, needed)) if needed > 0 else -1
        found.append(above(min(i, len(steps) - 1)) if i >= 0 and len(steps) else 0.0)
    return found


def between(low: float, high: float) -> float:
    """A threshold that `low` is under and `high` is not, near their middle, as short as it can be.

    Short, so that the one that is printed is the one that was found.
    """
    middle = (low + high) / 2
    for digits in range(2, 10):
        short = float(f"{middle:.{digits}g}")
        if np.float32(low) < np.float32(short) <= np.float32(high):
            return short
    return high


MOST_DRAWN = 100  # labels


def score_deviation(task: Task, predictions_N: Tensor, labels_N: Tensor, draws: int = 400) -> float:
    """Standard error of the headline metric, by the bootstrap, times sqrt(N).

    Classification metrics depend on the table of labels and predictions only, so whole tables are
    drawn from a multinomial; a correlation's error is Fisher's.
    """
    if task.is_regression:
        correlation = min(abs(task.score(predictions_N, labels_N)), 0.9999)
        return 1 - correlation**2
    kinds = task.num_labels
    if kinds > MOST_DRAWN:  # tables take memory by its square; accuracy is a share
        share = (predictions_N == labels_N).double().mean().item()
        return math.sqrt(share * (1 - share))
    # One more row, spread over the table: a perfect score on a few rows is not a sure one.
    cells = confusion(predictions_N, labels_N, kinds).flatten() + 1 / kinds**2
    drawn = np.random.default_rng(0).multinomial(len(labels_N), cells / cells.sum(), draws)
    scores = TABLE_METRICS[task.metrics[0]](drawn.reshape(draws, kinds, kinds).astype(float))
    return float(scores.std()) * math.sqrt(len(labels_N))


def within(low: float, high: float, least: float, most: float) -> list[float]:
    """An interval cut to what is possible."""
    return [max(low, least), min(high, most)]


def trade_off(record: Record, task: Task, rule: Rule) -> dict[str, Any]:
    """Points evenly spread over the saving, with an interval and the mean exit by input length.

    Returns:
        `trade_off`: the points; `length_bins`: dicts of `low`, `high` (tokens) and `count`.
    """
    exit_scores = exit_scores_of(rule, record)
    edges = record.length_N.double().quantile(torch.linspace(0, 1, LENGTH_BINS + 1).double())
    edges = edges.round().unique()
    bin_N = torch.bucketize(record.length_N.double(), edges[1:-1], right=True)
    bins = [
        {
            "low": int(edges[i].item()),
            "high": int(edges[min(i + 1, len(edges) - 1)].item()),
            "count": int((bin_N == i).sum().item()),
        }
        for i in range(max(1, len(edges) - 1))
    ]
    most = savings(exit_scores, math.inf).mean().item()
    wanted = [most * step / TRADE_OFF_POINTS for step in range(TRADE_OFF_POINTS + 1)]
    points: list[dict[str, Any]] = []
    for threshold in sorted(set(thresholds_for(exit_scores.score_NL, wanted))):
        layer_N = exit_layer(exit_scores.score_NL, threshold)
        predictions_N = answered(exit_scores, task, layer_N)
        found = {"threshold": threshold, **outcome(record, task, layer_N, predictions_N)}
        found["mean_exit_layer_by_length"] = [
            layer_N[bin_N == i].double().mean().item() if bins[i]["count"] else None
            for i in range(len(bins))
        ]
        if record.labels_N is not None:
            labels_N = record.labels_N.to(task.target_dtype())
            width = 1.96 * score_deviation(task, predictions_N, labels_N)
            width /= math.sqrt(len(record))
            found["score_interval"] = within(
                found["score"] - width, found["score"] + width, task.lowest_score, 1
            )
        points.append(found)
    return {"trade_off": points, "length_bins": bins}


def scored(task: Task, predictions_N: Tensor, labels_N: Tensor | None) -> dict[str, Any]:
    """`score` (the headline metric) and `scores` (all), None and {} without labels."""
    if labels_N is None:
        return {"score": None, "scores": {}}
    scores = task.scores(predictions_N, labels_N.to(task.target_dtype()))
    return {"score": scores[task.metrics[0]], "scores": scores}
