"""A transformer layer that can be run for some of its tokens: what "first token first" is made of.

Post-norm layers, as in BERT: attention, residual, norm, feed-forward, residual, norm. Knows nothing
of ramps or exits. Shapes: B batch, S tokens of an input, T of them that are computed, H hidden,
A attention heads, D width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deebert.inference.kernels import LinearMap, in_few_sizes, linear_map
from deebert.models.architectures import LayerParts


class Maps(NamedTuple):
    """The linear maps of a layer that work token by token, in one precision."""

    query: LinearMap
    output: LinearMap
    up: LinearMap
    down: LinearMap

    @classmethod
    def of(cls, parts: LayerParts, precision: str, device: torch.device) -> "Maps":
        return cls(*(linear_map(getattr(parts, name), precision, device) for name in cls._fields))


class SplitLayer:
    """One layer, in eval mode and without gradients.

    A ramp reads the first token only. That needs the keys and values of all tokens (a sixth of the
    layer's work), but queries, attention, output and feed-forward of the first token alone; the
    other tokens can wait until it is known that the input goes on.

    The states between layers are float32 in every precision.

    Args:
        exact_first: compute the first token in float32 in every precision. In early layers the
            first tokens of different inputs differ by a thousandth of their size, which neither
            bfloat16 nor int8 can tell apart. It is one token of many. Not needed where ramps read
            all tokens: their mean is not as faint.
    """

    def __init__(
        self,
        parts: LayerParts,
        num_heads: int,
        precision: str,
        device: torch.device,
        *,
        exact_first: bool = True,
    ) -> None:
        self.num_heads = num_heads
        # In int8 they would shift what the first token takes from all others, by several times what
        # tells inputs apart in early layers: half of the exits would be wrong.
        exact_keys = "float32" if precision == "int8" and exact_first else precision
        self.key_value = linear_map(_stacked(parts.key, parts.value), exact_keys, device)
        self.fast = Maps.of(parts, precision, device)
        same = precision == "float32" or not exact_first
        self.exact = self.fast if same else Maps.of(parts, "float32", device)
        self.activation = in_few_sizes(parts.activation, device)
        self.attention_norm = parts.attention_norm
        self.norm = parts.norm

    def __call__(self, hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """All tokens: (B, S, H) -> (B, S, H). `mask_B11S` is True at real tokens; None: all are."""
        keys, values = self.keys_values(hidden_BSH)
        if self.fast is self.exact:
            return self._tokens(self.exact, hidden_BSH, keys, values, mask_B11S)
        first_B1H = self.first(hidden_BSH, keys, values, mask_B11S)
        return torch.cat([first_B1H, self.others(hidden_BSH, keys, values, mask_B11S)], 1)

    def keys_values(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens: (B, S, H) -> two of (B, A, S, D)."""
        key_BSH, value_BSH = self.key_value(hidden_BSH).chunk(2, dim=-1)
        return self._heads(key_BSH), self._heads(value_BSH)

    def first(
        self, hidden_BSH: Tensor, keys_BASD: Tensor, values_BASD: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """The new state of the first token: (B, S, H) -> (B, 1, H)."""
        if self.exact is not self.fast:
            keys_BASD, values_BASD = keys_BASD.float(), values_BASD.float()
        return self._tokens(self.exact, hidden_BSH[:, :1], keys_BASD, values_BASD, mask_B11S)

    def others(
        self, hidden_BSH: Tensor, keys_BASD: Tensor, values_BASD: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """The new states of all tokens but the first: (B, S, H) -> (B, S-1, H)."""
        return self._tokens(self.fast, hidden_BSH[:, 1:], keys_BASD, values_BASD, mask_B11S)

    def _tokens(
        self, maps: Maps, hidden_BTH: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        queries_BATD = self._heads(maps.query(hidden_BTH))
        context_BATD = functional.scaled_dot_product_attention(queries_BATD, keys, values, mask)
        context_BTH = context_BATD.transpose(1, 2).flatten(2)
        hidden_BTH = self.attention_norm(hidden_BTH + maps.output(context_BTH))
        return self.norm(hidden_BTH + maps.down(self.activation(maps.up(hidden_BTH))))

    def _heads(self, x_BTH: Tensor) -> Tensor:
        return x_BTH.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _stacked(key: torch.nn.Linear, value: torch.nn.Linear) -> torch.nn.Linear:
    """One linear map in place of two: a matrix product twice as large runs faster."""
    both = torch.nn.Linear(key.in_features, 2 * key.out_features, device="meta")
    both.weight = torch.nn.Parameter(torch.cat([key.weight, value.weight]).detach())
    both.bias = torch.nn.Parameter(torch.cat([key.bias, value.bias]).detach())
    return both
