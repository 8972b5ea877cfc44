"""The values of evaluate.py's command line -> what is asked of the model or its records.

Builds no model and reads no rows.
"""

from dataclasses import fields
from typing import Any

from deebert import curves, exits
from deebert.calibrate import Wish
from deebert.checkpoints import Origin
from deebert.data import CALIBRATION, TextDataModule
from deebert.errors import UserError
from deebert.evaluation import Question
from deebert.exits import Rule, Score
from deebert.tasks import Task


def check(config: dict[str, Any]) -> None:
    """What would otherwise fail after the model has run.

    Raises:
        UserError: a value is of the wrong kind, or two contradict each other.
    """
    if config["analysis"] and config["record"]:
        raise UserError("analysis=true runs the model, which a record has not: give ckpt= alone")
    if config["split"] is not None and not isinstance(config["split"], str):
        raise UserError(f"split={config['split']} must be the name of one split")
    if not isinstance(config["calibration"], str):
        raise UserError(
            f"calibration={config['calibration']} must be auto, heldout, crossfit, or a split"
        )
    for flag in ("per_ramp", "temperature", "analysis"):
        if not isinstance(config[flag], bool):
            raise UserError(f"{flag}={config[flag]} must be true or false")
    wishes = [
        name
        for name in ("threshold", "thresholds", "target_saving", "max_drop")
        if config[name] is not None
    ]
    if len(wishes) > 1:
        listed = " and ".join(f"{name}={config[name]}" for name in wishes)
        raise UserError(f"{listed}: ask for one of them")
    if not {"target_saving", "max_drop"} & set(wishes):
        for flag in ("per_ramp", "temperature"):
            if config[flag]:
                raise UserError(f"{flag}=true needs target_saving= or max_drop=")


def asked(config: dict[str, Any], task: Task, score: Score | None) -> Question:
    """The exit rule, the curve's thresholds and the wish.

    Args:
        score: what `exit.score` names; None for the task's default rule.
    """
    rule = exits.default(task.num_labels)
    if score is not None:
        values = {name: config["exit"].get(name) for name in ("name", "largest")}
        regression = bool(config["exit"].get("regression"))
        rule = Rule(score=score, num_labels=task.num_labels, regression=regression, **values)
    wish = None
    if config["target_saving"] is not None or config["max_drop"] is not None:
        wish = Wish(**{field.name: config[field.name] for field in fields(Wish)})
    thresholds: list[Any] | None = None
    if config["threshold"] is not None:
        given = curves.check_thresholds(config["threshold"], "threshold")
        thresholds = [given if isinstance(config["threshold"], list) else given[0]]
    elif config["thresholds"] is not None:
        thresholds = list(curves.check_thresholds(config["thresholds"], "thresholds"))
    return Question(rule, thresholds, wish, config["calibration"])


def calibration_split(config: dict[str, Any], data: TextDataModule, origin: Origin) -> str | None:
    """The split that thresholds are chosen on, if it is another than the reported one."""
    named: str = config["calibration"]
    if named == "crossfit" or config["threshold"] is not None:
        return None
    if named not in ("auto", "heldout"):
        if named in data.eval_splits:
            raise UserError(
                f"calibration={named} is the reported split itself: use calibration=crossfit, or "
                "report another (split=...)"
            )
        return named
    # Another task's rows (ax with an MNLI checkpoint) have no held-out part.
    same = config["task"]["name"] == origin.config["task"]["name"]
    return CALIBRATION if same and data.calibration_size else None
