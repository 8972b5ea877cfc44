"""The process of the service that holds the model: takes requests off a queue, and answers them.

LitServe's own loop asks its queue a thousand times a second while there is nothing to do (with a
window of 0: without a pause) and starts a window at any time; `Together` sleeps until a request
comes, whose window it is. Knows nothing of HTTP.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import connection, parent_process
from queue import Empty
from typing import Any

import litserve
from litserve.loops import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType
from starlette.responses import Response

from deebert.options import engine_of, target_of
from deebert.serve.metrics import Metrics
from deebert.serve.replies import Reply, replies
from deebert.serve.requests import UNFIT, Answer, Limits, Refused, Request, Work, work

log = logging.getLogger(__name__)

PATH = "/predict"
# For a request, at one go. Should this process be killed while it waits, one that comes within this
# time is handed to nobody.
WAIT_SECONDS = 1.0
END = None  # in the queue of requests: no more will come
LOG_FORMAT = "%(asctime)s %(name)s: %(message)s"
NO_SPEEDUPS = (
    "target_speedup= is not met here, since what layers cost was not measured when the service "
    "was started (speedups=true); target_saving= is"
)
PACKAGES = ("deebert", "litserve", "torch", "transformers")


@dataclass(frozen=True)
class About:
    """What a model is, for those who don't hold it.

    Attributes:
        target: of requests that have none.
        costs: what leaving at each layer costs on this machine; None where nobody may ask for a
            speed-up, or no record says how long texts are.
    """

    task: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    layers: int
    exit: str
    target: dict[str, Any]
    expected: dict[str, Any] | None
    costs: tuple[float, ...] | None
    versions: dict[str, str]


def described(options: Any) -> About:
    """Load the model once, to see that it can be had and meets its target, and measure its costs.

    Raises:
        UserError: it cannot, or does not.
    """
    from deebert.errors import UserError

    classifier, target = _loaded(options), target_of(options)
    asked = classifier.calibrate(**target)
    if options.speedups:
        try:
            classifier.costs  # noqa: B018 (kept)
        except UserError as error:
            log.info("no request can ask for target_speedup=: %s", error)
    return About(
        classifier.task.name,
        classifier.task.columns,
        classifier.labels,
        classifier.num_layers,
        asked.rule.name,
        dict(asked.target),
        None if asked.expected is None else dict(asked.expected),
        vars(classifier).get("costs"),
        {package: version(package) for package in PACKAGES},
    )


def _loaded(options: Any) -> Any:
    import torch

    from deebert.classifier import EarlyExitClassifier

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return EarlyExitClassifier.from_pretrained(
        options.model, task=options.task, **engine_of(options)
    )


class Predictor(litserve.LitAPI):
    """The hooks that LitServe knows, for `Together`."""

    def __init__(self, options: Any, about: About) -> None:
        super().__init__(
            max_batch_size=options.max_batch,
            batch_timeout=options.batch_window_ms / 1000,
            api_path=PATH,
            loop=Together(),
        )
        self.options, self.about = options, about
        self.limits = Limits(options.max_texts, options.max_length_chars)

    def setup(self, device: str) -> None:
        """In the process that is to hold the model."""
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
        # Whoever stops the service with all of its processes signals this one, too;
        # it goes on until the one that talks HTTP has all its answers.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        self.metrics = Metrics(self.about.layers)
        self.classifier = _loaded(self.options)
        if self.about.costs is not None:  # the same in all processes, and measured undisturbed
            self.classifier.costs = self.about.costs

    def decode_request(self, request: Request) -> Work | Refused:
        """The type of its argument is that of the body, for LitServe."""
        try:
            found = work(request, self.limits, self.about.columns)
            if "target_speedup" in found.target and self.about.costs is None:
                raise Refused(UNFIT, NO_SPEEDUPS)
        except Refused as error:
            return error
        return found

    def predict(self, works: list[Work | Refused]) -> Iterator[tuple[int, Reply]]:
        """Replies by the place of their requests, each as soon as it is there."""
        texts = sum(len(each.texts) for each in works if isinstance(each, Work))
        self.metrics.batch(len(works), texts)
        for place, reply in replies(self.classifier, works, self.about.target):
            self.metrics.left(reply.exit_layers)
            yield place, reply

    def encode_response(self, output: Reply) -> Answer:
        """The type of what it returns is that of the answer, for LitServe; FastAPI passes on what
        is written already."""
        return Response(output.content, output.status, media_type="application/json")  # type: ignore[return-value]


class Together(LitLoop):
    """Runs requests together that came within a window from the first of them."""

    def __call__(
        self,
        lit_api: Predictor,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        def send(request: Any, data: Any, status: str) -> None:
            consumer, uid, _, _ = request
            self.put_response(transport, consumer, uid, data, status, LoopResponseType.REGULAR)

        going = True
        while going:
            taken, going = _taken(request_queue, lit_api.max_batch_size, lit_api.batch_timeout)
            for request in taken:  # or nobody knew which requests died with this process
                send(request, (), LitAPIStatus.START)
            works = [lit_api.decode_request(body) for _, _, _, body in taken]
            for place, reply in lit_api.predict(works) if works else ():
                send(taken[place], lit_api.encode_response(reply), LitAPIStatus.OK)


def _taken(queue: Any, most: int, window: float) -> tuple[list[Any], bool]:
    """Requests to run together, and whether more will come. The first is waited for, for a while.

    The window is counted from when the first was sent: if it has waited for others to be run, those
    that are there are taken, and none is waited for.
    """
    taken: list[Any] = []
    while len(taken) < most:
        try:
            if taken:
                left = taken[0][2] + window - time.monotonic()
                request = queue.get(timeout=left) if left > 0 else queue.get_nowait()
            else:
                request = queue.get(timeout=WAIT_SECONDS)
        except Empty:
            break
        if request is END:
            return taken, False
        taken.append(request)
    return taken, True


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
