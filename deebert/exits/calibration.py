"""Record + target -> operating point, with what to expect of it and what unseen rows show.

A target is a saving, a speed-up or a guarantee ("one point at most, with 95 % confidence").
Thresholds are never chosen on the rows that are reported: they are chosen on rows held out of
training, or cross-fitted over the reported split.
Arithmetic on records: the module knows no model and no file.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.exits import curves, fitting, per_ramp_thresholds, risk_control, rules
from deebert.exits.curves import OperatingPoint, Thresholds
from deebert.exits.records import Record
from deebert.exits.rules import ExitScores, Rule, exit_layer
from deebert.exits.target import Target
from deebert.reporting.results import Calibration
from deebert.reporting.split_results import Measured

FOLDS = 5
FEWEST = 20  # smallest number of calibration rows
SPEEDUP_STEPS = 1000  # savings among which the search looks for one that is fast enough


@dataclass(frozen=True)
class CalibratedPoint:
    """An operating point, and the target that it was chosen for.

    Attributes:
        rule: with its temperatures and prior, if it has any.
        thresholds: one for all ramps, or L-1.
        target: the values that the user gave.
        expected: what the calibration rows show (`curves.expected`); None if the user gave the
            thresholds.
        split: name of the split of the calibration rows, or None.
    """

    rule: Rule
    thresholds: Thresholds
    target: Mapping[str, Any]
    expected: Measured | None = None
    split: str | None = None


class Infeasible(UserError):
    """No threshold can meet this target on these rows."""


def choose(record: Record, task: Task, rule: Rule, target: Target) -> OperatingPoint:
    """Choose the thresholds that meet a target on the calibration rows.

    Args:
        record: the calibration rows.
        task: the task of the rows.
        rule: the exit rule; temperatures and a prior are fitted if target and rule need them.
        target: what the user wants.

    Raises:
        Infeasible: the rows are too few for the guarantee, or the rule never saves so much.
        UserError: the target needs labels that the rows lack, or it does not fit the task.
    """
    return _choose(record, task, rule, target)


def _choose(
    record: Record, task: Task, rule: Rule, target: Target, *, is_sure: bool = False
) -> OperatingPoint:
    """Choose as `choose` does; `is_sure` if thresholds per ramp are known to be worth it."""
    check(len(record), record.labels_N is not None, record.split, task, rule, target)
    if target.temperature:
        seen, record = _halves(record) if target.max_drop is not None else (record, record)
        assert seen.labels_N is not None
        rule = fitting.tempered(rule, seen.logits_NLC, seen.labels_N)
    if target.max_drop is not None:
        return OperatingPoint(rule, _guaranteed(record, task, rule, target))
    if rule.needs_prior:
        rule = fitting.with_prior(record, task, rule, _saving_by_entropy(record, rule, target))
    exit_scores = curves.exit_scores_of(rule, record)
    if target.target_speedup is not None:
        return OperatingPoint(rule, _fast_enough(record, exit_scores, rule, target))
    assert target.target_saving is not None
    [threshold] = curves.thresholds_for(exit_scores.score_NL, [target.target_saving])
    most = curves.savings(exit_scores, threshold).mean().item()
    if most < target.target_saving - 1e-6:
        raise Infeasible(
            f"target_saving={target.target_saving} is more than exit={rule.name} can save: "
            f"{most:.3f} of the layers at most on the rows of split {record.split!r}"
        )
    if target.per_ramp:
        assert record.labels_N is not None
        right_NL = task.predict(exit_scores.answer_NLC) == record.labels_N[:, None]
        thresholds = per_ramp_thresholds.search(
            exit_scores.score_NL, right_NL, target.target_saving, is_sure=is_sure
        )
        if thresholds is not None:
            return OperatingPoint(rule, thresholds)
    return OperatingPoint(rule, threshold)


def expected(
    record: Record,
    task: Task,
    rule: Rule,
    target: Target,
    operating_point: OperatingPoint,
    num_new: int,
) -> Measured:
    """Return what the operating point that `choose` has chosen should show on unseen rows.

    Thresholds per ramp, a prior and temperatures are searched for the most right answers on the
    calibration rows, so these rows are answered too well. Where there is such a search, the score
    is cross-fitted: each fifth of the rows is answered by what the other rows choose. The saving is
    that of the operating point itself, since no search has sought a high one.

    Args:
        record: the calibration rows.
        task: the task of the rows.
        rule: the exit rule that `choose` was given.
        target: the target that `choose` was given.
        operating_point: what it returned.
        num_new: number of unseen rows that the intervals are for.
    """
    per_ramp = isinstance(operating_point.thresholds, list)
    predictions_N = None
    if target.max_drop is None and (per_ramp or target.temperature or rule.needs_prior):
        target = replace(target, per_ramp=per_ramp)
        _, cross_fitted_N, chosen = _cross_fitted(record, task, rule, target, is_sure=True)
        # With so few rows that a fold cannot be calibrated, there is no better expectation.
        predictions_N = None if None in chosen else cross_fitted_N
    return curves.expected(record, task, operating_point, num_new, predictions_N, FOLDS)


def _saving_by_entropy(record: Record, rule: Rule, target: Target) -> float:
    """Return the saving of a target: its own, or what its speed-up needs with entropy."""
    if target.target_saving is not None:
        return target.target_saving
    entropy = rule.uniform()
    exit_scores = curves.exit_scores_of(entropy, record)
    threshold = _fast_enough(record, exit_scores, entropy, target)
    return curves.savings(exit_scores, threshold).mean().item()


def check(
    num_rows: int, has_labels: bool, split: str, task: Task, rule: Rule, target: Target
) -> None:
    """Check a target as far as that is possible before the model has run.

    Args:
        num_rows: number of calibration rows.
        has_labels: True if the calibration rows have labels.
        split: name of their split, for messages.
        task: the task of the rows.
        rule: the exit rule.
        target: what the user wants.

    Raises:
        Infeasible: there are too few rows.
        UserError: labels are needed and missing, or the target does not fit the task.
    """
    where = f"split {split!r}"
    if rule.needs_prior and target.max_drop is not None:
        raise UserError(rules.NO_PRIOR.format(rule.name))
    if not has_labels:
        for flag, needed in (
            ("temperature=true", target.temperature),
            (f"exit={rule.name} without exit.prior=[...]", rule.needs_prior),
            ("per_ramp=true", target.per_ramp),
            ("max_drop with loss=excess", target.max_drop is not None and target.loss == "excess"),
        ):
            if needed:
                raise UserError(
                    f"{flag} needs labels, and {where} has none; calibrate on a labelled split "
                    "(calibration=validation), or use target_saving= by entropy, or "
                    "loss=disagreement"
                )
    if task.is_regression and (
        target.max_drop is not None or target.per_ramp or target.temperature
    ):
        raise UserError(
            f"task {task.name} is a regression, where no answer is right or wrong: only "
            "target_saving= can be asked, without per_ramp and temperature"
        )
    if num_rows < FEWEST:
        raise Infeasible(
            f"{num_rows} calibration rows of {where} are too few to choose thresholds on: "
            f"{FEWEST} or more (calibration=, or data.calibration_size= in training)"
        )
    if target.max_drop is None:
        return
    guaranteeing = guaranteeing_rows(num_rows, target)
    least = risk_control.smallest_limit(guaranteeing, _delta(target))
    if target.max_drop < least:
        raise Infeasible(
            f"max_drop={target.max_drop} cannot be promised by {guaranteeing} calibration rows of "
            f"{where}, even without a loss among them: the smallest is {_rounded_up(least)} at "
            f"confidence={'null' if target.confidence is None else target.confidence}; give more "
            "rows (calibration=, or data.calibration_size= in training) or ask for less"
        )


def guaranteeing_rows(num_rows: int, target: Target) -> int:
    """Count the calibration rows that choose thresholds; the others fit the temperatures."""
    return num_rows // 2 if target.temperature and target.max_drop is not None else num_rows


def _fast_enough(record: Record, exit_scores: ExitScores, rule: Rule, target: Target) -> float:
    """Return the smallest threshold with the target's speed-up on these rows."""
    assert target.target_speedup is not None
    if target.costs is None:
        raise UserError("target_speedup= needs the cost of each layer (Target.costs)")
    most = curves.savings(exit_scores, np.inf).mean().item()
    savings = np.linspace(0, most, SPEEDUP_STEPS + 1).tolist()
    thresholds = curves.thresholds_for(exit_scores.score_NL, savings)

    def speed_up(step: int) -> float:
        return expected_speedup(record, exit_layer(exit_scores.score_NL, thresholds[step]), target)

    if speed_up(SPEEDUP_STEPS) < target.target_speedup:
        raise Infeasible(
            f"target_speedup={target.target_speedup} is more than exit={rule.name} can reach: "
            f"about {speed_up(SPEEDUP_STEPS):.2f} if everything leaves as early as it can"
        )
    fast = bisect_left(range(SPEEDUP_STEPS), target.target_speedup, key=speed_up)
    return thresholds[fast]


