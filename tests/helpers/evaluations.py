"""Results of evaluations that were made by hand: with every optional field, and with none."""

import math
from typing import Any

LAYERS = 6

HOSTILE = "</script><script>window.hacked=1</script><!--<img src=x onerror=window.hacked=2>"

LENGTH_BINS = [(4, 9), (10, 14), (15, 21), (22, 34), (35, 64)]


def exits_at(depth: float, rows: int) -> list[int]:
    """Exit counts that move from the last layer to the first as depth falls from 1 to 0."""
    centre = 1 + (LAYERS - 1) * depth
    weights = [math.exp(-((layer - centre) ** 2) / 3) for layer in range(1, LAYERS + 1)]
    if depth == 1:
        weights = [0.0] * (LAYERS - 1) + [1.0]
    counts = [int(rows * weight / sum(weights)) for weight in weights]
    counts[weights.index(max(weights))] += rows - sum(counts)
    return counts


def point(threshold: float, depth: float, rows: int, best: float) -> dict[str, Any]:
    counts = exits_at(depth, rows)
    mean = sum(layer * count for layer, count in enumerate(counts, 1)) / rows
    saving = 1 - mean / LAYERS
    score = best - 0.21 * saving**2.4 + 0.012 * saving
    return {
        "threshold": threshold,
        "score": score,
        "scores": {"f1": score, "accuracy": score - 0.0437},
        "cost_ratio": mean / LAYERS,
        "expected_saving": saving,
        "speed_up": LAYERS / mean,
        "exit_counts": counts,
        "mean_exit_layer": {"news": max(1.0, mean - 0.31), "forum": min(LAYERS, mean + 0.27)},
        "score_interval": [score - 0.021 - 0.01 * saving, score + 0.02],
        "mean_exit_layer_by_length": [
            None if index == 4 and depth < 0.3 else min(LAYERS, mean * (0.85 + 0.08 * index))
            for index in range(len(LENGTH_BINS))
        ],
    }


def evaluation(split: str, rows: int, best: float) -> dict[str, Any]:
    ramps = range(1, LAYERS + 1)
    last = best - 0.0004
    ramp_scores = [best - 0.034 * (LAYERS - layer) ** 1.3 - 0.0004 for layer in ramps]
    table = [0.0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    paper = [point(threshold, 1 - index / 12, rows, best) for index, threshold in enumerate(table)]
    for row in paper:
        del row["score_interval"], row["mean_exit_layer_by_length"]
    return {
        "split": split,
        "num_rows": rows,
        "num_layers": LAYERS,
        "exits": [
            {
                "layer": layer,
                "score": score,
                "scores": {"f1": score, "accuracy": score - 0.04},
                "cost_ratio": layer / LAYERS,
            }
            for layer, score in zip(ramps, ramp_scores, strict=True)
        ],
        "curve": paper,
        "trade_off": [point(0.0117 * i**1.01, 1 - i / 59, rows, best) for i in range(60)],
        "length_bins": [
            {"low": low, "high": high + (high < 64), "count": rows // 5}
            for low, high in LENGTH_BINS
        ],
        "analysis": {
            "oracle": {
                "score": best + 0.052,
                "expected_saving": 0.713,
                "exit_counts": exits_at(0.1, rows),
            },
            "overthinking_rate": 0.0631,
            "ramps": [
                {
                    "layer": layer,
                    "agreement": 1 - 0.05 * (LAYERS - layer),
                    "auroc": None if layer == 1 else 0.6 + 0.04 * layer,
                    "ece": 0.09 - 0.01 * layer,
                    "reliability": [
                        {
                            "confidence": 0.525 + 0.05 * index,
                            "accuracy": min(1, 0.5 + (0.032 + 0.003 * layer) * index),
                            "count": (index + 1) ** 2,
                        }
                        for index in range(10)
                    ],
                }
                for layer in ramps
            ],
            "error_correlation": [
                [None if {a, b} == {1, 6} else 1 - 0.17 * abs(a - b) for b in ramps] for a in ramps
            ],
            "layers": [
                {
                    "layer": layer,
                    "block_influence": 0.4 / layer,
                    "score_without": last - 0.1 / layer,
                    "cka_with_last": layer / LAYERS,
                }
                for layer in ramps
            ],
        },
        "examples": {
            "first": [
                {
                    "text": HOSTILE,
                    "label": "positive",
                    "prediction": "positive",
                    "layer": 1,
                    "length": 19,
                },
                {
                    "text": "a warm and funny film",
                    "label": "positive",
                    "prediction": "positive",
                    "layer": 1,
                    "length": 7,
                },
            ],
            "last": [
                {
                    "text": "not that the plot, such as it is, would have gained from being less of "
                    "a joke that forgets where it began",
                    "label": "negative",
                    "prediction": "positive",
                    "layer": 6,
                    "length": 27,
                }
            ],
        },
    }


def full_results() -> dict[str, Any]:
    """Everything results.json may hold, of two splits."""
    return {
        "schema": 1,
        "task": "mrpc",
        "backbone": "bert-tiny-of-six-layers",
        "stage": 2,
        "objective": "all",
        "seed": 42,
        "metric": "f1",
        "ckpt": "runs/2025-01-02/13-14-15",
        "exit": {"name": "entropy"},
        "environment": {
            "python": "3.11.2",
            "versions": {"deebert": "0.1.0", "torch": "2.7.0+cpu"},
            "device": "x86_64",
            "cpus": 2,
            "threads": 2,
            "git_commit": "0123456789abcdef",
            "platform": "Linux",
        },
        **evaluation("validation_matched", 4080, 0.8584),
        "other_splits": [evaluation("validation_mismatched", 3610, 0.8212)],
        "calibration": {
            "target": {"target_saving": 0.4},
            "rule": "entropy",
            "thresholds": [0.31, 0.29, 0.25, 0.2, 0.11],
            "calibration_split": "train_held_out",
            "num_calibration": 500,
            "expected": {
                "score": 0.8462,
                "score_interval": [0.81, 0.8811],
                "expected_saving": 0.4031,
                "interval": [0.37, 0.43],
            },
            "measured": {
                "score": 0.8391,
                "expected_saving": 0.3918,
                "full_depth_score": 0.858,
                "exit_counts": exits_at(0.6, 4080),
            },
            "measured_elsewhere": {
                "validation_mismatched": {
                    "score": 0.8012,
                    "expected_saving": 0.377,
                    "full_depth_score": 0.8208,
                    "exit_counts": exits_at(0.62, 3610),
                }
            },
        },
    }


def bare_results() -> dict[str, Any]:
    """No optional field, no labels."""
    results = full_results()
    kept = ("task", "backbone", "stage", "objective", "seed", "metric", "environment")
    kept += ("split", "num_rows", "num_layers", "exits", "curve")
    results = {name: results[name] for name in kept}
    for row in results["exits"] + results["curve"]:
        row |= {"score": None, "scores": {}}
        row.pop("mean_exit_layer", None)
    return results
