"""Limits on a request, without a process: how large its headers and its body are, and its time."""

import asyncio
import json
from typing import Any

import pytest

from deebert.serve import request_limits
from deebert.serve.connections import Connections
from deebert.serve.metrics import Metrics
from deebert.serve.request_limits import HEADER_BYTES, Admission, RequestLimits


def answered(messages: list[bytes], **headers: str) -> tuple[int, dict[bytes, bytes], str]:
    """Status, headers and reason that a POST of so many parts gets; its body ends with an empty one."""
    sent: list[dict] = []
    parts = [{"type": "http.request", "body": part, "more_body": bool(part)} for part in messages]

    async def receive() -> dict:
        if not parts:
            await asyncio.sleep(60)
        return parts.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    async def app(scope: dict, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send(
            {"type": "http.response.body", "body": json.dumps({"detail": len(body)}).encode()}
        )

    names = {"content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    scope = {
        "type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in names.items()],
    }  # fmt: skip
    limits = RequestLimits(app, Admission(("/predict",), "/predict", 100, None), Metrics(3))
    asyncio.run(limits(scope, receive, send))
    start, content = sent
    return start["status"], dict(start["headers"]), json.loads(content["body"])["detail"]


def test_sizes_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "BODY_SECONDS", 0.01)
    chunked = {"transfer_encoding": "chunked"}
    for messages, headers, code, says, closed in (
        ([b"{}", b""], {}, 200, 2, False),
        ([b"a" * 60, b"a" * 40, b""], chunked, 200, 100, False),
        ([b"{"], {}, 408, "has not come within 0.01 s", True),
        ([b"a" * 101], {}, 413, "more than 100 bytes", False),
        ([b"a" * 60] * 20, chunked, 413, "more than 100 bytes", False),
        ([], {"content_length": "101", "expect": "100-continue"}, 413, "more than 100 bytes", True),
        ([b"{}", b""], {"x": "a" * HEADER_BYTES}, 431, "more than 16384 bytes", True),
        ([b"{}", b""], chunked | {"content_length": "2"}, 400, "send one of them", True),
    ):  # fmt: skip
        status, answer_headers, detail = answered(messages, **headers)
        assert (status, answer_headers.get(b"connection") == b"close") == (code, closed), detail
        assert says == detail if isinstance(says, int) else says in detail


def test_one_body_has_always_room() -> None:
    for max_body in (1000, 10**9):
        connections = Connections(10, max_body, lambda status: None)
        assert connections.most_quiet_bytes >= connections.most_bytes > max_body
        assert connections.most_quiet < connections.most
