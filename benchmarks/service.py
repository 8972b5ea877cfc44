"""The service under load, beside prediction without it: requests with mixed targets, many at once.

    python benchmarks/service.py RUN --root DIR [--requests N] [--at-once N] [--repeats R]

RUN: a trained model; DIR: where the texts of its task lie (`data.root`). Every request is a few
texts and a target; every answer is compared with that of `EarlyExitClassifier.predict`. The
services (one for each batch window) take turns, in processes of their own; the clients run on
the same machine. Writes service.json and service.md, after each turn.
"""

import argparse
import http.client
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

from deebert import EarlyExitClassifier
from deebert.data import loading
from deebert.disk import whole_files
from deebert.exits.calibration import CalibratedPoint
from deebert.reporting import report

HERE = Path(__file__).parent
WINDOWS_MS = (0, 10)
MOST_TEXTS = 8  # of a request
WARM_UP = 100  # requests
JSON = {"Content-Type": "application/json"}
TARGETS: list[dict[str, Any]] = [
    {},  # full depth
    {"threshold": 0.1},
    {"target_saving": 0.2},
    {"target_saving": 0.4},
    {"target_saving": 0.5},
    {"max_drop": 0.1},
    {"exit": "patience", "threshold": 0.4},
    {"exit": "margin", "target_saving": 0.3},
    {"target_speedup": 1.3},
]


@dataclass(frozen=True)
class Expected:
    """How a request is to be answered; no `operating_point` where only the service knows it."""

    texts: list[Any]
    target: dict[str, Any]
    operating_point: CalibratedPoint | None
    labels: list[Any]
    exit_layers: list[int]


def requests_of(
    classifier: EarlyExitClassifier, rows: list[Any], num: int
) -> tuple[list[Expected], float]:
    """So many requests, and the seconds that answering them one after the other takes offline."""
    chosen, requests, seconds = random.Random(0), [], 0.0
    for turn in range(num):
        texts = chosen.choices(rows, k=chosen.randint(1, MOST_TEXTS))
        target = TARGETS[turn % len(TARGETS)]
        operating_point = classifier.calibrate(**target)
        start = time.perf_counter()
        answer = classifier.answer(classifier.encode(texts), operating_point)
        seconds += time.perf_counter() - start
        known = None if "target_speedup" in target else operating_point
        requests.append(Expected(texts, target, known, answer.labels, answer.exit_layers))
    return requests, seconds


def wrong(classifier: EarlyExitClassifier, expected: Expected, answer: dict[str, Any]) -> bool:
    """Is an answer another one than offline? What layers cost, the service measures itself."""
    labels, exit_layers = expected.labels, expected.exit_layers
    if expected.operating_point is None:
        predictions = classifier.predict(expected.texts, threshold=answer["threshold"])
        labels, exit_layers = predictions.labels, predictions.exit_layers
    elif answer["threshold"] != expected.operating_point.thresholds:
        return True
    answers = answer["answers"]
    return (
        [each["label"] for each in answers] != labels
        or [each["exit_layer"] for each in answers] != exit_layers
        or answer["target"] != expected.target
    )


