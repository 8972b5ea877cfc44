"""Weights & Biases, for real and offline: the log is read back with wandb's own tool."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, CommandFailed
from helpers import forked
from helpers import results as made_by_hand
from helpers.disks import of_other_modes
from helpers.timed import timed

from deebert.errors import UserError
from deebert.reporting import wandb
from deebert.reporting.results import Results
from deebert.training import loggers

ONLY_TINY = ("backbone=tiny", "data.max_length=64", "data.limit_train=64")

# wandb starts a service process of its own and leaves its sockets to the interpreter's end.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # wandb-workspaces 0.4 still uses pydantic's old validators.
    pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning"),
]
# What tracking.py logs, as against callbacks.py.
TRACKED = ("curve", "calibration/")


def inspect(folder: Path, *flags: str) -> str:
    [log] = folder.glob("wandb/offline-run-*/*.wandb")
    tool = Path(sys.executable).parent / "wandb"
    command = [str(tool), "leet", "inspect", "--json", *flags, str(log)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def history(folder: Path) -> list[dict[str, Any]]:
    records = (json.loads(line) for line in inspect(folder).splitlines())
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def charted() -> Iterator[str]:
    """The pattern of every name that the dashboard draws."""
    for section in wandb.workspace("me", "deebert").sections:
        for panel in section.panels:
            listed = [getattr(panel, "x", None), *_list(getattr(panel, "y", None))]
            listed += getattr(panel, "media_keys", [])
            yield from (re.escape(getattr(name, "name", name)) for name in listed if name)
            if regex := getattr(panel, "metric_regex", None):
                yield regex


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def assert_logged(patterns: list[str], names: set[str]) -> None:
    assert patterns
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in names), f"{pattern} is not logged"


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_sweep_leaves_a_finished_run_per_job(run: Callable[..., str], tmp_path: Path) -> None:
    run("train.py", "-m", "task=demo", "stage=1", "seed=1,2", *ONLY_TINY, "stages.1.epochs=2", "stages.1.batch_size=8", f"hydra.sweep.dir={tmp_path}")  # fmt: skip
    ids = set()
    for job, seed in (("0", 1), ("1", 2)):
        folder = tmp_path / job
        summary = json.loads(inspect(folder, "--summary"))
        config = summary["config"]
        assert config["seed"] == seed
        assert config["task"]["name"] == "demo"
        assert config["stages"]["1"]["lr"] == 3e-5, "plain nested values"
        results = json.loads((folder / "results.json").read_text())
        assert summary["summary"]["val/score"] == pytest.approx(results["exits"][-1]["score"])
        assert summary["summary"]["val/threshold_0.7/expected_saving"] == pytest.approx(2 / 3)
        records = [json.loads(line) for line in inspect(folder).splitlines()]
        started = next(record for record in records if record["type"] == "run")
        text = json.dumps(started)
        assert f'"{tmp_path.name}"' in text, "grouped under the sweep's folder"
        assert f"demo-tiny-stage1-seed{seed}" in text
        ids.add(next(folder.glob("wandb/offline-run-*")).name.rpartition("-")[2])
        logged = history(folder)
        assert sum("val/ramp_1/score" in item for item in logged) == 2, "one value an epoch"
        names = {name for item in logged for name in item}
        assert_logged([name for name in charted() if not name.startswith(TRACKED)], names)
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


@pytest.mark.slow
def test_what_runs_are_compared_by(tmp_path: Path) -> None:
    """A history that W&B overlays, the headline in the summary, exits; and the dashboard of it."""
    from lightning.pytorch.loggers import WandbLogger
    from matplotlib.figure import Figure

    picture = tmp_path / "curve.png"
    Figure().savefig(picture)
    point, ramp = made_by_hand.point, made_by_hand.ramp
    unlabelled = made_by_hand.split(
        "unlabelled",
        num_rows=4,
        exits=[ramp(1, None), ramp(2, None)],
        curve=[point(0.5, None, 0.25, (2, 2))],
    )
    # Patience and the like: a larger threshold need not come with a larger saving.
    trade_off = [
        point(0.1, 0.85, 0.1, (2, 8)), point(0.7, 0.6, 0.5, (10, 0)), point(0.6, 0.7, 0.4, (8, 2)),
    ]  # fmt: skip
    timing = [
        timed(0.1, 0.3), timed([0.5], 0.5, 0.75), timed(0.1, 0.6, precision="int8", batch_size=8),
    ]  # fmt: skip
    classes = {
        "labels": ["bad", "good"],
        "full_depth": made_by_hand.class_scores([[4, 1], [0, 5]], 2.0, 0.9),
        "operating_point": made_by_hand.class_scores([[3, 2], [1, 4]], 1.25, 0.7),
    }
    values = made_by_hand.run(
        split="validation_matched",
        curve=[point(0.0, 0.9, 0.0, (0, 10)), point(0.5, 0.8, 0.3, (6, 4))],
        trade_off=trade_off,
        classes=classes,
        calibration=made_by_hand.calibrated({"target_saving": 0.4, "per_ramp": False}, 0.72, 0.41),
        other_splits=[unlabelled],
        timing=timing,
    )
    results = Results.from_json(values)
    logger = WandbLogger(project="deebert", save_dir=str(tmp_path), offline=True)
    run = logger.experiment
    wandb.log_evaluation(run, "val", results.headline, 7)
    wandb.log_evaluation(run, "val_unlabelled", results.splits[1], 7)
    untimed = {"objective": "final", "calibration": None, "timing": None}
    wandb.log_final(run, replace(results, **untimed), tmp_path)
    assert not any(key.startswith("timing") for key in dict(run.summary))
    assert "calibration/score" not in dict(run.summary)
    wandb.log_final(run, results, tmp_path)
    run.finish()

    logged = history(tmp_path)
    curve = [item for item in logged if "curve/score" in item]
    names = ("expected_saving", "score", "threshold", "exit_1", "exit_2")
    assert [[item[f"curve/{name}"] for name in names] for item in curve] == [
        [0.1, 0.85, 0.1, 0.2, 0.8], [0.4, 0.7, 0.6, 0.8, 0.2], [0.5, 0.6, 0.7, 1.0, 0.0],
    ], "the trade-off, sorted by saving, once"  # fmt: skip
    records = [json.loads(line) for line in inspect(tmp_path).splitlines()]
    axes = {record["metric"].get("name"): record["metric"].get("step_metric") for record in records if record["type"] == "metric"}  # fmt: skip
    for name in names[1:]:
        assert axes[f"curve/{name}"] == "curve/expected_saving"
    first = next(item for item in logged if "val/curve._type" in item)
    assert first["trainer/global_step"] == 7
    assert "val/score_by_ramp_table._type" in first
    keys = {name for item in logged for name in item}
    assert not any("unlabelled/score" in key for key in keys), "no scores without labels"

    summary = json.loads(inspect(tmp_path, "--summary"))["summary"]
    headline = {key: value for key, value in summary.items() if key.startswith(("full_depth/", "calibration/", "operating_point/"))}  # fmt: skip
    assert headline == {
        "full_depth/f1_macro": 0.9, "full_depth/f1_weighted": 0.91, "full_depth/matthews": 0.8,
        "operating_point/f1_macro": 0.7, "operating_point/f1_weighted": 0.71, "operating_point/matthews": 0.6,
        "full_depth/score": 0.9, "calibration/target_saving": 0.4, "calibration/per_ramp": False,
        "calibration/score": 0.72, "calibration/expected_saving": 0.41,
    }  # fmt: skip
    times = {key: value for key, value in summary.items() if key.startswith("timing/float32/all/")}
    assert times == {
        f"timing/float32/all/{key}": pytest.approx(value)
        for key, value in {
            "score": 0.8391, "expected_saving": 0.24, "time_saving": 0.3, "time_speed_up": 1 / 0.7, "seconds": 1.4,
            "seconds_full_depth": 2.0, "seconds_threshold_0": 1.6, "samples_per_second": 10 / 1.4,
            "latency_p50_ms": 120.5, "latency_p95_ms": 130.25, "latency_p99_ms": 131.125,
            "equal_exits": 0.99, "equal_predictions": 1.0,
        }.items()
    }, "of the first threshold"  # fmt: skip
    assert summary["timing/int8/8/time_saving"] == 0.6
    assert "curve/score" not in summary, "the last point of a curve is nothing to compare"

    tables = {}
    for path in tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.table.json"):
        tables[f"{path.parent.name}/{path.name.rsplit('_', 2)[0]}"] = json.loads(path.read_text())
    assert tables["val/curve"]["columns"] == ["threshold", "score", "cost_ratio", "expected_saving", "speed_up", "exit_1", "exit_2"]  # fmt: skip
    assert tables["val/curve"]["data"][1][-2:] == [6, 4]
    assert tables["classes/scores"] == {
        "columns": ["label", "rows", "precision", "recall", "f1", "mean_exit_layer"],
        "data": [["bad", 5, 0.5, 0.6, 0.7, 1.25], ["good", 5, 0.5, 0.6, 0.7, 1.25]],
    }
    assert tables["classes/confusion_table"] == {
        "columns": ["Actual", "Predicted", "nPredictions"],
        "data": [["bad", "bad", 3], ["bad", "good", 2], ["good", "bad", 1], ["good", "good", 4]],
    }
    assert "wandb/confusion_matrix/v1" in json.dumps(records)
    assert tables["curve/exit_shares"] == {
        "columns": ["threshold", "layer", "share"],
        "data": [["0.0", "1", 0.0], ["0.0", "2", 1.0], ["0.5", "1", 0.6], ["0.5", "2", 0.4]],
    }
    listed = [dict(zip(tables["table/timing"]["columns"], row, strict=True)) for row in tables["table/timing"]["data"]]  # fmt: skip
    shown = [[row[key] for key in ("case", "threshold", "time_saving", "exit_1", "latency_p95_ms")] for row in listed]  # fmt: skip
    assert shown == [["float32/all", "0.1", 0.3, 4, 130.25], ["float32/all", "[0.5]", 0.5, 4, 130.25], ["int8/8", "0.1", 0.6, 4, 130.25]]  # fmt: skip
    assert "timing/score_vs_seconds" in json.dumps(records)
    assert tables["curve_unlabelled/exit_shares"]["data"] == [["0.5", "1", 0.5], ["0.5", "2", 0.5]]

    names = keys | {key.removesuffix("._type") for key in keys} | set(headline)
    assert_logged([name for name in charted() if name.startswith(TRACKED)], names)


LOGGED = ["task=demo", *ONLY_TINY, "stages.1.epochs=2"]


def train(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, without the variables of W&B that the tests set."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    own |= {"PYTHONPATH": str(ROOT), **environment}
    return forked.run("train.py", *LOGGED, *words, f"hydra.run.dir={folder}", env=own)


@pytest.mark.slow
def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = train(tmp_path / "run", HOME=str(tmp_path / "file" / "home"))
    assert done.returncode == 0, done.stderr
    assert "has failed" not in done.stdout + done.stderr
    assert "val/curve" in json.dumps(history(tmp_path / "run"))
    staged = "wandb/data/artifacts/staging/"  # W&B's own copies, which it makes read-only
    assert not [name for name in of_other_modes(tmp_path / "run") if not name.startswith(staged)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "run"]


@pytest.mark.slow
def test_a_failing_logger_does_not_end_a_run(tmp_path: Path) -> None:
    """W&B fails in the first epoch, and has one line."""
    (tmp_path / "file").touch()
    done = train(tmp_path / "run", WANDB_DATA_DIR=str(tmp_path / "file" / "data"))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "has failed" in line]
    assert len(lines) == 1
    assert "WandbLogger has failed, and the run goes on without it: PermissionError: Unable to write" in lines[0]  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["epoch"] == 2


@pytest.mark.slow
def test_a_missing_login_is_one_line_before_training(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    done = train(tmp_path / "run", "logger.wandb.offline=false", **environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Error: logger.wandb.offline=false: W&B has no account to log to (No API key configured")  # fmt: skip
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "csv").exists()


def test_the_mode_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for named, offline, mode in (
        (None, None, "offline"), (None, True, "offline"), (None, False, "online"),
        ("disabled", None, "disabled"), ("disabled", False, "disabled"), ("DISABLED", True, "disabled"),
        ("offline", False, "offline"), ("dryrun", False, "offline"),
        ("online", None, "online"), ("run", None, "online"), ("online", True, "offline"),
    ):  # fmt: skip
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if named is not None:
            monkeypatch.setenv("WANDB_MODE", named)
        assert loggers.wandb_mode(offline) == mode, (named, offline)
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE 'ofline' is unknown; choose one of: online"):
        loggers.wandb_mode(None)


def test_disabled_writes_nothing(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run("train.py", *LOGGED, f"hydra.run.dir={tmp_path}")
    assert not (tmp_path / "wandb").exists()
    assert (tmp_path / "csv" / "metrics.csv").exists()


def test_the_dashboard_that_cannot_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no account"))
    for place, message in (("me/deebert", "the view was not saved, W&B says: No API key"), ("deebert", "deebert is no project; give ENTITY/PROJECT")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            wandb.run(wandb.DashboardOptions(place))
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)  # not installed
    with pytest.raises(UserError, match=r"pip install 'deebert\[dashboard\]'"):
        wandb.run(wandb.DashboardOptions("me/deebert"))
