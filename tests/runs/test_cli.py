"""Training from the command line: real Hydra, real Trainer, tiny backbone."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, CommandFailed, mrpc_rows, results, write_rows
from helpers import forked
from helpers.ports import free_port

Run = Callable[..., str]


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
    result = results(stage2)
    facts = {key: result[key] for key in ("schema", "task", "backbone", "stage", "objective", "seed", "metric")}  # fmt: skip
    assert facts == {
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


def test_better_ramps_on_a_stage_1_of_the_paper(
    run: Callable[..., str], stage1: Path, tmp_path: Path
) -> None:
    """A checkpoint keeps its own settings, and the command line wins over them."""
    second = ("train.py", "stage=2", f"ckpt={stage1}", "stages.2.epochs=1", "logger=csv")
    run(*second, f"hydra.run.dir={tmp_path / 'own'}")
    assert results(tmp_path / "own")["ramp"]["reads"] == "first"
    assert weights(tmp_path / "own")["model.ramps.0.shift"].abs().sum() == 0
    run(*second, "ramp=pair", "stages.2.standardize=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert results(tmp_path / "run")["ramp"]["reads"] == "pair"
    trained = weights(tmp_path / "run")
    assert trained["model.ramps.0.pooler.weight"].shape == (32, 96)
    assert trained["model.ramps.0.shift"].abs().sum() > 0, "standardized"


@pytest.mark.slow
def test_the_default_recipe_fits_what_is_said(
    run: Callable[..., str], glue: Path, tmp_path: Path
) -> None:
    """Ramps are standardized by default where the states are frozen, and not elsewhere."""
    first = tmp_path / "first"
    run("train.py", "task=mrpc", *TINY, f"data.root={glue}", "stages.1.epochs=1", f"hydra.run.dir={first}")  # fmt: skip
    cases = {
        (): ("pair", True),
        ("stages.2.cache=false",): ("pair", False),
        ("ramp=attention",): ("attention", False),
        ("trainer.precision=bf16-true",): ("pair", False),
        ("stages.2.standardize=false",): ("pair", False),
    }
    for number, (overrides, (reads, standardized)) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        run("train.py", "stage=2", f"ckpt={first}", "stages.2.epochs=1", "logger=csv", *overrides, f"hydra.run.dir={folder}")  # fmt: skip
        assert results(folder)["ramp"]["reads"] == reads, overrides
        shift = weights(folder)["model.ramps.0.shift"].abs().sum()
        assert bool(shift > 0) == standardized, overrides


@pytest.mark.slow
def test_trained_ramps_are_trained_on_as_they_are(
    run: Callable[..., str], glue: Path, tmp_path: Path
) -> None:
    """Standardized, they would read something else than what they have learned from."""
    run("train.py", "task=mrpc", *TINY, f"data.root={glue}", "objective=joint", "ramp=mean",
        "stages.1.epochs=1", f"hydra.run.dir={tmp_path / 'joint'}")  # fmt: skip
    overrides = [
        "train.py",
        "stage=2",
        f"ckpt={tmp_path / 'joint'}",
        "stages.2.epochs=1",
        "logger=csv",
    ]
    printed = run(*overrides, "stages.2.standardize=true", "stages.2.lr=1e-12", "objective=ramps",
               f"hydra.run.dir={tmp_path / 'more'}")  # fmt: skip
    assert "ramps that are trained already go on as they are" in printed
    before, after = weights(tmp_path / "joint"), weights(tmp_path / "more")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0, msg=name)
    # What learns to say how wrong a ramp is comes to trained ramps.
    printed = run(*overrides, "stages.2.standardize=true", "ramp.predicts=wrong",
               f"hydra.run.dir={tmp_path / 'wrong'}")  # fmt: skip
    assert "go on as they are" in printed
    # Ramps of the same features but other parts begin anew.
    printed = run(*overrides, "stages.2.standardize=true", "ramp.sees_previous=true",
               f"hydra.run.dir={tmp_path / 'cascade'}")  # fmt: skip
    assert "go on as they are" not in printed
    assert weights(tmp_path / "cascade")["model.ramps.0.shift"].abs().sum() > 0, "standardized"
    # An experiment is whole: the paper's ramps, too, are not the checkpoint's.
    printed = run(*overrides, "experiment=deebert_paper", f"hydra.run.dir={tmp_path / 'paper'}")
    assert results(tmp_path / "paper")["ramp"]["reads"] == "first"
    assert "its ramps are replaced by new ones that read first" in printed


@pytest.mark.slow
def test_a_ramp_without_weight_is_named_and_standardized(
    run: Callable[..., str], glue: Path, tmp_path: Path
) -> None:
    printed = run("train.py", "task=mrpc", *TINY, f"data.root={glue}", "objective=weighted",
               "objective.weights=[0,1,0]", "stages.1.epochs=1", f"hydra.run.dir={tmp_path / 'one'}")  # fmt: skip
    says = "nothing has trained ramp 1, 3, so what leaves there is answered by chance (the last"
    assert says in printed
    before = weights(tmp_path / "one")
    assert before["model.ramps.0.classifier.bias"].abs().sum() == 0
    assert says in run("evaluate.py", f"ckpt={tmp_path / 'one'}", f"hydra.run.dir={tmp_path / 'scored'}")  # fmt: skip
    run("train.py", "stage=2", f"ckpt={tmp_path / 'one'}", "stages.2.epochs=1", "logger=csv",
        "objective=ramps", "stages.2.standardize=true", f"hydra.run.dir={tmp_path / 'two'}")  # fmt: skip
    after = weights(tmp_path / "two")
    assert after["model.ramps.0.shift"].abs().sum() > 0
    assert after["model.ramps.1.shift"].abs().sum() == 0
    assert (after["model.ramps.1.scale"] == 1).all()


def test_results_keep_their_contract(stage2: Path) -> None:
    result = results(stage2)
    assert [ramp["layer"] for ramp in result["exits"]] == [1, 2, 3]
    assert all(set(ramp) >= {"layer", "score", "cost_ratio"} for ramp in result["exits"])
    for point in result["curve"]:
        assert sum(point["exit_counts"]) == result["num_rows"] == 40
        mean = sum(layer * n for layer, n in enumerate(point["exit_counts"], 1)) / 40
        assert point["cost_ratio"] == pytest.approx(mean / 3)
        assert point["expected_saving"] == pytest.approx(1 - point["cost_ratio"])
        assert point["speed_up"] == pytest.approx(1 / point["cost_ratio"])
    assert result["curve"][0]["score"] == result["exits"][-1]["score"]
    assert result["curve"][-1]["score"] == result["exits"][0]["score"], "0.7: all leave at ramp 1"
    assert set(result["curve"][0]["scores"]) == {"f1", "accuracy"}
    assert result["environment"]["versions"]["torch"] == torch.__version__
    table = (stage2 / "results.md").read_text().split("## Score against saving")[1]
    assert table.splitlines()[4].startswith("| 0.0% |")


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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_resume_gives_the_weights_of_the_unbroken_run(
    run: Run, stage: int, stage1: Path, glue: Path, tmp_path: Path
) -> None:
    """A real process is killed, or told to stop, before its last epoch; dropout is on."""
    signal_number = signal.SIGKILL if stage == 1 else signal.SIGTERM
    if stage == 1:
        overrides = ["task=mrpc", "stage=1", *TINY, f"data.root={glue}", "stages.1.epochs=4", "stages.1.lr=1e-3"]  # fmt: skip
    else:
        overrides = ["stage=2", f"ckpt={stage1}", "logger=csv", "stages.2.epochs=10"]
    epochs = 4 if stage == 1 else 10
    killed = tmp_path / "killed"
    printed = tmp_path / "told"
    words = ["train.py", *overrides, f"hydra.run.dir={killed}"]
    process = forked.start(*words, out=printed, err=printed)
    last = killed / "checkpoints" / "last.ckpt"
    deadline = time.time() + 120
    while not last.exists() and time.time() < deadline and process.exitcode is None:
        time.sleep(0.01)
    os.kill(process.pid, signal_number)
    process.join()
    if signal_number == signal.SIGTERM:
        assert process.exitcode == 143
        assert printed.read_text().splitlines()[-1:] == [f"Stopped by SIGTERM; to go on after the last epoch that ended: python train.py resume={killed}"]  # fmt: skip
    assert torch.load(last, weights_only=True)["epoch"] < epochs - 1, "killed too late to tell"
    run("train.py", f"resume={killed}", "logger=csv", f"hydra.run.dir={tmp_path / 'resumed'}")
    run("train.py", *overrides, f"hydra.run.dir={tmp_path / 'unbroken'}")
    assert_equal_weights(tmp_path / "resumed", tmp_path / "unbroken")
    assert results(tmp_path / "resumed")["curve"] == results(tmp_path / "unbroken")["curve"]
    assert results(tmp_path / "resumed")["epoch"] == epochs


@pytest.mark.slow
def test_evaluation_is_stopped_while_it_times(stage2: Path, tmp_path: Path) -> None:
    printed, log = tmp_path / "said", tmp_path / "run" / "evaluate.log"
    words = ["evaluate.py", f"ckpt={stage2}", "threshold=0.3", "timing=1", "repeats=1000000", f"hydra.run.dir={tmp_path / 'run'}"]  # fmt: skip
    process = forked.start(*words, out=printed, err=printed)
    try:
        while process.exitcode is None and not (log.exists() and "timing" in log.read_text()):
            time.sleep(0.05)
        process.terminate()
        process.join(60)
        assert process.exitcode == 143
    finally:
        process.kill()
    assert "Traceback" not in printed.read_text()
    assert printed.read_text().splitlines()[-1] == "Stopped by SIGTERM"


def runs(process: str) -> bool:
    """Is it there, and more than a name that nobody has collected?"""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_spawned_processes_are_stopped_too(stage1: Path, tmp_path: Path) -> None:
    """Left alone they would train on without end."""
    words = ["train.py", "stage=2", f"ckpt={stage1}", "logger=csv", "stages.2.epochs=1000000", "stages.2.cache=false", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp_spawn", f"hydra.run.dir={tmp_path / 'run'}"]  # fmt: skip
    printed, last = tmp_path / "told", tmp_path / "run" / "checkpoints" / "last.ckpt"
    environment = os.environ | {"MASTER_PORT": str(free_port())}
    process = forked.start(*words, out=printed, err=printed, env=environment)
    try:
        while process.exitcode is None and not last.exists():
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        process.join(60)
        assert process.exitcode == 143
        deadline = time.time() + 30  # Python's own helper process ends a little later
        while (left := [child for child in children if runs(child)]) and time.time() < deadline:
            time.sleep(0.05)
        assert not left
    finally:
        process.kill()
    assert printed.read_text().splitlines()[-1].startswith("Stopped by SIGTERM; to go on after")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    run: Run, stage1: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("train.py", "stage=2", f"ckpt={stage1}", f"seed={seed}", "logger=csv", f"hydra.run.dir={tmp_path / name}")  # fmt: skip
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
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


@pytest.mark.slow
def test_resume_keeps_the_best_epoch_so_far(run: Run, glue: Path, tmp_path: Path) -> None:
    """Monitored, with thresholds of its own, and stopped by the user's own limit of steps."""
    overrides = ["task=mrpc", *TINY, f"data.root={glue}", "stages.1.epochs=3", "stages.1.lr=3e-3", "thresholds=[0,0.3]"]  # fmt: skip
    monitor = "callbacks.best.monitor=val/score"
    run(
        "train.py",
        *overrides,
        monitor,
        "stages.1.batch_size=8",
        "+trainer.max_steps=12",
        f"hydra.run.dir={tmp_path / 'part'}",
    )
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


