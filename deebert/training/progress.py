"""The progress of a training as the user sees it: a bar, and a line for each epoch."""

import logging
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar
from rich.console import Console

log = logging.getLogger(__name__)


def with_bar(callbacks: list[Callback], wanted: bool | None) -> tuple[list[Callback], bool]:
    """Add a progress bar where Lightning's own one cannot be seen.

    Args:
        callbacks: the callbacks of the Trainer.
        wanted: whether the user wants a bar. None: in a terminal, in a notebook, or if one of the
            callbacks is a bar.

    Returns:
        The callbacks, and whether the Trainer shows a bar.
    """
    is_added = any(isinstance(callback, ProgressBar) for callback in callbacks)
    is_terminal = sys.stderr.isatty()
    is_shown = is_added or is_terminal or Console().is_jupyter if wanted is None else wanted
    if is_shown and not is_added and not is_terminal:
        # Rich's bar, which Lightning prefers, needs ipywidgets in a notebook and shows nothing in a
        # file. tqdm's bar works in both.
        callbacks = [*callbacks, TQDMProgressBar()]
    return callbacks, is_shown


class EpochLine(Callback):
    """The callback that logs one line for each epoch of a training: loss, scores and seconds.

    Without a terminal there is no bar, so these lines are all that is seen of a training.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._is_validated = False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._is_validated = time.perf_counter(), False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._is_validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            log.info("%s", self._line(trainer, pl_module))

    def _line(self, trainer: L.Trainer, pl_module: Any) -> str:
        """Write the line. Scores of an earlier epoch are left out."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        parts = [f"loss {values['train/loss']:.4f}"] if "train/loss" in values else []
        if self._is_validated and "val/score" in values:
            metrics = pl_module.config.task.metrics
            scores = ", ".join(f"{name} {values[f'val/{name}']:.4f}" for name in metrics)
            parts.append(f"{scores} at full depth")
            if pl_module.config.objective.trains_ramps:
                parts.append(f"{metrics[0]} {values['val/mean_ramp_score']:.4f} over all ramps")
        parts.append(f"{time.perf_counter() - self._start:.1f} s")
        return f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {'; '.join(parts)}"
