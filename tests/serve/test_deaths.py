"""Every process of a service is killed in turn, under load: it recovers or ends, and nobody waits."""

import asyncio
import gc
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.ports import free_port
from helpers.services import Served, served

from deebert.serve import pool
from deebert.serve.command import ServeOptions, checked
from deebert.serve.requests import Refused, Work

pytestmark = pytest.mark.slow

RECOVERED_SECONDS = 120  # 15 on a machine that does nothing else
ANSWER_SECONDS = 8
BODY = json.dumps({"text": ["a", "b"]})


def of_models(service: Served) -> list[int]:
    """The processes that hold the model."""
    return [
        each
        for each in service.processes()
        if "spawn_main" in Path(f"/proc/{each}/cmdline").read_text()
    ]


@contextmanager
def load(service: Served) -> Iterator[Counter]:
    """Eight clients that ask on. Each request is answered or refused in time.

    Yields:
        The counts of statuses; 0 for a connection that was broken.
    """
    statuses: Counter = Counter()
    stopped, lock = threading.Event(), threading.Lock()

    def ask() -> None:
        while not stopped.is_set():
            start = time.monotonic()
            try:
                status = service.send(body=BODY)[0]
            except (OSError, http.client.HTTPException):
                status = 0
            assert time.monotonic() - start < ANSWER_SECONDS + 5
            with lock:
                statuses[status] += 1
            time.sleep(0.05)

    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask) for _ in range(8)]
        try:
            yield statuses
        finally:
            stopped.set()
        for each in asking:
            each.result()


