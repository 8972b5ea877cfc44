"""Read the values of a label column as ids of classes, or as the numbers of a regression.

A label is the name of a class before it is an id, and names are compared by value: 2, "2" and "2.0"
are the same number, and JSON's true is the class "true". The module does not know files.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from deebert.data.tasks import Task
from deebert.data.texts import short
from deebert.errors import UserError

NO_LABEL = -1  # what GLUE writes where a label is hidden; MNLI has "-", too
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
LONGEST_NUMBER = 40  # characters


def ids(values: Sequence[Any], task: Task, where: Callable[[int], str]) -> list[Any]:
    """Return labels as ids, or as floats for a regression. None stands for no label (-1).

    Args:
        values: the values of the column.
        task: the task that names the classes.
        where: gives the place of a row for messages.

    Raises:
        UserError: a value is no label of the task.
    """
    return _numbers(values, task, where) if task.labels is None else _ids(values, task, where)


def check_of(task: Task) -> Callable[[Any], bool]:
    """Return a function that says whether a value may be a label of a task."""
    classes = None if task.labels is None else Classes(task)

    def is_label(value: Any) -> bool:
        if value == "-":
            return False  # a text may have it, too
        if classes is None:
            return math.isfinite(_number(value))
        try:
            classes.id_of(value)
        except LookupError:
            return False
        return True

    return is_label


def key_of(value: Any) -> Any:
    """Return what two values of the same class have in common; a value that is none has its own."""
    meant = _value(value)
    return (str, name_of(value)) if meant is None else (type(meant), meant)


def name_of(value: Any) -> str:
    """Return the name of the class that a value stands for."""
    if isinstance(value, bool):
        return str(value).lower()
    number = value if isinstance(value, Decimal | float) else None
    is_whole = number is not None and math.isfinite(number) and number == int(number)
    return str(int(number)) if number is not None and is_whole else str(value)


def is_numeric(value: Any) -> bool:
    """Say whether a value is a number, or a text that is one."""
    return isinstance(_value(value), Decimal)


def in_order(values: Iterable[Any]) -> list[str]:
    """Return the names of classes in a stable order: numbers by value, all others as texts.

    Args:
        values: one value of each class.
    """
    classes = list(values)
    numbers = [(number, value) for value in classes if isinstance(number := _value(value), Decimal)]
    if len(numbers) == len(classes):
        return [name_of(value) for _, value in sorted(numbers, key=lambda pair: pair[0])]
    return sorted(map(name_of, classes))


def plain(label: str) -> str:
    """Return a label in lower case, with one underscore for each run of separators."""
    return re.sub(r"[\s_-]+", "_", label.strip().casefold())


def whole(value: Any) -> int | None:
    """Return the whole number that a value is or stands for; None if it is none."""
    number = _value(value)
    if not isinstance(number, Decimal) or number.adjusted() > LONGEST_NUMBER:
        return None
    return int(number) if number == int(number) else None


def _numbers(values: Sequence[Any], task: Task, where: Callable[[int], str]) -> list[Any]:
    numbers = []
    for row, value in enumerate(values):
        number = _number(value)
        if not math.isfinite(number):
            choices = f"task {task.name} is a regression and needs a number"
            raise _error(value, where(row), choices)
        numbers.append(number)
    # GLUE hides the values of a test set: all of them are -1. Among others, -1 is a value.
    return [None] * len(numbers) if set(numbers) == {-1.0} else numbers


def _number(value: Any) -> float:
    """Return the number that a value is or stands for; NaN or infinity if it is none."""
    is_text = isinstance(value, str) and NUMBER.fullmatch(value.strip())
    if not (is_text or isinstance(value, Decimal | float) or _is_int(value)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _ids(values: Sequence[Any], task: Task, where: Callable[[int], str]) -> list[Any]:
    reader = Classes(task)
    known: dict[tuple[type, Any], int | None] = {}
    labels = []
    for row, value in enumerate(values):
        key = type(value), value
        try:
            label = known[key]
        except (KeyError, TypeError):  # a list cannot be a key
            try:
                label = reader.id_of(value)
            except LookupError as error:
                raise _error(value, where(row), str(error.args[0])) from None
            known[key] = label
        labels.append(label)
    return labels


class Classes:
    """The classes of a task, by the values that a file may have for them.

    Args:
        task: a task with classes.
    """

    def __init__(self, task: Task) -> None:
        names = task.labels or ()
        self.choices = f"task {task.name} has: " + ", ".join(
            f"{number} {name}" for number, name in enumerate(names)
        )
        self.num_classes = len(names)
        self.by_name = {name: number for number, name in enumerate(names)}
        self.by_value: dict[tuple[type, Any], list[int]] = {}  # True and 1 are equal in Python
        for number, name in enumerate(names):
            if (value := _value(name)) is not None:
                self.by_value.setdefault((type(value), value), []).append(number)
        self.names_are_numbers = any(kind is Decimal for kind, _ in self.by_value)

    def id_of(self, value: Any) -> int | None:
        """Return the id of a class, or None for no label.

        Raises:
            LookupError: there is no such class, or more than one. The message names the classes.
        """
        if isinstance(value, str):
            value = value if value in self.by_name else value.strip()
            if value in self.by_name:
                return self.by_name[value]
        meant = _value(value)
        same = self.by_value.get((type(meant), meant), [])
        if len(same) == 1:
            return same[0]
        if same:
            raise LookupError(f"{len(same)} classes have this value; {self.choices}")
        number = whole(value)
        if value == "-" or number == NO_LABEL:
            return None
        if number in range(self.num_classes) and not self.names_are_numbers:
            return number
        raise LookupError(self.choices)


def _value(label: Any) -> Decimal | bool | None:
    """Return the number or the truth value that a label stands for; None if it is just a word."""
    if isinstance(label, bool):
        return label
    if isinstance(label, Decimal):
        return label
    if _is_int(label) or isinstance(label, float):
        text = repr(label)
    elif isinstance(label, str):
        text = label
    else:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if len(text) <= LONGEST_NUMBER and NUMBER.fullmatch(text):
        return Decimal(text)
    return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _error(value: Any, where: str, choices: str) -> UserError:
    given = "null" if value is None else short(value)
    return UserError(f"{where}: label {given} is out of range; {choices} (task.labels)")
