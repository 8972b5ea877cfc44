"""An ONNX graph that is being built: operators, constants, branches and the file.

This module knows nothing of models.
Shapes: B batch, S tokens, T of them that are computed, H hidden.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

FUSED = "com.microsoft"  # the domain of ONNX Runtime's own operators


class Nodes:
    """The nodes and constants of a graph.

    Each method adds operators and returns the name of their output.

    Attributes:
        axes: the names of the axes of an input or output, one letter each; `BTH` where it has none.
        types: its type; `FLOAT` where it has none.
    """

    axes: ClassVar[Mapping[str, str]] = {}
    types: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self._numbers = itertools.count()  # of values, those of branches, too

    def cut(self, x: str, start: int, end: int, axis: int = 1) -> str:
        """Add the selection of the tokens from `start` to before `end`: (B, S, H) -> (B, T, H)."""
        return self.op("Slice", x, *(self.integer([number]) for number in (start, end, axis)))

    def integer(self, numbers: int | list[int]) -> str:
        """Add a constant of int64."""
        return self.constant(np.array(numbers, np.int64))

    def constant(self, values: Any) -> str:
        """Add a constant."""
        name = f"c{next(self._numbers)}"
        self.constants[name] = np.ascontiguousarray(values).reshape(np.shape(values))
        return name

    def op(self, name: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add an operator."""
        from onnx import helper

        output = f"n{next(self._numbers)}"
        self.nodes.append(helper.make_node(name, inputs, [output], domain=domain, **attributes))
        return output

    def branch(
        self, condition: str, then: Callable[[], list[str]], otherwise: Callable[[], list[str]]
    ) -> list[str]:
        """Add an `If`: (1,) bool -> the outputs of one of two branches.

        Args:
            condition: the name of the condition.
            then: adds the operators of the branch for True, and returns its outputs.
            otherwise: the same for False, with as many outputs.
        """
        from onnx import helper

        branches, around = [], (self.nodes, self.constants)
        for name, build in (("then", then), ("else", otherwise)):
            # A branch has its own constants: each call hands over what a branch has of the outside.
            self.nodes, self.constants = [], {}
            inner = build()
            # What a branch returns is made in it.
            inner = [self.op("Identity", each) for each in inner]
            outputs = [helper.make_empty_tensor_value_info(each) for each in inner]
            branches.append(helper.make_graph(self.nodes, name, [], outputs, self._initializers()))
        self.nodes, self.constants = around
        names = [f"n{next(self._numbers)}" for _ in inner]
        node = helper.make_node(
            "If", [condition], names, then_branch=branches[0], else_branch=branches[1]
        )
        self.nodes.append(node)
        return names

    def serialized(self, inputs: list[str], outputs: dict[str, str]) -> bytes:
        """Return the graph as the content of a file.

        Args:
            inputs: the names of the inputs.
            outputs: for the name of each output, the name that it has inside of the graph.
        """
        from onnx import TensorProto, helper

        def info(name: str) -> Any:
            kind = getattr(TensorProto, self.types.get(name, "FLOAT"))
            return helper.make_tensor_value_info(name, kind, list(self.axes.get(name, "BTH")))

        for name, inner in outputs.items():
            self.nodes.append(helper.make_node("Identity", [inner], [name]))
        graph = helper.make_graph(
            self.nodes,
            "block",
            [info(name) for name in inputs],
            [info(name) for name in outputs],
            self._initializers(),
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(FUSED, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return bytes(model.SerializeToString())

    def _initializers(self) -> list[Any]:
        from onnx import numpy_helper

        return [numpy_helper.from_array(values, name) for name, values in self.constants.items()]
