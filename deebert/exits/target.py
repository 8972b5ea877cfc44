"""A target: a saving, a speed-up or a limit on the loss that the user wants.

The module checks the values of a target. It does not know rules, records or thresholds.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deebert.errors import UserError, is_number, unknown

LOSSES = ("excess", "disagreement")


@dataclass(frozen=True)
class Target:
    """A `target_saving`, a `target_speedup` or a `max_drop` that the user wants.

    Attributes:
        target_saving: share of the layers to save.
        target_speedup: time at full depth / time.
        costs: for `target_speedup`: measured time of an input that leaves at each of the L layers,
            as a share of its time at full depth.
        max_drop: largest risk to guarantee, e.g. 0.01 for one point of accuracy.
        confidence: probability that the guarantee holds; None: it holds on average (conformal risk
            control).
        loss: the risk that is limited. `excess` is the share of errors that full depth does not
            make minus the share of errors that only full depth makes (= the drop in accuracy).
            `disagreement` is the share of answers that differ from full depth; it needs no labels.
        per_ramp: search a threshold per ramp, instead of one for all ramps.
        temperature: fit a temperature per ramp first.

    Raises:
        UserError: a value is outside its range, or two values contradict each other.
    """

    target_saving: float | None = None
    target_speedup: float | None = None
    costs: tuple[float, ...] | None = None
    max_drop: float | None = None
    confidence: float | None = 0.95
    loss: str = "excess"
    per_ramp: bool = False
    temperature: bool = False

    def __post_init__(self) -> None:
        _number("target_saving", self.target_saving, 0, 1, "a share of the layers, 0.4 for 40 %")
        _number("target_speedup", self.target_speedup, 1, np.inf, "2 for twice as fast")
        _number("max_drop", self.max_drop, 0, 1, "a share of the rows, 0.01 for one point", False)
        _number("confidence", self.confidence, 0, 1, "0.95 for 95 %, null: on average", False)
        for name in ("per_ramp", "temperature"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES, "loss")
        if self.target_speedup is not None and self.per_ramp:
            raise UserError("per_ramp=true needs target_saving=")
        if self.max_drop is not None and self.per_ramp:
            raise UserError(
                "per_ramp=true with max_drop: a promise needs thresholds in an order that is known "
                "before the rows are seen; leave per_ramp out"
            )

    def plain(self) -> dict[str, Any]:
        """Return the target as plain values for results.json."""
        values = asdict(self)
        switches = {name: values[name] for name in ("per_ramp", "temperature") if values[name]}
        for name in ("target_saving", "target_speedup"):
            if values[name] is not None:
                return {name: values[name], **switches}
        return {name: values[name] for name in ("max_drop", "confidence", "loss")} | switches


def _number(
    flag: str, value: Any, low: float, high: float, meaning: str, with_low: bool = True
) -> None:
    if value is None:
        return
    if not is_number(value) or not low <= value < high or (value == low and not with_low):
        bracket = "[" if with_low else "("
        raise UserError(f"{flag}={value!r} must be in {bracket}{low}, {high}): {meaning}")
