"""Attacks on a service that need no token: a real process, its memory, and other clients meanwhile."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest
from helpers.services import Served

from deebert.serve.connections import HEADER_SECONDS, MOST_QUIET
from deebert.serve.request_limits import HEADER_BYTES

pytestmark = pytest.mark.slow

MOST_GROWTH = 50  # MB
MOST_SECONDS = 6.0  # of another client, on a machine that does much else; it was 9 on a quiet one

PREDICT = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def connected(service: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=30)


def received(wire: socket.socket) -> bytes:
    """All that comes before the service closes the connection."""
    parts = []
    try:
        while part := wire.recv(65536):
            parts.append(part)
    except ConnectionError:  # it was closed while more was on its way
        pass
    return b"".join(parts)


def one_answer(wire: socket.socket) -> bytes:
    """The whole of an answer after which the connection stays open."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += wire.recv(65536)
    head, _, content = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0])
    while len(content) < length:
        content += wire.recv(65536)
    return head + b"\r\n\r\n" + content


def statuses(answers: bytes) -> list[int]:
    return [int(part.split(b" ", 1)[0]) for part in answers.split(b"HTTP/1.1 ")[1:]]


@contextmanager
def unharmed(service: Served) -> Iterator[None]:
    """Other clients are answered meanwhile and afterwards, and the memory stays."""
    before, going, seconds = service.memory(), True, []

    def ask() -> None:
        while going:
            start = time.monotonic()
            assert service.predict(text=["a", "b"])["answers"]
            seconds.append(time.monotonic() - start)
            time.sleep(0.02)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield
        finally:
            growth = service.memory() - before
            going = False
        asking.result()
    assert service.send("GET", "/health")[0] == 200
    print(f"{growth:.1f} MB, {len(seconds)} requests, the slowest {max(seconds):.3f} s")
    assert growth < MOST_GROWTH
    assert max(seconds) < MOST_SECONDS


def line_without_end(wire: socket.socket, send: Callable[[bytes], None]) -> None:
    send(b"GET /")
    while True:
        send(b"a" * 65536)


