"""Blocks of results.json, by hand: every key that the file always has."""

from typing import Any


def ramp(layer: int, score: float | None, num_layers: int = 2) -> dict[str, Any]:
    """The scores of a ramp."""
    scores = {} if score is None else {"f1": score}
    return {"layer": layer, "score": score, "scores": scores, "cost_ratio": layer / num_layers}


def outcome(score: float | None, saving: float, counts: tuple[int, ...] = ()) -> dict[str, Any]:
    """What rows show that leave early."""
    return {
        "score": score,
        "scores": {} if score is None else {"f1": score},
        "cost_ratio": 1 - saving,
        "expected_saving": saving,
        "speed_up": 1 / (1 - saving),
        "exit_counts": list(counts),
    }


def point(
    threshold: Any, score: float | None, saving: float, counts: tuple[int, ...] = ()
) -> dict[str, Any]:
    """A point of a curve."""
    return {"threshold": threshold} | outcome(score, saving, counts)


def measured(score: float | None, saving: float, **more: Any) -> dict[str, Any]:
    """What a target's rows show."""
    compared = {"full_depth_score": 0.9, "disagreement": 0.0, "excess": 0.0}
    return outcome(score, saving, (1,)) | compared | more


def calibrated(target: dict[str, Any], score: float, saving: float, **more: Any) -> dict[str, Any]:
    """The operating point for a target."""
    return {
        "target": target, "rule": "entropy", "temperatures": None, "prior": None, "thresholds": 0.1,
        "calibration_split": "calibration", "num_calibration": 24, "notes": [],
        "expected": measured(score, saving), "measured": measured(score, saving),
    } | more  # fmt: skip


def class_scores(confusion: list[list[int]], layer: float | None, f1: float) -> dict[str, Any]:
    """The scores of two classes, `bad` and `good`, or of the labels a, b, c, ..."""
    labels = ["bad", "good"] if len(confusion) == 2 else map(chr, range(97, 97 + len(confusion)))
    return {
        "confusion": confusion, "f1_macro": f1, "f1_weighted": f1 + 0.01, "matthews": f1 - 0.1,
        "per_class": [
            {"label": label, "rows": sum(row), "precision": 0.5, "recall": 0.6, "f1": 0.7,
             "mean_exit_layer": layer}
            for label, row in zip(labels, confusion, strict=True)
        ],
    }  # fmt: skip


def split(name: str = "validation", **values: Any) -> dict[str, Any]:
    """The results of a split."""
    return {
        "split": name, "num_rows": 10, "num_layers": 2, "exits": [ramp(1, 0.6), ramp(2, 0.9)],
        "curve": [],
    } | values  # fmt: skip


def run(**values: Any) -> dict[str, Any]:
    """A whole results.json, of one split."""
    return {
        "task": "mrpc", "backbone": "tiny", "stage": 2, "objective": "ramps", "seed": 1,
        "metric": "f1",
    } | split() | values  # fmt: skip
