"""The table of what a run takes from the checkpoint that it starts from, and its application.

A value on the command line wins over the value of the checkpoint, or is refused if it contradicts
the checkpoint. This module changes the configuration in place. It builds no model, and reads no
rows of data.
"""

import logging
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from deebert.data import loading
from deebert.data.file_split import OwnFolder
from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.hub import checkpoint_config
from deebert.hub.checkpoints import Checkpoint, Source
from deebert.runs.job import Job
from deebert.untrusted import plain_files

log = logging.getLogger(__name__)

GLUE = "nyu-mll/glue"  # the only data set that is downloaded because a checkpoint names it
OF_SPLIT = ("data.validation_share", "data.split_seed")
GROWING = ("data", "stages")  # a setting that an older run does not have keeps today's default


class Policy(Enum):
    """The way in which a run treats a key that the checkpoint has, too."""

    FIXED = "the checkpoint's value; the command line may not contradict it"
    INHERITED = "the checkpoint's value, unless the command line sets another"
    UNNAMED = "inherited, unless an experiment names a value"
    MERGED = "inherited, setting by setting, into a block that the configuration has"
    KEPT = "the configuration's value, although the block around it is taken"


FIXED, INHERITED, UNNAMED, MERGED, KEPT = Policy
# A key may lie inside the block of another one. Keys without a policy are not taken.
RUNS = ("resume", "stage 2", "student", "evaluation")
POLICIES: dict[str, tuple[Policy | None, ...]] = {
    #                   resume     stage 2    student    evaluation
    "stage":           (FIXED,     None,      None,      None),
    "stages":          (FIXED,     UNNAMED,   None,      None),
    "objective":       (FIXED,     None,      None,      None),
    "ramp":            (FIXED,     INHERITED, None,      None),
    "task":            (FIXED,     FIXED,     FIXED,     FIXED),
    "backbone":        (FIXED,     FIXED,     FIXED,     INHERITED),
    "backbone.layers": (None,      None,      KEPT,      None),
    "data":            (INHERITED, INHERITED, INHERITED, INHERITED),
    # A resumed run must train on the same rows, cut to the same length. Stage 2 and a student may
    # learn from other unlabelled rows.
    "data.validation_share": (FIXED, FIXED,  FIXED,     FIXED),
    "data.split_seed": (FIXED,     FIXED,     FIXED,     FIXED),
    "data.limit_train": (FIXED,    None,      None,      None),
    "data.max_length": (FIXED,     None,      None,      None),
    "data.unlabelled": (FIXED,     KEPT,      KEPT,      None),
    "seed":            (FIXED,     INHERITED, INHERITED, INHERITED),
    "thresholds":      (INHERITED, None,      None,      None),
    "teacher":         (INHERITED, None,      None,      None),
    "trainer":         (MERGED,    None,      None,      None),
    "callbacks":       (MERGED,    None,      None,      None),
}  # fmt: skip


def inherit(cfg: DictConfig, source: Source, job: Job, kind: str) -> None:
    """Take values from a checkpoint into the configuration.

    Args:
        cfg: the configuration. It is changed in place.
        source: the checkpoint, or the folder of its records.
        job: the job that runs.
        kind: the kind of the run, one of `RUNS`.

    Raises:
        UserError: the command line contradicts the checkpoint.
    """
    saved = source.config.plain()
    saved["data"].setdefault("calibration_size", 0)  # older runs lack this key
    if ramp_recipe := saved["stages"].get("2"):
        ramp_recipe.setdefault("standardize", False)  # and this one
    _refuse_other_task(cfg, source)
    _refuse_other_held_out_rows(cfg, source, job, saved["data"]["calibration_size"])
    own_hub = tuple(OmegaConf.select(cfg, "task.hub") or ())
    column = RUNS.index(kind)
    policies = {key: row[column] for key, row in POLICIES.items() if row[column]}
    if not saved["data"].get("split_rows"):  # nothing was split
        policies = {key: policy for key, policy in policies.items() if key not in OF_SPLIT}
    with open_dict(cfg):
        for key, policy in policies.items():
            if policy == MERGED:
                _inherit_settings(cfg, key, saved.get(key) or {}, job)
            elif key == "ramp" and kind == "stage 2" and source.is_plain_classifier:
                continue  # nobody has chosen the untrained ramps that it got
            elif "." not in key and not (policy == UNNAMED and job.is_set("experiment")):
                theirs = literal({key: saved[key]})
                _apply_policies(cfg, theirs, key, policies, source, job)
                cfg[key] = OmegaConf.merge(cfg[key], theirs[key]) if key in GROWING else theirs[key]
        if cfg.data.get("file"):  # of the two places of rows, the one that the user names
            if not job.is_set("data.root"):
                cfg.data.root = None
            elif not job.is_set("data.file"):
                cfg.data.file = cfg.data.split_rows = None
    if isinstance(source, Checkpoint):
        task = Task.from_config(plain_block(cfg.task))
        _refuse_to_fetch(cfg, source, task, own_hub)
        _check_rows(cfg, source, task, job)


