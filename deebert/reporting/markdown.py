"""Write texts that somebody else chose into Markdown, so that they stay plain text or code.

The module does not know what the texts mean, and imports nothing heavy.
"""

import html
import re

# Characters that begin code, a table cell or emphasis, and the bracket of a link or an image.
MARKS = re.compile(r"([\\`|*]|\](?=[(\[]))")


def text(value: object) -> str:
    """Return a text on one line that Markdown shows unchanged, never as HTML or Markdown."""
    one_line = " ".join(str(value).split())
    return MARKS.sub(r"\\\1", html.escape(one_line, quote=False))


def code(value: object) -> str:
    """Return a text on one line as Markdown code. Its back quotes become apostrophes."""
    one_line = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{one_line}`"
