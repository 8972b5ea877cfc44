"""Training and evaluation from Python: the same functions that the command line runs.

`train` and `evaluate` let Hydra compose the configuration from keywords, as it does from the words
of a command line, and run the job in this process. The rows of a data set in memory are written
into the run folder and read from there, so a run needs nothing that is in memory only.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import run_job
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from deebert.data import memory
from deebert.errors import UserError
from deebert.options import conf_folder
from deebert.reporting.results import Results
from deebert.reporting.split_results import Point
from deebert.runs import evaluate as evaluation
from deebert.runs import run_folder
from deebert.runs import train as training
from deebert.runs.job import Job, read_results

if TYPE_CHECKING:
    from deebert.classifier import EarlyExitClassifier

ROWS = "rows"  # where in the run folder the rows from memory are written
CONSTANTS = ("true", "false", "null", "nan", "inf")  # words that Hydra reads as values


@dataclass(frozen=True)
class Run:
    """A finished training or evaluation.

    Attributes:
        folder: the run folder.
        results: the content of its results.json.
    """

    folder: Path
    results: Results

    @property
    def curve(self) -> list[Point]:
        """Score and expected saving for each threshold, for `pandas.DataFrame(run.curve)`."""
        return self.results.headline.curve

    @cached_property
    def classifier(self) -> "EarlyExitClassifier":
        """The model of the run: `classifier.predict(texts, target_saving=0.4)`.

        Without a target it runs at full depth.
        """
        from deebert.classifier import EarlyExitClassifier

        return EarlyExitClassifier.from_pretrained(str(self.folder))

    def __fspath__(self) -> str:
        return str(self.folder)


def train(*, data: Any = None, config_dir: str | Path | None = None, **settings: Any) -> Run:
    """Train one of the two stages, as `deebert train` does.

    Args:
        data: the rows: a `Dataset` or `DatasetDict`, a pandas DataFrame, a dict of columns, a list
            of dicts, a dict of such things by split, or the path of a file or folder
            (`data.file=`). None: the rows that `task` or the checkpoint names. Rows in memory are
            written into the run folder.
        config_dir: a folder with configurations of your own (`--config-dir`).
        **settings: keys of the configuration. A block is a dict, and its keys may be dotted:
            `train(task="mrpc", stages={1: {"lr": 3e-5}})`, `train(**{"stages.1.lr": 3e-5})`.

    Returns:
        The run. `train(stage=2, ckpt=run)` goes on from it.

    Raises:
        UserError: the settings or the rows have a mistake.
    """
    return _run("train", training.train, data, config_dir, settings)


def evaluate(*, data: Any = None, config_dir: str | Path | None = None, **settings: Any) -> Run:
    """Evaluate a checkpoint or its records, as `deebert evaluate` does.

    Args:
        data: other rows than those of the checkpoint, as in `train`. All of them are reported.
        config_dir: a folder with configurations of your own (`--config-dir`).
        **settings: keys of the configuration: `evaluate(ckpt=run, target_saving=0.4)`.

    Returns:
        The run.

    Raises:
        UserError: the settings or the rows have a mistake.
    """
    return _run("evaluate", evaluation.evaluate, data, config_dir, settings)


def modules(
    *, data: Any = None, config_dir: str | Path | None = None, **settings: Any
) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Return the LightningModule and the DataModule of a training, for a Trainer of your own.

    Args:
        data: as in `train`.
        config_dir: as in `train`.
        **settings: as in `train`. Keys of the Trainer, callbacks and loggers do nothing.

    Raises:
        UserError: the settings or the rows have a mistake.
    """
    made: list[tuple[L.LightningModule, L.LightningDataModule]] = []

    def prepare(cfg: DictConfig) -> None:
        prepared = training.prepare(cfg, Job.current())
        made.append((prepared.module, prepared.data))

    with _job("train", data, config_dir, settings) as (_, run):
        run(prepare)
    return made[0]


def _run(
    name: str,
    job: Callable[[DictConfig], Any],
    data: Any,
    config_dir: str | Path | None,
    settings: Mapping[str, Any],
) -> Run:
    with _job(name, data, config_dir, settings) as (folder, run):
        run(job)
        if (results := read_results(folder)) is None:
            raise UserError(f"nothing was evaluated; run folder: {folder}")
        return Run(folder, results)


