"""Describe a task, how predictions for it are scored, and which of its rows are read in what way.

The values of a task stand in a YAML file in `conf/task/`, and `loading` reads its rows.
`DataConfig` holds the settings under `data`. The module does not know models or tokens.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from deebert.data.file_split import OwnFolder, SplitFile
from deebert.data.metrics import METRICS, REGRESSION, fitting
from deebert.errors import UserError, check_whole, is_number, unknown

# Patterns for parts of file names and folder names. A name that matches stays inside its folder.
WORD = r"\w[\w.-]*"
SPLIT = r"\w[\w.%:\[\]+-]*"  # also a slice of a split on the hub: train[:80%]
FOLDER = rf"{WORD}(/{WORD})*|\."
HUB = rf"{WORD}(/{WORD})?"
HELD_OUT = "calibration"  # the part of the training split that no stage trains on
UNLABELLED = -100  # the label of a row without one; torch's cross-entropy ignores it
MOST_LABELS = 1000  # tables of labels and predictions grow with the square of this number
MOST_GROUPS = 500  # results hold a figure for each group at each threshold


@dataclass(frozen=True)
class Task:
    """A classification task, or a regression task where `labels` is None.

    Attributes:
        name: the name, which is also the name of the folder under `data.root`.
        columns: the names of one or two text columns.
        labels: the names of the classes in the order of their ids, or None for a regression.
        metrics: names from `METRICS`. The first one is the headline metric, called "score".
        label: the name of the label column.
        train: the name of the training split, or None if the task has none.
        validation: the names of the validation splits. MNLI has two.
        test: the names of the test splits. MNLI has two.
        hub: the data set and its configuration on the Hugging Face hub, or None.
        root: the folder with the files, or None for the hub. `data.root` takes precedence.
        tsv: names in GLUE's classic TSV files: `folder`, `header` (a list of column names if the
            file has no header) and, under a name of this task, the name of the column in the file.
        group: the name of an integer column, or None. Results are also given for each group.
        checkpoint_task: the task whose checkpoints score this one. AX has no training data.
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
        """True if the task has no classes and a ramp predicts a number."""
        return self.labels is None

    @property
    def num_labels(self) -> int:
        """The number of outputs of a ramp: the number of classes, or 1 for a regression."""
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
        arguments: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        if arguments["labels"] is not None:
            arguments["labels"] = tuple(map(str, arguments["labels"]))
        task = cls(**arguments)
        if task.label in task.columns:
            raise UserError(f"task {name}: label={task.label} is one of the columns of texts")
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
        choices = fitting(None if task.labels is None else len(task.labels))
        if not task.metrics:
            raise UserError(f"task {name}: metrics is empty; choose from: {', '.join(choices)}")
        for metric in task.metrics:
            if metric not in choices:
                raise UserError(
                    f"task {name}: metric {metric!r} does not fit {task.num_labels} label(s); "
                    f"choose one of: {', '.join(choices)} (task.metrics=[...])"
                )
        return task

    def predict(self, logits: Tensor) -> Tensor:
        """Return the class ids, or the values of a regression: logits (..., C) -> (...)."""
        return logits.squeeze(-1) if self.is_regression else logits.argmax(-1)

    def scores(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute all metrics of the task, the headline metric first: (N,), (N,) -> floats."""
        return {name: METRICS[name](predictions, labels) for name in self.metrics}

    def score(self, predictions: Tensor, labels: Tensor) -> float:
        """Compute the headline metric: (N,), (N,) -> a float."""
        return METRICS[self.metrics[0]](predictions, labels)

    def constant_score(self, labels: Tensor) -> float:
        """Return the score if all rows get the same answer, the one that scores best: (N,)."""
        if self.is_regression:
            return 0.0  # of a correlation
        # With two classes, either answer may score best by F1.
        answers = range(2) if self.num_labels == 2 else [int(labels.mode().values)]
        return max(self.score(torch.full_like(labels, answer), labels) for answer in answers)

    def order(self, split: str) -> tuple[int, str]:
        """Return the key that sorts splits in the order in which they are reported."""
        known = (*self.validation, *self.test)
        return (known.index(split) if split in known else len(known), split)

    @property
    def lowest_score(self) -> float:
        """The lowest value of the headline metric: -1 for a correlation, 0 for a share."""
        return -1 if self.metrics[0] in ("matthews", *REGRESSION) else 0

    def target_dtype(self) -> torch.dtype:
        """Return the dtype of the labels that the loss takes."""
        return torch.float32 if self.is_regression else torch.long


@dataclass(frozen=True)
class DataConfig:
    """The settings of the rows: the block `data` of the configuration.

    A key that a checkpoint of an older version lacks has the default.

    Attributes:
        root: the local folder with the files, or None for the task's own folder or the hub.
        file: the user's own file, which is split, or a folder with a file for each split; or None.
        validation_share: the share of the rows of such a file to validate on.
        split_seed: the seed of that split. It is apart from the seed of the run, so that all seeds
            and stages have the same validation rows.
        split_rows: the fingerprint of that file and its split, once it is known.
        max_length: the largest number of tokens of an input.
        limit_train: the number of training rows to use, or None for all.
        calibration_size: the number of training rows that are held out, or None for a tenth.
        calibration_rows: the fingerprint of the held-out rows, once they are known.
        unlabelled: the splits whose rows are also trained on, without their labels.
        eval_batch_size: the number of evaluation rows in a batch.
        num_workers: the number of processes that load batches.
    """

    root: str | None = None
    file: str | None = None
    validation_share: float = 0.2
    split_seed: int = 0
    split_rows: str | None = None
    max_length: int = 128
    limit_train: int | None = None
    calibration_size: int | None = None
    calibration_rows: str | None = None
    unlabelled: tuple[str, ...] = ()
    eval_batch_size: int = 64
    num_workers: int = 0

    def source(self, task: Task) -> str | SplitFile | None:
        """Return where the rows of a task are: a folder, a file to split, or None for the hub."""
        if self.file is not None and not Path(self.file).is_dir():
            return SplitFile(self.file, self.validation_share, self.split_seed)
        return OwnFolder(self.file) if self.file is not None else self.root or task.root

    @classmethod
    def from_checked(cls, values: Mapping[str, Any]) -> Self:
        """Build the settings from plain values that `checkpoint_config` has accepted."""
        known = {field.name for field in fields(cls)}
        given = {k: v for k, v in values.items() if k in known and v is not None}
        return cls(**given | {"unlabelled": tuple(given.get("unlabelled", ()))})

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Build the settings from the plain values that a user sets, and check each of them.

        Raises:
            UserError: a value has the wrong type, or is outside its range.
        """
        # 8 tokens have room for the special tokens and a word or two of each text.
        check_whole("data.max_length", values["max_length"], 8)
        check_whole("data.eval_batch_size", values["eval_batch_size"], 1)
        check_whole("data.num_workers", values["num_workers"], 0)
        for name, low in (("limit_train", 1), ("calibration_size", 0)):
            if values[name] is not None:
                check_whole(f"data.{name}", values[name], low)
        if values["root"] is not None and not isinstance(values["root"], str):
            raise UserError(f"data.root={values['root']} must be a folder")
        file, share = values.get("file"), values.get("validation_share", cls.validation_share)
        if file is not None and not isinstance(file, str):
            raise UserError(f"data.file={file} must be a file or a folder")
        if file is not None and values["root"] is not None:
            raise UserError(f"data.file={file} and data.root={values['root']}: give one of them")
        if not is_number(share) or not 0 < share < 1:
            raise UserError(f"data.validation_share={share} must be a number between 0 and 1")
        check_whole("data.split_seed", values.get("split_seed", cls.split_seed), 0, 2**32 - 1)
        unlabelled = values.get("unlabelled") or []
        if not isinstance(unlabelled, list) or len(set(map(str, unlabelled))) < len(unlabelled):
            raise UserError(
                f"data.unlabelled={unlabelled} must be a list of different splits: "
                "data.unlabelled=[test]"
            )
        return cls.from_checked({**values, "unlabelled": [str(split) for split in unlabelled]})
