"""Where rows come from: the hub, a local folder (parquet, JSON lines, TSV, CSV) or the demo.

Gives every split the same columns: `text_a`, `text_b` (pairs only), `label` (absent where the split
carries none), `group` (where the task has one) and `index`. Knows nothing of tokens or models.
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
from deebert.data.tasks import HUB, WORD, Task
from deebert.errors import UserError, first_line
from deebert.hub.record_files import MOST_GROUPS

log = logging.getLogger(__name__)

ENDINGS = ("parquet", "jsonl", "json", "tsv", "csv")  # in the order in which they are tried


def load(task: Task, split: str, root: str | None) -> datasets.Dataset:
    """The rows of one split.

    Args:
        root: the local folder (`data.root`), or None for the task's own root or the hub.

    Raises:
        UserError: the folder, split or a column is missing, a text is null, a label is unknown, or
            no row is left.
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
    """Whether a local folder has this split (the hub and the demo have all that the task names)."""
    root = root or task.root
    return root is None or bool(find_files(task, split, root))


def find_files(task: Task, split: str, root: str) -> list[Path]:
    """The file (or the hub's shards) of a split under DIR/<task>, DIR/<GLUE's folder> or DIR.

    Raises:
        UserError: the folder itself is missing.
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
        for ending in ENDINGS:
            for name in names:
                # The hub's own files are called train-00000-of-00001.parquet.
                for pattern in (f"{name}.{ending}", f"{name}-*-of-*.{ending}"):
                    if files := sorted(place.glob(pattern)):
                        return files
    return []


def _read(task: Task, files: list[Path]) -> datasets.Dataset:
    ending = files[0].suffix[1:]
    try:
        if ending in ("tsv", "csv"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)
                table = pd.concat([_read_text(task, file) for file in files])
            data = datasets.Dataset.from_pandas(table, preserve_index=False)
        else:
            data = datasets.load_dataset(
                "parquet" if ending == "parquet" else "json",
                data_files=[str(path) for path in files],
                split="train",
            )
    except Exception as error:  # datasets wraps pyarrow's and pandas' errors in its own
        cause = error.__cause__ or error
        reason = first_line(cause)
        raise UserError(f"{files[0]}: cannot be read as {ending} ({reason})") from error
    if ending == "tsv" and task.tsv:
        renamed = {
            theirs: ours for ours, theirs in task.tsv.items() if ours not in ("folder", "header")
        }
        ours = [theirs for theirs in renamed if theirs in data.column_names]
        if ours:
            # Some files carry both names for different things (MNLI's sentence1, label1..5, label).
            clash = [renamed[theirs] for theirs in ours if renamed[theirs] in data.column_names]
            data = data.remove_columns(clash).rename_columns({t: renamed[t] for t in ours})
    return data


def _read_text(task: Task, file: Path) -> pd.DataFrame:
    """TSV or CSV, every cell as it stands: "NA" and "null" are words, "007" is no number."""
    cells: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_filter": False}
    # Without index_col a line of one field too many would shift all columns in silence.
    cells |= {"index_col": False, "encoding": "utf-8-sig"}
    if file.suffix == ".csv":
        return pd.read_csv(file, **cells)
    if header := (task.tsv or {}).get("header"):
        cells |= {"names": list(header), "header": None}
    # GLUE's classic files quote nothing: a lone " is part of a sentence.
    return pd.read_csv(file, sep="\t", quoting=csv.QUOTE_NONE, **cells)


def _is_reader(name: str) -> bool:
    return "/" not in name and find_spec(f"datasets.packaged_modules.{name}") is not None


def _from_hub(task: Task, split: str) -> datasets.Dataset:
    assert task.hub is not None
    # The library would take a folder here, or one of its own readers, for a data set of the hub.
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
        f"{task.name}/{split} and {split} with .{', .'.join(ENDINGS)})"
    )


def _unknown_split(task: Task, split: str, choices: list[str]) -> UserError:
    return UserError(
        f"task {task.name} has no split {split!r}; choose one of: {', '.join(choices)} (split=...)"
    )


def _normalise(raw: datasets.Dataset, task: Task, split: str, where: str) -> datasets.Dataset:
    """Rename and check the columns, map labels to ids, and drop unlabelled rows among labelled."""
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
    """Labels as ids (names and digits are both accepted) or floats; None for unlabelled (-1)."""

    def bad(row: int, value: Any, choices: str) -> UserError:
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
                raise bad(row, value, f"task {task.name} is a regression and needs a number")
            labels.append(number)
        # Alone among other values -1 is a value; all of them -1 is GLUE's way to hide a test set.
        return [None] * len(labels) if set(labels) == {-1.0} else labels
    ids: dict[Any, int | None] = {-1: None, "-1": None, "-": None}  # "-": MNLI's undecided rows
    if any(map(_is_whole, task.labels)):  # star ratings: names only
        ids |= {int(name): i for i, name in enumerate(task.labels) if _is_whole(name)}
    else:
        ids |= {key: i for i in range(len(task.labels)) for key in (i, str(i))}
    ids |= {name: i for i, name in enumerate(task.labels)}
    for row, value in enumerate(values):
        key = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(key, str) and key not in ids and key.endswith(".0"):
            key = key[:-2]  # what pandas makes of a column of ids with a gap
        if not isinstance(key, int | str) or key not in ids:
            names = ", ".join(f"{i} {name}" for i, name in enumerate(task.labels))
            raise bad(row, value, f"task {task.name} has: {names} (task.labels)")
        labels.append(ids[key])
    return labels


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdigit()
