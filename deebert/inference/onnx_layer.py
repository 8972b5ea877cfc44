"""A model's embeddings and layers as ONNX graphs, with the layers in the parts of `SplitLayer`.

Each part is a graph of its own (`onnx_graphs`), which is loaded the first time that it is run. With
short requests this takes about half of torch's time (benchmarks/int8.md). This module knows
nothing of exits.
Shapes: B batch, S tokens, T of them that are computed, H hidden, C labels.
"""

from functools import cached_property

import torch
from torch import Tensor

from deebert.errors import UserError
from deebert.inference import onnx_graphs
from deebert.inference.graph_runtimes import Block, GraphRuntime
from deebert.models.layer_parts import EmbeddingParts, LayerParts, bias_of_tokens
from deebert.models.quantization import LayerRanges
from deebert.models.ramps import Ramp

PRECISIONS = ("float32", "int8")


def check(
    parts: LayerParts, ramp: Ramp, precision: str, device: torch.device, runtime: str
) -> None:
    """Check that a runtime of graphs can run a layer and its ramp.

    Raises:
        UserError: the runtime is not installed, or it cannot run this layer or ramp in this
            precision, on this device or with this number of threads.
    """
    if device.type != "cpu" or precision not in PRECISIONS:
        instead = "on the processor (device=cpu, in evaluate.py trainer.accelerator=cpu)"
        if precision != "int8":
            instead = "runtime=torch"
        raise UserError(
            f"runtime={runtime} runs on the processor, in {' or '.join(PRECISIONS)}, not on "
            f"{device.type} in {precision}; use {instead}"
        )
    GraphRuntime(runtime)
    onnx_graphs.check_layer(parts, ramp)


