"""The typed form of the block `classes` of results.json: the scores of each class of a split."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from deebert.reporting.blocks import read_block, read_blocks

OF_ALL_CLASSES = ("f1_macro", "f1_weighted", "matthews")  # metrics of `ClassScores`


@dataclass(frozen=True)
class ClassScore:
    """The score of a class.

    Attributes:
        label: the name of the class.
        rows: the number of rows with this true label.
        precision: the share of right answers among the rows that get this answer; 0 if none does.
        recall: the share of right answers among the rows with this label; 0 if there are none.
        f1: the harmonic mean of both; 0 if both are 0.
        mean_exit_layer: the mean exit layer of the rows with this label; None if there are none.
    """

    label: str
    rows: int
    precision: float
    recall: float
    f1: float
    mean_exit_layer: float | None


@dataclass(frozen=True)
class ClassScores:
    """The answers that the rows of a split get, compared with their labels.

    Attributes:
        confusion: the number of rows with true label i and answer j, (C, C). It is empty if there
            are more classes than `class_scores.MOST_CONFUSED`.
        f1_macro: the mean F1 of the classes that are a label or an answer of some row.
        f1_weighted: the mean F1 of the classes, weighted by their rows.
        matthews: Matthews' correlation (R_K; Gorodkin 2004).
        per_class: the score of each class, in the order of `Classes.labels`.
    """

    confusion: list[list[int]]
    f1_macro: float
    f1_weighted: float
    matthews: float
    per_class: list[ClassScore]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the scores from their plain values."""
        return read_block(cls, values, per_class=read_blocks(ClassScore, values["per_class"]))


@dataclass(frozen=True)
class Classes:
    """The scores of each class of a split.

    Attributes:
        labels: the names of the classes, in the order of their ids.
        full_depth: the scores at full depth.
        operating_point: the scores at the target's operating point or at the only threshold, if
            there is one and the ramps are trained.
    """

    labels: list[str]
    full_depth: ClassScores
    operating_point: ClassScores | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the scores from their plain values."""
        point = values.get("operating_point")
        return read_block(
            cls,
            values,
            full_depth=ClassScores.from_json(values["full_depth"]),
            operating_point=ClassScores.from_json(point) if point else None,
        )

    @property
    def shown(self) -> ClassScores:
        """The scores that are shown first: at the operating point, or else at full depth."""
        return self.operating_point or self.full_depth
