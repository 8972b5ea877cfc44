"""The exception for a user's mistake, and helpers for the checks that raise it.

The message of a `UserError` is all that the user sees, on one line. This module imports nothing of
the package and knows nothing of models, data or commands.
"""

from collections.abc import Iterable
from typing import Any, TypeGuard


class UserError(ValueError):
    """Bad input: the message names the value, the choices and the flag to use.

    The message is one line of printable characters, whatever value it names: any other character
    is escaped, so a terminal shows it and does not obey it.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def unknown(
    what: str, value: object, choices: Iterable[object], flag: str, *, own: bool = False
) -> UserError:
    """Return the error for a value outside a known set of choices.

    Args:
        what: the name of the value.
        value: the value.
        choices: the known values.
        flag: the key that sets the value.
        own: whether a module of the user's may add choices.
    """
    listed = ", ".join(map(str, choices))
    hint = "; for one of your own name the module that defines it: modules=[MODULE]" if own else ""
    return UserError(f"{what} {value!r} is unknown; choose one of: {listed} ({flag}=...){hint}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Say whether a value is a number. True and False, integers for Python, are no numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_whole(flag: str, value: Any, low: int, high: int | None = None) -> None:
    """Check that a value is a whole number in a range.

    Args:
        flag: the key that sets the value.
        value: the value.
        low: the smallest number.
        high: the largest number; None: there is no limit.

    Raises:
        UserError: it is not.
    """
    if not is_whole(value) or value < low or (high is not None and value > high):
        limit = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise UserError(f"{flag}={value} must be a whole number {limit}")


def is_whole(value: Any) -> TypeGuard[int]:
    """Say whether a value is a whole number. True and False are no numbers here."""
    return isinstance(value, int) and not isinstance(value, bool)
