"""A model's blocks as ONNX graphs, made of ONNX Runtime's fused operators.

Embeddings; a layer, whole or in the parts that `SplitLayer` is run in; a layer with its ramp. Knows
nothing of running them, nor of exits.
Shapes: B batch, S tokens, T of them that are computed, H hidden, C labels.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

from deebert.errors import UserError
from deebert.models.architectures import EmbeddingParts, LayerParts
from deebert.models.ramps import Ramp

FUSED = "com.microsoft"  # the domain of ONNX Runtime's own operators
MANY = 2**62  # tokens: to the end
# By the class's name: the operator, its domain and attributes.
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GELUActivation": ("Gelu", FUSED, {}),
    "GELU": ("Gelu", FUSED, {}),
    "NewGELUActivation": ("Gelu", "", {"approximate": "tanh"}),
    "GELUTanh": ("Gelu", "", {"approximate": "tanh"}),
    "ReLU": ("Relu", "", {}),
    "Tanh": ("Tanh", "", {}),
}
# What goes in and out by name: its axes, and its type where that is not float.
AXES = {"input_ids": "BS", "token_type_ids": "BS", "mask": "BS", "previous": "BC", "second": "B",
        "logits": "BC", "learned_score": "B1"}  # fmt: skip
TYPES = {"input_ids": "INT64", "token_type_ids": "INT64", "mask": "INT32", "second": "INT64"}


def embeddings(parts: EmbeddingParts) -> bytes:
    """`input_ids` and, where `parts.typed`, `token_type_ids` (B, S) -> `hidden` (B, S, H)."""
    graph = _Graph()
    hidden = graph.embeddings(parts)
    typed = ["token_type_ids"] if parts.typed else []
    return graph.made(["input_ids", *typed], {"hidden": hidden})


def keys_values(parts: LayerParts, int8: bool) -> bytes:
    """`hidden` (B, S, H) -> `keys`, `values` (B, S, H)."""
    graph = _Graph()
    keys, values = graph.keys_values("hidden", parts, int8)
    return graph.made(["hidden"], {"keys": keys, "values": values})


def tokens(parts: LayerParts, num_heads: int, int8: bool) -> bytes:
    """`hidden` of some tokens (B, T, H), `keys`, `values`, `mask` (B, S) -> `new` (B, T, H)."""
    graph = _Graph()
    new = graph.tokens("hidden", "keys", "values", parts, num_heads, int8)
    return graph.made(["hidden", "keys", "values", "mask"], {"new": new})


def layer(
    parts: LayerParts, num_heads: int, int8: bool, first_int8: bool, ramp: Ramp | None = None
) -> bytes:
    """A layer, with its ramp where one is given.

    `hidden` (B, S, H), `mask` (B, S) and, for a ramp that asks, `second` (B,), where the second
    texts begin, and `previous` (B, C), the logits of the ramp before (zeros for the first) ->
    `new` (B, S, H), `logits` (B, C) and, where it is learned, `learned_score` (B, 1).

    Args:
        int8: compute the tokens but the first in 8 bits.
        first_int8: the first token and all keys and values, too.
    """
    graph = _Graph()
    keys, values = graph.keys_values("hidden", parts, first_int8)
    if int8 == first_int8:
        new = graph.tokens("hidden", keys, values, parts, num_heads, int8)
    else:
        first = graph.cut("hidden", 0, 1)
        first = graph.tokens(first, keys, values, parts, num_heads, int8=False)
        others = graph.cut("hidden", 1, MANY)
        others = graph.tokens(others, keys, values, parts, num_heads, int8=True)
        new = graph.op("Concat", first, others, axis=1)
    given, found = ["hidden", "mask"], {"new": new}
    if ramp is not None:
        given += ["second"] if ramp.kind.reads == "pair" else []
        given += ["previous"] if ramp.kind.sees_previous else []
        found |= graph.ramp(ramp, "hidden", new)
    return graph.made(given, found)


def last_layer(parts: LayerParts, num_heads: int, first_int8: bool, ramp: Ramp) -> bytes:
    """The last layer's first token alone, and the final classifier.

    `hidden` (B, S, H), `mask` (B, S) -> `logits` (B, C).
    """
    graph = _Graph()
    keys, values = graph.keys_values("hidden", parts, first_int8)
    first = graph.cut("hidden", 0, 1)
    new = graph.tokens(first, keys, values, parts, num_heads, first_int8)
    return graph.made(["hidden", "mask"], graph.ramp(ramp, "hidden", new))


def check(asked: str) -> None:
    """Raises:
    UserError: what makes and runs graphs is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f'{asked}: {error}; pip install "deebert[onnx]"') from error


