"""The one exception for a user's mistake. Its message is what the user sees, alone on its line.

And what such messages and the checks before them are made of.
"""

from collections.abc import Iterable
from typing import Any, TypeGuard


class UserError(ValueError):
    """Bad input: the message names the value, the choices and the flag to use.

    It is one line that a terminal shows and does not obey, whatever value it names.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def unknown(what: str, value: object, choices: Iterable[object], flag: str) -> UserError:
    """The error for a value outside a known set of choices."""
    listed = ", ".join(str(operating_point) for operating_point in choices)
    return UserError(f"{what} {value!r} is unknown; choose one of: {listed} ({flag}=...)")


def first_line(error: BaseException) -> str:
    """What an error of a library says, shortly; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Is it one, and no truth value, which Python takes for one?"""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> TypeGuard[int]:
    """The same of whole numbers."""
    return isinstance(value, int) and not isinstance(value, bool)
