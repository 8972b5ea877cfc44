"""Shared by all tests: no network, caches of their own, and the real command line run in process."""

import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

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
from filelock import FileLock
from helpers.ports import free_port
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure

from deebert.data import demo

ROOT = Path(__file__).parent.parent
# A PNG of one pixel.
BLANK = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)
TINY = ("backbone=tiny", "logger=csv", "data.max_length=64")

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


pytest_plugins = ("helpers.hostile_runs", "helpers.scale_commands", "helpers.services")
# They are started first, so that no process is left with a long one at the end.
LONGEST = (
    "test_scale.py", "test_scale_ray.py", "test_cli.py", "test_serve.py", "test_bad_input.py",
    "test_hostile_resume.py", "test_export.py", "test_wandb.py", "test_baselines.py", "test_readme.py",
)  # fmt: skip


class CommandFailed(Exception):
    """A command ended with a non-zero exit code."""


def command(script: str, *overrides: str) -> None:
    """Run the real script (or `-m` and a module) under the real Hydra, in this process.

    A new process would import torch, transformers and Lightning first: several seconds, which show
    nothing. Fixtures of a module or a session use this function, and tests the fixture `run`.

    Raises:
        CommandFailed: the exit code is not 0.
    """
    GlobalHydra.instance().clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MASTER_PORT", str(free_port()))  # for trainer.strategy=ddp
            # Hydra composes each config once more, only to read hydra.mode, which no test sets.
            patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
            if script == "-m":
                module, *overrides = overrides
                patch.setattr(sys, "argv", [module, *overrides])
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                patch.setattr(sys, "argv", [str(ROOT / script), *overrides])
                runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise CommandFailed(f"exit code {stop.code}") from stop
    finally:
        GlobalHydra.instance().clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the longest files to the start; pytest-xdist hands out whole files in this order."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def draw_nothing(figure: Figure, file: str | os.PathLike[str] | IO[bytes], **_: object) -> None:
    """Write a picture without content in place of `Figure.savefig`."""
    if isinstance(file, str | os.PathLike):
        Path(file).write_bytes(BLANK)
    else:
        file.write(BLANK)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Callable[..., str]:  # fmt: skip
    """`run("train.py", *overrides)`: the real script under the real Hydra, in this process.

    Returns what it printed; raises CommandFailed with the same if it failed. A third of the time of
    a command is the drawing of its pictures: only tests with the marker `pictures` get them.
    """
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(Figure, "savefig", draw_nothing)

    def in_process(script: str, *overrides: str) -> str:
        capfd.readouterr()
        try:
            command(script, *overrides)
        except CommandFailed as failure:
            printed = capfd.readouterr()
            raise CommandFailed(printed.out + printed.err) from failure
        printed = capfd.readouterr()
        return printed.out + printed.err

    return in_process


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
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made_once(name, make)`: a folder that `make(folder)` fills once for all processes of pytest.

    Tests read it; a test that changes something takes a copy.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    shared = shared / "shared"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, finished = shared / name, shared / f"{name}.finished"
        with FileLock(shared / f"{name}.lock"):
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                finished.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def glue(made_once: Callable[..., Path]) -> Path:
    """A `datamodule.root` with a small mrpc/ in it."""

    def make(root: Path) -> None:
        for split, number in (("train", 96), ("validation", 40), ("test", 16)):
            write_rows(root / "mrpc", split, mrpc_rows(split, number))

    return made_once("glue", make)


@pytest.fixture(scope="session")
def stage1(glue: Path, made_once: Callable[..., Path]) -> Path:
    """A stage-1 run on MRPC's columns."""
    overrides = (
        "task=mrpc", "stage=1", *TINY, f"data.root={glue}", "seed=7", "ramp=first",
        "stages.1.epochs=2", "stages.1.lr=1e-3", "stages.1.batch_size=8", "stages.1.warmup=0",
        "stages.2.lr=2e-3", "stages.2.epochs=3", "stages.2.batch_size=8", "stages.2.standardize=false",
    )  # fmt: skip
    return made_once("stage1", lambda to: command("train.py", *overrides, f"hydra.run.dir={to}"))


@pytest.fixture(scope="session")
def stage2(stage1: Path, made_once: Callable[..., Path]) -> Path:
    """The stage-2 run that follows."""
    overrides = ("stage=2", f"ckpt={stage1}", "logger=csv")
    return made_once("stage2", lambda to: command("train.py", *overrides, f"hydra.run.dir={to}"))


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())
