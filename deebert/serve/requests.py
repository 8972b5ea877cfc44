"""The JSON of requests to the service and of its answers, and the reasons why a request is wrong.

The shapes of the JSON are pydantic models, from which the documentation of the service is made.
Limits and the task's columns are checked here, because the models cannot state them. Knows nothing
of HTTP and processes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from deebert.data import texts as input_texts
from deebert.errors import UserError
from deebert.options import ONE_OF, TARGET, TargetOptions, given

if TYPE_CHECKING:  # the process that speaks HTTP needs no torch
    from deebert.exits.calibration import CalibratedPoint
    from deebert.inference.predictions import Predictions

TOO_LARGE, UNFIT, BUSY, TOO_LATE = 413, 422, 503, 504  # HTTP statuses
OUR_FAULT = "the service failed here; its log says how"
LONGEST_REASON = 400  # characters
NOTED = 60  # characters of a value that a reason repeats

TEXT = "a text, a pair of texts as a list, or either as an object by the task's columns"
# A wrong list is refused at its first item: a report on all of its items would take gigabytes.
Text = Annotated[
    str | Annotated[list[str], Field(fail_fast=True)] | dict[str, str], Field(description=TEXT)
]
Numbers = Annotated[list[float], Field(fail_fast=True)]
Threshold = Annotated[float | Numbers, Field(description="a number, or a list of numbers")]


# The fields of a target are those of the command line, with meanings of their own.
_Fields: Any = create_model(
    "_Fields",
    text=(Text | None, Field(None, description=TEXT)),
    texts=(
        Annotated[list[Text], Field(fail_fast=True)] | None,
        Field(None, description=f"a list; each {TEXT}"),
    ),
    **{
        each.name: (
            Threshold | None if each.name == "threshold" else each.type,
            Field(None, description=each.metadata["in_request"]),
        )
        for each in fields(TargetOptions)
    },
)  # type: ignore[call-overload]


class Request(_Fields):
    """Texts, optionally with an exit rule or a target; the service has defaults for both."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {"text": "a fine film"},
                {"texts": ["a fine film", "a dull one"], "target_saving": 0.4},
                {"text": {"sentence1": "It rains.", "sentence2": "Rain falls."}},
            ]
        },
    )


FIELDS = tuple(Request.model_fields)


class OneAnswer(BaseModel):
    """The answer to one text."""

    label: str | float = Field(description="name of the class, or value of a regression")
    probability: float | None = Field(None, description="of that class; not for a regression")
    probabilities: dict[str, float] | None = Field(None, description="of all classes by name")
    exit_layer: int = Field(description="where it left, from 1")


class Answer(BaseModel):
    """The answer to a request."""

    answers: list[OneAnswer] = Field(description="one for each text, in their order")
    saving: float = Field(description="share of the layers that these texts have saved")
    expected_saving: float | None = Field(
        None, description="on the calibration rows; null where a threshold was given"
    )
    exit: str = Field(description="the exit rule")
    threshold: Threshold = Field(description="of all layers, or of each but the last")
    target: dict[str, Any] = Field(description="the target that was used")
    recalibrated_saving: float | None = Field(
        None, description="the saving that the threshold was chosen for after a drift"
    )


class Trouble(BaseModel):
    """The answer to a request that cannot be answered otherwise."""

    detail: str = Field(description="the reason, in one line")


@dataclass(frozen=True)
class Limits:
    """The limits of a request.

    Attributes:
        texts: the most texts.
        chars: the most characters of a text.
    """

    texts: int
    chars: int


class Refused(UserError):
    """The error for a request that cannot be answered, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Work:
    """The work of a request that can be answered.

    Attributes:
        texts: the texts.
        target: arguments of `EarlyExitClassifier.calibrate`.
        nominal: the `target_saving` to choose thresholds for, if it is not that of the target.
    """

    texts: Sequence[Any]
    target: Mapping[str, Any]
    nominal: float | None = None

    @property
    def name(self) -> str:
        """The target as a text, the same one for equal targets."""
        return json.dumps(dict(sorted(self.target.items())))


def whole(target: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the target of a request from that of the service.

    If the request sets one of `options.ONE_OF`, only the exit rule is taken from the default.
    """
    if any(name in target for name in ONE_OF):
        default = {name: value for name, value in default.items() if name == "exit"}
    return {**default, **target}


