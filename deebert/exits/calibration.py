"""Record + target -> thresholds, what to expect of them, and what unseen rows then showed.

A target is a saving ("40 % less") or a promise ("one point at most, with 95 % confidence").
Thresholds are never chosen on the rows that are reported: they come from rows held out of training,
or are cross-fitted over the reported split. Arithmetic on records: no model, no files.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.exits import curves, priors, risk_control, rules, threshold_search
from deebert.exits.curves import Thresholds
from deebert.exits.records import Record
from deebert.exits.rules import ExitScores, Rule, exit_layer
from deebert.exits.target import Target

FOLDS = 5
FEWEST = 20  # rows to choose anything on
SPEEDUP_STEPS = 1000  # savings among which one is looked for that is fast enough


@dataclass(frozen=True)
class OperatingPoint:
    """A rule (with its temperatures, if any) and thresholds for it."""

    rule: Rule
    thresholds: Thresholds

    def __call__(self, record: Record, task: Task) -> tuple[Tensor, Tensor]:
        """Exit layer and prediction of every row: (N,), (N,)."""
        exit_scores = curves.exit_scores_of(self.rule, record)
        layer_N = exit_layer(exit_scores.score_NL, self.thresholds)
        return layer_N, curves.answered(exit_scores, task, layer_N)


class Infeasible(UserError):
    """No threshold can meet this target on these rows."""


def choose(record: Record, task: Task, rule: Rule, target: Target) -> OperatingPoint:
    """The thresholds that meet a target, as far as these rows can tell.

    Raises:
        Infeasible: the rows are too few for the promise, or the rule never saves so much.
        UserError: the target needs labels that the rows lack, or does not fit the task.
    """
    check(len(record), record.labels_N is not None, record.split, task, rule, target)
    if target.temperature:
        seen, record = _halves(record) if target.max_drop is not None else (record, record)
        assert seen.labels_N is not None
        rule = rule.tempered(seen.logits_NLC, seen.labels_N)
    if target.max_drop is not None:
        return OperatingPoint(rule, _promised(record, task, rule, target))
    if rule.needs_prior:
        rule = priors.search(record, task, rule, _about(record, rule, target))
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
        found = threshold_search.search(exit_scores.score_NL, right_NL, target.target_saving)
        if found is not None:
            return OperatingPoint(rule, found)
    return OperatingPoint(rule, threshold)


def _about(record: Record, rule: Rule, target: Target) -> float:
    """About what saving a target will come to: by entropy."""
    if target.target_saving is not None:
        return target.target_saving
    entropy = rule.uniform()
    exit_scores = curves.exit_scores_of(entropy, record)
    return (
        curves.savings(exit_scores, _fast_enough(record, exit_scores, entropy, target))
        .mean()
        .item()
    )


def check(
    num_rows: int, has_labels: bool, split: str, task: Task, rule: Rule, target: Target
) -> None:
    """What can be known of a target before the model has run.

    Raises:
        Infeasible: too few rows.
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
    promising = promising_rows(num_rows, target)
    least = risk_control.smallest_limit(promising, _delta(target))
    if target.max_drop < least:
        raise Infeasible(
            f"max_drop={target.max_drop} cannot be promised by {promising} calibration rows of "
            f"{where}, even without a loss among them: the smallest is {_rounded_up(least)} at "
            f"confidence={'null' if target.confidence is None else target.confidence}; give more "
            "rows (calibration=, or data.calibration_size= in training) or ask for less"
        )


def promising_rows(num_rows: int, target: Target) -> int:
    """How many of the calibration rows choose; the others, if any, have fitted temperatures."""
    return num_rows // 2 if target.temperature and target.max_drop is not None else num_rows


def _fast_enough(record: Record, exit_scores: ExitScores, rule: Rule, target: Target) -> float:
    """The smallest threshold that is expected to be so much faster on the clock."""
    assert target.target_speedup is not None
    if target.costs is None:
        raise UserError("target_speedup= needs what each layer costs (speed.layer_costs)")
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
    """How many times faster than full depth rows that leave there are, by what layers cost.

    A row counts by its tokens, as its time does.
    """
    costs_L = torch.tensor(target.costs, dtype=torch.float64)
    tokens_N = record.length_N.double()
    return (tokens_N.sum() / (costs_L[layer_N - 1] * tokens_N).sum()).item()


def _rounded_up(value: float) -> str:
    digits = 2 - int(np.floor(np.log10(value)))
    return f"{np.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def _delta(target: Target) -> float | None:
    return None if target.confidence is None else 1 - target.confidence


def _halves(record: Record) -> tuple[Record, Record]:
    """Two random halves: what is fitted on one may be promised by the other."""
    order = torch.randperm(len(record), generator=torch.Generator().manual_seed(0))
    middle = len(record) - len(record) // 2
    return record.rows(order[:middle]), record.rows(order[middle:])


def _promised(record: Record, task: Task, rule: Rule, target: Target) -> float:
    """The most aggressive threshold whose risk is promised; 0 (full depth) where none is."""
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
    """What each row loses at each threshold against full depth: (N, T) of -1, 0 and 1."""
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


