"""The replies to requests that came together, in as few runs of the model as possible.

Requests run together, whatever their exit rules and thresholds are. A request that cannot be
answered does not affect the others. Knows nothing of HTTP and processes.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deebert.errors import UserError
from deebert.exits.drift_monitor import exit_cells
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
        cells: their exits as a test of drift reads them.
    """

    status: int
    content: bytes
    exit_layers: Sequence[int] = ()
    cells: Sequence[int] = ()


@dataclass(frozen=True)
class Prepared:
    """A request that the model can take.

    Attributes:
        number: the number of the request.
        tokens: the encoded texts.
        point: the exit rule and the thresholds.
        work: the work of the request.
    """

    number: int
    tokens: "list[Tokens]"
    point: "CalibratedPoint"
    work: Work


def prepared(classifier: "EarlyExitClassifier", number: int, work: Work) -> Prepared | Reply:
    """Encode the texts of a request and choose its operating point.

    Args:
        classifier: the model.
        number: the number of the request.
        work: the work of the request.

    Returns:
        The request, or the reply to one that cannot be answered.
    """
    try:
        return Prepared(number, classifier.encode(work.texts), _point(classifier, work), work)
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
        yield one.number, _reply(_part(answers, start, end), one)
        start = end


def _point(classifier: "EarlyExitClassifier", work: Work) -> "CalibratedPoint":
    """Choose the operating point of a request."""
    if work.nominal is not None:
        # The process that speaks HTTP reads this module, too, and has no torch.
        from deebert.exits.calibration import Infeasible

        with suppress(Infeasible):  # the rule never saves so much
            return classifier.calibrate(**{**work.target, "target_saving": work.nominal})
    return classifier.calibrate(**work.target)


def _failure() -> Reply:
    """Log the exception that is being handled; return the reply for a fault of the service."""
    log.exception("a request could not be answered")
    return Reply(FAILED, requests.trouble(requests.OUR_FAULT))


def _reply(predictions: "Predictions", one: Prepared) -> Reply:
    try:
        content = requests.answer(predictions, one.point, one.work)
        layers = predictions.exit_layers
        cells = exit_cells(layers, predictions.probabilities_NC)
        return Reply(OK, content, layers, cells.tolist())
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
