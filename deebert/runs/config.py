"""The typed configurations of train.py and evaluate.py.

Each is built from Hydra's configuration in one pass, which checks every value and the values
against each other. This module reads no files, and does not know the model or the rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from deebert.data.tasks import DataConfig, Task
from deebert.errors import UserError, check_whole, is_number
from deebert.evaluation.engine_latency import Protocol
from deebert.evaluation.evaluate_records import EvaluationConfig, check_lengths
from deebert.exits import curves, rules
from deebert.exits.rules import Rule
from deebert.exits.target import Target
from deebert.hub.run_config import RunConfig
from deebert.options import import_modules, job_command
from deebert.runs import engine_settings
from deebert.runs.job import Job
from deebert.training import objectives
from deebert.training.objectives import Objective


@dataclass(frozen=True)
class JobConfig:
    """The configuration of a job; the base of `TrainConfig` and `EvaluateConfig`.

    Attributes:
        run: the part that checkpoints and records hold.
        written: all plain values of the job, as Hydra has composed them.
    """

    run: RunConfig
    written: Mapping[str, Any] = field(repr=False)

    def plain(self) -> dict[str, Any]:
        """Return all values of the job, for the loggers."""
        run = self.run.plain()
        return {**self.written, **{name: run[name] for name in ("task", "backbone", "data")}}

    def name(self, kind: str) -> str:
        """Return the name of the run in W&B; `kind` says what runs, such as `stage1`."""
        task, backbone = self.run.task.name, self.run.backbone.name
        return f"{task}-{backbone}-{kind}-seed{self.written['seed']}"


@dataclass(frozen=True)
class TrainConfig(JobConfig):
    """The configuration of train.py.

    Attributes:
        resume: the interrupted run that the training goes on with, or None.
        objective: the objective.
    """

    resume: str | None
    objective: Objective

    @classmethod
    def from_hydra(cls, cfg: DictConfig) -> Self:
        """Build the configuration, and check it.

        Raises:
            UserError: a value has the wrong type, is outside its range, or contradicts another.
        """
        values = _plain(cfg)
        run = RunConfig.from_plain(values)
        if run.trainer["max_epochs"] != run.recipe.epochs:
            raise UserError(
                f"trainer.max_epochs={run.trainer['max_epochs']}: the number of epochs is part "
                f"of the recipe; set stages.{run.stage}.epochs"
            )
        objective = objectives.build(run.objective.plain(), run.stage)
        _check_objective(objective, run)
        return cls(run, values, values["resume"], objective)


def _check_objective(objective: Objective, run: RunConfig) -> None:
    """Check that the objective fits the task, the teacher and the data.

    Raises:
        UserError: it does not.
    """
    if objective.needs_classes and run.task.is_regression:
        raise UserError(
            f"objective={objective.name} needs classes, whose entropy a regression has not: use "
            "objective=joint, in stage=2 objective=ramps, or another"
        )
    if run.teacher and not objective.needs_teacher:
        raise UserError(
            f"teacher={run.teacher} with objective={objective.name}: nothing would be "
            "learned from it; use objective=student"
        )
    if objective.needs_teacher and not run.teacher:
        raise UserError(f"objective={objective.name} needs teacher=RUN, a stage-1 run")
    if run.data.unlabelled and not objective.unlabelled:
        names = [name for name, kind in objectives.OBJECTIVES.items() if kind.unlabelled]
        raise UserError(
            f"data.unlabelled={list(run.data.unlabelled)} with objective={objective.name}, which "
            f"learns from labels alone; choose one of: {', '.join(names)} (objective=...)"
        )


@dataclass(frozen=True)
class EvaluateConfig(JobConfig):
    """The configuration of evaluate.py.

    `run` is the configuration of the checkpoint, with the task, the backbone and the data of this
    evaluation.

    Attributes:
        ckpt: the checkpoint, or None if records are evaluated.
        record: the folder of the records, or None.
        split: the split that is reported, or None for the task's validation splits.
        layers: the layers to keep, counted from 1; None for all.
        calibration: where thresholds are chosen: `auto`, `heldout`, `crossfit` or a split.
        analysis: whether each layer is analysed, too.
        evaluation: the exit rule, the thresholds and the target.
        precision: the precision of the model that is evaluated.
        runtime: the library that computes its layers in this precision.
        protocol: how latency is measured, or None.
        threshold: the threshold that the user has set, one for all ramps or one for each; or None.
        is_timed: whether the user asks for a timing.
    """

    ckpt: str | None
    record: str | None
    split: str | None
    layers: list[int] | None
    calibration: str
    analysis: bool
    evaluation: EvaluationConfig
    precision: str
    runtime: str
    protocol: Protocol | None
    threshold: Any
    is_timed: bool

    @classmethod
    def from_hydra(cls, cfg: DictConfig, source: RunConfig, job: Job) -> Self:
        """Build the configuration, and check the values that would fail after the model has run.

        Args:
            cfg: the configuration of evaluate.py, completed from the checkpoint.
            source: the configuration of the checkpoint.
            job: the job that runs.

        Raises:
            UserError: a value has the wrong type, is outside its range, or contradicts another.
        """
        values = _plain(cfg)
        check_whole("seed", values["seed"], 0, 2**32 - 1)
        DataConfig.from_plain(values["data"])
        _check_types(values)
        _check_points(values)
        precisions = engine_settings.precisions_of(values, job)
        protocol = engine_settings.protocol_of(values, precisions)
        engine_settings.check_protocol(values, protocol, job)
        run = source.replaced(**{name: values[name] for name in ("task", "data", "backbone")})
        names = ("ckpt", "record", "split", "layers", "calibration", "analysis", "threshold")
        return cls(
            run=run,
            written=values,
            evaluation=_evaluation(values, run.task),
            precision=precisions[0],
            runtime=values["runtime"],
            protocol=protocol,
            is_timed=values["timing"] is not None,
            **{name: values[name] for name in names},
        )

    def check_model(self, num_layers: int, *, learned: bool, trained: bool) -> None:
        """Check that the evaluation fits the model, before the model has run.

        Args:
            num_layers: the number of layers (= ramps) of the model.
            learned: whether the ramps have a learned exit score.
            trained: whether the ramps are trained.

        Raises:
            UserError: thresholds or temperatures are not as many as the ramps, the exit rule reads
                a learned score that the ramps do not have, or a target or a timing needs trained
                ramps.
        """
        is_timed = self.is_timed and self.threshold != 0
        rule = self.evaluation.rule
        if not trained and (self.evaluation.target is not None or is_timed):
            raise UserError(
                f"{'timing=' if is_timed else 'a target'} needs trained ramps, and this "
                f"checkpoint is of stage 1: train them with {job_command('train')} stage=2 "
                "ckpt=RUN, or look at full depth alone: threshold=0"
            )
        if rule.reads == "learned_score" and not learned:
            raise UserError(rules.NOT_LEARNED.format(rule.name))
        check_lengths(self.evaluation.thresholds, num_layers)
        if rule.temperatures is not None and len(rule.temperatures) != num_layers:
            raise UserError(
                f"temperature={self.written['temperature']} has {len(rule.temperatures)} values; "
                f"give one for each of the {num_layers} ramps"
            )


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain values, with all references resolved.

    Raises:
        UserError: the task is missing.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    values: dict[str, Any] = {str(key): value for key, value in config.items()}
    if values.get("task") is None:
        tasks = GlobalHydra.instance().config_loader().get_group_options("task")
        raise UserError(
            f"task= is missing: {job_command('train')} task=mrpc stage=1, or a file of your own: "
            f"data.file=tickets.csv; choose one of: {', '.join(tasks)}"
        )
    # The paths are saved in the checkpoint, and must be valid in another working directory, too.
    for block, key in (("data", "root"), ("data", "file"), ("task", "root")):
        if isinstance(path := values[block].get(key), str) and path:
            values[block][key] = str(Path(path).absolute())
    return values


def _check_types(values: Mapping[str, Any]) -> None:
    """Check the values of an evaluation one by one.

    Raises:
        UserError: a value has the wrong type, or does not go with a record.
    """
    if values["analysis"] and values["record"]:
        raise UserError("analysis=true runs the model, which a record has not: give ckpt= alone")
    if values["layers"] is not None and values["record"]:
        raise UserError(f"layers={values['layers']} cuts the model, which a record has not")
    if values["split"] is not None and not isinstance(values["split"], str):
        raise UserError(f"split={values['split']} must be the name of one split")
    if not isinstance(values["calibration"], str):
        raise UserError(
            f"calibration={values['calibration']} must be auto, heldout, crossfit, or a split"
        )
    if (rule := values.get("exit")) and "name" not in rule:
        given = " ".join(f"exit.{name}={value}" for name, value in rule.items())
        raise UserError(f"{given} without a rule: say exit=NAME, too ({', '.join(rules.RULES)})")
    for flag in ("per_ramp", "analysis"):
        if not isinstance(values[flag], bool):
            raise UserError(f"{flag}={values[flag]} must be true or false")
    temperature = values["temperature"]
    listed = temperature if isinstance(temperature, list) else []
    numbers = listed and all(is_number(value) and value > 0 for value in listed)
    if not numbers and not isinstance(temperature, bool):
        raise UserError(
            f"temperature={temperature} must be true (fit them), false, or a list of numbers "
            "above 0, one for each ramp"
        )


def _check_points(values: Mapping[str, Any]) -> None:
    """Check that an evaluation has at most one target or threshold, and what goes with it.

    Raises:
        UserError: it has several, or a switch has no target.
    """
    given = engine_settings.given_points(values)
    if len(given) > 1:
        both = " and ".join(f"{name}={values[name]}" for name in given)
        raise UserError(f"{both}: ask for one of them")
    if {"target_saving", "max_drop"} & set(given):
        return
    needed = {"per_ramp": "target_saving=", "temperature": "target_saving= or max_drop="}
    for flag, targets in needed.items():
        if values[flag] is True:
            raise UserError(f"{flag}=true needs {targets}")


def _evaluation(values: Mapping[str, Any], task: Task) -> EvaluationConfig:
    """Return the exit rule, the curve's thresholds and the target.

    Raises:
        UserError: the exit rule does not work, or does not fit the other values.
    """
    rule, temperature = _rule(values.get("exit"), task), values["temperature"]
    if rule.reads == "learned_score" and temperature is not False:
        raise UserError(
            f"temperature={temperature}: exit={rule.name} reads a learned score, which "
            "no temperature changes; leave it out"
        )
    if isinstance(temperature, list):
        rule = rule.fitted(temperatures=temperature)
    settings = {field.name: values[field.name] for field in fields(Target) if field.name in values}
    target = Target(**settings | {"temperature": temperature is True})
    has_target = any(values[name] is not None for name in engine_settings.TARGETS)
    if rule.needs_prior and (not has_target or target.max_drop is not None):
        raise UserError(rules.NO_PRIOR.format(rule.name))
    thresholds: list[Any] | None = None
    if values["threshold"] is not None:
        given = curves.check_thresholds(values["threshold"], "threshold")
        thresholds = [given if isinstance(values["threshold"], list) else given[0]]
    elif values["thresholds"] is not None:
        thresholds = list(curves.check_thresholds(values["thresholds"], "thresholds"))
    return EvaluationConfig(rule, thresholds, target if has_target else None, values["calibration"])


def _rule(values: dict[str, Any] | None, task: Task) -> Rule:
    """Return the exit rule that a file in `conf/exit/` names.

    Args:
        values: the content of the file: the name, the module that registers the rule (None: it is
            one of the package), the prior, and the options of the rule. None stands for the task's
            default rule.
        task: the task.

    Raises:
        UserError: there is no such module, rule or option, or the rule does not work.
    """
    if not values:
        return rules.default(task.num_labels)
    options = dict(values)
    name, prior = options.pop("name"), options.pop("prior", None)
    if (module := options.pop("module", None)) is not None:
        if not isinstance(module, str):
            raise UserError(f"exit.module={module} must be the name of a Python module")
        import_modules(module)
    return rules.named(name, task.num_labels, **options).fitted(prior=prior)
