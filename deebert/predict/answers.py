"""Rows -> answers, and why some have none: the same wherever it runs, here or on another machine.

Knows what a row has to hold; nothing of files.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deebert.predict.rows import Row

if TYPE_CHECKING:
    from torch import Tensor

    from deebert.classifier import CalibratedPoint, EarlyExitClassifier, Predictions

LONGEST_TEXT = 1_000_000  # characters: a tokenizer holds 100 bytes and more for each token
NOT_FINITE = "the model's answer is NaN or infinite (are the weights?)"


@dataclass(frozen=True)
class Columns:
    """What is taken from a row, and what is written of it.

    Attributes:
        texts: where its text is, or its two texts.
        kept: what is written again; None for all that the row has.
        probabilities: write those of all classes?
    """

    texts: tuple[str, ...]
    kept: tuple[str, ...] | None
    probabilities: bool = False


@dataclass(frozen=True)
class Answered:
    """What became of some rows, in their order.

    Attributes:
        rows: as they are written: `row` (its number), what is kept of it, `label`, `probability`
            (of that label; not for a regression), `probability_CLASS` where asked for, and
            `exit_layer`. A kept column that is called like one of these becomes `input_NAME`.
        bad: `row`, `line` (where there are lines) and `reason` of those without an answer.
        layers: sum of the exit layers.
    """

    rows: list[dict[str, Any]]
    bad: list[dict[str, Any]]
    layers: int


def answered(
    classifier: "EarlyExitClassifier",
    asked: "CalibratedPoint",
    rows: Sequence[Row],
    columns: Columns,
) -> Answered:
    """Answer rows."""
    faults = {row.number: fault for row in rows if (fault := _fault(row, columns.texts))}
    good = [row for row in rows if row.number not in faults]
    own = own_columns(classifier.labels, columns.probabilities)
    found: list[dict[str, Any]] = []
    if good:
        texts = [tuple(row.values[name] for name in columns.texts) for row in good]
        predictions = classifier.answer(classifier.encode(texts), asked)
        for row, values in zip(good, _values(predictions, own), strict=True):
            if values is None:
                faults[row.number] = NOT_FINITE
                continue
            names = out_names(row.values if columns.kept is None else columns.kept, own)
            kept = {out: row.values.get(name) for name, out in names.items()}
            found.append({"row": row.number, **kept, **values})
    bad = [
        {"row": row.number}
        | ({} if row.line is None else {"line": row.line})
        | {"reason": faults[row.number]}
        for row in rows
        if row.number in faults
    ]
    return Answered(found, bad, sum(row["exit_layer"] for row in found))


def own_columns(labels: Sequence[str] | None, probabilities: bool) -> tuple[str, ...]:
    """The columns of the output beside those that are kept, in their order."""
    if labels is None:
        return "row", "label", "exit_layer"
    more = [f"probability_{label}" for label in labels] if probabilities else []
    return "row", "label", "probability", *more, "exit_layer"


def out_names(kept: Iterable[str], own: Sequence[str]) -> dict[str, str]:
    """What columns that are kept are called in the output."""
    names = dict.fromkeys(kept)
    found = {}
    for name in names:
        out = name
        while out in own or (out != name and out in names):
            out = f"input_{out}"
        found[name] = out
    return found


def _fault(row: Row, names: Sequence[str]) -> str | None:
    """Why a row cannot be answered, or None."""
    if row.fault:
        return row.fault
    for name in names:
        if name not in row.values:
            return f"it has no {name!r}"
        value = row.values[name]
        if not isinstance(value, str):
            return f"its {name!r} is {_short(value)}, not a text"
        if not value.strip():
            return f"its {name!r} is empty"
        if "\0" in value:
            return f"its {name!r} holds a NUL character"
        if len(value) > LONGEST_TEXT:
            return f"its {name!r} has {len(value):,} characters, more than {LONGEST_TEXT:,}"
    return None


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _values(predictions: "Predictions", own: Sequence[str]) -> list[dict[str, Any] | None]:
    """What is written of each prediction, in the order of `own`; None where it is not finite."""
    import torch

    columns: dict[str, Sequence[Any]] = {"exit_layer": predictions.exit_layers}
    scores_NC = predictions.probabilities_NC
    if scores_NC is None:
        scores_NC = torch.tensor(predictions.labels)[:, None]
        columns["label"] = _short_floats(scores_NC[:, 0])
    else:
        columns["label"] = predictions.labels
        columns["probability"] = _short_floats(scores_NC.amax(-1))
        for index, label in enumerate(predictions.classes or ()):
            if f"probability_{label}" in own:
                columns[f"probability_{label}"] = _short_floats(scores_NC[:, index])
    names = own[1:]  # all but the row's number
    cells = zip(*(columns[name] for name in names), strict=True)
    finite = scores_NC.isfinite().all(-1).tolist()
    return [
        dict(zip(names, values, strict=True)) if is_finite else None
        for values, is_finite in zip(cells, finite, strict=True)
    ]


def _short_floats(values_N: "Tensor") -> list[float]:
    """With as few digits as tell a float32 from its neighbours."""
    return [float(str(value)) for value in values_N.float().numpy()]
