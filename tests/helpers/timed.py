"""What results.json holds under `timing`, by hand: test_report_timing.py checks it against speed.py."""

from typing import Any


def timed(
    threshold: Any = 0.31,
    saving: float = 0.4,
    score: float | None = 0.8391,
    *,
    precision: str = "float32",
    batch_size: int | None = None,
    counts: tuple[int, ...] = (4, 3, 3),
    **values: Any,
) -> dict[str, Any]:
    """One timed threshold; `saving` is of time."""
    num_rows = sum(counts)
    return {
        "protocol": "all inputs, in batches of similar length"
        if batch_size is None
        else "requests of so many inputs, one after the other",
        "precision": precision,
        "runtime": "torch",
        "batch_size": batch_size,
        "threads": 1,
        "device": "cpu",
        "repeats": 3,
        "num_rows": num_rows,
        "threshold": threshold,
        "seconds": 2.0 * (1 - saving),
        "seconds_full_depth": 2.0,
        "seconds_threshold_0": 1.6,
        "time_saving": saving,
        "time_speed_up": 1 / (1 - saving),
        "expected_saving": 0.8 * saving,
        "samples_per_second": num_rows / (2.0 * (1 - saving)),
        "latency_ms": {"p50": 120.5, "p95": 130.25, "p99": 131.125},
        "latency_ms_full_depth": {"p50": 200.5, "p95": 210.25, "p99": 211.125},
        "score": score,
        "score_full_depth": None if score is None else 0.8584,
        "exit_counts": list(counts),
        "equal_exits": 0.99,
        "equal_predictions": 1.0,
    } | values
