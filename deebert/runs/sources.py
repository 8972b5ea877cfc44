"""The checkpoint, or the records, that a run starts from.

`complete` and `complete_evaluation` find it by the keys that name it (`ckpt`, `resume`, `teacher`,
`record`), and let `inheritance` take its values into the configuration. This module builds no
model, and reads no rows of data.
"""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from os.path import lexists
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from deebert.data import own_task
from deebert.data.own_task import Columns
from deebert.errors import UserError, unknown
from deebert.hub import checkpoints, locate, record_files, transformers_folder
from deebert.hub.checkpoints import Checkpoint, Source
from deebert.hub.run_config import COARSE, RunDefaults
from deebert.models.ramp_readers import READERS
from deebert.options import job_command
from deebert.reporting import report
from deebert.runs import inheritance
from deebert.runs.job import Job
from deebert.training.objectives import PAPER
from deebert.untrusted import plain_files

log = logging.getLogger(__name__)

STAGES = (1, 2)


def complete(cfg: DictConfig, job: Job) -> Checkpoint | None:
    """Find the checkpoint that a training starts from, and take the unset values from it.

    Args:
        cfg: the configuration of train.py. It is changed in place.
        job: the job that runs.

    Returns:
        The checkpoint, or None if the training starts from a pretrained backbone.

    Raises:
        UserError: the checkpoint is missing, unreadable or of the wrong stage, or the command line
            contradicts it.
    """
    _make_task(cfg)
    _replace_reader_of_one_text(cfg)  # the ramp is compared with the checkpoint's ramp after this
    source = _source(cfg, job)
    inheritance.refuse_idle_split(cfg, job)
    _replace_reader_of_one_text(cfg)  # again, because the task may come from the checkpoint
    recipe = OmegaConf.select(cfg, "stages.2")
    if cfg.stage == 2 and isinstance(recipe, DictConfig) and recipe.get("standardize") is None:
        with open_dict(recipe):
            recipe.standardize = _has_frozen_states(cfg, recipe)
    return source


def _has_frozen_states(cfg: DictConfig, recipe: DictConfig) -> bool:
    """Say whether stage 2 trains on frozen states, in a precision that shows how they differ."""
    reader = READERS.get(str(cfg.ramp.get("reads")))
    has_weights = reader is not None and reader.has_weights
    is_coarse = str(cfg.trainer.get("precision")) in COARSE
    return bool(recipe.get("cache")) and not has_weights and not is_coarse


def _taken_columns(cfg: DictConfig) -> Columns:
    """Take what the user says of the columns of a file out of the configuration.

    The task that is made from it holds all of it, and is remembered.
    """
    with open_dict(cfg):
        values = inheritance.plain_block(cfg.data)
        for each in fields(Columns):
            cfg.data.pop(each.name, None)
    return Columns(**{each.name: values.get(each.name) for each in fields(Columns)})


def _set_task(cfg: DictConfig, values: dict[str, Any]) -> None:
    """Put a task into the configuration, in which nothing that a file says is replaced."""
    with open_dict(cfg):
        cfg.task = inheritance.literal(values)
    labels = values["labels"] and f"; labels in {values['label']!r}"
    numbers = f"; numbers in {values['label']!r}"
    texts = " and ".join(map(repr, values["columns"]))
    log.info("data.file=%s: texts in %s%s", cfg.data.file, texts, labels or numbers)


def _make_task(cfg: DictConfig) -> None:
    """Make the task from the user's own file, if there is one and nothing else names the task.

    Raises:
        UserError: the file does not say what its columns are, or the user says it in vain.
    """
    columns, file, folder = _taken_columns(cfg), cfg.data.get("file"), None
    is_unknown = file and not (cfg.get("task") or cfg.resume or cfg.teacher)
    if is_unknown and cfg.ckpt:
        folder = locate.classifier_folder(str(cfg.ckpt), "ckpt")
    if is_unknown and (folder or not cfg.ckpt):
        names = _stated_labels(folder, str(cfg.ckpt)) if folder else None
        if names and len(names) == 1:
            columns, names = replace(columns, regression=True), None
        _set_task(cfg, own_task.task_values(str(file), columns, names))
        return
    for name, value in vars(columns).items():
        if value is not None:
            instead = f" (task.metrics=[{value}])" if name == "metric" and cfg.get("task") else ""
            raise UserError(
                f"data.{name}={value} does nothing here: it is of a data.file=, where neither "
                f"task= nor a checkpoint says how to read it{instead}"
            )


def _stated_labels(folder: Path, given: str) -> list[str] | None:
    """Return the names of a classifier's labels (`transformers_folder.stated_labels`)."""
    try:
        return transformers_folder.stated_labels(folder)
    except UserError as error:
        raise UserError(f"ckpt={given}: {error}") from error


