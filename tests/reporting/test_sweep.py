"""The summary of a multirun folder: real Hydra multiruns of tiny runs, and hand-made folders."""

import csv
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, CommandFailed, command, results
from filelock import FileLock
from helpers import forked
from helpers import results as made_by_hand
from helpers.timed import timed
from hydra.types import RunMode
from omegaconf import OmegaConf

from deebert.errors import UserError
from deebert.reporting import sweep, sweep_rows
from deebert.runs import sweep_callback

Run = Callable[..., str]

THRESHOLDS = "threshold=0,0.69,0.7"
FAST = (*TINY, "data.limit_train=32", "stages.1.epochs=1")
WRITTEN = ("sweep.csv", "sweep.md", "sweep.png")


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))


def numbers(rows: Iterable[Any]) -> list[tuple[float, ...]]:
    return [tuple(float(row[name]) for name in ("threshold", *sweep_rows.MEASURED)) for row in rows]


@pytest.fixture(scope="module")
def swept(stage2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A threshold sweep; its folder is given relative to the current one, as by default."""
    folder = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command("evaluate.py", "-m", f"ckpt={stage2}", THRESHOLDS, "logger=csv", "hydra.sweep.dir=sweep")  # fmt: skip
    return folder / "sweep"


def test_a_threshold_sweep_is_one_run_with_the_list(
    run: Run, stage2: Path, swept: Path, tmp_path: Path
) -> None:
    run("evaluate.py", f"ckpt={stage2}", "thresholds=[0,0.69,0.7]", "logger=csv", f"hydra.run.dir={tmp_path}")  # fmt: skip
    assert not list(tmp_path.rglob("sweep.*")), "a single run is no sweep"
    one = results(tmp_path)
    assert len({point["expected_saving"] for point in one["curve"]}) > 1, "the test shows something"
    rows = table(swept)
    assert numbers(rows) == numbers(one["curve"]), "to the last digit"
    assert list(rows[0]) == ["job", *sweep_rows.COLUMNS, "area"], "the override is a column already"
    about = {key: rows[2][key] for key in ("job", "task", "backbone", "stage", "objective", "seed", "metric")}  # fmt: skip
    assert about == {
        "job": "2", "task": "mrpc", "backbone": "tiny", "stage": "2", "objective": "ramps",
        "seed": "7", "metric": "f1",
    }  # fmt: skip
    text = (swept / "sweep.md").read_text()
    assert text.startswith("# Sweep sweep: 3 of 3 jobs finished")
    assert "Over seeds" not in text
    assert "Failed" not in text


def test_the_command_writes_the_same_again(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (swept / name).read_bytes() for name in WRITTEN}
    for name in WRITTEN:
        (swept / name).unlink()
    sweep.run(sweep.SweepOptions(str(swept)))
    assert capsys.readouterr().out == f"Sweep: {swept / 'sweep.md'}\n"
    assert {name: (swept / name).read_bytes() for name in WRITTEN} == before
    assert before["sweep.png"].startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_failing_job_is_listed_and_the_others_are_there(
    run: Run, glue: Path, tmp_path: Path
) -> None:
    """Hydra doesn't call on_multirun_end then; seeds are averaged all the same."""
    with pytest.raises(CommandFailed, match="stage 3 is unknown"):
        run("train.py", "-m", "task=mrpc", "stage=3,1", "seed=1,2", *FAST, f"data.root={glue}", "objective=joint", f"hydra.sweep.dir={tmp_path}")  # fmt: skip
    rows = table(tmp_path)
    runs = {job: results(tmp_path / job) for job in ("2", "3")}
    assert numbers(rows) == numbers(point for result in runs.values() for point in result["curve"])
    text = (tmp_path / "sweep.md").read_text()
    assert text.startswith(f"# Sweep {tmp_path.name}: 2 of 4 jobs finished")
    assert "| 0 | task=mrpc stage=3 seed=1 " in text
    assert "| 1 | task=mrpc stage=3 seed=2 " in text
    assert "no results" in text
    means = sweep_rows.over_seeds(sweep_rows.rows(tmp_path))
    assert len(means) == len(runs["2"]["curve"])
    for mean, *points in zip(means, runs["2"]["curve"], runs["3"]["curve"], strict=True):
        assert mean.seeds == (1, 2)
        assert mean.score == pytest.approx(sum(point["score"] for point in points) / 2)
        a, b = (point["expected_saving"] for point in points)
        assert mean.expected_saving_spread == pytest.approx(abs(a - b) / 2**0.5)


def made(
    place: Path, overrides: str, points: Iterable[tuple[Any, float | None, float]], **values: Any
) -> None:
    """A finished job by hand; points are threshold, score, saving."""
    (place / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides.split()), place / ".hydra" / "overrides.yaml")
    content = made_by_hand.run(curve=[made_by_hand.point(*each) for each in points], **values)
    (place / "results.json").write_text(json.dumps(content))
    (place / "results.md").write_text("")


