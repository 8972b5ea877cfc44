"""How a job of train.py or evaluate.py ends early: in one line, whatever it is that ends it.

A mistake in what was asked for (exit code 2), Ctrl-C (130), or SIGTERM (143), which schedulers
send. Imports nothing heavy, to be there before what takes seconds to import.
"""

import logging
import multiprocessing
import os
import re
import shlex
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
from omegaconf import DictConfig

from deebert.errors import UserError
from deebert.runs import ranks

log = logging.getLogger(__name__)

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
LAST_WORDS = 10.0  # seconds that processes of our own get to end


@contextmanager
def in_one_line(cfg: DictConfig) -> Iterator[None]:
    """Around a job.

    Lightning alone would end with exit code 0 at SIGTERM, and pass it over while callbacks run.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGTERM and _is_one_of_many():
            return  # Lightning stops them together, after the step that they are in
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once, whatever hangs
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(CODES[signal.SIGTERM])

    before = {number: signal.getsignal(number) for number in CODES if _is_ours(number)}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    except UserError as error:
        if not received:
            _refuse(error)
    except BaseException:
        if not received:
            raise
        log.debug("while it was stopped", exc_info=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        _end(cfg, signal.Signals(received[0]))


def _is_ours(number: int) -> bool:
    """May this job answer to it? Not where it was started to pass it over (`nohup`, `&`)."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if number == signal.SIGTERM and "SLURM_NTASKS" in os.environ:
        return False  # Lightning's own: it may have the job queued again
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def _is_one_of_many() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _refuse(error: UserError) -> NoReturn:
    """In a multirun the other jobs go on; Hydra prints the line and exits with 1 at the end."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise CompactHydraException(str(error)) from None
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)


def _end(cfg: DictConfig, number: signal.Signals) -> NoReturn:
    children = multiprocessing.active_children()  # trainer.strategy=ddp_spawn
    for child in children:
        child.terminate()
    for child in children:
        child.join(LAST_WORDS)
        child.kill()
    if not ranks.is_first():
        sys.exit(0)  # at another code the first process would be killed before it has closed
    print(f"Stopped by {number.name}{_goes_on(cfg)}", file=sys.stderr)
    sys.exit(CODES[number])


def _goes_on(cfg: DictConfig) -> str:
    if "resume" not in cfg:
        return ""  # an evaluation
    folder = Path(HydraConfig.get().runtime.output_dir)
    if (folder / "checkpoints" / "last.ckpt").exists():
        found = str(folder)
    elif cfg.resume:
        found = str(cfg.resume)
    else:
        return "; no epoch has ended, so there is nothing yet to go on with"
    plain = re.fullmatch(r"[\w/.:%+@-]+", found)
    word = shlex.quote(f"resume={found}" if plain else f'resume="{found}"')
    return f"; to go on after the last epoch that ended: python train.py {word}"
