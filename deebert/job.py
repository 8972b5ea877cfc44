"""What a job was told: the command line, completed from a checkpoint, and checked.

A stage-2, resumed or evaluated run takes from its checkpoint what the command line does not say.
Knows Hydra and checkpoints; builds nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from deebert import checkpoints, curves
from deebert.checkpoints import Checkpoint
from deebert.errors import UserError, unknown

STAGES = (1, 2)


@dataclass(frozen=True)
class Job:
    """Where Hydra lets this job write, and what the user said on the command line."""

    folder: Path
    explicit: frozenset[str]  # keys of the overrides, e.g. "task", "stages.2.lr"
    sweep: Path | None  # the multirun's folder, None in a single run

    @classmethod
    def current(cls) -> "Job":
        hydra = HydraConfig.get()
        keys = (override.partition("=")[0].lstrip("+~") for override in hydra.overrides.task)
        sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
        return cls(Path(hydra.runtime.output_dir), frozenset(keys), sweep)

    def said(self, key: str) -> bool:
        """Did the user set this key, or something inside it?"""
        return any(said == key or said.startswith(f"{key}.") for said in self.explicit)


def refuse(error: UserError) -> NoReturn:
    """Say what the user got wrong, in one line, and end this job.

    In a multirun the other jobs go on; Hydra prints the line and exits with 1 at the end.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise CompactHydraException(str(error)) from None
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)


def complete(cfg: DictConfig, job: Job) -> tuple[DictConfig, Checkpoint | None]:
    """Find out what this run starts from, and take from it what the command line does not say.

    Raises:
        UserError: the checkpoint is missing, unreadable or of the wrong stage, or contradicted.
    """
    if "stage" not in cfg:  # evaluate.py
        if not cfg.ckpt:
            raise UserError("ckpt= is missing: python evaluate.py ckpt=RUN (a run folder or .ckpt)")
        origin = checkpoints.read(checkpoints.find(str(cfg.ckpt), "ckpt", "best.ckpt"), "ckpt")
        _inherit(cfg, origin, job, fixed=("task",), taken=("backbone", "data", "seed"))
        return cfg, origin
    if cfg.resume:
        if cfg.ckpt:
            raise UserError(f"resume={cfg.resume} and ckpt={cfg.ckpt}: give one of them")
        origin = checkpoints.read(
            checkpoints.find(str(cfg.resume), "resume", "last.ckpt"), "resume"
        )
        fixed = ("stage", "stages", "task", "backbone", "seed")
        _inherit(cfg, origin, job, fixed=fixed, taken=("data", "trainer"))
        return cfg, origin
    if isinstance(cfg.stage, bool) or cfg.stage not in STAGES:
        raise unknown("stage", cfg.stage, STAGES, "stage")
    if cfg.stage == 1:
        if cfg.ckpt:
            raise UserError(
                f"ckpt={cfg.ckpt} with stage=1: stage 1 starts from backbone=...; a checkpoint is "
                "for stage=2, and resume=RUN goes on with an interrupted run"
            )
        return cfg, None
    if not cfg.ckpt:
        raise UserError(
            "stage=2 needs ckpt=RUN, the run folder or checkpoint of a stage-1 run: "
            "python train.py stage=2 ckpt=runs/..."
        )
    origin = checkpoints.read(checkpoints.find(str(cfg.ckpt), "ckpt", "best.ckpt"), "ckpt")
    if origin.config["stage"] != 1:
        raise UserError(
            f"ckpt={cfg.ckpt} is of stage {origin.config['stage']}; stage=2 starts from a stage-1 "
            "checkpoint (to go on with an interrupted stage 2: resume=RUN)"
        )
    # A recipe that the user names now (experiment=...) is not overruled by the one of then.
    taken = ("data", "seed") if job.said("experiment") else ("data", "seed", "stages")
    _inherit(cfg, origin, job, fixed=("task", "backbone"), taken=taken)
    return cfg, origin


def _inherit(
    cfg: DictConfig, origin: Checkpoint, job: Job, *, fixed: tuple[str, ...], taken: tuple[str, ...]
) -> None:
    """Take values from the checkpoint. `fixed` ones may not be contradicted on the command line;
    of the `taken` ones, what is said on the command line wins."""
    with open_dict(cfg):
        for key in (*fixed, *taken):
            theirs = OmegaConf.create({key: origin.config[key]})
            for said in (s for s in job.explicit if s == key or s.startswith(f"{key}.")):
                ours, saved = OmegaConf.select(cfg, said), OmegaConf.select(theirs, said)
                if key in taken:
                    OmegaConf.update(theirs, said, ours, merge=False)
                elif ours != saved and not _scores_other_task(cfg, origin, said):
                    name = f"{said}={_named(ours)}"
                    raise UserError(
                        f"{name} contradicts {origin.path}, which was trained with "
                        f"{said}={_named(saved)}; leave {said}= out, or give another checkpoint"
                    )
                else:
                    OmegaConf.update(theirs, said, ours, merge=False)
            cfg[key] = theirs[key]


def _scores_other_task(cfg: DictConfig, origin: Checkpoint, said: str) -> bool:
    """AX has no training data: evaluate.py scores it with an MNLI checkpoint."""
    other = cfg.task.get("checkpoint_task") if "stage" not in cfg and cfg.task else None
    return said == "task" and other == origin.config["task"]["name"]


def _named(value: Any) -> Any:
    return value.name if isinstance(value, DictConfig) and "name" in value else value


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, all references resolved."""
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    if config.get("task") is None:
        raise UserError(
            "task= is missing: python train.py task=mrpc stage=1; choose one of: "
            f"{', '.join(_choices('task'))}"
        )
    return {str(key): value for key, value in config.items()}


def _choices(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group)


def check(config: dict[str, Any]) -> None:
    """What would otherwise fail late, or train on nonsense."""
    stage = str(config["stage"])
    positive = {
        "data.max_length": config["data"]["max_length"],
        "data.limit_train": config["data"]["limit_train"] or 1,
        "data.eval_batch_size": config["data"]["eval_batch_size"],
        **{
            f"stages.{stage}.{key}": config["stages"][stage][key]
            for key in ("epochs", "batch_size")
        },
    }
    for flag, value in positive.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{flag}={value} must be a whole number of 1 or more")
    lr = config["stages"][stage]["lr"]
    if not isinstance(lr, int | float) or not 0 < lr < 1:
        raise UserError(f"stages.{stage}.lr={lr} must be a number between 0 and 1, such as 2e-5")
    recipe = config["stages"][stage]
    if recipe.get("standardize") and not recipe["cache"]:
        raise UserError(
            "stages.2.standardize=true needs the frozen states: leave stages.2.cache=true"
        )
    if config["thresholds"] is not None:
        curves.check_thresholds(config["thresholds"], "thresholds")
