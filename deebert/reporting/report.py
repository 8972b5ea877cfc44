"""Write results.json, and make the tables, the plots and the HTML report from it.

Tables are for the terminal and for Markdown. All of these can be made again from results.json
alone. The module does not know models or data.
"""

import base64
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deebert.disk import whole_files
from deebert.options import job_command
from deebert.reporting import plots
from deebert.reporting.class_tables import class_tables
from deebert.reporting.markdown import text
from deebert.reporting.results import SCHEMA, Environment, Results
from deebert.reporting.tables import more_tables, notes, tables
from deebert.reporting.useless import warning

PACKAGES = (
    "deebert",
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "torchmetrics",
    "hydra-core",
)


def header(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Results` that describe a run and the machine that it ran on.

    Args:
        run: the names and numbers of the run, as `RunConfig.summary` returns them.
    """
    return {"schema": SCHEMA, **run, "environment": environment()}


@cache
def environment() -> Environment:
    """Return the versions, the device, the number of threads and the commit of the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__  # this version also names the build
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Environment(
        python=platform.python_version(),
        versions=versions,
        platform=platform.platform(),
        device=cuda or platform.processor() or platform.machine(),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
        git_commit=commit or None,
        date=date.today().isoformat(),
    )


def save_json(results: Results, folder: Path) -> None:
    """Write results.json."""
    text = json.dumps(results.to_json(), indent=2, allow_nan=False)
    whole_files.replace(folder / "results.json", text + "\n")


def save(results: Results, folder: Path) -> None:
    """Write results.json, results.md, report.html and curve.png, and layers.png if it applies.

    layers.png needs the scores of the model without each of its layers. An old curve.png is removed
    first, and the new one is written last (`is_complete`).
    """
    (folder / "curve.png").unlink(missing_ok=True)
    save_json(results, folder)
    whole_files.replace(folder / "results.md", markdown(results))
    warnings = [line] if (line := warning(results)) else []
    whole_files.replace(folder / "report.html", html_report(results.to_json(), warnings))
    if results.headline.analysis.layers:
        plots.layers(results, title(results), folder / "layers.png")
    plots.curve(results, title(results), folder / "curve.png")


def is_complete(folder: Path) -> bool:
    """Say whether `save` has written the results of a run folder to the end."""
    return (folder / "curve.png").exists()


def show(results: Results, folder: Path) -> None:
    """Print the tables and notes to the terminal, and name the run folder at the end."""
    console = Console(width=None if os.isatty(1) else 140, highlight=False)
    unlimited = console.options.update(max_width=1000)
    console.print(title(results), markup=False)
    shown = [*tables(results), *class_tables(results, terminal=True)]
    if results.headline.analysis.layers:
        shown += more_tables(results)
    for heading, columns, rows in shown:
        # rich would fold this line if it were the title of the table.
        console.print(heading, style="bold", markup=False)
        table = _table(columns, rows)
        if console.measure(table, options=unlimited).maximum > console.width:
            table = _table(columns, rows, narrow=True)
        console.print(table)
    for note in notes(results):
        console.print(note, markup=False)
    console.print(f"Run folder: {folder}", markup=False, soft_wrap=True)


def _table(columns: list[str], rows: list[list[str]], narrow: bool = False) -> Table:
    """Make a table for the terminal.

    Args:
        columns: the headings.
        rows: the cells.
        narrow: true to fold the headings and to leave out the spaces beside the cells.
    """
    table = Table(padding=(0, 0 if narrow else 1))
    for column, *cells in zip(columns, *rows, strict=True):
        width = max(map(len, [*column.split(), *cells])) if narrow else len(column) + 1
        heading = "\n".join(wrap(column, width, break_on_hyphens=False))
        table.add_column(Text(heading), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # a label in brackets is no markup
    return table


def markdown(results: Results) -> str:
    """Return all tables and notes as Markdown."""
    lines = [f"# {text(title(results))}", ""]
    for heading, columns, rows in (
        *tables(results),
        *class_tables(results),
        *more_tables(results),
    ):
        lines += [f"## {text(heading)}", "", _row(columns), f"|{'---:|' * len(columns)}"]
        lines += [_row(row) for row in rows]
        lines.append("")
    lines += [f"{text(note)}\n" for note in notes(results)]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(map(text, cells))} |"


def html_report(results: Mapping[str, Any], warnings: Sequence[str] = ()) -> str:
    """Return the text of report.html, one file that shows the trade-off of score against saving.

    The template is report.html of this package, which holds all style and drawing. The results are
    put into it as JSON. The report opens from a file, loads nothing, and shows every text of the
    results as text only.

    Args:
        results: the content of results.json.
        warnings: sentences that a reader must know first.

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
    for mark, value in {
        "SCRIPT_DIGEST": digest,
        "WARNINGS_JSON": _embedded(list(warnings)),
        "RESULTS_JSON": _embedded(results),
    }.items():
        template = template.replace(mark, value, 1)
    return template


def _embedded(value: Any) -> str:
    """Return a value as JSON for an element of HTML.

    Without a "<" no text can end the element of the JSON or begin another one.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def title(results: Results) -> str:
    """Return one line that names the task, backbone, stage and seed of a run."""
    kept = f" (layers {', '.join(map(str, results.layers))})" if results.layers else ""
    precision = "" if results.precision == "float32" else f", {results.precision}"
    run = f"stage {results.stage}, seed {results.seed}{precision}"
    return f"{results.task}, {results.backbone}{kept}, {run}"
