"""Lightning's loggers, changed so that they never end a run and write into the run folder alone.

A logger that fails is left out from then on, and one line says so: the results of a run lie in its
folder, with or without W&B. `to_trackers` gives results to the loggers that can show them.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch import loggers
from lightning.pytorch.loggers import Logger

from deebert.errors import UserError, first_line, unknown
from deebert.reporting import trackers
from deebert.reporting import wandb as wandb_results

log = logging.getLogger(__name__)

MODES = {"dryrun": "offline", "run": "online"}  # older words of W&B -> its words
KNOWN_MODES = ("online", "offline", "disabled", "shared")
# Loggers that need an extra of this package: the extra, and the modules that it brings.
PACKAGES = {
    "TensorBoardLogger": ("tensorboard", ("tensorboard",)),
    "MLFlowLogger": ("mlflow", ("mlflow", "sqlalchemy", "alembic")),
}
# W&B would write these below the home folder, also for an offline run.
FOLDERS = {"WANDB_DATA_DIR": "wandb/data", "WANDB_CACHE_DIR": "wandb/cache"}


def attempt(logger: Logger, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of a logger, unless the logger has failed before.

    Args:
        logger: the logger.
        call: the function.
        *args: its arguments.
        **options: its keyword arguments.

    Returns:
        What the function returns; None if it has failed now or before.
    """
    if getattr(logger, "has_failed", False):
        return None
    try:
        return call(*args, **options)
    except Exception as error:  # W&B raises many types
        logger.has_failed = True  # type: ignore[attr-defined]
        name = type(logger).__name__
        log.warning(
            "%s has failed, and the run goes on without it: %s: %s",
            name,
            type(error).__name__,
            first_line(error),
        )
        return None


class _Lasting:
    """The part that makes a logger of Lightning's one that never ends a run."""

    @property
    def experiment(self) -> Any:
        """What the logger writes to, or an object that does nothing if it cannot be opened."""
        return attempt(self, lambda: super(_Lasting, self).experiment) or _DummyExperiment()  # type: ignore[misc,arg-type]

    def log_metrics(self, *args: Any, **options: Any) -> None:
        attempt(self, super().log_metrics, *args, **options)  # type: ignore[misc,arg-type]

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        attempt(self, super().log_hyperparams, *args, **options)  # type: ignore[misc,arg-type]

    def after_save_checkpoint(self, *args: Any) -> None:
        attempt(self, super().after_save_checkpoint, *args)  # type: ignore[misc,arg-type]

    def save(self) -> None:
        attempt(self, super().save)  # type: ignore[misc,arg-type]

    def finalize(self, status: str = "success") -> None:
        attempt(self, super().finalize, status)  # type: ignore[misc,arg-type]


class TensorBoardLogger(_Lasting, loggers.TensorBoardLogger):
    """Lightning's logger to TensorBoard.

    Args:
        **options: the arguments of Lightning's logger.
    """

    def __init__(self, **options: Any) -> None:
        check_package("TensorBoardLogger")
        super().__init__(default_hp_metric=False, **options)


class MLFlowLogger(_Lasting, loggers.MLFlowLogger):
    """Lightning's logger to MLflow, which writes into the run folder if no server is named.

    MLflow reports its use to its makers unless `MLFLOW_DISABLE_TELEMETRY` is true, as it is here
    where the user has not set it.

    Args:
        save_dir: the run folder.
        tracking_uri: where MLflow keeps its runs; None for `MLFLOW_TRACKING_URI`, else a database
            in the run folder. MLflow takes no plain folder any more.
        artifact_location: where the files of a new experiment lie; None for the tracking server's
            default, or for the run folder beside the database there.
        **options: the arguments of Lightning's logger.
    """

    def __init__(
        self,
        save_dir: str,
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
        **options: Any,
    ) -> None:
        check_package("MLFlowLogger")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Both say that they create what is not there yet.
        for name in ("mlflow", "lightning.pytorch.loggers.mlflow"):
            logging.getLogger(name).setLevel(logging.ERROR)
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not tracking_uri:
            folder = Path(save_dir).absolute()
            tracking_uri = f"sqlite:///{folder / 'mlflow.db'}"
            artifact_location = artifact_location or (folder / "mlflow").as_uri()
        super().__init__(
            save_dir=save_dir,
            tracking_uri=tracking_uri,
            artifact_location=artifact_location,
            **options,
        )


