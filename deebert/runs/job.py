"""What a job was told: the command line, completed from a checkpoint, and checked.

A stage-2, resumed or evaluated run takes from its checkpoint what the command line does not say.
Knows Hydra and checkpoints; builds nothing.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from deebert.data import loading
from deebert.data.tasks import Task
from deebert.errors import UserError, is_number, is_whole, unknown
from deebert.exits import curves, records
from deebert.hub import checkpoint_config, checkpoints, locate
from deebert.hub.checkpoints import Checkpoint, Origin
from deebert.runs import ranks
from deebert.training import objectives
from deebert.training.objectives import PAPER, trains_ramps
from deebert.untrusted import plain_files

log = logging.getLogger(__name__)

STAGES = (1, 2)
GLUE = "nyu-mll/glue"  # the one data set that a checkpoint may have fetched


@dataclass(frozen=True)
class Job:
    """Where Hydra lets this job write, and what the user said on the command line."""

    folder: Path
    explicit: frozenset[str]  # keys of the overrides, "task", "stages.2.lr"; of an experiment ramp
    sweep: Path | None  # the multirun's folder, None in a single run

    @classmethod
    def current(cls) -> "Job":
        hydra = HydraConfig.get()
        keys = {override.partition("=")[0].lstrip("+~") for override in hydra.overrides.task}
        if "experiment" in keys:
            keys.add("ramp")  # part of what it stands for, as its stages are
        sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
        return cls(Path(hydra.runtime.output_dir), frozenset(keys), sweep)

    def refuse_used_folder(self) -> None:
        """A run folder is never reused: its results would no longer belong to its weights.

        Raises:
            UserError: another run has written here.
        """
        if not ranks.is_first():
            return  # another process of the run that has just begun here
        for name in ("results.json", "checkpoints", "csv"):
            if (self.folder / name).exists():
                raise UserError(
                    f"hydra.run.dir={self.folder} holds the {name} of another run, and a run "
                    "folder is never reused: choose another hydra.run.dir, or leave it out"
                )

    def said(self, key: str) -> bool:
        """Did the user set this key, or something inside it?"""
        return any(said == key or said.startswith(f"{key}.") for said in self.explicit)


def complete(cfg: DictConfig, job: Job) -> Checkpoint | None:
    """Find out what a training starts from, and take from it what the command line does not say.

    Raises:
        UserError: the checkpoint is missing, unreadable or of the wrong stage, or contradicted.
    """
    _pair_of_one_text(cfg)  # before it is held against the checkpoint's ramp
    origin = _origin(cfg, job)
    _pair_of_one_text(cfg)  # the task may be the checkpoint's
    return origin


def _pair_of_one_text(cfg: DictConfig, task: Any = None) -> None:
    """Of one text ramp=pair is ramp=mean (`ramps.RampKind`), which is smaller."""
    columns = (cfg.get("task") or task or {}).get(
        "columns"
    )  # of a checkpoint's task nothing is known yet
    if cfg.ramp.get("reads") == "pair" and columns is not None and len(columns) == 1:
        cfg.ramp.reads = "mean"


def _origin(cfg: DictConfig, job: Job) -> Checkpoint | None:
    if cfg.resume:
        if cfg.ckpt:
            raise UserError(f"resume={cfg.resume} and ckpt={cfg.ckpt}: give one of them")
        origin = checkpoints.read(
            checkpoints.find(str(cfg.resume), "resume", "last.ckpt"), "resume"
        )
        _pair_of_one_text(cfg, origin.config["task"])
        fixed = ("stage", "stages", "objective", "ramp", "task", "backbone", "seed")
        rows = ("data.limit_train", "data.max_length", "data.unlabelled")  # and what of them
        _inherit(cfg, origin, job, fixed=(*fixed, *rows), taken=("data", "thresholds", "teacher"))
        if cfg.teacher:
            _refuse_another_teacher(cfg, fetch=job.said("teacher"))
        for key in ("trainer", "callbacks"):
            _inherit_values(cfg, key, origin.config.get(key) or {}, job)
        _tell_left_out(cfg, origin, job)
        epochs = cfg.stages[str(cfg.stage)].epochs
        if origin.epochs_done >= epochs:
            raise UserError(
                f"resume={cfg.resume} has finished all of its {epochs} epochs; for other settings "
                "start a new run"
            )
        return origin
    if type(cfg.stage) is not int or cfg.stage not in STAGES:
        raise unknown("stage", cfg.stage, STAGES, "stage")
    if "objective" in cfg and cfg.objective.get("name") is None:
        cfg.objective.name = "student" if cfg.teacher else PAPER[cfg.stage]
    if cfg.stage == 1:
        if cfg.ckpt:
            raise UserError(
                f"ckpt={cfg.ckpt} with stage=1: stage 1 starts from backbone=... (or teacher=RUN); "
                "a checkpoint is for stage=2, and resume=RUN goes on with an interrupted run"
            )
        return _complete_student(cfg, job) if cfg.teacher else None
    if cfg.teacher:
        raise UserError(f"teacher={cfg.teacher} with stage=2: a student learns in stage=1")
    if not cfg.ckpt:
        raise UserError(
            "stage=2 needs ckpt=RUN, the run folder or checkpoint of a stage-1 run, or a "
            "fine-tuned classifier (folder or hub id): python train.py stage=2 ckpt=runs/..."
        )
    origin = _of_stage_1(
        cfg,
        "ckpt",
        "stage=2 starts from a stage-1 checkpoint (to go on with an interrupted stage 2: "
        "resume=RUN)",
    )
    # A recipe that the user names now (experiment=...) is not overruled by the one of then.
    recipe = () if job.said("experiment") else ("stages",)
    taken = ("data", "seed", "ramp", *recipe)
    # What stage 1 has learned from is no matter of stage 2.
    _inherit(cfg, origin, job, fixed=("task", "backbone"), taken=taken, kept=("data.unlabelled",))
    return origin


def _complete_student(cfg: DictConfig, job: Job) -> Checkpoint:
    """Find the teacher, and take from it what the command line does not say, but for its layers."""
    if cfg.backbone.layers is None:
        raise UserError(
            f"teacher={cfg.teacher} needs backbone.layers=[...]: the layers of the teacher, from "
            "1, that its student starts from"
        )
    origin, kept = read_teacher(cfg), ("data.unlabelled", "backbone.layers")
    _inherit(cfg, origin, job, fixed=("task", "backbone"), taken=("data", "seed"), kept=kept)
    with open_dict(cfg):
        cfg.teacher = checkpoints.lasting(str(cfg.teacher))
    return origin


def read_teacher(cfg: DictConfig, *, fetch: bool = True) -> Checkpoint:
    """The run that a student learns from.

    Args:
        fetch: may it be fetched from the hub?

    Raises:
        UserError: it is missing, unreadable or of the wrong stage.
    """
    return _of_stage_1(cfg, "teacher", "a student learns from a stage-1 run", fetch=fetch)


def _refuse_another_teacher(cfg: DictConfig, *, fetch: bool) -> None:
    """A resumed student goes on with its teacher, or one of the same kind from another place.

    Args:
        fetch: may it be fetched from the hub? Not if the checkpoint alone names it.
    """
    teacher = read_teacher(cfg, fetch=fetch)
    for key in ("task", "backbone"):
        if teacher.config[key]["name"] != cfg[key].name:
            raise UserError(
                f"teacher={cfg.teacher} was trained with {key}={teacher.config[key]['name']}, and "
                f"resume={cfg.resume} with {key}={cfg[key].name}; give the teacher it had"
            )


def _of_stage_1(cfg: DictConfig, flag: str, why: str, *, fetch: bool = True) -> Checkpoint:
    given = str(cfg[flag])
    origin = locate.checkpoint(given, flag, said=_said(cfg), fetch=fetch)
    if not origin.path.is_file():  # no run that could be gone on with: ramps may be trained anew
        return origin
    if origin.config["stage"] != 1:
        raise UserError(f"{flag}={given} is of stage {origin.config['stage']}; {why}")
    epochs = origin.config["stages"]["1"].get("epochs") or 0
    if origin.epochs_done < epochs:
        log.warning(
            "%s=%s stopped after epoch %d of %d (resume=RUN would finish it); taken as it is",
            flag,
            given,
            origin.epochs_done,
            epochs,
        )
    return origin


def _said(cfg: DictConfig) -> dict[str, Any]:
    """What a published classifier does not say itself, as this job has it."""
    blocks = {key: cfg.get(key) for key in ("task", "data", "stages")}
    found: dict[str, Any] = {
        key: OmegaConf.to_container(block, resolve=True)
        for key, block in blocks.items()
        if isinstance(block, DictConfig)
    }
    return found | ({"seed": cfg.seed} if "seed" in cfg else {})


def complete_evaluation(cfg: DictConfig, job: Job) -> Origin:
    """Find what is to be evaluated, and take from it what the command line does not say.

    Raises:
        UserError: neither checkpoint nor record can be read, or they contradict what is said.
    """
    origin = _evaluated(cfg)
    _inherit(cfg, origin, job, fixed=("task",), taken=("backbone", "data", "seed"))
    return origin


def _evaluated(cfg: DictConfig) -> Origin:
    """The checkpoint to score, or the folder of records that stands for it."""
    if not cfg.ckpt and not cfg.record:
        raise UserError(
            "ckpt= is missing: python evaluate.py ckpt=RUN (a run folder or .ckpt), or record=RUN "
            "for the logits that a run has left"
        )
    found = None
    if cfg.ckpt:
        found = locate.checkpoint(str(cfg.ckpt), "ckpt", said=_said(cfg))
        if not cfg.record:
            return found
    folder = Path(str(cfg.record))
    is_run = (folder / records.FOLDER).is_dir()
    files = records.files(folder, records.FOLDER if is_run else ".")
    headers = {file: records.load(file)[1] for file in files}
    if not headers:
        raise UserError(f"record={cfg.record}: no records there; give a run folder that has some")
    for what in ("checkpoint", "config"):
        if any(header[what] != next(iter(headers.values()))[what] for header in headers.values()):
            raise UserError(f"record={cfg.record}: its records are of different checkpoints")
    header = next(iter(headers.values()))
    if found and header["checkpoint"] != found.fingerprint:
        raise UserError(
            f"record={cfg.record} is of another checkpoint than ckpt={cfg.ckpt}: its weights have "
            f"the fingerprint {header['checkpoint']}, not {found.fingerprint}"
        )
    return Origin(files[0].parent, header["config"])


def _inherit(
    cfg: DictConfig,
    origin: Origin,
    job: Job,
    *,
    fixed: tuple[str, ...],
    taken: tuple[str, ...],
    kept: tuple[str, ...] = (),
) -> None:
    """Take values from the checkpoint. `fixed` ones, also inside a taken one ("data.max_length"),
    may not be contradicted on the command line; of the `taken` ones, what is said there wins;
    those `kept` inside them stay."""
    _refuse_other_task(cfg, origin)
    own_hub = tuple(OmegaConf.select(cfg, "task.hub") or ())
    size = origin.config["data"].setdefault("calibration_size", 0)  # of a run before there was one
    if "data.calibration_size" in job.explicit and cfg.data.calibration_size != size:
        raise UserError(
            f"data.calibration_size={cfg.data.calibration_size} contradicts {origin.path}, which "
            f"was trained with data.calibration_size={size}: other rows would be ones it has seen"
        )
    with open_dict(cfg):
        for key in dict.fromkeys(name.partition(".")[0] for name in (*fixed, *taken)):
            theirs = _literal({key: origin.config[key]})
            for said in (s for s in kept if s.startswith(f"{key}.")):
                OmegaConf.update(theirs, said, OmegaConf.select(cfg, said), merge=False)
            for said in (s for s in job.explicit if s == key or s.startswith(f"{key}.")):
                ours, saved = OmegaConf.select(cfg, said), OmegaConf.select(theirs, said)
                named = isinstance(ours, DictConfig) and "name" in ours
                if said in fixed and named and ours.name == saved.name:
                    continue  # a task or backbone named again: as it was then
                if {key, said} & {*fixed} and _name(ours) != _name(saved) and said != "task":
                    raise _contradiction(said, ours, saved, origin)
                OmegaConf.update(theirs, said, ours, merge=False)
            # A run from before some of the settings has today's defaults of them.
            later = key in ("data", "stages")
            cfg[key] = OmegaConf.merge(cfg[key], theirs[key]) if later else theirs[key]
    if isinstance(origin, Checkpoint):
        _check_rows(cfg, origin, job, own_hub)


def _check_rows(cfg: DictConfig, origin: Checkpoint, job: Job, own_hub: tuple[str, ...]) -> None:
    """Look at where a checkpoint says that the rows are.

    Args:
        own_hub: the data set that the user names; (): none.

    Raises:
        UserError: a file there is a link that leads out of the folder, or no file.
    """
    task = Task.from_config(_plain_block(cfg.task))
    root = cfg.data.root or task.root
    if task.hub is not None and task.hub[0] != GLUE and task.hub != own_hub:
        with open_dict(cfg):
            cfg.task.hub = list(own_hub) or None
        if not root:
            log.warning(
                "%s names the data set %s, which is not fetched for a file's sake: say "
                "task=NAME, or data.root=DIR",
                origin.path,
                task.hub[0],
            )
    if not root or job.said("data.root") or not Path(root).is_dir():
        return
    log.info("data.root=%s, as %s says (data.root=... for another folder)", root, origin.path)
    more = [*(cfg.data.get("unlabelled") or ()), cfg.get("split")]
    splits = [task.train, *task.validation, *task.test, *more]
    for split in (each for each in splits if isinstance(each, str)):  # others are refused later
        for file in loading.find_files(task, split, root):
            try:
                plain_files.inside(Path(root), str(file.relative_to(root)))
            except UserError as error:
                raise UserError(
                    f"data.root={root}, as {origin.path} says: {error}; or say data.root={root} "
                    "yourself"
                ) from error


def _plain_block(block: DictConfig) -> dict[str, Any]:
    """Return a block of the configuration as plain values."""
    values: Any = OmegaConf.to_container(block, resolve=True)
    return dict(values)


def _inherit_values(cfg: DictConfig, path: str, theirs: dict[str, Any], job: Job) -> None:
    """Take the settings that `remembered` lets through; each inside a block that is there."""
    with open_dict(cfg):
        ours = OmegaConf.select(cfg, path)
        for key, value in theirs.items() if isinstance(ours, DictConfig) else ():
            inner = f"{path}.{key}"
            if isinstance(value, dict):
                _inherit_values(cfg, inner, value, job)
            elif inner not in job.explicit:
                OmegaConf.update(cfg, inner, value)


def _tell_left_out(cfg: DictConfig, origin: Checkpoint, job: Job) -> None:
    """Name what of the trainer and the callbacks was not taken.

    Raises:
        UserError: the run had several processes, and the user does not say so again.
    """
    blocks = {key: cfg.get(key) for key in ("trainer", "callbacks")}
    ours = {k: OmegaConf.to_container(v, resolve=True) if v else None for k, v in blocks.items()}
    lost = checkpoint_config.left_out(origin.not_taken, ours)
    # Other processes would see other rows, and some would be started for a file's sake.
    if starts := [flag for flag in lost if flag in checkpoint_config.STARTS and not job.said(flag)]:
        values = " ".join(f"{flag}={origin.not_taken[flag]}" for flag in starts)
        raise UserError(
            f"resume={cfg.resume} was trained with {values}: say so again, or what you want "
            "instead; a checkpoint starts no processes"
        )
    if lost := [flag for flag in lost if not job.said(flag)]:
        log.warning(
            "%s: not taken from the checkpoint, which may be somebody else's: %s; say it again on "
            "the command line if you want it",
            origin.path,
            ascii(", ".join(lost))[1:-1],
        )


def _literal(values: Mapping[str, Any]) -> DictConfig:
    """Return a node of OmegaConf that resolves to these very values: a `${...}` in a text stays."""
    return OmegaConf.create({key: _escaped(value) for key, value in values.items()})


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        # In front of "${" a backslash escapes; each that is there already is doubled.
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    return value


def _refuse_other_task(cfg: DictConfig, origin: Origin) -> None:
    """A task that is named, also by an experiment, must be the checkpoint's.

    Only evaluate.py may score another: AX has no training data, an MNLI checkpoint scores it.
    """
    ours, saved = cfg.get("task"), origin.config["task"]
    if ours is None or ours.get("name") == saved["name"]:
        return
    if "stage" not in cfg and ours.get("checkpoint_task") == saved["name"]:
        return
    raise _contradiction("task", ours, saved, origin)


def _contradiction(said: str, ours: Any, saved: Any, origin: Origin) -> UserError:
    return UserError(
        f"{said}={_name(ours)} contradicts {origin.path}, which was trained with "
        f"{said}={_name(saved)}; leave {said}= out, or give another checkpoint"
    )


def _name(value: Any) -> Any:
    return value["name"] if isinstance(value, DictConfig | dict) and "name" in value else value


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