def unlike(ours: Record, theirs: Record) -> str | None:
    """How the rows of two splits plainly differ, so that one says little about the other, or None.

    By Kolmogorov-Smirnov tests of what is known of a row without its label: its length, and how
    sure full depth is. GLUE's SST-2 is the example: phrases in train, sentences in validation.
    """
    from scipy import stats  # late, as in `risk`

    sure = [torch.softmax(r.logits_NLC[:, -1], -1).amax(-1).numpy() for r in (ours, theirs)]
    lengths = [r.length_N.numpy() for r in (ours, theirs)]
    for name, (a, b) in (("tokens", lengths), ("largest probability at full depth", sure)):
        found = stats.ks_2samp(a, b)
        if found.pvalue < 0.0005 and found.statistic > 0.1:  # surely different, and by how much
            return f"{name} {np.mean(a):.3g} against {np.mean(b):.3g} on average"
    return None


def calibration(
    held_out: Record | None, records: list[Record], task: Task, rule: Rule, target: Target
) -> dict[str, Any]:
    """Choose thresholds for a target, and measure them on rows that had no part in it.

    Args:
        held_out: rows to choose on; None: cross-fit over the first of the reported splits, that
            is choose on four fifths and measure on the other fifth, five times.
        records: the reported splits.

    Returns:
        What results.json holds under `calibration`: `target`, `rule`, `temperatures`, `prior`,
        `thresholds` (the ones to use from now on), `calibration_split`, `num_calibration`,
        `expected` and `measured`, with 95 % intervals for as many new rows as were reported.
        Where cross-fitted, also what each fold was measured with: `fold_thresholds`, `fold_fits`
        (temperatures and prior; None at full depth), and `folds_at_full_depth`, how many were.
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
    promised = expected(seen, task, operating_point, len(reported))
    if target.costs is not None:
        promised |= {
            "time_speed_up": expected_speedup(seen, operating_point(seen, task)[0], target),
            "costs": list(target.costs),
        }
    found: dict[str, Any] = {
        "target": target.plain(),
        "rule": rule.name,
        **operating_point.rule.fit,
        "thresholds": operating_point.thresholds,
        "calibration_split": split,
        "num_calibration": promising_rows(len(seen), target),
        "expected": promised,
        "measured": measured(reported, task, layer_N, predictions_N),
    }
    if held_out is None:
        found["folds_at_full_depth"] = chosen.count(None)
        found["fold_thresholds"] = [each.thresholds if each else 0.0 for each in chosen]
        found["fold_fits"] = [each.rule.fit if each else None for each in chosen]
    if records[1:]:  # rows that had no part in it either way
        found["measured_elsewhere"] = {
            record.split: measured(record, task, *operating_point(record, task))
            for record in records[1:]
        }
    return found


def folds(num_rows: int) -> Tensor:
    """Which fold each row of a split is of, where thresholds are cross-fitted: (N,), from 0."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    fold_N = torch.empty_like(order)
    fold_N[order] = torch.arange(num_rows) % FOLDS
    return fold_N


def _cross_fitted(
    record: Record, task: Task, rule: Rule, target: Target
) -> tuple[Tensor, Tensor, list[OperatingPoint | None]]:
    """Exit layer and prediction of every row, by thresholds that were chosen on other rows.

    Returns:
        Both, (N,), and what was chosen for each fold; None where the other rows could not meet
        the target, and full depth was used.
    """
    fold_N = folds(len(record))
    layer_N = torch.empty(len(record), dtype=torch.long)
    predictions_N = torch.empty_like(task.predict(record.logits_NLC[:, -1]))
    chosen: list[OperatingPoint | None] = []
    for fold in range(FOLDS):
        unseen = fold_N == fold
        try:
            chosen.append(choose(record.rows(~unseen), task, rule, target))
        except Infeasible:  # enough rows for the promise, but not in four fifths of them
            chosen.append(None)
        operating_point = chosen[-1] or OperatingPoint(rule.uniform(), 0.0)
        layer_N[unseen], predictions_N[unseen] = operating_point(record.rows(unseen), task)
    return layer_N, predictions_N, chosen


def expected(
    record: Record, task: Task, operating_point: OperatingPoint, num_new: int
) -> dict[str, Any]:
    """Score and saving on the rows chosen on, with intervals for so many new rows."""
    layer_N, predictions_N = operating_point(record, task)
    found = measured(record, task, layer_N, predictions_N)
    deviation = (layer_N.double() / record.num_layers).std(correction=0).item()
    saving = found["expected_saving"]
    interval = risk_control.mean_interval(saving, deviation, len(record), num_new)
    found["interval"] = curves.within(*interval, 0, 1 - 1 / record.num_layers)
    if record.labels_N is not None:
        labels_N = record.labels_N.to(task.target_dtype())
        deviation = curves.score_deviation(task, predictions_N, labels_N)
        interval = risk_control.mean_interval(found["score"], deviation, len(record), num_new)
        found["score_interval"] = curves.within(*interval, task.lowest_score, 1)
    return found


def measured(record: Record, task: Task, layer_N: Tensor, predictions_N: Tensor) -> dict[str, Any]:
    """An outcome beside full depth: `full_depth_score`, `disagreement`, `excess` (None without
    labels or for a regression)."""
    full_N = task.predict(record.logits_NLC[:, -1])
    found = curves.outcome(record, task, layer_N, predictions_N)
    found["full_depth_score"] = curves.scored(task, full_N, record.labels_N)["score"]
    found["disagreement"] = found["excess"] = None
    if not task.is_regression:
        found["disagreement"] = (predictions_N != full_N).double().mean().item()
        if (labels_N := record.labels_N) is not None:
            wrong = (predictions_N != labels_N).double() - (full_N != labels_N).double()
            found["excess"] = wrong.mean().item()
    return found
