"""A whole model with its exits as one ONNX graph, for one input at a time.

Between two graphs the states change hands and the rule is evaluated in torch. For one input that
takes a third of a layer's time. So one input runs in a single graph, which decides at each ramp
itself: the layers after a ramp stand in a branch of the operator `If`. The thresholds are an input
of the graph.
Shapes: S tokens, H hidden, L layers (= ramps), K = L-1 thresholds, C labels.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from deebert.exits.rules import Rule
from deebert.inference import onnx_graphs
from deebert.inference.graph_runtimes import Block, GraphRuntime
from deebert.models.early_exit import EarlyExitModel
from deebert.models.quantization import Quantization
from deebert.models.ramp_readers import MASK, SECOND


def fits(model: EarlyExitModel, rule: Rule, runtime: GraphRuntime) -> bool:
    """Say whether a graph can decide: the rule has nodes, and no ramp needs an earlier ramp."""
    alone = not rule.looks_back and not model.ramp_kind.sees_previous
    return runtime.name == "onnx" and alone and rule.nodes is not None


class ExitGraph:
    """A loaded graph of a whole model, which runs one input.

    Args:
        model: the model.
        block: the graph that `exit_graph` returns, or all layers as one stretch with the last ramp,
            which is full depth.
    """

    def __init__(self, model: EarlyExitModel, block: Block) -> None:
        self.model, self.block = model, block

    def run(
        self, tokens: Mapping[str, Sequence[int]], limits_K: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """Run one input.

        Args:
            tokens: `input_ids` and perhaps `token_type_ids`, S whole numbers each.
            limits_K: the thresholds of the ramps before the last, (L-1,) float32.

        Returns:
            The logits of its answer, (1, C), and its exit layer, 1-based.
        """
        ids_1S = np.array([tokens["input_ids"]], np.int64)
        given: dict[str, np.ndarray] = {
            "input_ids": ids_1S,
            MASK: np.ones(ids_1S.shape, np.int32),
            onnx_graphs.LIMITS: limits_K,
        }
        if "token_type_ids" in self.block.inputs:
            types = tokens.get("token_type_ids")
            given["token_type_ids"] = (
                np.zeros_like(ids_1S) if types is None else np.array([types], np.int64)
            )
        if SECOND in self.block.inputs:
            second_1 = self.model.second_text(torch.from_numpy(ids_1S))
            assert second_1 is not None
            given[SECOND] = second_1.numpy()
        arrays = self.block.run([given[name] for name in self.block.inputs])
        outputs = dict(zip(self.block.outputs, arrays, strict=True))
        layer_1 = outputs.get("layer")
        return outputs["logits"], len(self.model.ramps) if layer_1 is None else int(layer_1[0])


def exit_graph(model: EarlyExitModel, rule: Rule, quantization: Quantization | None) -> bytes:
    """Return the graph of a model and an exit rule, the content of a file.

    Inputs: `input_ids`, `mask` and, if the embeddings take them, `token_type_ids` (1, S); `second`
    (1,), if the ramps read it; `limits` (L-1,), the thresholds.
    Outputs: `logits` (1, C) and `layer` (1,), the exit layer, 1-based.

    Args:
        model: the model, on the processor.
        rule: an exit rule that fits (`fits`).
        quantization: how the linear maps are rounded in int8; None for float32.
    """
    return _Exits(model, rule, quantization).serialized()


class _Exits:
    """The nodes of such a graph."""

    def __init__(
        self, model: EarlyExitModel, rule: Rule, quantization: Quantization | None
    ) -> None:
        self.model, self.rule, self.quantization = model, rule, quantization
        self.graph = onnx_graphs.Graph()

    def serialized(self) -> bytes:
        """Return the content of the file."""
        graph, embedding_parts = self.graph, self.model.backbone.embedding_parts
        bias_AD = onnx_graphs.parts_of(self.model, 0).bias_AD
        bias = [] if bias_AD is None else [graph.bias(bias_AD)]
        logits, layer = self._from(0, graph.embeddings(embedding_parts), bias)
        inputs = ["input_ids", *(["token_type_ids"] if embedding_parts.typed else []), MASK]
        inputs += [SECOND] if self.model.all_ramps[0].reader.needs_second_text else []
        inputs += [onnx_graphs.LIMITS] if len(self.model.ramps) > 1 else []
        return graph.serialized(inputs, {"logits": logits, "layer": layer})

    def _from(self, layer: int, before: str, bias: list[str]) -> list[str]:
        """Add the layers from `layer` on (0-based), and return the answer and the exit layer."""
        graph, ramp = self.graph, self.model.all_ramps[layer]
        after = onnx_graphs.add_layer(graph, self.model, layer, before, bias, self.quantization)
        number = graph.integer([layer + 1])
        if layer == len(self.model.ramps) - 1:
            return [graph.ramp(ramp, before, after)["logits"], graph.op("Identity", number)]
        ends = (graph.integer([end]) for end in (layer, layer + 1))
        limit = graph.op("Slice", onnx_graphs.LIMITS, *ends)
        leaves, answer = self._decision(layer, graph.ramp(ramp, before, after), limit)
        return graph.branch(
            leaves, lambda: [answer, number], lambda: self._from(layer + 1, after, bias)
        )

    def _decision(self, layer: int, outputs: Mapping[str, str], limit: str) -> tuple[str, str]:
        """Add the decision of a ramp: whether the input leaves, (1,) bool, and its answer."""
        graph, rule, logits = self.graph, self.rule, outputs["logits"]
        if rule.temperatures is not None:
            logits = graph.op("Div", logits, graph.constant(rule.temperatures[layer].numpy()))
        read = logits
        if rule.reads == "learned_score":
            read = graph.op("Squeeze", outputs["learned_score"], graph.integer([1]))
        assert rule.nodes is not None  # see `fits`
        score = rule.nodes(graph, read, rule.prior)
        # NaN if a logit is not finite: no input is answered by such logits before the last layer.
        zero = graph.op(
            "ReduceSum", graph.op("Sub", logits, logits), graph.integer([1]), keepdims=0
        )
        return graph.op("Less", graph.op("Add", score, zero), limit), logits
