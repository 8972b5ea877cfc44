"""Requests that came together -> a reply for each, in as few runs of the model as can be.

Requests with the same exit rule and thresholds run together, whatever they called their target. One
that cannot be answered leaves the others alone. Knows nothing of HTTP or processes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deebert.errors import UserError
from deebert.serve import requests
from deebert.serve.requests import Refused, Work

if TYPE_CHECKING:
    from deebert.classifier import CalibratedPoint, EarlyExitClassifier, Predictions, Tokens

log = logging.getLogger(__name__)

OK, OUR_FAULT = 200, 500


@dataclass(frozen=True)
class Reply:
    """HTTP's status and content (JSON), and where the texts have left."""

    status: int
    content: bytes
    exit_layers: Sequence[int] = ()


@dataclass(frozen=True)
class _Ready:
    """A request (by its place) as the model takes it."""

    place: int
    tokens: "list[Tokens]"
    asked: "CalibratedPoint"


def replies(
    classifier: "EarlyExitClassifier",
    works: Sequence[Work | Refused],
    default: Mapping[str, Any],
) -> Iterator[tuple[int, Reply]]:
    """One for each by its place, as soon as it is there.

    Args:
        works: what there is to do, or why not.
        default: the target of the service.
    """
    groups: dict[Any, list[_Ready]] = {}
    for place, work in enumerate(works):
        try:
            if isinstance(work, Refused):
                raise work
            asked = classifier.calibrate(**_whole(work.target, default))
            tokens = classifier.encode(work.texts)
        except UserError as error:
            yield place, _refusal(error)
        except Exception:
            yield place, _failure()
        else:
            # Of the same rule (temperatures fitted for a target make another one) and thresholds.
            key = id(asked.rule), repr(asked.thresholds)
            groups.setdefault(key, []).append(_Ready(place, tokens, asked))
    for group in groups.values():
        inputs = [each for one in group for each in one.tokens]
        try:
            answers = classifier.answer(inputs, group[0].asked)
        except Exception:
            failure = _failure()
            yield from ((one.place, failure) for one in group)
            continue
        start = 0
        for one in group:
            end = start + len(one.tokens)
            yield one.place, _reply(_part(answers, start, end), one.asked)
            start = end


def _whole(target: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a request's target from the service's; one of its own replaces it whole."""
    if any(name in target for name in requests.ONE_OF):
        default = {name: value for name, value in default.items() if name == "exit"}
    return {**default, **target}


def _refusal(error: UserError) -> Reply:
    """Of a request that cannot be answered."""
    status = error.status if isinstance(error, Refused) else requests.UNFIT
    return Reply(status, requests.trouble(str(error)))


def _failure() -> Reply:
    """While an exception is handled that nobody who asks can help; it is logged."""
    log.exception("a request could not be answered")
    return Reply(OUR_FAULT, requests.trouble("the service failed here; its log says how"))


def _reply(found: "Predictions", asked: "CalibratedPoint") -> Reply:
    try:
        return Reply(OK, requests.answer(found, asked), found.exit_layers)
    except ValueError:
        log.warning("an answer is not finite (are the model's weights?)")
        return Reply(OUR_FAULT, requests.trouble("the model's answer is NaN or infinity"))


def _part(found: "Predictions", start: int, end: int) -> "Predictions":
    shares_NC = found.probabilities_NC
    return replace(
        found,
        labels=found.labels[start:end],
        probabilities_NC=None if shares_NC is None else shares_NC[start:end],
        exit_layers=found.exit_layers[start:end],
    )
