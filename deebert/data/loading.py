"""Read the rows of a split from the hub, from a local folder or from the demo task.

A local file is parquet, JSON lines, TSV or CSV. Every split gets the same columns: `text_a`,
`text_b` (pairs only), `label` (if the split has labels), `group` (if the task has one) and `index`.
The module does not know tokens or models.
"""

import csv
import logging
import math
import re
import warnings
from importlib.util import find_spec
from os import path
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from deebert.data import demo
from deebert.data.tasks import HUB, MOST_GROUPS, WORD, Task
from deebert.errors import UserError, first_line

log = logging.getLogger(__name__)

FORMATS = ("parquet", "jsonl", "json", "tsv", "csv")  # in the order in which they are looked for


def load(task: Task, split: str, root: str | None) -> datasets.Dataset:
    """Read the rows of one split.

    Args:
        task: the task that names the columns and labels.
        split: the name of the split.
        root: the local folder (`data.root`), or None for the task's own folder or the hub.

    Raises:
        UserError: the folder, the split or a column is missing, a text is null, a label is unknown,
            or no row is left.
    """
    root = root or task.root
    if root is not None:
        files = find_files(task, split, root)
        if not files:
            raise _no_split(task, split, root)
        raw, where = _read(task, files), str(files[0])
    elif task.hub is not None:
        raw, where = _from_hub(task, split), "/".join(task.hub)
    elif task.name == "demo":
        if split not in demo.SPLIT_SIZES:
            raise _unknown_split(task, split, list(demo.SPLIT_SIZES))
        raw, where = datasets.Dataset.from_list(demo.rows(split)), "demo"
    else:
        raise UserError(f"task {task.name}: no data; give data.root=a folder, or hub: in its YAML")
    return _normalise(raw, task, split, where)


def exists(task: Task, split: str, root: str | None) -> bool:
    """Say whether a local folder has this split. The hub and the demo have all splits of a task."""
    root = root or task.root
    return root is None or bool(find_files(task, split, root))


def find_files(task: Task, split: str, root: str) -> list[Path]:
    """Find the file or the shards of a split.

    The files lie in DIR/<task>, in DIR/<GLUE's folder> or in DIR.

    Args:
        task: the task of the split.
        split: the name of the split.
        root: the local folder DIR.

    Returns:
        The files, or an empty list if the folder has none for this split.

    Raises:
        UserError: the folder does not exist, or `split` is not a name.
    """
    if not re.fullmatch(WORD, split):
        raise UserError(f"split={split} is no name of a split; choose from: {_splits(task)}")
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(
            f"data.root={root}: no such folder; it should hold {task.name}/<split>.parquet, "
            ".jsonl, .tsv or .csv (data.root=DIR)"
        )
    classic = (task.tsv or {}).get("folder", task.name)
    names = [split, split.replace("validation", "dev")]
    for place in (folder / task.name, folder / classic, folder):
        for file_format in FORMATS:
            for name in names:
                # The files of the hub are called train-00000-of-00001.parquet.
                for pattern in (f"{name}.{file_format}", f"{name}-*-of-*.{file_format}"):
                    if files := sorted(place.glob(pattern)):
                        return files
    return []


def _read(task: Task, files: list[Path]) -> datasets.Dataset:
    file_format = files[0].suffix[1:]
    try:
        if file_format in ("tsv", "csv"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)
                table = pd.concat([_read_text(task, file) for file in files])
            data = datasets.Dataset.from_pandas(table, preserve_index=False)
        else:
            data = datasets.load_dataset(
                "parquet" if file_format == "parquet" else "json",
                data_files=[str(path) for path in files],
                split="train",
            )
    except Exception as error:  # datasets wraps pyarrow's and pandas' errors in its own
        cause = error.__cause__ or error
        reason = first_line(cause)
        raise UserError(f"{files[0]}: cannot be read as {file_format} ({reason})") from error
    if file_format == "tsv" and task.tsv:
        new_names = {
            column: name for name, column in task.tsv.items() if name not in ("folder", "header")
        }
        renamed = {column: new_names[column] for column in new_names if column in data.column_names}
        if renamed:
            # Some files have columns of both names with different contents (label in MNLI's files).
            clashing = [name for name in renamed.values() if name in data.column_names]
            data = data.remove_columns(clashing).rename_columns(renamed)
    return data


