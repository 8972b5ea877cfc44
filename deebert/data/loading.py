"""Read the rows of a split from the hub, from a local folder or from the demo task.

A local file is Parquet, JSON lines, JSON, TSV or CSV, and `rows` reads it. Every split gets the
same columns: `text_a`, `text_b` (pairs only), `label` (if the split has labels), `group` (if the
task has one) and `index`. A row that does not fit is refused with its file and line. The module
does not know tokens or models.
"""

import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import path
from pathlib import Path
from typing import Any

import datasets

from deebert.data import demo, labels, texts
from deebert.data.file_split import OwnFolder, SplitFile
from deebert.data.rows import reader, split_files
from deebert.data.rows.source import PLAIN, Table, blocks, largest_decoded, separator_hint
from deebert.data.tasks import HUB, MOST_GROUPS, WORD, Task
from deebert.errors import UserError, first_line

log = logging.getLogger(__name__)

Root = str | SplitFile | None  # the folder with the files of the splits, or one file
MISSING = object()  # the value of a column that a row lacks; null is a value
LARGEST_INT = 2**63
AT_ONCE = 256  # rows; more would outlive the garbage collector's first look at them
MOST_NAMED = 20  # columns that a message names


@dataclass(frozen=True)
class Raw:
    """The rows of a split as a source has them.

    Attributes:
        where: the source, for messages.
        names: all columns of the source.
        columns: the values of the task's columns; `MISSING` where a row has none.
        place: gives the place of a row, for messages.
    """

    where: str
    names: Sequence[str]
    columns: Mapping[str, list[Any]]
    place: Callable[[int], str]


def load(task: Task, split: str, root: Root) -> datasets.Dataset:
    """Read the rows of one split.

    Args:
        task: the task that names the columns and labels.
        split: the name of the split.
        root: the local folder (`data.root`), a file to split (`data.file`), or None for the task's
            own folder or the hub.

    Raises:
        UserError: the folder, the split or a column is missing, a row cannot be read, a text is no
            text, a label is unknown, or no row is left.
    """
    root = root or task.root
    if isinstance(root, SplitFile):
        return _part(task, split, root)
    if root is not None:
        files = _find(task, split, root)
        if files is None:
            raise _no_split(task, split, root)
        if files.others:
            log.warning(
                "%s: split %r is read from %s, and not from %s",
                flag_of(root), split, files.paths[0].name, ", ".join(files.others[:3]),
            )  # fmt: skip
        raw = _from_files(task, split, files.paths)
    elif task.hub is not None:
        raw = _from_dataset(_from_hub(task, split), task, "/".join(task.hub), split)
    elif task.name == "demo":
        if split not in demo.SPLIT_SIZES:
            raise _unknown_split(task, split, list(demo.SPLIT_SIZES))
        raw = _from_dataset(datasets.Dataset.from_list(demo.rows(split)), task, "demo", split)
    else:
        raise UserError(
            f"task {task.name}: no data; give data.file=the file of its rows, data.root=a "
            "folder, or hub: in its YAML"
        )
    return _normalise(raw, task, split)


def flag_of(root: Root) -> str:
    """Return the flag that names a source of rows, with its value, for messages."""
    if isinstance(root, SplitFile):
        return f"data.file={root.path}"
    return f"data.{'file' if isinstance(root, OwnFolder) else 'root'}={root}"


def file_rows(task: Task, file: SplitFile) -> datasets.Dataset:
    """Read all rows of a file that is split. They are read once.

    Raises:
        UserError: the file or a row cannot be read.
    """
    if file.rows is None:
        if not Path(file.path).is_file():
            raise UserError(f"data.file={file.path}: no such file; give its place (data.file=...)")
        raw = _from_files(task, str(task.train), [Path(file.path)])
        file.rows = _normalise(raw, task, str(task.train))
    return file.rows


def _part(task: Task, split: str, file: SplitFile) -> datasets.Dataset:
    """Return the rows of one split of a file."""
    names = _parts_of(task)
    if split not in names:
        raise UserError(
            f"data.file={file.path} has no split {split!r}; choose one of: {', '.join(names)} "
            "(split=...), or give a folder with a file for each split: data.root=DIR"
        )
    parts = file.parts(file_rows(task, file), by_label=not task.is_regression)
    return parts[names.index(split)]


def _parts_of(task: Task) -> list[str]:
    """Return the names of the splits that a file is split into."""
    return [name for name in (task.train, *task.validation[:1]) if name]


def exists(task: Task, split: str, root: Root) -> bool:
    """Say whether a local folder has this split. The hub and the demo have all splits of a task."""
    root = root or task.root
    if isinstance(root, SplitFile):
        return split in _parts_of(task)
    return root is None or _find(task, split, root) is not None


def find_files(task: Task, split: str, root: str) -> tuple[Path, ...]:
    """Find the file or the shards of a split.

    The files lie in DIR/<task>, in DIR/<GLUE's folder> or in DIR.

    Args:
        task: the task of the split.
        split: the name of the split.
        root: the local folder DIR.

    Returns:
        The files; none if the folder has none for this split.

    Raises:
        UserError: the folder does not exist, `split` is not a name, or shards are missing.
    """
    files = _find(task, split, root)
    return files.paths if files else ()


