"""The typed form of results.json: what describes a run, its target, what was timed, its splits.

The evaluation builds these objects, and tables, plots and logs read them. `split_results` has the
blocks of a split, and says which keys a file may lack. The module computes nothing, and does not
know records, models or files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from deebert.errors import UserError, is_whole
from deebert.reporting.blocks import plain, plain_fields, read_block, read_blocks
from deebert.reporting.split_results import Measured, SplitResults, Thresholds

SCHEMA = 1


@dataclass(frozen=True)
class Environment:
    """The machine and the software that a run used, and the day; older files lack the day."""

    python: str
    versions: dict[str, str]
    platform: str
    device: str
    cpus: int | None
    threads: int
    git_commit: str | None
    date: str | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The operating point that was chosen for a target, on rows that are not reported.

    Attributes:
        target: the target's values by name.
        rule: the name of the exit rule.
        temperatures: the temperatures that were fitted, or None.
        prior: the prior that was fitted, or None.
        thresholds: the thresholds to use from now on.
        calibration_split: the rows that they were chosen on.
        num_calibration: the number of these rows.
        expected: what the calibration rows show, with 95 % intervals for as many new rows as are
            reported.
        measured: what the reported rows show.
        folds_at_full_depth: if cross-fitted, the number of folds whose other rows were too few.
        fold_thresholds: if cross-fitted, the thresholds that each fold was measured with.
        fold_fits: if cross-fitted, the temperatures and the prior of each fold; None at full depth.
        measured_elsewhere: what the other reported splits show, by name.
        notes: sentences for the user, without a full stop.
    """

    target: dict[str, Any]
    rule: str
    temperatures: list[float] | None
    prior: list[float] | None
    thresholds: Thresholds
    calibration_split: str
    num_calibration: int
    expected: Measured
    measured: Measured
    folds_at_full_depth: int | None = None
    fold_thresholds: list[Thresholds] | None = None
    fold_fits: list[dict[str, Any] | None] | None = None
    measured_elsewhere: dict[str, Measured] | None = None
    notes: list[str]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return a calibration from its plain values. Older files call the target `wish`."""
        return read_block(
            cls,
            values,
            target=values["wish" if "wish" in values else "target"],
            prior=values.get("prior"),
            expected=read_block(Measured, values["expected"]),
            measured=read_block(Measured, values["measured"]),
            measured_elsewhere={
                split: read_block(Measured, outcome)
                for split, outcome in values.get("measured_elsewhere", {}).items()
            }
            or None,
        )


@dataclass(frozen=True, kw_only=True)
class TimedCase:
    """The time of the engine at one threshold, precision and batch size.

    Attributes:
        protocol: how the inputs were divided into requests, in words.
        precision: the precision of the layers.
        runtime: the library that computes them.
        batch_size: the number of inputs in a request; None: all.
        threads: the number of the processor's threads.
        device: the device.
        repeats: the number of turns.
        num_rows: the number of inputs.
        threshold: the thresholds; if cross-fitted, a list of those of each fold.
        seconds: the time of the engine.
        seconds_full_depth: the time of the library's own forward pass, or of the engine in int8 and
            in ONNX Runtime, which the library does not offer.
        seconds_threshold_0: the time of the engine without exits.
        time_saving: 1 - time / time at full depth.
        time_speed_up: time at full depth / time.
        expected_saving: the saving of layers.
        samples_per_second: inputs a second.
        latency_ms: percentiles of the time of a request, by name (p50, p95, p99).
        latency_ms_full_depth: the same of full depth.
        score: the score of the engine's answers; None without labels.
        score_full_depth: the score of the record at full depth.
        exit_counts: the number of inputs that leave at each layer.
        equal_exits: the share of inputs at which the engine's exit is the record's.
        equal_predictions: the share of inputs at which the engine's answer is the record's.
    """

    protocol: str
    precision: str
    runtime: str
    batch_size: int | None
    threads: int
    device: str
    repeats: int
    num_rows: int
    threshold: Thresholds | list[Thresholds]
    seconds: float
    seconds_full_depth: float
    seconds_threshold_0: float
    time_saving: float
    time_speed_up: float
    expected_saving: float
    samples_per_second: float
    latency_ms: dict[str, float]
    latency_ms_full_depth: dict[str, float]
    score: float | None
    score_full_depth: float | None
    exit_counts: list[int]
    equal_exits: float
    equal_predictions: float


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of results.json.

    Attributes:
        schema: the version of the file's form.
        task: the name of the task.
        backbone: the name of the backbone.
        layers: the layers kept of a pretrained backbone, if some were left out.
        stage: the stage of the training.
        objective: the name of the objective.
        ramp: what the ramps read and predict.
        seed: the seed of the run.
        metric: the task's first metric, which is the score.
        environment: the machine and the software; older files may lack it.
        record: the folder of the records that were evaluated, if no model was run.
        splits: the results of each split, the headline split first. MNLI has two splits.
        exit: the `name` of the exit rule, with its options and the prior and temperatures that the
            user gave.
        calibration: the operating point for the target, if there is one.
        ckpt: the evaluated checkpoint, or the run folder of a training.
        epoch: the epoch of a training, from 1.
        timing: what was timed.
        weights: the fingerprint of the weights that were evaluated; older files lack it.
        precision: the precision of the model that was evaluated.
    """

    schema: int
    task: str
    backbone: str
    layers: list[int] | None = None
    stage: int
    objective: str
    ramp: dict[str, Any] | None
    seed: int
    metric: str
    environment: Environment | None
    record: str | None = None
    splits: list[SplitResults]
    exit: dict[str, Any]
    calibration: Calibration | None = None
    ckpt: str | None = None
    epoch: int | None = None
    timing: list[TimedCase] | None = None
    weights: str | None = None
    precision: str = "float32"

    @property
    def headline(self) -> SplitResults:
        """The results of the headline split."""
        return self.splits[0]

    @property
    def exit_name(self) -> str:
        """The name of the exit rule; "" in older files that do not state it."""
        return str(self.exit.get("name", ""))

    def to_json(self) -> dict[str, Any]:
        """Return the content of results.json: the keys of the headline split are on top."""
        values: dict[str, Any] = {}
        for name, value in plain_fields(self).items():
            values |= value[0] if name == "splits" else {name: value}
            if name == "exit" and self.splits[1:]:
                values["other_splits"] = plain(self.splits[1:])
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the results from the content of results.json, of an older version, too.

        Raises:
            UserError: a value is missing or of another kind.
        """
        try:
            _check_kinds(values)
            environment, calibration = values.get("environment"), values.get("calibration")
            timing = [{"runtime": "torch"} | case for case in values.get("timing") or ()]
            return read_block(
                cls,
                values,
                schema=values.get("schema", SCHEMA),
                ramp=values.get("ramp"),
                environment=environment and read_block(Environment, environment),
                splits=[
                    SplitResults.from_json(part)
                    for part in (values, *(values.get("other_splits") or ()))
                ],
                exit=values.get("exit", {}),
                calibration=Calibration.from_json(calibration) if calibration else None,
                timing=read_blocks(TimedCase, timing) or None,
            )
        except (LookupError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"damaged results.json ({reason})") from error


def _check_kinds(values: Mapping[str, Any]) -> None:
    """Check the kinds of the values that tables and sweeps group by.

    Raises:
        KeyError, TypeError: a value is missing or of another kind.
    """
    parts = (values, *(values.get("other_splits") or ()))
    texts = [values[key] for key in ("task", "backbone", "objective", "metric")]
    texts += [part["split"] for part in parts]
    numbers = [values[key] for key in ("stage", "seed")]
    if not all(isinstance(each, str) for each in texts) or not all(map(is_whole, numbers)):
        raise TypeError("a name is no text, or a number is no whole number")
    if not isinstance(values.get("exit", {}), dict):
        raise TypeError("exit is no mapping")
