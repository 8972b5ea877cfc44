"""The time that a model takes on the rows of a split, at the thresholds of an evaluation.

This module takes inputs from the data and thresholds from the results. It times each threshold only
on rows that had no part in choosing it, and warns if temperatures or a prior were fitted on them.
`engine_latency` does the timing. This module does not know how a layer is run.
"""

import logging
from dataclasses import dataclass, replace

import torch

from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import Task
from deebert.evaluation import engine_latency
from deebert.evaluation.engine_latency import Protocol
from deebert.evaluation.engine_records import inputs_of, rows_of
from deebert.evaluation.evaluate_records import EvaluationConfig
from deebert.evaluation.timing import undisturbed
from deebert.exits import calibration
from deebert.exits.curves import Thresholds
from deebert.exits.records import Record
from deebert.models.early_exit import EarlyExitModel
from deebert.reporting.results import Calibration, TimedCase

log = logging.getLogger(__name__)

# The least share of exits that equal a record of the same precision.
EXITS = {"float32": 0.999, "bfloat16": 0.995, "int8": 0.995}
COST_ROWS = 500  # the most inputs that the cost of each layer is measured on
COST_REQUESTS = 100  # the most requests that it is measured on


@dataclass(frozen=True)
class LatencyMeasurement:
    """The measurement of one model on its data.

    Attributes:
        model: the model.
        task: its task.
        data: the splits.
        protocol: how latency is measured.
        device: the device to run on.
    """

    model: EarlyExitModel
    task: Task
    data: TextDataModule
    protocol: Protocol
    device: torch.device

    def with_costs(self, evaluation_config: EvaluationConfig, split: str) -> EvaluationConfig:
        """Return the evaluation config, with the measured cost of each layer for a speed-up target.

        The cost is measured for the first batch size and the first precision.

        Args:
            evaluation_config: the evaluation. Without `target_speedup` it is returned as it is.
            split: the split whose inputs are run. No labels are used.
        """
        if evaluation_config.target is None or evaluation_config.target.target_speedup is None:
            return evaluation_config
        first = replace(
            self.protocol,
            batch_sizes=self.protocol.batch_sizes[:1],
            precisions=self.protocol.precisions[:1],
        )
        num_rows = len(self.data.tokens(split))
        most = min(COST_REQUESTS * (first.batch_sizes[0] or COST_ROWS), COST_ROWS, num_rows)
        rows = torch.linspace(0, num_rows - 1, most).long().tolist()
        inputs = inputs_of(self.data, split, rows)
        log.info("measuring what leaving at each layer costs, on %d rows of %s", len(rows), split)
        with undisturbed(self.protocol.threads):
            costs = engine_latency.layer_costs(
                self.model, inputs, self.task.num_labels, first, self.device
            )
        return replace(
            evaluation_config, target=replace(evaluation_config.target, costs=tuple(costs))
        )

    def timed(
        self, evaluation_config: EvaluationConfig, calibrated: Calibration | None, record: Record
    ) -> list[TimedCase]:
        """Time the thresholds that were chosen or given, on the rows of a record.

        Args:
            evaluation_config: the evaluation.
            calibrated: the thresholds that were chosen for its target, if it has one.
            record: the logits of every ramp for the rows.

        Returns:
            The cases of `engine_latency.measure`.
        """
        rule, folds_N = evaluation_config.rule, torch.zeros(len(record), dtype=torch.long)
        cases: list[list[Thresholds]] = [[each] for each in evaluation_config.thresholds or ()]
        fitted = evaluation_config.rule.needs_prior or (
            evaluation_config.target and evaluation_config.target.temperature
        )
        if calibrated:
            cases = [[calibrated.thresholds]]
            if calibrated.fold_thresholds is not None and not fitted:
                cases, folds_N = [calibrated.fold_thresholds], calibration.folds(len(record))
            elif calibrated.fold_thresholds is not None:
                log.warning("timed on the rows that temperatures or a prior were fitted on")
            rule = rule.fitted(calibrated.temperatures, calibrated.prior)
        inputs = inputs_of(self.data, record.split, rows_of(self.data, record))
        log.info("timing %d rows of %s, %d turns", len(inputs), record.split, self.protocol.repeats)
        with undisturbed(self.protocol.threads):
            timing = engine_latency.measure(
                self.model, rule, cases, record, inputs, folds_N, self.task, self.protocol,
                self.device,
            )  # fmt: skip
        for case in timing:
            # A record of another precision says less about the exits.
            least = EXITS[case.precision] if case.precision == record.precision else 0.0
            if case.equal_predictions < 0.99 or case.equal_exits < least:
                log.warning(
                    "precision=%s: %.1f %% of the exits and %.1f %% of the answers are those of "
                    "the record",
                    case.precision,
                    100 * case.equal_exits,
                    100 * case.equal_predictions,
                )
        return timing
