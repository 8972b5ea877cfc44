"""Log curves, plots and the summary of a run to TensorBoard and to MLflow.

`TensorBoard` and `MLflow` take what Lightning's loggers hold open; the scalars of training are
Lightning's work. A point of the curve is a scalar whose step is the saving in thousandths, so that
both tools draw the curves of several runs in one chart. This module imports neither tool.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deebert.models.trained_ramps import trains_ramps
from deebert.reporting.results import Results
from deebert.reporting.split_results import SplitResults
from deebert.reporting.wandb import curve_columns, curve_rows, summary

PLOTS = ("curve.png", "layers.png")
FILES = (*PLOTS, "results.json", "results.md", "report.html")


class TensorBoard:
    """What is logged to TensorBoard.

    Args:
        writer: an open `SummaryWriter`.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log_evaluation(self, prefix: str, evaluation: SplitResults, step: int) -> None:
        """Log one evaluation of one split: its curve as a table.

        Args:
            prefix: the prefix of the logged names, such as "val".
            evaluation: the results of the split.
            step: the number of optimizer steps so far.
        """
        columns = curve_columns(evaluation)
        rows = [columns, ["---"] * len(columns), *curve_rows(evaluation)]
        table = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)
        self.writer.add_text(f"{prefix}/curve", table, step)

    def log_final(self, results: Results, folder: Path) -> None:
        """Log the curve, the summary and the plots of a run.

        Args:
            results: the results of the run.
            folder: the run folder, which holds the plots.
        """
        for name, value, step in final_scalars(results):
            self.writer.add_scalar(name, value, step)
        for name in PLOTS:
            if (folder / name).exists():
                from matplotlib.image import imread

                plot_HWC = imread(folder / name)
                self.writer.add_image(Path(name).stem, plot_HWC, dataformats="HWC")
        self.writer.flush()


class MLflow:
    """What is logged to MLflow.

    Args:
        client: an open `MlflowClient`.
        run_id: the id of its run.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    def log_evaluation(self, prefix: str, evaluation: SplitResults, step: int) -> None:
        """Log one evaluation of one split: its curve as a CSV file (`TensorBoard`)."""
        text = io.StringIO()
        csv.writer(text).writerows([curve_columns(evaluation), *curve_rows(evaluation)])
        self.client.log_text(self.run_id, text.getvalue(), f"curves/{prefix}-{step}.csv")

    def log_final(self, results: Results, folder: Path) -> None:
        """Log the curve, the summary, and the files of a run as artifacts (`TensorBoard`)."""
        for name, value, step in final_scalars(results):
            self.client.log_metric(self.run_id, name, value, step=step)
        for name in FILES:
            if (folder / name).exists():
                self.client.log_artifact(self.run_id, str(folder / name))


def final_scalars(results: Results) -> Iterator[tuple[str, float, int]]:
    """Yield name, value and step of what runs are compared by.

    The steps of a curve are its savings in thousandths. Of several points with the same saving the
    one of the best score is taken.
    """
    for name, value in summary(results).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value), 0
    if not trains_ramps(results.objective):  # early exit has no meaning without trained ramps
        return
    for index, evaluation in enumerate(results.splits):
        name = f"curve_{evaluation.split}" if index else "curve"
        best: dict[int, float] = {}
        for point in evaluation.trade_off or evaluation.curve:
            if point.score is not None:
                step = round(1000 * point.expected_saving)
                best[step] = max(point.score, best.get(step, point.score))
        for step in sorted(best):
            yield f"{name}/score", best[step], step


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
