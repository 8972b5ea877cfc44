"""The replies to requests that came together, in as few runs of the model as possible.

Requests run together, whatever their exit rules and thresholds are. A request that cannot be
answered does not affect the others. Knows nothing of HTTP and processes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deebert.errors import UserError
from deebert.options import ONE_OF
from deebert.serve import requests
from deebert.serve.requests import Work

if TYPE_CHECKING:
    from deebert.classifier import EarlyExitClassifier, Tokens
    from deebert.exits.calibration import CalibratedPoint
    from deebert.inference.predictions import Predictions

log = logging.getLogger(__name__)

OK, FAILED = 200, 500


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
class Prepared:
    """A request that the model can take.

    Attributes:
        number: the number of the request.
        tokens: the encoded texts.
        point: the exit rule and the thresholds.
    """

    number: int
    tokens: "list[Tokens]"
    point: "CalibratedPoint"


def prepared(
    classifier: "EarlyExitClassifier", number: int, work: Work, default: Mapping[str, Any]
) -> Prepared | Reply:
    """Encode the texts of a request and choose its operating point.

    Args:
        classifier: the model.
        number: the number of the request.
        work: the work of the request.
        default: the target of the service.

    Returns:
        The request, or the reply to one that cannot be answered.
    """
    try:
        point = classifier.calibrate(**_whole(work.target, default))
        return Prepared(number, classifier.encode(work.texts), point)
    except UserError as error:
        return Reply(requests.UNFIT, requests.trouble(str(error)))
    except Exception:
        return _failure()


def replies(
    classifier: "EarlyExitClassifier", together: Sequence[Prepared]
) -> Iterator[tuple[int, Reply]]:
    """Yield a reply for each request with the number of the request, as soon as it is there."""
    inputs = [each for one in together for each in one.tokens]
    points = [one.point for one in together for _ in one.tokens]
    try:
        answers = classifier.answer(inputs, points)
    except Exception:
        if len(together) == 1:
            yield together[0].number, _failure()
            return
        for one in together:
            yield from replies(classifier, [one])
        return
    start = 0
    for one in together:
        end = start + len(one.tokens)
        yield one.number, _reply(_part(answers, start, end), one.point)
        start = end


def _whole(target: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the target of a request from the default.

    If the request sets one of `options.ONE_OF`, only the exit rule is taken from the default.
    """
    if any(name in target for name in ONE_OF):
        default = {name: value for name, value in default.items() if name == "exit"}
    return {**default, **target}


def _failure() -> Reply:
    """Log the exception that is being handled; return the reply for a fault of the service."""
    log.exception("a request could not be answered")
    return Reply(FAILED, requests.trouble(requests.OUR_FAULT))


def _reply(predictions: "Predictions", point: "CalibratedPoint") -> Reply:
    try:
        return Reply(OK, requests.answer(predictions, point), predictions.exit_layers)
    except ValueError:
        log.warning("an answer is not finite (are the model's weights damaged?)")
        return Reply(FAILED, requests.trouble("the model's answer is NaN or infinity"))


def _part(predictions: "Predictions", start: int, end: int) -> "Predictions":
    probabilities_NC = predictions.probabilities_NC
    return replace(
        predictions,
        labels=predictions.labels[start:end],
        probabilities_NC=None if probabilities_NC is None else probabilities_NC[start:end],
        exit_layers=predictions.exit_layers[start:end],
    )
