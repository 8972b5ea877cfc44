"""TensorBoard and MLflow, for real: what a run has written is read back with their own readers.

And the presets. A test that needs a package of an extra which is not installed is left out
(`pip install -e '.[tensorboard,mlflow,optuna]'`).
"""

import csv
import json
import sqlite3
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir

from deebert.reporting import trackers
from deebert.reporting.results import Results

pytestmark = [
    # TensorBoard, Optuna 2 and their libraries use what newer versions of others will drop.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # MLflow leaves the connection of its database to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
STAGE2 = ("stage=2", "stages.2.epochs=2")
both = pytest.mark.skipif(
    not (find_spec("tensorboard") and find_spec("mlflow")), reason="needs tensorboard and mlflow"
)


@both
@pytest.mark.slow
@pytest.mark.pictures
def test_curve_and_plot_are_in_both(run: Callable[..., str], stage1: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("train.py", *STAGE2, f"ckpt={stage1}", "logger=[csv,tensorboard,mlflow]", f"hydra.run.dir={tmp_path}")  # fmt: skip
    results = Results.from_json(json.loads((tmp_path / "results.json").read_text()))
    expected = [each for each in trackers.final_scalars(results) if each[0] == "curve/score"]
    points = {round(1000 * each.expected_saving) for each in results.headline.curve}
    assert points <= {step for _, _, step in expected}
    full_depth = results.headline.exits[-1].score

    log = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "tensors": 0, "scalars": 0})
    log.Reload()
    written = [(each.step, each.value) for each in log.Scalars("curve/score")]
    assert written == [(step, pytest.approx(value)) for _, value, step in expected]
    assert log.Scalars("full_depth/score")[0].value == pytest.approx(full_depth)
    assert len(log.Scalars("val/score")) >= 2, "a value an epoch"
    [plot] = log.Images("curve")
    height, width, _ = imread(tmp_path / "curve.png").shape
    assert (plot.width, plot.height) == (width, height)
    tables = [each.tensor_proto.string_val[0].decode() for each in log.Tensors("val/curve/text_summary")]  # fmt: skip
    assert tables[-1].startswith("| threshold | score | cost_ratio | expected_saving |")
    assert len(tables[-1].splitlines()) == 2 + len(results.headline.curve)

    store = sqlite3.connect(tmp_path / "mlflow.db")
    rows = store.execute("select step, value from metrics where key = 'curve/score' order by step").fetchall()  # fmt: skip
    [(status, name)] = store.execute("select status, name from runs").fetchall()
    [(lr,)] = store.execute("select value from params where key = 'stages/2/lr'").fetchall()
    store.close()
    assert rows == [(step, pytest.approx(value)) for _, value, step in expected]
    assert (status, name) == ("FINISHED", "mrpc-tiny-stage2-seed7")
    assert float(lr) == 2e-3
    [artifacts] = tmp_path.glob("mlflow/*/artifacts")
    assert (artifacts / "curve.png").read_bytes() == (tmp_path / "curve.png").read_bytes()
    there = {each.name for each in artifacts.iterdir()}
    assert there == {"curves", "curve.png", "results.json", "results.md", "report.html"}
    for file in (artifacts / "curves").iterdir():
        assert len(list(csv.reader(file.read_text().splitlines()))) == 1 + len(
            results.headline.curve
        )


@both
@pytest.mark.slow
def test_a_logger_that_fails_does_not_end_a_run(
    run: Callable[..., str], stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard cannot make its folder, and MLflow's server is not there."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # it would wait for minutes
    printed = run("train.py", *STAGE2, f"ckpt={stage1}", "logger=[csv,tensorboard,mlflow]", "logger.tensorboard.version=/proc/none", "logger.mlflow.tracking_uri=http://127.0.0.1:9", f"hydra.run.dir={tmp_path}")  # fmt: skip
    for name in ("TensorBoardLogger", "MLFlowLogger"):
        assert printed.count(f"{name} has failed, and the run goes on without it") == 1
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_one_line(
    name: str, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    line = fails("train.py", "task=demo", "backbone=tiny", f"logger={name}", f"hydra.run.dir={tmp_path}")  # fmt: skip
    assert line == f"Error: logger={name}: {name} is not installed: pip install 'deebert[{name}]'"


def test_the_sweep_of_wandb_names_what_exists(stage1: Path) -> None:
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["command"][-1] == "${args_no_hyphens}"
    given = [word for word in sweep["command"] if not word.startswith("${")]
    least = {key: each["min"] if "min" in each else each["values"][0] for key, each in sweep["parameters"].items()}  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        # A key that does not exist is an error.
        config = compose("train", [*given, *(f"{key}={value}" for key, value in least.items())])
    assert config.stages["1"].lr == least["stages.1.lr"]
    assert config.logger.wandb.offline is False
    logged = next(csv.reader((stage1 / "csv/metrics.csv").read_text().splitlines()))
    assert sweep["metric"]["name"] in logged
    assert "val/mean_ramp_score" in logged, "what the comment names for stage 2"


@pytest.mark.slow
def test_preset_debug(run: Callable[..., str], tmp_path: Path) -> None:
    run("train.py", "experiment=debug", "task=demo", f"hydra.run.dir={tmp_path / 'one'}")
    run("train.py", "experiment=debug", "stage=2", f"ckpt={tmp_path / 'one'}", f"hydra.run.dir={tmp_path / 'two'}")  # fmt: skip
    for name, stage in (("one", 1), ("two", 2)):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert (results["task"], results["backbone"]) == ("demo", "tiny")
        assert results["stage"] == stage


@pytest.mark.slow
@pytest.mark.skipif(find_spec("optuna") is None, reason="needs Optuna")
def test_preset_optuna(run: Callable[..., str], tmp_path: Path) -> None:
    run("train.py", "-m", "experiment=[debug,optuna]", "task=demo", "hydra.sweeper.n_trials=2", f"hydra.sweep.dir={tmp_path}")  # fmt: skip
    scores = []
    for job in ("0", "1"):
        results = json.loads((tmp_path / job / "results.json").read_text())
        scores.append(results["exits"][-1]["score"])
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert best["best_value"] == pytest.approx(max(scores))
    assert set(best["best_params"]) == {"stages.1.lr", "stages.1.epochs"}
    assert 1e-5 <= best["best_params"]["stages.1.lr"] <= 1e-4
