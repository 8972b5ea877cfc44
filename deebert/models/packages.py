"""Pretrained weights in installed packages, for machines without the hub.

A package holds the folder of a model, or a piece of a zip file with such a folder. The pieces lie
in packages of their own, since the package index takes no large files. They are joined once, in
the cache of the user. The module imports none of these packages, and does not know what the files
mean.
"""

import errno
import hashlib
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

from huggingface_hub import constants

from deebert.disk import locks, whole_files
from deebert.errors import UserError, first_line

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
OTHERS = (".json", ".txt")  # endings of the files beside the weights: configuration and tokenizer
WAIT = 600  # seconds for another process that joins the pieces; it takes about 10


def folder_of(package: str | Sequence[str], sha256: str | None) -> Path | None:
    """Return the folder of a model that is installed; None if it is not.

    Args:
        package: the folder inside of a package ("package/folder"), or the pieces of a zip file in
            their order, each as "package/folder/file".
        sha256: the hash of the model's weights.

    Raises:
        UserError: the weights have another hash, or the pieces cannot be joined.
    """
    if not isinstance(package, str):
        return _joined(package, str(sha256))
    folder = _installed(package)
    if folder is not None:
        _check(folder / WEIGHTS, sha256)
    return folder


def _installed(path: str) -> Path | None:
    """Return a folder or file of a package; None if the package is not installed."""
    name, _, inside = path.partition("/")
    module = importlib.util.find_spec(name)  # does not import a top-level package
    if module is None or not module.submodule_search_locations:
        return None
    return Path(module.submodule_search_locations[0]) / inside


def _joined(pieces: Sequence[str], sha256: str) -> Path | None:
    """Return the folder that the pieces were joined in; None if they are not all installed.

    The weights are written last, so the other files are whole where the weights are.
    """
    folder = Path(constants.HF_HOME) / "deebert" / sha256[:16]
    if _is_whole(folder, sha256):
        return folder
    files = [file for piece in pieces if (file := _installed(piece)) and file.is_file()]
    if len(files) < len(pieces):
        return None
    with whole_files.write_errors(folder, "; set HF_HOME to another folder"):
        busy = f"{folder} is being written by another process for {WAIT} s; try again later"
        lock = locks.locked(folder.with_suffix(".lock"), busy, wait=WAIT)
        try:
            if not _is_whole(folder, sha256):  # the other process may have written it
                _join(files, folder, sha256)
        finally:
            lock.release()
    return folder


def _join(pieces: list[Path], folder: Path, sha256: str) -> None:
    """Write the files of a zip file that lies in pieces.

    Raises:
        UserError: the pieces are damaged.
    """
    log.info("joining the weights of %d packages in %s, once", len(pieces), folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as joined:  # it has no name, so none is left
            for piece in pieces:
                with open(piece, "rb") as source:
                    shutil.copyfileobj(source, joined)
            with ZipFile(joined) as archive:
                _extract(archive, folder, sha256)
    except Exception as error:  # zipfile raises many kinds of them for a damaged file
        of_disk = isinstance(error, OSError) and error.errno != errno.EINVAL  # a seek before 0
        if of_disk or isinstance(error, UserError):
            raise
        raise UserError(
            f"{pieces[0]} and the {len(pieces) - 1} pieces after it are no whole zip file "
            f"({first_line(error)}): reinstall their packages or use another backbone="
        ) from error


def _extract(archive: ZipFile, folder: Path, sha256: str) -> None:
    """Write the weights of an archive, after the files that lie beside them in it."""
    paths = {PurePosixPath(name): name for name in archive.namelist()}
    weights = next((path for path in paths if path.name == WEIGHTS), None)
    if weights is None:
        raise BadZipFile(f"no {WEIGHTS} is in it")
    for path, name in paths.items():
        if path.parent == weights.parent and path.suffix in OTHERS:
            whole_files.replace(folder / path.name, archive.read(name))
    with whole_files.replaced(folder / WEIGHTS) as part:
        with archive.open(paths[weights]) as source, open(part, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        _check(part, sha256)


def _is_whole(folder: Path, sha256: str) -> bool:
    """Say whether the weights are there, with this hash."""
    return (folder / WEIGHTS).is_file() and _digest(folder / WEIGHTS) == sha256


def _check(weights: Path, sha256: str | None) -> None:
    """Check the hash of weights.

    Raises:
        UserError: it is another one.
    """
    digest = _digest(weights)
    if digest != sha256:
        raise UserError(
            f"{weights} has sha256 {digest}, not {sha256}: the package was changed; reinstall it "
            "or use another backbone="
        )


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