def to_trackers(given: Sequence[Logger], call: str, *args: Any) -> None:
    """Give results to each logger that shows them: W&B, TensorBoard and MLflow.

    Args:
        given: the loggers of a Trainer.
        call: `log_evaluation` or `log_final`.
        *args: the arguments of that function (`reporting.trackers`).
    """

    def to_one(logger: Logger) -> None:
        if isinstance(logger, loggers.WandbLogger):
            getattr(wandb_results, call)(logger.experiment, *args)
        elif isinstance(logger, loggers.TensorBoardLogger):
            getattr(trackers.TensorBoard(logger.experiment), call)(*args)
        elif isinstance(logger, loggers.MLFlowLogger):
            getattr(trackers.MLflow(logger.experiment, str(logger.run_id)), call)(*args)

    for logger in given:
        attempt(logger, to_one, logger)


def check_package(target: str) -> None:
    """Check that the package of a logger is installed.

    Args:
        target: the name of the logger's class, or its `_target_`.

    Raises:
        UserError: it is not installed.
    """
    package, modules = PACKAGES.get(target.rpartition(".")[2], ("", ()))
    if any(find_spec(module) is None for module in modules):
        raise UserError(
            f"logger={package}: {package} is not installed: pip install 'deebert[{package}]'"
        )


class CSVLogger(_Lasting, loggers.CSVLogger):
    """Lightning's logger of CSV files."""


class WandbLogger(_Lasting, loggers.WandbLogger):
    """Lightning's logger to W&B, which follows `WANDB_MODE`.

    Args:
        offline: whether the run is kept in the run folder alone (`wandb_mode`).
        **options: the arguments of Lightning's logger.
    """

    def __init__(self, offline: bool | None = None, **options: Any) -> None:
        mode = wandb_mode(offline)
        super().__init__(offline=mode == "offline", **options)
        # Lightning would set WANDB_MODE for the whole process, and so for the next jobs of a sweep.
        self._offline = False
        self._wandb_init["mode"] = mode
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)  # W&B warns of it, whatever its value


def wandb_mode(offline: bool | None) -> str:
    """Return the mode of a run of W&B: online, offline or disabled.

    Args:
        offline: the value of `logger.wandb.offline`. None: what `WANDB_MODE` says, else offline.
            A `WANDB_MODE` of disabled or offline always counts.

    Raises:
        UserError: `WANDB_MODE` is none of W&B's.
    """
    named = os.environ.get("WANDB_MODE", "").lower()
    named = MODES.get(named, named)
    if named and named not in KNOWN_MODES:
        raise unknown("WANDB_MODE", named, KNOWN_MODES, "WANDB_MODE")
    if named in ("disabled", "offline"):
        return named
    if offline is None:
        return named or "offline"
    return "offline" if offline else "online"


def check_login(offline: bool | None) -> None:
    """Check that a run of W&B that is online has an account.

    On a terminal, W&B asks for the key.

    Raises:
        UserError: there is no key.
    """
    if wandb_mode(offline) in ("disabled", "offline"):
        return
    import wandb

    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise UserError(
            f"logger.wandb.offline={str(offline).lower()}: W&B has no account to log to "
            f"({first_line(error)}): run `wandb login`, set WANDB_API_KEY, or leave it out"
        ) from error


@contextmanager
def wandb_inside(folder: Path) -> Iterator[None]:
    """Let W&B write all of its files into a run folder, inside the `with` block.

    Folders that the user has named in the environment stay.
    """
    ours = {name: str(folder / place) for name, place in FOLDERS.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
