"""A long piece of work, kept part by part, that goes on where it was killed.

    OUTPUT.parts/job.json        what is done here, and what was found out when it began
    OUTPUT.parts/000000.rows     a part's rows
    OUTPUT.parts/000000.bad      and those that could not be answered
    OUTPUT.parts/000000.json     what is known of both; a part counts once this is there
    OUTPUT.parts/finished.json   all is joined, and only has to be moved to its place

Every file comes whole or not at all, whenever the process or the machine stops. Knows nothing of
models, and of rows only that they are bytes.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock

from deebert.errors import UserError
from deebert.predict import disk

JOB, FINISHED, LOCK = "job.json", "finished.json", "lock"
JOINED, ERRORS = "joined", "errors"
# What may lie in the folder, and may be removed from it.
OWN = re.compile(r"(\d{6,}\.(rows|bad|json)|job\.json|finished\.json)(\.tmp)?|joined|errors|lock")


def errors_of(output: Path) -> Path:
    """Where the rows that could not be answered are reported."""
    return output.with_name(f"{output.name}.errors.jsonl")


def parts_of(output: Path) -> Path:
    """The folder of an output that is not finished."""
    return output.with_name(f"{output.name}.parts")


def check(output: Path, overwrite: bool) -> None:
    """What can be said before any work is done.

    Raises:
        UserError: the output cannot be written there, or is there already.
    """
    folder = parts_of(output)
    with disk.told(output):
        if not output.parent.is_dir():
            raise disk.no_folder(output)
        if output.is_dir():
            raise UserError(f"output={output} is a folder; name a file")
        if folder.exists() and not (folder.is_dir() and all(map(_is_own, folder.iterdir()))):
            raise UserError(f"{folder} is in the way: not made by this program; move it away")
        if output.exists() and not overwrite and not folder.exists():
            raise disk.is_there(output)


class Parts:
    """The parts of an output; a context in which no other process can write them.

    Attributes:
        done: what is known of the parts that are there, in their order.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, parts_of(output)
        self.done: list[dict[str, Any]] = []
        self.lock: FileLock

    def __enter__(self) -> Self:
        self.lock = disk.locked(self._file(LOCK), self.output)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = self._file(JOB).exists() or self._file(FINISHED).exists()
        if not kept:  # nothing was begun, or all is done
            self._file(LOCK).unlink(missing_ok=True)
        self.lock.release()
        if not kept and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def ended(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """Bring an end to its end that was interrupted; if it was this job's, what it had told."""
        if not self._file(FINISHED).exists():
            return None
        finished = self._read(FINISHED)
        self._move()
        return finished["told"] if finished["job"] == disk.plain(job) else None

    def begin(
        self, job: Mapping[str, Any], overwrite: bool, find: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Begin a job, or go on with it.

        Args:
            job: what it is, in plain values; parts are of use to the same job only.
            overwrite: begin anew, and replace the output in the end.
            find: finds out what has to stay as it was at the first start.

        Returns:
            What was found then.

        Raises:
            UserError: another job has left its parts here, or the output is there.
        """
        before = self._read(JOB) if self._file(JOB).exists() else None
        # Who began by agreeing to that need not say it again to go on.
        if self.output.exists() and not (overwrite or (before and before["overwrite"])):
            raise disk.is_there(self.output)
        if before and not overwrite:
            self._check_same(before["job"], disk.plain(job))
            self._count()
            return before["found"]
        found = dict(find())  # may take a while, or fail: only then is anything removed
        self._clear()
        self._write(JOB, disk.content({"job": job, "found": found, "overwrite": overwrite}))
        return found

    def add(self, rows: bytes, bad: bytes, about: Mapping[str, Any]) -> None:
        """Keep the next part: from here on it is done."""
        name = f"{len(self.done):06}"
        told = {**about, "bytes": [len(rows), len(bad)]}
        self._write(f"{name}.rows", rows)
        self._write(f"{name}.bad", bad)
        self._write(f"{name}.json", disk.content(told))
        self.done.append(told)

    def finish(
        self,
        job: Mapping[str, Any],
        join: Callable[[Sequence[Path], Path], None],
        told: Mapping[str, Any],
    ) -> None:
        """Join the parts, put the output and its errors in their places, and remove the parts.

        Args:
            join: makes one file of many.
            told: what `ended` gives to a process that finds all but the last step done.
        """
        names = [f"{number:06}" for number in range(len(self.done))]
        with disk.told(self.folder):
            join([self._file(f"{name}.rows") for name in names], self._file(JOINED))
            with self._file(ERRORS).open("wb") as out:
                for name in names:
                    with self._file(f"{name}.bad").open("rb") as content:
                        shutil.copyfileobj(content, out)
            for made in (JOINED, ERRORS):
                disk.sync(self._file(made))
        self._write(FINISHED, disk.content({"job": job, "told": told}))
        self._move()

    def _move(self) -> None:
        """The last step, which whoever finds `FINISHED` can take again."""
        joined, errors, reported = self._file(JOINED), self._file(ERRORS), errors_of(self.output)
        with disk.told(self.output):
            if errors.exists() and errors.stat().st_size:
                os.replace(errors, reported)
            elif errors.exists():
                reported.unlink(missing_ok=True)  # of an output that is replaced now
                errors.unlink()
            if joined.exists():
                os.replace(joined, self.output)
            disk.sync(self.output.parent)
            self._clear()
            self._file(FINISHED).unlink()

    def _check_same(self, before: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        for key in {**before, **job}:
            if before.get(key) != job.get(key):
                raise UserError(
                    f"{self.folder} holds parts of another job, of {key}={before.get(key)} and not "
                    f"{job.get(key)}; finish that one, or begin anew (overwrite=true)"
                )

    def _count(self) -> None:
        self.done = []
        while self._file(f"{len(self.done):06}.json").exists():
            name = f"{len(self.done):06}"
            told = self._read(f"{name}.json")
            files = [self._file(f"{name}.{ending}") for ending in ("rows", "bad")]
            if [file.stat().st_size if file.exists() else -1 for file in files] != told["bytes"]:
                break  # somebody was here: it is done again
            self.done.append(told)

    def _clear(self) -> None:
        """The job goes last: what is left when this is interrupted still says whose it is."""
        self.done = []
        with disk.told(self.folder):
            files = [file for file in self.folder.iterdir() if _is_own(file)]
            for file in sorted(files, key=lambda file: file.name == JOB):
                if file.name not in (LOCK, FINISHED):
                    file.unlink()

    def _file(self, name: str) -> Path:
        return self.folder / name

    def _read(self, name: str) -> dict[str, Any]:
        return disk.read(self._file(name))

    def _write(self, name: str, content: bytes) -> None:
        disk.replace(self._file(name), content, self._file(f"{name}.tmp"))


def _is_own(file: Path) -> bool:
    return OWN.fullmatch(file.name) is not None