def test_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    """Objectives, tasks and rules stay apart; checkpoints of several seeds do not."""
    scores = (0.80, 0.83, 0.92)
    for seed, score in enumerate(scores, 1):
        for job, rule in ((seed, "entropy"), (seed + 10, "margin")):
            points = [(0.0, score, 0.0), (0.1, score - job / 100, 0.1 * seed)]
            made(tmp_path / str(job), f"ckpt=RUN{seed} exit={rule}", points, seed=seed, exit={"name": rule})  # fmt: skip
    made(tmp_path / "20", "ckpt=RUN9 exit=entropy", [(0.0, 0.5, 0.0)], task="rte", exit={"name": "entropy"})  # fmt: skip
    rows = sweep_rows.rows(tmp_path)
    assert [row["job"] for row in rows][::2] == ["1", "2", "3", "11", "12", "13", "20"]
    assert rows[0]["ckpt"] == "RUN1"
    entropy, early, margin, _, rte = sweep_rows.over_seeds(rows)
    assert (entropy.line["exit"], margin.line["exit"], rte.line["task"]) == (
        "entropy",
        "margin",
        "rte",
    )
    assert (entropy.seeds, rte.seeds) == ((1, 2, 3), (1,))
    assert entropy.score == margin.score == pytest.approx(0.85)
    # ((0.05² + 0.02² + 0.07²) / 2)^½
    assert entropy.score_spread == pytest.approx(0.0039**0.5)
    assert entropy.expected_saving_spread == 0
    assert (early.threshold, early.expected_saving) == (0.1, pytest.approx(0.2))
    assert early.expected_saving_spread == pytest.approx(0.1)
    assert early.score_spread == pytest.approx(statistics.stdev((0.79, 0.81, 0.89)))
    assert rte.score_spread is None, "one seed tells no spread"
    sweep.write(tmp_path)
    text = (tmp_path / "sweep.md").read_text()
    assert "| mrpc | tiny | 2 | ramps | entropy | validation | f1 | 0.1 | 0.8300 | 0.0529 | 20.0% | 10.0% | 1 2 3 | 3 |" in text  # fmt: skip


def test_checkpoints_of_one_seed_are_not_averaged(tmp_path: Path) -> None:
    made(tmp_path / "0", "ckpt=SLOW", [(0.1, 0.8, 0.2)])
    made(tmp_path / "1", "ckpt=FAST", [(0.1, 0.9, 0.4)])
    means = sweep_rows.over_seeds(sweep_rows.rows(tmp_path))
    assert [(mean.line["ckpt"], mean.score, len(mean.seeds)) for mean in means] == [("SLOW", 0.8, 1), ("FAST", 0.9, 1)]  # fmt: skip


def test_a_target_gives_what_was_measured(tmp_path: Path) -> None:
    """One row in place of the curve; with another threshold for each seed, and one mean."""
    for job, (saving, seed) in enumerate(((0.4, 1), (0.4, 2), (0.5, 1), (0.5, 2))):
        calibration = made_by_hand.calibrated(
            {"target_saving": saving, "per_ramp": False},
            (80 + seed) / 100,
            saving + seed / 1000,
            thresholds=seed / 10,
        )
        overrides = f"ckpt=RUN{seed} target_saving={saving} split=validation"
        made(tmp_path / str(job), overrides, [(0.1, 0.5, 0.1)], seed=seed, calibration=calibration)
    rows = sweep_rows.rows(tmp_path)
    assert [(row["target"], row["score"], row["expected_saving"]) for row in rows] == [
        ("target_saving=0.4", 0.81, 0.401), ("target_saving=0.4", 0.82, 0.402),
        ("target_saving=0.5", 0.81, 0.501), ("target_saving=0.5", 0.82, 0.502),
    ]  # fmt: skip
    assert rows[0]["speed_up"] == pytest.approx(1 / 0.599)
    assert "target_saving" not in rows[0]
    means = sweep_rows.over_seeds(rows)
    assert [(mean.target, len(mean.seeds)) for mean in means] == [("target_saving=0.4", 2), ("target_saving=0.5", 2)]  # fmt: skip
    assert means[0].line == means[1].line, "one line of the picture"
    assert means[0].score == pytest.approx(0.815)


