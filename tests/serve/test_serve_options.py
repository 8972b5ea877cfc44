"""Options of the service and fields of a request: refused before anything is started."""

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deebert.classifier import EarlyExitClassifier
from deebert.errors import UserError
from deebert.exits.drift import CELLS
from deebert.inference.engine import Engine
from deebert.inference.survivors import Answers
from deebert.options import parse, target_of
from deebert.serve import command as serve
from deebert.serve import replies, requests
from deebert.serve.command import ServeOptions, checked
from deebert.serve.predictor import About, described, loaded
from deebert.serve.replies import Prepared, prepared
from deebert.serve.requests import Limits, Request, Work, work
from deebert.serve.watch import Watch

TOKEN = "correct horse"


def about(options: ServeOptions) -> About:
    return described(loaded(options), options)


@pytest.mark.parametrize("field", ["texts", "text", "threshold"])
def test_a_list_of_nonsense_is_refused_at_its_first_item(field: str) -> None:
    body = json.dumps({"text": "a", field: [None] * 100_000})
    with pytest.raises(ValidationError) as error:
        Request.model_validate_json(body)
    assert error.value.error_count() < 5


def test_a_request_s_target_replaces_the_whole_of_the_service_s() -> None:
    default = {"exit": "patience", "target_saving": 0.4, "confidence": 0.9}
    assert requests.whole({}, default) == default
    assert requests.whole({"exit": "margin"}, default) == default | {"exit": "margin"}
    assert requests.whole({"threshold": 2.0}, default) == {"exit": "patience", "threshold": 2.0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"port": 0}, "port=0 must be in 1..65535"),
        ({"port": 70000}, "port=70000"),
        ({"workers": 0}, "workers=0 must be more than 0"),
        ({"max_batch": -1}, "max_batch=-1 must be more than 0"),
        ({"batch_window_ms": -1}, "batch_window_ms=-1 must be in"),
        ({"host": "0.0.0.0"}, "host=0.0.0.0 would let anyone in who reaches this machine"),
        ({"token": ""}, "the token is empty"),
        ({"token": TOKEN, "no_token": True}, "no_token=true and token=: give one of them"),
        (
            {"max_batch": 1, "batch_window_ms": 9.0},
            "batch_window_ms=9.0 does nothing with max_batch=1",
        ),
        ({"exit": "margin"}, "exit=margin needs threshold= or target_saving="),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        checked(ServeOptions(model="RUN", **options))
    assert "\n" not in str(error.value)


def test_an_option_that_needs_another() -> None:
    with pytest.raises(UserError, match=r"^loss=disagreement needs max_drop=$"):
        parse(ServeOptions, ["model=RUN", "target_saving=0.4", "loss=disagreement"])


def test_a_token_from_a_file_ends_in_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEBERT_TOKEN", "secret\n")
    assert checked(ServeOptions(model="RUN", host="0.0.0.0")).token == "secret"


def test_open_with_a_token_or_with_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(ServeOptions(model="RUN", host="0.0.0.0", no_token=True)).token is None
    monkeypatch.setenv("DEEBERT_TOKEN", TOKEN)
    assert checked(ServeOptions(model="RUN", host="0.0.0.0")).token == TOKEN
    assert checked(ServeOptions(model="RUN", token="mine")).token == "mine"


def test_refused_before_anything_is_started() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for host, why in (("127.0.0.1", "it is taken"), ("192.0.2.1", "Cannot assign")):
            with pytest.raises(UserError, match=f"cannot listen at host={host} port={port}: {why}"):
                serve.run(ServeOptions(model="missing", host=host, port=port, no_token=True))
    with pytest.raises(UserError, match="model=missing: no such") as error:
        serve.run(ServeOptions(model="missing", port=port))
    assert "\n" not in str(error.value)


