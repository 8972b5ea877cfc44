"""The results of an evaluation, computed from records: what results.json holds.

A training run's validation, evaluate.py and saved records all use it. The module knows nothing of
models, Lightning or files.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.evaluation.analysis import analysis
from deebert.evaluation.class_scores import classes, exits_at
from deebert.exits import calibration, curves, rules
from deebert.exits.curves import Thresholds
from deebert.exits.records import Record, unlike
from deebert.exits.rules import Rule, exit_layer
from deebert.exits.target import Target
from deebert.options import job_command
from deebert.reporting.results import Calibration
from deebert.reporting.split_results import Example, Examples, SplitResults

log = logging.getLogger(__name__)

EXAMPLES = 5
NO_ROWS = (
    "calibration={}: there are no such rows; use calibration=crossfit, or the name of a split "
    "(held out rows are there if data.calibration_size was not 0 in training)"
)
CURVE_SAVINGS = [step / 10 for step in range(10)]  # of a rule without default thresholds


@dataclass(frozen=True)
class EvaluationConfig:
    """The exit rule, the thresholds and the target of an evaluation.

    Attributes:
        rule: the exit rule.
        thresholds: the thresholds of the curve. None: the paper's for entropy, and for any other
            rule thresholds that spread the saving evenly.
        target: the target that thresholds are chosen for, or None.
        calibration: the rows that thresholds are chosen on: `heldout`, `crossfit`, the name of a
            split, or `auto`, which means held-out rows unless they clearly differ from the reported
            rows.
    """

    rule: Rule
    thresholds: list[Thresholds] | None
    target: Target | None = None
    calibration: str = "auto"


@dataclass(frozen=True)
class Evaluation:
    """The part of `Results` that comes from records, and does not describe a run.

    Attributes:
        splits: the results of each split, in the order of the records.
        exit: the name of the exit rule, its options, and the prior and temperatures that the user
            gave. Fitted ones stand in the calibration.
        calibration: the operating point for the target, if there is one.
    """

    splits: list[SplitResults]
    exit: dict[str, Any]
    calibration: Calibration | None


def evaluate_records(
    records: list[Record],
    task: Task,
    evaluation_config: EvaluationConfig,
    held_out: Record | None = None,
    *,
    trained: bool = True,
) -> Evaluation:
    """Evaluate the records of one or more splits.

    Args:
        records: the records; the first is the main one.
        task: the task.
        evaluation_config: the exit rule, the thresholds and the target.
        held_out: a record of rows to choose thresholds on, if there is one.
        trained: whether the ramps are trained. With untrained ramps exits mean nothing, and only
            the results at full depth are kept.

    Raises:
        UserError: logits are not finite, thresholds do not fit the number of ramps, or the target
            cannot be met.
    """
    assert trained or evaluation_config.target is None, "a target needs trained ramps"
    for record in records:
        record.check()
    calibrated = (
        None
        if evaluation_config.target is None
        else _calibrated(records, task, evaluation_config, held_out)
    )
    rule, thresholds = evaluation_config.rule, evaluation_config.thresholds
    if calibrated:  # the curve uses the rule that met the target
        rule = rule.fitted(calibrated.temperatures, calibrated.prior)
    splits = []
    for record in records:
        exits = None
        if calibrated:
            is_first = record is records[0]
            exits = exits_at(record, task, evaluation_config.rule, calibrated, is_first=is_first)
        elif trained and thresholds is not None and len(thresholds) == 1:
            exits = curves.OperatingPoint(rule, thresholds[0])(record, task)
        part = _split_results(record, task, rule, thresholds, trained)
        splits.append(replace(part, classes=classes(record, task, exits)))
    given = {name: value for name, value in evaluation_config.rule.fit.items() if value is not None}
    return Evaluation(splits, {"name": rule.name, **rule.options, **given}, calibrated)


def _calibrated(
    records: list[Record], task: Task, evaluation_config: EvaluationConfig, held_out: Record | None
) -> Calibration:
    """Calibrate the target (`exits.calibration`), and add notes for the user."""
    rule, target = evaluation_config.rule, evaluation_config.target
    assert target is not None
    rows, warning = calibration_rows(held_out, records[0], evaluation_config)
    if warning:
        log.warning(warning)
    calibrated = calibration.calibration(rows, records, task, rule, target)
    notes = [warning] if warning else []
    saving, expected = target.target_saving, calibrated.expected.expected_saving
    if saving is not None and not target.per_ramp and expected > saving + 0.01:
        notes.append(
            f"exit={rule.name} saves in steps: {expected:.1%} is the first that reaches "
            f"target_saving={saving}"
        )
    return replace(calibrated, notes=notes)


def _split_results(
    record: Record, task: Task, rule: Rule, thresholds: list[Thresholds] | None, trained: bool
) -> SplitResults:
    """Return the results of one split."""
    if thresholds is None:
        thresholds = _default_thresholds(record, rule)
    check_lengths(thresholds, record.num_layers)
    compared = analysis(record, task)
    results = SplitResults(
        split=record.split,
        num_rows=len(record),
        num_layers=record.num_layers,
        exits=curves.ramp_table(record, task),
        curve=curves.curve(record, task, rule, thresholds),
        analysis=compared if trained else replace(compared, oracle=None, overthinking_rate=None),
        constant_score=None if record.labels_N is None else task.constant_score(record.labels_N),
    )
    if not trained:
        return results
    points, length_bins = curves.trade_off(record, task, rule)
    examples = _examples(record, task, rule)
    return replace(results, trade_off=points, length_bins=length_bins, examples=examples)


def check_lengths(thresholds: list[Thresholds] | None, num_layers: int) -> None:
    """Check that a list with a threshold for each ramp has the right length.

    Raises:
        UserError: it has not.
    """
    for each in thresholds or ():
        rules.limits(each, num_layers)


def _examples(record: Record, task: Task, rule: Rule) -> Examples:
    """Return the rows that leave first and last, at a threshold that saves 40 % of the layers."""
    exit_scores = curves.exit_scores_of(rule, record)
    layer_N = exit_layer(
        exit_scores.score_NL, curves.thresholds_for(exit_scores.score_NL, [0.4])[0]
    )
    predictions_N = curves.answered(exit_scores, task, layer_N)
    # Rows that leave at the same layer are sorted by exit score. The last ramp's is not used.
    ramp_N = layer_N.clamp_max(max(record.num_layers - 1, 1))
    score_N = exit_scores.score_NL.gather(1, ramp_N[:, None] - 1).squeeze(1)
    order = sorted(range(len(record)), key=lambda row: (layer_N[row].item(), score_N[row].item()))

    def name(value: float) -> str:
        return f"{value:.3g}" if task.labels is None else task.labels[int(value)]

    def example(row: int) -> Example:
        labels_N = record.labels_N
        return Example(
            index=int(record.index_N[row]),
            layer=int(layer_N[row]),
            length=int(record.length_N[row]),
            prediction=name(predictions_N[row].item()),
            label=None if labels_N is None else name(labels_N[row].item()),
        )

    return Examples(
        first=[example(row) for row in order[:EXAMPLES]],
        last=[example(row) for row in order[: -EXAMPLES - 1 : -1]],
    )


def _default_thresholds(record: Record, rule: Rule) -> list[Thresholds]:
    """Return the paper's thresholds for entropy, or thresholds that spread the saving evenly."""
    if rule.name == "entropy":
        return list(curves.default_thresholds(rule.num_labels))
    score_NL = curves.exit_scores_of(rule, record).score_NL
    return list(dict.fromkeys(curves.thresholds_for(score_NL, CURVE_SAVINGS)))


