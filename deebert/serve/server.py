"""The service: the application and processes of LitServe, uvicorn, and how both start and stop.

LitServe provides the endpoint, the queues and the processes that hold the model (`predictor`),
which it restarts if they die. This process speaks HTTP itself instead of a process that
`LitServer.run` would fork. So uvicorn can finish the accepted requests before the model's processes
stop, and the service can listen at any address. Knows nothing of torch.
"""

import ctypes
import errno
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from types import FrameType
from typing import Any

import litserve
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from litserve.utils import WorkerSetupStatus, wrap_litserve_start
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from deebert.errors import UserError
from deebert.serve import metrics
from deebert.serve.metrics import Metrics
from deebert.serve.predictor import END, LOG_FORMAT, PATH, About, Predictor, described
from deebert.serve.request_limits import OPEN, Admission, RequestLimits
from deebert.serve.requests import UNFIT, Trouble, reason, trouble

log = logging.getLogger(__name__)

TITLE = "deebert: early-exit classification"
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATHS = (PATH, "/health", "/info", "/metrics", "/docs", "/openapi.json")
LAST_BATCH_SECONDS = 10  # the time in which a process without work has to end
WATCH_SECONDS = 0.5  # between two checks that all processes live


def serve(options: Any) -> None:
    """Serve until SIGTERM or SIGINT; then finish the accepted requests.

    Args:
        options: a checked `command.ServeOptions`.

    Raises:
        UserError: the address, the model or the default target cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    _check_address(options.host, options.port)
    main = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == main:  # the forked process with LitServe's queues stays to the end
            raise KeyboardInterrupt

    others = active_children()
    before = {each: signal.signal(each, stop) for each in SIGNALS}
    try:
        about = _about(options)
        with tempfile.TemporaryDirectory(prefix="deebert-serve-") as folder:
            metrics.share(Path(folder))
            _run(made(options, about), options)
        log.info("stopped")
    except KeyboardInterrupt:
        log.info("stopped before it has begun")
    finally:
        for each in active_children():
            if each not in others:  # left from an interrupted start
                each.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Make a forked process end when its parent is killed, because nothing else would end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _about(options: Any) -> About:
    """Describe the model in another process, so that this one stays small and can fork."""
    others = active_children()
    with ProcessPoolExecutor(
        1,
        get_context("spawn"),
        initializer=signal.signal,  # Ctrl-C reaches both processes; this one ends the other
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        try:
            return pool.submit(described, options).result()
        except KeyboardInterrupt:
            for each in active_children():
                if each not in others:
                    each.kill()
            raise


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        why = (
            "it is taken by another program" if error.errno == errno.EADDRINUSE else error.strerror
        )
        raise UserError(f"cannot listen at host={host} port={port}: {why}") from error


def made(options: Any, about: About) -> litserve.LitServer:
    """Make the application, without running it."""
    counted = Metrics(about.layers)
    admission = Admission(
        PATHS, PATH, options.max_body_bytes, options.max_waiting, options.answer_s, options.token
    )
    limits = ("max_texts", "max_length_chars", "max_body_bytes", "max_batch", "batch_window_ms")
    server = litserve.LitServer(
        Predictor(options, about),
        accelerator="cpu",  # for LitServe; the model itself goes to the device of device=
        workers_per_device=options.workers,
        timeout=False,  # max_waiting limits the queue; every accepted request is answered
        restart_workers=True,
        middlewares=[(RequestLimits, {"admission": admission, "metrics": counted})],
        model_metadata={
            "task": about.task,
            "columns": about.columns,
            "labels": about.labels,
            "layers": about.layers,
            "exit": about.exit,
            "target": about.target,
            "expected": about.expected,
            "costs": about.costs,
            "precision": options.precision,
            "runtime": options.runtime,
            "device": options.device,
            "limits": {name: getattr(options, name) for name in limits},
            "versions": about.versions,
        },
    )
    server.monitor_internal = WATCH_SECONDS
    server.response_buffer = _Waiting()
    _routes(server.app, with_token=options.token is not None)
    return server


class _Waiting(dict[str, Any]):
    """The requests without an answer, copied when LitServe's thread iterates over them."""

    def items(self) -> Any:
        return list(super().items())


