"""Stretches of layers: what the engine runs between two decisions, and their torch code.

A stretch is some consecutive layers of the model, with the embeddings before the first layer and,
if the engine asks for it, the ramp after the last of them. A single layer is the shortest stretch.
This module decides nothing: it knows neither rules nor thresholds.
Shapes: B inputs, S tokens, T of them that are computed, H hidden, C labels.
"""

import contextlib
from typing import Protocol

import torch
from torch import Tensor

from deebert.exits.rules import Rule
from deebert.inference.exit_graphs import ExitGraph
from deebert.inference.kernels import without_onednn
from deebert.inference.split_layer import SplitLayer
from deebert.inference.survivors import Group
from deebert.models.early_exit import EarlyExitModel

# The logits (B, C) of a ramp, and its learned exit scores (B,) or None.
RampOutput = tuple[Tensor, Tensor | None]


class LayerInParts(Protocol):
    """A layer that can be run for its first token alone, and later for the others."""

    def keys_values(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of all tokens: (B, S, H) -> two of (B, ..., S, ...)."""

    def first(
        self, hidden_BSH: Tensor, keys: Tensor, values: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """Compute the new state of the first token: (B, S, H) -> (B, 1, H)."""

    def others(
        self, hidden_BSH: Tensor, keys: Tensor, values: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """Compute the new states of all tokens but the first: (B, S, H) -> (B, S-1, H)."""


class Stretches(Protocol):
    """The layers of a model in one library and precision."""

    def run(self, group: Group, end: int, *, ramp: bool) -> RampOutput | None:
        """Run a group from where it is to before layer `end` (0-based).

        The last layer is run for the first token only, which is all that its ramp reads.

        Args:
            group: the inputs. They get their new states, unless the last layer was run.
            end: the first layer that is not run. If it is the group's next layer, only the
                embeddings are computed, if they are not there yet.
            ramp: whether the ramp of the last of these layers is evaluated, too. The ramp of the
                model's last layer always is.

        Returns:
            The output of the ramp, or None without it.
        """

    def in_parts(self, layer: int) -> LayerInParts | None:
        """Return a layer (0-based) in parts; None if it only runs as a whole."""

    def exit_graph(self, rule: Rule | None) -> ExitGraph | None:
        """Return all layers with a rule's decisions as one graph; None if there is no such.

        Args:
            rule: the rule, or None for full depth.
        """


def ramp_output(
    model: EarlyExitModel, layer: int, group: Group, before_BSH: Tensor, after_BTH: Tensor
) -> RampOutput:
    """Evaluate a ramp in torch.

    Args:
        model: the model.
        layer: the ramp's layer, 0-based.
        group: the inputs.
        before_BSH: the states before the layer.
        after_BTH: the states after the layer, of the first token at least.
    """
    ramp = model.all_ramps[layer]
    features_BF = ramp.read(before_BSH, after_BTH, group.mask_BS, group.second_B).float()
    previous_BC = group.previous_BC(layer) if ramp.kind.sees_previous else None
    if previous_BC is not None:
        previous_BC = previous_BC.to(features_BF.device)
    return ramp.logits_and_score(features_BF, previous_BC)


class TorchStretches:
    """The layers in torch.

    Args:
        model: the model, on the device.
        precision: float32 or bfloat16.
        device: the device.
    """

    def __init__(self, model: EarlyExitModel, precision: str, device: torch.device) -> None:
        self.model, self.precision, self.device = model, precision, device
        self.layers = [self._split(layer) for layer in range(len(model.ramps))]

    def _split(self, layer: int) -> SplitLayer | None:
        backbone = self.model.backbone
        if (parts := backbone.parts(layer)) is None:
            return None
        exact_first = self.model.ramp_kind.exact_first
        return SplitLayer(
            parts, backbone.num_heads, self.precision, self.device, exact_first=exact_first
        )

    def in_parts(self, layer: int) -> SplitLayer | None:
        """Return a layer in parts, as `Stretches` says."""
        return self.layers[layer]

    def exit_graph(self, rule: Rule | None) -> None:
        """Return no graph, as torch has none."""

    def run(self, group: Group, end: int, *, ramp: bool) -> RampOutput | None:
        """Run a group to before layer `end`, as `Stretches` says."""
        if group.hidden_BSH is None:
            tokens = {name: values.to(self.device) for name, values in group.tokens.items()}
            group.hidden_BSH = self.model.backbone.embeddings(**tokens)
        before_BSH = hidden_BSH = group.hidden_BSH
        for layer in range(group.layer, end):
            before_BSH, split, mask = hidden_BSH, self.layers[layer], group.key_mask_B11S
            if split is None:
                hidden_BSH = self._whole_layer(layer, group, before_BSH)
            elif layer == len(self.layers) - 1:
                hidden_BSH = split.first(before_BSH, *split.keys_values(before_BSH), mask)
            else:
                hidden_BSH = split(before_BSH, mask)
        group.layer, group.hidden_BSH = end, hidden_BSH
        return ramp_output(self.model, end - 1, group, before_BSH, hidden_BSH) if ramp else None

    def _whole_layer(self, layer: int, group: Group, hidden_BSH: Tensor) -> Tensor:
        """Run a layer that cannot be split, with the library's own code."""
        backbone = self.model.backbone
        if group.context is None:
            real_BS = torch.ones(hidden_BSH.shape[:2], dtype=torch.long, device=self.device)
            if group.mask_BS is not None:
                real_BS = group.mask_BS.long()
            group.context = backbone.context(hidden_BSH, real_BS)
        bfloat16 = self.precision == "bfloat16"
        onednn = contextlib.nullcontext() if bfloat16 else without_onednn()
        with onednn, torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            return backbone.run_layer(layer, hidden_BSH, group.context).float()
