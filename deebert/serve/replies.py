"""The replies to requests that came together, in as few runs of the model as possible.

Requests with the same exit rule and thresholds run together, whatever their targets are. A request
that cannot be answered does not affect the others. Knows nothing of HTTP and processes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deebert.errors import UserError
from deebert.options import ONE_OF
from deebert.serve import requests
from deebert.serve.requests import Refused, Work

if TYPE_CHECKING:
    from deebert.classifier import EarlyExitClassifier, Tokens
    from deebert.exits.calibration import CalibratedPoint
    from deebert.inference.predictions import Predictions

log = logging.getLogger(__name__)

OK, OUR_FAULT = 200, 500


@dataclass(frozen=True)
class Reply:
    """A reply.

    Attributes:
        status: the HTTP status.
        content: the content, JSON.
        exit_layers: the layers that the texts left at.
    """

    status: int
    content: bytes
    exit_layers: Sequence[int] = ()


@dataclass(frozen=True)
class _Ready:
    """A request that the model can take.

    Attributes:
        place: the place of the request among those that came together.
        tokens: the encoded texts.
        point: the exit rule and the thresholds.
    """

    place: int
    tokens: "list[Tokens]"
    point: "CalibratedPoint"


def replies(
    classifier: "EarlyExitClassifier",
    works: Sequence[Work | Refused],
    default: Mapping[str, Any],
) -> Iterator[tuple[int, Reply]]:
    """Yield a reply for each request with the place of the request, as soon as it is there.

    Args:
        classifier: the model.
        works: the work of each request, or the reason why there is none.
        default: the target of the service.
    """
    groups: dict[Any, list[_Ready]] = {}
    for place, work in enumerate(works):
        try:
            if isinstance(work, Refused):
                raise work
            point = classifier.calibrate(**_whole(work.target, default))
            tokens = classifier.encode(work.texts)
        except UserError as error:
            yield place, _refusal(error)
        except Exception:
            yield place, _failure()
        else:
            # A rule with temperatures that were fitted for a target is another object.
            key = id(point.rule), repr(point.thresholds)
            groups.setdefault(key, []).append(_Ready(place, tokens, point))
    for group in groups.values():
        inputs = [each for one in group for each in one.tokens]
        try:
            answers = classifier.answer(inputs, group[0].point)
        except Exception:
            failure = _failure()
            yield from ((one.place, failure) for one in group)
            continue
        start = 0
        for one in group:
            end = start + len(one.tokens)
            yield one.place, _reply(_part(answers, start, end), one.point)
            start = end


def _whole(target: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the target of a request from the default.

    If the request sets one of `options.ONE_OF`, only the exit rule is taken from the default.
    """
    if any(name in target for name in ONE_OF):
        default = {name: value for name, value in default.items() if name == "exit"}
    return {**default, **target}


def _refusal(error: UserError) -> Reply:
    """Return the reply to a request that cannot be answered."""
    status = error.status if isinstance(error, Refused) else requests.UNFIT
    return Reply(status, requests.trouble(str(error)))


def _failure() -> Reply:
    """Log the exception that is being handled; return the reply for a fault of the service."""
    log.exception("a request could not be answered")
    return Reply(OUR_FAULT, requests.trouble("the service failed here; its log says how"))


def _reply(predictions: "Predictions", point: "CalibratedPoint") -> Reply:
    try:
        return Reply(OK, requests.answer(predictions, point), predictions.exit_layers)
    except ValueError:
        log.warning("an answer is not finite (are the model's weights damaged?)")
        return Reply(OUR_FAULT, requests.trouble("the model's answer is NaN or infinity"))


def _part(predictions: "Predictions", start: int, end: int) -> "Predictions":
    probabilities_NC = predictions.probabilities_NC
    return replace(
        predictions,
        labels=predictions.labels[start:end],
        probabilities_NC=None if probabilities_NC is None else probabilities_NC[start:end],
        exit_layers=predictions.exit_layers[start:end],
    )
