"""The record of a model in a precision that the Trainer does not run, and what it costs in score.

The record of the Trainer's own pass is in float32. `EngineRecords` runs the engine over the same
rows, compares every ramp with float32, and returns the engine's record. Thresholds are then chosen
on the numbers that the model gives where it is used.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import Task
from deebert.data.tokenization import TOKENS
from deebert.errors import UserError
from deebert.evaluation.engine_latency import Inputs
from deebert.exits.records import Record
from deebert.inference.engine import Engine

log = logging.getLogger(__name__)

WARNED, REFUSED = 0.01, 0.1  # the loss of score against float32 that is told, and that is too much


@dataclass(frozen=True)
class EngineRecords:
    """Make the records of an engine.

    Attributes:
        engine: the engine, in its precision.
        task: the task.
        data: the splits.
    """

    engine: Engine
    task: Task
    data: TextDataModule

    def __call__(self, record: Record) -> Record:
        """Return the record of the engine for the rows of a record in float32.

        Raises:
            UserError: the final classifier loses too much.
        """
        inputs = inputs_of(self.data, record.split, rows_of(self.data, record))
        answers = self.engine.at(0.0).run(inputs, all_ramps=True)
        assert answers.ramps_NLC is not None
        has_learned = record.learned_score_NL is not None
        made = replace(
            record,
            logits_NLC=answers.ramps_NLC,
            learned_score_NL=answers.learned_NL if has_learned else None,
            precision=self.engine.precision,
            quantization=self.engine.quantization,
        )
        made.check()
        check_losses(losses(record, made, self.task), made)
        return made


def losses(exact: Record, rounded: Record, task: Task) -> list[float]:
    """Return how much score each ramp loses by its precision.

    Args:
        exact: the record in float32.
        rounded: the record of the same rows in another precision.
        task: the task.

    Returns:
        L numbers. Without labels the answers in float32 are the right ones.
    """

    def answers(record: Record, layer: int) -> Tensor:
        return task.predict(record.logits_NLC[:, layer])

    lost = []
    for layer in range(exact.num_layers):
        before, after = answers(exact, layer), answers(rounded, layer)
        labels_N = before if exact.labels_N is None else exact.labels_N
        lost.append(task.score(before, labels_N) - task.score(after, labels_N))
    return lost


def check_losses(lost_L: Sequence[float], record: Record) -> None:
    """Compare the losses of the ramps with what is acceptable.

    Raises:
        UserError: the final classifier loses more than `REFUSED`.
    """
    if lost_L[-1] > REFUSED:
        raise UserError(
            f"precision={record.precision}: full depth loses {lost_L[-1]:.1%} of score on "
            f"{record.split} against float32; use precision=float32"
        )
    if listed := [f"{layer} ({lost:.1%})" for layer, lost in enumerate(lost_L, 1) if lost > WARNED]:
        log.warning(
            "precision=%s: ramps that lose score on %s against float32: %s",
            record.precision,
            record.split,
            ", ".join(listed),
        )


def rows_of(data: TextDataModule, record: Record) -> list[int]:
    """Return the positions of a record's rows among the tokens of its split."""
    row_of = {index: row for row, index in enumerate(data.tokens(record.split)["index"][:])}
    return [row_of[index] for index in record.index_N.tolist()]


def inputs_of(data: TextDataModule, split: str, rows: Sequence[int]) -> Inputs:
    """Return the tokens of some rows of a split."""
    tokens = data.tokens(split)
    names = [name for name in TOKENS if name in tokens.column_names]
    columns = [tokens.select(rows)[name][:] for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
