"""The operating points of an engine: exit rules with their thresholds, and the ramps they need.

The inputs of one run may have different operating points. This module runs no layers.
Shapes: P operating points, B inputs of a group, L layers (= ramps).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deebert.exits import rules
from deebert.exits.rules import Rule

Point = tuple[Rule, Sequence[float] | float]  # an operating point: a rule and its thresholds


class OperatingPoints:
    """Operating points, by their places.

    Args:
        points: rules and thresholds: one number for all ramps, or L-1 numbers.
        num_layers: L.
        sees_previous: whether a ramp reads the logits of the ramp before it.

    Attributes:
        rule: the rule of the first operating point.
        exit_ramps: the ramps at which an input may leave, from 0.
        remembers: whether a rule, or a ramp, needs the logits of the ramps before.
        next_ramp: for each layer, the next layer whose ramp is evaluated.

    Raises:
        UserError: the thresholds do not fit.
    """

    def __init__(self, points: Sequence[Point], num_layers: int, *, sees_previous: bool) -> None:
        distinct = {id(rule): rule for rule, _ in points}
        places = list(distinct)
        self._rules = list(distinct.values())
        self._rule_P = torch.tensor([places.index(id(rule)) for rule, _ in points])
        self._limits_PK = torch.stack([rules.limits(each, num_layers) for _, each in points])
        self.rule = self._rules[0]
        exits, evaluated, self.remembers = set[int](), {num_layers - 1}, False
        for (rule, _), limits_K in zip(points, self._limits_PK, strict=True):
            exit_ramps = limits_K.nonzero().flatten().tolist()
            exits |= {*exit_ramps}
            # The rule, or the next ramp, may need the logits of every ramp so far.
            needs_earlier = bool(exit_ramps) and (rule.looks_back or sees_previous)
            evaluated |= {*range(exit_ramps[-1] + 1)} if needs_earlier else {*exit_ramps}
            self.remembers |= needs_earlier
        self.exit_ramps = frozenset(exits)
        self.next_ramp = [
            min(ramp for ramp in evaluated if ramp >= layer) for layer in range(num_layers)
        ]

    def __getitem__(self, place: int) -> tuple[Rule, Tensor]:
        """Return the rule and the thresholds (L-1,) of an operating point."""
        return self._rules[int(self._rule_P[place])], self._limits_PK[place]

    def at_ramp(
        self, layer: int, point_B: Tensor | None
    ) -> Iterator[tuple[Rule, Tensor | slice, Tensor]]:
        """Yield each rule by which inputs may leave at a ramp, those inputs, and their thresholds.

        Args:
            layer: the layer of the ramp, from 0.
            point_B: the operating point of each input. None: all have the first one.
        """
        if point_B is None:
            yield self.rule, slice(None), self._limits_PK[0, layer]
            return
        limit_B = self._limits_PK[point_B, layer]
        for number, rule in enumerate(self._rules):
            rows = ((self._rule_P[point_B] == number) & (limit_B > 0)).nonzero().squeeze(1)
            if len(rows):
                yield rule, rows, limit_B[rows]
