"""The typed configuration of a run, as a checkpoint, a saved folder or a record holds it.

`RunConfig.plain` gives the values back as they were written: the same keys in the same order.
`checkpoint_config` decides which values of a file are taken. This module does not know the
command line, objectives or Lightning.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from os.path import exists
from pathlib import Path
from typing import Any, Self

from deebert.data.tasks import DataConfig, Task
from deebert.errors import UserError, check_whole, is_number
from deebert.exits import curves
from deebert.models.backbones import BackboneConfig
from deebert.models.ramps import RampKind
from deebert.models.trained_ramps import ObjectiveConfig

# The keys of a run's configuration that a checkpoint holds. They make the checkpoint
# self-describing and the run resumable.
KEYS = (
    "task", "backbone", "ramp", "data", "stage", "stages", "objective", "seed", "trainer",
    "callbacks", "thresholds", "teacher",
)  # fmt: skip
COARSE = ("bf16-true", "16-true")  # precisions of the Trainer that round faint differences
NEEDED = ("task", "backbone", "data", "stage", "stages", "objective", "seed")
# The keys of a saved folder. The others hold paths of the machine that it was trained on, or name
# code.
PUBLIC = ("task", "backbone", "ramp", "data", "stage", "stages", "objective", "seed", "thresholds")


@dataclass(frozen=True)
class Recipe:
    """The recipe of one stage: the block `stages.1` or `stages.2` of the configuration.

    A converted classifier states no recipe: its numbers are 0.

    Attributes:
        epochs: the number of epochs.
        batch_size: the number of rows in a batch of one device.
        lr: the learning rate after the warm-up.
        weight_decay: the weight decay; biases and LayerNorms have none.
        warmup: the share of the steps in which the learning rate grows.
        layer_drop: the probability that a batch skips a layer, in stage 1.
        cache: whether stage 2 trains on frozen states that are computed once.
        standardize: whether the ramps' features are standardized, in stage 2.
    """

    epochs: int = 0
    batch_size: int = 0
    lr: float = 0.0
    weight_decay: float = 0.0
    warmup: float = 0.0
    layer_drop: float = field(default=0.0, metadata={"stage": 1})
    cache: bool = field(default=False, metadata={"stage": 2})
    standardize: bool = field(default=False, metadata={"stage": 2})

    @classmethod
    def keys(cls, stage: int) -> list[str]:
        """Return the keys of the recipe of a stage."""
        return [each.name for each in fields(cls) if each.metadata.get("stage", stage) == stage]

    @classmethod
    def from_checked(cls, values: Mapping[str, Any] | None) -> Self:
        """Build a recipe from plain values that `checkpoint_config` has accepted."""
        known = {field.name for field in fields(cls)}
        given = (values or {}).items()
        return cls(**{key: value for key, value in given if key in known and value is not None})

    @classmethod
    def from_plain(cls, values: Any, stage: int) -> Self:
        """Build a recipe from the plain values that a user sets, and check each of them.

        Args:
            values: the block.
            stage: the stage, 1 or 2.

        Raises:
            UserError: a value has the wrong type, or is outside its range.
        """
        flag = f"stages.{stage}"
        if not isinstance(values, dict):
            raise UserError(f"{flag}={values} must hold a recipe (epochs, batch_size, lr, ...)")
        check_whole(f"{flag}.epochs", values["epochs"], 1)
        check_whole(f"{flag}.batch_size", values["batch_size"], 1)
        for key in ("lr", "warmup", "weight_decay", *({"layer_drop"} & values.keys())):
            value = values[key]
            if not is_number(value) or not 0 <= value <= 1 or (key == "lr" and value == 0):
                raise UserError(f"{flag}.{key}={value} must be a number between 0 and 1")
        if values.get("layer_drop") == 1:
            raise UserError(f"{flag}.layer_drop=1 must be below 1, or no layer would ever learn")
        for key in ("cache", "standardize") if stage == 2 else ():
            if not isinstance(values[key], bool):
                raise UserError(f"{flag}.{key}={values[key]} must be true or false")
        return cls.from_checked(values)


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run that a checkpoint remembers.

    Attributes:
        task: the task.
        backbone: the backbone that the run started from.
        ramp: the settings of the ramps before the last (`ramp_kind`).
        data: the settings of the rows.
        stage: the stage, 1 or 2.
        recipe: the recipe of this stage. The recipe of the other stage is only carried along.
        objective: the objective.
        seed: the seed.
        trainer: the arguments of Lightning's Trainer.
        callbacks: the blocks of Lightning's callbacks, by key.
        thresholds: the thresholds of the curve, or None for the task's default.
        teacher: the checkpoint that a student learns from, or None.
        written: all values as they were written. `plain` returns them.
    """

    task: Task
    backbone: BackboneConfig
    ramp: Mapping[str, Any]
    data: DataConfig
    stage: int
    recipe: Recipe
    objective: ObjectiveConfig
    seed: int
    trainer: Mapping[str, Any]
    callbacks: Mapping[str, Any]
    thresholds: float | list[float] | None
    teacher: str | None
    written: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_checked(cls, values: Mapping[str, Any]) -> Self:
        """Build the configuration from plain values that `checkpoint_config` has accepted.

        Raises:
            UserError: the task is invalid, or a block is missing.
        """
        _check_complete(values)
        stage = values["stage"]
        return cls(
            task=Task.from_config(values["task"]),
            backbone=BackboneConfig.from_plain(values["backbone"]),
            ramp=values.get("ramp") or {},
            data=DataConfig.from_checked(values["data"]),
            stage=stage,
            recipe=Recipe.from_checked(values["stages"].get(str(stage))),
            objective=ObjectiveConfig.from_plain(values["objective"]),
            seed=values["seed"],
            trainer=values.get("trainer") or {},
            callbacks=values.get("callbacks") or {},
            thresholds=values.get("thresholds"),
            teacher=values.get("teacher"),
            written=values,
        )

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Build the configuration from the plain values that a user sets, and check them.

        Raises:
            UserError: a value has the wrong type, is outside its range, or contradicts another.
        """
        _check_complete(values)
        check_whole("seed", values["seed"], 0, 2**32 - 1)
        DataConfig.from_plain(values["data"])
        Recipe.from_plain(values["stages"].get(str(values["stage"])), values["stage"])
        if values.get("thresholds") is not None:
            curves.check_thresholds(values["thresholds"], "thresholds")
        config = cls.from_checked({key: values.get(key) for key in KEYS})
        config._check()
        return config

    def _check(self) -> None:
        """Check the values that must fit each other.

        Raises:
            UserError: two values contradict each other.
        """
        monitor = (self.callbacks.get("best") or {}).get("monitor")
        if monitor == "val/score" and self.objective.trains_ramps:
            raise UserError(
                "callbacks.best.monitor=val/score is the score at full depth, which says nothing "
                "of the ramps that are trained; use callbacks.best.monitor=val/mean_ramp_score"
            )
        standardize = self.stage == 2 and self.recipe.standardize
        precision = str(self.trainer.get("precision"))
        if precision in COARSE and (standardize or self.task.is_regression):
            faint = "faint differences that stages.2.standardize=true shows"
            raise UserError(
                f"trainer.precision={precision} would round the "
                f"{faint if standardize else 'labels'}: use "
                f"trainer.precision={precision.replace('true', 'mixed')}"
            )
        if standardize and self.ramp_kind.reader.has_weights:
            raise UserError(
                "stages.2.standardize=true needs frozen states, and "
                f"ramp={self.ramp_kind.reads} learns what it reads: use another ramp, or "
                "stages.2.standardize=false"
            )
        if standardize and not self.recipe.cache:
            raise UserError(
                "stages.2.standardize=true needs the frozen states: leave stages.2.cache=true"
            )

    @cached_property
    def ramp_kind(self) -> RampKind:
        """The kind of the ramps before the last.

        It is built when it is needed: a record can be read without the user's module that defines
        what its ramps read.

        Raises:
            UserError: a setting is unknown, or a value is not one of its choices.
        """
        return RampKind.from_config(self.ramp)

    def plain(self) -> dict[str, Any]:
        """Return the plain values, as they are written into checkpoints, folders and records."""
        return copy.deepcopy(dict(self.written))

    def changed(self, **blocks: Mapping[str, Any]) -> Self:
        """Return the configuration with other settings in some blocks.

        Args:
            **blocks: for each block, the settings that change.
        """
        written = self.plain()
        merged = {name: {**written[name], **values} for name, values in blocks.items()}
        return self.from_checked(written | merged)

    def replaced(self, **blocks: Mapping[str, Any]) -> Self:
        """Return the configuration with other blocks in place of some of its own."""
        return self.from_checked(self.plain() | copy.deepcopy(blocks))

    def public(self) -> Self:
        """Return the configuration without the paths of this machine."""
        written = self.plain()
        kept = {name: written[name] for name in PUBLIC if name in written}
        kept["task"].pop("root", None)
        kept["data"].pop("root", None)
        kept["data"]["root"] = None
        kept["data"].pop("file", None)
        path = str(self.backbone.path)
        if Path(path).is_absolute() or exists(path):  # no name on the hub
            kept["backbone"].pop("path", None)
        return self.from_checked(kept)

    def summary(self) -> dict[str, Any]:
        """Return the values that results.json and its tables state about the run."""
        return {
            "task": self.task.name,
            "backbone": self.backbone.name,
            "layers": self.backbone.layers or None,  # those kept of a pretrained backbone
            "stage": self.stage,
            "objective": self.objective.name,
            "ramp": dict(self.ramp),
            "seed": self.seed,
            "metric": self.task.metrics[0],
        }


def _check_complete(values: Mapping[str, Any]) -> None:
    """Check that the blocks are there without which there is no run.

    Raises:
        UserError: one is missing.
    """
    if missing := [key for key in NEEDED if values.get(key) is None]:
        raise UserError(
            f"a run's configuration has no {missing[0]}, and needs: {', '.join(NEEDED)}"
        )


@dataclass(frozen=True)
class RunDefaults:
    """The plain values of a run that a converted classifier does not state itself.

    Attributes:
        task: the task, or None if it is not known.
        data: settings of the block `data`.
        stages: the recipes by stage.
        seed: the seed.
    """

    task: Mapping[str, Any] | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, Any] = field(default_factory=dict)
    seed: Any = 42

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Return those of another run."""
        values = config.plain()
        return cls(values["task"], values["data"], values["stages"], config.seed)