class OnnxEmbeddings:
    """The embeddings: token ids -> the states before layer 1."""

    def __init__(self, parts: EmbeddingParts, runtime: GraphRuntime) -> None:
        self.typed, self.block = parts.typed, runtime.load(onnx_graphs.embeddings(parts))

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Embed token ids: (B, S) -> (B, S, H). The attention mask is not used."""
        ids = [input_ids]
        if self.typed:
            ids += [torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids]
        [hidden_BSH] = self.block(*ids)
        return hidden_BSH


class OnnxLayer:
    """One layer with the methods of `SplitLayer`, and its ramp.

    torch must not use threads of its own between two calls (`graph_runtimes.one_torch_thread`).

    Args:
        parts: the layer's modules.
        num_heads: the number of attention heads.
        runtime: the library that runs the graphs.
        ramp: the ramp after the layer.
        int8: the ranges of the linear maps; None for float32.
        exact_first: whether the first token, and all keys and values, stay in float32 in int8.
    """

    def __init__(
        self,
        parts: LayerParts,
        num_heads: int,
        runtime: GraphRuntime,
        ramp: Ramp,
        int8: LayerRanges | None = None,
        *,
        exact_first: bool = True,
    ) -> None:
        self.parts, self.num_heads, self.ramp, self.runtime = parts, num_heads, ramp, runtime
        self.int8 = int8  # of all tokens but the first
        self.first_int8 = None if exact_first else int8  # also of all keys and values

    def __call__(self, hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """Run the layer for all tokens: (B, S, H) -> (B, S, H).

        Args:
            hidden_BSH: the states before the layer.
            mask_B11S: True at real tokens; None if there is no padding.
        """
        [new_BSH] = self._whole(hidden_BSH, _mask(hidden_BSH, mask_B11S), *self._bias(hidden_BSH))
        return new_BSH

    def with_ramp(
        self,
        hidden_BSH: Tensor,
        mask_B11S: Tensor | None,
        previous_BC: Tensor | None = None,
        second_B: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        """Run the layer for all tokens, then its ramp.

        Args:
            hidden_BSH: the states before the layer.
            mask_B11S: True at real tokens; None if there is no padding.
            previous_BC: the logits of the previous ramp, if this ramp sees them; None: zeros.
            second_B: the position at which each second text begins, if the ramp reads it.

        Returns:
            The new states (B, S, H), and the ramp's logits (B, C) with its learned exit scores (B,)
            or None.
        """
        tensors = [hidden_BSH, _mask(hidden_BSH, mask_B11S)]
        if self.ramp.reader.needs_second_text:
            assert second_B is not None
            tensors.append(second_B)
        if self.ramp.kind.sees_previous:
            num_labels = self.ramp.classifier.out_features
            if previous_BC is None:
                previous_BC = hidden_BSH.new_zeros(len(hidden_BSH), num_labels)
            tensors.append(previous_BC)
        tensors += self._bias(hidden_BSH)
        new_BSH, logits_BC, *learned_score_B1 = self._with_ramp(*tensors)
        return new_BSH, (logits_BC, learned_score_B1[0].squeeze(-1) if learned_score_B1 else None)

    def answer(self, hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """Run the last layer and the final classifier: (B, S, H) -> logits (B, C)."""
        mask_BS = _mask(hidden_BSH, mask_B11S)
        [logits_BC] = self._answer(hidden_BSH, mask_BS, *self._bias(hidden_BSH))
        return logits_BC

    def keys_values(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of all tokens: (B, S, H) -> two of (B, S, H)."""
        key_BSH, value_BSH = self._keys_values(hidden_BSH)
        return key_BSH, value_BSH

    def first(
        self, hidden_BSH: Tensor, keys_BSH: Tensor, values_BSH: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """Compute the new state of the first token: (B, S, H) -> (B, 1, H)."""
        mask_BS = _mask(hidden_BSH, mask_B11S)
        bias = self._bias(hidden_BSH, 0, 1)
        [new_B1H] = self._first(hidden_BSH[:, :1], keys_BSH, values_BSH, mask_BS, *bias)
        return new_B1H

    def others(
        self, hidden_BSH: Tensor, keys_BSH: Tensor, values_BSH: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """Compute the new states of all tokens but the first: (B, S, H) -> (B, S-1, H)."""
        if hidden_BSH.shape[1] == 1:
            return hidden_BSH[:, 1:]
        mask_BS = _mask(hidden_BSH, mask_B11S)
        bias = self._bias(hidden_BSH, 1)
        [new_BTH] = self._others(hidden_BSH[:, 1:], keys_BSH, values_BSH, mask_BS, *bias)
        return new_BTH

    def _bias(self, hidden_BSH: Tensor, start: int = 0, end: int | None = None) -> list[Tensor]:
        """Return the attention bias of the tokens from `start` to before `end`: [(1, A, T, S)].

        The list is empty if the layer has no bias.
        """
        if self.parts.bias_AD is None:
            return []
        num_keys = hidden_BSH.shape[1]
        num = (num_keys if end is None else end) - start
        return [bias_of_tokens(self.parts.bias_AD, start, num, num_keys)[None]]

    # The graphs. Each is built and loaded the first time that it is used.

    @cached_property
    def _whole(self) -> Block:
        return self.runtime.load(
            onnx_graphs.layer(self.parts, self.num_heads, self.int8, self.first_int8)
        )

    @cached_property
    def _with_ramp(self) -> Block:
        return self.runtime.load(
            onnx_graphs.layer(self.parts, self.num_heads, self.int8, self.first_int8, self.ramp)
        )

    @cached_property
    def _answer(self) -> Block:
        return self.runtime.load(
            onnx_graphs.last_layer(self.parts, self.num_heads, self.first_int8, self.ramp)
        )

    @cached_property
    def _keys_values(self) -> Block:
        return self.runtime.load(onnx_graphs.keys_values(self.parts, self.first_int8))

    @cached_property
    def _first(self) -> Block:
        return self.runtime.load(onnx_graphs.tokens(self.parts, self.num_heads, self.first_int8))

    @cached_property
    def _others(self) -> Block:
        if self.int8 == self.first_int8:
            return self._first
        return self.runtime.load(onnx_graphs.tokens(self.parts, self.num_heads, self.int8))


def _mask(hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
    """Return the mask as the graphs take it: (B, S), 1 at real tokens."""
    if mask_B11S is None:
        return torch.ones(hidden_BSH.shape[:2], dtype=torch.int32)
    return mask_B11S[:, 0, 0].int()
