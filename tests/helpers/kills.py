"""A callback of Lightning's that kills the process at a chosen moment of a training."""

import os
import signal
from typing import Any

import lightning as L


class Kill(L.Callback):
    """SIGKILL at the start of a hook, after the callbacks that stand before this one.

    Args:
        hook: the name of the hook, such as "on_train_end".
        function: the function of the Trainer that runs: "fit" or "validate".
        epochs: the number of epochs that have ended before.
    """

    def __init__(self, hook: str, function: str = "fit", epochs: int = 0) -> None:
        def kill(trainer: L.Trainer, *_: Any) -> None:
            if trainer.state.fn == function and trainer.current_epoch >= epochs:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, hook, kill)
