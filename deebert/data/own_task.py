"""Make a task from a user's own file: find its columns of texts and labels, and the labels.

The rule: the label is the only column that is called `label` (or `labels`, `class`, `category`,
`target`) or has few values that repeat. The text is the only other column that is called `text` or
`sentence` or has several words a row. Where two columns fit, nothing is guessed: one line names
them. The module does not know tokens or models.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deebert.data import labels, metrics
from deebert.data.rows import reader, split_files
from deebert.data.rows.source import Source, separator_hint
from deebert.data.tasks import MOST_LABELS
from deebert.data.texts import short
from deebert.errors import UserError, is_number

log = logging.getLogger(__name__)

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
    """The columns of a file as the user names them: `data.text`, `data.label` and the like.

    Attributes:
        text: the name of the text column, or a list of two; None to find it.
        label: the name of the label column; None to find it.
        regression: true for numbers, false for classes; None for classes, where numbers that look
            like measurements are refused.
        metric: the name of the metric that is the score; None for the accuracy, or for a
            regression the rank correlation.
    """

    text: Any = None
    label: Any = None
    regression: Any = None
    metric: Any = None

    def __post_init__(self) -> None:
        listed = self.text if isinstance(self.text, list) else [self.text or ""]
        if not 1 <= len(listed) <= 2 or not all(isinstance(name, str) for name in listed):
            raise UserError(
                f"data.text={self.text} must name a column, or a list of two: data.text=[a,b]"
            )
        if self.label is not None and not isinstance(self.label, str):
            raise UserError(f"data.label={self.label} must name a column")
        if len({*listed}) < len(listed):
            raise UserError(f"data.text=[{','.join(listed)}] names a column twice; give two")
        if self.regression not in (None, True, False) or is_number(self.regression):
            raise UserError(f"data.regression={self.regression} must be true or false")

    @property
    def texts(self) -> list[str]:
        """The text columns that the user has named."""
        return [self.text] if isinstance(self.text, str) else list(self.text or ())


@dataclass
class Column:
    """The known facts of a column after all rows have been read.

    Attributes:
        name: its name.
        num_rows: the rows that have a value.
        num_texts: the rows with several words.
        values: its different values, by how labels are compared; more than the limit are cut off.
        has_nested: whether a value is a list or an object, as JSON and Parquet may have them.
    """

    name: str
    num_rows: int = 0
    num_texts: int = 0
    values: dict[Any, Any] = field(default_factory=dict)
    has_nested: bool = False

    def add(self, value: Any) -> None:
        """Take the value of a row into account."""
        if isinstance(value, str):
            value = value.strip()
        elif isinstance(value, list | tuple | dict):
            self.has_nested = True
            return
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
        return self.repeats and len(self.values) <= LABELS_BY_LOOKS and not self.has_nested

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
        _check_numbers(label_names, stated, label, where)
        classes = _as_written(label_names, stated or label.values.values())
    else:
        classes = list(stated or _classes(label, columns, where))
    for name in (*texts, label.name, *(classes or ())):
        if name == "???" or len(name) > LONGEST_LABEL:
            raise UserError(f"{where}: {short(name)} can be no name of a column or label")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.stem if path.is_file() else path.resolve().name)
    return {
        "name": name.strip("_.-")[:100] or "file",
        "columns": texts,
        "label": label.name,
        "labels": classes,
        "metrics": _metrics(classes, columns.metric),
        **splits,
    }


def _metrics(classes: Sequence[str] | None, first: Any) -> list[str]:
    """Return the metrics of a task, the headline metric first.

    Raises:
        UserError: the metric that the user names is none, or does not fit the labels.
    """
    if classes is None:
        usual = ["spearman", "pearson"]
    else:
        # Matthews' correlation is the same whichever of the two labels counts as the positive one.
        usual = ["accuracy", "matthews"] if len(classes) == 2 else ["accuracy"]
    if first is None:
        return usual
    choices = metrics.fitting(None if classes is None else len(classes))
    if first not in choices:
        what = "numbers" if classes is None else f"{len(classes)} labels"
        raise UserError(
            f"data.metric={first} is no score of {what}; choose one of: {', '.join(choices)}"
        )
    return [first, *(name for name in usual if name != first)]


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
    has_header = False
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
        has_header = has_header or kind in ("csv", "tsv")
    if not any(column.num_rows or column.has_nested for column in seen.values()):
        raise UserError(f"{where}: it holds no rows")
    label = seen[columns.label] if columns.label else _label(seen, names, columns, where)
    texts = columns.texts or [_text(seen, names, label.name, where)]
    if label.name in texts:
        raise UserError(f"data.label={label.name} is one of the texts (data.text)")
    if label.has_nested:
        raise UserError(
            f"{where}: column {label.name!r} holds lists or objects, and a label is a text, a "
            "number, true or false (data.label=...)"
        )
    if has_header and labels.key_of(label.name.strip()) in label.values:
        raise UserError(
            f"{where}: its first line calls a column {label.name!r}, which is also a label in it: "
            "has it no line of column names? Put one on top, or give that column another name "
            "(data.file=...)"
        )
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
    others = [column for column in others if column.name.lower() not in TEXT_NAMES]
    fitting = [column for column in others if column.name.lower() in LABEL_NAMES]
    kind = "a label (values that repeat)"
    if columns.regression:
        kind = "the numbers of a regression"
        fitting = fitting or [column for column in others if column.is_number]
    elif [column.name.lower() for column in fitting] not in (["label"], ["labels"]):
        # A column of that name is the label, whatever stands beside it.
        fitting += [column for column in others if column.is_label and column not in fitting]
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
    fitting += [column for column in others if column.is_text and column not in fitting]
    if len(fitting) == 1:
        return fitting[0].name
    if fitting:
        listed = [column.name for column in fitting]
        raise UserError(
            f"{where}: several columns may be the text: {', '.join(listed)}; name one, or two for "
            f"pairs: data.text={listed[0]} or 'data.text=[{','.join(listed[:2])}]'"
        )
    raise UserError(f"{where}: no column looks like texts: data.text=COLUMN{_listed(names)}")


def _check_numbers(
    names: Sequence[str], stated: Sequence[str] | None, label: Column, where: str
) -> None:
    """Refuse numbers for a model's classes unless they are all of its ids, from 0.

    Raises:
        UserError: they are others, so nothing says which number is which class.
    """
    if stated or not label.is_number or any(map(labels.is_numeric, names)):
        return
    ids = labels.in_order(label.values.values())
    if ids != [str(number) for number in range(len(names))]:
        raise UserError(
            f"{where}: column {label.name!r} has {_some(ids)}, and the model's labels are "
            f"{_some(names)}: write these names into the column, or 0 to {len(names) - 1} in this "
            "order (data.label=...)"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + ", ..." * (len(names) > MOST_NAMED)


def _as_written(names: Sequence[str], values: Iterable[Any]) -> list[str]:
    """Return the names of a model's classes, as the rows write them: Positive for POSITIVE."""
    written = {labels.plain(labels.name_of(value)): value for value in values}
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
    are_whole = all(labels.whole(value) is not None for value in label.values.values())
    if columns.regression is None and label.is_number and (number > MOST_NUMBERS or not are_whole):
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
    classes = labels.in_order(label.values.values())
    by_case = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if by_case[name.casefold()] > 1]:
        log.warning(
            "%s has labels that differ only in case, and each is a class of its own: %s",
            what, ascii(_some(alike))[1:-1],
        )  # fmt: skip
    return classes