def expected_speedup(record: Record, layer_N: Tensor, target: Target) -> float:
    """Return the time at full depth / the time of rows that leave at these layers.

    The time of a row is the cost of its exit layer times its number of tokens.

    Args:
        record: the rows.
        layer_N: exit layers (N,).
        target: a target with `costs`.
    """
    costs_L = torch.tensor(target.costs, dtype=torch.float64)
    tokens_N = record.length_N.double()
    return (tokens_N.sum() / (costs_L[layer_N - 1] * tokens_N).sum()).item()


def _rounded_up(value: float) -> str:
    """Format a number with three digits, rounded up."""
    digits = 2 - int(np.floor(np.log10(value)))
    return f"{np.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def _delta(target: Target) -> float | None:
    """Return 1 - confidence, or None for a guarantee on average."""
    return None if target.confidence is None else 1 - target.confidence


def _halves(record: Record) -> tuple[Record, Record]:
    """Split the rows into two random halves: the rows of a guarantee must not be fitted on."""
    order = torch.randperm(len(record), generator=torch.Generator().manual_seed(0))
    middle = len(record) - len(record) // 2
    return record.rows(order[:middle]), record.rows(order[middle:])


def _guaranteed(record: Record, task: Task, rule: Rule, target: Target) -> float:
    """Return the most aggressive threshold with a guaranteed risk; 0 (full depth) if none has."""
    assert target.max_drop is not None
    grid = rule.grid()
    loss_NT = losses(record, task, rule, grid, target.loss)
    if target.confidence is None:
        largest_T = loss_NT.clamp_min(0).cummax(1).values.sum(0).numpy()
        certified = risk_control.conformal_risk(largest_T, len(record), target.max_drop)
    else:
        certified = risk_control.learn_then_test(
            (loss_NT > 0).sum(0).numpy(),
            (loss_NT < 0).sum(0).numpy() if target.loss == "excess" else None,
            len(record),
            target.max_drop,
            1 - target.confidence,
        )
    return grid[certified - 1] if certified else 0.0