def _apply_policies(
    cfg: DictConfig,
    theirs: DictConfig,
    key: str,
    policies: Mapping[str, Policy | None],
    source: Source,
    job: Job,
) -> None:
    """Put the values of the command line, and those that are kept, into a block of a checkpoint.

    Args:
        cfg: the configuration.
        theirs: the block of the checkpoint. It is changed in place.
        key: the key of the block.
        policies: the policy of each key.
        source: the checkpoint, for error messages.
        job: the job that runs.

    Raises:
        UserError: the command line contradicts the checkpoint.
    """
    inside = f"{key}."
    for path in (p for p, policy in policies.items() if p.startswith(inside) and policy == KEPT):
        OmegaConf.update(theirs, path, OmegaConf.select(cfg, path), merge=False)
    for path in (p for p in job.explicit if p == key or p.startswith(inside)):
        ours, saved = OmegaConf.select(cfg, path), OmegaConf.select(theirs, path)
        has_name = isinstance(ours, DictConfig) and "name" in ours
        if policies.get(path) == FIXED and has_name and ours.name == saved.name:
            continue  # the same task or backbone is named again: the saved values stay
        is_fixed = FIXED in (policies.get(key), policies.get(path))
        if is_fixed and _name(ours) != _name(saved) and path != "task":
            raise _contradiction(path, ours, saved, source)
        OmegaConf.update(theirs, path, ours, merge=False)


def _refuse_other_held_out_rows(cfg: DictConfig, source: Source, job: Job, size: int) -> None:
    """Check that the command line holds out as many training rows as the checkpoint's run.

    Raises:
        UserError: it does not.
    """
    if "data.calibration_size" in job.explicit and cfg.data.calibration_size != size:
        raise UserError(
            f"data.calibration_size={cfg.data.calibration_size} contradicts {source.path}, which "
            f"was trained with data.calibration_size={size}: other rows would be ones it has seen"
        )


def _refuse_to_fetch(
    cfg: DictConfig, source: Checkpoint, task: Task, own_hub: tuple[str, ...]
) -> None:
    """Remove a data set on the hub from the configuration, if only the checkpoint names it.

    Args:
        cfg: the configuration. It is changed in place.
        source: the checkpoint.
        task: the task that the checkpoint names.
        own_hub: the data set that the user names, or ().
    """
    if task.hub is None or task.hub[0] == GLUE or task.hub == own_hub:
        return
    with open_dict(cfg):
        cfg.task.hub = list(own_hub) or None
    if not (cfg.data.root or task.root):
        log.warning(
            "%s names the data set %s, which is not fetched for a file's sake: say "
            "task=NAME, or data.root=DIR",
            source.path,
            task.hub[0],
        )


def _check_rows(cfg: DictConfig, source: Checkpoint, task: Task, job: Job) -> None:
    """Check the files of rows that a checkpoint names.

    Raises:
        UserError: a file is a link that leads out of the folder, or is no file.
    """
    own = cfg.data.get("file")
    flag, root = ("data.file", own) if own else ("data.root", cfg.data.root or task.root)
    if not root or job.is_set(flag) or not Path(root).exists():
        return
    log.info("%s=%s, as %s says (%s=... for another place)", flag, root, source.path, flag)
    files, folder = [Path(root)], Path(root).parent
    if Path(root).is_dir():
        more_splits = [*(cfg.data.get("unlabelled") or ()), cfg.get("split")]
        root = OwnFolder(root) if own else root
        splits = [task.train, *task.validation, *task.test, *more_splits]
        names = [name for name in splits if isinstance(name, str)]  # others are refused later
        files = [file for name in names for file in loading.find_files(task, name, root)]
        folder = Path(root)
    for file in files:
        try:
            plain_files.inside(folder, str(file.relative_to(folder)))
        except UserError as error:
            raise UserError(
                f"{flag}={root}, as {source.path} says: {error}; or say {flag}={root} yourself"
            ) from error


