"""The process of the service that holds the model: it takes requests from a queue and answers them.

The loop of LitServe polls its queue a thousand times a second while there is nothing to do (with a
window of 0: without a pause), and its windows start at any time. `Together` sleeps until a request
comes, and the window starts with that request. Knows nothing of HTTP.
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

from deebert.options import engine_of, import_modules, target_of
from deebert.reporting.split_results import plain
from deebert.serve.metrics import Metrics
from deebert.serve.replies import Reply, replies
from deebert.serve.requests import UNFIT, Answer, Limits, Refused, Request, Work, work

log = logging.getLogger(__name__)

PATH = "/predict"
# The time of one wait for a request. If this process is killed while it waits, a request that comes
# within this time is lost.
WAIT_SECONDS = 1.0
END = None  # the last item in the queue of requests
LOG_FORMAT = "%(asctime)s %(name)s: %(message)s"
NO_SPEEDUPS = (
    "target_speedup= is not met here, since what layers cost was not measured when the service "
    "was started (speedups=true); target_saving= is"
)
PACKAGES = ("deebert", "litserve", "torch", "transformers")


@dataclass(frozen=True)
class About:
    """A description of the model, for processes that do not hold it.

    Attributes:
        task: the name of the task.
        columns: the columns of the task's texts.
        labels: the names of the classes; None for a regression.
        layers: the number of layers.
        exit: the name of the exit rule.
        target: the target of requests that have none.
        expected: the expectation for that target; None for given thresholds.
        costs: the cost of leaving at each layer on this machine; None if requests may not set a
            speed-up, or if there is no record that tells the lengths of texts.
        versions: the versions of the packages.
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
    """Load the model once to check it and its target, and measure the costs of its layers.

    Raises:
        UserError: the model cannot be loaded, or cannot meet its target.
    """
    from deebert.errors import UserError

    classifier, target = _loaded(options), target_of(options)
    point = classifier.calibrate(**target)
    if options.speedups:
        try:
            classifier.costs  # noqa: B018 (the property keeps its value)
        except UserError as error:
            log.info("no request can ask for target_speedup=: %s", error)
    return About(
        classifier.task.name,
        classifier.task.columns,
        classifier.labels,
        classifier.num_layers,
        point.rule.name,
        dict(point.target),
        None if point.expected is None else plain(point.expected),
        vars(classifier).get("costs"),
        {package: version(package) for package in PACKAGES},
    )


def _loaded(options: Any) -> Any:
    import torch

    from deebert.classifier import EarlyExitClassifier

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    import_modules(options.modules)
    return EarlyExitClassifier.from_pretrained(
        options.model, task=options.task, **engine_of(options)
    )


class Predictor(litserve.LitAPI):
    """The hooks of LitServe, which `Together` calls."""

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
        """Load the model, in the process that is to hold it."""
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
        # A signal to all processes of the service reaches this one, too. It goes on until the
        # process that speaks HTTP has all its answers.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        self.metrics = Metrics(self.about.layers)
        self.classifier = _loaded(self.options)
        if self.about.costs is not None:
            # Measured once for all processes, while nothing else was running.
            self.classifier.costs = self.about.costs

    def decode_request(self, request: Request) -> Work | Refused:
        """Check a request. LitServe takes the type of the body from the annotation.

        Returns:
            The work, or the reason why there is none.
        """
        try:
            checked = work(request, self.limits, self.about.columns)
            if "target_speedup" in checked.target and self.about.costs is None:
                raise Refused(UNFIT, NO_SPEEDUPS)
        except Refused as error:
            return error
        return checked

    def predict(self, works: list[Work | Refused]) -> Iterator[tuple[int, Reply]]:
        """Yield the replies with the places of their requests, each as soon as it is there."""
        texts = sum(len(each.texts) for each in works if isinstance(each, Work))
        self.metrics.batch(len(works), texts)
        for place, reply in replies(self.classifier, works, self.about.target):
            self.metrics.left(reply.exit_layers)
            yield place, reply

    def encode_response(self, output: Reply) -> Answer:
        """Return the HTTP response of a reply.

        LitServe takes the type of the answer from the annotation. FastAPI passes a finished
        response on as it is.
        """
        return Response(output.content, output.status, media_type="application/json")  # type: ignore[return-value]


class Together(LitLoop):
    """A loop that runs requests together if they come within a window from the first of them."""

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
            for request in taken:  # without it, requests that die with this process are unknown
                send(request, (), LitAPIStatus.START)
            works = [lit_api.decode_request(body) for _, _, _, body in taken]
            for place, reply in lit_api.predict(works) if works else ():
                send(taken[place], lit_api.encode_response(reply), LitAPIStatus.OK)


def _taken(queue: Any, most: int, window: float) -> tuple[list[Any], bool]:
    """Take requests that are to run together from the queue.

    Waits for a while for the first one. The window starts when the first one was sent: if it had
    to wait for an earlier batch, the requests that are there are taken at once.

    Returns:
        The requests, and whether more will come.
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
