"""results.json -> tables (terminal and Markdown), pictures and the page: what a run leaves to read.

Everything here can be made again from results.json alone. Knows nothing of models or data.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deebert import pictures
from deebert.page import page

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
    recipe = config["stages"][str(config["stage"])]
    return {
        "schema": SCHEMA,
        "task": config["task"]["name"],
        "backbone": config["backbone"]["name"],
        "stage": config["stage"],
        "objective": recipe["objective"],
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
    """Write results.json; a reader never sees half of it."""
    part = folder / "results.json.part"
    part.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    part.replace(folder / "results.json")


def save(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, results.md, curve.png, report.html and, if layers were left out one by
    one, layers.png."""
    save_json(results, folder)
    (folder / "results.md").write_text(markdown(results))
    (folder / "report.html").write_text(page(results), encoding="utf-8")
    pictures.curve(results, title(results), folder / "curve.png")
    if "layers" in results["analysis"]:
        pictures.layers(results, title(results), folder / "layers.png")


def splits(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluation of each split: the headline one first (MNLI has two)."""
    return [results, *results.get("other_splits", [])]


def tables(results: dict[str, Any]) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """Title, column names and rows of every table of the report."""
    metric = results["metric"]
    for part in splits(results):
        where = f"{results['task']}, {part['split']} ({part['num_rows']} rows)"
        others = [name for name in part["exits"][0]["scores"] if name != metric]
        yield (
            f"Score of every ramp: {where}",
            ["layer", metric, *others, "cost ratio"],
            [
                [
                    str(ramp["layer"]),
                    *(_number(ramp["scores"].get(name)) for name in (metric, *others)),
                    _number(ramp["cost_ratio"]),
                ]
                for ramp in part["exits"]
            ],
        )
        if results["objective"] == "final":
            continue  # exits at untrained ramps mean nothing
        groups = list(part["curve"][0].get("mean_exit_layer", {}))
        yield (
            f"Score against saving: {where}",
            ["threshold", metric, *others, "cost ratio", "saving", "speed-up"]
            + [f"mean exit, {group}" for group in groups]
            + ["exits by layer"],
            [
                [
                    _threshold(point["threshold"]),
                    *(_number(point["scores"].get(name)) for name in (metric, *others)),
                    _number(point["cost_ratio"]),
                    f"{point['expected_saving']:.1%}",
                    f"{point['speed_up']:.2f}x",
                    *(f"{point['mean_exit_layer'][group]:.2f}" for group in groups),
                    " ".join(map(str, point["exit_counts"])),
                ]
                for point in part["curve"]
            ],
        )
    if "calibration" in results:
        yield _answer(results)


def _answer(results: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """The wish, what was to be expected and what unseen rows showed."""
    found, metric = results["calibration"], results["metric"]
    wish = ", ".join(f"{n}={'null' if v is None else v}" for n, v in found["wish"].items())
    rows = [["rows chosen on", found["expected"]], [results["split"], found["measured"]]]
    rows += list(map(list, found.get("measured_elsewhere", {}).items()))
    return (
        f"Wish: {wish}; exit={found['rule']} threshold={_threshold(found['thresholds'])}, chosen "
        f"on {found['calibration_split']} ({found['num_calibration']} rows)",
        ["", metric, "at full depth", "saving", "excess error", "disagreement", "exits by layer"],
        [
            [
                name,
                _number(part["score"]) + _interval(part.get("score_interval"), "{:.3f}"),
                _number(part["full_depth_score"]),
                f"{part['expected_saving']:.1%}" + _interval(part.get("interval"), "{:.1%}"),
                _number(part["excess"]),
                _number(part["disagreement"]),
                " ".join(map(str, part["exit_counts"])),
            ]
            for name, part in rows
        ],
    )


def more_tables(results: dict[str, Any]) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """Why layers look redundant: what `analysis` and `layers` found."""
    metric = results["metric"]
    for part in splits(results):
        found, where = part["analysis"], f"{results['task']}, {part['split']}"
        last = [row[-1] for row in found["error_correlation"] or []]
        columns: dict[str, list[float | None]] = {
            "agrees with last": [ramp["agreement"] for ramp in found["ramps"]],
            "AUROC": [ramp["auroc"] for ramp in found["ramps"]],
            "ECE": [ramp["ece"] for ramp in found["ramps"]],
            "errors' correlation with last": last,
            f"{metric} of mean of ramps": [row["mean"] for row in found["ensemble"] or []],
            f"{metric} of vote": [row["vote"] for row in found["ensemble"] or []],
        }
        for name, key in (
            ("block influence", "block_influence"),
            ("CKA with last", "cka_with_last"),
            (f"{metric} without layer", "score_without"),
        ):
            columns[name] = [layer[key] for layer in found.get("layers", [])]
        there = [name for name, values in columns.items() if any(v is not None for v in values)]
        yield (
            f"Ramps and layers: {where}",
            ["layer", *there],
            [
                [str(i + 1), *(_number(columns[name][i]) for name in there)]
                for i in range(part["num_layers"])
            ],
        )


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know."""
    found = []
    if results["objective"] == "final":
        found.append("Only the last ramp is trained so far; exits are worth a look after stage 2.")
    if results["metric"] in ("spearman", "pearson"):
        found.append("A regression has no entropy: it leaves when its value stops changing.")
    if results["exits"][0]["score"] is None:
        found.append("This split has no labels: saving only, no scores.")
    for part in splits(results):
        if oracle := part["analysis"]["oracle"]:
            found.append(
                f"{part['split']}: {part['analysis']['overthinking_rate']:.1%} of the rows are "
                "right at some ramp and wrong at full depth; a rule that knew which is right would "
                f"score {oracle['score']:.4f} at {oracle['expected_saving']:.1%} saving (a bound: "
                "it profits from lucky guesses)."
            )
    if "calibration" in results:
        found += _promise(results["calibration"], results["metric"])
    return found


def _promise(found: dict[str, Any], metric: str) -> list[str]:
    """What may be relied on, in a sentence."""
    lines = [f"Note: {note}." for note in found["notes"]]
    if found["temperatures"]:
        listed = ",".join(f"{value:.9g}" for value in found["temperatures"])
        lines.append(f"To use the threshold again: temperature=[{listed}]")
    if idle := found.get("folds_at_full_depth"):
        lines.append(f"Note: in {idle} folds four fifths of the rows were too few: full depth.")
    wish = found["wish"]
    if "max_drop" not in wish:
        return [*lines, "Intervals are 95 % ones for as many new rows as were reported."]
    if found["thresholds"] == 0:
        return [*lines, "No threshold can be promised that: every row runs to full depth."]
    what = {
        "excess": "loses {} of accuracy at most against full depth",
        "disagreement": "answers otherwise than full depth on {} of the rows at most",
    }[wish["loss"]].format(f"{wish['max_drop']:.2%}")
    confidence = wish["confidence"]
    sure = "on average" if confidence is None else f"with {100 * confidence:g} % confidence"
    lines.append(
        f"Promise: on rows like the calibration rows this threshold {what}, {sure} (over the draw "
        "of the calibration rows)."
    )
    if metric != "accuracy" and wish["loss"] == "excess":
        lines.append(f"It is a promise about accuracy; {metric} is shown beside it, not promised.")
    return lines


def show(results: dict[str, Any], folder: Path) -> None:
    """Print the tables to the terminal."""
    console = Console(width=None if os.isatty(1) else 140, highlight=False)
    console.print(title(results), markup=False)
    listed = list(tables(results))
    if "layers" in results["analysis"]:
        listed += more_tables(results)
    for heading, columns, rows in listed:
        # As the table's own title it would be folded.
        console.print(heading, style="bold", markup=False)
        table = Table()
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in notes(results):
        console.print(note, markup=False)
    console.print(f"Run folder: {folder}", markup=False, soft_wrap=True)


def markdown(results: dict[str, Any]) -> str:
    """The same tables as Markdown."""
    lines = [f"# {title(results)}", ""]
    for heading, columns, rows in (*tables(results), *more_tables(results)):
        lines += [f"## {heading}", "", f"| {' | '.join(columns)} |", f"|{'---:|' * len(columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    lines += [f"{note}\n" for note in notes(results)]
    return "\n".join(lines)


def title(results: dict[str, Any]) -> str:
    """What was run, in a line."""
    return (
        f"{results['task']}, {results['backbone']}, stage {results['stage']}, "
        f"seed {results['seed']}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _threshold(value: float | list[float]) -> str:
    listed = value if isinstance(value, list) else [value]
    text = ",".join(f"{number:.9g}" for number in listed)
    return f"[{text}]" if isinstance(value, list) else text


def _interval(bounds: list[float] | None, form: str) -> str:
    return f" ({form.format(bounds[0])} to {form.format(bounds[1])})" if bounds else ""
