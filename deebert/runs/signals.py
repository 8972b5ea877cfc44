"""Signals, user errors and ranks: what a process must know before there is a Trainer.

A job that ends early prints one line and has its own exit code. It ends early by a user's mistake
(exit code 2), Ctrl-C (130), or SIGTERM (143), which schedulers send. This module imports nothing
heavy, so that it works before the slow imports are done. It does not know training or evaluation.
"""

import errno
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

from deebert.disk import whole_files
from deebert.errors import UserError
from deebert.options import job_command

log = logging.getLogger(__name__)

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
GRACE_PERIOD = 10.0  # seconds that child processes get to end
# The variables of Lightning, torchrun or SLURM's srun that hold a rank. LOCAL_RANK is 0 also in the
# first process on a second machine. srun sets only SLURM_PROCID.
RANKS = ("LOCAL_RANK", "RANK", "NODE_RANK", "SLURM_PROCID")


def is_first_process() -> bool:
    """Say whether this is the only process of a run, or the first one on all machines."""
    return all(os.environ.get(name, "0") in ("0", "") for name in RANKS)


@contextmanager
def in_one_line(cfg: DictConfig) -> Iterator[None]:
    """Run a job so that a signal, a user's mistake or a full disk ends it with one line.

    Without this, Lightning would end with exit code 0 at SIGTERM, and ignore SIGTERM while
    callbacks run.

    Args:
        cfg: the configuration of the job.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGTERM and _is_one_of_many():
            return  # Lightning stops all processes together, after the current step
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the job at once
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(CODES[signal.SIGTERM])

    old_handlers = {number: signal.getsignal(number) for number in CODES if _is_ours(number)}
    try:
        for number in old_handlers:
            signal.signal(number, stop)
        yield
    except UserError as error:
        if not received:
            _refuse(error)
    except OSError as error:
        if not received:
            _refuse_disk(cfg, error)
    except BaseException:
        if not received:
            raise
        log.debug("while it was stopped", exc_info=True)
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
    if received:
        _end(cfg, signal.Signals(received[0]))


def _is_ours(number: int) -> bool:
    """Say whether this job may handle a signal.

    It may not if the job was started so that it ignores the signal (`nohup`, `&`).
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if number == signal.SIGTERM and "SLURM_NTASKS" in os.environ:
        return False  # Lightning handles it, and may put the job into the queue again
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def _is_one_of_many() -> bool:
    """Say whether this process is part of a distributed run."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _refuse(error: UserError) -> NoReturn:
    """End the job with the message of a user's mistake.

    In a multirun, the other jobs still run. Hydra prints the message and exits with 1 at the end.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise CompactHydraException(str(error)) from None
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)


def _refuse_disk(cfg: DictConfig, error: OSError) -> NoReturn:
    """End the job with one line about a disk that takes no more, or a path that is closed to it.

    Raises:
        OSError: the error is another one.
    """
    if error.errno not in (*whole_files.FULL, errno.EACCES, errno.EPERM):
        raise error
    # An error of an open file does not name it.
    where = error.filename or HydraConfig.get().runtime.output_dir
    if error.errno not in whole_files.FULL:
        _refuse(UserError(f"{where}: {error.strerror}"))
    _refuse(UserError(f"{where}: it cannot be written ({error.strerror}){_resume_hint(cfg)}"))


def _end(cfg: DictConfig, number: signal.Signals) -> NoReturn:
    """End the child processes, print one line, and exit with the code of the signal."""
    children = multiprocessing.active_children()  # trainer.strategy=ddp_spawn
    for child in children:
        child.terminate()
    for child in children:
        child.join(GRACE_PERIOD)
        child.kill()
    if not is_first_process():
        sys.exit(0)  # with another code, the first process would be killed before it can finish
    print(f"Stopped by {number.name}{_resume_hint(cfg)}", file=sys.stderr)
    sys.exit(CODES[number])


def _resume_hint(cfg: DictConfig) -> str:
    """Return the part of the line that says how to resume the training."""
    if "resume" not in cfg:
        return ""  # an evaluation cannot be resumed
    folder = Path(HydraConfig.get().runtime.output_dir)
    if any((folder / "checkpoints" / f"{name}.ckpt").exists() for name in ("last", "best")):
        run = str(folder)
    elif cfg.resume:
        run = str(cfg.resume)
    else:
        return "; no checkpoint is written, so there is nothing yet to go on with"
    is_plain = re.fullmatch(r"[\w/.:%+@-]+", run)
    word = shlex.quote(f"resume={run}" if is_plain else f'resume="{run}"')
    return f"; to go on after the last epoch that ended: {job_command('train')} {word}"