def test_a_file_from_before_is_read(tmp_path: Path) -> None:
    """It calls the target `wish`, and lacks keys that were added later."""
    calibration = made_by_hand.calibrated({"target_saving": 0.4}, 0.8, 0.41)
    calibration["wish"] = calibration.pop("target")
    del calibration["prior"]
    timing = timed(0.1, 0.3)
    del timing["runtime"]
    made(tmp_path / "0", "", [(0.1, 0.5, 0.1)], calibration=calibration, timing=[timing])
    [row] = sweep_rows.rows(tmp_path)
    assert (row["target"], row["score"], row["time_saving"]) == ("target_saving=0.4", 0.8, 0.3)


def test_only_overrides_that_differ_are_columns(tmp_path: Path) -> None:
    made(tmp_path / "0", "backbone=tiny +data.extra=5 stages.2.lr=1e-3", [(0, 0.8, 0)])
    made(tmp_path / "1", "backbone=tiny stages.2.lr=1e-2", [(0, 0.9, 0)])
    first, second = sweep_rows.rows(tmp_path)
    assert list(first) == ["job", "data.extra", "stages.2.lr", *sweep_rows.COLUMNS]
    assert (first["data.extra"], second["data.extra"]) == ("5", "")
    assert len(sweep_rows.over_seeds([first, second])) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("exit", None), ("task", ["mrpc"]), ("seed", {}), ("metric", 5), ("split", []), ("curve", 3)],
)
def test_a_damaged_value_spoils_its_own_job_only(tmp_path: Path, key: str, value: object) -> None:
    made(tmp_path / "0", "seed=1", [(0.1, 0.8, 0.2)])
    made(tmp_path / "1", "seed=2", [(0.1, 0.8, 0.2)])
    file = tmp_path / "1" / "results.json"
    file.write_text(json.dumps(results(file.parent) | {key: value}))
    sweep.run(sweep.SweepOptions(str(tmp_path)))
    assert [row["job"] for row in table(tmp_path)] == ["0"]
    assert "| 1 | seed=2 | damaged results.json (" in (tmp_path / "sweep.md").read_text()


def test_what_cannot_be_read_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "0", "seed=1", [(0.1, 0.8, 0.2)])
    made(tmp_path / "1", "seed=2", [])
    (tmp_path / "1" / "results.json").write_text('{"task": "mr')
    made(tmp_path / "2", "seed=3", [])
    (tmp_path / "2" / "results.json").write_text('{"task": "mrpc"}')
    made(tmp_path / "10", "seed=4", [(0.1, 0.7, 0.2)], epoch=2)
    (tmp_path / "10" / "results.md").unlink()  # as training leaves it when it is interrupted
    made(tmp_path / "11", "seed=5 note=a|b", [])
    (tmp_path / "11" / "results.json").unlink()
    (tmp_path / "11" / ".hydra" / "overrides.yaml").write_text("- 'seed")
    sweep.run(sweep.SweepOptions(str(tmp_path)))
    assert str(tmp_path / "sweep.md") in capsys.readouterr().out
    assert [row["job"] for row in table(tmp_path)] == ["0"]
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert lines[0].endswith("1 of 5 jobs finished")
    assert lines[6].startswith("| 1 | seed=2 | results.json is damaged (JSONDecodeError) |")
    assert lines[7] == "| 2 | seed=3 | damaged results.json (KeyError: 'backbone') |"
    assert lines[8] == "| 10 | seed=4 | stopped after epoch 2 |"
    assert lines[9] == "| 11 |  | no results |"


def test_untrained_ramps_and_missing_labels(tmp_path: Path) -> None:
    """Stage 1 has full depth only; a split without labels is in the table, not in the picture."""
    made(tmp_path / "0", "x=0", [(0.1, 0.3, 0.5)], objective="final")
    made(tmp_path / "1", "x=1", [(0.1, None, 0.5)])
    assert [row[3:] for row in numbers(sweep_rows.rows(tmp_path)[:1])] == [(1.0, 1.0)]
    assert [(row["score"], row["expected_saving"]) for row in sweep_rows.rows(tmp_path)] == [(0.9, 0.0), (None, 0.5)]  # fmt: skip
    assert [mean.score for mean in sweep_rows.over_seeds(sweep_rows.rows(tmp_path))] == [0.9, None]
    sweep.write(tmp_path)
    assert table(tmp_path)[1]["score"] == ""
    made(tmp_path / "x" / "1", "x=1", [(0.1, None, 0.5)])
    sweep.write(tmp_path / "x")
    assert not (tmp_path / "x" / "sweep.png").exists(), "nothing to draw"