def check_layer(parts: LayerParts) -> None:
    """Raises:
    UserError: its activation is not known here.
    """
    if type(parts.activation).__name__ not in ACTIVATIONS:
        raise UserError(
            f"the activation {type(parts.activation).__name__} has no ONNX graph here, as have "
            f"{', '.join(ACTIVATIONS)}; use runtime=torch"
        )


def _values(weights: Tensor) -> np.ndarray:
    return weights.detach().cpu().numpy()


class _Graph:
    """What a block computes, operator by operator; each gives its output's name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def embeddings(self, parts: EmbeddingParts) -> str:
        states = self.op("Gather", self.constant(_values(parts.words.weight)), "input_ids")
        if parts.types is not None:
            types = self.constant(_values(parts.types.weight))
            given = "token_type_ids" if parts.typed else self.whole(0)
            states = self.op("Add", states, self.op("Gather", types, given))
        positions = self.constant(_values(parts.positions.weight))
        if parts.padding is None:
            size = self.op("Gather", self.op("Shape", "input_ids"), self.whole([1]))
            places = self.op("Slice", positions, self.whole([0]), size, self.whole([0]))
        else:  # RoBERTa counts from behind the padding's id, and padding not at all
            real = self.op("Not", self.op("Equal", "input_ids", self.whole(parts.padding)))
            real = self.op("Cast", real, to=7)  # to int64
            place = self.op("Mul", self.op("CumSum", real, self.whole(1)), real)
            place = self.op("Add", place, self.whole(parts.padding))
            places = self.op("Gather", positions, place)
        gain, bias = (
            self.constant(_values(parts.norm.weight)),
            self.constant(_values(parts.norm.bias)),
        )
        states = self.op(
            "LayerNormalization", self.op("Add", states, places), gain, bias, epsilon=parts.norm.eps
        )
        return states if parts.projection is None else self.linear(states, parts.projection)

    def keys_values(self, hidden: str, parts: LayerParts, int8: bool) -> tuple[str, str]:
        return self.linear(hidden, parts.key, int8), self.linear(hidden, parts.value, int8)

    def tokens(
        self, hidden: str, keys: str, values: str, parts: LayerParts, num_heads: int, int8: bool
    ) -> str:
        """The new states of the tokens that `hidden` holds: (B, T, H) -> (B, T, H)."""
        context = self.op(
            "MultiHeadAttention", self.linear(hidden, parts.query, int8), keys, values, "", "mask",
            domain=FUSED, num_heads=num_heads,
        )  # fmt: skip
        between = self.norm(self.linear(context, parts.output, int8), hidden, parts.attention_norm)
        name, domain, more = ACTIVATIONS[type(parts.activation).__name__]
        wide = self.op(name, self.linear(between, parts.up, int8), domain=domain, **more)
        return self.norm(self.linear(wide, parts.down, int8), between, parts.norm)

    def ramp(self, ramp: Ramp, before: str, after: str) -> dict[str, str]:
        """Add a ramp: `logits` and, where it is learned, `learned_score`, from the states."""
        features = self.features(ramp, before, after)
        features = self.op("Sub", features, self.constant(_values(ramp.shift)))
        features = self.op("Mul", features, self.constant(_values(ramp.scale)))
        pooled = self.op("Tanh", self.linear(features, ramp.pooler))
        found = {}
        if ramp.kind.predicts is not None:
            found["learned_score"] = self.op("Sigmoid", self.linear(pooled, ramp.exit_head))
        if ramp.kind.sees_previous:
            one = ramp.classifier.out_features == 1  # a regression's value is seen as it is
            seen = "previous" if one else self.op("Softmax", "previous", axis=-1)
            pooled = self.op("Concat", pooled, seen, axis=1)
        return {"logits": self.linear(pooled, ramp.classifier)} | found

    def features(self, ramp: Ramp, before: str, after: str) -> str:
        """What `Ramp.read` gives: (B, F)."""
        reads = ramp.kind.reads
        if reads in ("first", "first_and_mean"):
            first = self.op("Gather", after, self.whole(0), axis=1)
            return (
                first if reads == "first" else self.op("Concat", first, self.mean(before), axis=1)
            )
        if reads == "mean":
            return self.mean(after)
        if reads == "pair":
            return self.pair(after)
        score = self.linear(after, ramp.attention)  # (B, S, 1)
        padding = self.op("Sub", self.real(), self.constant(np.array(1, np.float32)))
        padding = self.op("Mul", padding, self.constant(np.array(1e30, np.float32)))
        weights = self.op("Softmax", self.op("Add", score, padding), axis=1)
        weighted = self.op("Mul", after, weights)
        return self.op("ReduceSum", weighted, self.whole([1]), keepdims=0)

    def mean(self, states: str, over: str | None = None) -> str:
        """Over the real tokens, or those where `over` (B, S, 1) is 1: (B, S, H) -> (B, H)."""
        over = over or self.real()
        total = self.op("ReduceSum", self.op("Mul", states, over), self.whole([1]), keepdims=0)
        return self.op("Div", total, self.op("ReduceSum", over, self.whole([1]), keepdims=0))

    def pair(self, states: str) -> str:
        """As `ramps` has it: (B, S, H) -> (B, 3 H)."""
        real, begins = self.real(), self.op("Unsqueeze", "second", self.whole([1, 2]))
        number = self.op("CumSum", self.op("Cast", real, to=7), self.whole(1))  # from 1, int64
        first = self.op("Cast", self.op("LessOrEqual", number, begins), to=1)
        first = self.op("Mul", first, real)
        second = self.op("Sub", real, first)
        there = self.op("ReduceMax", second, self.whole([1]), keepdims=1)
        second = self.op("Where", self.op("Cast", there, to=9), second, first)  # to bool
        u, v = self.mean(states, first), self.mean(states, second)
        half = self.constant(np.array(0.5, np.float32))
        apart = self.op("Sub", u, v)
        middle = self.op("Mul", self.op("Add", u, v), half)
        return self.op("Concat", middle, apart, self.op("Abs", apart), axis=1)

    def real(self) -> str:
        """1 at real tokens, 0 elsewhere: (B, S, 1)."""
        return self.op("Unsqueeze", self.op("Cast", "mask", to=1), self.whole([2]))  # to float

    def linear(self, x: str, linear: nn.Linear, int8: bool = False) -> str:
        if int8:
            return self._linear_int8(x, linear)
        product = self.op("MatMul", x, self.constant(_values(linear.weight).T))
        return self.op("Add", product, self.constant(_values(linear.bias)))

    def _linear_int8(self, x: str, linear: nn.Linear) -> str:
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

    def cut(self, x: str, start: int, end: int) -> str:
        """Some of the tokens."""
        return self.op("Slice", x, *(self.whole([number]) for number in (start, end, 1)))

    def whole(self, numbers: int | list[int]) -> str:
        return self.constant(np.array(numbers, np.int64))

    def constant(self, values: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.ascontiguousarray(values).reshape(np.shape(values))
        return name

    def op(self, name: str, *inputs: str, domain: str = "", **more: Any) -> str:
        from onnx import helper

        output = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(name, inputs, [output], domain=domain, **more))
        return output

    def made(self, inputs: list[str], outputs: dict[str, str]) -> bytes:
        """The graph as a file's content; outputs by the names that they are to have."""
        from onnx import TensorProto, helper, numpy_helper

        def info(name: str) -> Any:
            kind = getattr(TensorProto, TYPES.get(name, "FLOAT"))
            return helper.make_tensor_value_info(name, kind, list(AXES.get(name, "BTH")))

        for name, found in outputs.items():
            self.nodes.append(helper.make_node("Identity", [found], [name]))
        graph = helper.make_graph(
            self.nodes,
            "block",
            [info(name) for name in inputs],
            [info(name) for name in outputs],
            [numpy_helper.from_array(values, name) for name, values in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(FUSED, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return bytes(model.SerializeToString())
