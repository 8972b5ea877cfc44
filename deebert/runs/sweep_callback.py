"""Hydra's callback that keeps a multirun's summary up to date."""

import logging
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from deebert.reporting.sweep import write
from deebert.runs import ranks

log = logging.getLogger(__name__)


class SweepSummary(Callback):
    """Keeps the summary of a multirun up to date, as `hydra.callbacks.sweep`.

    After each job, in whichever process it ran: the summary is there even if a later job fails.
    """

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            _keep(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if _keep(config):
            log.info("sweep: %s", _folder(config) / "sweep.md")


def _keep(config: DictConfig) -> bool:
    """Write the summary if this is the process to do it; did it work?"""
    if not ranks.is_first():
        return False
    try:
        write(_folder(config))
    except Exception as error:  # whatever it is, the job itself is well and finished
        log.warning("no summary of the sweep: %s: %s", type(error).__name__, error)
        return False
    return True


def _folder(config: DictConfig) -> Path:
    return Path(config.hydra.runtime.cwd) / config.hydra.sweep.dir