def losses(record: Record, task: Task, rule: Rule, grid: list[float], loss: str) -> Tensor:
    """Return the loss of each row at each threshold against full depth: (N, T) of -1, 0 and 1.

    Args:
        record: the rows.
        task: the task of the rows.
        rule: the exit rule.
        grid: T thresholds.
        loss: `excess` or `disagreement`, as in `Target`.
    """
    exit_scores = curves.exit_scores_of(rule, record)
    answer_NL = task.predict(exit_scores.answer_NLC)
    full_N1 = answer_NL[:, -1:]
    if loss == "disagreement":
        loss_NL = (answer_NL != full_N1).to(torch.int8)
    else:
        assert record.labels_N is not None
        label_N1 = record.labels_N[:, None]
        loss_NL = (answer_NL != label_N1).to(torch.int8) - (full_N1 != label_N1).to(torch.int8)
    layer_NT = torch.stack([exit_layer(exit_scores.score_NL, t) for t in grid], 1)
    return loss_NL.gather(1, layer_NT - 1)


def calibration(
    held_out: Record | None, records: list[Record], task: Task, rule: Rule, target: Target
) -> Calibration:
    """Choose thresholds for a target, and measure them on rows that they were not chosen on.

    Args:
        held_out: calibration rows. None: cross-fit over the first of the reported splits, that is,
            choose on four fifths and measure on the other fifth, five times.
        records: the reported splits.
        task: the task of the rows.
        rule: the exit rule.
        target: what the user wants.

    Returns:
        The operating point, what to expect of it, and what was measured; without notes.

    Raises:
        Infeasible: the rows are too few for the guarantee, or the rule never saves so much.
        UserError: the target needs labels that the rows lack, or it does not fit the task.
    """
    reported = records[0]
    seen = reported if held_out is None else held_out
    operating_point = choose(seen, task, rule, target)
    if held_out is None:
        layer_N, predictions_N, chosen = _cross_fitted(reported, task, rule, target)
        split = f"{reported.split}, cross-fitted in {FOLDS} folds"
    else:
        layer_N, predictions_N = operating_point(reported, task)
        split = held_out.split
    to_expect = expected(seen, task, rule, target, operating_point, len(reported))
    if target.costs is not None:
        speed_up = expected_speedup(seen, operating_point(seen, task)[0], target)
        to_expect = replace(to_expect, time_speed_up=speed_up, costs=list(target.costs))
    elsewhere = {  # no thresholds are chosen on these rows in either case
        record.split: curves.measured(record, task, *operating_point(record, task))
        for record in records[1:]
    }
    fit = operating_point.rule.fit
    result = Calibration(
        target=target.plain(),
        rule=rule.name,
        temperatures=fit["temperatures"],
        prior=fit["prior"],
        thresholds=operating_point.thresholds,
        calibration_split=split,
        num_calibration=guaranteeing_rows(len(seen), target),
        expected=to_expect,
        measured=curves.measured(reported, task, layer_N, predictions_N),
        measured_elsewhere=elsewhere or None,
        notes=[],
    )
    if held_out is not None:
        return result
    return replace(
        result,
        folds_at_full_depth=chosen.count(None),
        fold_thresholds=[each.thresholds if each else 0.0 for each in chosen],
        fold_fits=[each.rule.fit if each else None for each in chosen],
    )


