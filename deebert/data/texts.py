"""Say what a text is, for files and Python alike, and check the inputs that Python gives.

An input is one text, a pair, or a mapping from a task's columns. The module knows nothing of tokens
and models, and imports nothing heavy.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deebert.errors import UserError

if TYPE_CHECKING:  # torch takes seconds
    from deebert.data.tasks import Task

LONGEST_TEXT = 1_000_000  # characters: a tokenizer holds 100 bytes and more for each token
SURROGATE = "holds half of a surrogate pair, which is no character"

Text = str | Sequence[str] | Mapping[str, Any]  # a text, a pair, or a mapping from column names


def fault(text: Any) -> str | None:
    """Return the reason why a value is no text that can be read, or None.

    An empty text is a text. Training, evaluation, file prediction, the service and Python refuse
    the same values; the exported runner has a copy of this rule.
    """
    if not isinstance(text, str):
        return f"is {'null' if text is None else short(text)}, not a text"
    if "\0" in text:
        return "holds a NUL character"
    if len(text) > LONGEST_TEXT:
        return f"has {len(text):,} characters, more than {LONGEST_TEXT:,}"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return SURROGATE
    return None


def columns(text: Text, task: "Task") -> tuple[str, ...]:
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
    if not isinstance(given, list | tuple):
        raise UserError(f"an input is {short(text)}, not a text")
    if len(given) != len(names):
        expected = "a pair of texts" if len(names) == 2 else "one text"
        raise UserError(
            f"an input has {len(given)} texts; task {task.name} takes {expected}: "
            f"{', '.join(names)}"
        )
    for each in given:
        if reason := fault(each):
            raise UserError(f"an input is {short(text)}: one text {reason}")
    return tuple(given)


def is_one(texts: Any, task: "Task") -> bool:
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