def _routes(app: FastAPI, with_token: bool) -> None:
    """Add /metrics, one form for all errors, and the documentation of both."""

    @app.get("/metrics", summary="Counts in Prometheus' text format")
    def _metrics() -> Response:
        content, kind = metrics.collected()
        return Response(content, media_type=kind)

    @app.exception_handler(RequestValidationError)
    def _unfit(request: Request, error: RequestValidationError) -> Response:
        return _error_response(UNFIT, reason(error.errors()))

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if error.status_code == 400:  # FastAPI gives no reason for bytes that are no text
            detail = "the body cannot be read as JSON in UTF-8"
        elif error.status_code == 404:
            detail = f"Not Found; there are: {', '.join(PATHS)}"
        return _error_response(error.status_code, detail, error.headers)

    @app.exception_handler(Exception)
    def _ours(request: Request, error: Exception) -> Response:
        return _error_response(500, "the service failed here; its log says how")

    generated: Callable[[], dict[str, Any]] = app.openapi

    def documented() -> dict[str, Any]:
        if app.openapi_schema is None:
            _document(generated(), with_token)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = documented  # type: ignore[method-assign]
    app.title = TITLE


def _error_response(status: int, detail: str, headers: Any = None) -> Response:
    return Response(trouble(detail), status, headers, "application/json")


def _document(schema: dict[str, Any], with_token: bool) -> None:
    """Add what FastAPI cannot know: the refusals of the limits and the model, and the token."""
    schemas = schema["components"]["schemas"]
    schemas[Trouble.__name__] = Trouble.model_json_schema()
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    shape = {"schema": {"$ref": f"#/components/schemas/{Trouble.__name__}"}}
    post = schema["paths"][PATH]["post"]
    post["summary"] = "Answer texts"
    for status, meaning in (
        (400, "The body is no JSON in UTF-8"),
        (401, "The token is missing or wrong"),
        (413, "The body, a text or their number is too large"),
        (415, "The headers do not declare the body as JSON in UTF-8"),
        (422, "A field, a text, a rule or a target is wrong"),
        (503, "Too many requests are waiting"),
        (504, "No answer was found in time"),
    ):
        if status != 401 or with_token:
            post["responses"][str(status)] = {
                "description": meaning,
                "content": {"application/json": shape},
            }
    if with_token:
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in schema["paths"].items():
            if path not in OPEN:
                for method in methods.values():
                    method["security"] = [{"token": []}]


def _run(server: litserve.LitServer, options: Any) -> None:
    os.register_at_fork(after_in_child=_die_with_parent)
    with wrap_litserve_start(server, worker_monitor=True), _ended(server):
        _wait_until_ready(server)
        log.info("listening at http://%s:%d, see /docs", options.host, options.port)
        config = uvicorn.Config(
            server.app,
            host=options.host,
            port=options.port,
            log_config=None,  # as in the rest of the program
            log_level="warning",
            access_log=False,  # /metrics counts
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=round(options.stop_s),
        )
        talking = uvicorn.Server(config)

        def finish(number: int, frame: FrameType | None) -> None:
            talking.should_exit = True

        for each in SIGNALS:  # uvicorn's own handlers are set only while it runs
            signal.signal(each, finish)
        talking.run()


def _wait_until_ready(server: litserve.LitServer) -> None:
    status = server.workers_setup_status
    while not all(each == WorkerSetupStatus.READY for each in status.values()):
        if any(each == WorkerSetupStatus.ERROR for each in status.values()):
            raise RuntimeError("a process that is to hold the model has failed, as said above")
        time.sleep(0.05)


@contextmanager
def _ended(server: litserve.LitServer) -> Iterator[None]:
    """End the processes that hold the model after the `with` block, without a restart."""
    try:
        yield
    finally:
        server._shutdown_event.set()
        for thread in threading.enumerate():
            if thread.name == "litserve-monitoring":
                thread.join()
        queue = server._get_request_queue(PATH)
        for _ in server.inference_workers:
            queue.put(END)
        for worker in server.inference_workers:
            worker.join(LAST_BATCH_SECONDS)
            if worker.is_alive():
                log.warning("a process that holds the model does not end; it is killed")
                worker.kill()
