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
from deebert.reporting.results import Calibration, Results
from deebert.reporting.split_results import SplitResults
from deebert.reporting.tables import points_by_saving


def curve(results: Results, title: str, file: Path) -> None:
    """Draw score against expected saving, with the target's point, and the exit layers."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 5.2), layout="constrained", width_ratios=[3, 2]
    )
    for part in results.splits:
        if part.exits[0].score is not None:
            _trade_off(left, results, part)
    if results.calibration:
        _target(left, results, results.calibration)
    _times(left, results)
    xlabel = "expected saving (% of layers)"
    xlabel += "; time saving (% of time)" if results.timing else ""
    left.set(xlabel=xlabel, ylabel=results.metric, title=title)
    left.grid(alpha=0.3)
    if left.get_legend_handles_labels()[0]:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _exit_layers(right, results.headline, plt.get_cmap("viridis"))
    with whole_files.replaced(file) as new:
        figure.savefig(new, dpi=150, format="png")
    plt.close(figure)


def _trade_off(axis: Any, results: Results, part: SplitResults) -> None:
    """Draw the curve of a split with its band, each ramp for all inputs, and full depth."""
    split = "" if part is results.headline else f" ({part.split})"
    colour = f"C{results.splits.index(part)}"
    if trains_ramps(results.objective):
        points = part.trade_off or []
        savings = [100 * point.expected_saving for point in points]
        intervals = [point.score_interval or [] for point in points]  # each has one
        low, high = zip(*intervals, strict=True)
        axis.plot(
            savings,
            [point.score for point in points],
            color=colour,
            label=f"early exit, {results.exit_name}{split}",
        )
        axis.fill_between(
            savings, low, high, alpha=0.15, color=colour, lw=0, label=f"its 95 % interval{split}"
        )
        axis.plot(
            [100 * point.expected_saving for point in part.curve],
            [point.score for point in part.curve],
            linestyle="",
            marker=".",
            color=colour,
            label=f"thresholds in results.json{split}",
        )
    axis.plot(
        [100 * (1 - ramp.cost_ratio) for ramp in part.exits],
        [ramp.score for ramp in part.exits],
        linestyle="",
        marker="x",
        color="0.5",
        label=f"every input at one ramp{split}",
    )
    full = part.exits[-1].score
    axis.axhline(full, color="0.5", ls=":", zorder=0, label=f"full depth, {full:.3f}{split}")


def _target(axis: Any, results: Results, calibration: Calibration) -> None:
    """Draw the point that was measured for the target, for each split.

    It is full depth where no threshold can give the guarantee.
    """
    outcomes = {
        results.headline.split: calibration.measured, **(calibration.measured_elsewhere or {})
    }  # fmt: skip
    for colour, (split, outcome) in enumerate(outcomes.items(), 3):
        saving, score = outcome.expected_saving, outcome.score
        if calibration.thresholds == 0:
            saving, score = 0.0, outcome.full_depth_score
        if score is not None:
            where = f" ({split})" if len(outcomes) > 1 else ""
            reached = f"{100 * saving:.1f} %, {score:.3f}"
            axis.plot(
                100 * saving,
                score,
                linestyle="",
                marker="o",
                markersize=11,
                markeredgewidth=2,
                markerfacecolor="none",
                markeredgecolor=f"C{colour}",
                zorder=4,
                label=f"your target: {reached}{where}",
            )


def _times(axis: Any, results: Results) -> None:
    """Draw the measured times, with a mark for each precision and batch size."""
    timing = results.timing or []
    # Each precision and batch size has its own mark. A dict keeps their order.
    kinds = dict.fromkeys((case.precision, case.batch_size) for case in timing)
    for mark, (precision, batch_size) in zip(cycle("+x1234"), kinds, strict=False):
        cases = [c for c in timing if (c.precision, c.batch_size) == (precision, batch_size)]
        if not trains_ramps(results.objective) or cases[0].score is None:
            continue
        which = f", {precision}, {batch_size or 'all'}" if len(kinds) > 1 else ""
        axis.plot(
            [100 * case.time_saving for case in cases],
            [case.score for case in cases],
            linestyle="",
            marker=mark,
            markersize=10,
            markeredgewidth=2,
            color="k",
            label=f"time saving{which}",
        )


def _exit_layers(axis: Any, part: SplitResults, colours: Any) -> None:
    """Draw the share of the inputs that leave at each layer, a bar for each point of the table."""
    points = points_by_saving(part)
    bottoms = [0.0] * len(points)
    positions = range(len(points))
    for layer in range(part.num_layers):
        counts = [100 * p.exit_counts[layer] / part.num_rows for p in points]
        colour = colours(layer / max(1, part.num_layers - 1))
        axis.bar(positions, counts, bottom=bottoms, color=colour, label=str(layer + 1))
        bottoms = [bottom + count for bottom, count in zip(bottoms, counts, strict=True)]
    axis.set_xticks(positions, [f"{100 * p.expected_saving:.0f}" for p in points])
    axis.set(xlabel="expected saving (% of layers)", ylabel="% of inputs", title="Exit layers")
    axis.legend(
        title="layer", fontsize=8.5, labelspacing=0.25, loc="upper left", bbox_to_anchor=(1, 1)
    )


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
