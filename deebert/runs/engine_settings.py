"""How an evaluation runs the engine: its precisions, its runtime, and what is timed.

This module checks plain values. It reads no files, and does not know the model or the rows.
"""

from collections.abc import Mapping
from typing import Any

from deebert.errors import UserError, check_whole, is_whole
from deebert.evaluation.engine_latency import Protocol
from deebert.inference import settings
from deebert.runs.job import Job

TARGETS = ("target_saving", "target_speedup", "max_drop")
POINTS = ("threshold", "thresholds", *TARGETS)  # an evaluation takes one of them


def given_points(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the target and of the thresholds that are given."""
    return [name for name in POINTS if values[name] is not None]


def precisions_of(values: Mapping[str, Any], job: Job) -> tuple[str, ...]:
    """Return the precisions of the evaluation: the first is evaluated, and all are timed.

    Raises:
        UserError: a precision or runtime is not one of its choices, or they do not go together with
            each other, a record or the Trainer's precision.
    """
    precisions, runtime = _listed(values["precision"]), values["runtime"]
    if not precisions:
        raise UserError("precision=[] is empty; leave it out, or name one")
    for precision in precisions:
        settings.runtime_for(runtime, precision)
    if values["record"]:
        for flag in ("precision", "runtime"):
            if job.is_set(flag):
                raise UserError(f"{flag}={values[flag]} runs the model: give ckpt=, not record=")
    if runtime != "auto" and precisions == ["float32"] and not _is_timed(values):
        raise UserError(f"runtime={runtime} is of int8 or of what is timed: add timing=all")
    if values["analysis"] and precisions[0] != "float32":
        raise UserError(
            f"analysis=true runs the model in float32: leave out precision={precisions[0]}"
        )
    trainer = str(values["trainer"]["precision"])
    if precisions[0] != "float32" and trainer not in ("32-true", "32"):
        raise UserError(
            f"trainer.precision={trainer} with precision={precisions[0]}: leave out one of them"
        )
    return tuple(precisions)


def protocol_of(values: Mapping[str, Any], precisions: tuple[str, ...]) -> Protocol | None:
    """Return how to measure latency, or None if the evaluation measures none.

    Raises:
        UserError: a value is not one of its choices.
    """
    if not _is_timed(values):
        return None
    timing = values["timing"]
    sizes = _listed("all" if timing is None else timing)
    for size in sizes:
        if size != "all" and not (is_whole(size) and size >= 1):
            raise UserError(
                f"timing={timing}: {size} is neither all nor a whole number of inputs a "
                "request (1 or more); give one of them or a list"
            )
    runtime, repeats, threads = (values[name] for name in ("runtime", "repeats", "threads"))
    if not sizes:
        raise UserError("timing=[] is empty; leave it out, or name something to time")
    check_whole("repeats", repeats, 1)
    if threads is not None and not (is_whole(threads) and threads >= 1):
        raise UserError(f"threads={threads} must be a whole number of 1 or more, or null")
    numbers = tuple(None if size == "all" else size for size in sizes)
    return Protocol(numbers, precisions, runtime, repeats, threads)


def _is_timed(values: Mapping[str, Any]) -> bool:
    return values["timing"] is not None or values["target_speedup"] is not None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_protocol(values: Mapping[str, Any], protocol: Protocol | None, job: Job) -> None:
    """Check that there is something to time where the user sets how, and that it can be timed.

    Raises:
        UserError: there is nothing to time, there is no model, or the Trainer's precision is set.
    """
    if protocol is None:
        for flag in ("repeats", "threads"):
            if job.is_set(flag):
                raise UserError(f"{flag}={values[flag]} is of what is timed: add timing=all")
        if len(_listed(values["precision"])) > 1:
            raise UserError(
                f"precision={values['precision']}: several precisions are timed: add timing=all"
            )
        return
    if values["record"]:
        raise UserError("timing= and target_speedup= run the model: give ckpt=, not record=")
    if not given_points(values):
        raise UserError(
            f"timing={values['timing']} needs something to time: {'= or '.join(POINTS)}="
        )
    precision = values["trainer"]["precision"]
    if str(precision) not in ("32-true", "32"):
        raise UserError(
            f"trainer.precision={precision} with timing=: leave it out; what is timed has its own "
            "(precision=bfloat16)"
        )
