"""Log curves, tables, exits, latency and the headline of a run to W&B, and show them there.

`log_evaluation` and `log_final` take an open W&B run and results. Lightning's logger logs the
scalars of training. `deebert dashboard project=ENTITY/PROJECT` saves the view of a project; it
needs the extra `dashboard` and the W&B service. The module does not know Lightning, and imports
wandb only to log.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deebert.errors import UserError, first_line
from deebert.models.trained_ramps import trains_ramps
from deebert.options import option
from deebert.reporting.class_results import OF_ALL_CLASSES, ClassScore
from deebert.reporting.results import Results, TimedCase
from deebert.reporting.split_results import SplitResults

if TYPE_CHECKING:
    import wandb

TIMED = (
    "score", "expected_saving", "time_saving", "time_speed_up", "seconds", "seconds_full_depth",
    "seconds_threshold_0", "samples_per_second", "equal_exits", "equal_predictions",
)  # fmt: skip
CURVE = ("threshold", "score", "cost_ratio", "expected_saving", "speed_up")  # columns of a curve
EXTRA = "pip install 'deebert[dashboard]'"


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


def log_final(run: "wandb.Run", results: Results, folder: Path) -> None:
    """Log the results by which runs are compared. This is done once, at the end of a run.

    Args:
        run: an open W&B run.
        results: the results of the run.
        folder: the run folder, which holds curve.png.
    """
    import wandb

    if trains_ramps(results.objective):  # early exit has no meaning without trained ramps
        headline, *others = results.splits
        _log_curve(run, "curve", headline)
        for other in others:
            _log_curve(run, f"curve_{other.split}", other)
    if results.timing:
        _log_timing(run, results.timing)
    _log_classes(run, results.headline)
    run.summary.update(summary(results))
    run.log({"curve": [wandb.Image(str(folder / "curve.png"))]})


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


def _log_classes(run: "wandb.Run", evaluation: SplitResults) -> None:
    """Log the scores of each class as a table, and the confusion matrix as a chart."""
    import wandb

    if (classes := evaluation.classes) is None:
        return
    scores = classes.shown
    columns = [each.name for each in fields(ClassScore)]
    rows = [[getattr(score, name) for name in columns] for score in scores.per_class]
    logged: dict[str, Any] = {"classes/scores": wandb.Table(columns=columns, data=rows)}
    if scores.confusion:
        cells = [
            [label, answer, count]
            for label, counts in zip(classes.labels, scores.confusion, strict=True)
            for answer, count in zip(classes.labels, counts, strict=True)
        ]
        # `wandb.plot.confusion_matrix` draws the same, from the answer of each row.
        names = ["Actual", "Predicted", "nPredictions"]
        logged["classes/confusion"] = wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=names, data=cells),
            {name: name for name in names},
            {"title": "Confusion of labels and answers"},
        )
    run.log(logged)


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


def summary(results: Results) -> dict[str, Any]:
    """Return the values by which runs are compared, by name."""
    values: dict[str, Any] = {"full_depth/score": results.headline.exits[-1].score}
    if classes := results.headline.classes:
        for name in ("full_depth", "operating_point"):
            if scores := getattr(classes, name):
                values |= {f"{name}/{metric}": getattr(scores, metric) for metric in OF_ALL_CLASSES}
    if calibration := results.calibration:
        values |= {f"calibration/{key}": value for key, value in calibration.target.items()}
        values["calibration/score"] = calibration.measured.score
        values["calibration/expected_saving"] = calibration.measured.expected_saving
    # The headline has the first threshold of each case. The table has the others, too.
    for case in results.timing or []:
        for key, value in _timed(case).items():
            values.setdefault(f"timing/{_case(case)}/{key}", value)
    return {key: value for key, value in values.items() if value is not None}


def workspace(entity: str, project: str) -> Any:
    """Make the view: trade-off, ramps over training, thresholds, exits and plots.

    Args:
        entity: the user or team at W&B.
        project: the name of the project.
    """
    from wandb_workspaces.reports.v2 import LinePlot, MediaBrowser, ScatterPlot, SummaryMetric
    from wandb_workspaces.workspaces import Section, Workspace

    saving = "curve/expected_saving"

    def curve(title: str, name: str, **more: Any) -> Any:
        return LinePlot(
            title=title, x=saving, y=[f"curve/{name}"], title_x="expected saving", **more
        )

    def training(title: str, **more: Any) -> Any:
        return LinePlot(title=title, x="trainer/global_step", title_x="optimizer steps", **more)

    grouped: dict[str, Any] = {
        "groupby": "Group",
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "stddev",
    }
    target = [SummaryMetric(f"calibration/{name}") for name in ("expected_saving", "score")]
    sections = {
        "Score against saving": [
            curve("Every run", "score"),
            curve("Every sweep, mean and deviation", "score", **grouped),
            ScatterPlot(title="Score and saving measured for a target", x=target[0], y=target[1]),
        ],
        "Ramps over training": [
            training("Score of every ramp", metric_regex=r"val/ramp_[0-9]+/score"),
            training("Score", y=["val/score", "val/mean_ramp_score"]),
            training("Loss", y=["train/loss", "val/loss"]),
        ],
        "Thresholds": [
            curve("Threshold for a saving", "threshold"),
            training("Saving", metric_regex=r"val/threshold_.*/expected_saving"),
            training("Score", metric_regex=r"val/threshold_.*/score"),
        ],
        "Exits": [
            LinePlot(
                title="Share of the inputs that leave at each layer",
                x=saving,
                title_x="expected saving",
                metric_regex=r"curve/exit_[0-9]+",
                plot_type="stacked-area",
                max_runs_to_show=1,
            )
        ],
        "Plots": [MediaBrowser(title="curve.png", media_keys=["curve"])],
    }
    return Workspace(
        entity=entity,
        project=project,
        name="DeeBERT",
        sections=[Section(name=n, panels=p, is_open=True) for n, p in sections.items()],
    )


@dataclass
class DashboardOptions:
    """The options of `deebert dashboard`."""

    project: str = option("???", "ENTITY/PROJECT of W&B: my-team/deebert")


def run(options: DashboardOptions) -> None:
    """Save the view of a project.

    Raises:
        UserError: the project has no such name, the extra is missing, or W&B does not save it.
    """
    entity, _, project = options.project.partition("/")
    if not entity or not project or "/" in project:
        raise UserError(
            f"project={options.project} is no project; give ENTITY/PROJECT: my-team/deebert"
        )
    _save(entity, project)


def _save(entity: str, project: str) -> None:
    try:
        view = workspace(entity, project)
    except ImportError as error:
        raise UserError(f"{error}; it comes with {EXTRA}") from error
    try:
        view.save()  # it prints the address of the view
    except Exception as error:  # the errors of W&B, gql and requests have no common base class
        reason = first_line(error)
        raise UserError(f"the view was not saved, W&B says: {reason}") from error