def work(
    request: Request, limits: Limits, columns: Sequence[str], default: Mapping[str, Any]
) -> Work:
    """Check a request, and return its work.

    Args:
        request: the request.
        limits: the limits that it has to keep.
        columns: the columns of the texts that the task reads.
        default: the target of the service.

    Raises:
        Refused: there are no texts or too many, or a text is too long or no valid text.
    """
    if (request.text is None) == (request.texts is None):
        raise Refused(UNFIT, "give text= (one) or texts= (a list of them), and not both")
    texts = [request.text] if request.texts is None else request.texts
    if not texts:
        raise Refused(UNFIT, "texts=[] is empty; give at least one")
    if len(texts) > limits.texts:
        raise Refused(TOO_LARGE, f"texts= has {len(texts)} of them; at most {limits.texts} at once")
    for place, text in enumerate(texts):
        name = "text" if request.texts is None else f"texts[{place}]"
        _check(name, text, limits.chars, columns)
    target = {name: getattr(request, name) for name in TARGET if name in request.model_fields_set}
    return Work(texts, whole(given(target), default))


def _check(name: str, text: Any, most: int, columns: Sequence[str]) -> None:
    parts = [text] if isinstance(text, str) else text
    if isinstance(text, dict):
        if extra := [key for key in text if key not in columns]:
            raise Refused(
                UNFIT, f"{name}: {noted(extra[0])} is no column; there are: {', '.join(columns)}"
            )
        parts = list(text.values())
    for part in parts:
        if len(part) > most:
            raise Refused(TOO_LARGE, f"{name} has {len(part)} characters; at most {most} of a text")
        if fault := input_texts.fault(part):
            raise Refused(UNFIT, f"{name} {fault}")


def reason(errors: Sequence[Mapping[str, Any]]) -> str:
    """Write the first error that pydantic reports for a body as one line."""
    first = errors[0]
    kind, place = first["type"], first["loc"]
    if kind == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} at character {place[-1]}"
    if kind == "string_unicode":
        return f"{noted(first['input'])} is no text: it has half of a surrogate pair"
    if len(place) == 1:
        what = "empty" if kind == "missing" else noted(first["input"])
        return f"the body must be a JSON object with text= or texts=, and is {what}"
    name = place[1]
    if kind == "extra_forbidden":
        return f"field {noted(name)} is unknown; choose from: {', '.join(FIELDS)}"
    meaning = Request.model_fields[name].description
    if name == "texts" and len(place) > 2:
        name, meaning = f"texts[{place[2]}]", TEXT
    return f"{name} is {noted(first['input'])}; it must be {meaning}"


def noted(value: Any) -> str:
    """Write a value for a message: on one line, in ASCII, and cut if it is long."""
    text = ascii(value)
    return text if len(text) <= NOTED else f"{text[: NOTED - 3]}..."


def answer(predictions: "Predictions", point: "CalibratedPoint", work: Work) -> bytes:
    """Write an `Answer` as JSON.

    Args:
        predictions: the predictions for the texts of the request.
        point: the exit rule and the thresholds that gave them.
        work: the work of the request.

    Raises:
        ValueError: a probability or value is not finite.
    """
    answers = [
        each if predictions.classes is None else each | {"probabilities": _named(predictions, row)}
        for row, each in enumerate(predictions)
    ]
    values = {
        "answers": answers,
        "saving": predictions.saving,
        "expected_saving": point.expected and point.expected.expected_saving,
        "exit": point.rule.name,
        "threshold": point.thresholds,
        "target": dict(work.target),
    }
    if work.nominal is not None:
        values["recalibrated_saving"] = point.target["target_saving"]
    return json.dumps(values, allow_nan=False).encode()


def _named(predictions: "Predictions", row: int) -> dict[str, float]:
    assert predictions.classes is not None
    assert predictions.probabilities_NC is not None
    probabilities = predictions.probabilities_NC[row].tolist()
    return dict(zip(predictions.classes, probabilities, strict=True))


def trouble(detail: str) -> bytes:
    """Write a `Trouble` as JSON, in ASCII even if it repeats a part of the request."""
    line = " ".join(detail.split())
    if len(line) > LONGEST_REASON:
        line = f"{line[: LONGEST_REASON - 3]}..."
    return json.dumps({"detail": line}).encode()
