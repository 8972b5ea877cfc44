"""ONNX graphs of stretches of a model's layers, made of ONNX Runtime's fused operators.

A stretch is some consecutive layers, with the embeddings before them and the ramp after them if
these are wanted. There are also graphs of the parts of a layer that `SplitLayer` runs. What a ramp
reads, its reader adds itself (`ramp_readers`). OpenVINO runs these graphs, too; only int8 has to be
written in another way for it. This module knows neither how graphs are run nor what an exit is.
Shapes: B batch, S tokens, T of them that are computed, H hidden, C labels.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

from deebert.errors import UserError
from deebert.inference.onnx_nodes import FUSED, Nodes
from deebert.models.early_exit import EarlyExitModel
from deebert.models.layer_parts import EmbeddingParts, LayerParts
from deebert.models.quantization import LARGEST_WEIGHT, InputRange, LayerRanges, Quantization
from deebert.models.ramp_readers import MASK, SECOND
from deebert.models.ramps import Ramp

MANY = 2**62  # end of a slice of all tokens: more than any input has
# The operator, its domain and its attributes, by the name of the activation's class.
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GELUActivation": ("Gelu", FUSED, {}),
    "GELU": ("Gelu", FUSED, {}),
    "NewGELUActivation": ("Gelu", "", {"approximate": "tanh"}),
    "GELUTanh": ("Gelu", "", {"approximate": "tanh"}),
    "ReLU": ("Relu", "", {}),
    "Tanh": ("Tanh", "", {}),
}
BIAS = "attention_bias"  # an input of the layers whose parts have one
LIMITS = "limits"  # the thresholds of K ramps, an input of graphs that decide (`exit_graphs`)
# The axes of inputs and outputs whose shape is not (B, T, H), and the types that are not FLOAT.
AXES = {"input_ids": "BS", "token_type_ids": "BS", MASK: "BS", "previous": "BC", SECOND: "B",
        "logits": "BC", "learned_score": "B1", BIAS: "1ATS", "layer": "1", LIMITS: "K"}  # fmt: skip
TYPES = {"input_ids": "INT64", "token_type_ids": "INT64", MASK: "INT32", SECOND: "INT64",
         "layer": "INT64"}  # fmt: skip


def stretch(
    model: EarlyExitModel,
    start: int,
    end: int,
    quantization: Quantization | None,
    *,
    embeds: bool,
    ramp: bool,
    fused: bool = True,
) -> bytes:
    """Return the graph of some consecutive layers.

    Inputs: `hidden` (B, S, H); with `embeds` instead `input_ids` (B, S) and, if the embeddings take
    them, `token_type_ids` (B, S). With layers `mask` (B, S) and, if the layers have one that no
    embeddings make, `attention_bias` (1, A, S, S). If the ramp reads them, `second` (B,), the
    positions at which the second texts begin, and `previous` (B, C), the logits of the previous
    ramp (zeros for the first ramp).
    Outputs: `new` (B, S, H), unless the model's last layer is one of them; with a ramp `logits`
    (B, C) and, if it has a learned exit score, `learned_score` (B, 1). Embeddings without layers
    give `hidden` (B, S, H) and the `attention_bias`.

    Args:
        model: the model.
        start: the first of the layers, from 0.
        end: the first layer after them.
        quantization: how the linear maps are rounded; None for float32.
        embeds: whether the graph begins with the embeddings.
        ramp: whether it ends with the ramp of the last of these layers.
        fused: whether int8 is written in ONNX Runtime's own operators.
    """
    graph, backbone, bias_AD = Graph(fused=fused), model.backbone, parts_of(model, 0).bias_AD
    if embeds:
        inputs = ["input_ids", *(["token_type_ids"] if backbone.embedding_parts.typed else [])]
        hidden = graph.embeddings(backbone.embedding_parts)
        bias = [] if bias_AD is None else [graph.bias(bias_AD)]
    else:
        inputs, hidden = ["hidden"], "hidden"
        bias = [] if bias_AD is None else [BIAS]
    before = hidden
    for layer in range(start, end):
        before, hidden = hidden, add_layer(graph, model, layer, hidden, bias, quantization)
    if start == end:
        outputs = {"hidden": hidden} | ({BIAS: bias[0]} if bias else {})
    else:
        inputs += [MASK, *([] if embeds else bias)]
        outputs = {"new": hidden} if end < len(model.ramps) else {}
    if ramp:
        last_ramp = model.all_ramps[end - 1]
        inputs += [SECOND] if last_ramp.reader.needs_second_text else []
        inputs += ["previous"] if last_ramp.kind.sees_previous else []
        outputs |= graph.ramp(last_ramp, before, hidden)
    return graph.serialized(inputs, outputs)


def add_layer(
    graph: "Graph",
    model: EarlyExitModel,
    layer: int,
    hidden: str,
    bias: list[str],
    quantization: Quantization | None,
) -> str:
    """Add a layer of a model to a graph; of the last layer only the first token is computed."""
    int8 = quantization.layers[layer] if quantization else None
    first_int8 = None if model.ramp_kind.exact_first else int8
    parts, last = parts_of(model, layer), layer == len(model.ramps) - 1
    num_heads = model.backbone.num_heads
    return graph.layer(hidden, parts, num_heads, int8, first_int8, bias, only_first=last)


def parts_of(model: EarlyExitModel, layer: int) -> LayerParts:
    parts = model.backbone.parts(layer)
    assert parts is not None, "its layers cannot be split"
    return parts


def keys_values(parts: LayerParts, int8: LayerRanges | None, *, fused: bool = True) -> bytes:
    """Return the graph of a layer's keys and values.

    Input: `hidden` (B, S, H). Outputs: `keys` and `values` (B, S, H).
    """
    graph = Graph(fused=fused)
    keys, values = graph.keys_values("hidden", parts, int8)
    return graph.serialized(["hidden"], {"keys": keys, "values": values})


def tokens(
    parts: LayerParts, num_heads: int, int8: LayerRanges | None, *, fused: bool = True
) -> bytes:
    """Return the graph of a layer for some of the tokens.

    Inputs: `hidden` of these tokens (B, T, H); `keys` and `values` (B, S, H) and `mask` (B, S) of
    all tokens; if the layer has one, `attention_bias` (1, A, T, S). Output: `new` (B, T, H).
    """
    graph, bias = Graph(fused=fused), [] if parts.bias_AD is None else [BIAS]
    new = graph.tokens("hidden", "keys", "values", parts, num_heads, int8, *bias)
    return graph.serialized(["hidden", "keys", "values", MASK, *bias], {"new": new})


def check_layer(parts: LayerParts, ramp: Ramp) -> None:
    """Check that a layer and its ramp have a graph.

    Raises:
        UserError: there is no operator for the activation, or the ramp's reader adds no nodes.
    """
    if not ramp.reader.has_onnx:
        raise UserError(
            f"ramp.reads={ramp.kind.reads} has no ONNX graph, as its class has no method `onnx`; "
            "use runtime=torch and precision=float32 or bfloat16"
        )
    if type(parts.activation).__name__ not in ACTIVATIONS:
        raise UserError(
            f"the activation {type(parts.activation).__name__} has no ONNX graph here, only these "
            f"have one: {', '.join(ACTIVATIONS)}; use runtime=torch and precision=float32 "
            "or bfloat16"
        )


def _values(weights: Tensor) -> np.ndarray:
    return weights.detach().cpu().numpy()


class Graph(Nodes):
    """A graph that is being built, with the parts of a model.

    Each method adds operators and returns the name of their output.

    Args:
        fused: whether int8 is written in ONNX Runtime's own operators.
    """

    axes = AXES
    types = TYPES

    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.quantized: dict[str, str] = {}  # name of a value -> that of the value in 8 bits

    def embeddings(self, parts: EmbeddingParts) -> str:
        """Add the embeddings: `input_ids` (B, S) -> (B, S, H)."""
        states = self.op("Gather", self.constant(_values(parts.words.weight)), "input_ids")
        if parts.types is not None:
            types = self.constant(_values(parts.types.weight))
            type_ids = "token_type_ids" if parts.typed else self.integer(0)
            states = self.op("Add", states, self.op("Gather", types, type_ids))
        positions = self.constant(_values(parts.positions.weight))
        if parts.padding is None:
            size = self.op("Gather", self.op("Shape", "input_ids"), self.integer([1]))
            places = self.op("Slice", positions, self.integer([0]), size, self.integer([0]))
        else:  # RoBERTa's positions start after the padding's id, and padding has none
            real = self.op("Not", self.op("Equal", "input_ids", self.integer(parts.padding)))
            real = self.op("Cast", real, to=7)  # to int64
            place = self.op("Mul", self.op("CumSum", real, self.integer(1)), real)
            place = self.op("Add", place, self.integer(parts.padding))
            places = self.op("Gather", positions, place)
        gain, bias = (
            self.constant(_values(parts.norm.weight)),
            self.constant(_values(parts.norm.bias)),
        )
        states = self.op(
            "LayerNormalization", self.op("Add", states, places), gain, bias, epsilon=parts.norm.eps
        )
        return states if parts.projection is None else self.linear(states, parts.projection)

    def bias(self, bias_AD: Tensor) -> str:
        """Add the attention bias of all tokens: `input_ids` (B, S) -> (1, A, S, S)."""
        num = self.op("Gather", self.op("Shape", "input_ids"), self.integer(1))
        place_S = self.op("Range", self.integer(0), num, self.integer(1))
        keys_1S = self.op("Unsqueeze", place_S, self.integer([0]))
        distance_SS = self.op("Sub", keys_1S, self.op("Unsqueeze", place_S, self.integer([1])))
        index_SS = self.op("Add", distance_SS, self.integer(bias_AD.shape[1] // 2))
        return self.op("Gather", self.constant(_values(bias_AD[None])), index_SS, axis=2)

    def layer(
        self,
        hidden: str,
        parts: LayerParts,
        num_heads: int,
        int8: LayerRanges | None,
        first_int8: LayerRanges | None,
        bias: list[str],
        *,
        only_first: bool,
    ) -> str:
        """Add a layer: (B, S, H) -> (B, S, H), or for its first token only -> (B, 1, H).

        Args:
            hidden: the states before the layer.
            parts: the layer's modules.
            num_heads: the number of attention heads.
            int8: the ranges of all tokens but the first; None for float32.
            first_int8: the ranges of the first token and of all keys and values: None, or `int8`.
            bias: the attention bias (1, A, S, S), if the layer has one.
            only_first: whether only the first token is computed.
        """
        keys, values = self.keys_values(hidden, parts, first_int8)

        def tokens(start: int, end: int, ranges: LayerRanges | None) -> str:
            some, rows = self.cut(hidden, start, end), [self.cut(b, start, end, 2) for b in bias]
            return self.tokens(some, keys, values, parts, num_heads, ranges, *rows)

        if only_first:
            return tokens(0, 1, first_int8)
        if int8 == first_int8:
            return self.tokens(hidden, keys, values, parts, num_heads, int8, *bias)
        return self.op("Concat", tokens(0, 1, first_int8), tokens(1, MANY, int8), axis=1)

    def keys_values(
        self, hidden: str, parts: LayerParts, int8: LayerRanges | None
    ) -> tuple[str, str]:
        """Add the keys and values of all tokens: (B, S, H) -> two of (B, S, H)."""
        range_ = int8 and int8.attention
        return self.linear(hidden, parts.key, range_), self.linear(hidden, parts.value, range_)

    def tokens(
        self,
        hidden: str,
        keys: str,
        values: str,
        parts: LayerParts,
        num_heads: int,
        int8: LayerRanges | None,
        *bias: str,
    ) -> str:
        """Add the new states of the tokens that `hidden` holds: (B, T, H) -> (B, T, H)."""
        query = self.linear(hidden, parts.query, int8 and int8.attention)
        context = self.op(
            "MultiHeadAttention", query, keys, values, "", MASK, *bias,
            domain=FUSED, num_heads=num_heads,
        )  # fmt: skip
        output = self.linear(context, parts.output, int8 and int8.output)
        between = self.norm(output, hidden, parts.attention_norm)
        name, domain, attributes = ACTIVATIONS[type(parts.activation).__name__]
        wide = self.linear(between, parts.up, int8 and int8.up)
        wide = self.op(name, wide, domain=domain, **attributes)
        return self.norm(self.linear(wide, parts.down, int8 and int8.down), between, parts.norm)

    def ramp(self, ramp: Ramp, before: str, after: str) -> dict[str, str]:
        """Add a ramp: the states before and after its layer (B, S, H) -> outputs by their names.

        The outputs are `logits` (B, C) and, if the ramp has one, `learned_score` (B, 1).
        """
        features = ramp.reader.onnx(self, before, after, ramp)
        pooled = self.op("Tanh", self._standardized(features, ramp))
        learned = {}
        if ramp.kind.predicts is not None:
            learned["learned_score"] = self.op("Sigmoid", self.linear(pooled, ramp.exit_head))
        if ramp.kind.sees_previous:
            one = ramp.classifier.out_features == 1  # the ramp sees a regression's value itself
            seen = "previous" if one else self.op("Softmax", "previous", axis=-1)
            pooled = self.op("Concat", pooled, seen, axis=1)
        return {"logits": self.linear(pooled, ramp.classifier)} | learned

    def _standardized(self, features: str, ramp: Ramp) -> str:
        """Add a ramp's pooler, whose weights hold the shift and scale: (B, F) -> (B, H)."""
        shift_F, scale_F = ramp.shift.double(), ramp.scale.double()
        weight_HF = ramp.pooler.weight.double() * scale_F
        bias_H = ramp.pooler.bias.double() - weight_HF @ shift_F
        weight, bias = (self.constant(_values(each.float())) for each in (weight_HF.T, bias_H))
        return self.op("Add", self.op("MatMul", features, weight), bias)

    def linear(self, x: str, linear: nn.Linear, range_: InputRange | None = None) -> str:
        """Add a linear map, in float32 or in 8 bits: (..., in) -> (..., out)."""
        weight_IO, bias_O = _values(linear.weight).T, self.constant(_values(linear.bias))
        if range_ is None:
            return self.op("Add", self.op("MatMul", x, self.constant(weight_IO)), bias_O)
        scale_O = (np.abs(weight_IO).max(0) / LARGEST_WEIGHT).clip(1e-12)
        number_IO = np.nan_to_num(np.rint(weight_IO / scale_O))  # the scale of NaN is NaN
        scale, zero, weight, weight_scale, weight_zero = (
            self.constant(np.array(values, dtype))
            for values, dtype in (
                (range_.scale, np.float32),
                (range_.zero_point, np.uint8),
                (number_IO, np.int8),
                (scale_O, np.float32),
                (np.zeros(len(scale_O)), np.int8),
            )
        )
        if x not in self.quantized:  # once for all maps that read it
            self.quantized[x] = self.op("QuantizeLinear", x, scale, zero)
        number = self.quantized[x]
        if self.fused:
            given = (number, weight, scale, weight_scale, zero, weight_zero, bias_O)
            return self.op("MatMulIntegerToFloat", *given, domain=FUSED)
        # OpenVINO knows this pattern of "QDQ" nodes, and multiplies whole numbers.
        x = self.op("DequantizeLinear", number, scale, zero)
        weight = self.op("DequantizeLinear", weight, weight_scale, weight_zero, axis=1)
        return self.op("Add", self.op("MatMul", x, weight), bias_O)

    def norm(self, x: str, residual: str, norm: nn.LayerNorm) -> str:
        """Add the residual and a layer norm: two of (B, T, H) -> (B, T, H)."""
        gain, bias = self.constant(_values(norm.weight)), self.constant(_values(norm.bias))
        # `Sum`, since ONNX Runtime would fuse `Add` with the norm into its operator
        # SkipLayerNormalization, which takes six times as long (25 tokens, one thread).
        total = self.op("Sum", x, residual)
        return self.op("LayerNormalization", total, gain, bias, epsilon=norm.eps)
