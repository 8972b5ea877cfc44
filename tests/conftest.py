"""Shared by all tests: no network, caches of their own, and the real command line run in process."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before any library reads them: hermetic also where a hub cache or a W&B account is at hand.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "HF_HOME": tempfile.mkdtemp(prefix="deebert-tests-"),
    "OMP_NUM_THREADS": "1",  # for the processes that tests start
}

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from deebert.data import demo

ROOT = Path(__file__).parent.parent
TINY = ("backbone=tiny", "logger=csv", "data.max_length=64")

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


class CommandFailed(Exception):
    """A command ended with a non-zero exit code."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`run("train.py", *overrides)`: the real script under the real Hydra, in this process.

    Returns what it printed; raises CommandFailed with the same if it failed.
    """

    def command(script: str, *overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *overrides])
        GlobalHydra.instance().clear()
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                printed = capfd.readouterr()
                raise CommandFailed(printed.out + printed.err) from stop
        finally:
            GlobalHydra.instance().clear()
        printed = capfd.readouterr()
        return printed.out + printed.err

    return command


@pytest.fixture
def fails(run: Callable[..., str]) -> Callable[..., str]:
    """`fails("train.py", *overrides)`: must fail in one line without a traceback; returns it.

    In a multirun Hydra adds a line of its own after it.
    """

    def command(script: str, *overrides: str) -> str:
        with pytest.raises(CommandFailed) as failure:
            run(script, *overrides)
        printed = str(failure.value)
        assert "Traceback" not in printed, printed
        lines = [line for line in printed.splitlines() if line and "HYDRA_FULL_ERROR" not in line]
        if "-m" not in overrides:
            assert [line for line in lines if line.startswith("Error: ")] == lines[-1:], printed
        return lines[-1]

    return command


def write_rows(folder: Path, split: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def mrpc_rows(split: str, number: int) -> list[dict]:
    """Rows with MRPC's columns, made from the demo's sentences."""
    return [
        {"sentence1": row["product"], "sentence2": row["review"], "label": row["label"], "idx": i}
        for i, row in enumerate(demo.rows(split)[:number])
    ]


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `datamodule.root` with a small mrpc/ in it."""
    root = tmp_path_factory.mktemp("glue")
    for split, number in (("train", 96), ("validation", 40), ("test", 16)):
        write_rows(root / "mrpc", split, mrpc_rows(split, number))
    return root


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def stage2(stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "stage2"
    command = [
        sys.executable, "train.py", "stage=2", f"ckpt={stage1}", "logger=csv", f"hydra.run.dir={folder}",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())
