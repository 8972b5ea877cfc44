"""Input texts that a user gives in Python: one text, a pair, or a mapping from a task's columns.

The module checks their types and their number. It knows nothing of tokens and models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deebert.data.tasks import Task
from deebert.errors import UserError

Text = str | Sequence[str] | Mapping[str, Any]  # a text, a pair, or a mapping from column names


def columns(text: Text, task: Task) -> tuple[str, ...]:
    """Return the texts of one input, in the order of the task's columns.

    Raises:
        UserError: a column is missing, a text is not a text or no Unicode, or their number is not
            the task's.
    """
    names = task.columns
    given: Any = (text,) if isinstance(text, str) else text
    if isinstance(given, Mapping):
        if missing := [name for name in names if name not in given]:
            raise UserError(f"an input lacks {missing[0]!r}; {task.name} reads: {', '.join(names)}")
        given = tuple(given[name] for name in names)
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise UserError(f"an input is {short(text)}, not a text")
    if len(given) != len(names):
        expected = "a pair of texts" if len(names) == 2 else "one text"
        raise UserError(
            f"an input has {len(given)} texts; task {task.name} takes {expected}: "
            f"{', '.join(names)}"
        )
    try:
        "".join(given).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"an input is {short(text)}: half of a surrogate pair") from error
    return tuple(given)


def is_one(texts: Any, task: Task) -> bool:
    """Say whether this is one input, and not a sequence of inputs.

    A tuple of two texts is one pair; a list of two texts is two inputs.
    """
    if isinstance(texts, str | bytes | Mapping):
        return True
    is_pair = len(task.columns) == 2 and isinstance(texts, tuple)
    return is_pair and all(isinstance(text, str) for text in texts)


def short(value: Any) -> str:
    """Return the representation of a value, at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
