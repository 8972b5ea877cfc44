"""What stands between the network and the service: the token, the sizes, and what is counted.

An ASGI middleware, so that a body is refused before it is read into memory and a request without
the token before anything else is looked at. Knows nothing of texts or models.
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

# Without the token: what asks whether the service lives, and the page that tells how to use it.
OPEN = ("/health", "/docs", "/openapi.json")
BODY_SECONDS = 30  # for a body to come
DROPPED = 16  # times the limit: so much of a body that is too large is read, and thrown away,
DROP_SECONDS = 5  # for so long


@dataclass(frozen=True)
class Admission:
    """What is let in.

    Attributes:
        paths: that there are.
        takes: path that takes a body of JSON.
        max_body: of it, in bytes.
        max_waiting: requests at `takes` that may be under way at once.
        max_seconds: that each of them may take.
    """

    paths: Sequence[str]
    takes: str
    max_body: int
    max_waiting: int
    max_seconds: float
    token: str | None


class TurnedAway(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class RequestLimits:
    """Lets requests in, one by one, and counts them.

    Attributes:
        taken, answered: requests at `admission.takes` that were let in, and those that have all of
            their answer.
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
        except TurnedAway as error:
            if sent.status is None:
                content = trouble(str(error))
                response = Response(content, error.status, error.headers, "application/json")
                await response(scope, receive, sent)
            sent.closed = True
        finally:
            self.metrics.in_progress.dec()
            self.metrics.request(path, sent.status or 500, time.perf_counter() - start)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises:
        TurnedAway: it is not let in, or takes too long.
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
        self.waiting += 1  # from here on: its body takes memory, too
        try:
            body = await self._body(headers, receive)
        except BaseException:
            self.waiting -= 1
            raise
        self.taken += 1
        # LitServe keeps an answer until its handler takes it, so that one runs on in any case.
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
            raise TurnedAway(504, f"no answer was found within {most} s")
        handled.result()
        self.answered += 1

    def _handled(self, request: asyncio.Future[None]) -> None:
        self.waiting -= 1
        if not request.cancelled():
            request.exception()  # seen: of one that was given up nobody else asks for it

    def _check_token(self, path: str, headers: Headers) -> None:
        token = self.admission.token
        if token is None or path in OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        # Headers come as Latin-1. The time that comparing takes doesn't tell where they differ.
        if not hmac.compare_digest(given.strip().encode("latin-1"), token.encode()):
            what = "is wrong" if given else "is missing"
            raise TurnedAway(
                401,
                f"the token {what}; send the header 'Authorization: Bearer TOKEN'",
                www_authenticate="Bearer",
            )

    def _check_room(self) -> None:
        if self.waiting >= self.admission.max_waiting:
            reason = f"{self.admission.max_waiting} requests are waiting already; come again later"
            raise TurnedAway(503, reason, retry_after="1")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """All of it.

        Raises:
            TurnedAway: it is too large, or does not come.
        """
        most = self.admission.max_body
        too_large = f"the body has more than {most} bytes, the most that is taken"
        said = headers.get("content-length", "")
        if "expect" in headers and said.isdecimal() and int(said) > most:
            raise TurnedAway(413, too_large, connection="close")  # nothing was sent yet
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
            raise TurnedAway(408, late, connection="close") from error
        content.clear()
        if await _thrown_away(parts, DROPPED * most):
            raise TurnedAway(413, too_large)
        raise TurnedAway(413, too_large, connection="close")


class _Sent:
    """Sends, and remembers the status.

    Attributes:
        closed: what comes now comes too late.
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
            raise TurnedAway(400, "the body has ended too early")
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _thrown_away(parts: AsyncIterator[bytes], most: int) -> bool:
    """Read on to the end of a body, but not for ever: a client that is still sending would not see
    its answer. Was that the end?"""
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
    """Raises:
    TurnedAway: the body is not said to be JSON in UTF-8.
    """
    given = headers.get("content-type", "")
    kind, _, rest = given.partition(";")
    charset = rest.strip().lower().removeprefix("charset=").strip("\"'")
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        wanted = "send JSON in UTF-8 with 'Content-Type: application/json'"
        raise TurnedAway(415, f"Content-Type is {noted(given)}; {wanted}")
    if coding := headers.get("content-encoding"):
        raise TurnedAway(415, f"Content-Encoding {noted(coding)} is not read; send it as it is")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message; what comes after it is asked for where it comes from."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