def wait_for(condition, seconds: float = RECOVERED_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def test_the_process_with_the_model_is_killed(stage2: Path, tmp_path: Path) -> None:
    """Another one is started. When it cannot be started, the service ends."""
    model = shutil.copytree(stage2, tmp_path / "model")
    options = ("max_waiting=40", f"answer_s={ANSWER_SECONDS}")
    with served(model, tmp_path, *options, ends_with=1) as there:
        [held] = of_models(there)
        with load(there) as statuses:
            wait_for(lambda: statuses[200] > 50)
            os.kill(held, signal.SIGKILL)
            wait_for(lambda: statuses[503] > 5)
            wait_for(lambda before=statuses[200]: statuses[200] > before + 50)
        assert {*statuses} == {200, 503}, "refused, and never broken or late"
        assert of_models(there) != [held]
        stand_still(there)
        model.rename(model.with_name("moved"))
        with load(there), ExitStack() as stack:
            os.kill(of_models(there)[0], signal.SIGKILL)
            slow = [half_sent(there, stack)]
            while "the service ends" not in there.log.read_text():
                slow.append(half_sent(there, stack))
            there.process.wait(15)  # not the 30 s that bodies have
            answers = [wire.recv(65536) for wire in slow[-5:-2]]
        assert [answer[9:12] for answer in answers] == [b"503"] * 3, answers
        assert b"the service stops" in answers[0], answers
        wait_for(lambda: not there.processes())
    log = there.log.read_text()
    assert f"the service ends: model={model}: no such" in log, log
    assert "Traceback" not in log, log


def half_sent(there: Served, stack: ExitStack) -> socket.socket:
    """A connection whose body does not come."""
    wire = stack.enter_context(socket.create_connection(("127.0.0.1", there.port), timeout=5))
    wire.sendall(b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    time.sleep(0.2)
    return wire


def stand_still(there: Served) -> None:
    """40 requests wait, the others are refused at once; those that wait are refused in time."""
    [held] = of_models(there)
    os.kill(held, signal.SIGSTOP)
    start = time.monotonic()
    with ThreadPoolExecutor(100) as threads:
        sent = [threads.submit(there.send, body=BODY) for _ in range(100)]
        wait_for(lambda: sum(each.done() for each in sent) >= 60, ANSWER_SECONDS)
        refused = [each for each in sent if each.done()]
        assert {each.result()[0] for each in refused} == {503}
        assert {each.result()[1]["Retry-After"] for each in refused} == {"1"}
        assert b"40 requests are waiting already" in refused[0].result()[2]
        late = [each.result() for each in sent if each not in refused]
    assert Counter(status for status, _, _ in late) == {504: 40}
    assert ANSWER_SECONDS <= time.monotonic() - start < ANSWER_SECONDS + 5
    assert b"no answer was found within 8.0 s" in late[0][2]
    assert there.send(body=BODY)[0] == 503, "it still has 40 to answer"
    os.kill(held, signal.SIGCONT)
    wait_for(lambda: there.send(body=BODY)[0] == 200)


def test_the_process_that_speaks_http_is_killed(stage2: Path, tmp_path: Path) -> None:
    """Then those with the model end, too. Nobody needs the tracker of multiprocessing."""
    with served(stage2, tmp_path, "workers=2", ends_with=-signal.SIGKILL) as there:
        holding = of_models(there)
        assert len(holding) == 2
        [tracker] = {*there.processes()} - {*holding, there.process.pid}
        with load(there) as statuses:
            wait_for(lambda: statuses[200] > 50)
            os.kill(tracker, signal.SIGKILL)
            wait_for(lambda: statuses[200] > 100)
            assert {*statuses} == {200}
            there.process.kill()
            wait_for(lambda: not there.processes(), 15)


def test_a_process_that_stands_still_is_replaced(
    stage2: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers too late first; after a minute without any word it is killed."""
    monkeypatch.setattr(pool, "SILENT_SECONDS", 1.0)
    work = Work([("a", "b")], {})

    async def check() -> None:
        of_one = pool.Pool(checked(ServeOptions(model=str(stage2), answer_s=0.5, threads=1)))
        try:
            await of_one.start()
            [held] = of_one._processes
            os.kill(held.pid, signal.SIGSTOP)
            for _ in range(2):  # after 0.5 s nobody is killed; after 1 s the process is
                assert held.is_alive()
                with pytest.raises(Refused, match="no answer was found within"):
                    await of_one.ask(work)
            async with asyncio.timeout(RECOVERED_SECONDS):
                while of_one._processes in ([], [held]):
                    await asyncio.sleep(0.05)
            assert not of_one.ready, "the other process loads the model"
            with pytest.raises(Refused, match="is being loaded again"):
                await of_one.ask(work)
            assert (of_one.taken, of_one.answered) == (2, 0)
        finally:
            await of_one.stop()
        assert not held.is_alive()
        assert not any(each.is_alive() for each in of_one._processes)

    asyncio.run(check())
    gc.collect()
    assert "never retrieved" not in caplog.text, caplog.text


def test_a_process_that_hangs_while_it_loads_ends_the_service(
    stage2: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The one in place of another, as with a folder on a mount that hangs."""
    monkeypatch.setattr(pool, "LOAD_SECONDS", 1.0)

    async def check() -> None:
        of_one, ends = (
            pool.Pool(checked(ServeOptions(model=str(stage2), threads=1))),
            asyncio.Event(),
        )
        of_one.on_failure = ends.set
        try:
            await of_one.start()
            assert of_one._load_s > 0
            of_one._load_s = 0.5  # so the limit is 2 s
            [held] = of_one._processes
            held.kill()
            async with asyncio.timeout(15):
                while of_one._processes in ([], [held]):
                    await asyncio.sleep(0.01)
            [hangs] = of_one._processes
            os.kill(hangs.pid, signal.SIGSTOP)
            async with asyncio.timeout(15):
                await ends.wait()
            assert of_one.failed
            assert not of_one.ready
            await asyncio.to_thread(hangs.join, 15)
            assert hangs.exitcode == -signal.SIGKILL
        finally:
            await of_one.stop()

    asyncio.run(check())
    gc.collect()
    assert "that was to hold the model has not loaded it within 2 s" in caplog.text
    assert "Traceback" not in caplog.text, caplog.text


def test_a_stop_of_less_than_half_a_second(stage2: Path, tmp_path: Path) -> None:
    """Requests that are under way are answered: uvicorn counts whole seconds."""
    with (
        served(stage2, tmp_path, "stop_s=0.3", "batch_window_ms=600") as there,
        ThreadPoolExecutor(1) as threads,
    ):
        sent = threads.submit(there.send, body=BODY)
        time.sleep(0.2)
        there.process.terminate()
        assert sent.result()[0] == 200
    assert there.log.read_text().endswith("deebert.serve.server: stopped\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_start_that_is_interrupted(stage2: Path, tmp_path: Path, number: int) -> None:
    """All processes get the signal, as by Ctrl-C in a terminal, while one loads the model."""
    command = [sys.executable, "-m", "deebert", "serve", f"model={stage2}", f"port={free_port()}"]
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    there = Served(process, 0, tmp_path / "log")
    wait_for(lambda: len(there.processes()) == 3)  # with the tracker of multiprocessing
    time.sleep(0.5)
    os.killpg(process.pid, number)
    assert process.wait(20) == 0, there.log.read_text()
    wait_for(lambda: not there.processes(), 15)
    assert there.log.read_text().endswith("deebert.serve.server: stopped before it has begun\n")
    assert "Traceback" not in there.log.read_text()
