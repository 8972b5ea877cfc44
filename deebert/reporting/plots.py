"""Draw curve.png and layers.png from results.json.

The module computes no number and reads no file.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from deebert.disk import whole_files
from deebert.models.trained_ramps import trains_ramps
from deebert.reporting.results import Results
from deebert.reporting.split_results import Thresholds


def curve(results: Results, title: str, file: Path) -> None:
    """Draw score against expected saving, with a point for every ramp, and the exit layers."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=[3, 2]
    )
    for part in results.splits:
        label = "" if part is results.headline else f" ({part.split})"
        points = part.trade_off or []
        if trains_ramps(results.objective) and part.exits[0].score is not None:
            savings = [100 * point.expected_saving for point in points]
            intervals = [point.score_interval or [] for point in points]  # each has one
            low, high = zip(*intervals, strict=True)
            [line] = left.plot(
                savings,
                [point.score for point in points],
                label=f"early exit, {results.exit_name}{label}",
            )
            left.fill_between(savings, low, high, alpha=0.15, color=line.get_color(), lw=0)
            left.plot(
                [100 * point.expected_saving for point in part.curve],
                [point.score for point in part.curve],
                linestyle="",
                marker="o",
                color=line.get_color(),
            )
        if part.exits[0].score is not None:
            left.plot(
                [100 * (1 - ramp.cost_ratio) for ramp in part.exits],
                [ramp.score for ramp in part.exits],
                linestyle="",
                marker="x",
                color="0.5",
                label=f"every input at one ramp{label}",
            )
            left.axhline(part.exits[-1].score, color="0.7", linestyle=":", zorder=0)
    timing = results.timing or []
    # Each precision and batch size has its own mark. A dict keeps their order.
    kinds = dict.fromkeys((case.precision, case.batch_size) for case in timing)
    for mark, (precision, batch_size) in zip(cycle("+x1234"), kinds, strict=False):
        cases = [c for c in timing if (c.precision, c.batch_size) == (precision, batch_size)]
        if not trains_ramps(results.objective) or cases[0].score is None:
            continue
        which = f", {precision}, {batch_size or 'all'}" if len(kinds) > 1 else ""
        left.plot(
            [100 * case.time_saving for case in cases],
            [case.score for case in cases],
            linestyle="",
            marker=mark,
            markersize=10,
            markeredgewidth=2,
            color="k",
            label=f"time saving{which}",
        )
    xlabel = "expected saving (% of layers)" + ("; time saving (% of time)" if timing else "")
    left.set(xlabel=xlabel, ylabel=results.metric, title=title)
    left.grid(alpha=0.3)
    if left.get_legend_handles_labels()[0]:
        left.legend()
    main = results.headline
    bottoms = [0.0] * len(main.curve)
    positions = range(len(main.curve))
    colours = plt.get_cmap("viridis")
    for layer in range(main.num_layers):
        counts = [100 * p.exit_counts[layer] / main.num_rows for p in main.curve]
        colour = colours(layer / max(1, main.num_layers - 1))
        right.bar(positions, counts, bottom=bottoms, color=colour, label=f"layer {layer + 1}")
        bottoms = [bottom + count for bottom, count in zip(bottoms, counts, strict=True)]
    right.set_xticks(positions, [_tick(p.threshold) for p in main.curve], rotation=60)
    right.set(xlabel="threshold", ylabel="% of inputs", title="Where inputs exit")
    right.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    with whole_files.replaced(file) as new:
        figure.savefig(new, dpi=120, format="png")
    plt.close(figure)


def layers(results: Results, title: str, file: Path) -> None:
    """Draw how similar the layers are: ramps, their errors, states, and the score without a layer.

    Args:
        results: results with an analysis of each layer.
        title: the title of the plot.
        file: the PNG file to write.
    """
    plt = _pyplot()
    analysis = results.headline.analysis
    numbers = np.array([ramp.layer for ramp in analysis.ramps])
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    figure.suptitle(title)
    lines: dict[str, tuple[Sequence[float | None], str]] = {
        "agrees with the last ramp": ([ramp.agreement for ramp in analysis.ramps], "o-"),
        "AUROC of confidence": ([ramp.auroc for ramp in analysis.ramps], "s:"),
        results.metric: ([row.single for row in analysis.ensemble or []], "x-"),
        "mean of the ramps so far": ([row.mean for row in analysis.ensemble or []], ".--"),
    }
    for label, (shares, style) in lines.items():
        if any(share is not None for share in shares):
            axes[0, 0].plot(numbers, np.array(shares, float), style, label=label)
    layers = analysis.layers or []
    bars: dict[str, Sequence[float | None]] = {
        "block influence": [layer.block_influence for layer in layers],
        "score lost without it": [layer.score_drop for layer in layers],
    }
    for i, (label, values) in enumerate(bars.items()):
        heights = np.array(values, float)  # None becomes NaN, which has no bar
        axes[1, 1].bar(numbers + 0.4 * i - 0.2, heights, 0.4, label=label)
    maps = [(axes[0, 1], analysis.error_correlation), (axes[1, 0], analysis.cka)]
    for axis, matrix in maps:
        shades = np.array(matrix or [[None] * len(numbers)] * len(numbers), float)
        extent = (0.5, len(shades) + 0.5) * 2
        axis.imshow(shades, vmin=0, vmax=1, cmap="Blues", origin="lower", extent=extent)
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
    with whole_files.replaced(file) as new:
        figure.savefig(new, dpi=120, format="png")
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib  # the import is slow, so it waits until something is drawn

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _tick(threshold: Thresholds) -> str:
    return "per ramp" if isinstance(threshold, list) else f"{threshold:.3g}"
