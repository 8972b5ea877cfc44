"""results.json, and what is made of it: tables (terminal, Markdown), pictures and the page.

Everything here can be made again from results.json alone. Knows nothing of models or data.
"""

import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deebert.reporting import plots
from deebert.reporting.html import page
from deebert.reporting.markdown import text
from deebert.reporting.tables import more_tables, notes, tables

SCHEMA = 1
PACKAGES = (
    "deebert",
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "torchmetrics",
    "hydra-core",
)


def header(config: dict[str, Any]) -> dict[str, Any]:
    """What a run is, from its configuration, and where it ran."""
    layers = config["backbone"].get("layers")
    return {
        "schema": SCHEMA,
        "task": config["task"]["name"],
        "backbone": config["backbone"]["name"],
        **({"layers": layers} if layers else {}),  # only these of the pretrained ones
        "stage": config["stage"],
        "objective": config["objective"]["name"],
        "ramp": config["ramp"],
        "seed": config["seed"],
        "metric": config["task"]["metrics"][0],
        "environment": environment(),
    }


@cache
def environment() -> dict[str, Any]:
    """Versions, device, threads and the code's commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__  # says which build it is, too
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "device": cuda or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_commit": commit or None,
    }


def save_json(results: dict[str, Any], folder: Path) -> None:
    """Write results.json."""
    replace_text(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Write a file; a reader never sees half of it."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.replace(file)


def save(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, results.md, curve.png, report.html and, if layers were left out one by
    one, layers.png."""
    save_json(results, folder)
    (folder / "results.md").write_text(markdown(results))
    (folder / "report.html").write_text(page(results), encoding="utf-8")
    plots.curve(results, title(results), folder / "curve.png")
    if "layers" in results["analysis"]:
        plots.layers(results, title(results), folder / "layers.png")


def show(results: dict[str, Any], folder: Path) -> None:
    """Print the tables to the terminal."""
    console = Console(width=None if os.isatty(1) else 140, highlight=False)
    endless = console.options.update(max_width=1000)
    console.print(title(results), markup=False)
    listed = list(tables(results))
    if "layers" in results["analysis"]:
        listed += more_tables(results)
    for heading, columns, rows in listed:
        # As the table's own title it would be folded.
        console.print(heading, style="bold", markup=False)
        table = _table(columns, rows)
        if console.measure(table, options=endless).maximum > console.width:
            table = _table(columns, rows, narrow=True)
        console.print(table)
    for note in notes(results):
        console.print(note, markup=False)
    console.print(f"Run folder: {folder}", markup=False, soft_wrap=True)


def _table(columns: list[str], rows: list[list[str]], narrow: bool = False) -> Table:
    """A table for the terminal; narrow: its headings are folded, where rich would cut cells."""
    table = Table(collapse_padding=narrow)
    for column, *cells in zip(columns, *rows, strict=True):
        width = max(map(len, [*column.split(), *cells])) if narrow else len(column) + 1
        heading = "\n".join(wrap(column, width, break_on_hyphens=False))
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(results: dict[str, Any]) -> str:
    """The same tables as Markdown."""
    lines = [f"# {text(title(results))}", ""]
    for heading, columns, rows in (*tables(results), *more_tables(results)):
        lines += [f"## {text(heading)}", "", _row(columns), f"|{'---:|' * len(columns)}"]
        lines += [_row(row) for row in rows]
        lines.append("")
    lines += [f"{text(note)}\n" for note in notes(results)]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(map(text, cells))} |"


def title(results: dict[str, Any]) -> str:
    """What was run, in a line."""
    cut = f" (layers {', '.join(map(str, results['layers']))})" if "layers" in results else ""
    return (
        f"{results['task']}, {results['backbone']}{cut}, stage {results['stage']}, "
        f"seed {results['seed']}"
    )