def _find(task: Task, split: str, root: str) -> split_files.Files | None:
    if not re.fullmatch(WORD, split):
        raise UserError(f"split={split} is no name of a split; choose from: {_splits(task)}")
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(
            f"data.root={root}: no such folder; it should hold {task.name}/<split>.parquet, "
            ".jsonl, .tsv or .csv (data.root=DIR)"
        )
    if isinstance(root, OwnFolder):
        return split_files.find((folder,), split_files.names_of(split))
    classic = (task.tsv or {}).get("folder", task.name)
    places = (folder / task.name, folder / classic, folder)
    return split_files.find(places, split_files.names_of(split))


def _wanted(task: Task) -> list[str]:
    """Return the columns that are read, where there are all of them."""
    return list(dict.fromkeys([*task.columns, *([task.group] if task.group else []), task.label]))


def _from_files(task: Task, split: str, files: Sequence[Path]) -> Raw:
    """Read the task's columns of all files.

    Raises:
        UserError: a file cannot be read, lacks a column, or has a row that cannot be read.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _wanted(task)}
    lines: list[int | None] = []
    starts: list[int] = []
    names: dict[str, None] = {}
    for file in files:
        kind, start = reader.ENDINGS[file.suffix.lower()], len(lines)
        starts.append(start)
        with reader.opened_file(file, kind, str(file), _table(task, kind)) as opened:
            in_file = _names_in_file(task, kind, opened.names)
            names |= dict.fromkeys(in_file)
            if in_file and not opened.is_empty:  # JSON has no columns if no row can be read
                _check_columns(task, split, str(file), list(in_file))
            pairs = [(column, in_file.get(name, name)) for name, column in columns.items()]
            most, size = largest_decoded(file.stat().st_size), 0
            for block in blocks(opened.rows({name for _, name in pairs}), AT_ONCE):
                size += sum(row.size for row in block)
                if bad := next((row for row in block if row.fault), None):
                    raise UserError(f"{file}, {bad.place}: {bad.fault}")
                if size > most:
                    raise UserError(f"{file}: its texts have more than {most:,} characters")
                lines += [row.line for row in block]
                for column, name in pairs:
                    column += [row.values.get(name, MISSING) for row in block]
            if classes := opened.classes.get(in_file.get(task.label, task.label)):
                given = columns[task.label]
                given[start:] = _named(given[start:], classes, str(file))

    def place(row: int) -> str:
        number = bisect_right(starts, row) - 1  # the last file that begins at or before the row
        line = lines[row]
        where = f"row {row - starts[number]}" if line is None else f"line {line}"
        return f"{files[number]}, {where}"

    return Raw(str(files[0]), list(names), columns, place)


def _table(task: Task, kind: str) -> Table:
    """Return how a file of a task is read if it is CSV or TSV."""
    classic = task.tsv or {}
    if kind == "tsv" and classic:  # GLUE's file of QQP has some broken rows
        header = classic.get("header")
        in_file = {classic.get(name, name) for name in task.columns} if header else ()
        return Table(tuple(header) if header else None, frozenset(in_file), leaves_out=True)
    if kind == "csv":
        return Table(label=task.label, is_label=labels.check_of(task))
    return PLAIN


def _names_in_file(task: Task, kind: str, names: Sequence[str]) -> dict[str, str]:
    """Return the columns of a file as the task calls them, with their names in the file.

    Some of GLUE's classic files have columns of both names with different contents (label in
    MNLI's files). The name that the task states for these files goes first.
    """
    classic = (task.tsv or {}) if kind == "tsv" else {}
    stated = {name: column for name, column in classic.items() if name not in ("folder", "header")}
    there = {name: column for name, column in stated.items() if column in names}
    return {name: name for name in names if name not in there.values()} | there


def _from_dataset(rows: datasets.Dataset, task: Task, where: str, split: str) -> Raw:
    """Take the task's columns of a data set in memory."""
    columns = {name: rows[name][:] for name in _wanted(task) if name in rows.column_names}
    feature = rows.features.get(task.label)
    if isinstance(feature, datasets.ClassLabel) and feature.names:
        columns[task.label] = _named(columns[task.label], feature.names, where)
    return Raw(where, rows.column_names, columns, lambda row: f"{where}, {split}, row {row}")


def _named(ids: Sequence[Any], names: Sequence[str], where: str) -> list[Any]:
    """Replace ids of classes by the names that the source itself has for them."""
    named = []
    for value in ids:
        if isinstance(value, int) and value >= len(names):
            raise UserError(f"{where}: it has the label {value}, and names for {len(names)} alone")
        named.append(names[value] if isinstance(value, int) and value >= 0 else value)
    return named


