"""results.json -> report.html: one page to look at the trade-off of score against saving.

The template is report.html of this package. It holds all style and drawing; the results are
put into it as JSON. It opens from a file, loads nothing, and shows every text of the results as
text only.
Knows nothing of models, data or files; computes no number of its own.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any


def page(results: Mapping[str, Any]) -> str:
    """The text of report.html.

    Raises:
        ValueError: a number in `results` is NaN or infinite.
    """
    template = (
        resources.files("deebert.reporting").joinpath("report.html").read_text(encoding="utf-8")
    )
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None
    # Content-Security-Policy: the browser runs this one script and loads nothing.
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    # Without a "<" no text of the results can end the JSON's element or open another.
    data = json.dumps(results, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("SCRIPT_DIGEST", digest, 1).replace("RESULTS_JSON", data, 1)
