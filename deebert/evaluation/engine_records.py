"""The record of a model in the engine's precisions, and what a precision costs in score.

The Trainer's own pass gives a record in float32. `EngineRecords` runs the engine over the same
rows, compares the ramps with float32, and returns the engine's record. Thresholds are then chosen
on the numbers that the model gives where it is used.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import Task
from deebert.data.tokenization import TOKENS
from deebert.errors import UserError
from deebert.evaluation.engine_latency import Inputs
from deebert.evaluation.timing import undisturbed
from deebert.exits.records import Record
from deebert.inference.engine import Engine

log = logging.getLogger(__name__)

WARNED, REFUSED = 0.01, 0.1  # the loss of score against float32 that gets a warning or an error
FEW = 100  # with fewer rows a loss is chance, and nothing is refused


@dataclass(frozen=True)
class EngineRecords:
    """Make the records of an engine.

    Attributes:
        engine: the engine, in its precision.
        data: the splits.
        trained: whether the ramps before the last are trained.
    """

    engine: Engine
    data: TextDataModule
    trained: bool = True

    def __call__(self, record: Record) -> Record:
        """Return the record of the engine for the rows of a record in float32.

        Raises:
            UserError: logits are not finite, or the final classifier loses too much.
        """
        inputs = inputs_of(self.data, record.split, rows_of(self.data, record))
        with undisturbed(None):
            answers = self.engine.at(0.0).run(inputs, all_ramps=True)
        assert answers.ramps_NLC is not None
        precision = self.engine.precision
        if not answers.ramps_NLC.isfinite().all():
            raise UserError(
                f"precision={precision}: logits on {record.split} are not finite; use "
                "precision=float32"
            )
        has_learned = record.learned_score_NL is not None
        made = replace(
            record,
            logits_NLC=answers.ramps_NLC,
            learned_score_NL=answers.learned_NL if has_learned else None,
            precision=precision,
            quantization=self.engine.quantization,
        )
        lost_L = losses(record, made, self.data.task)
        check_losses(lost_L if self.trained else {len(lost_L): lost_L[len(lost_L)]}, made)
        return made


def losses(exact: Record, other: Record, task: Task) -> dict[int, float]:
    """Return how much score each ramp loses by its precision, by layer from 1.

    Args:
        exact: the record in float32.
        other: the record of the same rows in another precision.
        task: the task. Without labels the answers in float32 count as right.
    """

    def answers(record: Record, layer: int) -> Tensor:
        return task.predict(record.logits_NLC[:, layer])

    lost = {}
    for layer in range(exact.num_layers):
        before, after = answers(exact, layer), answers(other, layer)
        labels_N = before if exact.labels_N is None else exact.labels_N
        lost[layer + 1] = task.score(before, labels_N) - task.score(after, labels_N)
    return lost


def check_losses(lost: Mapping[int, float], record: Record) -> None:
    """Compare the losses of ramps with what is acceptable.

    Args:
        lost: the losses of some ramps by layer; the last one is that of full depth.
        record: the record in the other precision.

    Raises:
        UserError: full depth loses more than `REFUSED`.
    """
    against = "the answers in float32" if record.labels_N is None else "float32"
    full_depth = list(lost.values())[-1]
    if full_depth > REFUSED and len(record) >= FEW:
        raise UserError(
            f"precision={record.precision}: full depth loses {full_depth:.1%} of score on "
            f"{record.split} against {against}; use precision=float32"
        )
    if listed := [f"{layer} ({each:.1%})" for layer, each in lost.items() if each > WARNED]:
        log.warning(
            "precision=%s: ramps that lose score on %s (%d rows) against %s: %s",
            record.precision,
            record.split,
            len(record),
            against,
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
