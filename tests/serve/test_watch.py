"""What the service sees of drift: its states, and the saving that it follows."""

import http.client
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import mrpc_rows
from helpers.services import JSON, served

from deebert import EarlyExitClassifier
from deebert.exits.drift import BROKEN, CELLS
from deebert.serve.requests import Work
from deebert.serve.watch import Watch

LAYERS = 4
TARGET = {"target_saving": 0.4}


def seen(watch: Watch, work: Work, layers: Sequence[int]) -> None:
    watch.seen(work, layers, [layer * CELLS - 1 for layer in layers])


def watch_of(target: dict, *, follows: bool) -> tuple[Watch, Work]:
    watch, work = Watch(LAYERS, follows), Work([], target)
    layers = np.random.default_rng(0).integers(1, LAYERS + 1, 400)
    watch.expect(work.name, layers * CELLS - 1)
    return watch, work


def test_states_and_what_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    watch, work = watch_of(TARGET, follows=True)
    seen(watch, work, ())  # a request that had no answer
    assert str(watch) == "calibrated"
    seen(watch, work, [1, 2, 3, 4] * 50)
    assert (str(watch), watch.nominal(work)) == ("calibrated", None)
    for _ in range(400):
        seen(watch, work, [4])
    assert watch.drift.state == BROKEN
    assert watch.drift.ramp == 3
    assert watch.drift.size == pytest.approx(0.75 - 150 / 600, abs=0.05)
    followed = watch.nominal(work)
    assert followed is not None
    assert 0.4 < followed <= 0.65
    assert watch.followed == {0.4: followed}
    line = str(watch)
    assert line.startswith(f"{BROKEN} (at ramp 3 by ")
    assert line.endswith(
        f"; target_saving=0.4 is kept by the thresholds of {followed}; the score is unknown"
    )
    messages = [each.getMessage() for each in caplog.records]
    assert [BROKEN in each for each in messages[:2]] == [False, True]
    assert "nothing is known of the score" in messages[2]
    assert len(messages) == 3, "each change is logged once"
    read = watch.drift.num_rows
    seen(watch, Work([], TARGET, nominal=followed), [1] * 50)
    assert watch.drift.num_rows == read, "its thresholds were not those of the calibration rows"
    assert watch.nominal(work) < followed


@pytest.mark.parametrize(("target", "follows"), [({"threshold": 0.3}, True), (TARGET, False)])
def test_nothing_else_is_followed(target: dict, follows: bool) -> None:
    watch, work = watch_of(target, follows=follows)
    seen(watch, work, [4] * 300)
    assert watch.drift.state == BROKEN
    assert (watch.nominal(work), watch.followed) == (None, {})
    assert "score" not in str(watch)


@pytest.mark.slow
def test_a_service_that_drifts(stage2: Path, tmp_path: Path) -> None:
    """It says so, follows the saving that it was started with, and has a limit of bytes."""
    offline = EarlyExitClassifier.from_pretrained(stage2)
    pairs = [[row["sentence1"], row["sentence2"]] for row in mrpc_rows("validation", 40)]
    exits = offline.predict(pairs, **TARGET).exit_layers
    latest = [pair for pair, layer in zip(pairs, exits, strict=True) if layer == max(exits)][:8]
    options = ("target_saving=0.4", "recalibrate=saving", "max_waiting_bytes=5000")
    with served(stage2, tmp_path, *options) as there:
        first = there.predict(texts=pairs[:8])
        assert there.send("GET", "/health")[2].decode() == "ok, calibrated"
        assert first["target"] == TARGET
        assert "recalibrated_saving" not in first
        turns = 0
        while "recalibrated_saving" not in (reply := there.predict(texts=latest)):
            turns += 1
            assert turns < 100
        assert turns > 3
        assert reply["recalibrated_saving"] >= 0.4
        expected = offline.predict(latest, target_saving=reply["recalibrated_saving"])
        assert [each["exit_layer"] for each in reply["answers"]] == expected.exit_layers
        health = there.send("GET", "/health")[2].decode()
        assert health.startswith(f"ok, {BROKEN} (at ramp ")
        counts = there.send("GET", "/metrics")[2].decode()
        assert "\ndeebert_drift_state 3.0\n" in counts
        assert 'deebert_recalibrated_saving{target_saving="0.4"}' in counts
        refused: list[tuple[int, bytes]] = []
        wires = [http.client.HTTPConnection("127.0.0.1", there.port, timeout=60) for _ in range(30)]
        for wire in wires:
            texts = [["a " * 200, "b " * 200]] * 8
            wire.request("POST", "/predict", json.dumps({"texts": texts}), JSON)
        for wire in wires:
            answer = wire.getresponse()
            refused.append((answer.status, answer.read()))
            wire.close()
        statuses = [status for status, _ in refused]
        assert {*statuses} == {200, 503}, statuses
        reasons = [json.loads(content)["detail"] for status, content in refused if status == 503]
        assert all("bytes are waiting already; come again later" in each for each in reasons)
