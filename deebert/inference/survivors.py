"""Groups of inputs that run together, how groups are merged, and the answers of all inputs.

This module knows neither layers and ramps nor which inputs exit.
Shapes: N inputs, B of them in a group, S tokens, H hidden, L layers (= ramps), C labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """The engine's answers, in the order of the inputs.

    Attributes:
        logits_NC: the logits that the exit rule answers with at each input's exit layer.
        layer_N: the exit layer of each input, 1-based.
        ramps_NLC: the logits of every ramp that was evaluated for an input, NaN elsewhere. None
            unless the caller of the engine requested them.
        learned_NL: with `ramps_NLC`, the learned exit scores, 0 where a ramp has none.
        point_N: the operating point of each input, as its place in what the engine was given. None
            if all have the first one.
    """

    logits_NC: Tensor
    layer_N: Tensor
    ramps_NLC: Tensor | None
    learned_NL: Tensor | None = None
    point_N: Tensor | None = None

    @classmethod
    def empty(
        cls,
        num: int,
        num_layers: int,
        num_labels: int,
        all_ramps: bool,
        point_N: Tensor | None = None,
    ) -> "Answers":
        """Return answers to be filled in, with room for the outputs of all ramps or without."""
        ramps = torch.full((num, num_layers, num_labels), torch.nan) if all_ramps else None
        learned = torch.zeros(num, num_layers) if all_ramps else None
        logits_NC, layer_N = torch.empty(num, num_labels), torch.empty(num, dtype=torch.long)
        return cls(logits_NC, layer_N, ramps, learned, point_N)

    @classmethod
    def cat(cls, parts: list["Answers"]) -> "Answers":
        """Join the answers of several parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        ramps = [part.ramps_NLC for part in parts if part.ramps_NLC is not None]
        learned = [part.learned_NL for part in parts if part.learned_NL is not None]
        points = [part.point_N for part in parts if part.point_N is not None]
        return cls(
            torch.cat([part.logits_NC for part in parts]),
            torch.cat([part.layer_N for part in parts]),
            torch.cat(ramps) if ramps else None,
            torch.cat(learned) if learned else None,
            torch.cat(points) if points else None,
        )

    @property
    def not_finite_N(self) -> Tensor:
        """The inputs whose logits hold NaN or infinity: (N,) bool."""
        return ~self.logits_NC.isfinite().all(-1)


@dataclass
class Group:
    """Inputs that have passed the same number of layers and run together.

    Attributes:
        rows_B: the row of each input in the answers.
        length_B: the number of tokens of each input.
        longest: S, the number of tokens of the longest input.
        layer: the number of layers that they have passed, so the next layer, 0-based.
        hidden_BSH: the states after the last layer that was run. None before the embeddings.
        ramps_BLC: the logits of the ramps that were evaluated, NaN elsewhere. None if nothing needs
            them again.
        second_B: the position at which the second text of each input begins. None if no ramp reads
            it.
        learned_BL: the learned exit scores of the ramps that were evaluated, 0 elsewhere. None if
            nothing needs them again.
        tokens: the padded tokens, (B, S) each. They are not kept after the embeddings.
        context: what a layer that cannot be split takes beside the states. None until the first of
            them has run.
    """

    rows_B: Tensor
    length_B: Tensor
    longest: int
    layer: int
    hidden_BSH: Tensor | None
    ramps_BLC: Tensor | None
    second_B: Tensor | None
    learned_BL: Tensor | None = None
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    context: Any = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens, padding included."""
        return len(self.rows_B) * self.longest

    @property
    def states_BSH(self) -> Tensor:
        """The states, which are there."""
        assert self.hidden_BSH is not None
        return self.hidden_BSH

    @cached_property
    def mask_BS(self) -> Tensor | None:
        """True at real tokens. None if the group has no padding."""
        if self.length_B.min() == self.longest:
            return None
        real_BS = torch.arange(self.longest) < self.length_B[:, None]
        return real_BS.to(self.states_BSH.device)

    @cached_property
    def key_mask_B11S(self) -> Tensor | None:
        """True at tokens that may be attended to. None if the group has no padding."""
        return None if self.mask_BS is None else self.mask_BS[:, None, None]

    @cached_property
    def whole_mask_BS(self) -> np.ndarray:
        """The mask as graphs take it, 1 at real tokens."""
        real_BS = np.arange(self.longest) < self.length_B.numpy()[:, None]
        return real_BS.astype(np.int32)

    def previous_BC(self, layer: int) -> Tensor | None:
        """Return the logits of the ramp before the ramp of this layer (0-based); None: no ramp."""
        if layer == 0:
            return None
        assert self.ramps_BLC is not None
        return self.ramps_BLC[:, layer - 1]

    def kept(self, keep_B: Tensor) -> tuple["Group", Tensor, int]:
        """Select some of the inputs and cut the padding that they no longer need.

        Args:
            keep_B: True for the inputs to keep, (B,).

        Returns:
            The new group, the positions of its inputs in this group, and the number of tokens of
            its longest input.
        """
        index = keep_B.nonzero().squeeze(1)
        length_B = self.length_B[index]
        longest = int(length_B.max())
        index_on_device = index.to(self.states_BSH.device)
        group = Group(
            self.rows_B[index],
            length_B,
            longest,
            self.layer,
            self.states_BSH[:, :longest].index_select(0, index_on_device),
            None if self.ramps_BLC is None else self.ramps_BLC[index],
            None if self.second_B is None else self.second_B[index_on_device],
            None if self.learned_BL is None else self.learned_BL[index],
        )
        return group, index_on_device, longest


def merge(groups: list[Group], group_costs: int) -> list[Group]:
    """Merge groups where the added padding costs less than running one more group.

    Args:
        groups: groups before the same layer.
        group_costs: the fixed cost of running a layer once, as a number of tokens.
    """
    merged: list[list[Group]] = []
    for group in sorted(groups, key=lambda group: group.longest):
        if merged:
            together = [*merged[-1], group]
            num_rows = sum(len(each.rows_B) for each in together)
            num_tokens = sum(each.num_tokens for each in together)
            padding = num_rows * group.longest - num_tokens
            if padding <= group_costs * len(merged[-1]):
                merged[-1] = together
                continue
        merged.append([group])
    return [_cat(together) for together in merged]


def _cat(groups: list[Group]) -> Group:
    """Join groups into one, padded to its longest input."""
    if len(groups) == 1:
        return groups[0]
    longest = max(group.longest for group in groups)
    states = [
        torch.nn.functional.pad(group.states_BSH, (0, 0, 0, longest - group.longest))
        for group in groups
    ]
    ramps = [group.ramps_BLC for group in groups if group.ramps_BLC is not None]
    seconds = [group.second_B for group in groups if group.second_B is not None]
    learned = [group.learned_BL for group in groups if group.learned_BL is not None]
    return Group(
        torch.cat([group.rows_B for group in groups]),
        torch.cat([group.length_B for group in groups]),
        longest,
        groups[0].layer,
        torch.cat(states),
        torch.cat(ramps) if ramps else None,
        torch.cat(seconds) if seconds else None,
        torch.cat(learned) if learned else None,
    )
