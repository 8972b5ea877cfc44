"""A folder of parts that many processes write, in any order; goes on where it was killed.

    OUTPUT/part-00002-000000.csv      answers to the first block of rows of the third file
    OUTPUT/_errors.jsonl              rows without an answer, and why
    OUTPUT/_job.json                  what is done here; at its end, what there is to say of it
    OUTPUT/_part-00002-000000.json    while it lasts: that block is done, and what is known of it
    OUTPUT/_part-00002-000000.jsonl   while it lasts: the rows of that block without an answer

What begins with an underscore is passed over by those who read the folder as one table. Every file
comes whole or not at all. Knows nothing of models, or how the work is dealt out.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deebert.errors import UserError
from deebert.predict import disk, rows_out
from deebert.predict.rows_out import Layout

JOB, LOCK, ERRORS = "_job.json", "_lock", "_errors.jsonl"
# What may lie in the folder, and may be removed from it.
OWN = re.compile(r"[_.]?part-\d{5,}-\d{6,}\.\w+|[_.](job\.json|errors\.jsonl)|_lock")


@dataclass(frozen=True)
class Folder:
    """Where the parts lie.

    Attributes:
        kind: of the parts: csv, jsonl or parquet.
    """

    path: Path
    kind: str

    def check(self) -> None:
        """What can be said before any work is done.

        Raises:
            UserError: this is no place for the parts.
        """
        if self.path.is_file():
            raise UserError(f"output={self.path} is a file; engine=ray writes a folder of parts")
        if not self.path.parent.is_dir():
            raise disk.no_folder(self.path)
        others = [p.name for p in self.path.glob("*") if not OWN.fullmatch(p.name)]
        if others:
            raise UserError(
                f"output={self.path} holds other files ({min(others)}); name another folder"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Around all that is written: one job at a time."""
        lock = disk.locked(self.path / LOCK, self.path)
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
            job: what it is, in plain values; parts are of use to the same job only.
            overwrite: begin anew.
            find: finds out what has to stay as it was at the first start.

        Returns:
            What was found then.

        Raises:
            UserError: another job has left its parts here, or this one is finished.
        """
        job = disk.plain(job)
        if (self.path / JOB).exists() and not overwrite:
            before = disk.read(self.path / JOB)
            if "told" in before:
                self._clear("_part-*", ".part-*")  # if it was killed over this
                raise disk.is_there(self.path)
            for key in {**before["job"], **job}:
                if before["job"].get(key) != job.get(key):
                    raise UserError(
                        f"output={self.path} was begun as another job, with another {key}; finish "
                        "that one, or begin anew (overwrite=true)"
                    )
            found: dict[str, Any] = before["found"]
            return found
        if not overwrite and any(self.path.glob("part-*")):
            raise disk.is_there(self.path)
        found = find()  # may take a while, or fail: only then is anything removed
        self._clear("_part-*", ".part-*", "part-*", ERRORS, JOB)
        self._write(JOB, {"job": job, "found": found, "key": secrets.token_hex(8)})
        return found

    def key(self) -> str | None:
        """Of the job that was begun here, another for each; None where this folder is not the one
        where it was begun, on whatever machine this is."""
        job = self.path / JOB
        return str(disk.read(job).get("key")) if job.exists() else None

    def done(self) -> dict[tuple[int, int], dict[str, int]]:
        """What is known of the blocks that are done, by file and block."""
        found = {}
        for path in self.path.glob("_part-*.json"):
            _, number, block = path.stem.split("-")
            if (self.path / f"{path.stem[1:]}.{self.kind}").exists():
                found[int(number), int(block)] = disk.read(path)
        return found

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
        """Write what became of a block: from here on it is done.

        Args:
            bad: the rows that have no answer.
            about: what `done` says of it.
            key: of the job that the answers are of.

        Raises:
            UserError: another job was begun here meanwhile.
        """
        if self.key() != key:  # whoever began this one was killed, and its workers not yet
            raise UserError(f"output={self.path}: another job was begun here")
        stem = f"part-{file:05}-{block:06}"
        if bad:
            self._replace(f"_{stem}.jsonl", "".join(map(rows_out.json_line, bad)).encode())
        own = f".{stem}.{secrets.token_hex(4)}"  # a killed job's worker may be at the same block
        rest, whole = self.path / f"{own}_rows", self.path / own
        with disk.told(self.path):
            rest.write_bytes(layout.part(rows))
            layout.join([rest], whole)  # a file of its own, with all that goes with it
            rest.unlink()
            disk.sync(whole)
            os.replace(whole, self.path / f"{stem}.{self.kind}")
        self._write(f"_{stem}.json", about)

    def finish(self, told: Mapping[str, Any]) -> None:
        """Say that all is done, and what there is to say of it."""
        bad = b"".join(path.read_bytes() for path in sorted(self.path.glob("_part-*.jsonl")))
        if bad:
            self._replace(ERRORS, bad)
        self._write(JOB, {**disk.read(self.path / JOB), "told": dict(told)})
        self._clear("_part-*", ".part-*", LOCK)

    def _clear(self, *patterns: str) -> None:
        with disk.told(self.path):
            for pattern in patterns:
                for path in self.path.glob(pattern):
                    path.unlink(missing_ok=True)

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        self._replace(name, disk.content(values))

    def _replace(self, name: str, content: bytes) -> None:
        disk.replace(self.path / name, content, self.path / f".{name[1:]}")
