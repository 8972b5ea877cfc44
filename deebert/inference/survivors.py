"""Inputs that have come equally far, and how survivors are merged."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """What came out, in the order of the inputs.

    Attributes:
        logits_NC: of the ramp that each input left at, as the exit rule answers with them.
        layer_N: where it left, 1-based.
        ramps_NLC: the logits of every ramp that was evaluated for it, NaN elsewhere; None unless
            they were asked for.
    """

    logits_NC: Tensor
    layer_N: Tensor
    ramps_NLC: Tensor | None

    @classmethod
    def empty(cls, num: int, num_layers: int, num_labels: int, all_ramps: bool) -> "Answers":
        ramps = torch.full((num, num_layers, num_labels), torch.nan) if all_ramps else None
        return cls(torch.empty(num, num_labels), torch.empty(num, dtype=torch.long), ramps)

    @classmethod
    def cat(cls, parts: list["Answers"]) -> "Answers":
        ramps = [part.ramps_NLC for part in parts if part.ramps_NLC is not None]
        return cls(
            torch.cat([part.logits_NC for part in parts]),
            torch.cat([part.layer_N for part in parts]),
            torch.cat(ramps) if ramps else None,
        )

    @property
    def not_finite_N(self) -> Tensor:
        """Which inputs came out as NaN or infinity: (N,) bool."""
        return ~self.logits_NC.isfinite().all(-1)


@dataclass
class Group:
    """Inputs that have come equally far.

    Attributes:
        rows_B: their place in the answers.
        length_B: their tokens.
        hidden_BSH: states after the layers so far.
        ramps_BLC: logits of the ramps so far, NaN elsewhere; None where nobody needs them again.
        second_B: where their second texts begin; None where no ramp asks.
        context: what layers that cannot be split take beside the states, once it is known.
    """

    rows_B: Tensor
    length_B: Tensor
    hidden_BSH: Tensor
    ramps_BLC: Tensor | None
    second_B: Tensor | None
    context: Any = None

    @property
    def num_tokens(self) -> int:
        return self.hidden_BSH.shape[0] * self.hidden_BSH.shape[1]

    @cached_property
    def mask_BS(self) -> Tensor | None:
        """True at real tokens; None: all are."""
        longest = self.hidden_BSH.shape[1]
        if self.length_B.min() == longest:
            return None
        return (torch.arange(longest) < self.length_B[:, None]).to(self.hidden_BSH.device)

    @cached_property
    def key_mask_B11S(self) -> Tensor | None:
        """Which tokens may be attended to; None for all."""
        return None if self.mask_BS is None else self.mask_BS[:, None, None]

    def kept(self, keep_B: Tensor) -> tuple["Group", Tensor, int]:
        """Those of the inputs, their number in this group, and how many tokens the longest has."""
        index = keep_B.nonzero().squeeze(1)
        length_B = self.length_B[index]
        longest = int(length_B.max())
        index_there = index.to(self.hidden_BSH.device)
        group = Group(
            self.rows_B[index],
            length_B,
            self.hidden_BSH[:, :longest].index_select(0, index_there),
            None if self.ramps_BLC is None else self.ramps_BLC[index],
            None if self.second_B is None else self.second_B[index_there],
        )
        return group, index_there, longest


def merge(groups: list[Group], group_costs: int) -> list[Group]:
    """Merged into few, where the padding that it adds costs less than a group of its own."""
    merged: list[list[Group]] = []
    for group in sorted(groups, key=lambda group: group.hidden_BSH.shape[1]):
        if merged:
            together = [*merged[-1], group]
            num_rows = sum(len(each.rows_B) for each in together)
            own = sum(each.num_tokens for each in together)
            if num_rows * group.hidden_BSH.shape[1] - own <= group_costs * len(merged[-1]):
                merged[-1] = together
                continue
        merged.append([group])
    return [_cat(together) for together in merged]


def _cat(groups: list[Group]) -> Group:
    if len(groups) == 1:
        return groups[0]
    longest = max(group.hidden_BSH.shape[1] for group in groups)
    states = [
        torch.nn.functional.pad(group.hidden_BSH, (0, 0, 0, longest - group.hidden_BSH.shape[1]))
        for group in groups
    ]
    ramps = [group.ramps_BLC for group in groups if group.ramps_BLC is not None]
    seconds = [group.second_B for group in groups if group.second_B is not None]
    return Group(
        torch.cat([group.rows_B for group in groups]),
        torch.cat([group.length_B for group in groups]),
        torch.cat(states),
        torch.cat(ramps) if ramps else None,
        torch.cat(seconds) if seconds else None,
    )
