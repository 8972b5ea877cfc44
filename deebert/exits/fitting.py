"""Fits of an exit rule on calibration rows: a temperature per ramp, and a prior.

A relative rule gets the prior with the highest score on these rows. A uniform prior makes the rule
entropy, which is best for accuracy. Relative to the class frequencies, rows that look like the
majority leave late; relative to their inverse, rows that look like the minority leave late. Which
of the two raises F1 or Matthews' correlation depends on the task. A prior is taken only where it is
better than the uniform one by more than its standard error.

Arithmetic on records; no model and no file. Shapes: N rows, L layers (= ramps), C labels.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from deebert.data.tasks import Task
from deebert.exits import curves
from deebert.exits.records import Record
from deebert.exits.rules import Rule, exit_layer

GROUPS = 10  # groups of rows; the jackknife leaves out each one once
SURE = 1.0  # standard errors that a gain must exceed
NEIGHBOURS = (-0.05, 0.0, 0.05)  # added to the saving: a gain at three savings is less by chance


def tempered(rule: Rule, logits_NLC: Tensor, labels_N: Tensor) -> Rule:
    """Return the rule with a temperature per ramp, fitted on these rows (Guo et al. 2017)."""
    scales = [_temperature(logits_NC, labels_N) for logits_NC in logits_NLC.unbind(1)]
    return replace(rule, temperatures=torch.tensor(scales))


def _temperature(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Find the temperature between 0.05 and 20 with the least cross-entropy.

    The cross-entropy is convex in 1 / temperature, so it has one minimum.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        logits = logits_NC / math.exp(log_temperature)
        return torch.nn.functional.cross_entropy(logits, labels_N).item()

    bounds = math.log(0.05), math.log(20)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def with_prior(record: Record, task: Task, rule: Rule, saving: float) -> Rule:
    """Return the rule with the prior that is best at savings near `saving`.

    Args:
        record: labelled rows.
        task: the task of the rows.
        rule: a relative rule without a prior.
        saving: share of the layers.
    """
    assert record.labels_N is not None
    count_C = torch.bincount(record.labels_N.long(), minlength=task.num_labels) + 1.0
    best = rule.uniform()
    entropy_predictions, best_gain = _predictions(best, record, task, saving), 0.0
    for weight_C in (count_C, 1 / count_C):
        candidate = rule.fitted(prior=(weight_C / weight_C.sum()).tolist())
        predictions = _predictions(candidate, record, task, saving)
        gain = _sure_gain(predictions, entropy_predictions, record, task)
        if gain > best_gain:
            best, best_gain = candidate, gain
    return best


def _predictions(rule: Rule, record: Record, task: Task, saving: float) -> list[Tensor]:
    """Return the predictions of all rows, (N,), at each saving near `saving`."""
    exit_scores = curves.exit_scores_of(rule, record)
    near = [min(max(saving + step, 0.0), 1.0) for step in NEIGHBOURS]
    thresholds = curves.thresholds_for(exit_scores.score_NL, near)
    layers = [exit_layer(exit_scores.score_NL, threshold) for threshold in thresholds]
    return [curves.answered(exit_scores, task, layer_N) for layer_N in layers]


def _sure_gain(
    candidate: list[Tensor], baseline: list[Tensor], record: Record, task: Task
) -> float:
    """Return the gain in score, summed over the savings, minus its jackknife standard error."""
    labels_N = record.labels_N
    assert labels_N is not None
    group_N = torch.arange(len(record)) % GROUPS

    def gain(rows: Tensor) -> float:
        pairs = zip(candidate, baseline, strict=True)
        scores = [
            task.score(ours[rows], labels_N[rows]) - task.score(theirs[rows], labels_N[rows])
            for ours, theirs in pairs
        ]
        return sum(scores)

    without = [gain(group_N != group) for group in range(GROUPS)]
    return gain(group_N >= 0) - SURE * float(np.sqrt((GROUPS - 1) * np.var(without)))
