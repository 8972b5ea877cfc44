"""The prior of a relative exit rule, found on calibration rows: what keeps the score highest.

A uniform prior makes the rule entropy, which serves the accuracy best. Relative to the frequencies
of the classes, rows that look like most leave late; to the inverse of these, those that look like
few: which of the two helps F1 or Matthews' correlation depends on what they count. One is taken
only where it is surely better on these rows than a uniform one.

Arithmetic on records. Shapes: N rows, C labels.
"""

import numpy as np
import torch
from torch import Tensor

from deebert.data.tasks import Task
from deebert.exits import curves
from deebert.exits.records import Record
from deebert.exits.rules import Rule, exit_layer

GROUPS = 10  # of rows, each left out once, to see how sure a gain is
SURE = 1.0  # standard errors that it must exceed
ABOUT = (-0.05, 0.0, 0.05)  # the saving asked for and its neighbours: less left to chance


def search(record: Record, task: Task, rule: Rule, saving: float) -> Rule:
    """The rule relative to the best prior about this saving.

    Args:
        record: labelled rows.
        rule: one that asks for a prior.
        saving: share of the layers.
    """
    assert record.labels_N is not None
    count_C = torch.bincount(record.labels_N.long(), minlength=task.num_labels) + 1.0
    found = rule.uniform()
    entropy, most = _answers(found, record, task, saving), 0.0
    for weight_C in (count_C, 1 / count_C):
        tried = rule.fitted(prior=(weight_C / weight_C.sum()).tolist())
        gain = _sure_gain(_answers(tried, record, task, saving), entropy, record, task)
        if gain > most:
            found, most = tried, gain
    return found


def _answers(rule: Rule, record: Record, task: Task, saving: float) -> list[Tensor]:
    """What each row is answered with, (N,), at each saving about this one."""
    exit_scores = curves.exit_scores_of(rule, record)
    near = [min(max(saving + step, 0.0), 1.0) for step in ABOUT]
    thresholds = curves.thresholds_for(exit_scores.score_NL, near)
    layers = [exit_layer(exit_scores.score_NL, threshold) for threshold in thresholds]
    return [curves.answered(exit_scores, task, layer_N) for layer_N in layers]


def _sure_gain(tried: list[Tensor], plain: list[Tensor], record: Record, task: Task) -> float:
    """By how much the score is better, all savings together, less the jackknife's deviation."""
    labels_N = record.labels_N
    assert labels_N is not None
    group_N = torch.arange(len(record)) % GROUPS

    def gain(rows: Tensor) -> float:
        pairs = zip(tried, plain, strict=True)
        scores = [
            task.score(mine[rows], labels_N[rows]) - task.score(other[rows], labels_N[rows])
            for mine, other in pairs
        ]
        return sum(scores)

    without = [gain(group_N != group) for group in range(GROUPS)]
    return gain(group_N >= 0) - SURE * float(np.sqrt((GROUPS - 1) * np.var(without)))
