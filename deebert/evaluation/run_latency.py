"""The model, its data and a protocol: seconds for what was asked, by `speed`.

Knows which rows a threshold may be timed on: those that had no part in choosing it.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import Task
from deebert.data.tokenization import TOKENS
from deebert.evaluation import latency
from deebert.evaluation.evaluate_records import EvaluationConfig
from deebert.evaluation.latency import Inputs, Protocol
from deebert.evaluation.timing import undisturbed
from deebert.exits import calibration
from deebert.exits.curves import Thresholds
from deebert.exits.records import Record
from deebert.inference import engine
from deebert.models.early_exit import EarlyExitModel

log = logging.getLogger(__name__)

COST_ROWS = 500  # inputs that the cost of each layer is measured on,
COST_REQUESTS = 100  # or so many requests, where that is less


@dataclass(frozen=True)
class LatencyMeasurement:
    """What is timed, where and how."""

    model: EarlyExitModel
    task: Task
    data: TextDataModule
    protocol: Protocol
    device: torch.device

    def __post_init__(self) -> None:
        """Raises:
        UserError: a precision cannot be had; better said before the model has run.
        """
        with undisturbed(self.protocol.threads):  # ONNX Runtime's are started here, for good
            for precision in self.protocol.precisions:
                engine.check(self.model, precision, self.device, self.protocol.runtime)

    def with_costs(self, evaluation_config: EvaluationConfig, split: str) -> EvaluationConfig:
        """The question, with the measured cost of each layer if it asks for a speed-up.

        It is measured for the first of the batch sizes and precisions.

        Args:
            split: whose inputs are run; what they cost says nothing of their labels.
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
        inputs = self._inputs(split, rows)
        log.info("measuring what leaving at each layer costs, on %d rows of %s", len(rows), split)
        with undisturbed(self.protocol.threads):
            costs = latency.layer_costs(
                self.model, inputs, self.task.num_labels, first, self.device
            )
        return replace(
            evaluation_config, target=replace(evaluation_config.target, costs=tuple(costs))
        )

    def timed(
        self, evaluation_config: EvaluationConfig, results: dict[str, Any], record: Record
    ) -> list[dict[str, Any]]:
        """Seconds of the thresholds that were chosen or given, on the rows of the record."""
        rule, folds_N = evaluation_config.rule, torch.zeros(len(record), dtype=torch.long)
        cases: list[list[Thresholds]] = [[given] for given in evaluation_config.thresholds or ()]
        fitted = evaluation_config.rule.needs_prior or (
            evaluation_config.target and evaluation_config.target.temperature
        )
        if found := results.get("calibration"):
            cases = [[found["thresholds"]]]
            if "fold_thresholds" in found and not fitted:
                cases, folds_N = [found["fold_thresholds"]], calibration.folds(len(record))
            elif "fold_thresholds" in found:
                log.warning("timed on the rows that temperatures or a prior were fitted on")
            rule = rule.fitted(found["temperatures"], found["prior"])
        tokens = self.data.tokens(record.split)
        row_of = {index: row for row, index in enumerate(tokens["index"][:])}
        inputs = self._inputs(record.split, [row_of[index] for index in record.index_N.tolist()])
        log.info("timing %d rows of %s, %d turns", len(inputs), record.split, self.protocol.repeats)
        with undisturbed(self.protocol.threads):
            timing = latency.measure(
                self.model, rule, cases, record, inputs, folds_N, self.task, self.protocol,
                self.device,
            )  # fmt: skip
        for case in timing:
            exact = case["precision"] == "float32"
            if case["equal_predictions"] < 0.99 or (exact and case["equal_exits"] < 0.999):
                log.warning(
                    "precision=%s: %.1f %% of the exits and %.1f %% of the answers are those of "
                    "the record",
                    case["precision"],
                    100 * case["equal_exits"],
                    100 * case["equal_predictions"],
                )
        return timing

    def _inputs(self, split: str, rows: list[int]) -> Inputs:
        tokens = self.data.tokens(split)
        names = [name for name in TOKENS if name in tokens.column_names]
        columns = [tokens.select(rows)[name][:] for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
