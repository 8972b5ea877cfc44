"""The typed form of the results of a split in results.json: a dataclass for each block.

`blocks` writes and reads them, and says which keys a file may lack. The module computes only the
numbers by which a sweeper compares jobs, and does not know runs, targets or files.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from deebert.reporting.blocks import plain_fields, read_block, read_blocks
from deebert.reporting.class_results import Classes

Thresholds = float | list[float]  # one for all ramps, or L-1
Correlations = list[list[float | None]]  # L x L; None where a value is undefined
NO_ANALYSIS: dict[str, Any] = {
    "oracle": None, "overthinking_rate": None, "ramps": [], "error_correlation": None,
    "ensemble": None,
}  # fmt: skip


@dataclass(frozen=True)
class RampScore:
    """The scores if all rows leave at one ramp. Without labels there are none.

    Attributes:
        layer: the layer of the ramp, from 1.
        score: the task's first metric.
        scores: all metrics by name.
        cost_ratio: layer / number of layers.
    """

    layer: int
    score: float | None
    scores: dict[str, float]
    cost_ratio: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The score, the cost and the exits of rows that leave early.

    Attributes:
        score: the task's first metric; None without labels.
        scores: all metrics by name; {} without labels.
        cost_ratio: mean exit layer / number of layers.
        expected_saving: 1 - cost ratio.
        speed_up: 1 / cost ratio.
        exit_counts: the number of rows that leave at each layer.
        mean_exit_layer: the mean exit layer of each group, if the task has a group column.
    """

    score: float | None
    scores: dict[str, float]
    cost_ratio: float
    expected_saving: float
    speed_up: float
    exit_counts: list[int]
    mean_exit_layer: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Point(Outcome):
    """An outcome at a threshold: a point of `curve` or `trade_off`.

    Attributes:
        threshold: one for all ramps, or one for each ramp but the last.
        mean_exit_layer_by_length: the mean exit layer of each of `length_bins`, in a trade-off.
        score_interval: a 95 % interval of the score, in a trade-off with labels.
    """

    threshold: Thresholds
    mean_exit_layer_by_length: list[float | None] | None = None
    score_interval: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the point as plain values, the threshold first."""
        return {"threshold": self.threshold} | plain_fields(self)


@dataclass(frozen=True, kw_only=True)
class Measured(Outcome):
    """An outcome, and how it differs from full depth.

    Attributes:
        full_depth_score: the score at full depth.
        disagreement: the share of answers that differ from full depth; None for a regression.
        excess: the share of errors that full depth does not make minus the share that only full
            depth makes; None for a regression and without labels.
        interval: a 95 % interval of `expected_saving`, where unseen rows are expected.
        score_interval: a 95 % interval of the score, where unseen rows are expected.
        time_speed_up: the speed-up in time, where unseen rows are expected and costs are known.
        costs: the costs of leaving at each layer that it comes from.
    """

    full_depth_score: float | None
    disagreement: float | None
    excess: float | None
    interval: list[float] | None = None
    score_interval: list[float] | None = None
    time_speed_up: float | None = None
    costs: list[float] | None = None


@dataclass(frozen=True)
class LengthBin:
    """A bin of input lengths: its ends in tokens, and its number of rows."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Example:
    """A row that leaves first or last. `text` is there where the data is."""

    index: int
    layer: int
    length: int
    prediction: str
    label: str | None
    text: str | None = None


@dataclass(frozen=True)
class Examples:
    """The rows that leave first and last."""

    first: list[Example]
    last: list[Example]


@dataclass(frozen=True)
class Oracle:
    """The outcome if each row left at the first ramp that is right, else at the last.

    This needs the labels, so it is an upper bound for exit rules and not a goal. It counts guesses
    too: with two classes, two ramps that each always answer another class are a perfect oracle.
    """

    score: float | None
    expected_saving: float
    exit_counts: list[int]


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions of similar confidence: their mean confidence, their accuracy, their number."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class RampAnalysis:
    """A ramp beyond its score. Values are None where they are undefined.

    Attributes:
        layer: the layer of the ramp, from 1.
        agreement: the share of rows at which it predicts what the last ramp predicts (for a
            regression the Pearson correlation with the last ramp's values).
        auroc: the area under the ROC curve of its confidence, the largest probability, for being
            right.
        ece: the expected calibration error: the mean of |accuracy - confidence| over the bins of
            `reliability`, weighted by count.
        reliability: the bins of equal width that are not empty.
        share_right_where_last_is_wrong: a share of the rows at which the last ramp is wrong.
    """

    layer: int
    agreement: float | None
    auroc: float | None
    ece: float | None
    reliability: list[ReliabilityBin] | None
    share_right_where_last_is_wrong: float | None


@dataclass(frozen=True)
class EnsembleScore:
    """The score of a ramp and of the ensemble of all ramps up to it.

    Attributes:
        layer: the layer of the ramp, from 1.
        single: the score of the ramp alone.
        mean: the score of the mean probabilities (for a regression of the mean values).
        vote: the score of the majority, where the higher mean probability decides a draw (None for
            a regression).
    """

    layer: int
    single: float
    mean: float
    vote: float | None