def refuse_idle_split(cfg: DictConfig, job: Job) -> None:
    """Refuse what says how a file is split if the rows are not those of one file.

    Args:
        cfg: the configuration, once a checkpoint has added to it.
        job: the job that runs.

    Raises:
        UserError: the command line has such a key.
    """
    file = cfg.data.get("file")
    for key in OF_SPLIT:
        if key in job.explicit and (not file or Path(str(file)).is_dir()):
            rows = f"data.file={file} is a folder" if file else "no data.file= is given"
            raise UserError(
                f"{key}={OmegaConf.select(cfg, key)} does nothing here: it says how one file is "
                f"split into training and validation rows, and {rows}"
            )


def plain_block(block: DictConfig) -> dict[str, Any]:
    """Return a block of the configuration as plain values."""
    values: Any = OmegaConf.to_container(block, resolve=True)
    return dict(values)


def _inherit_settings(cfg: DictConfig, path: str, theirs: dict[str, Any], job: Job) -> None:
    """Take the saved settings of a block, each one into a block that the configuration has.

    Args:
        cfg: the configuration. It is changed in place.
        path: the key of the block.
        theirs: the saved values, only those that `checkpoint_config.accepted` lets through.
        job: the job; keys on its command line keep their value.
    """
    with open_dict(cfg):
        ours = OmegaConf.select(cfg, path)
        for key, value in theirs.items() if isinstance(ours, DictConfig) else ():
            inner = f"{path}.{key}"
            if isinstance(value, dict):
                _inherit_settings(cfg, inner, value, job)
            elif inner not in job.explicit:
                OmegaConf.update(cfg, inner, value)


def report_left_out(cfg: DictConfig, source: Checkpoint, job: Job) -> None:
    """Warn about the settings of the trainer and the callbacks that were not taken.

    Raises:
        UserError: the run had several processes, and the command line does not set them again.
    """
    blocks = {key: cfg.get(key) for key in ("trainer", "callbacks")}
    ours = {k: OmegaConf.to_container(v, resolve=True) if v else None for k, v in blocks.items()}
    flags = checkpoint_config.left_out(source.not_taken, ours)
    flags = [flag for flag in flags if not job.is_set(flag)]
    # A file may not decide how many processes are started. With another number, each process would
    # train on other rows.
    if starts := [flag for flag in flags if flag in checkpoint_config.STARTS]:
        values = " ".join(f"{flag}={source.not_taken[flag]}" for flag in starts)
        raise UserError(
            f"resume={cfg.resume} was trained with {values}: say so again, or what you want "
            "instead; a checkpoint starts no processes"
        )
    if flags:
        log.warning(
            "%s: not taken from the checkpoint, which may be somebody else's: %s; say it again on "
            "the command line if you want it",
            source.path,
            ascii(", ".join(flags))[1:-1],
        )


def literal(values: Mapping[str, Any]) -> DictConfig:
    """Return a node of OmegaConf that resolves to these values; a `${...}` in a text stays."""
    return OmegaConf.create({key: _escaped(value) for key, value in values.items()})


def _escaped(value: Any) -> Any:
    """Return a plain value in which every `${` is escaped."""
    if isinstance(value, str):
        # A backslash escapes "${". Backslashes that stand in front of it already are doubled.
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return value


def _refuse_other_task(cfg: DictConfig, source: Source) -> None:
    """Check that a task that the user or an experiment names is the checkpoint's task.

    Only evaluate.py may score another task, if that task names the checkpoint's task: AX has no
    training data, and an MNLI checkpoint scores it.

    Raises:
        UserError: the tasks differ.
    """
    ours, saved = cfg.get("task"), source.config.task.name
    if ours is None or ours.get("name") == saved:
        return
    if "stage" not in cfg and ours.get("checkpoint_task") == saved:
        return
    raise _contradiction("task", ours, saved, source)


def _contradiction(key: str, ours: Any, saved: Any, source: Source) -> UserError:
    """Return the error for a value that contradicts the checkpoint's value."""
    return UserError(
        f"{key}={_name(ours)} contradicts {source.path}, which was trained with "
        f"{key}={_name(saved)}; leave {key}= out, or give another checkpoint"
    )


def _name(value: Any) -> Any:
    """Return the name of a block that has one; return any other value unchanged."""
    return value["name"] if isinstance(value, DictConfig | dict) and "name" in value else value
