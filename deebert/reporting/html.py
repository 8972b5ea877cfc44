"""Turn results.json into report.html, one file that shows the trade-off of score against saving.

The template is report.html of this package, which holds all style and drawing. The results are put
into it as JSON. The report opens from a file, loads nothing, and shows every text of the results as
text only. This module does not know models, data or files, and computes no number.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from deebert.options import job_command


def html_report(results: Mapping[str, Any]) -> str:
    """Return the text of report.html.

    Raises:
        ValueError: a number in `results` is NaN or infinite.
    """
    template = (
        resources.files("deebert.reporting").joinpath("report.html").read_text(encoding="utf-8")
    )
    template = template.replace("EVALUATE", job_command("evaluate"), 1)
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None
    # With this Content-Security-Policy the browser runs this one script and loads nothing.
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    # Without a "<" no text of the results can end the element of the JSON or begin another one.
    data = json.dumps(results, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("SCRIPT_DIGEST", digest, 1).replace("RESULTS_JSON", data, 1)
