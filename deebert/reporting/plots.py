"""results.json -> curve.png and layers.png. Draws; computes nothing, reads no file."""

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from deebert.models.trained_ramps import trains_ramps
from deebert.reporting import tables


def curve(results: dict[str, Any], title: str, file: Path) -> None:
    """Draw score against expected saving, with every ramp as a point, and the exits."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=[3, 2]
    )
    for part in tables.splits(results):
        label = "" if part is results else f" ({part['split']})"
        points = part.get("trade_off", [])
        if trains_ramps(results["objective"]) and part["exits"][0]["score"] is not None:
            savings = [100 * point["expected_saving"] for point in points]
            low, high = zip(*(point["score_interval"] for point in points), strict=True)
            [line] = left.plot(
                savings,
                [point["score"] for point in points],
                label=f"early exit, {results['exit']['name']}{label}",
            )
            left.fill_between(savings, low, high, alpha=0.15, color=line.get_color(), lw=0)
            left.plot(
                [100 * point["expected_saving"] for point in part["curve"]],
                [point["score"] for point in part["curve"]],
                linestyle="",
                marker="o",
                color=line.get_color(),
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
    timing = results.get("timing") or []
    # A dict keeps their order: a mark for each precision and batch size.
    kinds = dict.fromkeys((case["precision"], case["batch_size"]) for case in timing)
    for mark, (precision, batch_size) in zip(cycle("+x1234"), kinds, strict=False):
        cases = [c for c in timing if (c["precision"], c["batch_size"]) == (precision, batch_size)]
        if not trains_ramps(results["objective"]) or cases[0]["score"] is None:
            continue
        which = f", {precision}, {batch_size or 'all'}" if len(kinds) > 1 else ""
        left.plot(
            [100 * case["time_saving"] for case in cases],
            [case["score"] for case in cases],
            linestyle="",
            marker=mark,
            markersize=10,
            markeredgewidth=2,
            color="k",
            label=f"on the clock{which}",
        )
    xlabel = "expected saving (% of layers)" + ("; on the clock: % of time" if timing else "")
    left.set(xlabel=xlabel, ylabel=results["metric"], title=title)
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
    right.set_xticks(positions, [_tick(p["threshold"]) for p in results["curve"]], rotation=60)
    right.set(xlabel="threshold", ylabel="% of inputs", title="Where inputs exit")
    right.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=120)
    plt.close(figure)


def layers(results: dict[str, Any], title: str, file: Path) -> None:
    """Draw why layers look redundant: ramps, their errors, states, and what a layer is worth."""
    plt = _pyplot()
    found = results["analysis"]
    numbers = np.array([ramp["layer"] for ramp in found["ramps"]])
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    figure.suptitle(title)
    lines = {
        "agrees with the last ramp": ([ramp["agreement"] for ramp in found["ramps"]], "o-"),
        "AUROC of confidence": ([ramp["auroc"] for ramp in found["ramps"]], "s:"),
        results["metric"]: ([row["single"] for row in found["ensemble"] or []], "x-"),
        "mean of the ramps so far": ([row["mean"] for row in found["ensemble"] or []], ".--"),
    }
    for label, (values, style) in lines.items():
        if any(value is not None for value in values):
            axes[0, 0].plot(numbers, np.array(values, float), style, label=label)
    bars = {"block influence": "block_influence", "score lost without it": "score_drop"}
    for i, (label, key) in enumerate(bars.items()):
        heights = np.array([row[key] for row in found["layers"]], float)  # None -> nan: no bar
        axes[1, 1].bar(numbers + 0.4 * i - 0.2, heights, 0.4, label=label)
    maps = [(axes[0, 1], found["error_correlation"]), (axes[1, 0], found["cka"])]
    for axis, matrix in maps:
        shades = np.array(matrix or [[None] * len(numbers)] * len(numbers), float)
        extent = (0.5, len(shades) + 0.5) * 2
        axis.imshow(shades, vmin=0, vmax=1, cmap="Blues", source="lower", extent=extent)
        for (i, j), value in np.ndenumerate(shades):
            text, colour = "-" if np.isnan(value) else f"{value:.2f}", "w" if value > 0.6 else "k"
            axis.text(j + 1, i + 1, text, ha="center", va="center", fontsize=7, color=colour)
    names = ("Ramps", "Correlation of the ramps' errors", "CKA of first-token states", "Layers")
    for axis, name in zip(axes.flat, names, strict=True):
        axis.set(title=name, xlabel="layer", xticks=numbers)
    for axis, _ in maps:
        axis.set(ylabel="layer", yticks=numbers)
    for axis in (axes[0, 0], axes[1, 1]):
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib  # slow to import: only when something is drawn

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _tick(threshold: float | list[float]) -> str:
    return "per ramp" if isinstance(threshold, list) else f"{threshold:.3g}"
