"""Make a task from a user's own file: find its columns of texts and labels, and the labels.

The rule: a column that is called `label` (or `labels`, `class`, `category`, `target`) is the label,
and one called `text` or `sentence` is the text. Without such a name, the label is the only column
with few values that repeat, and the text the only column of several words a row. Where two columns
fit, nothing is guessed: one line names them. The module does not know tokens or models.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deebert.data import labels
from deebert.data.rows import reader, split_files
from deebert.data.rows.source import Source, separator_hint
from deebert.data.tasks import MOST_LABELS
from deebert.data.texts import short
from deebert.errors import UserError, is_number

LABEL_NAMES = ("label", "labels", "class", "category", "target")
TEXT_NAMES = ("text", "sentence")
LABELS_BY_LOOKS = 100  # more values than this are no labels unless the user names the column
MOST_NUMBERS = 20  # more different numbers than this may be a regression: the user must say
MOST_NAMED = 20  # columns that a message names
LONGEST_LABEL = 200  # characters
LONGEST_VALUE = 1000  # characters of a value that are looked at
# A letter, a space and a letter; scripts that write no spaces have letters outside ASCII.
WORDS = re.compile(r"[^\W\d_]\S*\s(.*\s)?\S*[^\W\d_]", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """What the user says of the columns of a file: `data.text`, `data.label`, `data.regression`.

    Attributes:
        text: the name of the text column, or a list of two; None to find it.
        label: the name of the label column; None to find it.
        regression: true for numbers, false for classes; None for classes, where numbers that look
            like measurements are refused.
    """

    text: Any = None
    label: Any = None
    regression: Any = None

    def __post_init__(self) -> None:
        listed = self.text if isinstance(self.text, list) else [self.text or ""]
        if not 1 <= len(listed) <= 2 or not all(isinstance(name, str) for name in listed):
            raise UserError(
                f"data.text={self.text} must name a column, or a list of two: data.text=[a,b]"
            )
        if self.label is not None and not isinstance(self.label, str):
            raise UserError(f"data.label={self.label} must name a column")
        if self.regression not in (None, True, False) or is_number(self.regression):
            raise UserError(f"data.regression={self.regression} must be true or false")

    @property
    def texts(self) -> list[str]:
        """The text columns that the user has named."""
        return [self.text] if isinstance(self.text, str) else list(self.text or ())


@dataclass
class Column:
    """What is known of a column after all rows have been read.

    Attributes:
        name: its name.
        num_rows: the rows that have a value.
        num_texts: the rows with several words.
        values: its different values, by how labels are compared; more than the limit are cut off.
    """

    name: str
    num_rows: int = 0
    num_texts: int = 0
    values: dict[Any, Any] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """Take the value of a row into account."""
        if value is None or value == "" or value != value:  # NaN
            return  # refused by its line when the rows are read as those of the task
        self.num_rows += 1
        if isinstance(value, str):
            value = value[:LONGEST_VALUE]
            self.num_texts += bool(WORDS.search(value) or not value.isascii())
        if len(self.values) <= MOST_LABELS:
            key = labels.key_of(value)
            known = self.values.setdefault(key, value)
            if labels.name_of(value) < labels.name_of(known):  # "2" and "2.0" are one label
                self.values[key] = value

    @property
    def repeats(self) -> bool:
        """Whether there are at least two different values, and each has two rows on average."""
        return 2 <= len(self.values) <= self.num_rows / 2

    @property
    def is_label(self) -> bool:
        """Whether it looks like a column of labels."""
        return self.repeats and len(self.values) <= LABELS_BY_LOOKS

    @property
    def is_text(self) -> bool:
        """Whether it looks like a column of texts."""
        return not self.is_label and self.num_texts > self.num_rows / 2

    @property
    def is_number(self) -> bool:
        """Whether all its values are numbers."""
        return bool(self.values) and all(labels.is_numeric(value) for value in self.values.values())


def task_values(
    given: str, columns: Columns, label_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the plain values of the task of a file, or of a folder with a file for each split.

    Args:
        given: the file or folder (`data.file`).
        columns: what the user says of its columns.
        label_names: the names of the classes, if a model has them already; None to take them from
            the rows.

    Raises:
        UserError: it cannot be read, or its columns or labels cannot be told.
    """
    where, path = f"data.file={given}", Path(given)
    if not path.exists():
        raise UserError(f"{where}: no such file or folder")
    files, splits = _files_in(path, where) if path.is_dir() else ((path,), {"test": []})
    texts, label, stated = _read(files, columns, where)
    if columns.regression:
        classes = None
    elif label_names:
        classes = _as_written(label_names, label)
    else:
        classes = list(stated or _classes(label, columns, where))
    if classes is None:
        metrics = ["spearman", "pearson"]
    else:
        # Matthews' correlation is the same whichever of the two labels counts as the positive one.
        metrics = ["accuracy", "matthews"] if len(classes) == 2 else ["accuracy"]
    for name in (*texts, label.name, *(classes or ())):
        if name == "???" or len(name) > LONGEST_LABEL:
            raise UserError(f"{where}: {short(name)} can be no name of a column or label")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.stem if path.is_file() else path.resolve().name)
    return {
        "name": name.strip("_.-")[:100] or "file",
        "columns": texts,
        "label": label.name,
        "labels": classes,
        "metrics": metrics,
        **splits,
    }