def _read_text(task: Task, file: Path) -> pd.DataFrame:
    """Read TSV or CSV. Every cell is a text: "NA" and "null" are words, and "007" is no number."""
    cells: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_filter": False}
    # Without index_col, pandas would silently shift the columns of a line with a field too many.
    cells |= {"index_col": False, "encoding": "utf-8-sig"}
    if file.suffix == ".csv":
        return pd.read_csv(file, **cells)
    if header := (task.tsv or {}).get("header"):
        cells |= {"names": list(header), "header": None}
    # GLUE's classic files have no quotes around a cell. A single " is part of a sentence.
    return pd.read_csv(file, sep="\t", quoting=csv.QUOTE_NONE, **cells)


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
    places = sorted({*(path.stem for path in Path(root, task.name).glob("*.*"))})
    there = f"there: {', '.join(places)}" if places else f"{task.name}/ is empty or not there"
    return UserError(
        f"data.root={root}: no file for split {split!r} of task {task.name} ({there}; looked for "
        f"{task.name}/{split} and {split} with .{', .'.join(FORMATS)})"
    )


def _unknown_split(task: Task, split: str, choices: list[str]) -> UserError:
    return UserError(
        f"task {task.name} has no split {split!r}; choose one of: {', '.join(choices)} (split=...)"
    )


def _normalise(raw: datasets.Dataset, task: Task, split: str, where: str) -> datasets.Dataset:
    """Rename and check the columns, map labels to ids, and drop unlabelled rows among labelled.

    Args:
        raw: the rows as they were read.
        task: the task that names the columns.
        split: the name of the split.
        where: the source of the rows, for messages.
    """
    needed = [*task.columns, *([task.group] if task.group else [])]
    if split == task.train or split in task.validation:
        needed.append(task.label)
    for column in needed:
        if column not in raw.column_names:
            raise UserError(
                f"{where}: split {split!r} lacks the column {column!r}; it has: "
                f"{', '.join(raw.column_names)} (task.columns, task.label)"
            )
    if not len(raw):
        raise UserError(f"{where}: split {split!r} is empty (data.root, split)")
    columns: dict[str, list[Any]] = {}
    for name, column in zip(("text_a", "text_b"), task.columns, strict=False):
        texts = raw[column][:]
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(
                    f"{where}: split {split!r}, row {row}: {column!r} is {text!r}, not a text"
                )
        columns[name] = texts
    if task.group:
        try:
            columns["group"] = [int(value) for value in raw[task.group][:]]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: column {task.group!r} must hold whole numbers ({error})"
            ) from None
        if len(set(columns["group"])) > MOST_GROUPS:
            raise UserError(
                f"{where}: column {task.group!r} holds more than {MOST_GROUPS} groups (task.group)"
            )
    columns["index"] = list(range(len(raw)))
    if task.label in raw.column_names:
        columns["label"] = _labels(raw[task.label][:], task, split, where)
    data = datasets.Dataset.from_dict(columns)
    if "label" not in columns:
        return data
    unlabelled = [label is None for label in columns["label"]]
    if all(unlabelled):
        if split == task.train:
            raise UserError(f"{where}: no row of split {split!r} has a label (all are -1)")
        return data.remove_columns("label")
    if any(unlabelled):
        log.warning(
            "%s: %d rows of split %r have no label (-1): left out", where, sum(unlabelled), split
        )
        data = data.select([row for row, missing in enumerate(unlabelled) if not missing])
    return data


def _labels(values: list[Any], task: Task, split: str, where: str) -> list[Any]:
    """Return labels as ids, or as floats for a regression. None stands for no label (-1).

    A label may be the name or the id of a class.
    """

    def invalid(row: int, value: Any, choices: str) -> UserError:
        return UserError(
            f"{where}: split {split!r}, row {row}: label {value!r} is out of range; {choices}"
        )

    labels: list[Any] = []
    if task.labels is None:
        for row, value in enumerate(values):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise invalid(row, value, f"task {task.name} is a regression and needs a number")
            labels.append(number)
        # GLUE hides the values of a test set: all of them are -1. Among others, -1 is a value.
        return [None] * len(labels) if set(labels) == {-1.0} else labels
    ids: dict[Any, int | None] = {-1: None, "-1": None, "-": None}  # MNLI has "-" for no label
    if any(map(_is_whole, task.labels)):  # names such as "1" to "5": a number is a name, no id
        ids |= {int(name): i for i, name in enumerate(task.labels) if _is_whole(name)}
    else:
        ids |= {key: i for i in range(len(task.labels)) for key in (i, str(i))}
    ids |= {name: i for i, name in enumerate(task.labels)}
    for row, value in enumerate(values):
        key = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(key, str) and key not in ids and key.endswith(".0"):
            key = key[:-2]  # pandas writes a column of ids with a missing value as floats
        if not isinstance(key, int | str) or key not in ids:
            names = ", ".join(f"{i} {name}" for i, name in enumerate(task.labels))
            raise invalid(row, value, f"task {task.name} has: {names} (task.labels)")
        labels.append(ids[key])
    return labels


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdigit()
