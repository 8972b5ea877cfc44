"""A transformer layer in ONNX Runtime, run in the parts that `SplitLayer` is run in.

Made for short requests, where it takes about half of torch's time (benchmarks/speed.md). Each
part of a layer is a graph of its own, made of ONNX Runtime's fused operators the first
time that it is run. Knows nothing of ramps or exits.

In int8 one scale stands for all tokens of a call, so an answer depends a little on what else is in
the batch.
Shapes: B batch, S tokens, T of them that are computed, H hidden, A heads, D width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deebert.architectures import LayerParts
from deebert.errors import UserError

PRECISIONS = ("float32", "int8")
MANY = 2**62  # tokens: to the end
FUSED = "com.microsoft"  # the domain of ONNX Runtime's own operators
# By the class's name: the operator, its domain and attributes.
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GELUActivation": ("Gelu", FUSED, {}),
    "GELU": ("Gelu", FUSED, {}),
    "NewGELUActivation": ("Gelu", "", {"approximate": "tanh"}),
    "GELUTanh": ("Gelu", "", {"approximate": "tanh"}),
    "ReLU": ("Relu", "", {}),
    "Tanh": ("Tanh", "", {}),
}


def check(parts: LayerParts, precision: str, device: torch.device) -> None:
    """Raises:
    UserError: ONNX Runtime is not there, or not for this precision, device or kind of layer.
    """
    if device.type != "cpu" or precision not in PRECISIONS:
        raise UserError(
            f"runtime=onnx runs on the processor, in {' or '.join(PRECISIONS)}, not on "
            f"{device.type} in {precision}; use runtime=torch"
        )
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f'runtime=onnx: {error}; pip install "deebert[onnx]"') from error
    if type(parts.activation).__name__ not in ACTIVATIONS:
        raise UserError(
            f"runtime=onnx does not know {type(parts.activation).__name__}; use runtime=torch"
        )
    if (there := _share_threads()) != (wanted := torch.get_num_threads()):
        raise UserError(
            f"runtime=onnx: its {there} threads were started in this process for an earlier run, "
            f"and cannot become {wanted}; use threads={there}, or a process of its own"
        )


class OnnxLayer:
    """One layer, as `SplitLayer`.

    torch's own threads must not be used in between: they wait for work by spinning, as those of
    ONNX Runtime do, and together they take twice as long (`alone`).
    """

    def __init__(
        self, parts: LayerParts, num_heads: int, precision: str, *, exact_first: bool = True
    ) -> None:
        self.parts, self.num_heads = parts, num_heads
        self.int8 = precision == "int8"  # of the tokens but the first
        self.first_int8 = self.int8 and not exact_first  # and of all keys and values

    def __call__(self, hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """All tokens: (B, S, H) -> (B, S, H). `mask_B11S` is True at real tokens; None: all are."""
        [new_BSH] = self._whole(hidden_BSH, _mask(hidden_BSH, mask_B11S))
        return new_BSH

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
    def _whole(self) -> "_Part":
        graph = _Graph(self.parts, self.num_heads)
        keys, values = graph.keys_values("hidden", self.first_int8)
        if self.int8 == self.first_int8:
            new = graph.tokens("hidden", keys, values, self.int8)
        else:
            first = graph.tokens(graph.cut("hidden", 0, 1), keys, values, int8=False)
            others = graph.tokens(graph.cut("hidden", 1, MANY), keys, values, int8=True)
            new = graph.op("Concat", first, others, axis=1)
        return _Part(graph, ("hidden", "mask"), [new])

    @cached_property
    def _keys_values(self) -> "_Part":
        graph = _Graph(self.parts, self.num_heads)
        return _Part(graph, ("hidden",), graph.keys_values("hidden", self.first_int8))

    @cached_property
    def _first(self) -> "_Part":
        return self._some(self.first_int8)

    @cached_property
    def _others(self) -> "_Part":
        return self._first if self.int8 == self.first_int8 else self._some(self.int8)

    def _some(self, int8: bool) -> "_Part":
        graph = _Graph(self.parts, self.num_heads)
        new = graph.tokens("hidden", "keys", "values", int8)
        return _Part(graph, ("hidden", "keys", "values", "mask"), [new])


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


def _values(weights: Tensor) -> np.ndarray:
    return weights.detach().cpu().numpy()


def _mask(hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
    if mask_B11S is None:
        return torch.ones(hidden_BSH.shape[:2], dtype=torch.int32)
    return mask_B11S[:, 0, 0].int()


class _Graph:
    """What a part of a layer computes, operator by operator; each gives its output's name."""

    def __init__(self, parts: LayerParts, num_heads: int) -> None:
        self.parts, self.num_heads = parts, num_heads
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def keys_values(self, hidden: str, int8: bool) -> list[str]:
        linear = self.linear_int8 if int8 else self.linear
        return [linear(hidden, each) for each in (self.parts.key, self.parts.value)]

    def tokens(self, hidden: str, keys: str, values: str, int8: bool) -> str:
        """The new states of the tokens that `hidden` holds: (B, T, H) -> (B, T, H)."""
        linear = self.linear_int8 if int8 else self.linear
        parts = self.parts
        query = linear(hidden, parts.query)
        context = self.op(
            "MultiHeadAttention", query, keys, values, "", "mask",
            domain=FUSED, num_heads=self.num_heads,
        )  # fmt: skip
        between = self.norm(linear(context, parts.output), hidden, parts.attention_norm)
        name, domain, more = ACTIVATIONS[type(parts.activation).__name__]
        wide = self.op(name, linear(between, parts.up), domain=domain, **more)
        return self.norm(linear(wide, parts.down), between, parts.norm)

    def linear(self, x: str, linear: nn.Linear) -> str:
        product = self.op("MatMul", x, self.constant(_values(linear.weight).T))
        return self.op("Add", product, self.constant(_values(linear.bias)))

    def linear_int8(self, x: str, linear: nn.Linear) -> str:
        """8-bit weights with a scale for each output, 8-bit inputs with one for all tokens.

        Without VNNI the products of 8-bit inputs with signed weights overflow the 16 bits that they
        are added in. With unsigned weights another kernel is taken, which is exact.
        """
        weight_OI = _values(linear.weight)
        scale_O = (np.abs(weight_OI).max(1) / 127).clip(1e-12)
        weight_IO = np.rint(weight_OI / scale_O[:, None]).T + 128
        return self.op(
            "DynamicQuantizeMatMul",
            x,
            self.constant(weight_IO.astype(np.uint8)),
            self.constant(scale_O.astype(np.float32)),
            self.constant(np.full(len(scale_O), 128, np.uint8)),
            self.constant(_values(linear.bias)),
            domain=FUSED,
        )

    def norm(self, x: str, residual: str, norm: nn.LayerNorm) -> str:
        gain, bias = self.constant(_values(norm.weight)), self.constant(_values(norm.bias))
        return self.op(
            "SkipLayerNormalization", x, residual, gain, bias, domain=FUSED, epsilon=norm.eps
        )

    def constant(self, values: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.ascontiguousarray(values)
        return name

    def cut(self, x: str, start: int, end: int) -> str:
        """Some of the tokens."""
        limits = [self.constant(np.array([number])) for number in (start, end, 1)]
        return self.op("Slice", x, *limits)

    def op(self, name: str, *inputs: str, domain: str = "", **more: Any) -> str:
        from onnx import helper

        output = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(name, inputs, [output], domain=domain, **more))
        return output


class _Part:
    """A graph that ONNX Runtime has made ready: tensors in, tensors out, in the order given."""

    def __init__(self, graph: _Graph, inputs: tuple[str, ...], outputs: list[str]) -> None:
        from onnx import TensorProto, helper, numpy_helper

        types = {"mask": TensorProto.INT32}
        self.inputs = inputs
        made = helper.make_graph(
            graph.nodes,
            "part",
            [
                helper.make_tensor_value_info(
                    name, types.get(name, TensorProto.FLOAT), [None] * (2 if name in types else 3)
                )
                for name in inputs
            ],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 3)
                for name in outputs
            ],
            [numpy_helper.from_array(values, name) for name, values in graph.constants.items()],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(FUSED, 1)]
        model = helper.make_model(made, opset_imports=opsets, ir_version=10)
        self.session = session(model.SerializeToString())

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        given = {name: x.numpy() for name, x in zip(self.inputs, tensors, strict=True)}
        return [torch.from_numpy(found) for found in self.session.run(None, given)]