def header_without_end(wire: socket.socket, send: Callable[[bytes], None]) -> None:
    send(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
    while True:
        send(b"a" * 65536)


def headers_without_end(wire: socket.socket, send: Callable[[bytes], None]) -> None:
    send(b"GET /health HTTP/1.1\r\nHost: x\r\n")
    while True:
        send(b"X-Name: value\r\n" * 5000)


def trailers_without_end(wire: socket.socket, send: Callable[[bytes], None]) -> None:
    send(b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
    while True:
        send(b"X-Name: value\r\n" * 5000)


def chunk_line_without_end(wire: socket.socket, send: Callable[[bytes], None]) -> None:
    send(b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;")
    while True:
        send(b"a" * 65536)


def test_500_mb_of_headers(service: Served) -> None:
    """The client stops after 500 MB, or when it is sent away."""

    def attack(how: Callable) -> int:
        num_bytes = 0
        with connected(service) as wire:

            def send(data: bytes) -> None:
                nonlocal num_bytes
                wire.sendall(data)
                num_bytes += len(data)
                assert num_bytes < 500e6, "everything was taken"

            with pytest.raises(OSError):  # noqa: PT011 (reset, broken pipe, or nothing is read)
                how(wire, send)
        return num_bytes

    attacks = (
        line_without_end, header_without_end, headers_without_end, trailers_without_end,
        chunk_line_without_end,
    )  # fmt: skip
    with unharmed(service), ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(attack, attacks * 3))
    assert max(taken) < 20e6, "what lies in the buffers of the system"


def test_too_large_headers_are_answered(service: Served) -> None:
    """Whether they come at once, or have no end."""
    for header in (
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * HEADER_BYTES + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (HEADER_BYTES + 1000),
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * HEADER_BYTES,
        b"GET /" + b"a" * (HEADER_BYTES + 1000),
    ):
        with connected(service) as wire:
            wire.sendall(header)
            answer = received(wire)
        assert statuses(answer) == [431], answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
            "detail": "the headers have more than 16384 bytes, the most that is taken"
        }


def opened(service: Served, begin: bytes, num: int, stack: ExitStack) -> list[socket.socket]:
    """So many connections that begin a request; the service has seen the first one before the others."""
    wires = []
    for turn in range(num):
        wire = stack.enter_context(connected(service))
        wire.sendall(begin)
        wires.append(wire)
        time.sleep(0.0 if turn else 0.3)
    return wires


HALF = {
    "idle": (b"", 2000),
    "half of a header": (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 10_000, 1100),
    "a slow body": (PREDICT + b"Content-Length: 20000\r\n\r\n{" + b" " * 10_000, 1100),
    "a slow body where none is read": (
        b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n", 1100,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HALF)
def test_connections_that_stay_open(service: Served, what: str) -> None:
    """The oldest ones make room. They keep nobody out, and hold no memory for long."""
    begin, num = HALF[what]
    with ExitStack() as stack, unharmed(service):
        wires = opened(service, begin, num, stack)
        time.sleep(0.5)
        oldest, newest = wires[0], wires[-1]
        assert statuses(received(oldest)) == ([503] if begin else [])
        newest.settimeout(0.1)
        with pytest.raises(TimeoutError):
            newest.recv(1)  # the service still waits for it
    assert num > MOST_QUIET


def test_headers_that_do_not_come(service: Served) -> None:
    """Not in time, though a byte comes now and then; or none comes, or a body is not sent on."""
    with ExitStack() as stack:
        slow, idle, again, large = opened(service, b"", 4, stack)
        start = time.monotonic()
        large.sendall(PREDICT + b"Content-Length: 1000000\r\n\r\n" + b"a" * 30_000)
        again.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert statuses(one_answer(again)) == [200]
        again.sendall(b"GET /health HTTP/1.1\r\n")
        for byte in b"GET /health HTTP/1.1\r\nX":
            slow.sendall(bytes([byte]))
            time.sleep(0.2)
        assert statuses(received(slow)) == [408]
        assert statuses(received(again)) == [408]
        assert statuses(received(large)) == [413]
        assert received(idle) == b""
        assert HEADER_SECONDS - 1 < time.monotonic() - start < HEADER_SECONDS + 5


GET = b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n"

SMUGGLED: dict[str, tuple[bytes, int]] = {
    "a length and chunks": (b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET, 400),
    "chunks and a length": (b"Transfer-Encoding: chunked\r\nContent-Length: 60\r\n\r\n0\r\n\r\n" + GET, 400),
    "two lengths": (b"Content-Length: 0\r\nContent-Length: 6\r\n\r\n" + GET, 400),
    "two lengths in one": (b"Content-Length: 0, 6\r\n\r\n" + GET, 400),
    "a length with a sign": (b"Content-Length: +0\r\n\r\n" + GET, 400),
    "a length below 0": (b"Content-Length: -1\r\n\r\n" + GET, 400),
    "a length in hex": (b"Content-Length: 0x0\r\n\r\n" + GET, 400),
    "a space before the colon": (b"Content-Length : 6\r\n\r\n" + GET, 400),
    "chunks that are none": (b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + GET, 501),
    "chunks twice": (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + GET, 501),
    "chunks hidden by a tab": (b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + GET, 400),
    "a chunk of no number": (b"Transfer-Encoding: chunked\r\n\r\nx\r\n\r\n" + GET, 400),
    "a chunk below 0": (b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n" + GET, 400),
    "a chunk longer than it says": (b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n" + GET, 400),
    "NUL in a header": (b"X: a\x00b\r\n\r\n" + GET, 400),
    "a carriage return in a header": (b"X: a\rContent-Length: 6\r\n\r\n" + GET, 400),
}  # fmt: skip


def test_smuggled_requests(service: Served) -> None:
    """A request that two readers may understand in two ways gets one answer; what follows gets none."""
    for what, (rest, status) in SMUGGLED.items():
        with connected(service) as wire:
            wire.sendall(b"POST /health HTTP/1.1\r\nHost: x\r\n" + rest)
            answer = received(wire)
        assert statuses(answer) == [status], (what, answer)
        assert b"versions" not in answer, what
        assert list(json.loads(answer.partition(b"\r\n\r\n")[2])) == ["detail"], what


def test_more_before_the_answer(service: Served) -> None:
    """The first request gets its answer, which says that the connection is closed; no other does."""
    post = PREDICT + b'Content-Length: 19\r\n\r\n{"text":["a", "b"]}'
    for first in (GET, post):
        for rest in (GET, b"\r\n", GET * 400, b"no request"):
            with connected(service) as wire:
                wire.sendall(first + rest)
                answer = received(wire)
            assert statuses(answer) == [200], (first, rest[:40], answer)
            assert b"\r\nconnection: close\r\n" in answer.lower()
    with connected(service) as wire:
        for _ in range(3):
            wire.sendall(GET)
            answer = one_answer(wire)
            assert statuses(answer) == [200], "one after the other"
            assert b"connection: close" not in answer.lower()


def test_answers_that_are_not_read(service: Served) -> None:
    """From each of 500 connections as many requests for the longest answer as one read takes."""
    request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    flood = request * (2**18 // len(request))
    with unharmed(service), ExitStack() as stack:
        wires = []
        for _ in range(500):
            wire = stack.enter_context(socket.socket())
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            wire.connect(("127.0.0.1", service.port))
            wire.settimeout(0.0)
            with suppress(BlockingIOError):
                wire.send(flood)
            wires.append(wire)
        time.sleep(2)
        for wire in wires:
            wire.settimeout(5)
            assert statuses(received(wire)) in ([200], []), "it may be reset before it was read"


def test_bodies_that_hold_memory(service: Served) -> None:
    """Each is as large as may be, but for its end; and some are larger."""
    for length, num in ((20_000, 900), (10**9, 20)):
        begin = b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length
        with unharmed(service), ExitStack() as stack:
            wires = opened(service, begin + b"a" * 19_999, num, stack)
            if length == 10**9:
                wires[0].sendall(b"a" * 10_000)
                assert statuses(wires[0].recv(65536)) == [413]