def test_both_splits_of_mnli(tmp_path: Path) -> None:
    other = made_by_hand.split("mismatched", curve=[made_by_hand.point(0.1, 0.6, 0.3)])
    target = made_by_hand.calibrated(
        {"max_drop": 0.01, "confidence": 0.95, "loss": "excess"},
        0.8,
        0.4,
        measured_elsewhere={"mismatched": made_by_hand.measured(0.7, 0.5)},
    )
    made(tmp_path / "0", "", [(0.1, 0.7, 0.2)], task="mnli", other_splits=[other])
    made(tmp_path / "1", "max_drop=0.01", [(0.1, 0.7, 0.2)], task="mnli", other_splits=[other], calibration=target)  # fmt: skip
    rows = sweep_rows.rows(tmp_path)
    assert [(row["split"], row["score"]) for row in rows] == [("validation", 0.7), ("mismatched", 0.6), ("validation", 0.8), ("mismatched", 0.7)]  # fmt: skip
    assert rows[2]["target"] == "max_drop=0.01 confidence=0.95 loss=excess"
    assert len(sweep_rows.over_seeds(rows)) == 4


def test_a_threshold_for_each_ramp(tmp_path: Path) -> None:
    made(tmp_path / "0", "record=A threshold=[0.1,0.2]", [([0.1, 0.2], 0.7, 0.2)])
    made(tmp_path / "1", "record=B threshold=[0.1,0.2]", [([0.1, 0.2], 0.8, 0.2)], seed=2)
    [mean] = sweep_rows.over_seeds(sweep_rows.rows(tmp_path))
    assert (mean.threshold, mean.score, mean.seeds) == ("[0.1,0.2]", 0.75, (1, 2))
    sweep.write(tmp_path)
    assert "| [0.1,0.2] | 0.7500 |" in (tmp_path / "sweep.md").read_text()


def test_seconds_stand_beside_what_was_timed(tmp_path: Path) -> None:
    """Of a job's first precision and batch size; the mean over seeds has them, too."""
    for seed in (1, 2):
        timing = [
            timed(0.1, 0.2 + seed / 10), timed(0.1, 0.7, precision="int8"), timed(0.1, 0.8, batch_size=1),
            timed([0.1, 0.2], 0.6),
        ]  # fmt: skip
        points = [(0.0, 0.9, 0.0), (0.1, 0.8, 0.2), ([0.1, 0.2], 0.7, 0.3)]
        made(tmp_path / str(seed), f"ckpt=RUN{seed}", points, seed=seed, timing=timing)
    rows = sweep_rows.rows(tmp_path)
    assert list(rows[0]) == ["job", "ckpt", *sweep_rows.COLUMNS, "seconds", "time_saving"]
    assert [row["time_saving"] for row in rows] == pytest.approx([None, 0.3, 0.6, None, 0.4, 0.6])
    assert [row["seconds"] for row in rows] == pytest.approx([None, 1.4, 0.8, None, 1.2, 0.8])
    means = sweep_rows.over_seeds(rows)
    assert [mean.time_saving for mean in means] == pytest.approx([None, 0.35, 0.6])
    assert [mean.seconds for mean in means] == pytest.approx([None, 1.3, 0.8])
    sweep.write(tmp_path)
    assert [row["seconds"] for row in table(tmp_path)[:2]] == ["", "1.4"]
    over, _, jobs = (tmp_path / "sweep.md").read_text().partition("## Every job")
    assert "| 0.1 | 0.8000 | 0.0000 | 20.0% | 0.0% | 1.3000 | 35.0% | 1 2 | 2 |" in over
    assert "| 0.1 | f1 | 0.8000 | 20.0% | 0.8000 | 1.25x | 1.4000 | 30.0% |" in jobs
    assert "| 0 | f1 | 0.9000 | 0.0% | 1.0000 | 1.00x | - | - |" in jobs
    drawn = (tmp_path / "sweep.png").read_bytes()
    made(tmp_path / "3", "ckpt=RUN3", [(0.1, 0.8, 0.2)], seed=3)
    assert sweep_rows.over_seeds(sweep_rows.rows(tmp_path))[1].seconds is None, "not all were timed"
    for seed in (1, 2):
        file = tmp_path / str(seed) / "results.json"
        file.write_text(json.dumps(results(file.parent) | {"timing": []}))
    shutil.rmtree(tmp_path / "3")
    sweep.write(tmp_path)
    assert list(table(tmp_path)[0]) == ["job", "ckpt", *sweep_rows.COLUMNS]
    assert "time saving" not in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").read_bytes() != drawn, "no dashed line"


