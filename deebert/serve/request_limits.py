"""The limits on a request: its token, its headers, and its body. Every request is counted.

It is an ASGI middleware: a body that is too large is rejected before it is in memory, and a request
without the token is rejected before anything else is checked. Knows nothing of texts and models.
"""

import asyncio
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deebert.serve.metrics import Metrics
from deebert.serve.requests import BUSY, TOO_LARGE, noted, trouble

# Paths that need no token: the check that the service runs, and its documentation.
OPEN = ("/health", "/docs", "/openapi.json")
HEADER_BYTES = 16 * 1024  # the most of the headers of a request
TOO_LONG = f"the headers have more than {HEADER_BYTES} bytes, the most that is taken"
STOPS = "the service stops; come again later"
BODY_SECONDS = 30  # the time in which a body has to come


@dataclass(frozen=True)
class Admission:
    """The limits that a request has to keep to be accepted.

    Attributes:
        paths: the paths of the service.
        takes: the path that takes a body of JSON.
        max_body: the most bytes of a body.
        token: the token that requests must have; None if they need none.
    """

    paths: Sequence[str]
    takes: str
    max_body: int
    token: str | None


class Rejected(Exception):
    """The error for a request that is rejected, with its HTTP status and headers."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class RequestLimits:
    """The middleware that accepts or rejects requests, and counts them."""

    def __init__(self, app: ASGIApp, admission: Admission, metrics: Metrics) -> None:
        self.app, self.admission, self.metrics = app, admission, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status, begun = time.perf_counter(), 500, False

        async def sent(message: Message) -> None:
            nonlocal status, begun
            status, begun = message.get("status", status), True
            await send(message)

        async def refuse(refusal: Rejected) -> None:
            content = trouble(str(refusal))
            response = Response(content, refusal.status, refusal.headers, "application/json")
            await response(scope, receive, sent)

        path = scope["path"] if scope["path"] in self.admission.paths else "other"
        self.metrics.in_progress.inc()
        try:
            body = await self._body(scope, receive)
            await self.app(scope, _replayed(body, receive), sent)
        except Rejected as error:
            await refuse(error)
        except asyncio.CancelledError:  # uvicorn stops, and its time for this request is over
            if not begun:
                await refuse(Rejected(BUSY, STOPS, connection="close", retry_after="1"))
        finally:
            self.metrics.in_progress.dec()
            self.metrics.request(path, status, time.perf_counter() - start)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Check the headers of a request, and read its body.

        Raises:
            Rejected: the request is not accepted.
        """
        headers = Headers(scope=scope)
        _check_header(scope, headers)
        self._check_token(scope["path"], headers)
        if scope["path"] == self.admission.takes and scope["method"] == "POST":
            _check_kind(headers)
        most = self.admission.max_body
        too_large = f"the body has more than {most} bytes, the most that is taken"
        length = headers.get("content-length", "")
        if "expect" in headers and length.isdecimal() and int(length) > most:
            raise Rejected(TOO_LARGE, too_large, connection="close")  # the body was not sent yet
        content, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Rejected(400, "the body has ended too early")
                    content += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(content) > most:
                        raise Rejected(TOO_LARGE, too_large)
        except TimeoutError as error:
            late = f"the body has not come within {BODY_SECONDS} s"
            raise Rejected(408, late, connection="close") from error
        return bytes(content)

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


def _check_header(scope: Scope, headers: Headers) -> None:
    """Check the size of the headers, and that they say in one way only how long the body is.

    A proxy before the service may believe the other way, and take a part of the body for the next
    request.

    Raises:
        Rejected: they are too large, or they say it in two ways.
    """
    size = len(scope["raw_path"]) + len(scope["query_string"])
    if size + sum(len(name) + len(value) for name, value in headers.raw) > HEADER_BYTES:
        raise Rejected(431, TOO_LONG, connection="close")
    if "transfer-encoding" in headers and "content-length" in headers:
        both = "Transfer-Encoding and Content-Length: send one of them"
        raise Rejected(400, both, connection="close")


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
