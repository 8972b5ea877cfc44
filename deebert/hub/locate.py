"""Find the model that a user names, on this machine or on the hub.

A name leads to a run folder, a checkpoint file, a folder of `save_pretrained`, a published
classifier, or a hub repository that holds one of the last two. This module knows no weights:
`checkpoints`, `saved_folder` and `conversion` read them.
"""

import re
from collections.abc import Mapping
from os.path import exists
from pathlib import Path
from typing import Any

from deebert.data import tokenization
from deebert.errors import UserError
from deebert.hub import (
    checkpoint_config,
    checkpoints,
    conversion,
    record_files,
    saved_folder,
    transformers_folder,
)
from deebert.hub.checkpoints import Checkpoint
from deebert.hub.run_config import RunConfig, RunDefaults
from deebert.hub.saved_folder import Saved
from deebert.untrusted import plain_files

FLAG = "model"
BEST = "best.ckpt"
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
ADAPTER = "adapter_config.json"  # of a LoRA folder of peft
HUB_FILES = (
    "config.json",
    ADAPTER,
    saved_folder.FILE,
    *tokenization.FILES,
    "records/*.safetensors",
)
PATIENCE = 10.0  # seconds that the hub has to answer


def find(given: str | Path, task: str | Mapping[str, Any] | None = None, flag: str = FLAG) -> Saved:
    """Find a model and its records.

    Args:
        given: a run folder, or a name that `checkpoint` takes, or the run folder of an evaluation,
            which holds records and the name of the model that they were made with.
        task: the task of a published classifier that does not state it: a name in conf/task/, or
            the values of such a file.
        flag: the flag that the user named the model with, for error messages.

    Raises:
        UserError: there is nothing that can be loaded.
    """
    place = _place(given, flag)
    if saved_folder.is_saved(place):
        saved = saved_folder.read(place, flag)
    elif scored := _scored(place):
        ckpt, config = scored
        # results.json may name a file on this machine. Nothing that it names is fetched.
        defaults = RunDefaults.of(config)
        model = checkpoint(ckpt, f"{flag}={given}: ckpt", defaults=defaults, fetch=False)
        saved = Saved(model, saved_folder.records_of(place, model))
    else:
        values = conversion.task_values(task) if isinstance(task, str) else task
        model = _checkpoint(place, str(given), flag, BEST, RunDefaults(values))
        run = model.path.parent
        run = run.parent if run.name == "checkpoints" else run
        is_run = model.path.is_file()
        saved = Saved(model, saved_folder.records_of(run, model) if is_run else {})
    wanted = task.get("name") if isinstance(task, Mapping) else task
    if wanted not in (None, name := saved.checkpoint.config.task.name):
        raise UserError(f"task={wanted}: {given} was trained for task={name}; leave task= out")
    return saved


def checkpoint(
    given: str | Path,
    flag: str,
    name: str = BEST,
    defaults: RunDefaults | None = None,
    *,
    fetch: bool = True,
) -> Checkpoint:
    """Find a model, without its records.

    Args:
        given: a run folder, a checkpoint file, a folder of `save_pretrained`, the folder of a
            published classifier, or the id of a hub repository with one of the last two.
        flag: the flag that the user named it with, for error messages.
        name: file name of the checkpoint in a run folder.
        defaults: the values of a run that a published classifier does not state.
        fetch: True if the hub may be queried for an id. If False, only an earlier download is used.

    Raises:
        UserError: there is nothing that can be loaded.
    """
    return _checkpoint(
        _place(given, flag, fetch), str(given), flag, name, defaults or RunDefaults()
    )


def _checkpoint(place: Path, given: str, flag: str, name: str, defaults: RunDefaults) -> Checkpoint:
    if saved_folder.is_saved(place):
        return saved_folder.read(place, flag).checkpoint
    if place.is_dir() and not _is_run(place, name):
        if exists(place / ADAPTER):
            raise UserError(
                f"{flag}={given}: it is a LoRA adapter; merge it into its model and give the "
                f"folder MERGED: AutoPeftModelForSequenceClassification.from_pretrained('{given}')"
                ".merge_and_unload().save_pretrained('MERGED') in Python (peft), with its tokenizer"
            )
        if exists(place / "config.json"):
            return conversion.read(place, flag, given, defaults)
        raise UserError(
            f"{flag}={given}: the folder holds no checkpoints/{name} (give a run folder), no "
            f"{saved_folder.FILE} (one of save_pretrained) and no config.json (a published "
            "classifier)"
        )
    return checkpoints.read(checkpoints.find(str(place), flag, name), flag)


def _is_run(place: Path, name: str) -> bool:
    return exists(place / "checkpoints" / name) or exists(place / name)


def classifier_folder(given: str, flag: str) -> Path | None:
    """Return the folder of a published classifier; None if a name leads to something else.

    Args:
        given: a name that `checkpoint` takes.
        flag: the flag that the user named it with, for error messages.
    """
    place = _place(given, flag)
    is_other = saved_folder.is_saved(place) or _is_run(place, BEST) or exists(place / ADAPTER)
    return place if exists(place / "config.json") and not is_other else None


def _scored(folder: Path) -> tuple[str, RunConfig] | None:
    """Return the name and configuration of the checkpoint that evaluate.py scored in a folder.

    None if the folder holds no such evaluation, or the checkpoint itself.
    """
    files = record_files.files(folder) if folder.is_dir() else []
    if not files or (folder / "checkpoints").exists():
        return None
    try:
        ckpt = plain_files.json_file(plain_files.inside(folder, "results.json")).get("ckpt")
    except (FileNotFoundError, UserError):
        return None
    if ckpt is None or not checkpoint_config.PATH.fits(ckpt):
        return None
    return ckpt, record_files.load(files[0])[1].config


def _place(given: str | Path, flag: str, fetch: bool = True) -> Path:
    """Return the local path of a model. A text that is no path here may be an id on the hub."""
    path, text = Path(given), str(given)
    is_id = re.fullmatch(HUB_ID, text) and ".." not in text and path.suffix != ".ckpt"
    return _downloaded(text, flag, fetch) if is_id and not exists(path) else path


def _downloaded(repo_id: str, flag: str, fetch: bool) -> Path:
    """Download the needed files of a hub repository, or find those of an earlier download.

    Raises:
        UserError: the repository does not exist, or the hub cannot be reached and no earlier
            download is there.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    absent = f"{flag}={repo_id}: no such file or folder here, and"
    failure = "it is named in a file, so it is not fetched"
    try:
        if fetch:
            # This query comes first, because snapshot_download has no time limit.
            info = HfApi().model_info(repo_id, timeout=PATIENCE)
            there = {file.rfilename for file in info.siblings or ()}
            weights = next(
                (name for name in transformers_folder.WEIGHTS if name in there),
                transformers_folder.WEIGHTS[0],
            )
            return Path(snapshot_download(repo_id, allow_patterns=[*HUB_FILES, weights]))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{absent} no repository of this name on the hub that you may read (hf auth login)"
        ) from error
    except Exception as error:  # no network, no answer, an outage
        failure = f"the hub cannot be asked ({type(error).__name__})"
    try:
        patterns = [*HUB_FILES, transformers_folder.WEIGHTS[0]]
        return Path(snapshot_download(repo_id, allow_patterns=patterns, local_files_only=True))
    except Exception as error:
        raise UserError(
            f"{absent} {failure}; without a network give a local folder (where there is one: hf "
            f"download {repo_id} --local-dir FOLDER)"
        ) from error