@pytest.mark.slow
def test_a_checkpoint_cannot_name_what_resume_calls(
    run: Run, fails: Run, glue: Path, tmp_path: Path
) -> None:
    overrides = [
        "task=mrpc",
        *TINY,
        f"data.root={glue}",
        "stages.1.epochs=2",
        "stages.1.batch_size=8",
        "+trainer.max_steps=12",
    ]
    run("train.py", *overrides, f"hydra.run.dir={tmp_path / 'part'}")
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


@pytest.mark.slow
def test_spawned_processes_report_too(run: Run, glue: Path, tmp_path: Path) -> None:
    """What the refusal of ddp in a multirun recommends."""
    done = forked.run(
        "train.py", "-m", "task=mrpc", "seed=1", *TINY, f"data.root={glue}", "stages.1.epochs=1",
        "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp_spawn", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
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


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(run: Run, tmp_path: Path) -> None:
    """trainer.strategy=ddp on 2 CPU processes; then one process scores the same weights.

    The tests of docs/scale.md train stage 2 in several processes.
    """
    write_rows(tmp_path / "mrpc", "train", mrpc_rows("train", 96))
    write_rows(tmp_path / "mrpc", "validation", mrpc_rows("validation", 150))  # 3 batches of 64
    folder, single = tmp_path / "run", tmp_path / "single"
    done = forked.run(
        "train.py", "task=mrpc", *TINY, f"data.root={tmp_path}", "stages.1.epochs=1",
        "stages.1.lr=1e-3", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp",
        f"hydra.run.dir={folder}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run("evaluate.py", f"ckpt={folder}", "logger=csv", f"hydra.run.dir={single}")
    result, expected = results(folder), results(single)
    assert result["num_rows"] == expected["num_rows"] == 150
    assert result["exits"] == expected["exits"]
    assert result["curve"] == expected["curve"]
    # 96 rows by 16, dealt out to two processes: 3 steps each.
    assert checkpoint(folder)["global_step"] == 3


@pytest.mark.slow
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
    line = fails(
        "train.py", "-m", "task=mrpc", "stage=3,1", *TINY, f"data.root={glue}", "stages.1.epochs=1",
        f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert "stage 3 is unknown" in line
    assert results(tmp_path / "1")["stage"] == 1


def test_multirun_with_ddp_is_refused(fails: Run, glue: Path, tmp_path: Path) -> None:
    line = fails(
        "train.py", "-m", "task=mrpc", "seed=1,2", *TINY, f"data.root={glue}", "trainer.devices=2",
        "trainer.accelerator=cpu", "trainer.strategy=ddp", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert "trainer.strategy=ddp_spawn" in line
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_help_and_typos_import_nothing_heavy() -> None:
    """--help answers at once because Hydra alone is imported."""
    for script, word in (
        ("train.py", "--help"),
        ("evaluate.py", "--help"),
        ("train.py", "task=nope"),
    ):
        code = (
            "import runpy, sys\n"
            f"sys.argv = [{script!r}, {word!r}]\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'wandb'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
