"""The service: the application, uvicorn, and how both start and stop.

This process speaks HTTP; `pool` starts the processes that hold the model. uvicorn finishes the
accepted requests before these processes are stopped. Knows nothing of torch.
"""

import asyncio
import errno
import logging
import math
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deebert.errors import UserError
from deebert.serve import requests
from deebert.serve.connections import HEADER_SECONDS, Connections
from deebert.serve.metrics import Metrics
from deebert.serve.pool import Failed, Pool
from deebert.serve.predictor import LOG_FORMAT, SIGNALS, About
from deebert.serve.request_limits import HEADER_BYTES, OPEN, Admission, RequestLimits
from deebert.serve.requests import (
    BUSY,
    UNFIT,
    Answer,
    Limits,
    Refused,
    Trouble,
    reason,
    trouble,
    work,
)

log = logging.getLogger(__name__)

TITLE = "deebert: early-exit classification"
PATH = "/predict"
PATHS = (PATH, "/health", "/info", "/metrics", "/docs", "/openapi.json")
FAILED_SECONDS = 5  # what is left for requests when no process can answer them any more
LIMITS = ("max_texts", "max_length_chars", "max_body_bytes", "max_batch", "batch_window_ms",
          "max_waiting", "max_waiting_bytes")  # fmt: skip
NO_SPEEDUPS = (
    "target_speedup= is not met here, since what layers cost was not measured when the service "
    "was started (speedups=true); target_saving= is"
)


def serve(options: Any) -> None:
    """Serve until SIGTERM or SIGINT; then finish the accepted requests.

    The program ends with exit code 1 if a process that holds the model cannot be started anew.

    Args:
        options: a checked `command.ServeOptions`.

    Raises:
        UserError: the address, the model or the default target cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    _check_address(options.host, options.port)
    asyncio.run(_served(options))


async def _served(options: Any) -> None:
    loop, task, pool = asyncio.get_running_loop(), asyncio.current_task(), Pool(options)
    assert task is not None
    for each in SIGNALS:
        loop.add_signal_handler(each, task.cancel)
    try:
        about = await pool.start()
    except asyncio.CancelledError:
        log.info("stopped before it has begun")
        return
    except Failed as error:
        log.error("%s", error)
        sys.exit(1)
    finally:
        if not pool.ready:
            pool.kill()
    metrics = pool.metrics = Metrics(about.layers)
    connections = Connections(
        options.max_waiting,
        options.max_body_bytes,
        lambda status: metrics.request("other", status, 0.0),
    )
    config = uvicorn.Config(
        made(options, about, pool, metrics),
        host=options.host,
        port=options.port,
        http=connections.make,  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,  # as in the rest of the program
        log_level="error",  # a warning for each wrong request would fill the disk
        access_log=False,  # /metrics counts
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=2 * HEADER_SECONDS,  # `connections` closes them before
        timeout_graceful_shutdown=math.ceil(options.stop_s),
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    talking = uvicorn.Server(config)

    def finish() -> None:
        talking.should_exit = True

    def fail() -> None:
        config.timeout_graceful_shutdown = min(math.ceil(options.stop_s), FAILED_SECONDS)
        finish()

    pool.on_failure = fail
    for each in SIGNALS:  # uvicorn's own handlers are set only while it runs
        loop.add_signal_handler(each, finish)
    try:
        log.info("listening at http://%s:%d, see /docs", options.host, options.port)
        await talking.serve()
    finally:
        log.info("answered %d of %d requests that were taken", pool.answered, pool.taken)
        await pool.stop()
    if pool.failed:
        sys.exit(1)
    log.info("stopped")


def _check_address(host: str, port: int) -> None:
    """Check that uvicorn can listen at each address of a host, or at those that this machine has.

    Raises:
        UserError: it cannot.
    """
    bound, missing = False, None
    try:
        # As asyncio asks for them: `localhost` may have an address of IPv6, too.
        for family, kind, _, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                _bind(family, kind, address)
                bound = True
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
        if missing is not None and not bound:
            raise missing
    except OSError as error:
        why = (
            "it is taken by another program" if error.errno == errno.EADDRINUSE else error.strerror
        )
        raise UserError(f"cannot listen at host={host} port={port}: {why}") from error


def _bind(family: int, kind: int, address: Any) -> None:
    """Bind a socket as asyncio does, and close it."""
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)


def made(options: Any, about: About, pool: Pool, metrics: Metrics) -> FastAPI:
    """Make the application.

    Args:
        options: a checked `command.ServeOptions`.
        about: the description of the model.
        pool: the processes that answer requests.
        metrics: where requests and answers are counted.
    """
    app = FastAPI(title=TITLE, redoc_url=None)
    limits = Limits(options.max_texts, options.max_length_chars)

    @app.post(PATH, summary="Answer texts", response_model=Answer)
    async def _predict(request: requests.Request) -> Response:
        checked = work(request, limits, about.columns, about.target)
        if "target_speedup" in checked.target and about.costs is None:
            raise Refused(UNFIT, NO_SPEEDUPS)
        reply = await pool.ask(checked)
        metrics.left(reply.exit_layers)
        return Response(reply.content, reply.status, media_type="application/json")

    @app.get("/health", summary="Whether requests are answered, and whether texts drift")
    async def _health() -> Response:
        return Response(f"ok, {pool.watch}") if pool.ready else Response("not ready", BUSY)

    @app.get("/info", summary="The model, its limits and the versions of packages")
    async def _info() -> Response:
        model = {
            **vars(about),
            "precision": options.precision,
            "device": options.device,
            "limits": {name: getattr(options, name) for name in LIMITS},
        }
        return JSONResponse({"model": model, "server": {"workers": options.workers}})

    @app.get("/metrics", summary="Counts in Prometheus' text format")
    async def _metrics() -> Response:
        content, kind = metrics.collected(pool.watch)
        return Response(content, media_type=kind)

    @app.exception_handler(Refused)
    async def _refused(request: Request, error: Refused) -> Response:
        headers = {"retry-after": "1"} if error.status == BUSY else None
        return _error_response(error.status, str(error), headers)

    @app.exception_handler(RequestValidationError)
    async def _unfit(request: Request, error: RequestValidationError) -> Response:
        return _error_response(UNFIT, reason(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if error.status_code == 400:  # FastAPI gives no reason for bytes that are no text
            detail = "the body cannot be read as JSON in UTF-8"
        elif error.status_code == 404:
            detail = f"Not Found; there are: {', '.join(PATHS)}"
        return _error_response(error.status_code, detail, error.headers)

    @app.exception_handler(Exception)
    async def _ours(request: Request, error: Exception) -> Response:
        return _error_response(500, requests.OUR_FAULT)

    admission = Admission(PATHS, PATH, options.max_body_bytes, options.token)
    app.add_middleware(GZipMiddleware, minimum_size=1000)
    app.add_middleware(RequestLimits, admission=admission, metrics=metrics)
    generated: Callable[[], dict[str, Any]] = app.openapi

    def documented() -> dict[str, Any]:
        if app.openapi_schema is None:
            _document(generated(), with_token=options.token is not None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = documented  # type: ignore[method-assign]
    return app


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
    for status, meaning in (
        (400, "The body is no JSON in UTF-8"),
        (401, "The token is missing or wrong"),
        (408, "The headers or the body do not come in time"),
        (413, "The body, a text or their number is too large"),
        (415, "The headers do not declare the body as JSON in UTF-8"),
        (422, "A field, a text, a rule or a target is wrong"),
        (431, "The headers are too large"),
        (503, "Too many requests are waiting, or the model is being loaded again"),
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