def _replace_reader_of_one_text(cfg: DictConfig, columns: Sequence[str] | None = None) -> None:
    """Replace ramp.reads=pair by mean if the task has a single text.

    Both read the same from one text, but `mean` is smaller (`Reader.of_one_text`).

    Args:
        cfg: the configuration. It is changed in place.
        columns: the columns of the checkpoint's task, used if the configuration has no task.
    """
    # The task may still be missing, if it is to come from a checkpoint that is not yet read.
    columns = cfg.task.get("columns") if cfg.get("task") else columns
    reader = READERS.get(str(cfg.ramp.get("reads")))  # an unknown one is refused later
    if reader and reader.of_one_text and columns is not None and len(columns) == 1:
        cfg.ramp.reads = reader.of_one_text


def _source(cfg: DictConfig, job: Job) -> Checkpoint | None:
    """Complete the configuration, and return the checkpoint that a training starts from."""
    if cfg.resume:
        return _complete_resumed(cfg, job)
    if type(cfg.stage) is not int or cfg.stage not in STAGES:
        raise unknown("stage", cfg.stage, STAGES, "stage")
    if "objective" in cfg and cfg.objective.get("name") is None:
        cfg.objective.name = "student" if cfg.teacher else PAPER[cfg.stage]
    if cfg.stage == 2:
        return _complete_stage_2(cfg, job)
    if cfg.ckpt:
        raise UserError(
            f"ckpt={cfg.ckpt} with stage=1: stage 1 starts from backbone=... (or teacher=RUN); "
            "a checkpoint is for stage=2, and resume=RUN goes on with an interrupted run"
        )
    return _complete_student(cfg, job) if cfg.teacher else None


def _complete_resumed(cfg: DictConfig, job: Job) -> Checkpoint:
    """Find the run that is resumed, and take its values.

    Raises:
        UserError: it cannot be read, is finished, or the command line contradicts it.
    """
    if cfg.ckpt:
        raise UserError(f"resume={cfg.resume} and ckpt={cfg.ckpt}: give one of them")
    source = _last_checkpoint(str(cfg.resume))
    _replace_reader_of_one_text(cfg, source.config.task.columns)
    inheritance.inherit(cfg, source, job, "resume")
    if cfg.teacher:
        _refuse_another_teacher(cfg, fetch=job.is_set("teacher"))
    inheritance.report_left_out(cfg, source, job)
    epochs = cfg.stages[str(cfg.stage)].epochs
    if source.epochs_done >= epochs and _has_results(cfg, source):
        raise UserError(
            f"resume={cfg.resume} has finished all of its {epochs} epochs; for other settings "
            "start a new run"
        )
    return source


