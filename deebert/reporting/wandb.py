"""Log curves, tables, exits, latency and the headline of a run to W&B.

A function takes an open W&B run and results. Lightning's logger
logs the scalars of training. The module does not know Lightning, and imports wandb only to log.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deebert.models.trained_ramps import trains_ramps
from deebert.reporting.results import Results, TimedCase
from deebert.reporting.split_results import SplitResults

if TYPE_CHECKING:
    import wandb

TIMED = (
    "score", "expected_saving", "time_saving", "time_speed_up", "seconds", "seconds_full_depth",
    "seconds_threshold_0", "samples_per_second", "equal_exits", "equal_predictions",
)  # fmt: skip
CURVE = ("threshold", "score", "cost_ratio", "expected_saving", "speed_up")  # columns of a curve


def curve_columns(evaluation: SplitResults) -> list[str]:
    """Return the column names of a curve, in W&B and in CSV files."""
    return [*CURVE, *(f"exit_{layer + 1}" for layer in range(evaluation.num_layers))]


def curve_rows(evaluation: SplitResults) -> list[list[Any]]:
    """Return the values of `curve_columns` for each threshold of a curve."""
    points = evaluation.curve
    return [[*(getattr(point, name) for name in CURVE), *point.exit_counts] for point in points]


def log_evaluation(run: "wandb.Run", prefix: str, evaluation: SplitResults, step: int) -> None:
    """Log one evaluation of one split: its curve as a table, and charts.

    Args:
        run: an open W&B run.
        prefix: the prefix of the logged names, such as "val", "test" or "val_mismatched".
        evaluation: the results of the split.
        step: the number of optimizer steps so far.
    """
    import wandb

    table = wandb.Table(columns=curve_columns(evaluation), data=curve_rows(evaluation))
    logged: dict[str, Any] = {f"{prefix}/curve": table, "trainer/global_step": step}
    if evaluation.exits[-1].score is not None:
        ramps = [[str(ramp.layer), ramp.score] for ramp in evaluation.exits]
        logged[f"{prefix}/score_vs_saving"] = wandb.plot.line(
            table, "expected_saving", "score", title="Score against expected saving"
        )
        logged[f"{prefix}/score_by_ramp"] = wandb.plot.bar(
            wandb.Table(columns=["layer", "score"], data=ramps),
            "layer",
            "score",
            title="Score of every ramp",
        )
    run.log(logged)


def log_final(run: "wandb.Run", results: Results, plot: Path) -> None:
    """Log the results by which runs are compared. This is done once, at the end of a run.

    Args:
        run: an open W&B run.
        results: the results of the run.
        plot: the file curve.png.
    """
    import wandb

    if trains_ramps(results.objective):  # early exit has no meaning without trained ramps
        headline, *others = results.splits
        _log_curve(run, "curve", headline)
        for other in others:
            _log_curve(run, f"curve_{other.split}", other)
    if results.timing:
        _log_timing(run, results.timing)
    run.summary.update(_headline(results))
    run.log({"curve": [wandb.Image(str(plot))]})


def _log_curve(run: "wandb.Run", name: str, evaluation: SplitResults) -> None:
    """Log the trade-off as history, which W&B can draw in one chart for all runs of a group.

    A line chart of a table shows one run. A chart of the history shows every run, and its x axis
    can be any logged value.
    """
    import wandb

    points = evaluation.trade_off or evaluation.curve
    shares = [
        [str(point.threshold), str(layer), count / evaluation.num_rows]
        for point in evaluation.curve
        for layer, count in enumerate(point.exit_counts, 1)
    ]
    run.log(
        {f"{name}/exit_shares": wandb.Table(columns=["threshold", "layer", "share"], data=shares)}
    )
    if points[0].score is None:
        return
    saving = f"{name}/expected_saving"
    run.define_metric(saving, summary="none")
    exits = [f"{name}/exit_{layer}" for layer in range(1, evaluation.num_layers + 1)]
    # The metrics are defined by name, as "curve/*" would clash with the "*" of Lightning's logger.
    # There is no summary: it would be the point of the largest saving, which compares no runs.
    for metric in (f"{name}/score", f"{name}/threshold", *exits):
        run.define_metric(metric, step_metric=saving, summary="none")
    for point in sorted(points, key=lambda point: point.expected_saving):
        values = {saving: point.expected_saving, f"{name}/score": point.score}
        if not isinstance(point.threshold, list):  # a list has a threshold for each ramp
            values[f"{name}/threshold"] = point.threshold
        counts = zip(exits, point.exit_counts, strict=True)
        run.log(values | {metric: count / evaluation.num_rows for metric, count in counts})


def _log_timing(run: "wandb.Run", timing: Sequence[TimedCase]) -> None:
    """Log the measured times as a table and, with several thresholds, as a chart of each case."""
    import wandb

    rows = [
        {"case": _case(case), "threshold": str(case.threshold)}
        | {key: getattr(case, key) for key in ("num_rows", "repeats", "threads", "device")}
        | _timed(case)
        | {f"exit_{layer}": count for layer, count in enumerate(case.exit_counts, 1)}
        for case in timing
    ]
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    logged: dict[str, Any] = {"timing": table}
    if len({row["threshold"] for row in rows}) > 1 and rows[0]["score"] is not None:
        logged["timing/score_vs_seconds"] = wandb.plot.line(
            table, "seconds", "score", stroke="case", title="Score against seconds"
        )
    run.log(logged)


def _case(case: TimedCase) -> str:
    """Return the name of a timed case without its threshold: "float32/all", "onnx-int8/8"."""
    runtime = "" if case.runtime == "torch" else f"{case.runtime}-"
    return f"{runtime}{case.precision}/{case.batch_size or 'all'}"


def _timed(case: TimedCase) -> dict[str, Any]:
    latencies = {f"latency_{name}_ms": value for name, value in case.latency_ms.items()}
    return {key: getattr(case, key) for key in TIMED} | latencies


def _headline(results: Results) -> dict[str, Any]:
    values: dict[str, Any] = {"full_depth/score": results.headline.exits[-1].score}
    if calibration := results.calibration:
        values |= {f"calibration/{key}": value for key, value in calibration.target.items()}
        values["calibration/score"] = calibration.measured.score
        values["calibration/expected_saving"] = calibration.measured.expected_saving
    # The headline has the first threshold of each case. The table has the others, too.
    for case in results.timing or []:
        for key, value in _timed(case).items():
            values.setdefault(f"timing/{_case(case)}/{key}", value)
    return {key: value for key, value in values.items() if value is not None}
