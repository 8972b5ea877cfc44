"""Floating-point operations of an input that leaves at layer k, as a closed formula.

A matrix product (m, n) @ (n, p) counts 2 m n p, a multiply-add as 2; all else (embeddings, biases,
normalization, softmax, activations) counts 0: what torch.utils.flop_counter.FlopCounterMode counts
(under sdpa on CPU that counter misses the attention, so the tests hold this against eager). The
number of heads does not matter: their sizes add up to H.

Knows nothing of models or exit rules; a learned exit score is not counted. Plain integers, exact
at any size.
Shapes: N rows, S tokens, H hidden, I feed-forward, L layers (= ramps), C labels.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from deebert.models.ramps import PAPER, RampKind


class Sizes(NamedTuple):
    """What the cost of an encoder with ramps depends on: H, I, L, C, and the kind of its ramps."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_labels: int
    ramp: RampKind = PAPER


def sizes_of(config: Mapping[str, Any], num_labels: int, ramp: RampKind = PAPER) -> Sizes:
    """From the plain values of a Hugging Face configuration, in BERT's or DistilBERT's names."""
    if "dim" in config:
        hidden, intermediate, layers = "dim", "hidden_dim", "n_layers"
    else:
        hidden, intermediate, layers = "hidden_size", "intermediate_size", "num_hidden_layers"
    return Sizes(
        int(config[hidden]), int(config[intermediate]), int(config[layers]), num_labels, ramp
    )


def keys_values(sizes: Sizes, num_tokens: int) -> int:
    """Keys and values of S tokens, two products (S, H) @ (H, H): 4 S H²."""
    return 4 * num_tokens * sizes.hidden_size**2


def queries(sizes: Sizes, num_tokens: int, num_queries: int) -> int:
    """All else in a layer, for Q of its S tokens: query and output 4 Q H², attention 4 Q S H (the
    scores and the mix of the values), feed-forward 4 Q H I.
    """
    hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
    return 4 * num_queries * hidden * (hidden + num_tokens + intermediate)


def layer(sizes: Sizes, num_tokens: int) -> int:
    """A layer for all S tokens, 8 S H² + 4 S² H + 4 S H I; S counts padding, which is computed too.

    First token first costs the same if the input goes on: queries of 1 and of S-1 add up to S.
    """
    return keys_values(sizes, num_tokens) + queries(sizes, num_tokens, num_tokens)


def ramp(sizes: Sizes, num_tokens: int, layer: int) -> int:
    """Pooler and classifier after a layer, 2 F H + 2 P C: F features that it reads, P that its
    classifier does. The paper's, which is always the last: 2 H² + 2 H C.

    What a reader multiplies itself, it counts itself (`Reader.operations`).
    """
    kind = sizes.ramp if layer < sizes.num_layers else PAPER
    hidden, num_labels = sizes.hidden_size, sizes.num_labels
    pooled = hidden + (num_labels if kind.sees_previous else 0)
    read = kind.reader.operations(num_tokens, hidden)
    return 2 * kind.reader.num_parts * hidden * hidden + 2 * pooled * num_labels + read


def ramps(sizes: Sizes, num_tokens: int, exit_layer: int, evaluated_ramps: Collection[int]) -> int:
    """Each ramp that was run.

    Args:
        exit_layer: k, 1-based; its ramp gives the answer, so it is always run.
        asked: layers, 1-based, whose ramps are asked; those after k are not reached.
    """
    run = {*evaluated_ramps, exit_layer} & set(range(1, exit_layer + 1))
    return sum(ramp(sizes, num_tokens, layer) for layer in run)


def plain(sizes: Sizes, num_tokens: int, exit_layer: int, evaluated_ramps: Collection[int]) -> int:
    """An input of S tokens that leaves at layer k: k full layers and the ramps (see `ramps`)."""
    return exit_layer * layer(sizes, num_tokens) + ramps(
        sizes, num_tokens, exit_layer, evaluated_ramps
    )


def first_token_first(
    sizes: Sizes, num_tokens: int, exit_layer: int, evaluated_ramps: Collection[int]
) -> int:
    """The same, where layer k computes its first token alone from the keys and values of all.

    A ramp reads nothing else of layer k, so the other tokens wait for its answer, and at layer L
    are never needed. With I = 4H, keys and values are 1/6 of a layer but for the attention, so this
    is about k - 5/6 layers. Ramps that read all tokens of their layer cost as in `plain`.
    """
    if sizes.ramp.reads_tokens and exit_layer < sizes.num_layers:
        return plain(sizes, num_tokens, exit_layer, evaluated_ramps)
    return (
        (exit_layer - 1) * layer(sizes, num_tokens)
        + keys_values(sizes, num_tokens)
        + queries(sizes, num_tokens, 1)
        + ramps(sizes, num_tokens, exit_layer, evaluated_ramps)
    )


def total(
    sizes: Sizes,
    exit_layers_N: Tensor,
    num_tokens_N: Tensor,
    evaluated_ramps: Collection[int],
    cost: Callable[[Sizes, int, int, Collection[int]], int] = first_token_first,
) -> tuple[int, float]:
    """A whole set: (N,) exit layers, 1-based, and (N,) lengths, padding included where computed.

    Args:
        asked: as in `ramps`.
        cost: `plain` or `first_token_first`.

    Returns:
        FLOPs of all rows, and the share saved against all of them run plainly to full depth, with
        no ramp but the last, at the same lengths.
    """
    rows = Counter(zip(num_tokens_N.tolist(), exit_layers_N.tolist(), strict=True))
    spent = sum(n * cost(sizes, tokens, k, evaluated_ramps) for (tokens, k), n in rows.items())
    full = sum(n * plain(sizes, tokens, sizes.num_layers, ()) for (tokens, _), n in rows.items())
    return spent, 1 - spent / full
