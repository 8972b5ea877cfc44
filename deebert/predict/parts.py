"""The parts of a long job with one output file. A killed job goes on after its last part.

    OUTPUT.parts/job.json        the job, and the values that were computed when it began
    OUTPUT.parts/000000.rows     the rows of a part
    OUTPUT.parts/000000.bad      the rows of a part that have no answer
    OUTPUT.parts/000000.json     the counts of a part; the part is done once this file exists
    OUTPUT.parts/finished.json   all parts are joined, and only have to be moved to their place

Every file is whole or missing, whenever the process or the machine stops. Knows nothing of models;
rows are bytes to it.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import BaseFileLock

from deebert.disk import whole_files
from deebert.errors import UserError
from deebert.predict import long_job

JOB, FINISHED, LOCK = "job.json", "finished.json", "lock"
JOINED, ERRORS = "joined", "errors"
# The files that this module makes in the folder, and that it may remove from it.
OWN = re.compile(r"(\d{6,}\.(rows|bad|json)|job\.json|finished\.json)(\.tmp)?|joined|errors|lock")


def errors_of(output: Path) -> Path:
    """Return the file that reports the rows without an answer."""
    return output.with_name(f"{output.name}.errors.jsonl")


def parts_of(output: Path) -> Path:
    """Return the folder of the parts of an output that is not finished."""
    return output.with_name(f"{output.name}.parts")


def check(output: Path, overwrite: bool) -> None:
    """Check all about an output that can be checked before any work is done.

    Raises:
        UserError: the output cannot be written there, or exists already.
    """
    folder = parts_of(output)
    with long_job.write_errors(output):
        if not output.parent.is_dir():
            raise long_job.no_folder_error(output)
        if output.is_dir():
            raise UserError(f"output={output} is a folder; name a file")
        if folder.exists() and not (folder.is_dir() and all(map(_is_own, folder.iterdir()))):
            raise UserError(f"{folder} is in the way: not made by this program; move it away")
        if output.exists() and not overwrite and not folder.exists():
            raise long_job.exists_error(output)


class Parts:
    """The parts of an output; a context in which no other process can write them.

    Attributes:
        done: the counts of the parts that are done, in their order.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, parts_of(output)
        self.done: list[dict[str, Any]] = []
        self.lock: BaseFileLock

    def __enter__(self) -> Self:
        self.lock = long_job.locked(self._file(LOCK), self.output)
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
        """Complete a `finish` that was interrupted in an earlier process.

        Returns:
            The summary of that process if it did the same job, else None.
        """
        if not self._file(FINISHED).exists():
            return None
        finished = self._read(FINISHED)
        self._move()
        return finished["told"] if finished["job"] == long_job.plain(job) else None

    def begin(
        self, job: Mapping[str, Any], overwrite: bool, find: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Begin a job, or go on with it.

        Args:
            job: the description of the job, in plain values. Only the same job can use its parts.
            overwrite: whether to begin anew, and to replace the output in the end.
            find: computes the values that have to stay the same in all processes of the job.

        Returns:
            These values, as they were computed when the job began.

        Raises:
            UserError: the parts of another job are here, or the output exists.
        """
        before = self._read(JOB) if self._file(JOB).exists() else None
        # A job that began with overwrite=true goes on without it.
        if self.output.exists() and not (overwrite or (before and before["overwrite"])):
            raise long_job.exists_error(self.output)
        if before and not overwrite:
            self._check_same(before["job"], long_job.plain(job))
            self._count()
            return before["found"]
        fixed = dict(find())  # may take a while or fail, so nothing is removed before it
        self._clear()
        self._write(JOB, long_job.content({"job": job, "found": fixed, "overwrite": overwrite}))
        return fixed

    def add(self, rows: bytes, bad: bytes, about: Mapping[str, Any]) -> None:
        """Write the next part. When this returns, the part is done.

        Args:
            rows: the rows.
            bad: the rows without an answer.
            about: the counts of the part.
        """
        name = f"{len(self.done):06}"
        counts = {**about, "bytes": [len(rows), len(bad)]}
        self._write(f"{name}.rows", rows)
        self._write(f"{name}.bad", bad)
        self._write(f"{name}.json", long_job.content(counts))
        self.done.append(counts)

    def finish(
        self,
        job: Mapping[str, Any],
        join: Callable[[Sequence[Path], Path], None],
        summary: Mapping[str, Any],
    ) -> None:
        """Join the parts, put the output and its errors in their places, and remove the parts.

        Args:
            job: the description of the job.
            join: makes one file of many.
            summary: the values that `ended` returns to a process for which only the last step is
                left.
        """
        names = [f"{number:06}" for number in range(len(self.done))]
        with long_job.write_errors(self.folder):
            join([self._file(f"{name}.rows") for name in names], self._file(JOINED))
            with self._file(ERRORS).open("wb") as out:
                for name in names:
                    with self._file(f"{name}.bad").open("rb") as content:
                        shutil.copyfileobj(content, out)
            for made in (JOINED, ERRORS):
                whole_files.sync(self._file(made))
        self._write(FINISHED, long_job.content({"job": job, "told": summary}))
        self._move()

    def _move(self) -> None:
        """Take the last step. Any process that sees `FINISHED` can take it again."""
        joined, errors, reported = self._file(JOINED), self._file(ERRORS), errors_of(self.output)
        with long_job.write_errors(self.output):
            if errors.exists() and errors.stat().st_size:
                os.replace(errors, reported)
            elif errors.exists():
                reported.unlink(missing_ok=True)  # it belongs to the output that is replaced
                errors.unlink()
            if joined.exists():
                os.replace(joined, self.output)
            whole_files.sync(self.output.parent)
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
        """Read the counts of the parts that are done, up to the first damaged one."""
        self.done = []
        while self._file(f"{len(self.done):06}.json").exists():
            name = f"{len(self.done):06}"
            counts = self._read(f"{name}.json")
            files = [self._file(f"{name}.{suffix}") for suffix in ("rows", "bad")]
            if [file.stat().st_size if file.exists() else -1 for file in files] != counts["bytes"]:
                break  # a file was changed from outside: this part is done again
            self.done.append(counts)

    def _clear(self) -> None:
        """Remove the parts, the job's file last: it says whose the other files are."""
        self.done = []
        with long_job.write_errors(self.folder):
            files = [file for file in self.folder.iterdir() if _is_own(file)]
            for file in sorted(files, key=lambda file: file.name == JOB):
                if file.name not in (LOCK, FINISHED):
                    file.unlink()

    def _file(self, name: str) -> Path:
        return self.folder / name

    def _read(self, name: str) -> dict[str, Any]:
        return long_job.read(self._file(name))

    def _write(self, name: str, content: bytes) -> None:
        long_job.replace(self._file(name), content, self._file(f"{name}.tmp"))


def _is_own(file: Path) -> bool:
    return OWN.fullmatch(file.name) is not None
