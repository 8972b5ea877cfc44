"""The layers of a model as ONNX graphs, a graph for each stretch.

A graph is made and loaded the first time that it is run (`onnx_graphs`). A call of a graph alone
costs 8 us, but the states that one graph hands to the next cost more. So one graph holds all layers
up to the next ramp that is evaluated, and that ramp.
It knows nothing of exits (`exit_graphs` does).
Shapes: B batch, S tokens, T of them that are computed, H hidden, C labels.
"""

from collections.abc import Callable
from functools import cache, cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from deebert.errors import UserError
from deebert.exits.rules import Rule
from deebert.inference import exit_graphs, onnx_graphs
from deebert.inference.exit_graphs import ExitGraph
from deebert.inference.graph_runtimes import Block, GraphRuntime
from deebert.inference.stretches import RampOutput
from deebert.inference.survivors import Group
from deebert.models.early_exit import EarlyExitModel
from deebert.models.layer_parts import LayerParts, bias_of_tokens
from deebert.models.quantization import LayerRanges, Quantization
from deebert.models.ramp_readers import MASK, SECOND
from deebert.models.ramps import Ramp

PRECISIONS = ("float32", "int8")
# Each holds the weights of the model, and takes a second to load. So the first rules have one.
EXIT_GRAPHS = 4


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


class OnnxStretches:
    """The layers of a model in a library of graphs.

    torch must not use threads of its own between two calls (`graph_runtimes.one_torch_thread`).

    Args:
        model: the model, on the processor.
        runtime: the library that runs the graphs.
        quantization: how the linear maps are rounded in int8; None for float32.
    """

    def __init__(
        self, model: EarlyExitModel, runtime: GraphRuntime, quantization: Quantization | None
    ) -> None:
        self.model, self.runtime, self.quantization = model, runtime, quantization
        num_layers = len(model.ramps)
        # Each operating point has stretches of its own. Each graph holds its layers' weights, so
        # those of many operating points are not all kept.
        self._graph = lru_cache(maxsize=4 * num_layers)(self._load)
        self._exit_graphs: dict[tuple[str, ...], ExitGraph] = {}
        self.in_parts: Callable[[int], OnnxLayer] = cache(self._in_parts)
        parts = model.backbone.parts(0)
        assert parts is not None  # see `check`
        self.bias_AD = parts.bias_AD

    def _load(self, start: int, end: int, embeds: bool, ramp: bool) -> Block:
        return self.runtime.load(
            onnx_graphs.stretch(
                self.model,
                start,
                end,
                self.quantization,
                embeds=embeds,
                ramp=ramp,
                fused=self.runtime.name == "onnx",
            )
        )

    def _in_parts(self, layer: int) -> "OnnxLayer":
        parts = self.model.backbone.parts(layer)
        assert parts is not None
        int8 = self.quantization.layers[layer] if self.quantization else None
        return OnnxLayer(
            parts,
            self.model.backbone.num_heads,
            self.runtime,
            int8,
            exact_first=self.model.ramp_kind.exact_first,
        )

    def exit_graph(self, rule: Rule | None) -> ExitGraph | None:
        """Return the graph for one input at a time, as `Stretches` says."""
        if rule is None:
            return ExitGraph(self.model, self._graph(0, len(self.model.ramps), True, True))
        if not exit_graphs.fits(self.model, rule, self.runtime):
            return None
        key = (rule.name, repr(rule.options), repr(rule.fit))
        if key not in self._exit_graphs:
            if len(self._exit_graphs) == EXIT_GRAPHS:
                return None
            graph = exit_graphs.exit_graph(self.model, rule, self.quantization)
            self._exit_graphs[key] = ExitGraph(self.model, self.runtime.load(graph))
        return self._exit_graphs[key]

    def run(self, group: Group, end: int, *, ramp: bool) -> RampOutput | None:
        """Run a group to before layer `end`, as `Stretches` says."""
        start, embeds = group.layer, group.hidden_BSH is None
        if start == end and not embeds:
            return None
        graph = self._graph(start, end, embeds, ramp)
        outputs = graph(*(self._input(name, group, end - 1) for name in graph.inputs))
        group.layer, group.hidden_BSH = end, outputs.get("new" if start < end else "hidden")
        if not ramp:
            return None
        learned_B1 = outputs.get("learned_score")
        return outputs["logits"], None if learned_B1 is None else learned_B1.squeeze(-1)

    def _input(self, name: str, group: Group, last: int) -> np.ndarray:
        """Return the input of this name, for a stretch whose last layer is `last`."""
        if name == "hidden":
            assert group.hidden_BSH is not None
            return group.hidden_BSH.numpy()
        if name == MASK:
            return group.whole_mask_BS
        if name == SECOND:
            assert group.second_B is not None
            return group.second_B.numpy()
        if name == "previous":
            previous_BC = group.previous_BC(last)
            if previous_BC is None:
                num_labels = self.model.all_ramps[0].classifier.out_features
                return np.zeros((len(group.rows_B), num_labels), np.float32)
            return previous_BC.numpy()
        if name == onnx_graphs.BIAS:
            assert self.bias_AD is not None
            return bias_of_tokens(self.bias_AD, 0, group.longest, group.longest)[None].numpy()
        if name in group.tokens:
            return group.tokens[name].numpy()
        # The token types, which were not given.
        return np.zeros_like(group.tokens["input_ids"].numpy())


