"""How a job of train.py or evaluate.py ends early: in one line, whatever it is that ends it.

A mistake in what was asked for (exit code 2), Ctrl-C (130), or SIGTERM (143), which schedulers
send. Knows of a run no more than whether it can be gone on with.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from lightning.pytorch.plugins.environments import SLURMEnvironment

from deebert import ranks
from deebert.errors import UserError

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextmanager
def in_one_line() -> Iterator[None]:
    """Around a job.

    Lightning alone would end with exit code 0 at SIGTERM, and pass it over while callbacks run.
    Under SLURM signals are Lightning's: it may have the job queued again.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt  # at which Lightning closes what it has opened

    ours = threading.current_thread() is threading.main_thread() and not SLURMEnvironment.detect()
    before = {number: signal.signal(number, stop) for number in CODES} if ours else {}
    try:
        yield
    except UserError as error:
        _refuse(error)
    except (KeyboardInterrupt, SystemExit):
        if not received:
            raise
        if ranks.is_first():
            print(_stopped(received[0]), file=sys.stderr)
        sys.exit(CODES[signal.Signals(received[0])])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse(error: UserError) -> NoReturn:
    """In a multirun the other jobs go on; Hydra prints the line and exits with 1 at the end."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise CompactHydraException(str(error)) from None
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)


def _stopped(number: int) -> str:
    folder = Path(HydraConfig.get().runtime.output_dir)
    stopped = f"Stopped by {signal.Signals(number).name}"
    if (folder / "checkpoints" / "last.ckpt").exists():
        return (
            f"{stopped}; to go on after the last epoch that ended: python train.py resume={folder}"
        )
    return f"{stopped}; there is nothing yet to go on with"
