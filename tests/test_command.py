"""The command `deebert`: its commands, its old names, completion, and the processes it starts."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, results
from helpers.ports import free_port
from hydra.core.config_store import ConfigStore

import deebert
from deebert import cli
from deebert.options import job_command


def called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, str, str]:
    """Call the command in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["deebert", *arguments])
    try:
        code: object = cli.main()
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_help_lists_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, _ = called(monkeypatch, capsys, "--help")
    names = [line.split()[0] for line in printed.splitlines() if line.startswith("  ")]
    assert code is None
    assert names == ["train", "evaluate", "predict", "serve", "export", "sweep", "dashboard"]
    assert called(monkeypatch, capsys)[1] == printed


def test_help_of_hydra_copies_no_store(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the time of --help was spent on 95 copies."""
    _, printed, _ = called(monkeypatch, capsys, "train", "--help")
    assert "exit: change, confident_patience" in printed
    store = ConfigStore.instance()
    assert copy.deepcopy([store])[0] is store


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, capsys, "--version")[1].strip() == deebert.__version__


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, printed, _ = called(monkeypatch, capsys, name, "--help")
    assert printed.startswith(f"deebert {name} key=value ...")
    assert f"  deebert {name} {cli.COMMANDS[name].example}" in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([""], "command '' is unknown"),
        (["trian"], "command 'trian' is unknown; choose one of: train, evaluate, predict,"),
        (["predict"], "model= is missing"),
        (["sweep", "folder=nowhere"], "nowhere is not a folder"),
        (["dashboard", "project=x"], "project=x is no project; give ENTITY/PROJECT"),
    ],
)
def test_a_mistake_ends_in_one_line(
    arguments: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, printed, error = called(monkeypatch, capsys, *arguments)
    assert (code, printed, len(error.splitlines())) == (2, "", 1)
    assert line in error


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("train.py", "python train.py"),
        ("/somewhere/evaluate.py", "python train.py"),
        ("/usr/bin/deebert", "deebert train"),
        ("/somewhere/deebert/__main__.py", "deebert train"),
        ("ipykernel_launcher.py", "deebert train"),
    ],
)
def test_hints_name_the_program_that_was_started(
    program: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "task=mrpc"])
    assert job_command("train") == command


def test_a_hint_names_what_the_user_has(fails: Callable[..., str]) -> None:
    """`deebert` is installed without train.py and evaluate.py."""
    for job, script, line in (
        (
            "train",
            "train.py",
            "task= is missing: {} task=mrpc stage=1, or a file of your own: data.file=tickets.csv; ",
        ),
        ("evaluate", "evaluate.py", "ckpt= is missing: {} ckpt=RUN "),
    ):
        assert line.format(f"deebert {job}") in fails("-m", "deebert", job)
        assert line.format(f"python {script}") in fails(script)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("deebert ", "train evaluate predict serve export sweep dashboard"),
        ("deebert ev", "evaluate"),
        ("deebert train task=mr", "task=mrpc"),
        ("deebert predict inp", "input="),
    ],
)
def test_completion(
    line: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COMP_LINE", line)  # as Hydra's function for bash sets it
    assert called(monkeypatch, capsys, "-sc", "query=bash")[1].split() == words.split()


@pytest.mark.parametrize("arguments", [["-sc"], ["train", "-sc"]])
def test_completion_is_installed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = called(monkeypatch, capsys, *arguments, "install=bash")[1]
    assert printed.rstrip().endswith("hydra_bash_completion deebert")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predict", "serve", "export"])
def test_an_old_name_says_the_new_one(name: str) -> None:
    command = [sys.executable, "-m", f"deebert.{name}", "model=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"Error: python -m deebert.{name} is now: deebert {name} key=value ...\n"


@pytest.mark.slow
def test_processes_of_a_training_get_the_whole_command_line(glue: Path, tmp_path: Path) -> None:
    """Lightning starts them with the words after the program's name; `train` is one of these."""
    command = [
        sys.executable, "-m", "deebert", "train", "task=mrpc", "stage=1", *TINY, f"data.root={glue}",
        "stages.1.epochs=1", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp",
        "hydra.run.dir=run",
    ]  # fmt: skip
    subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, timeout=250,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())},
    )  # fmt: skip
    assert (tmp_path / "run" / "train.log").is_file()
    assert results(tmp_path / "run")["num_rows"] == 40
