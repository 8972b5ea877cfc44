"""A service that runs in processes of its own, on a free port."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from helpers.ports import free_port

MOST_TEXTS, MOST_CHARS, MOST_BYTES = 8, 500, 20_000
JSON = {"Content-Type": "application/json"}


@dataclass
class Served:
    """A service that runs."""

    process: subprocess.Popen
    port: int
    log: Path

    def send(
        self,
        method: str = "POST",
        path: str = "/predict",
        body: Any = None,
        headers: dict[str, str] = JSON,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and content of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(
                method, path, body, headers, encode_chunked=isinstance(body, Iterator)
            )
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def predict(self, headers: dict[str, str] = JSON, **fields: Any) -> dict[str, Any]:
        status, _, content = self.send(body=json.dumps(fields), headers=headers)
        assert status == 200, content
        return json.loads(content)

    def memory(self) -> float:
        """MB of memory that the process that speaks HTTP holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def processes(self) -> list[int]:
        """All that belong to it: it has a session of its own."""
        numbers = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                numbers.append(int(stat.parent.name))
        return numbers


@contextmanager
def served(
    model: Path, folder: Path, *options: str, ends_with: int = 0, **environment: str
) -> Iterator[Served]:
    """A service, which is stopped afterwards if it still runs, and its exit code is checked."""
    port = free_port()
    command = [
        sys.executable, "-W", "error::ResourceWarning", "-m", "deebert", "serve", f"model={model}", f"port={port}", "threads=1",
        f"max_texts={MOST_TEXTS}", f"max_length_chars={MOST_CHARS}", f"max_body_bytes={MOST_BYTES}", *options,
    ]  # fmt: skip
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=out, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip
    there = Served(process, port, log)
    try:
        end = time.monotonic() + 200
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                if there.send("GET", "/health")[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        yield there
        if process.poll() is None:
            process.terminate()
        assert process.wait(60) == ends_with, log.read_text()
    finally:
        for left in there.processes():
            os.kill(left, signal.SIGKILL)


@pytest.fixture(scope="session")
def service(stage2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service that many tests share."""
    with served(
        stage2, tmp_path_factory.mktemp("served"), "batch_window_ms=20", "speedups=true"
    ) as there:
        yield there
