"""The callback of Hydra that writes the summary of a multirun after each job.

`reporting.sweep` makes the summary. This module does not know what is in it.
"""

import atexit
import logging
from functools import partial
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from deebert.reporting.sweep import write
from deebert.runs import signals

log = logging.getLogger(__name__)


class SweepSummary(Callback):
    """The callback `hydra.callbacks.sweep`, which keeps the summary of a multirun up to date.

    It writes the summary after each job, in the process of the job. The summary therefore exists
    even if a later job fails. Where a launcher fails, because the process of a job was killed, the
    summary is written when the process of the multirun ends. It names the jobs without results.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.at_exit = partial(_write_last, config)
        atexit.register(self.at_exit)

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            _write_summary(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.unregister(self.at_exit)
        _write_last(config)


def _write_last(config: DictConfig) -> None:
    """Write the summary at the end of a multirun, and say where it is."""
    if _folder(config).is_dir() and _write_summary(config):
        log.info("sweep: %s", _folder(config) / "sweep.md")


def _write_summary(config: DictConfig) -> bool:
    """Write the summary, and say whether this process has written it."""
    if not signals.is_first_process():
        return False
    try:
        write(_folder(config))
    except Exception as error:  # a summary that fails must not fail the job, which is finished
        log.warning("no summary of the sweep: %s: %s", type(error).__name__, error)
        return False
    return True


def _folder(config: DictConfig) -> Path:
    """Return the folder of the multirun."""
    return Path(config.hydra.runtime.cwd) / config.hydra.sweep.dir
