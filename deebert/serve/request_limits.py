"""The limits on requests: the token, the sizes, the load and the time. Every request is counted.

It is an ASGI middleware: a body that is too large is rejected before it is in memory, and a request
without the token is rejected before anything else is checked. Knows nothing of texts and models.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deebert.serve.metrics import Metrics
from deebert.serve.requests import noted, trouble

log = logging.getLogger(__name__)

# Paths that need no token: the check that the service runs, and its documentation.
OPEN = ("/health", "/docs", "/openapi.json")
BODY_SECONDS = 30  # the time in which a body has to come
# The rest of a body that is too large is read and discarded, up to these limits.
DROPPED = 16  # times the largest body
DROP_SECONDS = 5


@dataclass(frozen=True)
class Admission:
    """The limits that a request has to keep to be accepted.

    Attributes:
        paths: the paths of the service.
        takes: the path that takes a body of JSON.
        max_body: the most bytes of a body.
        max_waiting: the most requests at `takes` that may be under way at once.
        max_seconds: the most seconds that such a request may take.
        token: the token that requests must have; None if they need none.
    """

    paths: Sequence[str]
    takes: str
    max_body: int
    max_waiting: int
    max_seconds: float
    token: str | None


class Rejected(Exception):
    """The error for a request that is rejected, with its HTTP status and headers."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class RequestLimits:
    """The middleware that accepts or rejects requests, and counts them.

    Attributes:
        taken: the number of requests at `admission.takes` that were accepted.
        answered: the number of these whose answer was sent completely.
        waiting: the number of requests at `admission.takes` that are under way.
    """

    def __init__(self, app: ASGIApp, admission: Admission, metrics: Metrics) -> None:
        self.app, self.admission, self.metrics = app, admission, metrics
        self.taken = self.answered = self.waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            log.info("answered %d of %d requests that were taken", self.answered, self.taken)
            return
        start, sent = time.perf_counter(), _Sent(send)
        path = scope["path"] if scope["path"] in self.admission.paths else "other"
        self.metrics.in_progress.inc()
        try:
            await self._pass(scope, receive, sent)
        except Rejected as error:
            if sent.status is None:
                content = trouble(str(error))
                response = Response(content, error.status, error.headers, "application/json")
                await response(scope, receive, sent)
            sent.closed = True
        finally:
            self.metrics.in_progress.dec()
            self.metrics.request(path, sent.status or 500, time.perf_counter() - start)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application.

        Raises:
            Rejected: the request is not accepted, or takes too long.
        """
        headers = Headers(scope=scope)
        counts = scope["path"] == self.admission.takes and scope["method"] == "POST"
        self._check_token(scope["path"], headers)
        if not counts:
            body = await self._body(headers, receive)
            await self.app(scope, _replayed(body, receive), send)
            return
        self._check_room()
        _check_kind(headers)
        self.waiting += 1  # before the body is read, because the body takes memory, too
        try:
            body = await self._body(headers, receive)
        except BaseException:
            self.waiting -= 1
            raise
        self.taken += 1
        # LitServe keeps an answer until the handler takes it, so the handler always runs on.
        handled = asyncio.ensure_future(self.app(scope, _replayed(body, receive), send))
        handled.add_done_callback(self._handled)
        most = self.admission.max_seconds
        try:
            done, _ = await asyncio.wait({handled}, timeout=most)
        except asyncio.CancelledError:  # the service ends
            handled.cancel()
            await asyncio.wait({handled})
            raise
        if not done:
            raise Rejected(504, f"no answer was found within {most} s")
        handled.result()
        self.answered += 1

    def _handled(self, request: asyncio.Future[None]) -> None:
        self.waiting -= 1
        if not request.cancelled():
            request.exception()  # marks it as seen, as nothing else does after a timeout

    def _check_token(self, path: str, headers: Headers) -> None:
        token = self.admission.token
        if token is None or path in OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        # Headers are Latin-1. The time of this comparison does not depend on where they differ.
        if not hmac.compare_digest(given.strip().encode("latin-1"), token.encode()):
            what = "is wrong" if given else "is missing"
            raise Rejected(
                401,
                f"the token {what}; send the header 'Authorization: Bearer TOKEN'",
                www_authenticate="Bearer",
            )

    def _check_room(self) -> None:
        if self.waiting >= self.admission.max_waiting:
            reason = f"{self.admission.max_waiting} requests are waiting already; come again later"
            raise Rejected(503, reason, retry_after="1")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Read the whole body.

        Raises:
            Rejected: the body is too large, or does not come in time.
        """
        most = self.admission.max_body
        too_large = f"the body has more than {most} bytes, the most that is taken"
        length = headers.get("content-length", "")
        if "expect" in headers and length.isdecimal() and int(length) > most:
            raise Rejected(413, too_large, connection="close")  # the body was not sent yet
        content, parts = bytearray(), _parts(receive)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in parts:
                    content += part
                    if len(content) > most:
                        break
                else:
                    return bytes(content)
        except TimeoutError as error:
            late = f"the body has not come within {BODY_SECONDS} s"
            raise Rejected(408, late, connection="close") from error
        content.clear()
        if await _discarded(parts, DROPPED * most):
            raise Rejected(413, too_large)
        raise Rejected(413, too_large, connection="close")


class _Sent:
    """A `Send` that remembers the status.

    Attributes:
        status: the status that was sent, or None.
        closed: whether further messages are dropped, because they come too late.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.status: int | None = None
        self.closed = False

    async def __call__(self, message: Message) -> None:
        if self.closed:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.send(message)


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Rejected(400, "the body has ended too early")
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _discarded(parts: AsyncIterator[bytes], most: int) -> bool:
    """Read and discard the rest of a body, within limits.

    A client that is still sending would not read its answer.

    Returns:
        Whether the end of the body was reached.
    """
    dropped = 0
    try:
        async with asyncio.timeout(DROP_SECONDS):
            async for part in parts:
                dropped += len(part)
                if dropped > most:
                    return False
    except TimeoutError:
        return False
    return True


def _check_kind(headers: Headers) -> None:
    """Check that the headers declare the body as JSON in UTF-8.

    Raises:
        Rejected: they do not.
    """
    given = headers.get("content-type", "")
    kind, _, rest = given.partition(";")
    charset = rest.strip().lower().removeprefix("charset=").strip("\"'")
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        wanted = "send JSON in UTF-8 with 'Content-Type: application/json'"
        raise Rejected(415, f"Content-Type is {noted(given)}; {wanted}")
    if coding := headers.get("content-encoding"):
        raise Rejected(415, f"Content-Encoding {noted(coding)} is not read; send it as it is")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `Receive` that gives the body as one message, and then the messages after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
