"""Every process of a service is killed in turn, under load: it recovers or ends, and nobody waits."""

import http.client
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.services import Served, served

pytestmark = pytest.mark.slow

RECOVERED_SECONDS = 60  # 15 on a machine that does nothing else
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

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
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
        with load(there) as statuses:
            os.kill(of_models(there)[0], signal.SIGKILL)
            there.process.wait(RECOVERED_SECONDS)
        wait_for(lambda: not there.processes())
    log = there.log.read_text()
    assert f"the service ends: model={model}: no such" in log, log
    assert "Traceback" not in log, log


def stand_still(there: Served) -> None:
    """40 requests wait, the others are refused at once; those that wait are refused in time."""
    [held] = of_models(there)
    os.kill(held, signal.SIGSTOP)
    start = time.monotonic()
    with ThreadPoolExecutor(100) as pool:
        sent = [pool.submit(there.send, body=BODY) for _ in range(100)]
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
