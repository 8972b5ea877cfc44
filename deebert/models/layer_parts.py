"""The parts that a layer and the embeddings of an encoder are made of, whatever its model type.

The engine runs these parts one by one. This module does not know which model has which parts
(`architectures` does).
Shapes: A attention heads, S tokens of an input, T of them that are computed, M the most tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerParts:
    """The parts of a BERT layer, without dropout, which is off where layers are run in parts.

    x = attention_norm(h + output(attention(query(h), key(h), value(h)))), then
    norm(x + down(activation(up(x)))).

    Attributes:
        bias_AD: what the attention scores of each head are raised by, for each distance from a
            token to the token that it attends to, from -(M-1) to M-1: (A, 2M-1). None: by nothing.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    attention_norm: nn.LayerNorm
    up: nn.Linear
    activation: Callable[[Tensor], Tensor]
    down: nn.Linear
    norm: nn.LayerNorm
    bias_AD: Tensor | None = None


@dataclass(frozen=True)
class EmbeddingParts:
    """The parts of the states before layer 1: projection(norm(words + types + positions)).

    Attributes:
        words: embeddings of token ids.
        types: embeddings of token types; None where the model has none.
        typed: True if the inputs give the types; if False, all tokens have the first type.
        positions: embeddings of positions.
        padding: the padding id, for RoBERTa: positions start after this number, and padding tokens
            have no position. None: positions start at 0.
        norm: layer norm of the sum.
        projection: from the size of the embeddings to that of the layers (ELECTRA); None where
            these are equal.
    """

    words: nn.Embedding
    types: nn.Embedding | None
    typed: bool
    positions: nn.Embedding
    padding: int | None
    norm: nn.LayerNorm
    projection: nn.Linear | None


def bias_of_tokens(bias_AD: Tensor, start: int, num: int, num_keys: int) -> Tensor:
    """Return the attention bias of some tokens: (A, D) -> (A, T, S).

    Args:
        bias_AD: the bias of each distance (`LayerParts.bias_AD`).
        start: the position of the first of the tokens.
        num: T, the number of these tokens.
        num_keys: S, the number of tokens that they attend to, from position 0.
    """
    zero = bias_AD.shape[1] // 2  # the place of distance 0
    # A window of S distances for each token, from the last token to the first: the later the
    # token, the smaller the distance of the first key.
    distances = bias_AD[:, zero - start - num + 1 : zero - start + num_keys]
    return distances.unfold(1, num_keys, 1).flip(1)