def test_seconds_of_a_target(tmp_path: Path) -> None:
    """Its thresholds may be cross-fitted: not those that the report names. One split is timed."""
    calibration = made_by_hand.calibrated(
        {"target_speedup": 1.5},
        0.8,
        0.4,
        fold_thresholds=[0.1, 0.2],
        measured_elsewhere={"mismatched": made_by_hand.measured(0.7, 0.5)},
    )
    made(tmp_path / "0", "", [(0.1, 0.7, 0.2)], calibration=calibration, timing=[timed([0.1, 0.2], 0.45)])  # fmt: skip
    here, elsewhere = sweep_rows.rows(tmp_path)
    assert (here["target"], here["time_saving"], elsewhere["time_saving"]) == ("target_speedup=1.5", 0.45, None)  # fmt: skip


@pytest.mark.parametrize(("name", "message"), [("nowhere", "is not a folder"), ("failed", "holds no results: 1 jobs"), ("empty", "holds no results: 0 jobs")])  # fmt: skip
def test_a_bad_folder_is_one_line(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "failed" / "0" / ".hydra").mkdir(parents=True)
    (tmp_path / "failed" / "0" / ".hydra" / "overrides.yaml").write_text("- seed=1\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as failure:
        sweep.run(sweep.SweepOptions(str(tmp_path / name)))
    assert str(failure.value).startswith(f"{tmp_path / name} {message}")
    assert not list(tmp_path.glob("*/sweep.*"))


def test_the_summary_never_makes_a_job_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "0", "seed=1", [(0.1, 0.8, 0.2)])
    config = OmegaConf.create({"hydra": {"mode": "MULTIRUN", "runtime": {"cwd": str(tmp_path)}, "sweep": {"dir": "."}}})  # fmt: skip
    config.hydra.mode = RunMode.MULTIRUN
    callback = sweep_callback.SweepSummary()
    (tmp_path / "sweep.md").mkdir()  # cannot be written
    with caplog.at_level(logging.WARNING):
        callback.on_job_end(config, None)
    assert "no summary of the sweep: IsADirectoryError" in caplog.text
    (tmp_path / "sweep.md").rmdir()
    (tmp_path / "sweep.csv").unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    callback.on_job_end(config, None)
    assert not (tmp_path / "sweep.csv").exists(), "a helper process writes nothing"
    monkeypatch.delenv("LOCAL_RANK")
    config.hydra.mode = RunMode.RUN
    callback.on_job_end(config, None)
    assert not (tmp_path / "sweep.csv").exists(), "a single run is no sweep"


@pytest.mark.slow
def test_a_killed_worker_is_named(glue: Path, tmp_path: Path) -> None:
    """The launcher fails, so Hydra does not say that the multirun has ended."""
    words = [
        "task=mrpc", *FAST, f"data.root={glue}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "+callbacks.kill._target_=helpers.kills.Kill", "+callbacks.kill.hook=on_fit_start,none",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = forked.run("train.py", "-m", *words, env=os.environ | path)
    assert done.returncode == 1
    assert "TerminatedWorkerError" in done.stderr
    assert f"sweep: {tmp_path / 'sweep' / 'sweep.md'}" in done.stdout
    [line] = [each for each in (tmp_path / "sweep" / "sweep.md").read_text().splitlines() if "on_fit_start" in each]  # fmt: skip
    assert line.startswith("| 0 | ")
    assert line.endswith("| no results |")


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    """A job that ends while another writes must not be missing from what is written last."""
    made(tmp_path / "0", "seed=1", [(0.1, 0.8, 0.2)])
    with ThreadPoolExecutor() as pool:
        with FileLock(tmp_path / ".sweep.lock"):
            other = pool.submit(sweep.write, tmp_path)
            with pytest.raises(TimeoutError):
                other.result(timeout=0.5)
            made(tmp_path / "1", "seed=2", [(0.1, 0.9, 0.2)])
        other.result(timeout=30)
    assert len(table(tmp_path)) == 2


def test_nothing_heavy_is_imported() -> None:
    """Every command loads this module, --help too."""
    heavy = "('torch', 'lightning', 'matplotlib', 'numpy', 'pandas', 'filelock')"
    code = f"import sys, deebert.reporting.sweep; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)  # fmt: skip
    assert printed.stdout.strip() == "[]"
