"""Records + question -> what results.json says of them. The same for a training run's validation,
for evaluate.py, and for records that were saved long ago.

Knows nothing of models, Lightning or files.
"""

import logging
from dataclasses import dataclass
from typing import Any

from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.evaluation.analysis import analysis
from deebert.exits import calibration as calibrate
from deebert.exits import curves, rules
from deebert.exits.curves import Thresholds
from deebert.exits.records import Record
from deebert.exits.rules import Rule, exit_layer
from deebert.exits.target import Target

log = logging.getLogger(__name__)

EXAMPLES = 5
NO_ROWS = (
    "calibration={}: there are no such rows; use calibration=crossfit, or the name of a split "
    "(held out rows are there if data.calibration_size was not 0 in training)"
)
CURVE_SAVINGS = [step / 10 for step in range(10)]  # where a rule has no thresholds of its own


@dataclass(frozen=True)
class EvaluationConfig:
    """What is asked of a model.

    Attributes:
        rule: how inputs leave.
        thresholds: of the curve; None for the paper's, or evenly spread over the saving where the
            rule is not the paper's.
        target: a saving or a promise, or None.
        calibration: what thresholds are chosen on: `heldout`, `crossfit`, the name of a split, or
            `auto`: held-out rows, unless they are plainly unlike the reported ones.
    """

    rule: Rule
    thresholds: list[Thresholds] | None
    target: Target | None = None
    calibration: str = "auto"


def evaluate_records(
    records: list[Record],
    task: Task,
    evaluation_config: EvaluationConfig,
    held_out: Record | None = None,
    *,
    trained: bool = True,
) -> dict[str, Any]:
    """Answer a question about one or more splits; the first is the headline.

    Args:
        trained: are the ramps? Else exits mean nothing, and only full depth is worth a look.

    Raises:
        UserError: logits are not finite, thresholds do not fit the number of ramps, or the target
            cannot be met.
    """
    assert trained or evaluation_config.target is None, "question.check_model"
    for record in records:
        record.check()
    calibrated = (
        None
        if evaluation_config.target is None
        else _calibrated(records, task, evaluation_config, held_out)
    )
    rule = evaluation_config.rule
    if calibrated:  # what is drawn is what was met
        rule = rule.fitted(calibrated["temperatures"], calibrated["prior"])
    parts = [_of_split(record, task, rule, evaluation_config.thresholds) for record in records]
    if not trained:
        for part in parts:
            del part["trade_off"], part["length_bins"], part["examples"]
            part["analysis"] |= {"oracle": None, "overthinking_rate": None}
    # Prior and temperatures that were given; those that were found are said with the calibration.
    told = {name: value for name, value in evaluation_config.rule.fit.items() if value is not None}
    results = parts[0] | {"exit": {"name": rule.name, **rule.options, **told}}
    if parts[1:]:
        results["other_splits"] = parts[1:]
    if calibrated:
        results["calibration"] = calibrated
    return results


def _calibrated(
    records: list[Record], task: Task, evaluation_config: EvaluationConfig, held_out: Record | None
) -> dict[str, Any]:
    """What became of the target (`calibration.calibration`), with notes on it."""
    assert evaluation_config.target is not None
    rows, why = calibration_rows(held_out, records[0], evaluation_config)
    if why:
        log.warning(why)
    found = calibrate.calibration(
        rows, records, task, evaluation_config.rule, evaluation_config.target
    )
    notes = [why] if why else []
    wished, expected = evaluation_config.target.target_saving, found["expected"]["expected_saving"]
    if wished is not None and not evaluation_config.target.per_ramp and expected > wished + 0.01:
        notes.append(
            f"exit={evaluation_config.rule.name} saves in steps: {expected:.1%} is the first that "
            f"reaches target_saving={wished}"
        )
    return found | {"notes": notes}


def _of_split(
    record: Record, task: Task, rule: Rule, thresholds: list[Thresholds] | None
) -> dict[str, Any]:
    if thresholds is None:
        thresholds = _default_thresholds(record, rule)
    check_lengths(thresholds, record.num_layers)
    return {
        "split": record.split,
        "num_rows": len(record),
        "num_layers": record.num_layers,
        "exits": curves.ramp_table(record, task),
        "curve": curves.curve(record, task, rule, thresholds),
        **curves.trade_off(record, task, rule),
        "examples": _examples(record, task, rule),
        "analysis": analysis(record, task),
    }


def check_lengths(thresholds: list[Thresholds] | None, num_layers: int) -> None:
    """Raises:
    UserError: a list with a threshold per ramp is not of the right length.
    """
    for given in thresholds or ():
        rules.limits(given, num_layers)


def _examples(record: Record, task: Task, rule: Rule) -> dict[str, Any]:
    """Rows that leave first and last, by their index, where 40 % of the layers are saved."""
    exit_scores = curves.exit_scores_of(rule, record)
    layer_N = exit_layer(
        exit_scores.score_NL, curves.thresholds_for(exit_scores.score_NL, [0.4])[0]
    )
    predictions_N = curves.answered(exit_scores, task, layer_N)
    # Among those that leave at the same layer the surer ones first; the last ramp is not asked.
    asked_N = layer_N.clamp_max(max(record.num_layers - 1, 1))
    score_N = exit_scores.score_NL.gather(1, asked_N[:, None] - 1).squeeze(1)
    order = sorted(range(len(record)), key=lambda row: (layer_N[row].item(), score_N[row].item()))

    def name(value: float) -> str:
        return f"{value:.3g}" if task.labels is None else task.labels[int(value)]

    def example(row: int) -> dict[str, Any]:
        labels_N = record.labels_N
        return {
            "index": int(record.index_N[row]),
            "layer": int(layer_N[row]),
            "length": int(record.length_N[row]),
            "prediction": name(predictions_N[row].item()),
            "label": None if labels_N is None else name(labels_N[row].item()),
        }

    return {
        "first": [example(row) for row in order[:EXAMPLES]],
        "last": [example(row) for row in order[: -EXAMPLES - 1 : -1]],
    }


def _default_thresholds(record: Record, rule: Rule) -> list[Thresholds]:
    if rule.name == "entropy":
        return list(curves.default_thresholds(rule.num_labels))
    score_NL = curves.exit_scores_of(rule, record).score_NL
    return list(dict.fromkeys(curves.thresholds_for(score_NL, CURVE_SAVINGS)))


def calibration_rows(
    held_out: Record | None, reported: Record, evaluation_config: EvaluationConfig
) -> tuple[Record | None, str | None]:
    """The rows to choose thresholds on (None: cross-fit), and a warning.

    `auto` looks at lengths and logits of the reported rows, never at their labels.
    """
    if held_out is None:
        if evaluation_config.calibration not in ("auto", "crossfit"):
            raise UserError(NO_ROWS.format(evaluation_config.calibration))
        return None, None
    if evaluation_config.calibration == "crossfit":
        return None, None
    held_out.check()
    if difference := calibrate.unlike(held_out, reported):
        plain = f"the rows of split {held_out.split!r} are unlike those of {reported.split!r}"
        if evaluation_config.calibration == "auto":
            return None, (
                f"{plain} ({difference}): thresholds are cross-fitted over {reported.split!r} "
                "instead (calibration=heldout would force them)"
            )
        return held_out, f"{plain} ({difference}): don't rely on what is expected or promised"
    return held_out, None
