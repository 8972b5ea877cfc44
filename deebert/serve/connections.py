"""The limits on connections, before a request is complete: size and time of headers, and memory.

uvicorn limits the headers that it has not understood yet, and nothing else. `Connection` adds
time-outs for headers and for clients that do not read, and `Connections` a limit on the number and
the memory of connections. A quiet connection is one that the service waits for: its client has not
sent a whole request. If there are too many, the oldest is closed, so they never lock others out.
There is no pipelining: who sends more before the answer gets that answer, and is closed.
"""

import asyncio
import resource
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import CLOSE_HEADER, H11Protocol

from deebert.serve.request_limits import HEADER_BYTES, TOO_LONG
from deebert.serve.requests import BUSY, trouble

HEADER_SECONDS = (
    10  # the time in which headers have to come, from the connection or the last answer
)
UNREAD_SECONDS = 30  # the time in which a client has to read something
LINGER_SECONDS = 1  # the time for reading why a request was refused whose rest is not read
PIECE_BYTES = 16 * 1024  # that h11 gets at once: it keeps what it cannot use yet
MOST_QUIET = 1000  # connections
QUIET_BYTES = 32 * 2**20  # of all quiet connections; more if that is less than four bodies
SPARE = 100  # connections whose requests are not for the model, or files

HEADER, BODY, REST = "header", "body", "rest"  # what a quiet connection has to send
MANY = "too many connections are open; come again later"


class Connections:
    """The quiet connections, the oldest first.

    Args:
        max_waiting: the most requests that wait for the model.
        max_body: the most bytes of a body.
        refused: a function that counts an answer with a status.
    """

    def __init__(self, max_waiting: int, max_body: int, refused: Callable[[int], None]) -> None:
        self.most = _most_files(MOST_QUIET + max_waiting + 2 * SPARE) - SPARE
        self.most_quiet = min(MOST_QUIET, self.most // 2)
        self.most_bytes = HEADER_BYTES + max_body  # that a connection holds
        self.most_quiet_bytes = max(QUIET_BYTES, 4 * self.most_bytes)
        self.refused = refused
        self.quiet: dict[Connection, None] = {}
        self.num_bytes = 0

    def make(self, *args: Any, **kwargs: Any) -> asyncio.Protocol:
        """Make the protocol of a new connection, as uvicorn asks for it."""
        return Connection(self, *args, **kwargs)

    def close_oldest(self) -> None:
        """Close the oldest quiet connections, if there are too many or they hold too much."""
        while self.quiet and (
            len(self.quiet) > self.most_quiet or self.num_bytes > self.most_quiet_bytes
        ):
            next(iter(self.quiet)).refuse(BUSY, MANY)


def _most_files(wanted: int) -> int:
    """Let this process open as many files, if it may; return how many it may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)


class Connection(H11Protocol):
    """One connection."""

    def __init__(self, shared: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared = shared
        self.owes: str | None = None
        self.num_bytes = 0
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # `pause_writing` is called when anything is left
        if len(self.connections) > self.shared.most:
            self._answer(BUSY, MANY)
            transport.close()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waits_for(None)
        self._read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            if self.owes == REST or self.transport.is_closing():
                return
            if self._answering():
                return self._close_after_answer()
            piece = data[start : start + PIECE_BYTES]
            num_bytes = min(self.num_bytes + len(piece), self.shared.most_bytes)
            self.shared.num_bytes += num_bytes - self.num_bytes
            self.num_bytes = num_bytes
            super().data_received(piece)
            if self._answering() and self.conn.trailing_data[0]:
                self._close_after_answer()
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def shutdown(self) -> None:
        if self.owes == REST:
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, as h11 judges."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        self._answer(status, TOO_LONG if status == 431 else f"this is no HTTP request: {error}")
        # If it were closed now, the rest that is not read would make the client lose the answer.
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
            self.transport.pause_reading()
        self._waits_for(REST)

    def refuse(self, status: int, reason: str) -> None:
        """Close the connection. A client that has sent a part of a request gets an answer."""
        begun = self.owes == BODY or bool(self.conn.trailing_data[0])
        if self.owes == REST:
            self.transport.abort()
        elif begun:
            self._answer(status, reason)
        self._waits_for(None)
        self.transport.close()

    def _answer(self, status: int, reason: str) -> None:
        """Write an answer, unless another one has begun, and tell the application."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.abort()
        content = trouble(reason)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(content)),
            "connection": "close",
        }
        if status == BUSY:
            headers["retry-after"] = "1"
        phrase = HTTPStatus(status).phrase
        for event in (
            h11.Response(status_code=status, headers=[*headers.items()], reason=phrase),
            h11.Data(data=content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.owes == BODY:
            self.cycle.disconnected = True  # the middleware counts the request
            self.cycle.message_event.set()
        else:
            self.shared.refused(status)

    def _answering(self) -> bool:
        """Return whether a request has come as a whole, and its answer has not been sent."""
        cycle = self.cycle
        return cycle is not None and not cycle.more_body and not cycle.response_complete

    def _close_after_answer(self) -> None:
        """Close the connection after the answer that is under way; the client sent more before."""
        if self.cycle.keep_alive:
            self.cycle.keep_alive = False
            self.headers.append(CLOSE_HEADER)  # those of the request: uvicorn repeats it

    def _watch(self) -> None:
        """Find out whether the service waits for the client now."""
        if self.owes == REST or self.transport.is_closing():
            return
        owes: str | None = BODY
        if self.cycle is None or self.cycle.response_complete:
            owes = HEADER
        elif self._answering():
            owes = None
        if owes != self.owes:
            self._waits_for(owes)
        self.shared.close_oldest()

    def _waits_for(self, owes: str | None) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        self.shared.quiet.pop(self, None)
        if owes != BODY:  # what came with the headers may be a part of the body
            self.shared.num_bytes -= self.num_bytes
            self.num_bytes = 0
        self.owes = owes
        if owes:
            self.shared.quiet[self] = None
        if owes == HEADER:
            late = f"the headers have not come within {HEADER_SECONDS} s"
            self._late = self.loop.call_later(HEADER_SECONDS, self.refuse, 408, late)
        elif owes == REST:
            self._late = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