@contextmanager
def service(run: str, window_ms: int, threads: int | None) -> Iterator[int]:
    """The port of a service that runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"model={run}", f"port={port}", f"batch_window_ms={window_ms}", "speedups=true"]
    options += [] if threads is None else [f"threads={threads}"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deebert", "serve", *options],
            cwd=HERE.parent,
            stdout=log,
            stderr=log,
        )
        try:
            while process.poll() is None and not _healthy(port):
                time.sleep(0.2)
            if process.poll() is None:
                yield port
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(120):
                log.seek(0)
                raise SystemExit(f"the service failed:\n{log.read().decode()}")


def _healthy(port: int) -> bool:
    try:
        return _get(port, "/health")[0] == 200
    except OSError:
        return False


def _get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def batches(port: int) -> tuple[float, float]:
    """Batches so far, and the requests in them."""
    families = text_string_to_metric_families(_get(port, "/metrics")[1])
    value = {sample.name: sample.value for family in families for sample in family.samples}
    return value["deebert_batch_requests_count"], value["deebert_batch_requests_sum"]


def load(port: int, bodies: list[bytes], at_once: int) -> tuple[float, list[float], list[Any]]:
    """Send all, so many at once, each client over a connection of its own that it keeps.

    Returns:
        The seconds of all, the seconds of each, and each answer: a dict, or what went wrong.
    """
    seconds: list[float] = [0.0] * len(bodies)
    answers: list[Any] = ["not sent"] * len(bodies)
    left = iter(range(len(bodies)))  # next() on it is atomic

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        for row in left:
            start = time.perf_counter()
            try:
                connection.request("POST", "/predict", bodies[row], JSON)
                response = connection.getresponse()
                content = response.read()
                reply = json.loads(content)
                answers[row] = reply if response.status == 200 else f"{response.status}: {reply}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                answers[row] = f"{type(error).__name__}: {error}"
                connection.close()
            seconds[row] = time.perf_counter() - start
        connection.close()

    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        for done in [pool.submit(client) for _ in range(at_once)]:
            done.result()
    return time.perf_counter() - start, seconds, answers


def turn(
    classifier: EarlyExitClassifier, port: int, requests: list[Expected], at_once: int
) -> dict[str, Any]:
    """All requests once."""
    bodies = [json.dumps({"texts": each.texts, **each.target}).encode() for each in requests]
    batches_before, together_before = batches(port)
    seconds, each_seconds, answers = load(port, bodies, at_once)
    batches_after, together_after = batches(port)
    answered = [isinstance(answer, dict) for answer in answers]
    pairs = [
        pair
        for pair, there in zip(zip(requests, answers, strict=True), answered, strict=True)
        if there
    ]
    saved = [answer["saving"] * len(each.texts) for each, answer in pairs]
    p50, p95, p99 = np.percentile(np.array(each_seconds) * 1e3, [50, 95, 99]).tolist()
    return {
        "seconds": seconds,
        "latency_ms": {"p50": p50, "p95": p95, "p99": p99},
        "lost": answered.count(False),
        "wrong": sum(wrong(classifier, *pair) for pair in pairs),
        "requests_a_batch": (together_after - together_before) / (batches_after - batches_before),
        "layer_saving": sum(saved) / sum(len(each.texts) for each, _ in pairs),
        "reasons": Counter(answer for answer in answers if isinstance(answer, str)),
    }


def markdown(content: dict[str, Any]) -> str:
    where, texts, num = content["environment"], content["texts"], content["requests"]
    lines = [
        "# The service under load",
        "",
        f"`{content['command']}`: {num:,} requests of 1 to {MOST_TEXTS} texts ({texts:,} of task "
        f"{content['task']}), {content['at_once']} at once, with {len(content['targets'])} targets "
        f"that take turns; {content['repeats']} turns of each service; {where['cpus']} CPU cores "
        f"({where['device']}) for the service and its clients alike, torch "
        f"{where['versions']['torch']}, commit "
        f"{(where['git_commit'] or 'unknown')[:7]}; {content['minutes']:.1f} minutes. Medians over "
        "the turns; *lost*: not answered with status 200, *wrong*: another label, exit layer, "
        "threshold or target than offline, both over all turns.",
        "",
    ]
    columns = ["batch window", "requests/s", "texts/s", "p50 ms", "p95 ms", "p99 ms"]
    columns += ["requests a batch", "layer saving", "lost", "wrong"]
    rows = []
    for window, turns in content["windows"].items():
        if not turns:
            continue
        rate = num / median(each["seconds"] for each in turns)
        latency = [
            median(each["latency_ms"][name] for each in turns) for name in ("p50", "p95", "p99")
        ]
        rows.append([
            f"{window} ms", f"{rate:.1f}", f"{rate * texts / num:.0f}",
            *(f"{value:.0f}" for value in latency),
            f"{median(each['requests_a_batch'] for each in turns):.1f}",
            f"{median(each['layer_saving'] for each in turns):.1%}",
            sum(each["lost"] for each in turns), sum(each["wrong"] for each in turns),
        ])  # fmt: skip
    seconds = content["offline_seconds"]
    rows.append([
        "offline, one after the other", f"{num / seconds:.1f}", f"{texts / seconds:.0f}",
        *["-"] * 3, "1.0", *["-"] * 3,
    ])  # fmt: skip
    lines += [
        f"| {' | '.join(map(str, row))} |" for row in (columns, ["---:"] * len(columns), *rows)
    ]
    lines += [
        "",
        "The targets: "
        + ", ".join(f"`{json.dumps(target)}`" for target in content["targets"])
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder or saved model")
    parser.add_argument("--root", required=True, help="where the texts lie (data.root)")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each service")
    parser.add_argument("--threads", type=int, help="of torch in a service")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    start = time.perf_counter()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    classifier = EarlyExitClassifier.from_pretrained(given.run)
    columns = ["text_a", "text_b"][: len(classifier.task.columns)]
    data = loading.load(classifier.task, given.split, given.root)
    rows = list(zip(*(data[name][:] for name in columns), strict=True))
    rows = [row[0] if len(row) == 1 else list(row) for row in rows]
    requests, offline_seconds = requests_of(classifier, rows, given.requests)
    content: dict[str, Any] = {
        "command": f"python {shlex.join([os.path.relpath(sys.argv[0]), *_public(given)])}",
        "task": classifier.task.name,
        "requests": len(requests),
        "texts": sum(len(each.texts) for each in requests),
        "at_once": given.at_once,
        "repeats": given.repeats,
        "targets": TARGETS,
        "offline_seconds": offline_seconds,
        "environment": vars(report.environment()),
        "windows": {str(window): [] for window in WINDOWS_MS},
    }
    with ExitStack() as stack:
        ports = {
            window: stack.enter_context(service(given.run, window, given.threads))
            for window in WINDOWS_MS
        }
        for port in ports.values():
            turn(classifier, port, requests[:WARM_UP], given.at_once)
        for number in range(given.repeats):
            for window in WINDOWS_MS[:: -1 if number % 2 else 1]:
                one = turn(classifier, ports[window], requests, given.at_once)
                content["windows"][str(window)].append(one)
                print(f"window {window} ms: {json.dumps(one)}", flush=True)
                content["minutes"] = (time.perf_counter() - start) / 60
                whole_files.replace(
                    given.out / "service.json", json.dumps(content, indent=1) + "\n"
                )
                whole_files.replace(given.out / "service.md", markdown(content))


def _public(given: argparse.Namespace) -> list[str]:
    """The command's arguments, without this machine's folders."""
    words = ["RUN", "--root", "DIR", "--requests", str(given.requests)]
    return [*words, "--at-once", str(given.at_once), "--repeats", str(given.repeats)]


if __name__ == "__main__":
    main()
