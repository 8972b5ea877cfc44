"""A model's blocks in ONNX Runtime: embeddings, and layers in the parts of `SplitLayer`.

Made for short requests, where it takes about half of torch's time (benchmarks/speed.md). Each block
is a graph of its own (`onnx_graphs`), made ready the first time that it is run. Knows nothing of
exits.

In int8 one scale stands for all tokens of a call, so an answer depends a little on what else is in
the batch.
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


def check(parts: LayerParts, precision: str, device: torch.device) -> None:
    """Raises:
    UserError: ONNX Runtime is not there, or not for this precision, device or kind of layer.
    """
    if device.type != "cpu" or precision not in PRECISIONS:
        raise UserError(
            f"runtime=onnx runs on the processor, in {' or '.join(PRECISIONS)}, not on "
            f"{device.type} in {precision}; use runtime=torch"
        )
    onnx_graphs.check("runtime=onnx")
    onnx_graphs.check_layer(parts)
    if (there := _share_threads()) != (wanted := torch.get_num_threads()):
        raise UserError(
            f"runtime=onnx: its {there} threads were started in this process for an earlier run, "
            f"and cannot become {wanted}; use threads={there}, or a process of its own"
        )


class OnnxEmbeddings:
    """Ids -> the states before layer 1."""

    def __init__(self, parts: EmbeddingParts) -> None:
        self.typed, self.block = parts.typed, _Block(onnx_graphs.embeddings(parts))

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, S) ids -> (B, S, H)."""
        given = [input_ids]
        if self.typed:
            given += [torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids]
        [hidden_BSH] = self.block(*given)
        return hidden_BSH


class OnnxLayer:
    """One layer, as `SplitLayer`; and with the ramp behind it.

    torch's own threads must not be used in between: they wait for work by spinning, as those of
    ONNX Runtime do, and together they take twice as long (`alone`).
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
        self.int8 = precision == "int8"  # of the tokens but the first
        self.first_int8 = self.int8 and not exact_first  # and of all keys and values

    def __call__(self, hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """All tokens: (B, S, H) -> (B, S, H). `mask_B11S` is True at real tokens; None: all are."""
        [new_BSH] = self._whole(hidden_BSH, _mask(hidden_BSH, mask_B11S))
        return new_BSH

    def with_ramp(
        self,
        hidden_BSH: Tensor,
        mask_B11S: Tensor | None,
        previous_BC: Tensor | None = None,
        second_B: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        """Run all tokens and the ramp: (B, S, H) -> (B, S, H), `Ramp.logits_and_score`."""
        given = [hidden_BSH, _mask(hidden_BSH, mask_B11S)]
        if self.ramp.kind.reads == "pair":
            assert second_B is not None
            given.append(second_B)
        if self.ramp.kind.sees_previous:
            num_labels = self.ramp.classifier.out_features
            if previous_BC is None:
                previous_BC = hidden_BSH.new_zeros(len(hidden_BSH), num_labels)
            given.append(previous_BC)
        new_BSH, logits_BC, *learned_score_B1 = self._with_ramp(*given)
        return new_BSH, (logits_BC, learned_score_B1[0].squeeze(-1) if learned_score_B1 else None)

    def answer(self, hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """For the last layer: the final classifier's logits, (B, S, H) -> (B, C)."""
        [logits_BC] = self._answer(hidden_BSH, _mask(hidden_BSH, mask_B11S))
        return logits_BC

    def keys_values(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens: (B, S, H) -> two of (B, S, H)."""
        key_BSH, value_BSH = self._keys_values(hidden_BSH)
        return key_BSH, value_BSH

    def first(
        self, hidden_BSH: Tensor, keys_BSH: Tensor, values_BSH: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """The new state of the first token: (B, S, H) -> (B, 1, H)."""
        mask_BS = _mask(hidden_BSH, mask_B11S)
        [new_B1H] = self._first(hidden_BSH[:, :1], keys_BSH, values_BSH, mask_BS)
        return new_B1H

    def others(
        self, hidden_BSH: Tensor, keys_BSH: Tensor, values_BSH: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """The new states of all tokens but the first: (B, S, H) -> (B, S-1, H)."""
        if hidden_BSH.shape[1] == 1:
            return hidden_BSH[:, 1:]
        mask_BS = _mask(hidden_BSH, mask_B11S)
        [new_BTH] = self._others(hidden_BSH[:, 1:], keys_BSH, values_BSH, mask_BS)
        return new_BTH

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
    """One pool for all parts, or each would have its own, spinning; it is made once a process.

    Returns:
        How many threads it has.
    """
    import onnxruntime

    threads = torch.get_num_threads()
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    return threads


def session(model: Path | bytes) -> Any:
    """A graph made ready, all optimizations on.

    From the first on all sessions of this process must share the pool: others are refused.
    """
    import onnxruntime

    _share_threads()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextmanager
def alone() -> Iterator[None]:
    """For a while torch works without threads of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _mask(hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
    if mask_B11S is None:
        return torch.ones(hidden_BSH.shape[:2], dtype=torch.int32)
    return mask_B11S[:, 0, 0].int()


class _Block:
    """A graph that ONNX Runtime has made ready: tensors in, tensors out, in the graph's order."""

    def __init__(self, graph: bytes) -> None:
        self.session = session(graph)
        self.inputs = [given.name for given in self.session.get_inputs()]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        given = {name: x.numpy() for name, x in zip(self.inputs, tensors, strict=True)}
        return [torch.from_numpy(found) for found in self.session.run(None, given)]
