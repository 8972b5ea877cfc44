"""evaluate.py with a clock: timing=, precision=, target_speedup=."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import results
from helpers import forked

pytestmark = pytest.mark.slow

Run = Callable[..., str]


def test_timing_gives_seconds_beside_the_saving(run: Run, stage2: Path, tmp_path: Path) -> None:
    printed = run(
        "evaluate.py", f"ckpt={stage2}", "thresholds=[0,0.69]", "timing=[all,3]",
        "precision=[float32,int8]", "repeats=2", "threads=1", "logger=csv",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    result = results(tmp_path)
    cases = {(c["precision"], c["batch_size"], c["threshold"]): c for c in result["timing"]}
    assert set(cases) == {
        (precision, size, threshold)
        for precision in ("float32", "int8") for size in (None, 3) for threshold in (0.0, 0.69)
    }  # fmt: skip
    for (precision, _, threshold), case in cases.items():
        point = next(p for p in result["curve"] if p["threshold"] == threshold)
        assert case["equal_predictions"] >= (1 if precision == "float32" else 0.9)
        assert case["seconds"] > 0
        assert case["num_rows"] == 40
        assert case["threads"] == 1
        assert case["time_saving"] < 1
        assert case["time_speed_up"] == pytest.approx(1 / (1 - case["time_saving"]))
        latency = case["latency_ms"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
        if precision == "float32":
            assert case["equal_exits"] == 1
            assert case["exit_counts"] == point["exit_counts"]
            assert case["score"] == point["score"]
            assert case["expected_saving"] == pytest.approx(point["expected_saving"])
    # 40 inputs in requests of 3 are 14 requests: one of them takes less than all inputs do.
    small, large = cases["float32", 3, 0.0], cases["float32", None, 0.0]
    assert small["latency_ms"]["p50"] < large["latency_ms"]["p50"]
    assert "Latency: " in printed
    assert torch.get_num_threads() == 1


def test_layers_in_onnx_runtime(run: Run, stage2: Path, tmp_path: Path) -> None:
    run(
        "evaluate.py", f"ckpt={stage2}", "threshold=0.69", "timing=all", "runtime=onnx",
        "repeats=1", "logger=csv", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    [case] = results(tmp_path)["timing"]
    assert case["runtime"] == "onnx"
    assert case["seconds_full_depth"] == case["seconds_threshold_0"]  # not torch's
    assert case["equal_exits"] == case["equal_predictions"] == 1
    assert "float32 (onnx)" in (tmp_path / "results.md").read_text()


def test_onnx_runtime_takes_the_threads_it_is_given(stage2: Path, tmp_path: Path) -> None:
    """In a process of its own: they are started once."""
    done = forked.run(
        "evaluate.py", f"ckpt={stage2}", "threshold=0.69", "timing=all",
        "runtime=onnx", "threads=2", "repeats=1", "logger=csv", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [case] = results(tmp_path)["timing"]
    assert (case["runtime"], case["threads"]) == ("onnx", 2), "OMP_NUM_THREADS says 1"


def test_a_target_speed_up_is_timed_on_unseen_rows(run: Run, stage2: Path, tmp_path: Path) -> None:
    run(
        "evaluate.py", f"ckpt={stage2}", "target_speedup=1.02", "repeats=3", "logger=csv",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    result = results(tmp_path)
    calibration, [case] = result["calibration"], result["timing"]
    assert calibration["target"] == {"target_speedup": 1.02}
    costs = calibration["expected"]["costs"]
    assert len(costs) == result["num_layers"]
    assert all(cost > 0 for cost in costs)
    assert costs[0] < costs[-1]
    assert calibration["expected"]["time_speed_up"] >= 1.02
    # Cross-fitted: what each fifth of the rows ran with was chosen on the other four.
    assert case["threshold"] == calibration["fold_thresholds"]
    assert case["exit_counts"] == calibration["measured"]["exit_counts"]
    assert case["equal_exits"] == 1


@pytest.mark.parametrize("rule", ["vote", "margin"])
def test_the_engine_runs_any_exit_rule(run: Run, stage2: Path, tmp_path: Path, rule: str) -> None:
    run(
        "evaluate.py", f"ckpt={stage2}", f"exit={rule}", "target_saving=0.3", "timing=all",
        "repeats=1", "logger=csv", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    result = results(tmp_path)
    [case] = result["timing"]
    assert case["equal_exits"] == 1
    assert case["exit_counts"] == result["calibration"]["measured"]["exit_counts"]
    assert case["score"] == pytest.approx(result["calibration"]["measured"]["score"])


def test_temperatures_and_a_threshold_for_each_ramp(run: Run, stage2: Path, tmp_path: Path) -> None:
    run(
        "evaluate.py", f"ckpt={stage2}", "temperature=[2,0.5,1]", "threshold=[0.6,0.69]",
        "timing=1", "repeats=1", "logger=csv", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    result = results(tmp_path)
    [case] = result["timing"]
    assert case["threshold"] == [0.6, 0.69]
    assert result["exit"]["temperatures"] == [2, 0.5, 1], "a threshold means nothing without them"
    assert case["exit_counts"] == result["curve"][0]["exit_counts"]
    assert case["equal_exits"] == 1
