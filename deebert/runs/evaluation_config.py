"""The values of evaluate.py's command line -> what is asked of the model or its records.

Builds no model and reads no rows.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import HELD_OUT, Task
from deebert.errors import UserError, first_line, is_number, is_whole, unknown
from deebert.evaluation.evaluate_records import NO_ROWS, EvaluationConfig, check_lengths
from deebert.evaluation.latency import Protocol
from deebert.exits import curves, rules
from deebert.exits.rules import Rule, Score
from deebert.exits.target import Target
from deebert.hub.checkpoints import Source
from deebert.inference.engine import RUNTIMES
from deebert.inference.kernels import PRECISIONS

TARGETS = ("target_saving", "target_speedup", "max_drop")
READS = ("logits", "learned_score")


def check(config: dict[str, Any], said: Callable[[str], bool]) -> None:
    """What would otherwise fail after the model has run.

    Args:
        said: is this key on the command line?

    Raises:
        UserError: a value is of the wrong kind, or two contradict each other.
    """
    if config["analysis"] and config["record"]:
        raise UserError("analysis=true runs the model, which a record has not: give ckpt= alone")
    if config["layers"] is not None and config["record"]:
        raise UserError(f"layers={config['layers']} cuts the model, which a record has not")
    if config["split"] is not None and not isinstance(config["split"], str):
        raise UserError(f"split={config['split']} must be the name of one split")
    if not isinstance(config["calibration"], str):
        raise UserError(
            f"calibration={config['calibration']} must be auto, heldout, crossfit, or a split"
        )
    if (rule := config.get("exit")) and not {"name", "score"} <= set(rule):
        given = " ".join(f"exit.{name}={value}" for name, value in rule.items())
        raise UserError(f"{given} without a rule: say exit=NAME, too ({', '.join(rules.RULES)})")
    for flag in ("per_ramp", "analysis"):
        if not isinstance(config[flag], bool):
            raise UserError(f"{flag}={config[flag]} must be true or false")
    temperature = config["temperature"]
    listed = temperature if isinstance(temperature, list) else []
    numbers = listed and all(is_number(value) and value > 0 for value in listed)
    if not numbers and not isinstance(temperature, bool):
        raise UserError(
            f"temperature={temperature} must be true (fit them), false, or a list of numbers "
            "above 0, one for each ramp"
        )
    asking = ("threshold", "thresholds", *TARGETS)
    targets = [name for name in asking if config[name] is not None]
    if len(targets) > 1:
        both = " and ".join(f"{name}={config[name]}" for name in targets)
        raise UserError(f"{both}: ask for one of them")
    if not {"target_saving", "max_drop"} & set(targets):
        for flag, needed in (
            ("per_ramp", "target_saving="),
            ("temperature", "target_saving= or max_drop="),
        ):
            if config[flag] is True:
                raise UserError(f"{flag}=true needs {needed}")
    if protocol(config) is None:
        for flag in ("precision", "runtime", "repeats", "threads"):
            if said(flag):
                raise UserError(f"{flag}={config[flag]} is of what is timed: add timing=all")
        return
    if config["record"]:
        raise UserError("timing= and target_speedup= run the model: give ckpt=, not record=")
    if not targets:
        raise UserError(
            f"timing={config['timing']} needs something to time: {'= or '.join(asking)}="
        )


def asked(config: dict[str, Any], task: Task, score: Score | None) -> EvaluationConfig:
    """The exit rule, the curve's thresholds and the target.

    Args:
        score: what `exit.score` names; None for the task's default rule.
    """
    rule = rules.default(task.num_labels) if score is None else _rule(config["exit"], score, task)
    if rule.reads == "learned_score" and config["temperature"] is not False:
        raise UserError(
            f"temperature={config['temperature']}: exit={rule.name} judges by a learned score, "
            "which no temperature changes; leave it out"
        )
    if isinstance(config["temperature"], list):
        rule = rule.fitted(temperatures=config["temperature"])
    values = {field.name: config[field.name] for field in fields(Target) if field.name in config}
    target = Target(**values | {"temperature": config["temperature"] is True})
    wished = any(config[name] is not None for name in TARGETS)
    if rule.needs_prior and (not wished or target.max_drop is not None):
        raise UserError(rules.NO_PRIOR.format(rule.name))
    thresholds: list[Any] | None = None
    if config["threshold"] is not None:
        given = curves.check_thresholds(config["threshold"], "threshold")
        thresholds = [given if isinstance(config["threshold"], list) else given[0]]
    elif config["thresholds"] is not None:
        thresholds = list(curves.check_thresholds(config["thresholds"], "thresholds"))
    return EvaluationConfig(rule, thresholds, target if wished else None, config["calibration"])


def protocol(config: dict[str, Any]) -> Protocol | None:
    """How to measure seconds, or None where nobody asks.

    Raises:
        UserError: a value is not one of its choices.
    """
    timing = config["timing"]
    if timing is None and config["target_speedup"] is None:
        return None
    sizes, precisions = _listed("all" if timing is None else timing), _listed(config["precision"])
    for size in sizes:
        if size != "all" and not _is_count(size):
            raise UserError(
                f"timing={config['timing']}: {size} is neither all nor a whole number of inputs a "
                "request (1 or more); give one of them or a list"
            )
    for precision in precisions:
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS, "precision")
    if config["runtime"] not in RUNTIMES:
        raise unknown("runtime", config["runtime"], RUNTIMES, "runtime")
    for flag, listed in (("timing", sizes), ("precision", precisions)):
        if not listed:
            raise UserError(f"{flag}=[] is empty; leave it out, or name something to time")
    if not _is_count(config["repeats"]):
        raise UserError(f"repeats={config['repeats']} must be a whole number of 1 or more")
    if config["threads"] is not None and not _is_count(config["threads"]):
        raise UserError(f"threads={config['threads']} must be a whole number of 1 or more, or null")
    return Protocol(
        tuple(None if size == "all" else size for size in sizes),
        tuple(precisions),
        config["runtime"],
        config["repeats"],
        config["threads"],
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 1


def _rule(values: dict[str, Any], score: Score, task: Task) -> Rule:
    """The rule that `conf/exit/` names, tried on a few logits before the model has run."""
    largest, regression = values.get("largest"), values.get("regression", False)
    if largest is not None and not (is_number(largest) and largest > 0):
        raise UserError(f"exit.largest={largest} must be a number above 0, or null")
    if regression is not None and not isinstance(regression, bool):
        raise UserError(f"exit.regression={regression} must be true, false, or null for either")
    if not callable(score):
        raise UserError(f"exit.score={values['score']} must name a function (_target_, _partial_)")
    told = {name: v for name, v in values["score"].items() if not str(name).startswith("_")}
    looks_back = values.get("looks_back", True)
    if not isinstance(looks_back, bool):
        raise UserError(f"exit.looks_back={looks_back} must be true or false")
    if (reads := values.get("reads", "logits")) not in READS:
        raise unknown("exit.reads", reads, READS, "exit.reads")
    relative = values.get("relative", False)
    if not isinstance(relative, bool):
        raise UserError(f"exit.relative={relative} must be true or false")
    rule = Rule(
        str(values["name"]), score, task.num_labels, largest, regression, looks_back, reads,
        relative=relative, prior=values.get("prior"), options=told,
    )  # fmt: skip
    tried = rule.uniform()
    try:
        tried(torch.zeros(2, 4, task.num_labels), torch.zeros(2, 4))
        alone = rule.looks_back or _scores_ramps_alone(tried)
    except UserError:
        raise
    except Exception as error:  # a function of the user's own may fail in any way
        reason = first_line(error)
        raise UserError(
            f"exit={rule.name}: its function fails: {reason} (exit.score, exit.relative)"
        ) from error
    if not alone:
        raise UserError(
            f"exit.looks_back=false, but what exit={rule.name} says of a ramp depends on those "
            "before it; say exit.looks_back=true"
        )
    return rule


def _scores_ramps_alone(rule: Rule) -> bool:
    """Is a ramp judged the same without the ramps before it?"""
    generator = torch.Generator().manual_seed(0)
    logits_NLC = torch.randn(8, 4, rule.num_labels, generator=generator)
    learned_score_NL = torch.rand(8, 4, generator=generator)
    together, alone = (
        rule(logits_NLC, learned_score_NL),
        rule(logits_NLC[:, -1:], learned_score_NL[:, -1:]),
    )
    return torch.allclose(together.score_NL[:, -1:], alone.score_NL) and torch.allclose(
        together.answer_NLC[:, -1:], alone.answer_NLC
    )


def check_model(
    evaluation_config: EvaluationConfig,
    config: dict[str, Any],
    num_layers: int,
    *,
    learned: bool,
    trained: bool,
) -> None:
    """What can be known before the model has run.

    Args:
        learned: have the ramps a learned exit score?
        trained: are the ramps?

    Raises:
        UserError: thresholds or temperatures are not as many as the ramps, the exit rule reads
            what is not there, or untrained ramps are asked for more than a curve.
    """
    timed = config["timing"] is not None and config["threshold"] != 0
    if not trained and (evaluation_config.target is not None or timed):
        raise UserError(
            f"{'timing=' if timed else 'a target'} needs trained ramps, and this checkpoint is of "
            "stage 1: train them with python train.py stage=2 ckpt=RUN, or look at full depth "
            "alone: threshold=0"
        )
    if evaluation_config.rule.reads == "learned_score" and not learned:
        raise UserError(rules.NOT_LEARNED.format(evaluation_config.rule.name))
    check_lengths(evaluation_config.thresholds, num_layers)
    temperatures = evaluation_config.rule.temperatures
    if temperatures is not None and len(temperatures) != num_layers:
        raise UserError(
            f"temperature={config['temperature']} has {len(temperatures)} values; give one for "
            f"each of the {num_layers} ramps"
        )


def calibration_split(config: dict[str, Any], data: TextDataModule, source: Source) -> str | None:
    """The split that thresholds are chosen on, if it is another than the reported one."""
    named: str = config["calibration"]
    if named == "crossfit" or all(config[name] is None for name in TARGETS):
        return None
    if named not in ("auto", "heldout"):
        splits = [*data.task.validation, *data.task.test]
        if named not in splits:  # the training split is one that the ramps were fitted on
            choices = ["auto", "heldout", "crossfit", *splits]
            raise unknown("calibration", named, choices, "calibration")
        if named in data.eval_splits:
            raise UserError(
                f"calibration={named} is the reported split itself: use calibration=crossfit, or "
                "report another (split=...)"
            )
        return named
    # Another task's rows (ax with an MNLI checkpoint) have no held-out part.
    same = config["task"]["name"] == source.config["task"]["name"]
    if same and HELD_OUT not in data.eval_splits and data.calibration_size:
        return HELD_OUT
    if named == "heldout":
        raise UserError(NO_ROWS.format(named))
    return None