@dataclass(frozen=True)
class LayerAnalysis:
    """The change that a layer makes. Scores are None without labels.

    Attributes:
        layer: the layer, from 1.
        block_influence: 1 - cosine of the layer's input and output, as the mean over real tokens,
            without padding (Men et al. 2024, ShortGPT).
        cka_with_last: the likeness of its states to those of the last layer; None for constant
            states.
        score_without: the score at full depth without this layer.
        score_drop: score - score without this layer.
    """

    layer: int
    block_influence: float
    cka_with_last: float | None
    score_without: float | None
    score_drop: float | None


@dataclass(frozen=True)
class Analysis:
    """A comparison of the ramps, and of the layers if that was asked for.

    Attributes:
        oracle: None without labels, for a regression and with untrained ramps.
        overthinking_rate: the share of rows that some ramp gets right and the last ramp gets wrong
            (Kaya et al. 2019, Shallow-Deep Networks); None as for `oracle`.
        ramps: each ramp.
        error_correlation: the Pearson correlation of the ramps' errors; None without labels. An
            error is 0 or 1 a row (so this is phi), or for a regression the signed difference from
            the label.
        ensemble: the ensembles of the first ramps; None without labels.
        layers: each layer.
        cka: the likeness of the layers' states.
    """

    oracle: Oracle | None
    overthinking_rate: float | None
    ramps: list[RampAnalysis]
    error_correlation: Correlations | None
    ensemble: list[EnsembleScore] | None
    layers: list[LayerAnalysis] | None = None
    cka: Correlations | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return an analysis from its plain values."""
        ramps = [
            ramp | {"reliability": read_blocks(ReliabilityBin, ramp["reliability"]) or None}
            for ramp in values["ramps"]
        ]
        return read_block(
            cls,
            values,
            oracle=read_block(Oracle, values["oracle"]) if values["oracle"] else None,
            ramps=read_blocks(RampAnalysis, ramps),
            ensemble=read_blocks(EnsembleScore, values["ensemble"]) or None,
            layers=read_blocks(LayerAnalysis, values.get("layers")) or None,
        )


@dataclass(frozen=True, kw_only=True)
class SplitResults:
    """The results of a split.

    Attributes:
        split: its name.
        num_rows: the number of its rows.
        num_layers: the number of layers (= ramps).
        exits: the scores of each ramp.
        curve: the outcome at each threshold.
        trade_off: points that are spread evenly over the saving, if the ramps are trained.
        length_bins: the bins of input lengths of `trade_off`.
        examples: rows at a threshold that saves 40 % of the layers, if the ramps are trained.
        analysis: a comparison of the ramps; it is empty if an older file lacks it.
        constant_score: the score if all rows get the same answer, the one that scores best; None
            without labels.
        classes: the scores of each class; None without labels, for a regression and in older files.
    """

    split: str
    num_rows: int
    num_layers: int
    exits: list[RampScore]
    curve: list[Point]
    trade_off: list[Point] | None = None
    length_bins: list[LengthBin] | None = None
    examples: Examples | None = None
    analysis: Analysis
    constant_score: float | None = None
    classes: Classes | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the results of a split from their plain values."""
        examples, classes = None, values.get("classes")
        if rows := values.get("examples"):
            examples = Examples(
                read_blocks(Example, rows["first"]), read_blocks(Example, rows["last"])
            )
        return read_block(
            cls,
            values,
            exits=read_blocks(RampScore, values["exits"]),
            curve=read_blocks(Point, values["curve"]),
            trade_off=read_blocks(Point, values.get("trade_off")) or None,
            length_bins=read_blocks(LengthBin, values.get("length_bins")) or None,
            examples=examples,
            analysis=Analysis.from_json(values.get("analysis") or NO_ANALYSIS),
            classes=Classes.from_json(classes) if classes else None,
        )

    def area(self) -> float | None:
        """Return the area under score against saving, as a mean score over all possible savings.

        The largest possible saving is that of leaving at the first layer, 1 - 1/L. A saving that
        the exit rule cannot reach counts as a score of 0.

        Returns:
            The area, or None without labels and with untrained ramps.
        """
        points = self._scored()
        if not points or self.num_layers < 2:
            return None
        under = sum((b - a) * (low + high) / 2 for (a, low), (b, high) in pairwise(points))
        return under / (1 - 1 / self.num_layers)

    def score_at(self, saving: float) -> float | None:
        """Return the score at a saving, in a straight line between the two nearest points.

        Args:
            saving: share of the layers. Above the largest saving of the exit rule, the score is
                that of the largest.

        Returns:
            The score, or None without labels and with untrained ramps.
        """
        points = self._scored()
        if not points:
            return None
        above = bisect_left(points, saving, key=lambda point: point[0])
        if above in (0, len(points)):
            return points[min(above, len(points) - 1)][1]
        (a, low), (b, high) = points[above - 1 : above + 1]
        return low + (high - low) * (saving - a) / (b - a)

    def _scored(self) -> list[tuple[float, float]]:
        """Return saving and score of each point with a score, by growing saving."""
        points = self.trade_off or ()
        scored = [(each.expected_saving, each.score) for each in points if each.score is not None]
        return sorted(scored) if len(scored) > 1 else []
