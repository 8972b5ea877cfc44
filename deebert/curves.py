"""Record + exit rule -> score, cost and saving for each threshold. No model, no files.

cost ratio = mean exit layer / number of layers; expected saving = 1 - cost ratio;
speed-up = 1 / cost ratio. (Other systems print one under another's name.)
"""

import math
from typing import Any

import torch
from torch import Tensor

from deebert import exits
from deebert.errors import UserError
from deebert.records import Record
from deebert.tasks import Task

# The sweep of the original code (castorini/DeeBERT, scripts/eval_entropy.sh). It ends above
# ln 2 = 0.693, the largest entropy of two classes: at 0.7 everything leaves at the first ramp.
PAPER_THRESHOLDS = (0.0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def default_thresholds(num_labels: int) -> list[float]:
    """The paper's list, continued in steps of 0.1 until ln(num_labels) is passed.

    Regression (1 output) has no entropy, so only full depth (threshold 0) is left.
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
        raise UserError(f"{flag}=[] is empty; give entropies >= 0, e.g. {flag}=[0,0.1,0.3]")
    for value in listed:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise UserError(
                f"{flag}={value} is not an entropy threshold: it must be a number >= 0 "
                "(0 never exits; above ln(number of labels) everything leaves at layer 1)"
            )
    return [float(value) for value in listed]


def check_task(task: Task, thresholds: list[float], flag: str) -> None:
    """A regression has no entropy to exit by.

    Raises:
        UserError: a threshold above 0 for a regression task.
    """
    if task.is_regression and any(thresholds):
        raise UserError(
            f"{flag}={max(thresholds)}: task {task.name} is a regression, where entropy means "
            "nothing (one output, always 0); only full depth (threshold=0) can be scored"
        )


def ramp_table(record: Record, task: Task) -> list[dict[str, Any]]:
    """Score of every ramp on all rows, and the cost ratio of stopping there."""
    return [
        {
            "layer": layer,
            **_scores(task, task.predict(record.logits_NLC[:, layer - 1]), record.labels_N),
            "cost_ratio": layer / record.num_layers,
        }
        for layer in range(1, record.num_layers + 1)
    ]


def curve(record: Record, task: Task, thresholds: list[float]) -> list[dict[str, Any]]:
    """Score, cost and exits of the entropy rule for each threshold.

    Returns:
        One dict a threshold: `threshold`, `score` (None without labels), `scores` (all metrics),
        `cost_ratio`, `expected_saving`, `speed_up`, `exit_counts` (L numbers), and for a task with
        a group column `mean_exit_layer` by group.

    Raises:
        UserError: a threshold above 0 for a regression task, where entropy is always 0.
    """
    check_task(task, thresholds, "threshold")
    predictions_NL = task.predict(record.logits_NLC)
    entropy_NL = exits.entropy(record.logits_NLC)
    rows = []
    for threshold in thresholds:
        layer_N = exits.exit_layer(entropy_NL, threshold)
        chosen_N = predictions_NL.gather(1, layer_N[:, None] - 1).squeeze(1)
        cost_ratio = layer_N.double().mean().item() / record.num_layers
        row = {
            "threshold": threshold,
            **_scores(task, chosen_N, record.labels_N),
            "cost_ratio": cost_ratio,
            "expected_saving": 1 - cost_ratio,
            "speed_up": 1 / cost_ratio,
            "exit_counts": layer_N.bincount(minlength=record.num_layers + 1)[1:].tolist(),
        }
        if record.group_N is not None:
            row["mean_exit_layer"] = {
                str(group): layer_N[record.group_N == group].double().mean().item()
                for group in record.group_N.unique().tolist()
            }
        rows.append(row)
    return rows


def evaluation(record: Record, task: Task, thresholds: list[float]) -> dict[str, Any]:
    """Everything known about one split: what `results.json` holds for it.

    Raises:
        UserError: logits are not finite.
    """
    if not (finite := record.logits_NLC.isfinite().flatten(1).all(1)).all():
        raise UserError(
            f"{(~finite).sum()} of {len(record)} rows of split {record.split!r} have logits that "
            "are not finite: training diverged; lower stages.1.lr or stages.2.lr"
        )
    return {
        "split": record.split,
        "num_rows": len(record),
        "num_layers": record.num_layers,
        "exits": ramp_table(record, task),
        "curve": curve(record, task, thresholds),
    }


def _scores(task: Task, predictions_N: Tensor, labels_N: Tensor | None) -> dict[str, Any]:
    if labels_N is None:
        return {"score": None, "scores": {}}
    scores = task.scores(predictions_N, labels_N.to(torch.long if task.labels else torch.float32))
    return {"score": scores[task.metrics[0]], "scores": scores}