def _check_columns(task: Task, split: str, where: str, names: Sequence[str]) -> None:
    needed = _wanted(task)
    if split != task.train and split not in task.validation:
        needed.remove(task.label)
    for column in needed:
        if column not in names:
            raise UserError(
                f"{where}: split {split!r} lacks the column {column!r}; it has: "
                f"{', '.join(names[:MOST_NAMED])}{', ...' * (len(names) > MOST_NAMED)}"
                f"{separator_hint(names)} (task.columns, task.label)"
            )


def _is_reader(name: str) -> bool:
    return "/" not in name and find_spec(f"datasets.packaged_modules.{name}") is not None


def _from_hub(task: Task, split: str) -> datasets.Dataset:
    assert task.hub is not None
    # The library would also accept a local folder or the name of one of its own file readers.
    name = task.hub[0]
    if not re.fullmatch(HUB, name) or path.exists(name) or _is_reader(name):
        raise UserError(
            f"task {task.name}: hub={name} is no data set of the hub (task.hub; for a folder here "
            "data.root=DIR)"
        )
    try:
        return datasets.load_dataset(*task.hub, split=split)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = first_line(error)
        raise UserError(
            f"task {task.name}: cannot reach {'/'.join(task.hub)} on the hub ({reason}). Without a "
            "network use data.root=a local folder with the files, or task=demo; and backbone=minilm"
        ) from error
    except ValueError as error:  # "Unknown split ..." names the choices
        raise UserError(f"task {task.name}: {error} (split=...)") from error


def _splits(task: Task) -> str:
    return ", ".join(filter(None, (task.train, *task.validation, *task.test)))


def _no_split(task: Task, split: str, root: str) -> UserError:
    if isinstance(root, OwnFolder):
        return UserError(
            f"{flag_of(root)}: it holds no file {' or '.join(split_files.names_of(split))} "
            f"({', '.join(split_files.SUFFIXES)})"
        )
    places = sorted({*(path.stem for path in Path(root, task.name).glob("*.*"))})
    there = f"there: {', '.join(places)}" if places else f"{task.name}/ is empty or not there"
    return UserError(
        f"data.root={root}: no file for split {split!r} of task {task.name} ({there}; looked for "
        f"{task.name}/{split} and {split} with {', '.join(split_files.SUFFIXES)})"
    )


def _unknown_split(task: Task, split: str, choices: list[str]) -> UserError:
    return UserError(
        f"task {task.name} has no split {split!r}; choose one of: {', '.join(choices)} (split=...)"
    )


def _normalise(raw: Raw, task: Task, split: str) -> datasets.Dataset:
    """Rename and check the columns, map labels to ids, and drop unlabelled rows among labelled."""
    num_rows = len(raw.columns[task.columns[0]]) if task.columns[0] in raw.columns else 0
    if not raw.names or num_rows:
        _check_columns(task, split, raw.where, raw.names)
    if not num_rows:
        raise UserError(f"{raw.where}: split {split!r} is empty (data.root, split)")
    columns: dict[str, list[Any]] = {}
    for name, column in zip(("text_a", "text_b"), task.columns, strict=False):
        columns[name] = raw.columns[column]
        for row, text in enumerate(columns[name]):
            if fault := texts.fault(text):
                raise _cell_error(raw, column, row, fault)
    if task.group:
        columns["group"] = _groups(raw, task.group)
    columns["index"] = list(range(num_rows))
    values = raw.columns.get(task.label, [])
    if any(value is not MISSING for value in values):
        if MISSING in values:
            raise _cell_error(raw, task.label, values.index(MISSING), "")
        columns["label"] = labels.ids(values, task, raw.place)
    data = datasets.Dataset.from_dict(columns)
    if "label" not in columns:
        return data
    unlabelled = [label is None for label in columns["label"]]
    if all(unlabelled):
        if split == task.train:
            raise UserError(f"{raw.where}: no row of split {split!r} has a label (all are -1)")
        return data.remove_columns("label")
    if any(unlabelled):
        log.warning(
            "%s: %d rows of split %r have no label (-1): left out",
            raw.where, sum(unlabelled), split,
        )  # fmt: skip
        data = data.select([row for row, missing in enumerate(unlabelled) if not missing])
    return data


def _groups(raw: Raw, column: str) -> list[int]:
    """Return the values of the column of groups."""
    groups = []
    for row, value in enumerate(raw.columns[column]):
        number = labels.whole(value)
        if number is None or abs(number) >= LARGEST_INT:
            given = "null" if value is None else texts.short(value)
            raise _cell_error(raw, column, row, f"is {given}, not a whole number (task.group)")
        groups.append(number)
    if len(set(groups)) > MOST_GROUPS:
        raise UserError(
            f"{raw.where}: column {column!r} holds more than {MOST_GROUPS} groups (task.group)"
        )
    return groups


def _cell_error(raw: Raw, column: str, row: int, fault: str) -> UserError:
    """Return the error for a cell. A row that lacks the cell has that fault instead."""
    if raw.columns[column][row] is MISSING:
        return UserError(f"{raw.place(row)}: it has no {column!r}")
    return UserError(f"{raw.place(row)}: its {column!r} {fault}")
