"""How the pictures of the benchmarks look: legible at the width of a page.

A picture is 8 inches wide. A page of 800 pixels shows it with letters of 14 pixels.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

TASKS = {
    "cola": "CoLA",
    "mnli": "MNLI",
    "mrpc": "MRPC",
    "qnli": "QNLI",
    "qqp": "QQP",
    "rte": "RTE",
    "sst2": "SST-2",
    "stsb": "STS-B",
    "wnli": "WNLI",
}
METRICS = {
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}
WIDTH = 8  # inches
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.labelsize": 10.5,
    "legend.fontsize": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "savefig.dpi": 200,
}


def panels(number: int, columns: int, height: float, **keywords: Any) -> tuple[Any, list[Any]]:
    """Make a figure of panels.

    Args:
        number: how many panels.
        columns: how many panels stand in a row, at most.
        height: of a row, in inches.
        **keywords: of `matplotlib.pyplot.subplots`.

    Returns:
        The figure, and the axes of its panels.
    """
    import matplotlib  # slow to import: only when something is drawn

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(STYLE)
    columns = min(columns, number)
    rows = -(-number // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height * rows), layout="constrained", squeeze=False,
        **keywords,
    )  # fmt: skip
    for axis in axes.flat[number:]:
        axis.set_visible(False)
    return figure, [*axes.flat[:number]]


def save(figure: Any, axes: Iterable[Any], file: Path, columns: int = 3) -> None:
    """Write a figure with one legend of all its panels under them."""
    from matplotlib import pyplot as plt

    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    figure.savefig(file)
    plt.close(figure)
