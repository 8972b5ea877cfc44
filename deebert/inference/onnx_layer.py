"""A model's embeddings and layers in ONNX Runtime, with the layers in the parts of `SplitLayer`.

With short requests ONNX Runtime takes about half of torch's time (benchmarks/speed.md). Each part
is a graph of its own (`onnx_graphs`), which is loaded the first time that it is run. In int8 all
tokens of a call share one scale, so an answer depends a little on the rest of the batch. This
module knows nothing of exits.
Shapes: B batch, S tokens, T of them that are computed, H hidden, C labels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deebert.errors import UserError
from deebert.inference import onnx_graphs
from deebert.models.architectures import EmbeddingParts, LayerParts
from deebert.models.ramps import Ramp

PRECISIONS = ("float32", "int8")


def check(parts: LayerParts, ramp: Ramp, precision: str, device: torch.device) -> None:
    """Check that ONNX Runtime can run a layer and its ramp, and start its threads.

    Raises:
        UserError: ONNX Runtime is not installed, or it cannot run this layer or ramp in this
            precision, on this device or with this number of threads.
    """
    if device.type != "cpu" or precision not in PRECISIONS:
        raise UserError(
            f"runtime=onnx runs on the processor, in {' or '.join(PRECISIONS)}, not on "
            f"{device.type} in {precision}; use runtime=torch"
        )
    onnx_graphs.check("runtime=onnx")
    onnx_graphs.check_layer(parts, ramp)
    started, threads = _share_threads(), torch.get_num_threads()
    if started != threads:
        raise UserError(
            f"runtime=onnx: its {started} threads were started in this process for an earlier run, "
            f"and cannot become {threads}; use threads={started}, or a process of its own"
        )


class OnnxEmbeddings:
    """The embeddings: token ids -> the states before layer 1."""

    def __init__(self, parts: EmbeddingParts) -> None:
        self.typed, self.block = parts.typed, _Block(onnx_graphs.embeddings(parts))

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

    torch must not use threads of its own between two calls (`one_torch_thread`). The threads of
    both libraries spin while they wait for work, so both together take twice as long.

    Args:
        parts: the layer's modules.
        num_heads: the number of attention heads.
        precision: float32 or int8.
        ramp: the ramp after the layer.
        exact_first: whether the first token, and all keys and values, stay in float32 in int8.
    """

    def __init__(
        self,
        parts: LayerParts,
        num_heads: int,
        precision: str,
        ramp: Ramp,
        *,
        exact_first: bool = True,
    ) -> None:
        self.parts, self.num_heads, self.ramp = parts, num_heads, ramp
        self.int8 = precision == "int8"  # of all tokens but the first
        self.first_int8 = self.int8 and not exact_first  # also of all keys and values

    def __call__(self, hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """Run the layer for all tokens: (B, S, H) -> (B, S, H).

        Args:
            hidden_BSH: the states before the layer.
            mask_B11S: True at real tokens; None if there is no padding.
        """
        [new_BSH] = self._whole(hidden_BSH, _mask(hidden_BSH, mask_B11S))
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
        new_BSH, logits_BC, *learned_score_B1 = self._with_ramp(*tensors)
        return new_BSH, (logits_BC, learned_score_B1[0].squeeze(-1) if learned_score_B1 else None)

    def answer(self, hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """Run the last layer and the final classifier: (B, S, H) -> logits (B, C)."""
        [logits_BC] = self._answer(hidden_BSH, _mask(hidden_BSH, mask_B11S))
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
        [new_B1H] = self._first(hidden_BSH[:, :1], keys_BSH, values_BSH, mask_BS)
        return new_B1H

    def others(
        self, hidden_BSH: Tensor, keys_BSH: Tensor, values_BSH: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """Compute the new states of all tokens but the first: (B, S, H) -> (B, S-1, H)."""
        if hidden_BSH.shape[1] == 1:
            return hidden_BSH[:, 1:]
        mask_BS = _mask(hidden_BSH, mask_B11S)
        [new_BTH] = self._others(hidden_BSH[:, 1:], keys_BSH, values_BSH, mask_BS)
        return new_BTH

    # The graphs. Each is built and loaded the first time that it is used.

    @cached_property
    def _whole(self) -> "_Block":
        return _Block(onnx_graphs.layer(self.parts, self.num_heads, self.int8, self.first_int8))

    @cached_property
    def _with_ramp(self) -> "_Block":
        return _Block(
            onnx_graphs.layer(self.parts, self.num_heads, self.int8, self.first_int8, self.ramp)
        )

    @cached_property
    def _answer(self) -> "_Block":
        return _Block(
            onnx_graphs.last_layer(self.parts, self.num_heads, self.first_int8, self.ramp)
        )

    @cached_property
    def _keys_values(self) -> "_Block":
        return _Block(onnx_graphs.keys_values(self.parts, self.first_int8))

    @cached_property
    def _first(self) -> "_Block":
        return _Block(onnx_graphs.tokens(self.parts, self.num_heads, self.first_int8))

    @cached_property
    def _others(self) -> "_Block":
        if self.int8 == self.first_int8:
            return self._first
        return _Block(onnx_graphs.tokens(self.parts, self.num_heads, self.int8))


@cache
def _share_threads() -> int:
    """Create the pool of threads that all graphs share, once in a process.

    Without it each graph would have spinning threads of its own.

    Returns:
        The number of threads of the pool.
    """
    import onnxruntime

    threads = torch.get_num_threads()
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    return threads


def session(model: Path | bytes) -> Any:
    """Load a graph, with all optimizations.

    After the first call ONNX Runtime refuses sessions in this process that do not share the pool.

    Args:
        model: a file, or the content of one.
    """
    import onnxruntime

    _share_threads()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread while the context lasts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _mask(hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
    """Return the mask as the graphs take it: (B, S), 1 at real tokens."""
    if mask_B11S is None:
        return torch.ones(hidden_BSH.shape[:2], dtype=torch.int32)
    return mask_B11S[:, 0, 0].int()


class _Block:
    """A loaded graph. It takes and returns tensors in the graph's order."""

    def __init__(self, graph: bytes) -> None:
        self.session = session(graph)
        self.inputs = [each.name for each in self.session.get_inputs()]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Run the graph."""
        arrays = {name: x.numpy() for name, x in zip(self.inputs, tensors, strict=True)}
        return [torch.from_numpy(output) for output in self.session.run(None, arrays)]
