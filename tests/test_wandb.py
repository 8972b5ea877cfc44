"""Weights & Biases, for real and offline: the log is read back with wandb's own tool."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CommandFailed

ONLY_TINY = ("backbone=tiny", "data.max_length=64", "data.limit_train=64")

# wandb starts a service process of its own and leaves its sockets to the interpreter's end.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def inspect(folder: Path, *flags: str) -> str:
    [log] = folder.glob("wandb/offline-run-*/*.wandb")
    tool = Path(sys.executable).parent / "wandb"
    command = [str(tool), "leet", "inspect", "--json", *flags, str(log)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_a_failing_job_leaves_no_open_run_to_the_next(
    run: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(CommandFailed, match="64-wide"):
        run("train.py", "-m", "task=demo", "trainer.precision=64-wide,32-true", *ONLY_TINY, "stages.1.epochs=1", f"hydra.sweep.dir={tmp_path}")  # fmt: skip
    assert not list((tmp_path / "0").glob("wandb/*.wandb"))
    assert (
        json.loads(inspect(tmp_path / "1", "--summary"))["config"]["trainer"]["precision"]
        == "32-true"
    )


def test_a_sweep_leaves_a_finished_run_per_job(run: Callable[..., str], tmp_path: Path) -> None:
    run("train.py", "-m", "task=demo", "stage=1", "seed=1,2", *ONLY_TINY, "stages.1.epochs=2", f"hydra.sweep.dir={tmp_path}")  # fmt: skip
    ids = set()
    for job, seed in (("0", 1), ("1", 2)):
        folder = tmp_path / job
        summary = json.loads(inspect(folder, "--summary"))
        config = summary["config"]
        assert config["seed"] == seed
        assert config["task"]["name"] == "demo"
        assert config["stages"]["1"]["lr"] == 2e-5, "plain nested values"
        results = json.loads((folder / "results.json").read_text())
        assert summary["summary"]["val/score"] == pytest.approx(results["exits"][-1]["score"])
        assert summary["summary"]["val/threshold_0.7/expected_saving"] == pytest.approx(2 / 3)
        records = [json.loads(line) for line in inspect(folder).splitlines()]
        started = next(record for record in records if record["type"] == "run")
        text = json.dumps(started)
        assert f'"{tmp_path.name}"' in text, "grouped under the sweep's folder"
        assert f"demo-tiny-stage1-seed{seed}" in text
        ids.add(next(folder.glob("wandb/offline-run-*")).name.rpartition("-")[2])
        history = json.dumps([record for record in records if record["type"] == "history"])
        assert history.count("val/ramp_1/score") >= 2, "one value an epoch"
        assert any(record["type"] == "exit" for record in records), "the run was finished"
        media = {path.name.split("_")[0] for path in folder.glob("wandb/offline-run-*/files/media/*/*.*")}  # fmt: skip
        assert "curve" in media, "the picture"
        tables = list(folder.glob("wandb/offline-run-*/files/media/table/val/*.table.json"))
        curves = [json.loads(path.read_text()) for path in tables if path.name.startswith("curve_")]
        assert len(curves) == 2, "a table an epoch"
        assert curves[0]["columns"][:5] == ["threshold", "score", "cost_ratio", "expected_saving", "speed_up"]  # fmt: skip
        assert len(curves[0]["data"]) == 13
        assert "score_vs_saving" in json.dumps(summary["config"]) + json.dumps(records)
    assert len(ids) == 2, "two runs, not one shared one"
