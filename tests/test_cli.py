"""The command line, from training to evaluation: real Hydra, real Trainer, tiny backbone."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, CommandFailed, mrpc_rows, write_rows

Run = Callable[..., str]


@pytest.fixture(scope="module")
def stage1(glue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-1 run on MRPC's columns, made by a real process."""
    folder = tmp_path_factory.mktemp("runs") / "stage1"
    command = [
        sys.executable, "train.py", "task=mrpc", "stage=1", *TINY, f"data.root={glue}", "seed=7",
        "stages.1.epochs=2", "stages.1.lr=1e-3", "stages.2.lr=2e-3", "stages.2.epochs=3",
        f"hydra.run.dir={folder}",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    return folder


@pytest.fixture(scope="module")
def stage2(stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "stage2"
    command = [
        sys.executable, "train.py", "stage=2", f"ckpt={stage1}", "logger=csv", f"hydra.run.dir={folder}",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def table(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "csv" / f"{name}.csv").read_text().splitlines()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint(folder)["state_dict"]


def assert_equal_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_run_folder(stage1: Path) -> None:
    present = {str(path.relative_to(stage1)) for path in stage1.rglob("*") if path.is_file()}
    assert present >= {
        ".hydra/config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "results.json",
        "results.md", "curve.png", "csv/metrics.csv", "csv/curve.csv", "train.log",
    }  # fmt: skip
    assert not [name for name in present if "=" in name]
    assert (stage1 / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_stage_2_takes_everything_from_the_checkpoint(stage1: Path, stage2: Path) -> None:
    found = results(stage2)
    told = {key: found[key] for key in ("schema", "task", "backbone", "stage", "objective", "seed", "metric")}  # fmt: skip
    assert told == {
        "schema": 1, "task": "mrpc", "backbone": "tiny", "stage": 2, "objective": "ramps", "seed": 7,
        "metric": "f1",
    }  # fmt: skip
    config = checkpoint(stage2)["hyper_parameters"]["config"]
    assert config["data"]["max_length"] == 64
    assert config["stages"]["2"]["lr"] == 2e-3, "the recipe of the first command"
    before, after = weights(stage1), weights(stage2)
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"ramps"}
    assert not [n for n in before if ".ramps.2." in n and not torch.equal(before[n], after[n])]


def test_results_keep_their_contract(stage2: Path) -> None:
    found = results(stage2)
    assert [ramp["layer"] for ramp in found["exits"]] == [1, 2, 3]
    assert all(set(ramp) >= {"layer", "score", "cost_ratio"} for ramp in found["exits"])
    for point in found["curve"]:
        assert sum(point["exit_counts"]) == found["num_rows"] == 40
        mean = sum(layer * n for layer, n in enumerate(point["exit_counts"], 1)) / 40
        assert point["cost_ratio"] == pytest.approx(mean / 3)
        assert point["expected_saving"] == pytest.approx(1 - point["cost_ratio"])
        assert point["speed_up"] == pytest.approx(1 / point["cost_ratio"])
    assert found["curve"][0]["score"] == found["exits"][-1]["score"]
    assert found["curve"][-1]["score"] == found["exits"][0]["score"], "0.7: all leave at ramp 1"
    assert set(found["curve"][0]["scores"]) == {"f1", "accuracy"}
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert (stage2 / "results.md").read_text().count("| 0.05 |") == 1


def test_csv_holds_every_epoch(stage2: Path) -> None:
    rows = table(stage2, "curve")
    assert len(rows) == 3 * 13
    assert [row["epoch"] for row in rows[::13]] == ["1", "2", "3"]
    assert float(rows[-1]["score"]) == results(stage2)["curve"][-1]["score"]
    metrics = table(stage2, "metrics")
    logged = [row for row in metrics if row["val/score"]]
    assert len(logged) == 3
    assert float(logged[-1]["val/score"]) == pytest.approx(results(stage2)["exits"][-1]["score"])
    assert logged[-1]["val/threshold_0.7/expected_saving"].startswith("0.666")


def test_evaluate_gives_the_same_again(run: Run, stage2: Path, tmp_path: Path) -> None:
    printed = run("evaluate.py", f"ckpt={stage2}", "logger=csv", f"hydra.run.dir={tmp_path}")
    found, expected = results(tmp_path), results(stage2)
    for key in ("exits", "curve", "task", "stage", "objective", "split", "num_rows"):
        assert found[key] == expected[key], key
    assert "Score against saving: mrpc, validation (40 rows)" in printed
    assert str(tmp_path) in printed
    assert (tmp_path / "curve.png").is_file()


def test_evaluate_at_thresholds_on_another_split(run: Run, stage2: Path, tmp_path: Path) -> None:
    run("evaluate.py", f"ckpt={stage2}", "split=test", "threshold=[0.69,0.2]", "logger=csv", f"hydra.run.dir={tmp_path}")  # fmt: skip
    found = results(tmp_path)
    assert [point["threshold"] for point in found["curve"]] == [0.69, 0.2]
    assert (found["split"], found["num_rows"]) == ("test", 16)


def test_evaluate_without_labels_gives_the_saving(run: Run, stage2: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "mrpc", "test", [row | {"label": -1} for row in mrpc_rows("test", 9)])
    printed = run(
        "evaluate.py", f"ckpt={stage2}", "split=test", f"data.root={tmp_path}", "logger=csv",
        f"hydra.run.dir={tmp_path / 'out'}",
    )  # fmt: skip
    found = results(tmp_path / "out")
    assert found["curve"][-1]["expected_saving"] == pytest.approx(2 / 3)
    assert found["curve"][-1]["score"] is None
    assert "This split has no labels" in printed


def test_ax_is_scored_with_an_mnli_checkpoint(
    run: Run, fails: Run, stage2: Path, tmp_path: Path
) -> None:
    rows = [{"premise": "a cat", "hypothesis": f"a dog {i}", "label": i % 3} for i in range(12)]
    for split in ("train", "validation_matched", "validation_mismatched"):
        write_rows(tmp_path / "mnli", split, rows)
    write_rows(tmp_path / "ax", "test", rows)
    run("train.py", "task=mnli", *TINY, f"data.root={tmp_path}", "stages.1.epochs=1", f"hydra.run.dir={tmp_path / 'mnli-run'}")  # fmt: skip
    found = results(tmp_path / "mnli-run")
    assert found["split"] == "validation_matched"
    assert [part["split"] for part in found["other_splits"]] == ["validation_mismatched"]
    assert found["curve"][-1]["threshold"] == 1.1
    metrics = (tmp_path / "mnli-run" / "csv" / "metrics.csv").read_text().splitlines()[0]
    assert "val/score" in metrics
    assert "val_mismatched/score" in metrics
    run("evaluate.py", f"ckpt={tmp_path / 'mnli-run'}", "task=ax", "logger=csv", f"hydra.run.dir={tmp_path / 'ax-run'}")  # fmt: skip
    found = results(tmp_path / "ax-run")
    assert (found["task"], found["split"], found["num_rows"]) == ("ax", "test", 12)
    assert found["curve"][0]["score"] is not None
    said = fails("evaluate.py", f"ckpt={stage2}", "task=ax")
    assert "task=ax contradicts" in said


@pytest.mark.parametrize("stage", [1, 2])
def test_resume_gives_the_weights_of_the_unbroken_run(
    run: Run, stage: int, stage1: Path, glue: Path, tmp_path: Path
) -> None:
    """A real process is killed in its third epoch; dropout is on."""
    if stage == 1:
        said = ["task=mrpc", "stage=1", *TINY, f"data.root={glue}", "stages.1.epochs=4", "stages.1.lr=1e-3"]  # fmt: skip
    else:
        said = ["stage=2", f"ckpt={stage1}", "logger=csv", "stages.2.epochs=60"]
    epochs = 4 if stage == 1 else 60
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "train.py", *said, f"hydra.run.dir={killed}"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    last = killed / "checkpoints" / "last.ckpt"
    deadline = time.time() + 120
    while not last.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(last, weights_only=True)["epoch"] < epochs - 1, "killed too late to tell"
    run("train.py", f"resume={killed}", "logger=csv", f"hydra.run.dir={tmp_path / 'resumed'}")
    run("train.py", *said, f"hydra.run.dir={tmp_path / 'unbroken'}")
    assert_equal_weights(tmp_path / "resumed", tmp_path / "unbroken")
    assert results(tmp_path / "resumed")["curve"] == results(tmp_path / "unbroken")["curve"]
    assert results(tmp_path / "resumed")["epoch"] == epochs


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    run: Run, stage1: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("train.py", "stage=2", f"ckpt={stage1}", f"seed={seed}", "logger=csv", f"hydra.run.dir={tmp_path / name}")  # fmt: skip
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_best_epoch_is_kept_on_request(run: Run, glue: Path, tmp_path: Path) -> None:
    run(
        "train.py", "task=mrpc", *TINY, f"data.root={glue}", "stages.1.epochs=3", "stages.1.lr=3e-3",
        "callbacks.best.monitor=val/score", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    rows = table(tmp_path, "curve")
    scores = [float(row["score"]) for row in rows if row["threshold"] == "0.0"][:3]
    assert checkpoint(tmp_path, "best")["epoch"] == scores.index(max(scores))
    assert checkpoint(tmp_path, "last")["epoch"] == 2
    assert results(tmp_path)["exits"][-1]["score"] == max(scores)


def test_resume_keeps_the_best_epoch_so_far(run: Run, glue: Path, tmp_path: Path) -> None:
    """Monitored, with thresholds of its own, and stopped by the user's own limit of steps."""
    said = ["task=mrpc", *TINY, f"data.root={glue}", "stages.1.epochs=3", "stages.1.lr=3e-3", "thresholds=[0,0.3]"]  # fmt: skip
    monitor = "callbacks.best.monitor=val/score"
    run("train.py", *said, monitor, "+trainer.max_steps=12", f"hydra.run.dir={tmp_path / 'part'}")
    first = checkpoint(tmp_path / "part", "best")
    assert first["epoch"] == 0
    run("train.py", f"resume={tmp_path / 'part'}", "+trainer.max_steps=-1", "logger=csv", f"hydra.run.dir={tmp_path / 'rest'}")  # fmt: skip
    assert checkpoint(tmp_path / "rest", "last")["epoch"] == 2
    scores = {row["epoch"]: float(row["score"]) for part in ("part", "rest") for row in table(tmp_path / part, "curve") if row["threshold"] == "0.0"}  # fmt: skip
    assert list(scores) == ["1", "2", "3"]
    best = list(scores.values()).index(max(scores.values()))
    assert checkpoint(tmp_path / "rest", "best")["epoch"] == best
    assert results(tmp_path / "rest")["exits"][-1]["score"] == max(scores.values())
    assert [point["threshold"] for point in results(tmp_path / "rest")["curve"]] == [0, 0.3]


def test_a_checkpoint_cannot_name_what_resume_calls(
    run: Run, fails: Run, glue: Path, tmp_path: Path
) -> None:
    said = ["task=mrpc", *TINY, f"data.root={glue}", "stages.1.epochs=2", "+trainer.max_steps=12"]
    run("train.py", *said, f"hydra.run.dir={tmp_path / 'part'}")
    file = tmp_path / "part" / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    evil = {
        "_target_": "os.mkdir",
        "path": str(tmp_path / "owned"),
        "_args_": [str(tmp_path / "owned")],
    }
    content["hyper_parameters"]["config"]["callbacks"] = {"best": evil, "evil": evil}
    content["hyper_parameters"]["config"]["trainer"]["callbacks"] = [evil]
    content["hyper_parameters"]["config"]["trainer"]["_target_"] = "os.mkdir"
    torch.save(content, file)
    with contextlib.suppress(CommandFailed):
        run("train.py", f"resume={file}", "logger=csv", f"hydra.run.dir={tmp_path / 'rest'}")
    assert not (tmp_path / "owned").exists()


def test_spawned_processes_report_too(run: Run, glue: Path, tmp_path: Path) -> None:
    """What the refusal of ddp in a multirun recommends."""
    command = [
        sys.executable, "train.py", "-m", "task=mrpc", "seed=1", *TINY, f"data.root={glue}", "stages.1.epochs=1",
        "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp_spawn", f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Score of every ramp: mrpc, validation (40 rows)" in done.stdout
    assert results(tmp_path / "0")["num_rows"] == 40


def test_every_checkpoint_holds_plain_values_only(stage1: Path, stage2: Path) -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str | int) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float, bool)

    for folder in (stage1, stage2):
        for name in ("best", "last"):
            assert plain(checkpoint(folder, name)["hyper_parameters"])


def test_two_processes_train_and_score_as_one(glue: Path, tmp_path: Path) -> None:
    """trainer.strategy=ddp on 2 CPU processes; then one process scores the same weights."""
    write_rows(tmp_path / "mrpc", "train", mrpc_rows("train", 96))
    write_rows(tmp_path / "mrpc", "validation", mrpc_rows("validation", 150))  # 3 batches of 64
    for stage, said in (
        (1, ["task=mrpc", *TINY, f"data.root={tmp_path}", "stages.1.epochs=1", "stages.1.lr=1e-3"]),
        (2, ["stage=2", f"ckpt={tmp_path / 'run1'}", "logger=csv", "stages.2.epochs=1"]),
    ):
        folder = tmp_path / f"run{stage}"
        command = [
            sys.executable, "train.py", *said, "trainer.accelerator=cpu", "trainer.devices=2",
            "trainer.strategy=ddp", f"hydra.run.dir={folder}",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        single = tmp_path / f"single{stage}"
        command = [sys.executable, "evaluate.py", f"ckpt={folder}", "logger=csv", f"hydra.run.dir={single}"]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
        found, expected = results(folder), results(single)
        assert found["num_rows"] == expected["num_rows"] == 150
        assert found["exits"] == expected["exits"]
        assert found["curve"] == expected["curve"]
        # 96 rows by 8, dealt out to two processes: 6 steps each.
        assert (
            torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
        )


def test_multirun_leaves_a_run_folder_per_job(run: Run, glue: Path, tmp_path: Path) -> None:
    run(
        "train.py", "-m", "task=mrpc", "stage=1", "seed=1,2", *TINY, f"data.root={glue}",
        "stages.1.epochs=1", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert [results(tmp_path / job)["seed"] for job in ("0", "1")] == [1, 2]
    for job in ("0", "1"):
        assert (tmp_path / job / "csv" / "metrics.csv").is_file()
    ours, theirs = weights(tmp_path / "0"), weights(tmp_path / "1")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_failing_job_does_not_stop_the_sweep(fails: Run, glue: Path, tmp_path: Path) -> None:
    said = fails(
        "train.py", "-m", "task=mrpc", "stage=3,1", *TINY, f"data.root={glue}", "stages.1.epochs=1",
        f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert "stage 3 is unknown" in said
    assert results(tmp_path / "1")["stage"] == 1


def test_multirun_with_ddp_is_refused(fails: Run, glue: Path, tmp_path: Path) -> None:
    said = fails(
        "train.py", "-m", "task=mrpc", "seed=1,2", *TINY, f"data.root={glue}", "trainer.devices=2",
        "trainer.accelerator=cpu", "trainer.strategy=ddp", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert "trainer.strategy=ddp_spawn" in said
    assert not list(tmp_path.rglob("*.ckpt"))


def test_help_and_typos_import_nothing_heavy() -> None:
    """--help answers at once because Hydra alone is imported."""
    for script, said in (
        ("train.py", "--help"),
        ("evaluate.py", "--help"),
        ("train.py", "task=nope"),
    ):
        code = (
            "import runpy, sys\n"
            f"sys.argv = [{script!r}, {said!r}]\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'wandb'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def bad_input(tmp_path: Path, glue: Path, stage1: Path, stage2: Path) -> dict[str, tuple]:
    (tmp_path / "x.ckpt").write_text("not-a-checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "no-validation" / "mrpc", "train", mrpc_rows("train", 8))
    write_rows(tmp_path / "no-column" / "mrpc", "train", [{"sentence1": "a", "label": 1}])
    (tmp_path / "empty" / "mrpc").mkdir(parents=True)
    (tmp_path / "empty" / "mrpc" / "train.csv").write_text("sentence1,sentence2,label\n")
    write_rows(tmp_path / "range" / "mrpc", "train", [mrpc_rows("train", 1)[0] | {"label": 5}])
    write_rows(tmp_path / "null" / "mrpc", "train", [mrpc_rows("train", 1)[0], {"sentence1": "a", "sentence2": None, "label": 1}])  # fmt: skip
    train, evaluate = "train.py", "evaluate.py"
    mrpc = ("task=mrpc", *TINY)
    here = f"data.root={glue}"
    return {
        "no task": (train, TINY, "task= is missing: python train.py task=mrpc stage=1; choose one of: ax, cola, demo"),
        "stage 3": (train, (*mrpc, here, "stage=3"), "stage 3 is unknown; choose one of: 1, 2 (stage=...)"),
        "stage two": (train, (*mrpc, here, "stage=two"), "stage 'two' is unknown"),
        "stage 2 without ckpt": (train, ("stage=2",), "stage=2 needs ckpt=RUN"),
        "ckpt with stage 1": (train, (*mrpc, here, f"ckpt={stage1}"), "stage 1 starts from backbone="),
        "ckpt missing": (train, ("stage=2", "ckpt=missing.ckpt"), "ckpt=missing.ckpt: no such file"),
        "ckpt an empty folder": (train, ("stage=2", f"ckpt={tmp_path / 'folder'}"), "holds no checkpoints/best.ckpt"),
        "not a checkpoint": (train, ("stage=2", f"ckpt={tmp_path / 'x.ckpt'}"), "not a checkpoint of this program"),
        "of another program": (train, ("stage=2", f"ckpt={tmp_path / 'other.ckpt'}"), "not a checkpoint of this program"),
        "ckpt of stage 2": (train, ("stage=2", f"ckpt={stage2}"), "is of stage 2; stage=2 starts from a stage-1"),
        "ckpt of another task": (train, ("stage=2", f"ckpt={stage1}", "task=rte"), "task=rte contradicts"),
        "ckpt of another backbone": (train, ("stage=2", f"ckpt={stage1}", "backbone=minilm"), "backbone=minilm contradicts"),
        "resume with other values": (train, (f"resume={stage1}", "stages.1.lr=1"), "stages.1.lr=1 contradicts"),
        "resume and ckpt": (train, (f"resume={stage1}", f"ckpt={stage1}"), "give one of them"),
        "resume missing": (train, ("resume=none",), "resume=none: no such file or folder"),
        "evaluate without ckpt": (evaluate, (), "ckpt= is missing"),
        "evaluate another task": (evaluate, (f"ckpt={stage2}", "task=rte"), "task=rte contradicts"),
        "threshold below 0": (evaluate, (f"ckpt={stage2}", "threshold=-1"), "threshold=-1 is not an entropy threshold"),
        "threshold a word": (evaluate, (f"ckpt={stage2}", "threshold=[0.1,low]"), "threshold=low is not"),
        "thresholds below 0": (train, (*mrpc, here, "thresholds=[-0.1]"), "thresholds=-0.1 is not"),
        "unknown split": (evaluate, (f"ckpt={stage2}", "split=dev2"), "no file for split 'dev2'"),
        "root missing": (train, (*mrpc, f"data.root={tmp_path / 'none'}"), "no such folder"),
        "root lacks a split": (train, (*mrpc, f"data.root={tmp_path / 'no-validation'}"), "no file for split 'validation'"),
        "root lacks a column": (train, (*mrpc, f"data.root={tmp_path / 'no-column'}"), "lacks the column 'sentence2'"),
        "empty split": (train, (*mrpc, f"data.root={tmp_path / 'empty'}"), "split 'train' is empty"),
        "label out of range": (train, (*mrpc, f"data.root={tmp_path / 'range'}"), "label 5 is out of range"),
        "null text": (train, (*mrpc, f"data.root={tmp_path / 'null'}"), "'sentence2' is None, not a text"),
        "no network for data": (train, mrpc, "use data.root=a local folder"),
        "no network for a backbone": (train, ("task=mrpc", "backbone=bert-base", here), "use backbone=minilm"),
        "too long": (train, (*mrpc, here, "data.max_length=4000"), "backbone tiny takes 130 tokens at most"),
        "no length": (train, (*mrpc, here, "data.max_length=2"), "data.max_length=2 must be a whole number of 8 or more"),
        "no rows": (train, (*mrpc, here, "data.limit_train=0"), "data.limit_train=0 must be a whole number of 1 or more"),
        "seed below 0": (train, (*mrpc, here, "seed=-1"), "seed=-1 must be a whole number from 0"),
        "seed a word": (train, (*mrpc, here, "seed=abc"), "seed=abc must be a whole number"),
        "stage a float": (train, (*mrpc, here, "stage=1.0"), "stage 1.0 is unknown"),
        "no recipe": (train, (*mrpc, here, "stages.1=null"), "stages.1=None must hold a recipe"),
        "warmup a word": (train, (*mrpc, here, "stages.1.warmup=x"), "stages.1.warmup=x must be a number"),
        "negative decay": (train, (*mrpc, here, "stages.1.weight_decay=-1"), "stages.1.weight_decay=-1 must be"),
        "cache a word": (train, ("stage=2", f"ckpt={stage1}", "stages.2.cache=maybe"), "stages.2.cache=maybe must be true or false"),
        "a monitor that cannot change": (train, ("stage=2", f"ckpt={stage1}", "callbacks.best.monitor=val/score"), "val/mean_ramp_score"),
        "max_epochs": (train, (*mrpc, here, "trainer.max_epochs=-1"), "set stages.1.epochs"),
        "root a number": (train, (*mrpc, "data.root=5"), "data.root=5 must be a folder"),
        "workers below 0": (evaluate, (f"ckpt={stage2}", "data.num_workers=-1"), "data.num_workers=-1 must be"),
        "no eval batch": (evaluate, (f"ckpt={stage2}", "data.eval_batch_size=0"), "data.eval_batch_size=0 must be"),
        "a glob for a split": (evaluate, (f"ckpt={stage2}", "split='*'"), "split=* is no name of a split"),
        "a path for a split": (evaluate, (f"ckpt={stage2}", "split=../rte/train"), "is no name of a split"),
        "two splits": (evaluate, (f"ckpt={stage2}", "split=[train,test]"), "must be the name of one split"),
        "backbone sizes that do not fit": (train, (*mrpc, here, "backbone.config.hidden_size=30"), "(backbone.config.*)"),
        "one layer": (train, (*mrpc, here, "backbone.config.num_hidden_layers=1"), "has one layer"),
        "a checkpoint mode": (train, (*mrpc, here, "callbacks.best.monitor=val/score", "callbacks.best.mode=up"), "callbacks.best"),
        "resume a finished run": (train, (f"resume={stage1}",), "has finished all of its 2 epochs"),
        "a used run folder": (train, (*mrpc, here, f"hydra.run.dir={stage2}"), "of another run, and a run folder"),
        "an evaluation into a run": (evaluate, (f"ckpt={stage2}", f"hydra.run.dir={stage2}"), "of another run, and a run folder"),
        "too few rows to standardize": (train, ("stage=2", f"ckpt={stage1}", "data.limit_train=1", "stages.2.standardize=true"), "does not vary over the 1 training rows"),
        "an experiment of another task": (train, ("stage=2", f"ckpt={stage1}", "experiment=demo"), "task=demo contradicts"),
        "no epochs": (train, (*mrpc, here, "stages.1.epochs=0"), "stages.1.epochs=0 must be a whole number"),
        "lr a word": (train, (*mrpc, here, "stages.1.lr=fast"), "stages.1.lr=fast must be a number"),
        "unknown objective": (train, (*mrpc, here, "stages.1.objective=sum"), "choose one of: final, ramps"),
        "standardize without cache": (train, ("stage=2", f"ckpt={stage1}", "stages.2.cache=false", "stages.2.standardize=true"), "leave stages.2.cache=true"),
        "a metric nobody logs": (train, (*mrpc, here, "callbacks.best.monitor=val/f2"), "val/f2"),
        "a precision nobody has": (train, (*mrpc, here, "trainer.precision=64-wide"), "64-wide"),
        "training ax": (train, ("task=ax", *TINY, here), "no training split"),
    }  # fmt: skip


def test_bad_input_is_one_line_with_value_choices_and_flag(
    fails: Run, glue: Path, stage1: Path, stage2: Path, tmp_path: Path
) -> None:
    wrong = {}
    for name, (script, overrides, says) in bad_input(tmp_path, glue, stage1, stage2).items():
        own = f"hydra.run.dir={tmp_path / 'runs' / name.replace(' ', '_')}"
        said = fails(script, own, "logger=csv", *overrides)
        if says not in said:
            wrong[name] = said
    assert not wrong


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["task=nope"], "mrpc"),
        (["task=mrpc", "backbone=nope"], "roberta-base"),
        (["task=mrpc", "stagge=1"], "stagge"),
    ],
)
def test_hydra_s_own_errors_name_the_choices(run: Run, overrides: list[str], says: str) -> None:
    with pytest.raises(CommandFailed) as failure:
        run("train.py", *overrides)
    assert says in str(failure.value)
    assert "Traceback" not in str(failure.value)


def test_a_pickled_checkpoint_is_not_executed(fails: Run, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
    assert "not a checkpoint of this program" in fails("train.py", "stage=2", f"ckpt={tmp_path / 'evil.ckpt'}")  # fmt: skip
    assert not (tmp_path / "owned").exists()
