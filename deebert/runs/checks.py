"""What would otherwise fail late, or train on nonsense."""

from typing import Any

from deebert.errors import UserError, is_number, is_whole
from deebert.exits import curves
from deebert.models.trained_ramps import trains_ramps
from deebert.training import objectives


def check(config: dict[str, Any]) -> None:
    """What would otherwise fail late, or train on nonsense; for both entries.

    Raises:
        UserError: a value is of the wrong kind or outside its range.
    """
    data = config["data"]
    _whole("seed", config["seed"], 0, 2**32 - 1)
    _whole(
        "data.max_length", data["max_length"], 8
    )  # special tokens and a word or two of each text
    _whole("data.eval_batch_size", data["eval_batch_size"], 1)
    _whole("data.num_workers", data["num_workers"], 0)
    if data["limit_train"] is not None:
        _whole("data.limit_train", data["limit_train"], 1)
    if data["calibration_size"] is not None:
        _whole("data.calibration_size", data["calibration_size"], 0)
    if data["root"] is not None and not isinstance(data["root"], str):
        raise UserError(f"data.root={data['root']} must be a folder")
    if "stage" in config:
        _check_training(config)
        _check_objective(config)


def _check_training(config: dict[str, Any]) -> None:
    stage = config["stage"]
    recipe, flag = config["stages"].get(str(stage)), f"stages.{stage}"
    if not isinstance(recipe, dict):
        raise UserError(f"{flag}={recipe} must hold a recipe (epochs, batch_size, lr, ...)")
    _whole(f"{flag}.epochs", recipe["epochs"], 1)
    _whole(f"{flag}.batch_size", recipe["batch_size"], 1)
    for key in ("lr", "warmup", "weight_decay", *({"layer_drop"} & recipe.keys())):
        value = recipe[key]
        if not is_number(value) or not 0 <= value <= 1 or (key == "lr" and value == 0):
            raise UserError(f"{flag}.{key}={value} must be a number between 0 and 1")
    if recipe.get("layer_drop") == 1:
        raise UserError(f"{flag}.layer_drop=1 must be below 1, or no layer would ever learn")
    if config["trainer"]["max_epochs"] != recipe["epochs"]:
        raise UserError(
            f"trainer.max_epochs={config['trainer']['max_epochs']}: the number of epochs is part "
            f"of the recipe; set {flag}.epochs"
        )
    if config["thresholds"] is not None:
        curves.check_thresholds(config["thresholds"], "thresholds")
    monitor = ((config["callbacks"] or {}).get("best") or {}).get("monitor")
    if monitor == "val/score" and trains_ramps(config["objective"]["name"]):
        raise UserError(
            "callbacks.best.monitor=val/score is the score at full depth, which says nothing of "
            "the ramps that are trained; use callbacks.best.monitor=val/mean_ramp_score"
        )
    precision = str(config["trainer"]["precision"])
    standardize = stage == 2 and recipe["standardize"]
    if precision in ("bf16-true", "16-true") and (standardize or config["task"]["labels"] is None):
        what = "faint differences that stages.2.standardize=true shows" if standardize else "labels"
        raise UserError(
            f"trainer.precision={precision} would round the {what}: use "
            f"trainer.precision={precision.replace('true', 'mixed')}"
        )
    if stage != 2:
        return
    for key in ("cache", "standardize"):
        if not isinstance(recipe[key], bool):
            raise UserError(f"{flag}.{key}={recipe[key]} must be true or false")
    if recipe["standardize"] and config["ramp"].get("reads") == "attention":
        raise UserError(
            "stages.2.standardize=true needs frozen states, and ramp=attention learns what it "
            "reads: use another ramp, or stages.2.standardize=false"
        )
    if recipe["standardize"] and not recipe["cache"]:
        raise UserError(
            "stages.2.standardize=true needs the frozen states: leave stages.2.cache=true"
        )


def _check_objective(config: dict[str, Any]) -> None:
    """Does the objective fit what it is given to learn from?"""
    objective = objectives.build(config["objective"], config["stage"])
    if objective.needs_classes and config["task"]["labels"] is None:
        raise UserError(
            f"objective={objective.name} needs classes, whose entropy a regression has not: use "
            "objective=joint, in stage=2 objective=ramps, or another"
        )
    if config["teacher"] and not objective.taught:
        raise UserError(
            f"teacher={config['teacher']} with objective={objective.name}: nothing would be "
            "learned from it; use objective=student"
        )
    if objective.taught and not config["teacher"]:
        raise UserError(f"objective={objective.name} needs teacher=RUN, a stage-1 run")
    splits = config["data"].get("unlabelled")
    if splits and not objective.unlabelled:
        able = [name for name, build in objectives.OBJECTIVES.items() if build().unlabelled]
        raise UserError(
            f"data.unlabelled={splits} with objective={objective.name}, which learns from labels "
            f"alone; choose one of: {', '.join(able)} (objective=...)"
        )


def _whole(flag: str, value: Any, low: int, high: int | None = None) -> None:
    if not is_whole(value) or value < low or (high is not None and value > high):
        limit = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise UserError(f"{flag}={value} must be a whole number {limit}")
