"""Texts that somebody else chose, written into Markdown as they are. Imports nothing heavy."""

import html
import re

# What begins code, a table's cell or emphasis, and what makes a link or an image.
MARKS = re.compile(r"([\\`|*]|\](?=[(\[]))")


def text(value: object) -> str:
    """Return a text that is shown as it stands, on one line, and is never HTML or Markdown."""
    one_line = " ".join(str(value).split())
    return MARKS.sub(r"\\\1", html.escape(one_line, quote=False))


def code(value: object) -> str:
    """Return a text as code, on one line; its own back quotes become apostrophes."""
    one_line = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{one_line}`"
