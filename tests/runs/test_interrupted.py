"""Trainings that are killed, that meet a full disk, or that share a folder."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, results
from helpers import forked
from helpers.disks import limited_files, of_other_modes

from deebert import EarlyExitClassifier

Run = Callable[..., str]

MONITORED = "callbacks.best.monitor=val/mean_ramp_score"
CLOSING = {  # the last moment at which each kind of run has no results yet
    "of the last epoch": ((), ("on_train_end", "fit")),
    "of the best epoch": ((MONITORED,), ("on_validation_epoch_end", "validate")),
}


def process(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run train.py in a process of its own, which may import the tests' helpers."""
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | environment
    return forked.run("train.py", *words, env=os.environ | own)


def kill(hook: str, function: str) -> str:
    return f"+callbacks.kill={{_target_: helpers.kills.Kill, hook: {hook}, function: {function}}}"


def same_run(a: Path, b: Path) -> None:
    """Both ended with the same weights and the same results."""
    for name in ("best", "last"):
        ours, theirs = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (a, b))  # fmt: skip
        assert ours["epoch"] == theirs["epoch"]
        assert ours["state_dict"].keys() == theirs["state_dict"].keys()
        for key, value in ours["state_dict"].items():
            assert torch.equal(value, theirs["state_dict"][key]), (name, key)
    ours, theirs = ({k: v for k, v in results(run).items() if k != "ckpt"} for run in (a, b))
    assert ours == theirs
    ours, theirs = ({file.name for file in (run / "records").iterdir()} for run in (a, b))
    assert ours == theirs
    ours, theirs = (EarlyExitClassifier.from_pretrained(run) for run in (a, b))
    point = {"target_saving": 0.3}
    assert ours.calibrate(**point).thresholds == theirs.calibrate(**point).thresholds


@pytest.mark.slow
@pytest.mark.parametrize("results_of", list(CLOSING))
def test_killed_before_the_closing_validation(
    run: Run, fails: Run, glue: Path, tmp_path: Path, results_of: str
) -> None:
    """All epochs are done, and there are no results: it can be loaded and resumed."""
    overrides, moment = CLOSING[results_of]
    words = ["task=mrpc", *TINY, *overrides, f"data.root={glue}", "stages.1.epochs=2", "stages.1.lr=3e-3", "objective=joint"]  # fmt: skip
    killed, resumed, unbroken = (tmp_path / name for name in ("killed", "resumed", "unbroken"))
    done = process(*words, kill(*moment), f"hydra.run.dir={killed}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(killed / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
    assert EarlyExitClassifier.from_pretrained(killed).predict([("a", "b")]).exit_layers == [3]
    run("train.py", f"resume={killed}", "logger=csv", f"hydra.run.dir={resumed}")
    run("train.py", *words, f"hydra.run.dir={unbroken}")
    same_run(resumed, unbroken)
    # A run with results is refused, the resumed one as well as the unbroken one.
    for finished in (resumed, unbroken):
        line = fails("train.py", f"resume={finished}", f"hydra.run.dir={tmp_path / 'more'}")
        assert "has finished all of its 2 epochs" in line


@pytest.mark.slow
def test_resume_names_the_checkpoint_that_is_whole(
    run: Run, fails: Run, broken: Path, tmp_path: Path
) -> None:
    """As a kill left it while Lightning copied the file from another file system."""
    folder = Path(shutil.copytree(broken, tmp_path / "killed"))
    last, best = (folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    whole = last.read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        last.write_bytes(content)
        line = fails("train.py", f"resume={folder}", f"hydra.run.dir={tmp_path / 'out'}")
        assert "a damaged one" in line
        assert line.endswith(f"; best.ckpt of epoch 1 is whole: resume={best}")
    last.unlink()  # killed before the first one was written: the other one is as good
    run("train.py", f"resume={folder}", "logger=csv", f"hydra.run.dir={tmp_path / 'rest'}")
    assert results(tmp_path / "rest")["exits"][-1]["layer"] == 3
    best.write_bytes(b"")
    assert "a damaged one" in fails("train.py", f"resume={folder}", f"hydra.run.dir={tmp_path / 'out'}")  # fmt: skip


@pytest.mark.slow
def test_a_run_folder_takes_one_run_at_a_time(fails: Run, stage1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["stage=2", f"ckpt={stage1}", "logger=csv", f"hydra.run.dir={folder}"]
    first = forked.start("train.py", *words, "stages.2.epochs=1000000")
    try:
        # Before it has written a file of its own, and while it trains.
        for file in (folder / ".lock", folder / "checkpoints" / "last.ckpt"):
            while not file.exists() and first.exitcode is None:
                time.sleep(0.02)
            line = fails("train.py", *words, "stages.2.epochs=1")
            assert line == f"Error: hydra.run.dir={folder}: another run is writing into it; choose another hydra.run.dir, or leave it out"  # fmt: skip
        assert "stages.2.epochs=1000000" in (folder / ".hydra" / "overrides.yaml").read_text()
        assert first.exitcode is None, "it goes on"
    finally:
        first.kill()
        first.join()
    assert "of another run, and a run folder is never reused" in fails("train.py", *words)
    assert "stages.2.epochs=1000000" in (folder / ".hydra" / "overrides.yaml").read_text()


def test_a_mistake_gives_the_folder_back(
    run: Run, fails: Run, stage2: Path, tmp_path: Path
) -> None:
    words = [f"record={stage2}", f"hydra.run.dir={tmp_path}"]
    assert "target_saving" in fails("evaluate.py", *words, "target_saving=7")
    run("evaluate.py", *words, "target_saving=0.3")
    assert "holds the results.json of another run" in fails("evaluate.py", *words)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_what_was_finished_stays(
    fails: Run, run: Run, stage1: Path, tmp_path: Path
) -> None:
    """While a checkpoint is written: the run goes on from the one before."""
    whole = (stage1 / "checkpoints" / "last.ckpt").stat().st_size
    folder = tmp_path / "run"
    words = ["stage=2", f"ckpt={stage1}", "logger=csv", "stages.2.epochs=2"]
    with limited_files(whole // 4):
        line = fails("train.py", *words, f"hydra.run.dir={folder}")
    assert line == f"Error: {folder / 'checkpoints'}: it cannot be written (File too large); no checkpoint is written, so there is nothing yet to go on with"  # fmt: skip
    assert not list((folder / "checkpoints").iterdir())


def test_the_files_of_a_run_have_the_modes_of_the_umask(stage2: Path) -> None:
    """Another user's service reads weights and records."""
    assert not of_other_modes(stage2)


@pytest.mark.slow
def test_killed_in_chosen_moments(tmp_path: Path) -> None:
    """The short version of the benchmark: TMPDIR is on another file system where there is one."""
    other = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    words = ["benchmarks/kills.py", "--random=0", "--checkpoint=1", "--closing=1"]
    done = forked.run(*words, f"--tmpdir={other}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "kills.json").read_text())
    assert [(row["kind"], row["difference"]) for row in content["rows"]] == [("checkpoint", None), ("closing", None)]  # fmt: skip
    assert content["rows"][0]["half_written"]
    assert not any(row["damaged"] for row in content["rows"])
