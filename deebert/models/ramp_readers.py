"""Ramp readers: what a ramp reads of a layer's tokens.

Each reader is one class, registered by its name with `@reader("name")`. The class holds the torch
computation, the facts that the engine, stage 2 and the checks need, the ONNX nodes and the count of
operations. The module knows nothing of ramps' classifiers, of training and of how graphs are run,
and imports no ONNX.

Shapes: B batch, S tokens, T of them that are computed, H hidden, F features (a multiple of H).
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from deebert.errors import UserError, unknown

# Inputs of every ONNX graph of a layer, beside its states (`onnx_graphs.layer`).
MASK = "mask"  # (B, S) int32, 1 at real tokens
SECOND = "second"  # (B,) int64, the start of each second text; if `Reader.needs_second_text`


class LayerStates(NamedTuple):
    """The states before and after a layer.

    Attributes:
        before_BSH: input of the layer.
        after_BTH: output of the layer: all tokens, or at least the first one if the reader's
            `reads_tokens` is False.
        mask_BS: True or 1 at real tokens; None: all tokens are real.
        second_B: start of the second text of each input (`ramps.second_text`); None unless the
            reader's `needs_second_text` is True.
    """

    before_BSH: Tensor
    after_BTH: Tensor
    mask_BS: Tensor | None
    second_B: Tensor | None


class Graph(Protocol):
    """The part of `onnx_graphs.Graph` that a reader uses. Each method returns a tensor's name."""

    def op(self, name: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add an operator."""

    def constant(self, values: Any) -> str:
        """Add a constant."""

    def integer(self, numbers: int | list[int]) -> str:
        """Add a constant of int64."""

    def linear(self, x: str, linear: nn.Linear) -> str:
        """Add a linear map: (..., in) -> (..., out)."""


class Reader:
    """The base class of all readers. A reader has no state: a ramp holds the weights.

    Attributes:
        name: the name that `@reader` gave it.
        num_parts: number of vectors (H,) that the features consist of: F = num_parts x H.
        reads_tokens: whether other tokens of the layer's output are read than the first. If so, all
            of them must be computed before the ramp, and an input that leaves at layer k costs k
            layers; if not, about k - 5/6 (`engine`).
        needs_second_text: whether the start of the second text is read. The tokenizer must then
            have a separator.
        takes_pooler: whether the ramp's pooler starts as a copy of the backbone's pretrained
            pooler, which was trained on the first token of the last layer.
        of_one_text: name of a smaller reader that reads the same from a single text; None if there
            is none.
    """

    name: ClassVar[str]
    num_parts: ClassVar[int] = 1
    reads_tokens: ClassVar[bool] = True
    needs_second_text: ClassVar[bool] = False
    takes_pooler: ClassVar[bool] = False
    of_one_text: ClassVar[str | None] = None

    def weights(self, hidden_size: int) -> dict[str, nn.Module]:
        """Make the trained modules of the reader, by the attribute of the ramp that holds each.

        Linear maps are initialized as those of the ramp. Other modules stay as they are made.
        """
        return {}

    def read(self, states: LayerStates, ramp: nn.Module) -> Tensor:
        """Compute the features of a ramp: -> (B, F).

        Args:
            states: the states before and after the layer.
            ramp: the `Ramp`, which holds the modules of `weights`.
        """
        raise NotImplementedError

    def onnx(self, graph: Graph, before: str, after: str, ramp: nn.Module) -> str:
        """Add the nodes of `read` to an ONNX graph. Without this method, only torch can read.

        The inputs `MASK` and, if `needs_second_text`, `SECOND` are in the graph, too.

        Args:
            graph: the graph that is built.
            before: name of the layer's input (B, S, H).
            after: name of the layer's output (B, T, H).
            ramp: the `Ramp`, which holds the modules of `weights`.

        Returns:
            The name of the features (B, F), float32.
        """
        raise NotImplementedError

    def operations(self, num_tokens: int, hidden_size: int) -> int:
        """Count the operations of matrix products in `read` for one input; a mean has none."""
        return 0

    @property
    def has_weights(self) -> bool:
        """True if the reader is trained, so that stage 2 cannot cache what it reads."""
        return type(self).weights is not Reader.weights

    @property
    def has_onnx(self) -> bool:
        """True if the reader can be part of an ONNX graph."""
        return type(self).onnx is not Reader.onnx


READERS: dict[str, Reader] = {}
Kind = TypeVar("Kind", bound=type[Reader])


def reader(name: str) -> Callable[[Kind], Kind]:
    """Return the decorator that registers a class of readers under a name.

    Args:
        name: the value of `ramp.reads`.

    Raises:
        UserError: another class has the name.
    """

    def register(kind: Kind) -> Kind:
        known = type(READERS.get(name, kind))
        if name in READERS and (known.__module__, known.__qualname__) != (
            kind.__module__,
            kind.__qualname__,
        ):
            raise UserError(
                f"the ramp reader {name!r} is {known.__module__}.{known.__qualname__} already; "
                f"give {kind.__module__}.{kind.__qualname__} another name"
            )
        kind.name = name
        READERS[name] = kind()
        return kind

    return register


def named(name: Any) -> Reader:
    """Return the reader of a name.

    Raises:
        UserError: no reader of this name is registered.
    """
    if not isinstance(name, str) or name not in READERS:
        raise unknown("ramp.reads", name, READERS, "ramp.reads", own=True)
    return READERS[name]


@reader("first")
class First(Reader):
    """The first token of layer k, as in the paper."""

    reads_tokens = False
    takes_pooler = True

    def read(self, states: LayerStates, ramp: nn.Module) -> Tensor:
        return states.after_BTH[:, 0]

    def onnx(self, graph: Graph, before: str, after: str, ramp: nn.Module) -> str:
        return graph.op("Gather", after, graph.integer(0), axis=1)


@reader("mean")
class Mean(Reader):
    """The mean of the tokens of layer k."""

    def read(self, states: LayerStates, ramp: nn.Module) -> Tensor:
        return mean(states.after_BTH, states.mask_BS)

    def onnx(self, graph: Graph, before: str, after: str, ramp: nn.Module) -> str:
        return mean_node(graph, after)


@reader("pair")
class Pair(Reader):
    """(u + v) / 2, u - v and |u - v|, where u and v are the means of the tokens of two texts.

    It is for tasks that compare two texts. These are the features of Sentence-BERT (Reimers and
    Gurevych, EMNLP 2019), with u and v rotated by 45 degrees. A single text counts as both texts.
    """

    num_parts = 3
    needs_second_text = True
    of_one_text = "mean"  # the other two parts are 0

    def read(self, states: LayerStates, ramp: nn.Module) -> Tensor:
        states_BSH, mask_BS = states.after_BTH, states.mask_BS
        assert states.second_B is not None
        place_S = torch.arange(states_BSH.shape[1], device=states_BSH.device)
        first_BS = place_S < states.second_B[:, None]
        second_BS = ~first_BS
        if mask_BS is not None:
            first_BS, second_BS = first_BS & mask_BS.bool(), second_BS & mask_BS.bool()
        second_BS = torch.where(second_BS.any(1, keepdim=True), second_BS, first_BS)
        first_BH, second_BH = mean(states_BSH, first_BS), mean(states_BSH, second_BS)
        apart_BH = first_BH - second_BH
        return torch.cat([(first_BH + second_BH) / 2, apart_BH, apart_BH.abs()], -1)

    def onnx(self, graph: Graph, before: str, after: str, ramp: nn.Module) -> str:
        real, begins = real_node(graph), graph.op("Unsqueeze", SECOND, graph.integer([1, 2]))
        number = graph.op("CumSum", graph.op("Cast", real, to=7), graph.integer(1))  # from 1, int64
        first = graph.op("Cast", graph.op("LessOrEqual", number, begins), to=1)
        first = graph.op("Mul", first, real)
        second = graph.op("Sub", real, first)
        has_second = graph.op("ReduceMax", second, graph.integer([1]), keepdims=1)
        second = graph.op("Where", graph.op("Cast", has_second, to=9), second, first)  # to bool
        u, v = mean_node(graph, after, first), mean_node(graph, after, second)
        half = graph.constant(np.array(0.5, np.float32))
        apart = graph.op("Sub", u, v)
        middle = graph.op("Mul", graph.op("Add", u, v), half)
        return graph.op("Concat", middle, apart, graph.op("Abs", apart), axis=1)


@reader("first_and_mean")
class FirstAndMean(Reader):
    """The first token of layer k, and the mean of the tokens of layer k-1 (k = 1: the embeddings).

    The states of layer k-1 exist before layer k is run, so the cost is that of `first`.
    """

    num_parts = 2
    reads_tokens = False

    def read(self, states: LayerStates, ramp: nn.Module) -> Tensor:
        first_BH = states.after_BTH[:, 0]
        return torch.cat([first_BH, mean(states.before_BSH, states.mask_BS)], -1)

    def onnx(self, graph: Graph, before: str, after: str, ramp: nn.Module) -> str:
        first = graph.op("Gather", after, graph.integer(0), axis=1)
        return graph.op("Concat", first, mean_node(graph, before), axis=1)


@reader("attention")
class Attention(Reader):
    """The tokens of layer k, weighted by a softmax over a learned score of each."""

    def weights(self, hidden_size: int) -> dict[str, nn.Module]:
        return {"attention": nn.Linear(hidden_size, 1)}

    def read(self, states: LayerStates, ramp: nn.Module) -> Tensor:
        score_BT = cast(nn.Linear, ramp.attention)(states.after_BTH).squeeze(-1)
        if states.mask_BS is not None:
            score_BT = score_BT.masked_fill(~states.mask_BS.bool(), -torch.inf)
        return (score_BT.softmax(-1)[:, None] @ states.after_BTH).squeeze(1)

    def onnx(self, graph: Graph, before: str, after: str, ramp: nn.Module) -> str:
        score = graph.linear(after, cast(nn.Linear, ramp.attention))  # (B, S, 1)
        padding = graph.op("Sub", real_node(graph), graph.constant(np.array(1, np.float32)))
        padding = graph.op("Mul", padding, graph.constant(np.array(1e30, np.float32)))
        weights = graph.op("Softmax", graph.op("Add", score, padding), axis=1)
        weighted = graph.op("Mul", after, weights)
        return graph.op("ReduceSum", weighted, graph.integer([1]), keepdims=0)

    def operations(self, num_tokens: int, hidden_size: int) -> int:
        return 4 * num_tokens * hidden_size  # 2 S H each: the scores, and the weighted sum


def mean(states_BSH: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Compute the mean over the tokens of a mask, None for all: (B, S, H) -> (B, H)."""
    if mask_BS is None:
        return states_BSH.mean(1)
    mask_BS1 = mask_BS[..., None].to(states_BSH.dtype)
    return (states_BSH * mask_BS1).sum(1) / mask_BS1.sum(1)


def mean_node(graph: Graph, states: str, over: str | None = None) -> str:
    """Add the mean over tokens to an ONNX graph: (B, S, H) -> (B, H).

    Args:
        graph: the graph that is built.
        states: the states of the tokens.
        over: the tokens to average, 1 or 0 (B, S, 1); None: the real tokens.
    """
    over = over or real_node(graph)
    total = graph.op("ReduceSum", graph.op("Mul", states, over), graph.integer([1]), keepdims=0)
    return graph.op("Div", total, graph.op("ReduceSum", over, graph.integer([1]), keepdims=0))


def real_node(graph: Graph) -> str:
    """Add the mask as numbers, 1 at real tokens and 0 elsewhere: (B, S) -> (B, S, 1)."""
    return graph.op("Unsqueeze", graph.op("Cast", MASK, to=1), graph.integer([2]))  # to float