def folds(num_rows: int) -> Tensor:
    """Return the fold of each row where thresholds are cross-fitted: (N,), from 0."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    fold_N = torch.empty_like(order)
    fold_N[order] = torch.arange(num_rows) % FOLDS
    return fold_N


def _cross_fitted(
    record: Record, task: Task, rule: Rule, target: Target, *, is_sure: bool = False
) -> tuple[Tensor, Tensor, list[OperatingPoint | None]]:
    """Compute exit layers and predictions by thresholds that are chosen on other rows.

    Returns:
        Exit layers (N,), predictions (N,), and the operating point of each fold. It is None where
        the other rows cannot meet the target and the fold runs at full depth.
    """
    fold_N = folds(len(record))
    layer_N = torch.empty(len(record), dtype=torch.long)
    predictions_N = torch.empty_like(task.predict(record.logits_NLC[:, -1]))
    chosen: list[OperatingPoint | None] = []
    for fold in range(FOLDS):
        unseen = fold_N == fold
        try:
            chosen.append(_choose(record.rows(~unseen), task, rule, target, is_sure=is_sure))
        except Infeasible:  # all rows are enough for the guarantee, four fifths are not
            chosen.append(None)
        operating_point = chosen[-1] or OperatingPoint(rule.uniform(), 0.0)
        layer_N[unseen], predictions_N[unseen] = operating_point(record.rows(unseen), task)
    return layer_N, predictions_N, chosen
