"""The one exception for a user's mistake. Its message is what the user sees, alone on its line."""

from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message names the value, the choices and the flag to use."""


def unknown(what: str, value: object, choices: Iterable[object], flag: str) -> UserError:
    """The error for a value outside a known set of choices."""
    listed = ", ".join(str(choice) for choice in choices)
    return UserError(f"{what} {value!r} is unknown; choose one of: {listed} ({flag}=...)")
