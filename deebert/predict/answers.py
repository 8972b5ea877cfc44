"""The answers to rows, the reasons why rows have none, and the counts of both.

A block of rows gives the same answers in this process and on another machine. Knows what a row
has to hold; knows nothing of files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deebert.data import texts
from deebert.data.rows.source import Row
from deebert.exits.drift_monitor import NOT_CALIBRATED, Drift, exit_cells

if TYPE_CHECKING:
    from torch import Tensor

    from deebert.classifier import EarlyExitClassifier
    from deebert.exits.calibration import CalibratedPoint
    from deebert.inference.predictions import Predictions

NOT_FINITE = "the model's answer is NaN or infinite (are its weights damaged?)"
COUNTED = ("rows", "bad", "layers", "more")  # the counts of a block: see `summary`


@dataclass(frozen=True)
class Columns:
    """The columns that are read from a row and written for it.

    Attributes:
        texts: the columns that hold its text, or its two texts.
        kept: the columns that are written again; None for all that the row has.
        probabilities: whether the probabilities of all classes are written.
    """

    texts: tuple[str, ...]
    kept: tuple[str, ...] | None
    probabilities: bool = False


@dataclass(frozen=True)
class Answered:
    """The results for some rows, in their order.

    Attributes:
        rows: the rows of the output: `row` (the number), the kept columns, `label`, `probability`
            (of that label; not for a regression), `probability_CLASS` if `Columns.probabilities`
            is true, and `exit_layer`. A kept column with one of these names becomes `input_NAME`.
        bad: `row`, `line` (if the input has lines) and `reason` of the rows without an answer.
        layers: the sum of the exit layers.
        cells: the exits of the rows that were answered, as a test of drift reads them
            (`drift_monitor.exit_cells`).
    """

    rows: list[dict[str, Any]]
    bad: list[dict[str, Any]]
    layers: int
    cells: Sequence[int] = ()


def answered(
    classifier: "EarlyExitClassifier",
    point: "CalibratedPoint",
    rows: Sequence[Row],
    columns: Columns,
) -> Answered:
    """Answer rows.

    Args:
        classifier: the model.
        point: the exit rule and the thresholds.
        rows: the rows; those with a fault get no answer.
        columns: the columns that are read and written.
    """
    faults = {row.number: fault for row in rows if (fault := _fault(row, columns.texts))}
    good = [row for row in rows if row.number not in faults]
    own = own_columns(classifier.labels, columns.probabilities)
    written: list[dict[str, Any]] = []
    cells: list[int] = []
    if good:
        texts = [tuple(row.values[name] for name in columns.texts) for row in good]
        predictions = classifier.answer(classifier.encode(texts), point)
        cells = exit_cells(predictions.exit_layers, predictions.probabilities_NC).tolist()
        for row, values in zip(good, _values(predictions, own), strict=True):
            if values is None:
                faults[row.number] = NOT_FINITE
                continue
            names = out_names(row.values if columns.kept is None else columns.kept, own)
            kept = {out: row.values.get(name) for name, out in names.items()}
            written.append({"row": row.number, **kept, **values})
    bad = [
        {"row": row.number}
        | ({} if row.line is None else {"line": row.line})
        | {"reason": faults[row.number]}
        for row in rows
        if row.number in faults
    ]
    return Answered(written, bad, sum(row["exit_layer"] for row in written), cells)


def own_columns(labels: Sequence[str] | None, probabilities: bool) -> tuple[str, ...]:
    """Return the columns of the output that are not kept ones, in their order.

    Args:
        labels: the names of the classes; None for a regression.
        probabilities: whether the probabilities of all classes are written.
    """
    if labels is None:
        return "row", "label", "exit_layer"
    more = [f"probability_{label}" for label in labels] if probabilities else []
    return "row", "label", "probability", *more, "exit_layer"


def out_names(kept: Iterable[str], own: Sequence[str]) -> dict[str, str]:
    """Return the names that kept columns have in the output, by their names in the input.

    Args:
        kept: the kept columns.
        own: the columns of `own_columns`, whose names are taken.
    """
    names, taken = dict.fromkeys(kept), set(own)
    by_name = {}
    for name in names:
        out = name
        while out in taken or (out != name and out in names):
            out = f"input_{out}"
        by_name[name] = out
    return by_name


def _fault(row: Row, names: Sequence[str]) -> str | None:
    """Return the reason why a row cannot be answered, or None."""
    if row.fault:
        return row.fault
    for name in names:
        if name not in row.values:
            return f"it has no {name!r}"
        if fault := texts.fault(row.values[name]):
            return f"its {name!r} {fault}"
    return None


def _values(predictions: "Predictions", own: Sequence[str]) -> list[dict[str, Any] | None]:
    """Return the values of each prediction, in the order of `own`; None if it is not finite."""
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
    """Round to as few digits as distinguish a float32 from its neighbours."""
    return [float(str(value)) for value in values_N.float().numpy()]


def num_cut_rows(rows: Sequence[Row], known: frozenset[str] | None) -> int:
    """Return how many of the rows have columns that are not kept.

    Args:
        rows: the rows.
        known: the columns that can be kept; None if all are.
    """
    return 0 if known is None else sum(not known.issuperset(row.values) for row in rows)


def summary(
    counts: Mapping[str, int],
    num_layers: int,
    rate: float | None = None,
    drift: Drift | None = None,
) -> dict[str, Any]:
    """Return the counts of answered rows with the saving and the rate.

    Args:
        counts: `rows` (all), `bad` (rows without an answer), `layers` (the sum of the exit layers),
            `more` (rows with columns that are not kept), and possibly others.
        num_layers: the number of layers of the model.
        rate: rows a second, if it is known.
        drift: the state of the test of drift, if there is one.
    """
    good = counts["rows"] - counts["bad"]
    saving = 1 - counts["layers"] / (good * num_layers) if good else None
    tested = drift is not None and drift.state != NOT_CALIBRATED
    state = {"drift": vars(drift) | {"line": str(drift)}} if tested else {}
    return {**counts, "saving": saving, "rate": rate, **state}


def summary_line(summary: Mapping[str, Any]) -> str:
    """Write a summary as one line of text."""
    line = f"{summary['rows']:,} rows"
    if summary["bad"]:
        line += f", {summary['bad']:,} of them bad"
    if summary["more"]:
        line += f", {summary['more']:,} with columns that the first ones lack (not kept)"
    if summary["rate"]:
        line += f", {summary['rate']:,.0f} rows/s"
    if summary["saving"] is not None:
        line += f", {summary['saving']:.1%} of the layers saved"
    if "drift" in summary:
        line += f", exits: {summary['drift']['line']}"
    return line
