"""results.json -> tables (terminal and Markdown) and the picture of the curve.

Everything here can be made again from results.json alone. Knows nothing of models or data.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

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


def header(config: Mapping[str, Any]) -> dict[str, Any]:
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


def save_json(results: Mapping[str, Any], folder: Path) -> None:
    """Write results.json; a reader never sees half of it."""
    part = folder / "results.json.part"
    part.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    part.replace(folder / "results.json")


def save(results: Mapping[str, Any], folder: Path) -> None:
    """Write results.json, results.md and curve.png."""
    save_json(results, folder)
    (folder / "results.md").write_text(markdown(results))
    picture(results, folder / "curve.png")


def splits(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The evaluation of each split: the headline one first (MNLI has two)."""
    return [results, *results.get("other_splits", [])]


def tables(results: Mapping[str, Any]) -> Iterable[tuple[str, list[str], list[list[str]]]]:
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
                    f"{point['threshold']:g}",
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


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know."""
    found = []
    if results["objective"] == "final":
        found.append("Only the last ramp is trained so far; exits are worth a look after stage 2.")
    if results["metric"] in ("spearman", "pearson"):
        found.append("A regression has no entropy to exit by: full depth only.")
    if results["exits"][0]["score"] is None:
        found.append("This split has no labels: saving only, no scores.")
    return found


def show(results: Mapping[str, Any], folder: Path) -> None:
    """Print the tables to the terminal."""
    console = Console(width=None if os.isatty(1) else 140, highlight=False)
    console.print(_title(results), markup=False)
    for title, columns, rows in tables(results):
        console.print(title, style="bold", markup=False)  # as the table's title it would be folded
        table = Table()
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in notes(results):
        console.print(note, markup=False)
    console.print(f"Run folder: {folder}", markup=False, soft_wrap=True)


def markdown(results: Mapping[str, Any]) -> str:
    """The same tables as Markdown."""
    lines = [f"# {_title(results)}", ""]
    for title, columns, rows in tables(results):
        lines += [f"## {title}", "", f"| {' | '.join(columns)} |", f"|{'---:|' * len(columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    lines += [f"{note}\n" for note in notes(results)]
    return "\n".join(lines)


def picture(results: Mapping[str, Any], file: Path) -> None:
    """Draw score against expected saving, with every ramp as a point, and the exits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=[3, 2]
    )
    for part in splits(results):
        label = "" if part is results else f" ({part['split']})"
        points = sorted(part["curve"], key=lambda point: point["expected_saving"])
        if results["objective"] != "final" and part["exits"][0]["score"] is not None:
            left.plot(
                [100 * point["expected_saving"] for point in points],
                [point["score"] for point in points],
                marker="o",
                label=f"early exit by entropy{label}",
            )
        if part["exits"][0]["score"] is not None:
            left.plot(
                [100 * (1 - ramp["cost_ratio"]) for ramp in part["exits"]],
                [ramp["score"] for ramp in part["exits"]],
                linestyle="",
                marker="x",
                color="0.5",
                label=f"every input at one ramp{label}",
            )
            left.axhline(part["exits"][-1]["score"], color="0.7", linestyle=":", zorder=0)
    left.set(
        xlabel="expected saving (% of layers)", ylabel=results["metric"], title=_title(results)
    )
    left.grid(alpha=0.3)
    if left.get_legend_handles_labels()[0]:
        left.legend()
    bottoms = [0.0] * len(results["curve"])
    positions = range(len(results["curve"]))
    colours = plt.get_cmap("viridis")
    for layer in range(results["num_layers"]):
        counts = [100 * p["exit_counts"][layer] / results["num_rows"] for p in results["curve"]]
        colour = colours(layer / max(1, results["num_layers"] - 1))
        right.bar(positions, counts, bottom=bottoms, color=colour, label=f"layer {layer + 1}")
        bottoms = [bottom + count for bottom, count in zip(bottoms, counts, strict=True)]
    right.set_xticks(positions, [f"{p['threshold']:g}" for p in results["curve"]], rotation=60)
    right.set(xlabel="threshold (entropy, nats)", ylabel="% of inputs", title="Where inputs exit")
    right.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _title(results: Mapping[str, Any]) -> str:
    return (
        f"{results['task']}, {results['backbone']}, stage {results['stage']}, "
        f"seed {results['seed']}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