def calibration_rows(
    held_out: Record | None, reported: Record, evaluation_config: EvaluationConfig
) -> tuple[Record | None, str | None]:
    """Choose the rows that thresholds are chosen on.

    `auto` compares the lengths and logits of both records, never the labels.

    Args:
        held_out: a record of rows that are not reported, if there is one.
        reported: the record that is reported.
        evaluation_config: the evaluation; its `calibration` is read.

    Returns:
        The record to choose thresholds on, or None for cross-fitting; and a warning, or None.

    Raises:
        UserError: `calibration` names rows that do not exist.
    """
    if held_out is None:
        if evaluation_config.calibration not in ("auto", "crossfit"):
            raise UserError(NO_ROWS.format(evaluation_config.calibration))
        return None, None
    if evaluation_config.calibration == "crossfit":
        return None, None
    held_out.check()
    if difference := unlike(held_out, reported):
        plain = f"the rows of split {held_out.split!r} are unlike those of {reported.split!r}"
        if evaluation_config.calibration == "auto":
            return None, (
                f"{plain} ({difference}): thresholds are cross-fitted over {reported.split!r} "
                "instead (calibration=heldout would force them)"
            )
        return held_out, f"{plain} ({difference}): don't rely on what is expected or promised"
    return held_out, None


def warn_of_other_precision(record: Record, precision: str, where: Path) -> None:
    """Warn if a model runs in another precision than thresholds are chosen in.

    Args:
        record: the calibration rows.
        precision: the precision of the model.
        where: the folder of the model.
    """
    if record.precision != precision:
        log.warning(
            "%s: thresholds are chosen on logits in %s, and the model runs in %s, where the saving "
            "and the score may differ a little; %s ckpt=RUN precision=%s records them in this "
            "precision",
            where,
            record.precision,
            precision,
            job_command("evaluate"),
            precision,
        )