@contextmanager
def _job(
    name: str, data: Any, config_dir: str | Path | None, settings: Mapping[str, Any]
) -> Iterator[tuple[Path, Callable[[Callable[[DictConfig], Any]], None]]]:
    """Compose the configuration, claim the run folder and write the rows from memory into it.

    Yields:
        The run folder, and a function that runs a job of Hydra in it.
    """
    with ExitStack() as stack:
        stack.enter_context(_hydra(name))
        overrides = _overrides(settings, _groups(config_dir))
        if config_dir is not None:
            overrides.append(
                _override("hydra.searchpath", [f"file://{Path(config_dir).absolute()}"])
            )
        folder = Path(_composed(name, overrides).hydra.run.dir).absolute()
        overrides.append(_override("hydra.run.dir", str(folder)))
        stack.enter_context(run_folder.claimed(folder))
        if data is not None:
            overrides += [_override(*each) for each in _place(name, data, folder).items()]
        cfg = _composed(name, overrides)
        _refuse_processes(cfg)
        context = HydraContext(
            config_loader=GlobalHydra.instance().config_loader(),
            callbacks=Callbacks(),
        )

        def run(job: Callable[[DictConfig], Any]) -> None:
            errors: list[UserError] = []

            def task(cfg: DictConfig) -> None:
                try:
                    job(cfg)
                except UserError as error:  # Hydra would print it, too
                    errors.append(error)

            with _log_file(folder / f"{name}.log"):
                done = run_job(task, cfg, "hydra.run.dir", None, context, configure_logging=False)
            if errors:
                raise errors[0]
            _ = done.return_value  # raises any other error

        yield folder, run


@contextmanager
def _hydra(name: str) -> Iterator[None]:
    """Let Hydra find the configurations, and give its state back afterwards.

    A notebook or a program of Hydra's own may have a state.
    """
    state = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), job_name=name, version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = state


def _composed(name: str, overrides: list[str]) -> DictConfig:
    try:
        return compose(name, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from error


def _groups(config_dir: str | Path | None) -> set[str]:
    """Return the keys that name a file of the configurations, such as `task`."""
    folders = [conf_folder(), *([Path(config_dir)] if config_dir else [])]
    return {each.name for folder in folders if folder.is_dir() for each in folder.iterdir()}


def _overrides(settings: Mapping[str, Any], groups: set[str]) -> list[str]:
    """Return keywords as the words of a command line."""
    words = []
    for key, value in _flat(settings, ""):
        names_file = key in groups and (value is None or isinstance(value, str))
        words.append(
            _override(key if names_file or key.startswith("hydra.") else f"++{key}", value)
        )
    return words


def _flat(settings: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _override(key: str, value: Any) -> str:
    return f"{key}={_word(value)}"


def _word(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if isinstance(value, os.PathLike):  # a path, or a run
        value = os.fspath(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, Mapping):
        return "{}"
    if not isinstance(value, str):
        raise UserError(f"{value!r} is no value of the configuration: give a number, text or list")
    if re.fullmatch(r"[A-Za-z_][\w/-]*", value) and value.lower() not in CONSTANTS:
        return value
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f'"{escaped}"'


def _place(name: str, data: Any, folder: Path) -> dict[str, str]:
    """Return the keys that name the rows; rows in memory are written into the run folder."""
    if isinstance(data, str | os.PathLike):
        return {"data.file": os.fspath(data)}
    # Rows for an evaluation are all reported. Those for a training are split.
    split = "validation" if name == "evaluate" else None
    return {"data.file": str(memory.write(data, folder / ROWS, split))}


def _refuse_processes(cfg: DictConfig) -> None:
    """Refuse several processes: Lightning would start the user's own program in each of them.

    Raises:
        UserError: the settings ask for them.
    """
    for key in ("devices", "num_nodes"):
        value = (cfg.get("trainer") or {}).get(key, 1)
        if value not in (1, "1", None, "auto"):
            raise UserError(
                f"trainer.{key}={value}: a run from Python has one process; use the command "
                f"deebert train trainer.{key}={value}"
            )


@contextmanager
def _log_file(file: Path) -> Iterator[None]:
    """Write what the package logs into a file of the run folder, as Hydra does for the command."""
    package = logging.getLogger("deebert")
    handler = logging.FileHandler(file, delay=True)
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()
