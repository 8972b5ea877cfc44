"""What a task is: its columns, labels, metrics and splits, and how predictions are scored.

Knows nothing of torch modules, tokens or where files lie; `sources` reads the rows, a YAML file in
`conf/task/` gives the values.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from deebert.data.metrics import BINARY, METRICS, REGRESSION
from deebert.errors import UserError, unknown

# Parts of names of files and folders: no way out of a folder may hide in them.
WORD = r"\w[\w.-]*"
SPLIT = r"\w[\w.%:\[\]+-]*"  # also a slice of the hub's: train[:80%]
FOLDER = rf"{WORD}(/{WORD})*|\."
HUB = rf"{WORD}(/{WORD})?"
HELD_OUT = "calibration"  # the part of the training split that no stage sees
UNLABELLED = -100  # the label of a row that has none, as torch's cross-entropy ignores it
MOST_LABELS = 1000  # tables of labels and predictions grow with their square


@dataclass(frozen=True)
class Task:
    """A classification task, or a regression task where `labels` is None.

    Attributes:
        name: also the sub-folder looked for under `data.root`.
        columns: one or two text columns.
        label: the label column.
        labels: label names in the order of their ids; None for regression.
        metrics: names from `METRICS`; the first is the headline, printed as "score".
        train: name of the training split, None where there is none.
        validation, test: names of the splits to score; MNLI has two of each.
        hub: (dataset, configuration) on the Hugging Face hub, or None.
        root: folder with the files, None for the hub (`data.root` overrides it).
        tsv: how GLUE's classic TSV files name things: `folder`, `header` (a list of column names
            where the file has none) and a new name per column.
        group: an optional integer column to break results down by (the demo's difficulty grade).
        checkpoint_task: the task whose checkpoints score this one (AX has no training data).
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    label: str = "label"
    train: str | None = "train"
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)
    hub: tuple[str, str] | None = None
    root: str | None = None
    tsv: Mapping[str, Any] | None = None
    group: str | None = None
    checkpoint_task: str | None = None

    @property
    def is_regression(self) -> bool:
        return self.labels is None

    @property
    def num_labels(self) -> int:
        """Outputs of a ramp: number of classes, 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "Task":
        """Build a task from the plain values of its YAML file.

        Raises:
            UserError: a key is missing or unknown, or a metric does not fit the labels.
        """
        name = values.get("name", "?")
        known = {field.name for field in fields(cls)}
        if extra := sorted(set(values) - known):
            raise unknown(f"task {name}: key", extra[0], sorted(known), f"task.{extra[0]}")
        for key in ("name", "columns", "labels", "metrics"):
            if key not in values:
                raise UserError(f"task {name}: the key {key!r} is missing from its YAML file")
        for key in ("columns", "labels", "metrics", "validation", "test", "hub"):
            value = values.get(key)
            if value is not None and not isinstance(value, list):
                raise UserError(f"task {name}: {key}: {value!r} must be a list: {key}: [{value}]")
        tsv = values.get("tsv")
        if tsv is not None and not isinstance(tsv, dict):
            raise UserError(f"task {name}: tsv: {tsv!r} must be a mapping")
        names = [("name", name, WORD), ("folder", (tsv or {}).get("folder"), FOLDER)]
        names += [(key, values.get(key), SPLIT) for key in ("train", "checkpoint_task")]
        names += [
            (key, each, SPLIT) for key in ("validation", "test") for each in values.get(key) or ()
        ]
        for what, word, form in names:
            if word is None and what != "name":
                continue
            if not isinstance(word, str) or not re.fullmatch(form, word):
                raise UserError(
                    f"task {name}: {word!r}: its {what} must be a word of letters, digits, _, - "
                    "and . that begins with a letter or digit"
                )
        if any(isinstance(label, bool) for label in values["labels"] or ()):
            raise UserError(
                f"task {name}: YAML reads yes, no, on, off as true, false; quote labels"
            )
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        if given["labels"] is not None:
            given["labels"] = tuple(map(str, given["labels"]))
        task = cls(**given)
        if not 1 <= len(task.columns) <= 2:
            raise UserError(
                f"task {name}: columns={list(task.columns)} must name one or two text columns"
            )
        if task.labels is not None and len(task.labels) < 2:
            raise UserError(
                f"task {name}: labels={list(task.labels)} must name two or more classes"
            )
        if task.labels is not None and len(task.labels) > MOST_LABELS:
            raise UserError(
                f"task {name}: it has {len(task.labels)} labels, more than {MOST_LABELS}"
            )
        if len(set(task.metrics)) < len(task.metrics):
            raise UserError(f"task {name}: metrics={list(task.metrics)[:9]} names one twice")
        if task.labels is not None and len(set(task.labels)) < len(task.labels):
            raise UserError(f"task {name}: labels={list(task.labels)} names a class twice")
        fitting = [
            metric
            for metric in METRICS
            if (metric in REGRESSION) == task.is_regression
            and (metric not in BINARY or task.num_labels == 2)
        ]
        if not task.metrics:
            raise UserError(f"task {name}: metrics is empty; choose from: {', '.join(fitting)}")
        for metric in task.metrics:
            if metric not in fitting:
                raise UserError(
                    f"task {name}: metric {metric!r} does not fit {task.num_labels} label(s); "
                    f"choose one of: {', '.join(fitting)} (task.metrics=[...])"
                )
        return task

    def predict(self, logits: Tensor) -> Tensor:
        """logits (..., C) -> predictions (...): class ids, or the value itself for regression."""
        return logits.squeeze(-1) if self.is_regression else logits.argmax(-1)

    def scores(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        """All metrics of the task, headline first. predictions, labels: (N,)."""
        return {name: METRICS[name](predictions, labels) for name in self.metrics}

    def score(self, predictions: Tensor, labels: Tensor) -> float:
        """The headline metric."""
        return METRICS[self.metrics[0]](predictions, labels)

    def order(self, split: str) -> tuple[int, str]:
        """What splits are sorted by: those to be reported first, the headline's before all."""
        known = (*self.validation, *self.test)
        return (known.index(split) if split in known else len(known), split)

    @property
    def lowest_score(self) -> float:
        """Of the headline metric: -1 of a correlation, 0 of a share."""
        return -1 if self.metrics[0] in ("matthews", *REGRESSION) else 0

    def target_dtype(self) -> torch.dtype:
        """The dtype in which labels reach the loss."""
        return torch.float32 if self.is_regression else torch.long
