"""Limits on requests: how many wait, how large a body is, and how long anybody waits."""

import asyncio
import json
from typing import Any

import pytest

from deebert.serve import request_limits
from deebert.serve.metrics import Metrics
from deebert.serve.request_limits import Admission, RequestLimits


def through(
    request_limits: RequestLimits, messages: list[bytes], **headers: str
) -> tuple[list[dict], asyncio.Task]:
    """What it sends for a POST of so many parts, which end with an empty one; and its task."""
    sent: list[dict] = []
    parts = [{"type": "http.request", "body": part, "more_body": bool(part)} for part in messages]

    async def receive() -> dict:
        if not parts:
            await asyncio.sleep(60)
        return parts.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    all_headers = {"content-type": "application/json", **headers}.items()
    scope = {
        "type": "http", "method": "POST", "path": "/predict",
        "headers": [(name.encode(), value.encode()) for name, value in all_headers],
    }  # fmt: skip
    return sent, asyncio.ensure_future(request_limits(scope, receive, send))


async def never(scope: dict, receive: Any, send: Any) -> None:
    """An application that takes all, and does not answer."""
    await receive()
    await asyncio.sleep(60)


def opened(**limits: Any) -> RequestLimits:
    values = {"max_body": 100, "max_waiting": 2, "max_seconds": 60.0, "token": None} | limits
    return RequestLimits(never, Admission(("/predict",), "/predict", **values), Metrics(3))


def status(sent: list[dict], says: str) -> int:
    start, content = sent
    assert says in json.loads(content["body"])["detail"]
    return start["status"]


def test_a_request_is_refused_when_too_many_wait() -> None:
    async def check() -> None:
        request_limits = opened()
        inside = [through(request_limits, [b"{}", b""])[1] for _ in range(2)]
        await asyncio.sleep(0.01)
        sent, task = through(request_limits, [b"{}", b""])
        await task
        assert status(sent, "2 requests are waiting already") == 503
        assert (b"retry-after", b"1") in sent[0]["headers"]
        for each in inside:
            each.cancel()
        await asyncio.wait(inside)
        assert request_limits.waiting == 0
        assert (request_limits.taken, request_limits.answered) == (2, 0)

    asyncio.run(check())


def test_whose_body_is_still_coming_waits_too() -> None:
    async def check() -> None:
        request_limits = opened()
        coming = [through(request_limits, [b"{"])[1] for _ in range(2)]
        await asyncio.sleep(0.01)
        sent, task = through(request_limits, [b"{}", b""])
        await task
        assert status(sent, "2 requests are waiting already") == 503
        for each in coming:
            each.cancel()
        await asyncio.wait(coming)
        assert (request_limits.waiting, request_limits.taken) == (0, 0)

    asyncio.run(check())


def test_an_answer_that_comes_too_late_is_taken_and_dropped() -> None:
    """LitServe would keep it for ever if its handler were broken off."""

    async def check() -> None:
        finished = []

        async def late(scope: dict, receive: Any, send: Any) -> None:
            await asyncio.sleep(0.05)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            finished.append(True)

        request_limits = opened(max_seconds=0.01)
        request_limits.app = late
        sent, task = through(request_limits, [b"{}", b""])
        await task
        assert status(sent, "no answer was found within 0.01 s") == 504
        assert request_limits.waiting == 1, "the model still works on it"
        await asyncio.sleep(0.1)
        assert finished == [True]
        assert len(sent) == 2, "the client has its 504"
        assert (request_limits.waiting, request_limits.taken, request_limits.answered) == (0, 1, 0)

    asyncio.run(check())


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for an answer, nor for a body, nor for the end of one that is too large."""
    monkeypatch.setattr(request_limits, "BODY_SECONDS", 0.01)
    monkeypatch.setattr(request_limits, "DROP_SECONDS", 0.01)

    async def check() -> None:
        for messages, code, says in (
            ([b"{}", b""], 504, "no answer was found within 0.01 s"),
            ([b"{"], 408, "has not come within 0.01 s"),
            ([b"a" * 101], 413, "more than 100 bytes"),
            ([b"a" * 101] * 20, 413, "more than 100 bytes"),
        ):
            sent, task = through(opened(max_seconds=0.01), messages)
            await task
            assert status(sent, says) == code
            if code != 504:
                assert (b"connection", b"close") in sent[0]["headers"]

    asyncio.run(check())
