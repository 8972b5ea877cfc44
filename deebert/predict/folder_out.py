"""An output folder of parts that many processes write in any order. A killed job can go on.

    OUTPUT/part-00002-000000.csv      the answers to the first block of rows of the third file
    OUTPUT/_errors.jsonl              the rows without an answer, and the reasons
    OUTPUT/_job.json                  the job; in the end its summary, too
    OUTPUT/_part-00002-000000.json    until the end: the counts of that block, which is done
    OUTPUT/_part-00002-000000.jsonl   until the end: the rows of that block without an answer

Programs that read the folder as one table skip the files that begin with an underscore. Every file
is whole or missing. Knows nothing of models and of how the work is distributed.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deebert.disk import whole_files
from deebert.errors import UserError
from deebert.predict import long_job, rows_out
from deebert.predict.rows_out import Layout

JOB, LOCK, ERRORS = "_job.json", "_lock", "_errors.jsonl"
# The files that this module makes in the folder, and that it may remove from it.
OWN = re.compile(r"[_.]?part-\d{5,}-\d{6,}\.\w+|[_.](job\.json|errors\.jsonl)|_lock")


@dataclass(frozen=True)
class Folder:
    """The folder of the parts.

    Attributes:
        path: its absolute path.
        kind: the format of the parts: csv, jsonl or parquet.
    """

    path: Path
    kind: str

    def check(self) -> None:
        """Check all about the folder that can be checked before any work is done.

        Raises:
            UserError: the parts cannot be written there.
        """
        if self.path.is_file():
            raise UserError(f"output={self.path} is a file; engine=ray writes a folder of parts")
        if not self.path.parent.is_dir():
            raise long_job.no_folder_error(self.path)
        others = [p.name for p in self.path.glob("*") if not OWN.fullmatch(p.name)]
        if others:
            raise UserError(
                f"output={self.path} holds other files ({min(others)}); name another folder"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder for one job, inside the `with` block."""
        lock = long_job.locked(self.path / LOCK, self.path)
        try:
            yield
        finally:
            begun = any(file.name != LOCK for file in self.path.iterdir())
            if not begun:
                (self.path / LOCK).unlink(missing_ok=True)
            lock.release()
            if not begun:
                self.path.rmdir()

    def begin(
        self, job: Mapping[str, Any], overwrite: bool, find: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Begin a job, or go on with it.

        Args:
            job: the description of the job, in plain values. Only the same job can use its parts.
            overwrite: whether to begin anew.
            find: computes the values that have to stay the same in all processes of the job.

        Returns:
            These values, as they were computed when the job began.

        Raises:
            UserError: the parts of another job are here, or this job is finished.
        """
        job = long_job.plain(job)
        if (self.path / JOB).exists() and not overwrite:
            before = long_job.read(self.path / JOB)
            if "told" in before:
                self._clear("_part-*", ".part-*")  # left if the process was killed while it cleared
                raise long_job.exists_error(self.path)
            for key in {**before["job"], **job}:
                if before["job"].get(key) != job.get(key):
                    raise UserError(
                        f"output={self.path} was begun as another job, with another {key}; finish "
                        "that one, or begin anew (overwrite=true)"
                    )
            fixed: dict[str, Any] = before["found"]
            return fixed
        if not overwrite and any(self.path.glob("part-*")):
            raise long_job.exists_error(self.path)
        fixed = find()  # may take a while or fail, so nothing is removed before it
        self._clear("_part-*", ".part-*", "part-*", ERRORS, JOB)
        self._write(JOB, {"job": job, "found": fixed, "key": secrets.token_hex(8)})
        return fixed

    def key(self) -> str | None:
        """Return the key of the job that was begun here; every job has another one.

        Returns:
            The key, or None if no job was begun here. On another machine, None means that this is
            not the folder in which the job was begun.
        """
        job = self.path / JOB
        return str(long_job.read(job).get("key")) if job.exists() else None

    def done(self) -> dict[tuple[int, int], dict[str, int]]:
        """Return the counts of the blocks that are done, by file and block."""
        counts = {}
        for path in self.path.glob("_part-*.json"):
            _, number, block = path.stem.split("-")
            if (self.path / f"{path.stem[1:]}.{self.kind}").exists():
                counts[int(number), int(block)] = long_job.read(path)
        return counts

    def keep(
        self,
        file: int,
        block: int,
        layout: Layout,
        rows: Sequence[Mapping[str, Any]],
        bad: Sequence[Mapping[str, Any]],
        about: Mapping[str, int],
        key: str | None,
    ) -> None:
        """Write the results of a block. When this returns, the block is done.

        Args:
            file: the number of the input file.
            block: the number of the block in the file.
            layout: how the rows are written.
            rows: the rows of the output.
            bad: the rows that have no answer.
            about: the counts of the block, which `done` returns.
            key: the key of the job that the answers belong to.

        Raises:
            UserError: another job was begun here meanwhile.
        """
        if self.key() != key:  # a killed process may leave workers behind for a while
            raise UserError(f"output={self.path}: another job was begun here")
        stem = f"part-{file:05}-{block:06}"
        if bad:
            self._replace(f"_{stem}.jsonl", "".join(map(rows_out.json_line, bad)).encode())
        own = f".{stem}.{secrets.token_hex(4)}"  # a killed job's worker may be at the same block
        rest, whole = self.path / f"{own}_rows", self.path / own
        with long_job.write_errors(self.path):
            rest.write_bytes(layout.part(rows))
            layout.join([rest], whole)  # a complete file of its format, such as CSV with a header
            rest.unlink()
            whole_files.sync(whole)
            os.replace(whole, self.path / f"{stem}.{self.kind}")
        self._write(f"_{stem}.json", about)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Note that the job is finished, with its summary, and remove the notes on its blocks."""
        bad = b"".join(path.read_bytes() for path in sorted(self.path.glob("_part-*.jsonl")))
        if bad:
            self._replace(ERRORS, bad)
        self._write(JOB, {**long_job.read(self.path / JOB), "told": dict(summary)})
        self._clear("_part-*", ".part-*", LOCK)

    def _clear(self, *patterns: str) -> None:
        with long_job.write_errors(self.path):
            for pattern in patterns:
                for path in self.path.glob(pattern):
                    path.unlink(missing_ok=True)

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        self._replace(name, long_job.content(values))

    def _replace(self, name: str, content: bytes) -> None:
        long_job.replace(self.path / name, content, self.path / f".{name[1:]}")
