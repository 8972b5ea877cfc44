"""What a user names as a model -> what lies there: a run, a checkpoint file, a folder of
save_pretrained, a published classifier, or a hub repository that holds one of the last two.

Knows no weights; `checkpoints`, `saved` and `published` read them.
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
from deebert.hub.saved_folder import Saved
from deebert.untrusted import plain_files

FLAG = "model"
BEST = "best.ckpt"
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
HUB_FILES = ("config.json", saved_folder.FILE, *tokenization.FILES, "records/*.safetensors")
PATIENCE = 10.0  # seconds until the hub must have answered


def find(given: str | Path, task: str | Mapping[str, Any] | None = None, flag: str = FLAG) -> Saved:
    """A model and the records that lie with it.

    Args:
        given: a run folder, or what `checkpoint` finds. Also the run folder of an evaluation, which
            holds records, and names the model that they are of.
        task: what a published classifier was trained for, where it does not say: a name in
            conf/task/, or what such a file holds.

    Raises:
        UserError: nothing that can be loaded is there.
    """
    place = _place(given, flag)
    if saved_folder.is_saved(place):
        found = saved_folder.read(place, flag)
    elif scored := _scored(place):
        ckpt, config = scored
        # Whoever wrote results.json may name a file here, but nothing to be fetched.
        model = checkpoint(ckpt, f"{flag}={given}: ckpt", said=config, fetch=False)
        found = Saved(model, saved_folder.records_of(place, model))
    else:
        values = conversion.task_values(task) if isinstance(task, str) else task
        model = _checkpoint(place, str(given), flag, BEST, {"task": values})
        run = model.path.parent
        run = run.parent if run.name == "checkpoints" else run
        is_run = model.path.is_file()
        found = Saved(model, saved_folder.records_of(run, model) if is_run else {})
    told = task.get("name") if isinstance(task, Mapping) else task
    if told not in (None, name := found.checkpoint.config["task"]["name"]):
        raise UserError(f"task={told}: {given} was trained for task={name}; leave task= out")
    return found


def checkpoint(
    given: str | Path,
    flag: str,
    name: str = BEST,
    said: Mapping[str, Any] | None = None,
    *,
    fetch: bool = True,
) -> Checkpoint:
    """A model alone.

    Args:
        given: a run folder, a checkpoint file, a folder of `save_pretrained`, that of a published
            classifier, or the id of a hub repository with one of the last two.
        name: of the checkpoint in a run folder.
        said: what a published classifier does not say itself (`conversion.read`).
        fetch: may the hub be asked for an id? If not, what was downloaded before is found.

    Raises:
        UserError: nothing that can be loaded is there.
    """
    return _checkpoint(_place(given, flag, fetch), str(given), flag, name, said or {})


def _checkpoint(
    place: Path, given: str, flag: str, name: str, said: Mapping[str, Any]
) -> Checkpoint:
    if saved_folder.is_saved(place):
        return saved_folder.read(place, flag).checkpoint
    is_run = exists(place / "checkpoints" / name) or exists(place / name)
    if place.is_dir() and not is_run:
        if exists(place / "config.json"):
            return conversion.read(place, flag, given, said)
        raise UserError(
            f"{flag}={given}: the folder holds no checkpoints/{name} (give a run folder), no "
            f"{saved_folder.FILE} (one of save_pretrained) and no config.json (a published "
            "classifier)"
        )
    return checkpoints.read(checkpoints.find(str(place), flag, name), flag)


def _scored(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The checkpoint that evaluate.py has scored here, as it was named, and its configuration."""
    files = record_files.files(folder) if folder.is_dir() else []
    if not files or (folder / "checkpoints").exists():
        return None
    try:
        ckpt = plain_files.json_file(plain_files.inside(folder, "results.json")).get("ckpt")
    except (FileNotFoundError, UserError):
        return None
    if ckpt is None or not checkpoint_config.PATH.fits(ckpt):
        return None
    return ckpt, record_files.load(files[0])[1]["config"]


def _place(given: str | Path, flag: str, fetch: bool = True) -> Path:
    """Where it lies on this machine; what is no path here may be a hub's id."""
    path, text = Path(given), str(given)
    is_id = re.fullmatch(HUB_ID, text) and ".." not in text and path.suffix != ".ckpt"
    return _downloaded(text, flag, fetch) if is_id and not exists(path) else path


def _downloaded(repo_id: str, flag: str, fetch: bool) -> Path:
    """What is needed of a hub repository; without a network, what was downloaded before."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    absent = f"{flag}={repo_id}: no such file or folder here, and"
    failure = "it is named in a file, so it is not fetched"
    try:
        if fetch:
            info = HfApi().model_info(repo_id, timeout=PATIENCE)  # snapshot_download waits for ever
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
