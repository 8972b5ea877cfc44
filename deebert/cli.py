"""The command `deebert`: train, evaluate, predict, serve, export, sweep and dashboard.

Hands the command line to Hydra for `train` and `evaluate`, and to the key=value grammar of
`deebert.options` for the others. Only what a command needs is imported, so that `--help`, typos and
completion answer at once.
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deebert.errors import UserError
from deebert.options import conf_folder, open_streams, refuse, refuse_moved, run_command

if TYPE_CHECKING:  # Hydra takes a third of a second to import
    from omegaconf import DictConfig


class Command(NamedTuple):
    """A command that takes key=value.

    Attributes:
        module: where it is, imported when it is called.
        options: the name of the dataclass of its values.
        run: the name of the function that takes them.
        example: its values in an example.
        summary: what it does.
    """

    module: str
    options: str
    run: str
    example: str
    summary: str


JOBS = {
    "train": "train one of the two stages; python train.py is the same",
    "evaluate": "measure a checkpoint or a record; python evaluate.py is the same",
}
COMMANDS = {
    "predict": Command(
        "deebert.predict.command", "PredictOptions", "predict",
        "model=RUN input=reviews.csv output=out.csv target_saving=0.4",
        "answer the rows of a file",
    ),
    "serve": Command(
        "deebert.serve.command", "ServeOptions", "run", "model=RUN target_saving=0.4 port=8000",
        "answer texts over HTTP",
    ),
    "export": Command(
        "deebert.export.onnx_folder", "ExportOptions", "run",
        "model=RUN output=exported target_saving=0.4",
        "write ONNX graphs that need no torch",
    ),
    "sweep": Command(
        "deebert.reporting.sweep", "SweepOptions", "run", "folder=multirun/2026-01-31/12-00-00",
        "sum up the jobs of a multirun folder",
    ),
    "dashboard": Command(
        "deebert.reporting.wandb", "DashboardOptions", "run", "project=my-team/deebert",
        "save the W&B dashboard as a view",
    ),
}  # fmt: skip

_command_line: list[str] = []


def train(cfg: "DictConfig") -> float | None:
    """Run the job of `train`; return its value for a sweeper."""
    return _job(cfg, "deebert.runs.train", "train")


def evaluate(cfg: "DictConfig") -> float | None:
    """Run the job of `evaluate`; return its value for a sweeper."""
    return _job(cfg, "deebert.runs.evaluate", "evaluate")


def _job(cfg: "DictConfig", module: str, name: str) -> float | None:
    from hydra.core.hydra_config import HydraConfig

    from deebert.runs import run_folder, signals

    if _command_line:
        # Lightning starts the other processes of a job with these words: the name of the command
        # that Hydra must not see belongs to them.
        sys.argv[:] = _command_line
    open_streams()
    # On a full disk, a line of the log file is lost, without a traceback on stderr.
    logging.raiseExceptions = False
    folder = Path(HydraConfig.get().runtime.output_dir)
    with signals.in_one_line(cfg), run_folder.claimed(folder):
        job: Callable[[DictConfig], float | None] = getattr(import_module(module), name)
        return job(cfg)


def main() -> None:
    """Run the command line.

    A user's mistake ends it with one line and exit code 2. What Hydra itself refuses ends it with
    Hydra's message and exit code 1.
    """
    name: str | None
    name, *arguments = sys.argv[1:] or ["--help"]
    if name == "-sc":
        name, arguments = _completed(name, arguments)
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        from deebert import __version__

        print(__version__)
    elif name in JOBS:
        _run_hydra(name, arguments)
    elif name in COMMANDS:
        command = COMMANDS[name]
        module = import_module(command.module)
        example = f"deebert {name} {command.example}"
        options, run = getattr(module, command.options), getattr(module, command.run)
        run_command(options, run, f"deebert {name}", example, arguments)
    elif name is not None:
        known = ", ".join([*JOBS, *COMMANDS])
        refuse(UserError(f"command {name!r} is unknown; choose one of: {known} (deebert COMMAND)"))


def usage() -> str:
    """Write what `deebert --help` prints."""
    summaries = JOBS | {name: command.summary for name, command in COMMANDS.items()}
    lines = [f"  {name:<10} {summary}" for name, summary in summaries.items()]
    return "\n".join(
        ["deebert COMMAND key=value ...", "", *lines, "", "deebert COMMAND --help says more."]
    )


def share_hydra_store() -> None:
    """Let Hydra read its store of configs instead of a copy of it.

    For each config group that `--help` lists Hydra copies the whole store, which takes half of the
    time of `--help`. Nothing writes into these copies.
    """
    from hydra.core.config_store import ConfigStore

    ConfigStore.__deepcopy__ = lambda store, memo: store


def _run_hydra(name: str, arguments: list[str]) -> None:
    import hydra

    try:
        folder = conf_folder()
    except UserError as error:
        refuse(error)
    if name == "evaluate":
        refuse_moved(arguments)
    share_hydra_store()
    _command_line[:] = sys.argv
    sys.argv[1:] = arguments
    job = {"train": train, "evaluate": evaluate}[name]
    try:
        hydra.main(version_base="1.3", config_path=str(folder), config_name=name)(job)()
    finally:
        _command_line.clear()


def _completed(flag: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Complete the word that stands in the environment, as Hydra's shell function asks for it.

    Returns:
        The command and the arguments for Hydra; None where the word is completed already.
    """
    if not any(word.startswith("query=") for word in arguments):
        return "train", [flag, *arguments]  # Hydra's function for the shell serves all commands
    line = os.environ.get("COMP_LINE", "")
    program, *rest = line.split(" ")
    name = rest[0] if rest else ""
    if len(rest) < 2:
        print(" ".join(each for each in (*JOBS, *COMMANDS) if each.startswith(name)))
    elif name in JOBS:
        os.environ["COMP_LINE"] = " ".join([program, *rest[1:]])
        return name, [flag, *arguments]
    elif name in COMMANDS:
        command = COMMANDS[name]
        options = fields(getattr(import_module(command.module), command.options))
        print(" ".join(f"{each.name}=" for each in options if each.name.startswith(rest[-1])))
    return None, []


if __name__ == "__main__":
    main()