def test_each_address_of_a_host_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `localhost` has two, and the second one is taken, or is none of this machine."""
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        port = other.getsockname()[1]

        def two(second: str) -> None:
            addresses = [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
                for each in ("127.0.0.1", second)
            ]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: addresses)

        for second, says in (
            ("127.0.0.2", f"cannot listen at host=localhost port={port}: it is taken by another"),
            ("192.0.2.1", "model=missing: no such"),
        ):
            two(second)
            with pytest.raises(UserError, match=says):
                serve.run(ServeOptions(model="missing", host="localhost", port=port))


def test_a_target_that_cannot_be_met_is_refused_at_the_start(stage2: Path, stage1: Path) -> None:
    for model, target, says in (
        (stage2, {"target_saving": 1.5}, "target_saving=1.5 must be in"),
        (stage2, {"target_saving": 0.4, "threshold": 0.1}, "ask for one of them"),
        (stage1, {"target_saving": 0.4}, "its ramps say nothing yet"),
    ):
        with pytest.raises(UserError, match=says):
            about(ServeOptions(model=str(model), **target))


def test_what_layers_cost_is_measured_at_the_start(stage2: Path, stage1: Path) -> None:
    """Where somebody may ask for it, and there is something to measure it on."""
    assert about(ServeOptions(model=str(stage2))).costs is None
    for target in ({"speedups": True}, {"target_speedup": 1.01}):
        assert len(about(ServeOptions(model=str(stage2), **target)).costs) == 3
    assert about(ServeOptions(model=str(stage1), speedups=True)).costs is None


@pytest.mark.slow
def test_requests_of_one_moment_are_one_run(stage2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their targets are. One that fails does not affect the others."""
    classifier = EarlyExitClassifier.from_pretrained(stage2)
    targets = [{"threshold": 0.68}, {"exit": "patience", "threshold": 0.7}, {"target_saving": 0.4}]
    texts = [["a fine film", "it is one"], ["it rains", "rain falls"], ["no", "yes"]]
    together = []
    for number, target in enumerate(targets):
        one = prepared(classifier, number, Work(texts[: number + 1], target))
        assert isinstance(one, Prepared)
        together.append(one)
    sizes: list[int] = []
    run = Engine.run

    def counted(self: Engine, inputs: list[Any], **more: Any) -> Answers:
        sizes.append(len(inputs))
        return run(self, inputs, **more)

    monkeypatch.setattr(Engine, "run", counted)
    answers = dict(replies.replies(classifier, together))
    assert sizes == [6]
    broken = replace(together[0], number=3, tokens=[{"input_ids": [], "token_type_ids": []}])
    beside = dict(replies.replies(classifier, [*together, broken]))
    assert beside.pop(3).status == 500
    for number, target in enumerate(targets):
        content = json.loads(answers[number].content)
        expected = classifier.predict(texts[: number + 1], **target)
        assert content["target"] == target
        assert [each["label"] for each in content["answers"]] == expected.labels
        assert [each["exit_layer"] for each in content["answers"]] == expected.exit_layers
        assert list(answers[number].exit_layers) == expected.exit_layers
        assert beside[number].exit_layers == answers[number].exit_layers


def test_a_saving_is_followed_after_a_drift_and_says_so(stage2: Path) -> None:
    """The default is that nothing is followed. Then thresholds of another saving are chosen."""
    classifier = EarlyExitClassifier.from_pretrained(stage2)
    target = {"target_saving": 0.4}
    exits = classifier.calibration_exits(classifier.calibrate(**target))
    assert exits is not None
    assert len(exits) >= 20
    for follows in (False, True):
        watch = Watch(3, follows)
        request = Work([["a fine film", "it is one"]], target)
        watch.expect(request.name, exits)
        watch.seen(request, [3] * 600, [3 * CELLS - 1] * 600)
        assert str(watch).startswith("guarantee no longer holds (at ramp ")
        assert watch.nominal(request) == (0.4 if follows else None)
    watch.seen(request, [3] * 20, [3 * CELLS - 1] * 20)
    request = replace(request, nominal=watch.nominal(request))
    assert request.nominal == 0.44, "20 texts that saved nothing, each .005 of .4"
    assert str(watch).endswith(
        "target_saving=0.4 is kept by the thresholds of 0.44; the score is unknown"
    )
    one = prepared(classifier, 0, request)
    assert isinstance(one, Prepared)
    assert one.point.thresholds == classifier.calibrate(target_saving=0.44).thresholds
    content = json.loads(dict(replies.replies(classifier, [one]))[0].content)
    assert (content["target"], content["recalibrated_saving"]) == (target, 0.44)
    with pytest.raises(UserError, match="recalibrate 'score' is unknown; choose one of: saving"):
        checked(ServeOptions(model="RUN", recalibrate="score"))


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r'pip install "deebert\[serve\]"'):
        serve.run(ServeOptions(model="RUN"))


def test_null_says_something_of_confidence_only() -> None:
    request = Request(text="a", max_drop=0.02, confidence=None, exit=None)
    assert work(request, Limits(1, 9), ("a",), {}).target == {"max_drop": 0.02, "confidence": None}
    options = parse(ServeOptions, ["model=RUN", "max_drop=0.02", "confidence=null"])
    assert target_of(options) == {"max_drop": 0.02, "confidence": None}
    assert target_of(parse(ServeOptions, ["model=RUN", "max_drop=0.02"])) == {"max_drop": 0.02}
