"""Lightning's loggers, changed so that they never end a run and write into the run folder alone.

A logger that fails is left out from then on, and one line says so: the results of a run lie in its
folder, with or without W&B. This module does not know what is logged.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch import loggers
from lightning.pytorch.loggers import Logger

from deebert.errors import UserError, first_line, unknown

log = logging.getLogger(__name__)

MODES = {"dryrun": "offline", "run": "online"}  # older words of W&B -> its words
KNOWN_MODES = ("online", "offline", "disabled", "shared")
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

    def log_metrics(self, *args: Any, **options: Any) -> None:
        attempt(self, super().log_metrics, *args, **options)  # type: ignore[misc,arg-type]

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        attempt(self, super().log_hyperparams, *args, **options)  # type: ignore[misc,arg-type]

    def after_save_checkpoint(self, *args: Any) -> None:
        attempt(self, super().after_save_checkpoint, *args)  # type: ignore[misc,arg-type]

    def save(self) -> None:
        attempt(self, super().save)  # type: ignore[misc,arg-type]

    def finalize(self, status: str) -> None:
        attempt(self, super().finalize, status)  # type: ignore[misc,arg-type]


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

    @property
    def experiment(self) -> Any:
        """The run of W&B, or an object that does nothing if it cannot be opened."""
        return attempt(self, lambda: super(WandbLogger, self).experiment) or _DummyExperiment()


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