def _last_checkpoint(given: str) -> Checkpoint:
    """Read the checkpoint that a run is resumed from.

    A run that was killed in its first epoch's end may have written best.ckpt alone, which is as
    good. Where last.ckpt is there and damaged, the message names the other one.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    folder = Path(given) / "checkpoints"
    best = folder / "best.ckpt"
    name = "last.ckpt" if lexists(folder / "last.ckpt") or not best.is_file() else "best.ckpt"
    try:
        return checkpoints.read(checkpoints.find(given, "resume", name), "resume")
    except UserError as error:
        if not best.is_file() or name == "best.ckpt":
            raise
        try:
            epochs = checkpoints.read(best, "resume").epochs_done
        except UserError:
            raise error from None
        raise UserError(f"{error}; best.ckpt of epoch {epochs} is whole: resume={best}") from error


def _has_results(cfg: DictConfig, source: Checkpoint) -> bool:
    """Say whether a run has written its results after its last epoch.

    A run that was killed before that is resumed to validate its weights. With a monitored score,
    the results are those of the best epoch, which are written without the number of an epoch.
    """
    if source.path.parent.name != "checkpoints":
        return False
    folder = source.path.parent.parent
    if not report.is_complete(folder):
        return False
    if not OmegaConf.select(cfg, "callbacks.best.monitor"):
        return True
    try:
        return plain_files.json_file(folder / "results.json").get("epoch") is None
    except (OSError, UserError):
        return False


def _complete_stage_2(cfg: DictConfig, job: Job) -> Checkpoint:
    """Find the checkpoint of stage 1 that stage 2 starts from, and take its values.

    Raises:
        UserError: it cannot be used, or the command line contradicts it.
    """
    if cfg.teacher:
        raise UserError(f"teacher={cfg.teacher} with stage=2: a student learns in stage=1")
    if not cfg.ckpt:
        raise UserError(
            "stage=2 needs ckpt=RUN, the run folder or checkpoint of a stage-1 run, or a "
            "fine-tuned classifier (folder or hub id): "
            f"{job_command('train')} stage=2 ckpt=runs/..."
        )
    source = _of_stage_1(
        cfg,
        "ckpt",
        "stage=2 starts from a stage-1 checkpoint (to go on with an interrupted stage 2: "
        "resume=RUN)",
    )
    inheritance.inherit(cfg, source, job, "stage 2")
    return source


def _complete_student(cfg: DictConfig, job: Job) -> Checkpoint:
    """Find the teacher, and take all unset values from it, except for the layers.

    Returns:
        The teacher's checkpoint.

    Raises:
        UserError: the layers are missing, or the teacher cannot be used.
    """
    if cfg.backbone.layers is None:
        raise UserError(
            f"teacher={cfg.teacher} needs backbone.layers=[...]: the layers of the teacher, from "
            "1, that its student starts from"
        )
    source = read_teacher(cfg)
    inheritance.inherit(cfg, source, job, "student")
    with open_dict(cfg):
        cfg.teacher = checkpoints.lasting(str(cfg.teacher))
    return source


def read_teacher(cfg: DictConfig, *, fetch: bool = True) -> Checkpoint:
    """Read the checkpoint that a student learns from.

    Args:
        cfg: the configuration, whose `teacher` names the checkpoint.
        fetch: whether the checkpoint may be downloaded from the hub.

    Raises:
        UserError: the checkpoint is missing, unreadable or of the wrong stage.
    """
    return _of_stage_1(cfg, "teacher", "a student learns from a stage-1 run", fetch=fetch)


def _refuse_another_teacher(cfg: DictConfig, *, fetch: bool) -> None:
    """Check that the teacher of a resumed student has the student's task and backbone.

    Args:
        cfg: the configuration, whose `teacher` names the teacher's checkpoint.
        fetch: whether the teacher may be downloaded from the hub. It may not if only the
            checkpoint of the resumed run names it.

    Raises:
        UserError: the teacher has another task or backbone, or cannot be read.
    """
    teacher = read_teacher(cfg, fetch=fetch).config
    for key, name in (("task", teacher.task.name), ("backbone", teacher.backbone.name)):
        if name != cfg[key].name:
            raise UserError(
                f"teacher={cfg.teacher} was trained with {key}={name}, and "
                f"resume={cfg.resume} with {key}={cfg[key].name}; give the teacher it had"
            )


def _of_stage_1(cfg: DictConfig, flag: str, why: str, *, fetch: bool = True) -> Checkpoint:
    """Read a checkpoint of stage 1.

    Args:
        cfg: the configuration.
        flag: the key that names the checkpoint, `ckpt` or `teacher`.
        why: the reason why the checkpoint must be of stage 1, for the error message.
        fetch: whether the checkpoint may be downloaded from the hub.

    Raises:
        UserError: the checkpoint is missing, unreadable or of stage 2.
    """
    given = str(cfg[flag])
    source = locate.checkpoint(given, flag, defaults=_defaults(cfg), fetch=fetch)
    # A folder is no training run that could be resumed. Its ramps may be trained again.
    if not source.path.is_file():
        return source
    if source.config.stage != 1:
        raise UserError(f"{flag}={given} is of stage {source.config.stage}; {why}")
    epochs = source.config.recipe.epochs
    if source.epochs_done < epochs:
        log.warning(
            "%s=%s stopped after epoch %d of %d (resume=RUN would finish it); taken as it is",
            flag,
            given,
            source.epochs_done,
            epochs,
        )
    return source


def _defaults(cfg: DictConfig) -> RunDefaults:
    """Return this job's values for the settings that a published classifier does not have."""
    blocks = {key: cfg.get(key) for key in ("task", "data", "stages")}
    values: dict[str, Any] = {
        key: inheritance.plain_block(block)
        for key, block in blocks.items()
        if isinstance(block, DictConfig)
    }
    return RunDefaults(**values | ({"seed": cfg.seed} if "seed" in cfg else {}))


def complete_evaluation(cfg: DictConfig, job: Job) -> Source:
    """Find the checkpoint or the records to evaluate, and take the unset values from them.

    Args:
        cfg: the configuration of evaluate.py. It is changed in place.
        job: the job that runs.

    Returns:
        The checkpoint, or the folder of records.

    Raises:
        UserError: neither a checkpoint nor a record can be read, or the command line contradicts
            them.
    """
    source = _evaluated(cfg)
    inheritance.inherit(cfg, source, job, "evaluation")
    inheritance.refuse_idle_split(cfg, job)
    return source


def _evaluated(cfg: DictConfig) -> Source:
    """Return the checkpoint to score, or the folder of its records.

    Raises:
        UserError: there is neither, or the records are of different checkpoints, or were made in
            another way than the checkpoint is used.
    """
    if not cfg.ckpt and not cfg.record:
        raise UserError(
            f"ckpt= is missing: {job_command('evaluate')} ckpt=RUN (a run folder or .ckpt), or "
            "record=RUN for the logits that a run has left"
        )
    checkpoint = None
    if cfg.ckpt:
        checkpoint = locate.checkpoint(str(cfg.ckpt), "ckpt", defaults=_defaults(cfg))
        if not cfg.record:
            return checkpoint
    source = record_files.read_folder(str(cfg.record))
    if checkpoint:
        record_files.check_use(source.header, f"record={cfg.record}", checkpoint)
    return source