class OnnxLayer:
    """One layer in parts, with the methods of `SplitLayer`. Each part is a graph of its own.

    Args:
        parts: the layer's modules.
        num_heads: the number of attention heads.
        runtime: the library that runs the graphs.
        int8: the ranges of the linear maps; None for float32.
        exact_first: whether the first token, and all keys and values, stay in float32 in int8.
    """

    def __init__(
        self,
        parts: LayerParts,
        num_heads: int,
        runtime: GraphRuntime,
        int8: LayerRanges | None = None,
        *,
        exact_first: bool = True,
    ) -> None:
        self.parts, self.num_heads, self.runtime = parts, num_heads, runtime
        self.int8 = int8  # of all tokens but the first
        self.first_int8 = None if exact_first else int8  # also of all keys and values

    def keys_values(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of all tokens: (B, S, H) -> two of (B, S, H)."""
        outputs = self._keys_values(hidden_BSH.numpy())
        return outputs["keys"], outputs["values"]

    def first(
        self, hidden_BSH: Tensor, keys_BSH: Tensor, values_BSH: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """Compute the new state of the first token: (B, S, H) -> (B, 1, H)."""
        return self._tokens(self._first, 0, 1, hidden_BSH, keys_BSH, values_BSH, mask_B11S)

    def others(
        self, hidden_BSH: Tensor, keys_BSH: Tensor, values_BSH: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """Compute the new states of all tokens but the first: (B, S, H) -> (B, S-1, H)."""
        if hidden_BSH.shape[1] == 1:
            return hidden_BSH[:, 1:]
        num_keys = hidden_BSH.shape[1]
        return self._tokens(self._others, 1, num_keys, hidden_BSH, keys_BSH, values_BSH, mask_B11S)

    def _tokens(
        self,
        graph: Block,
        start: int,
        end: int,
        hidden_BSH: Tensor,
        keys_BSH: Tensor,
        values_BSH: Tensor,
        mask_B11S: Tensor | None,
    ) -> Tensor:
        """Compute the new states of the tokens from `start` to before `end`."""
        size = hidden_BSH.shape[:2]
        mask_BS = torch.ones(size) if mask_B11S is None else mask_B11S[:, 0, 0]
        given = [hidden_BSH[:, start:end], keys_BSH, values_BSH, mask_BS.int()]
        if self.parts.bias_AD is not None:
            given.append(bias_of_tokens(self.parts.bias_AD, start, end - start, size[1])[None])
        return graph(*(each.numpy() for each in given))["new"]

    # The graphs. Each is built and loaded the first time that it is used.

    @cached_property
    def _keys_values(self) -> Block:
        fused = self.runtime.name == "onnx"
        return self.runtime.load(onnx_graphs.keys_values(self.parts, self.first_int8, fused=fused))

    @cached_property
    def _first(self) -> Block:
        return self._graph_of(self.first_int8)

    @cached_property
    def _others(self) -> Block:
        if self.int8 == self.first_int8:
            return self._first
        return self._graph_of(self.int8)

    def _graph_of(self, int8: LayerRanges | None) -> Block:
        fused = self.runtime.name == "onnx"
        return self.runtime.load(onnx_graphs.tokens(self.parts, self.num_heads, int8, fused=fused))
