"""The files of an input that many processes read, each looked into before anything is done.

Says of each file what is read, what is written of it and what it is called, in plain values that
can be sent to other machines. Knows nothing of how the work is dealt out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deebert.errors import UserError, unknown
from deebert.predict import rows_in, rows_out
from deebert.predict.answers import Columns
from deebert.predict.rows import Row
from deebert.predict.rows_out import Layout
from deebert.predict.work import PredictOptions, Work, chosen_columns

if TYPE_CHECKING:
    from deebert.classifier import EarlyExitClassifier

KINDS = {"csv": "csv", "tsv": "csv", "jsonl": "jsonl", "parquet": "parquet"}  # read -> written
FILE = "file"  # the column that says where a row is from, beside its number there


@dataclass(frozen=True)
class File:
    """A file of the input, and what is to be done with its rows.

    Attributes:
        number: its place among the files, which are in the order of their names.
        name: its path inside the input.
        kind: what it holds.
        size: in bytes.
        wanted: columns that are read.
        known: where rows may have columns that are left out: those that are not.
        done: blocks that have been answered before.
    """

    number: int
    name: str
    path: str
    kind: str
    size: int
    wanted: frozenset[str]
    columns: Columns
    layout: Layout
    known: frozenset[str] | None
    done: frozenset[int] = frozenset()

    def blocks(self, part_rows: int) -> Iterator[tuple[int, list[Row], int]]:
        """The blocks of its rows that are not done: number, rows, and their share of the size."""
        with rows_in.opened(self.path, self.kind) as source:
            rows, before = source.rows(self.wanted), 0
            for number, block in enumerate(rows_in.blocks(rows, part_rows)):
                position = source.position()
                share = (position - before) * self.size // (source.size or 1)
                before = position
                if number not in self.done:
                    yield number, block, share

    def named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the output, with the name of the file."""
        return {FILE: self.name, **{_renamed(name, row): value for name, value in row.items()}}


def files_of(options: PredictOptions) -> list[tuple[str, Path]]:
    """The files, each with its name inside the input.

    Raises:
        UserError: there are none.
    """
    given = Path(options.input)
    if options.input == rows_in.STDIN:
        raise UserError("input=- is for engine=local; give engine=ray a file or a folder")
    if not given.is_dir():
        return [(given.name, given)]
    found = []
    for path in sorted(given.rglob("*")):
        name = path.relative_to(given)
        hidden = any(part.startswith((".", "_")) for part in name.parts)
        known = options.format or path.suffix.lower() in rows_in.ENDINGS
        if path.is_file() and known and not hidden:
            found.append((name.as_posix(), path))
    if not found:
        raise UserError(f"input={given}: no file there ends with {', '.join(rows_in.ENDINGS)}")
    return found


def kind_of(options: PredictOptions, files: Sequence[tuple[str, Path]]) -> str:
    """What is written: as said, or as the input is.

    Raises:
        UserError: it is unknown.
    """
    kinds = {KINDS[rows_in.format_of(str(path), options.format)] for _, path in files}
    if options.parts is not None:
        if options.parts not in KINDS.values():
            raise unknown("parts", options.parts, dict.fromkeys(KINDS.values()), "parts")
        return options.parts
    if len(kinds) > 1:
        raise UserError(
            f"input={options.input} holds {' and '.join(sorted(kinds))}; say what is to be written "
            "(parts=csv, ...)"
        )
    return kinds.pop()


def looked_into(
    options: PredictOptions,
    files: Sequence[tuple[str, Path]],
    classifier: "EarlyExitClassifier",
    kind: str,
) -> tuple[list[File], Work]:
    """What is to be done with each file; and the work that the last one alone would be.

    Raises:
        UserError: one cannot be read, or has no rows or not the columns that are needed.
    """
    found = []
    for number, (name, path) in enumerate(files):
        said = replace(options, input=str(path))
        with rows_in.opened(str(path), options.format) as source:
            columns = chosen_columns(said, source, classifier.task.columns, rows_out.is_free(kind))
            if kind == "parquet" and source.free and columns.kept:
                raise UserError(
                    f"input={path}: a column of Parquet has one type, and JSON lines do not say "
                    "which; parts=jsonl, or keep=none"
                )
            work = Work(said, source, classifier, columns)
            wanted, known = work.wanted, work.known
            next(source.rows(wanted))  # a file without rows is refused
            layout = _with_file(work.layout(kind))
        held, size = rows_in.format_of(str(path), options.format), path.stat().st_size
        where = str(path.absolute())
        found.append(File(number, name, where, held, size, wanted, columns, layout, known))
    return found, work


def _with_file(layout: Layout) -> Layout:
    names = [_renamed(name, layout.names) for name in layout.names]
    types = {_renamed(name, layout.names): kind for name, kind in layout.types.items()}
    if layout.kind == "parquet":
        import pyarrow as pa

        types[FILE] = pa.string()
    return Layout(layout.kind, (FILE, *names), types)


def _renamed(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """A column of the input that is called as ours becomes another."""
    if name == FILE:
        while name in names:
            name = f"input_{name}"
    return name
