"""What a request to the service may say, what is wrong with one, and what it is answered with.

The shapes of JSON in and out are pydantic's, which also makes the service's documentation; what
they can't say (limits, the task's columns) is checked here. Knows nothing of HTTP or processes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from deebert.errors import UserError

if TYPE_CHECKING:  # the process that talks HTTP needs no torch
    from deebert.classifier import CalibratedPoint, Predictions

TOO_LARGE, UNFIT = 413, 422  # HTTP's words for them
LONGEST_REASON = 400  # characters
NOTED = 60  # characters of a value that a reason repeats

TEXT = "a text, a pair of texts as a list, or either as an object by the task's columns"
# A list of nonsense is refused at its first item: a report on each would take gigabytes.
Text = Annotated[
    str | Annotated[list[str], Field(fail_fast=True)] | dict[str, str], Field(description=TEXT)
]
Numbers = Annotated[list[float], Field(fail_fast=True)]
Threshold = Annotated[float | Numbers, Field(description="a number, or a list of numbers")]


class Request(BaseModel):
    """Texts, with an exit rule or a target of their own; without them, those of the service."""

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

    text: Text | None = Field(None, description=TEXT)
    texts: Annotated[list[Text], Field(fail_fast=True)] | None = Field(
        None, description=f"a list; each {TEXT}"
    )
    threshold: Threshold | None = Field(
        None, description="a number, or a list of one for each layer but the last; 0 runs all"
    )
    target_saving: float | None = Field(None, description="a number: share of the layers to save")
    target_speedup: float | None = Field(
        None, description="a number: how many times faster than full depth"
    )
    max_drop: float | None = Field(
        None, description="a number: how much worse than full depth it may be"
    )
    confidence: float | None = Field(
        None, description="a number: that max_drop holds; null: on average"
    )
    loss: str | None = Field(None, description="'excess' or 'disagreement': what max_drop limits")
    per_ramp: bool | None = Field(
        None, description="true or false: look for a threshold for each layer"
    )
    temperature: bool | None = Field(
        None, description="true or false: fit a temperature for each layer"
    )
    exit: str | None = Field(None, description="the name of an exit rule: 'entropy', 'patience'")


FIELDS = tuple(Request.model_fields)
TARGET = FIELDS[2:]
ONE_OF = TARGET[:4]  # what decides; the rest says how


class OneAnswer(BaseModel):
    """Of one text."""

    label: str | float = Field(description="name of the class, or value of a regression")
    probability: float | None = Field(None, description="of that class; not for a regression")
    probabilities: dict[str, float] | None = Field(None, description="of all classes by name")
    exit_layer: int = Field(description="where it left, from 1")


class Answer(BaseModel):
    """Of a request."""

    answers: list[OneAnswer] = Field(description="one for each text, in their order")
    saving: float = Field(description="share of the layers that these texts have saved")
    expected_saving: float | None = Field(
        None, description="on the calibration rows; null where a threshold was given"
    )
    exit: str = Field(description="the exit rule")
    threshold: Threshold = Field(description="of all layers, or of each but the last")
    target: dict[str, Any] = Field(description="what was asked for")


class Trouble(BaseModel):
    """Of a request that cannot be answered."""

    detail: str = Field(description="the reason, in one line")


@dataclass(frozen=True)
class Limits:
    """Of a request: so many texts, of so many characters each."""

    texts: int
    chars: int


class Refused(UserError):
    """A request that cannot be answered, and HTTP's status for it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Work:
    """A request that may be answered.

    Attributes:
        target: as `EarlyExitClassifier.calibrate` takes it; {} for the service's own.
    """

    texts: Sequence[Any]
    target: Mapping[str, Any]


def work(request: Request, limits: Limits, columns: Sequence[str]) -> Work:
    """What there is to do.

    Args:
        columns: the texts that the task reads.

    Raises:
        Refused: there is nothing or too much to do, or a text is none.
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
    # null says something of confidence only: "on average".
    target = {name: v for name, v in target.items() if v is not None or name == "confidence"}
    return Work(texts, target)


def _check(name: str, text: Any, most: int, columns: Sequence[str]) -> None:
    parts = [text] if isinstance(text, str) else text
    if isinstance(text, dict):
        if strange := [key for key in text if key not in columns]:
            raise Refused(
                UNFIT, f"{name}: {noted(strange[0])} is no column; there are: {', '.join(columns)}"
            )
        parts = list(text.values())
    for part in parts:
        if len(part) > most:
            raise Refused(TOO_LARGE, f"{name} has {len(part)} characters; at most {most} of a text")
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise Refused(
                UNFIT, f"{name} has half of a surrogate pair at character {error.start}"
            ) from error


def reason(errors: Sequence[Mapping[str, Any]]) -> str:
    """One line of what pydantic has found wrong with a body."""
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
    """A value as a reason repeats it: on one line, in ASCII, not all of it."""
    text = ascii(value)
    return text if len(text) <= NOTED else f"{text[: NOTED - 3]}..."


def answer(found: "Predictions", asked: "CalibratedPoint") -> bytes:
    """An `Answer` as JSON.

    Raises:
        ValueError: a probability or value is not finite.
    """
    answers = [
        each if found.classes is None else each | {"probabilities": _named(found, row)}
        for row, each in enumerate(found)
    ]
    values = {
        "answers": answers,
        "saving": found.saving,
        "expected_saving": (asked.expected or {}).get("expected_saving"),
        "exit": asked.rule.name,
        "threshold": asked.thresholds,
        "target": dict(asked.target),
    }
    return json.dumps(values, allow_nan=False).encode()


def _named(found: "Predictions", row: int) -> dict[str, float]:
    assert found.classes is not None
    assert found.probabilities_NC is not None
    return dict(zip(found.classes, found.probabilities_NC[row].tolist(), strict=True))


def trouble(detail: str) -> bytes:
    """A `Trouble` as JSON: in ASCII, whatever was repeated of the request."""
    line = " ".join(detail.split())
    if len(line) > LONGEST_REASON:
        line = f"{line[: LONGEST_REASON - 3]}..."
    return json.dumps({"detail": line}).encode()