def _files_in(folder: Path, where: str) -> tuple[tuple[Path, ...], dict[str, Any]]:
    """Return the training files of a folder, and its test splits."""
    files = {}
    for split in ("train", "validation", "test"):
        files[split] = split_files.find((folder,), split_files.names_of(split))
        if files[split] is None and split != "test":
            endings = ", ".join(split_files.SUFFIXES)
            raise UserError(
                f"{where}: it holds no file {' or '.join(split_files.names_of(split))} "
                f"({endings}); give such a file, or one file alone, which is split: data.file=FILE"
            )
    assert files["train"] is not None
    return files["train"].paths, {"test": ["test"] if files["test"] else []}


def _read(
    files: Sequence[Path], columns: Columns, where: str
) -> tuple[list[str], Column, tuple[str, ...] | None]:
    """Read the rows, and find the columns.

    Returns:
        The text columns, the label column, and the classes that the file itself states.
    """
    seen: dict[str, Column] = {}
    classes: dict[str, tuple[str, ...]] = {}
    for file in files:
        kind = reader.ENDINGS.get(file.suffix.lower())
        if kind is None:
            endings = ", ".join(reader.ENDINGS)
            raise UserError(f"{where}: its ending is none of {endings}; rename it (data.file=...)")
        with reader.opened_file(file, kind, str(file)) as source:
            _check_named(source, columns, where)
            wanted = _wanted(source, columns)
            classes |= source.classes
            for name in wanted:
                seen.setdefault(name, Column(name))
            for row in source.rows(wanted):
                if row.fault:
                    raise UserError(f"{file}, {row.place}: {row.fault}")
                for name in wanted:
                    seen[name].add(row.values.get(name))
            names = list(source.names)
    if not any(column.num_rows for column in seen.values()):
        raise UserError(f"{where}: it holds no rows")
    label = seen[columns.label] if columns.label else _label(seen, names, columns, where)
    texts = columns.texts or [_text(seen, names, label.name, where)]
    if label.name in texts:
        raise UserError(f"data.label={label.name} is one of the texts (data.text)")
    return texts, label, classes.get(label.name)


def _wanted(source: Source, columns: Columns) -> list[str]:
    """Return the columns that are read: the named ones are enough where both are named."""
    if columns.label and columns.texts:
        return [columns.label]
    return list(source.names)


def _check_named(source: Source, columns: Columns, where: str) -> None:
    flags = [("data.label", columns.label), *(("data.text", name) for name in columns.texts)]
    for flag, name in flags:
        if name is not None and name not in source.names:
            raise UserError(f"{flag}={name}: {where} has no such column{_listed(source.names)}")


def _listed(names: Sequence[str]) -> str:
    more = ", ..." * (len(names) > MOST_NAMED)
    return f"; it has: {', '.join(names[:MOST_NAMED])}{more}{separator_hint(names)}"


def _label(seen: dict[str, Column], names: list[str], columns: Columns, where: str) -> Column:
    """Return the only column that may be the label."""
    others = [column for name, column in seen.items() if name not in columns.texts]
    fitting = [column for column in others if column.name.lower() in LABEL_NAMES]
    kind = "a label (values that repeat)"
    if columns.regression:
        kind = "the numbers of a regression"
        fitting = fitting or [column for column in others if column.is_number]
    fitting = fitting or [column for column in others if column.is_label]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        listed = ", ".join(column.name for column in fitting)
        raise UserError(
            f"{where}: several columns may be the label: {listed}; name one: "
            f"data.label={fitting[0].name}"
        )
    raise UserError(f"{where}: no column looks like {kind}: data.label=COLUMN{_listed(names)}")


def _text(seen: dict[str, Column], names: list[str], label: str, where: str) -> str:
    """Return the name of the only column that may be the text."""
    others = [column for name, column in seen.items() if name != label]
    fitting = [column for column in others if column.name.lower() in TEXT_NAMES]
    fitting = fitting or [column for column in others if column.is_text]
    if len(fitting) == 1:
        return fitting[0].name
    if fitting:
        listed = [column.name for column in fitting]
        raise UserError(
            f"{where}: several columns may be the text: {', '.join(listed)}; name one, or two for "
            f"pairs: data.text={listed[0]} or 'data.text=[{','.join(listed[:2])}]'"
        )
    raise UserError(f"{where}: no column looks like texts: data.text=COLUMN{_listed(names)}")


def _as_written(names: Sequence[str], label: Column) -> list[str]:
    """Return the names of a model's classes, as the rows write them: Positive for POSITIVE."""
    written = {labels.plain(labels.name_of(value)): value for value in label.values.values()}
    if len({*map(labels.plain, names)}) < len(names):
        return list(names)
    return [labels.name_of(written.get(labels.plain(name), name)) for name in names]


def _classes(label: Column, columns: Columns, where: str) -> list[str]:
    """Return the names of the classes, in a stable order.

    Raises:
        UserError: the values are none of classes.
    """
    what, number = f"{where}: column {label.name!r}", len(label.values)
    more = "more than " * (number > MOST_LABELS)
    if columns.regression is None and label.is_number and number > MOST_NUMBERS:
        some = ", ".join(labels.name_of(value) for value in list(label.values.values())[:3])
        raise UserError(
            f"{what} has {more}{min(number, MOST_LABELS)} different numbers ({some}, ...): say "
            "data.regression=true to predict the number, or data.regression=false for one class "
            "for each"
        )
    if number < 2:
        raise UserError(
            f"{what} has {'one value alone' if number else 'no values'}, and two or more labels "
            "are needed (data.label=...)"
        )
    if number > MOST_LABELS or not label.repeats:
        raise UserError(
            f"{what} has {more}{min(number, MOST_LABELS)} different values in {label.num_rows:,} "
            f"rows, which are no labels (data.label=...; {MOST_LABELS} labels at most)"
        )
    return labels.in_order(label.values.values())
