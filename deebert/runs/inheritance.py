"""What a run takes from the checkpoint that it starts from."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from deebert.data import loading
from deebert.data.tasks import Task
from deebert.errors import UserError, unknown
from deebert.hub import checkpoint_config, checkpoints, locate, record_files
from deebert.hub.checkpoints import Checkpoint, Source
from deebert.runs.job import Job
from deebert.training.objectives import PAPER
from deebert.untrusted import plain_files

log = logging.getLogger(__name__)

STAGES = (1, 2)
GLUE = "nyu-mll/glue"  # the one data set that a checkpoint may have fetched


def complete(cfg: DictConfig, job: Job) -> Checkpoint | None:
    """Find out what a training starts from, and take from it what the command line does not say.

    Raises:
        UserError: the checkpoint is missing, unreadable or of the wrong stage, or contradicted.
    """
    _pair_of_one_text(cfg)  # before it is held against the checkpoint's ramp
    source = _source(cfg, job)
    _pair_of_one_text(cfg)  # the task may be the checkpoint's
    return source


def _pair_of_one_text(cfg: DictConfig, task: Any = None) -> None:
    """Of one text ramp=pair is ramp=mean (`ramps.RampKind`), which is smaller."""
    columns = (cfg.get("task") or task or {}).get(
        "columns"
    )  # of a checkpoint's task nothing is known yet
    if cfg.ramp.get("reads") == "pair" and columns is not None and len(columns) == 1:
        cfg.ramp.reads = "mean"


def _source(cfg: DictConfig, job: Job) -> Checkpoint | None:
    if cfg.resume:
        if cfg.ckpt:
            raise UserError(f"resume={cfg.resume} and ckpt={cfg.ckpt}: give one of them")
        source = checkpoints.read(
            checkpoints.find(str(cfg.resume), "resume", "last.ckpt"), "resume"
        )
        _pair_of_one_text(cfg, source.config["task"])
        fixed = ("stage", "stages", "objective", "ramp", "task", "backbone", "seed")
        rows = ("data.limit_train", "data.max_length", "data.unlabelled")  # and what of them
        _inherit(cfg, source, job, fixed=(*fixed, *rows), taken=("data", "thresholds", "teacher"))
        if cfg.teacher:
            _refuse_another_teacher(cfg, fetch=job.said("teacher"))
        for key in ("trainer", "callbacks"):
            _inherit_values(cfg, key, source.config.get(key) or {}, job)
        _tell_left_out(cfg, source, job)
        epochs = cfg.stages[str(cfg.stage)].epochs
        if source.epochs_done >= epochs:
            raise UserError(
                f"resume={cfg.resume} has finished all of its {epochs} epochs; for other settings "
                "start a new run"
            )
        return source
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
    source = _of_stage_1(
        cfg,
        "ckpt",
        "stage=2 starts from a stage-1 checkpoint (to go on with an interrupted stage 2: "
        "resume=RUN)",
    )
    # A recipe that the user names now (experiment=...) is not overruled by the one of then.
    recipe = () if job.said("experiment") else ("stages",)
    taken = ("data", "seed", "ramp", *recipe)
    # What stage 1 has learned from is no matter of stage 2.
    _inherit(cfg, source, job, fixed=("task", "backbone"), taken=taken, kept=("data.unlabelled",))
    return source


def _complete_student(cfg: DictConfig, job: Job) -> Checkpoint:
    """Find the teacher, and take from it what the command line does not say, but for its layers."""
    if cfg.backbone.layers is None:
        raise UserError(
            f"teacher={cfg.teacher} needs backbone.layers=[...]: the layers of the teacher, from "
            "1, that its student starts from"
        )
    source, kept = read_teacher(cfg), ("data.unlabelled", "backbone.layers")
    _inherit(cfg, source, job, fixed=("task", "backbone"), taken=("data", "seed"), kept=kept)
    with open_dict(cfg):
        cfg.teacher = checkpoints.lasting(str(cfg.teacher))
    return source


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
    source = locate.checkpoint(given, flag, said=_said(cfg), fetch=fetch)
    if not source.path.is_file():  # no run that could be gone on with: ramps may be trained anew
        return source
    if source.config["stage"] != 1:
        raise UserError(f"{flag}={given} is of stage {source.config['stage']}; {why}")
    epochs = source.config["stages"]["1"].get("epochs") or 0
    if source.epochs_done < epochs:
        log.warning(
            "%s=%s stopped after epoch %d of %d (resume=RUN would finish it); taken as it is",
            flag,
            given,
            source.epochs_done,
            epochs,
        )
    return source


def _said(cfg: DictConfig) -> dict[str, Any]:
    """What a published classifier does not say itself, as this job has it."""
    blocks = {key: cfg.get(key) for key in ("task", "data", "stages")}
    found: dict[str, Any] = {
        key: OmegaConf.to_container(block, resolve=True)
        for key, block in blocks.items()
        if isinstance(block, DictConfig)
    }
    return found | ({"seed": cfg.seed} if "seed" in cfg else {})


def complete_evaluation(cfg: DictConfig, job: Job) -> Source:
    """Find what is to be evaluated, and take from it what the command line does not say.

    Raises:
        UserError: neither checkpoint nor record can be read, or they contradict what is said.
    """
    source = _evaluated(cfg)
    _inherit(cfg, source, job, fixed=("task",), taken=("backbone", "data", "seed"))
    return source


def _evaluated(cfg: DictConfig) -> Source:
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
    is_run = (folder / record_files.FOLDER).is_dir()
    files = record_files.files(folder, record_files.FOLDER if is_run else ".")
    headers = {file: record_files.load(file)[1] for file in files}
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
    return Source(files[0].parent, header["config"])


def _inherit(
    cfg: DictConfig,
    source: Source,
    job: Job,
    *,
    fixed: tuple[str, ...],
    taken: tuple[str, ...],
    kept: tuple[str, ...] = (),
) -> None:
    """Take values from the checkpoint. `fixed` ones, also inside a taken one ("data.max_length"),
    may not be contradicted on the command line; of the `taken` ones, what is said there wins;
    those `kept` inside them stay."""
    _refuse_other_task(cfg, source)
    own_hub = tuple(OmegaConf.select(cfg, "task.hub") or ())
    size = source.config["data"].setdefault("calibration_size", 0)  # of a run before there was one
    if "data.calibration_size" in job.explicit and cfg.data.calibration_size != size:
        raise UserError(
            f"data.calibration_size={cfg.data.calibration_size} contradicts {source.path}, which "
            f"was trained with data.calibration_size={size}: other rows would be ones it has seen"
        )
    with open_dict(cfg):
        for key in dict.fromkeys(name.partition(".")[0] for name in (*fixed, *taken)):
            theirs = _literal({key: source.config[key]})
            for said in (s for s in kept if s.startswith(f"{key}.")):
                OmegaConf.update(theirs, said, OmegaConf.select(cfg, said), merge=False)
            for said in (s for s in job.explicit if s == key or s.startswith(f"{key}.")):
                ours, saved = OmegaConf.select(cfg, said), OmegaConf.select(theirs, said)
                named = isinstance(ours, DictConfig) and "name" in ours
                if said in fixed and named and ours.name == saved.name:
                    continue  # a task or backbone named again: as it was then
                if {key, said} & {*fixed} and _name(ours) != _name(saved) and said != "task":
                    raise _contradiction(said, ours, saved, source)
                OmegaConf.update(theirs, said, ours, merge=False)
            # A run from before some of the settings has today's defaults of them.
            later = key in ("data", "stages")
            cfg[key] = OmegaConf.merge(cfg[key], theirs[key]) if later else theirs[key]
    if isinstance(source, Checkpoint):
        _check_rows(cfg, source, job, own_hub)


def _check_rows(cfg: DictConfig, source: Checkpoint, job: Job, own_hub: tuple[str, ...]) -> None:
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
                source.path,
                task.hub[0],
            )
    if not root or job.said("data.root") or not Path(root).is_dir():
        return
    log.info("data.root=%s, as %s says (data.root=... for another folder)", root, source.path)
    more = [*(cfg.data.get("unlabelled") or ()), cfg.get("split")]
    splits = [task.train, *task.validation, *task.test, *more]
    for split in (each for each in splits if isinstance(each, str)):  # others are refused later
        for file in loading.find_files(task, split, root):
            try:
                plain_files.inside(Path(root), str(file.relative_to(root)))
            except UserError as error:
                raise UserError(
                    f"data.root={root}, as {source.path} says: {error}; or say data.root={root} "
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


def _tell_left_out(cfg: DictConfig, source: Checkpoint, job: Job) -> None:
    """Name what of the trainer and the callbacks was not taken.

    Raises:
        UserError: the run had several processes, and the user does not say so again.
    """
    blocks = {key: cfg.get(key) for key in ("trainer", "callbacks")}
    ours = {k: OmegaConf.to_container(v, resolve=True) if v else None for k, v in blocks.items()}
    lost = checkpoint_config.left_out(source.not_taken, ours)
    # Other processes would see other rows, and some would be started for a file's sake.
    if starts := [flag for flag in lost if flag in checkpoint_config.STARTS and not job.said(flag)]:
        values = " ".join(f"{flag}={source.not_taken[flag]}" for flag in starts)
        raise UserError(
            f"resume={cfg.resume} was trained with {values}: say so again, or what you want "
            "instead; a checkpoint starts no processes"
        )
    if lost := [flag for flag in lost if not job.said(flag)]:
        log.warning(
            "%s: not taken from the checkpoint, which may be somebody else's: %s; say it again on "
            "the command line if you want it",
            source.path,
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


def _refuse_other_task(cfg: DictConfig, source: Source) -> None:
    """A task that is named, also by an experiment, must be the checkpoint's.

    Only evaluate.py may score another: AX has no training data, an MNLI checkpoint scores it.
    """
    ours, saved = cfg.get("task"), source.config["task"]
    if ours is None or ours.get("name") == saved["name"]:
        return
    if "stage" not in cfg and ours.get("checkpoint_task") == saved["name"]:
        return
    raise _contradiction("task", ours, saved, source)


def _contradiction(said: str, ours: Any, saved: Any, source: Source) -> UserError:
    return UserError(
        f"{said}={_name(ours)} contradicts {source.path}, which was trained with "
        f"{said}={_name(saved)}; leave {said}= out, or give another checkpoint"
    )


def _name(value: Any) -> Any:
    return value["name"] if isinstance(value, DictConfig | dict) and "name" in value else value
