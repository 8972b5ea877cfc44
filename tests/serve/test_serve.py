"""The service: real processes on a free port, answers as offline, bad requests, and how it stops."""

import http.client
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import mrpc_rows
from helpers.services import JSON, MOST_BYTES, MOST_CHARS, MOST_TEXTS, Served, served
from prometheus_client.parser import text_string_to_metric_families

from deebert import EarlyExitClassifier
from deebert.exits.drift_monitor import STATES

pytestmark = pytest.mark.slow

PAIRS = [[row["sentence1"], row["sentence2"]] for row in mrpc_rows("validation", 40)]

TOKEN = "correct horse"


def command_line(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()


@pytest.fixture(scope="module")
def offline(stage2: Path) -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(stage2)


TARGETS: list[dict[str, Any]] = [
    {},
    {"threshold": 0.68},
    {"threshold": [0.68, 0.69]},
    {"target_saving": 0.4},
    {"target_saving": 0.6, "temperature": True},
    {"exit": "patience", "threshold": 0.7},
    {"exit": "margin", "target_saving": 0.3},
    {"max_drop": 0.5, "loss": "disagreement", "confidence": 0.9},
    {"target_speedup": 1.05},
]


def test_answers_as_offline_whoever_else_asks(
    service: Served, offline: EarlyExitClassifier
) -> None:
    chosen = random.Random(0)
    requests = [
        (chosen.choices(PAIRS, k=chosen.randint(1, MOST_TEXTS)), TARGETS[turn % len(TARGETS)])
        for turn in range(12 * len(TARGETS))
    ]
    before = counted(service)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda each: service.predict(texts=each[0], **each[1]), requests))
    layers = 0
    for (texts, target), answer in zip(requests, answers, strict=True):
        assert answer["target"] == target
        if "target_speedup" in target:  # what layers cost was measured there
            expected = offline.predict(texts, threshold=answer["threshold"])
        else:
            expected = offline.predict(texts, **target)
            assert answer["threshold"] == offline.calibrate(**target).thresholds
        assert [each["label"] for each in answer["answers"]] == expected.labels
        assert [each["exit_layer"] for each in answer["answers"]] == expected.exit_layers
        for counts, each in zip(answer["answers"], expected, strict=True):
            assert counts["probability"] == pytest.approx(each["probability"], abs=1e-5)
            assert counts["probabilities"][counts["label"]] == counts["probability"]
            assert sum(counts["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert answer["saving"] == pytest.approx(expected.saving)
        layers += sum(expected.exit_layers)
    assert len({answer["saving"] for answer in answers}) > 3, "targets make a difference"

    texts = sum(len(each[0]) for each in requests)
    counts = {name: value - before.get(name, 0) for name, value in counted(service).items()}
    assert counts["deebert_requests_total", "/predict", "200"] == len(requests)
    assert counts["deebert_request_seconds_count", "/predict"] == len(requests)
    assert counts["deebert_texts_total",] == counts["deebert_exit_layer_count",] == texts
    assert counts["deebert_exit_layer_sum",] == layers
    assert counts["deebert_exit_layer_bucket", "3.0"] == texts
    assert 0 < counts["deebert_exit_layer_bucket", "1.0"] < texts
    assert counts["deebert_batch_requests_sum",] == len(requests)
    assert counts["deebert_batch_texts_sum",] == texts
    assert counts["deebert_batch_requests_count",] < len(requests), "some ran together"

    status, _, content = service.send("GET", "/health")
    state = STATES[int(counted(service)["deebert_drift_state",])]
    assert (status, state in STATES[1:]) == (200, True)
    assert content.decode().startswith(f"ok, {state}")


def counted(service: Served) -> dict[tuple[str, ...], float]:
    """/metrics: value by name and labels, these in the order of their names."""
    status, headers, content = service.send("GET", "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }


def test_one_text_in_every_form(service: Served, offline: EarlyExitClassifier) -> None:
    a, b = "a fine film", "caf\u00e9 \U0001f600 \x01 \u65e5\u672c"
    [expected] = offline.predict((a, b), threshold=0.69)
    for text in ([a, b], {"sentence1": a, "sentence2": b}):
        [reply] = service.predict(text=text, threshold=0.69)["answers"]
        assert {name: reply[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    utf8 = json.dumps({"text": [a, b], "threshold": 0.69}, ensure_ascii=False).encode()
    status, _, content = service.send(body=utf8)
    assert status == 200
    assert json.loads(content)["answers"] == [reply]
    assert service.predict(text=["", ""])["answers"][0]["exit_layer"] == 3


def test_says_what_it_is(service: Served, stage2: Path) -> None:
    status, _, content = service.send("GET", "/info")
    model = json.loads(content)["model"]
    assert status == 200
    assert model["task"] == "mrpc"
    assert model["labels"] == ["not_equivalent", "equivalent"]
    assert model["columns"] == ["sentence1", "sentence2"]
    assert model["layers"] == 3
    assert model["target"] == {}
    assert model["limits"]["max_texts"] == MOST_TEXTS
    assert {"deebert", "torch", "uvicorn"} <= set(model["versions"])
    assert str(stage2) not in content.decode(), "no folder of this machine"


def test_the_docs_say_how_to_use_it(service: Served) -> None:
    status, headers, content = service.send("GET", "/docs")
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert b"/openapi.json" in content
    status, _, content = service.send("GET", "/openapi.json")
    about = json.loads(content)
    assert {"/predict", "/health", "/metrics", "/info"} <= set(about["paths"])
    post = about["paths"]["/predict"]["post"]
    taken = post["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    shape = about["components"]["schemas"][taken]
    assert {"text", "texts", "target_saving", "max_drop"} <= set(shape["properties"])
    assert shape["additionalProperties"] is False
    for example in shape["examples"]:
        assert set(example) <= set(shape["properties"])
    given = post["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    assert {"answers", "saving"} <= set(about["components"]["schemas"][given]["properties"])
    assert "detail" in str(post["responses"]["422"]) or "Trouble" in str(post["responses"]["422"])


def chunks(total: int) -> Iterator[bytes]:
    yield b'{"text": "'
    for _ in range(total // 1000):
        yield b"a" * 1000
    yield b'"}'


ONE = '"text": ["a", "b"]'

A = ["a", "b"]

BAD: dict[str, tuple[Any, int, str]] = {  # what is sent, the status, what is said
    "an empty body": (b"", 422, "is empty"),
    "half of a JSON": (b'{"text": ["a", "b"]', 422, "not JSON"),
    "more than a JSON": (b"{" + ONE.encode() + b"} x", 422, "not JSON: Extra data"),
    "single quotes": (b"{'text': ['a', 'b']}", 422, "not JSON"),
    "a bare word": (b"text", 422, "not JSON"),
    "a form": (b"text=a&text=b", 422, "not JSON"),
    "no UTF-8": (b'{"text": ["\xff\xfe", "b"]}', 400, "UTF-8"),
    "half of a character": (b'{"text": ["\xe2\x82", "b"]}', 400, "UTF-8"),
    "Latin-1": ('{"text": ["caf\u00e9", "b"]}'.encode("latin-1"), 400, "UTF-8"),
    "NUL in a text": (b'{"text": ["a\x00", "b"]}', 422, "not JSON: Invalid control character"),
    "an escaped NUL": (b'{"text": ["a\\u0000", "b"]}', 422, "text holds a NUL character"),
    "nothing but NUL": (b"\0\0\0\0\0\0", 400, "JSON in UTF-8"),
    "a line break in a text": (b'{"text": ["a\n", "b"]}', 422, "not JSON: Invalid control"),
    "half of a surrogate pair": (b'{"text": ["a\\ud800", "b"]}', 422, "surrogate pair"),
    "the same in an object": (b'{"text": {"sentence1": "\\udc00", "sentence2": ""}}', 422, "surrogate"),
    "the same as a field": (b"{" + ONE.encode() + b', "\\ud800": 1}', 422, "surrogate pair"),
    "NaN": ("{" + ONE + ', "threshold": NaN}', 422, "threshold is nan; it must be a number"),
    "Infinity": ("{" + ONE + ', "target_saving": Infinity}', 422, "target_saving is inf"),
    "1e999": ("{" + ONE + ', "threshold": 1e999}', 422, "threshold is inf"),
    "NaN as a text": ('{"text": [NaN, "b"]}', 422, "text is [nan, 'b']; it must be a text"),
    "a number of 401 digits": ("{" + ONE + f', "threshold": {10**400}' + "}", 422, "threshold"),
    "a number of 5,000 digits": ("{" + ONE + ', "threshold": ' + "9" * 5000 + "}", 400, "JSON"),
    "19,000 brackets": (b"[" * 19_000, 400, "JSON"),
    "19,000 objects": (b'{"":' * 4_700, 400, "JSON"),
    "a text in 900 lists": ('{"text": ' + "[" * 900 + '"a"' + "]" * 900 + "}", 422, "it must be a text"),
    "a number": (b"7", 422, "must be a JSON object with text= or texts=, and is 7"),
    "a string": (b'"text"', 422, "must be a JSON object"),
    "a list": (b'["a", "b"]', 422, "must be a JSON object"),
    "null": (b"null", 422, "must be a JSON object"),
    "true": (b"true", 422, "must be a JSON object"),
    "an empty object": ({}, 422, "give text= (one) or texts= (a list of them)"),
    "an unknown field": ({"text": A, "treshold": 1}, 422, "field 'treshold' is unknown; choose from: text, texts, threshold, target_saving"),
    "an unknown long field": ({"text": A, "x" * 5000: 1}, 422, "xxx... is unknown"),
    "a field of Python's": ({"text": A, "__class__": "x"}, 422, "field '__class__' is unknown"),
    "costs": ({"text": A, "target_speedup": 1.1, "costs": [0, 0, 1]}, 422, "field 'costs' is unknown"),
    "text and texts": ({"text": A, "texts": [A]}, 422, "not both"),
    "text null": ({"text": None}, 422, "give text="),
    "no texts": ({"texts": []}, 422, "texts=[] is empty"),
    "texts a text": ({"texts": "a"}, 422, "texts is 'a'; it must be a list"),
    "texts by column": ({"texts": {"sentence1": ["a"]}}, 422, "it must be a list"),
    "texts a number": ({"texts": 7}, 422, "texts is 7; it must be a list"),
    "a text that is a number": ({"text": 7}, 422, "text is 7; it must be a text"),
    "a text that is true": ({"text": True}, 422, "text is True; it must be a text"),
    "a text that is null": ({"texts": [A, None]}, 422, "texts[1] is None; it must be a text"),
    "one text": ({"text": "a"}, 422, "an input has 1 texts; task mrpc takes a pair of texts: sentence1, sentence2"),
    "a list of one": ({"text": ["a"]}, 422, "takes a pair"),
    "a list of three": ({"text": ["a", "b", "c"]}, 422, "an input has 3 texts"),
    "a list of none": ({"text": []}, 422, "an input has 0 texts"),
    "a pair with a number": ({"texts": [["a", 7]]}, 422, "texts[0] is ['a', 7]; it must be"),
    "a pair in a pair": ({"texts": [[["a", "b"], "c"]]}, 422, "texts[0] is [['a', 'b'], 'c']"),
    "a column is missing": ({"text": {"sentence1": "a"}}, 422, "an input lacks 'sentence2'"),
    "a column too many": ({"text": {"sentence1": "a", "sentence2": "b", "label": "c"}}, 422, "text: 'label' is no column; there are: sentence1, sentence2"),
    "a column is null": ({"text": {"sentence1": "a", "sentence2": None}}, 422, "it must be a text"),
    "too many texts": ({"texts": [A] * (MOST_TEXTS + 1)}, 413, "texts= has 9 of them; at most 8 at once"),
    "a text too long": ({"texts": [A, ["a", "b" * (MOST_CHARS + 1)]]}, 413, "texts[1] has 501 characters; at most 500"),
    "a body too large": (b'{"text": "' + b"a" * MOST_BYTES + b'"}', 413, "more than 20000 bytes"),
    "a body of 300,000 bytes": (b" " * 300_000, 413, "more than 20000 bytes"),
    "a body too large, in chunks": (chunks, 413, "more than 20000 bytes"),
    "threshold a text": ({"text": A, "threshold": "0.1"}, 422, "threshold is '0.1'; it must be a number"),
    "threshold true": ({"text": A, "threshold": True}, 422, "threshold is True; it must be a number"),
    "threshold below 0": ({"text": A, "threshold": -0.1}, 422, "threshold=-0.1 is not a threshold"),
    "threshold an object": ({"text": A, "threshold": {"1": 0.1}}, 422, "threshold is {'1': 0.1}"),
    "three thresholds": ({"text": A, "threshold": [0.1, 0.1, 0.1]}, 422, "has 3 values; give one for all ramps"),
    "no thresholds": ({"text": A, "threshold": []}, 422, "threshold=[] is empty"),
    "a threshold a text": ({"text": A, "threshold": [0.1, "a"]}, 422, "threshold is"),
    "saving above 1": ({"text": A, "target_saving": 1.5}, 422, "target_saving=1.5 must be in [0, 1)"),
    "saving in words": ({"text": A, "target_saving": "half"}, 422, "target_saving is 'half'; it must be a number"),
    "saving a list": ({"text": A, "target_saving": [0.4]}, 422, "target_saving is [0.4]"),
    "more than can be saved": ({"text": A, "target_saving": 0.99}, 422, "is more than exit=entropy can save"),
    "speed-up below 1": ({"text": A, "target_speedup": 0.5}, 422, "target_speedup=0.5 must be in [1"),
    "too fast": ({"text": A, "target_speedup": 1e6}, 422, "is more than exit=entropy can reach"),
    "no drop": ({"text": A, "max_drop": 0}, 422, "max_drop=0"),
    "too small a drop": ({"text": A, "max_drop": 0.001}, 422, "cannot be promised"),
    "two targets": ({"text": A, "threshold": 0.1, "target_saving": 0.3}, 422, "ask for one of them"),
    "confidence alone": ({"text": A, "confidence": 0.9}, 422, "confidence=0.9 needs"),
    "confidence above 1": ({"text": A, "max_drop": 0.5, "confidence": 2}, 422, "confidence=2"),
    "an unknown loss": ({"text": A, "max_drop": 0.5, "loss": "love"}, 422, "loss 'love' is unknown; choose one of: excess"),
    "an unknown rule": ({"text": A, "exit": "luck", "threshold": 0.1}, 422, "exit 'luck' is unknown; choose one of"),
    "a rule that names code": ({"text": A, "exit": "os.system"}, 422, "exit 'os.system' is unknown"),
    "a rule that is a number": ({"text": A, "exit": 7}, 422, "exit is 7; it must be the name"),
    "a rule for values": ({"text": A, "exit": "change", "threshold": 0.1}, 422, "is for a regression"),
    "a rule that was not learned": ({"text": A, "exit": "learned", "threshold": 0.1}, 422, "needs a learned score"),
    "per_ramp in words": ({"text": A, "target_saving": 0.1, "per_ramp": "yes"}, 422, "per_ramp is 'yes'; it must be true or false"),
    "per_ramp of a promise": ({"text": A, "max_drop": 0.5, "per_ramp": True}, 422, "per_ramp=true with max_drop"),
}  # fmt: skip

GOOD = json.dumps({"text": A})

STRANGE: dict[str, tuple[str, str, Any, dict[str, str], int, str]] = {
    "GET": ("GET", "/predict", None, {}, 405, "Method Not Allowed"),
    "PUT": ("PUT", "/predict", GOOD, JSON, 405, "Method Not Allowed"),
    "DELETE": ("DELETE", "/predict", None, {}, 405, "Method Not Allowed"),
    "PATCH": ("PATCH", "/predict", GOOD, JSON, 405, "Method Not Allowed"),
    "POST where one reads": ("POST", "/metrics", GOOD, JSON, 405, "Method Not Allowed"),
    "another path": ("POST", "/predictions", GOOD, JSON, 404, "Not Found"),
    "a path below": ("POST", "/predict/1", GOOD, JSON, 404, "Not Found"),
    "a path that leads out": ("GET", "/../../etc/passwd", None, {}, 404, "Not Found"),
    "a path in percents": ("GET", "/%2e%2e/%00%ff", None, {}, 404, "Not Found"),
    "stop, please": ("POST", "/shutdown", GOOD, JSON, 404, "Not Found"),
    "plain text": ("POST", "/predict", GOOD, {"Content-Type": "text/plain"}, 415, "Content-Type is 'text/plain'; send JSON"),
    "a form": ("POST", "/predict", GOOD, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "send JSON"),
    "many parts": ("POST", "/predict", GOOD, {"Content-Type": "multipart/form-data; boundary=x"}, 415, "send JSON"),
    "no content type": ("POST", "/predict", GOOD, {}, 415, "Content-Type is ''"),
    "UTF-16": ("POST", "/predict", GOOD.encode("utf-16"), {"Content-Type": "application/json; charset=utf-16"}, 415, "in UTF-8"),
    "packed": ("POST", "/predict", b"\x1f\x8b", {**JSON, "Content-Encoding": "gzip"}, 415, "Content-Encoding 'gzip' is not read"),
    "a large body elsewhere": ("POST", "/health", b"a" * 30_000, JSON, 413, "more than 20000 bytes"),
    "too large, and asks first": ("POST", "/predict", b"", {**JSON, "Content-Length": "30000", "Expect": "100-continue"}, 413, "more than 20000 bytes"),
}  # fmt: skip


def reason(answer: tuple[int, http.client.HTTPMessage, bytes], status: int, says: str) -> None:
    """One line of JSON, and nothing else."""
    code, headers, content = answer
    assert code == status, content
    assert headers["Content-Type"] == "application/json"
    fields = json.loads(content)
    assert list(fields) == ["detail"]
    assert says in fields["detail"]
    assert "\n" not in fields["detail"]
    assert len(content) < 1000


@pytest.mark.parametrize("what", BAD)
def test_bad_request(what: str, service: Served) -> None:
    body, status, says = BAD[what]
    headers = JSON
    if body is chunks:
        body, headers = chunks(3 * MOST_BYTES), {**JSON, "Transfer-Encoding": "chunked"}
    reason(
        service.send(body=json.dumps(body) if isinstance(body, dict) else body, headers=headers),
        status,
        says,
    )


@pytest.mark.parametrize("what", STRANGE)
def test_strange_request(what: str, service: Served) -> None:
    method, path, body, headers, status, says = STRANGE[what]
    reason(service.send(method, path, body, headers), status, says)


def test_bad_requests_leave_the_others_alone(service: Served, offline: EarlyExitClassifier) -> None:
    """In one batch with them."""
    bad = [json.dumps(body) for body, _, _ in BAD.values() if isinstance(body, dict)]
    good = [PAIRS[row] for row in range(40)]
    with ThreadPoolExecutor(16) as pool:
        wrong = [pool.submit(service.send, body=body) for body in bad]
        right = [pool.submit(service.predict, text=pair, threshold=0.68) for pair in good]
        assert all(400 <= each.result()[0] < 500 for each in wrong)
        labels = [each.result()["answers"][0]["label"] for each in right]
    assert labels == offline.predict(good, threshold=0.68).labels


def test_noise_on_the_wire(service: Served) -> None:
    for noise in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"NONSENSE\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\nContent-Type: application/json\r\n\r\n{",
    ):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as wire:
            wire.sendall(noise)
    assert service.predict(text=A)["answers"]


def test_only_this_machine_is_listened_to(service: Served) -> None:
    listening = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    hosts = {
        host
        for host, _, port in (each.partition(":") for each in listening)
        if int(port, 16) == service.port
    }
    assert hosts == {"0100007F"}


def test_token_then_stops_under_load(stage2: Path, tmp_path: Path) -> None:
    """What was taken is finished; none of its processes is left."""
    with served(stage2, tmp_path, "target_saving=0.4", DEEBERT_TOKEN=TOKEN) as there:
        for headers in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": f"Bearer {TOKEN[:-1]}"},
            {"Authorization": "Bearer "},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer caf\u00e9"},
            {"X-API-Key": "wrong"},
        ):
            answer = there.send(body=GOOD, headers=JSON | headers)
            reason(answer, 401, "the token is")
            assert answer[1]["WWW-Authenticate"] == "Bearer"
        for path in ("/metrics", "/info", "/elsewhere"):
            reason(there.send("GET", path), 401, "the token is missing")
        for path in ("/health", "/docs", "/openapi.json"):
            assert there.send("GET", path)[0] == 200
        known = JSON | {"Authorization": f"Bearer {TOKEN}"}
        assert there.predict(JSON | {"X-API-Key": TOKEN}, text=A)["target"] == {
            "target_saving": 0.4
        }
        assert there.predict(known, text=A, threshold=0.0)["target"] == {"threshold": 0.0}

        refused = there.send(body=json.dumps({"text": A, "target_speedup": 1.1}), headers=known)
        reason(refused, 422, "target_speedup= is not met here")

        answered, broken = [1, 1], []  # the one that was refused is not counted
        enough = threading.Event()

        def ask_on() -> None:
            while True:
                try:
                    reply = there.predict(known, texts=PAIRS[:MOST_TEXTS])
                except (OSError, http.client.HTTPException) as error:
                    broken.append(error)
                    return
                assert len(reply["answers"]) == MOST_TEXTS
                answered.append(MOST_TEXTS)
                if len(answered) > 100:
                    enough.set()

        with ThreadPoolExecutor(16) as pool:
            asking = [pool.submit(ask_on) for _ in range(16)]
            assert enough.wait(120)
            assert len(there.processes()) > 1
            there.process.send_signal(signal.SIGTERM)
            for each in asking:
                each.result(60)  # raises if an answer was wrong
        assert there.process.wait(60) == 0, there.log.read_text()
        assert len(broken) == 16
        end = time.monotonic() + 20  # multiprocessing's tracker sees that the others are gone
        while left := there.processes():
            assert time.monotonic() < end, [command_line(each) for each in left]
            time.sleep(0.05)
    log = there.log.read_text()
    assert f"answered {len(answered)} of {len(answered)} requests that were taken" in log, log
    assert "Traceback" not in log, log
    assert log.rstrip().endswith("stopped"), log
