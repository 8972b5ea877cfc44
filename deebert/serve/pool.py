"""The processes that hold the model, as the process that speaks HTTP sees them.

It gives each request to the process with the fewest. If a process dies, its requests are refused,
and another is started. Knows nothing of HTTP and models.
"""

import asyncio
import itertools
import logging
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any

from deebert.errors import UserError
from deebert.serve import predictor
from deebert.serve.metrics import Metrics
from deebert.serve.predictor import (
    LAST_BATCH_SECONDS,
    LENGTH_BYTES,
    SIGNALS,
    About,
    Batch,
    Expected,
    Unusable,
)
from deebert.serve.replies import Reply
from deebert.serve.requests import BUSY, TOO_LATE, Refused, Work
from deebert.serve.watch import Watch

log = logging.getLogger(__name__)

SILENT_SECONDS = 60  # the least time after which a process that should answer is held for dead
LOAD_SECONDS = 60  # the least time after which a process that loads the model again is killed
LOST = "the process with the model has ended during this request; come again later"
LOADING = "the model is being loaded again; come again later"


class Failed(Exception):
    """The error for a process that ends before it holds the model, or takes too long."""


@dataclass(eq=False)
class _Process:
    """A process and its socket.

    Attributes:
        requests: the requests that it has not answered yet, by their numbers.
        num_bytes: the bytes of these requests, by their numbers.
        silent_since: when it sent its last message, or got the oldest of its requests if that was
            later; in seconds.
    """

    process: SpawnProcess
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: dict[int, asyncio.Future[Reply]] = field(default_factory=dict)
    num_bytes: dict[int, int] = field(default_factory=dict)
    silent_since: float = 0.0

    async def message(self) -> Any:
        """Receive the next message; None if the process has ended."""
        message = await self._received()
        self.silent_since = time.monotonic()
        return message

    async def _received(self) -> Any:
        try:
            length = int.from_bytes(await self.reader.readexactly(LENGTH_BYTES))
            return pickle.loads(await self.reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return None


class Pool:
    """The processes that hold the model.

    Args:
        options: a checked `command.ServeOptions`.

    Attributes:
        about: the description of the model, after `start`.
        metrics: where batches are counted.
        watch: where exits are compared with those of the calibration rows, after `start`.
        taken: the number of requests that were accepted.
        answered: the number of these that the model has answered in time.
        on_failure: what to call when a process cannot be started anew.
    """

    def __init__(self, options: Any) -> None:
        self.options = options
        self.about: About | None = None
        self.metrics: Metrics | None = None
        self.watch: Watch | None = None
        self.taken = self.answered = 0
        self.on_failure: Callable[[], None] = lambda: None
        self.failed = self._stopping = False
        self._ready: list[_Process] = []
        self._processes: list[SpawnProcess] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._numbers = itertools.count()
        self._load_s = 0.0  # what the first process has taken

    @property
    def ready(self) -> bool:
        """Whether a process holds the model."""
        return bool(self._ready)

    async def start(self) -> About:
        """Start all processes. The first one checks the model and measures the costs of layers.

        Raises:
            UserError: the model or the target of the service cannot be used.
            Failed: a process has ended before it held the model.
        """
        begin = time.monotonic()
        first = await self._started()
        self._load_s = time.monotonic() - begin
        assert self.about is not None
        self.watch = Watch(self.about.layers, self.options.recalibrate == "saving")
        others = [await self._started() for _ in range(self.options.workers - 1)]
        for each in (first, *others):
            self._ready.append(each)
            task = asyncio.create_task(self._keep(each))
            task.add_done_callback(self._ended)
            self._tasks.append(task)
        return self.about

    async def ask(self, work: Work) -> Reply:
        """Have a request answered.

        Raises:
            Refused: too many requests are waiting, there is no process, or there is no answer in
                time.
        """
        if not self._ready:
            raise Refused(BUSY, LOADING)
        assert self.watch is not None
        work = replace(work, nominal=self.watch.nominal(work))
        number = next(self._numbers)
        message = predictor.packed((number, work))
        sizes = [size for each in self._ready for size in each.num_bytes.values()]
        if len(sizes) >= self.options.max_waiting:
            waiting = f"{self.options.max_waiting} requests are waiting already"
            raise Refused(BUSY, f"{waiting}; come again later")
        if sizes and sum(sizes) + len(message) > self.options.max_waiting_bytes:
            waiting = f"requests of {sum(sizes)} bytes are waiting already"
            raise Refused(BUSY, f"{waiting}; come again later")
        one = min(self._ready, key=lambda each: len(each.requests))
        if not one.requests:
            one.silent_since = time.monotonic()
        future = one.requests[number] = asyncio.get_running_loop().create_future()
        one.num_bytes[number] = len(message)
        one.writer.write(message)
        self.taken += 1
        try:
            async with asyncio.timeout(self.options.answer_s):
                reply = await future
        except TimeoutError as error:
            silent = time.monotonic() - one.silent_since
            if one.requests and silent >= max(self.options.answer_s, SILENT_SECONDS):
                log.error("process %d has sent nothing for %.0f s", one.process.pid, silent)
                one.process.kill()  # `_keep` starts another
            raise Refused(
                TOO_LATE, f"no answer was found within {self.options.answer_s} s"
            ) from error
        self.answered += 1
        self.watch.seen(work, reply.exit_layers, reply.cells)
        return reply

    async def stop(self) -> None:
        """End all processes."""
        self._stopping = True
        holding = [each.process for each in self._ready]
        for each in self._processes:
            if each not in holding:
                each.kill()  # it still loads the model
        for one in self._ready:
            one.writer.close()
        _, left = await asyncio.wait(self._tasks, timeout=2 * LAST_BATCH_SECONDS)
        if left:
            log.warning("a process that holds the model does not end; it is killed")
        self.kill()

    def kill(self) -> None:
        """Kill the processes that are left, as after a start that was interrupted."""
        for each in self._processes:
            each.kill()
            each.join()

    async def _started(self) -> _Process:
        """Start a process and wait until it holds the model.

        Raises:
            UserError: the model or the target of the service cannot be used.
            Failed: the process has ended before it held the model.
        """
        ours, theirs = socket.socketpair()
        costs = None if self.about is None else self.about.costs
        process = get_context("spawn").Process(
            target=predictor.main, args=(theirs, self.options, costs), daemon=True
        )
        with theirs, _signals_later():
            process.start()
        self._processes.append(process)
        one = _Process(process, *await asyncio.open_connection(sock=ours))
        try:
            message = await one.message()
        except asyncio.CancelledError:
            process.kill()
            one.writer.close()
            raise
        if not isinstance(message, About):
            one.writer.close()
            await self._joined(process)
            if isinstance(message, Unusable):
                raise UserError(message.reason)
            raise Failed(
                "a process that was to hold the model has ended before with exit code "
                f"{process.exitcode}"
            )
        self.about = self.about or message
        return one

    async def _keep(self, one: _Process) -> None:
        """Receive the replies of a process, and start another when it has ended."""
        while True:
            while (message := await one.message()) is not None:
                if isinstance(message, Batch):
                    if self.metrics is not None:
                        self.metrics.batch(message.requests, message.texts)
                elif isinstance(message, Expected):
                    assert self.watch is not None
                    self.watch.expect(message.target, message.calibration_N)
                else:
                    number, reply = message
                    future = one.requests.pop(number)
                    del one.num_bytes[number]
                    if not future.done():  # nobody waits after `answer_s`
                        future.set_result(reply)
            self._ready.remove(one)
            for future in one.requests.values():
                if not future.done():
                    future.set_exception(Refused(BUSY, LOST))
            one.writer.close()
            await self._joined(one.process)
            if self._stopping:
                return
            log.warning(
                "process %d, which held the model, has ended with exit code %s; another is started",
                one.process.pid,
                one.process.exitcode,
            )
            one = await self._restarted()
            self._ready.append(one)

    async def _restarted(self) -> _Process:
        """Start a process in place of another.

        Raises:
            UserError: the model cannot be used any more.
            Failed: the process has ended before it held the model, or has taken much longer than
                the first one.
        """
        most = max(LOAD_SECONDS, 4 * self._load_s)
        try:
            async with asyncio.timeout(most):
                return await self._started()
        except TimeoutError as error:
            raise Failed(
                f"a process that was to hold the model has not loaded it within {most:.0f} s"
            ) from error

    async def _joined(self, process: SpawnProcess) -> None:
        """Wait for the end of a process whose socket is closed, and kill it if it does not end."""
        await asyncio.to_thread(process.join, LAST_BATCH_SECONDS)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)
        self._processes.remove(process)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Let the service end if a process was not started anew: nothing is to stay half dead."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._stopping:
            log.error("the service ends: %s", error)
            self.failed = True
            self.on_failure()


@contextmanager
def _signals_later() -> Iterator[None]:
    """Block the signals that stop the service, also in a process that is started meanwhile."""
    resource_tracker.ensure_running()  # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
