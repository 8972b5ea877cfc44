"""What a W&B run is told beside the scalars: curves, tables, exits, times, headline.

Takes an open run and what curves.py or results.json say of a split. Knows nothing of Lightning,
and imports wandb only when there is a run to log to.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deebert.models.trained_ramps import trains_ramps

if TYPE_CHECKING:
    import wandb

TIMED = (
    "score", "expected_saving", "time_saving", "time_speed_up", "seconds", "seconds_full_depth",
    "seconds_threshold_0", "samples_per_second", "equal_exits", "equal_predictions",
)  # fmt: skip
CURVE = ("threshold", "score", "cost_ratio", "expected_saving", "speed_up")  # of a written curve


def curve_columns(evaluation: Mapping[str, Any]) -> list[str]:
    """The columns of a written curve, here and in csv."""
    return [*CURVE, *(f"exit_{layer + 1}" for layer in range(evaluation["num_layers"]))]


def curve_rows(evaluation: Mapping[str, Any]) -> list[list[Any]]:
    """A row a threshold, under `curve_columns`."""
    points = evaluation["curve"]
    return [[*(point[name] for name in CURVE), *point["exit_counts"]] for point in points]


def log_evaluation(run: "wandb.Run", prefix: str, evaluation: Mapping[str, Any], step: int) -> None:
    """One validation or test of one split: its thresholds as a table, and its charts.

    Args:
        prefix: of the logged names: "val", "test", "val_mismatched".
        step: optimizer steps so far.
    """
    import wandb

    table = wandb.Table(columns=curve_columns(evaluation), data=curve_rows(evaluation))
    logged: dict[str, Any] = {f"{prefix}/curve": table, "trainer/global_step": step}
    if evaluation["exits"][-1]["score"] is not None:
        ramps = [[str(ramp["layer"]), ramp["score"]] for ramp in evaluation["exits"]]
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


def log_final(run: "wandb.Run", results: Mapping[str, Any], picture: Path) -> None:
    """Once, at the end of a run: what runs are compared by.

    Args:
        results: as in results.json.
        picture: curve.png.
    """
    import wandb

    if trains_ramps(results["objective"]):  # exits at untrained ramps mean nothing
        _log_curve(run, "curve", results)
        for other in results.get("other_splits", []):
            _log_curve(run, f"curve_{other['split']}", other)
    if timing := results.get("timing"):
        _log_timing(run, timing)
    run.summary.update(_headline(results))
    run.log({"curve": [wandb.Image(str(picture))]})


def _log_curve(run: "wandb.Run", name: str, evaluation: Mapping[str, Any]) -> None:
    """The trade-off as history: the one form that W&B overlays for all runs of a group.

    A table's line chart shows one run; history shows every run, with any logged value as x axis.
    """
    import wandb

    points = evaluation.get("trade_off") or evaluation["curve"]
    shares = [
        [str(point["threshold"]), str(layer), count / evaluation["num_rows"]]
        for point in evaluation["curve"]
        for layer, count in enumerate(point["exit_counts"], 1)
    ]
    run.log(
        {f"{name}/exit_shares": wandb.Table(columns=["threshold", "layer", "share"], data=shares)}
    )
    if points[0]["score"] is None:
        return
    saving = f"{name}/expected_saving"
    run.define_metric(saving, summary="none")
    exits = [f"{name}/exit_{layer}" for layer in range(1, evaluation["num_layers"] + 1)]
    # By name: "curve/*" would compete with the "*" of Lightning's logger. The summary would hold
    # the point of the largest saving, which is nothing to compare runs by.
    for metric in (f"{name}/score", f"{name}/threshold", *exits):
        run.define_metric(metric, step_metric=saving, summary="none")
    for point in sorted(points, key=lambda point: point["expected_saving"]):
        values = {saving: point["expected_saving"], f"{name}/score": point["score"]}
        if not isinstance(point["threshold"], list):  # a list: one for each ramp
            values[f"{name}/threshold"] = point["threshold"]
        counts = zip(exits, point["exit_counts"], strict=True)
        run.log(values | {metric: count / evaluation["num_rows"] for metric, count in counts})


def _log_timing(run: "wandb.Run", timing: Sequence[Mapping[str, Any]]) -> None:
    """All that was timed as a table; with several thresholds also a chart, a line per case."""
    import wandb

    rows = [
        {"case": _case(case), "threshold": str(case["threshold"])}
        | {key: case[key] for key in ("num_rows", "repeats", "threads", "device")}
        | _timed(case)
        | {f"exit_{layer}": count for layer, count in enumerate(case["exit_counts"], 1)}
        for case in timing
    ]
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    logged: dict[str, Any] = {"timing": table}
    if len({row["threshold"] for row in rows}) > 1 and rows[0]["score"] is not None:
        logged["timing/score_vs_seconds"] = wandb.plot.line(
            table, "seconds", "score", stroke="case", title="Score against seconds"
        )
    run.log(logged)


def _case(case: Mapping[str, Any]) -> str:
    """What was timed, but for the threshold: "float32/all", "onnx-int8/8"."""
    runtime = "" if case.get("runtime", "torch") == "torch" else f"{case['runtime']}-"
    return f"{runtime}{case['precision']}/{case['batch_size'] or 'all'}"


def _timed(case: Mapping[str, Any]) -> dict[str, Any]:
    latencies = {f"latency_{name}_ms": value for name, value in case["latency_ms"].items()}
    return {key: case[key] for key in TIMED} | latencies


def _headline(results: Mapping[str, Any]) -> dict[str, Any]:
    values = {"full_depth/score": results["exits"][-1]["score"]}
    if calibration := results.get("calibration"):
        values |= {f"calibration/{key}": value for key, value in calibration["target"].items()}
        for key in ("score", "expected_saving"):
            values[f"calibration/{key}"] = calibration["measured"][key]
    # Of the first threshold of each case; the others are in the table.
    for case in results.get("timing") or []:
        for key, value in _timed(case).items():
            values.setdefault(f"timing/{_case(case)}/{key}", value)
    return {key: value for key, value in values.items() if value is not None}
