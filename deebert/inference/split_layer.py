"""A transformer layer in torch that can be run for some of its tokens ("first token first").

It is a post-norm layer, as in BERT: attention, residual, norm, feed-forward, residual, norm. This
module knows nothing of ramps or exits.
Shapes: B batch, S tokens of an input, T of them that are computed, H hidden, A attention heads,
D width of a head (of `bias_AD`: distances between tokens).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deebert.inference.kernels import LinearMap, in_few_sizes, linear_map
from deebert.models.layer_parts import LayerParts, bias_of_tokens


class Maps(NamedTuple):
    """The linear maps of a layer that work token by token, in one precision."""

    query: LinearMap
    output: LinearMap
    up: LinearMap
    down: LinearMap

    @classmethod
    def of(cls, parts: LayerParts, precision: str, device: torch.device) -> "Maps":
        """Return the maps of a layer in a precision."""
        return cls(*(linear_map(getattr(parts, name), precision, device) for name in cls._fields))


class SplitLayer:
    """One layer, in eval mode and without gradients.

    A ramp that reads only the first token needs the keys and values of all tokens, a sixth of the
    layer's work. It needs queries, attention, output and feed-forward of the first token only. The
    other tokens are computed later, and only for the inputs that go on.

    The states between layers are float32 in every precision.

    Args:
        parts: the layer's modules.
        num_heads: the number of attention heads.
        precision: the precision of the linear maps: float32 or bfloat16.
        device: the device of the weights.
        exact_first: whether the first token is computed in float32 in every precision. In early
            layers the first tokens of different inputs differ by a thousandth of their size, which
            bfloat16 cannot represent. One token costs little. Ramps that read all tokens do not
            need it, since the mean of the tokens differs more between inputs.
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
        self.key_value = linear_map(_stacked(parts.key, parts.value), precision, device)
        self.fast = Maps.of(parts, precision, device)
        same = precision == "float32" or not exact_first
        self.exact = self.fast if same else Maps.of(parts, "float32", device)
        self.activation = in_few_sizes(parts.activation, device)
        self.attention_norm = parts.attention_norm
        self.norm = parts.norm
        self.bias_AD = None if parts.bias_AD is None else parts.bias_AD.to(device)

    def __call__(self, hidden_BSH: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """Run the layer for all tokens: (B, S, H) -> (B, S, H).

        Args:
            hidden_BSH: the states before the layer.
            mask_B11S: True at real tokens; None if there is no padding.
        """
        keys, values = self.keys_values(hidden_BSH)
        if self.fast is self.exact:
            return self._tokens(self.exact, hidden_BSH, keys, values, mask_B11S)
        first_B1H = self.first(hidden_BSH, keys, values, mask_B11S)
        return torch.cat([first_B1H, self.others(hidden_BSH, keys, values, mask_B11S)], 1)

    def keys_values(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of all tokens: (B, S, H) -> two of (B, A, S, D)."""
        key_BSH, value_BSH = self.key_value(hidden_BSH).chunk(2, dim=-1)
        return self._heads(key_BSH), self._heads(value_BSH)

    def first(
        self, hidden_BSH: Tensor, keys_BASD: Tensor, values_BASD: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """Compute the new state of the first token: (B, S, H) -> (B, 1, H)."""
        if self.exact is not self.fast:
            keys_BASD, values_BASD = keys_BASD.float(), values_BASD.float()
        return self._tokens(self.exact, hidden_BSH[:, :1], keys_BASD, values_BASD, mask_B11S)

    def others(
        self, hidden_BSH: Tensor, keys_BASD: Tensor, values_BASD: Tensor, mask_B11S: Tensor | None
    ) -> Tensor:
        """Compute the new states of all tokens but the first: (B, S, H) -> (B, S-1, H)."""
        if hidden_BSH.shape[1] == 1:
            return hidden_BSH[:, 1:]
        return self._tokens(self.fast, hidden_BSH[:, 1:], keys_BASD, values_BASD, mask_B11S, 1)

    def _tokens(
        self,
        maps: Maps,
        hidden_BTH: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        start: int = 0,
    ) -> Tensor:
        """Compute the new states of the tokens from position `start` on: (B, T, H) -> (B, T, H)."""
        queries_BATD = self._heads(maps.query(hidden_BTH))
        if self.bias_AD is not None:
            mask = _biased(self.bias_AD, start, queries_BATD, keys, mask)
        context_BATD = functional.scaled_dot_product_attention(queries_BATD, keys, values, mask)
        context_BTH = context_BATD.transpose(1, 2).flatten(2)
        hidden_BTH = self.attention_norm(hidden_BTH + maps.output(context_BTH))
        return self.norm(hidden_BTH + maps.down(self.activation(maps.up(hidden_BTH))))

    def _heads(self, x_BTH: Tensor) -> Tensor:
        """Split the states by attention head: (B, T, H) -> (B, A, T, D)."""
        return x_BTH.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _biased(
    bias_AD: Tensor, start: int, queries_BATD: Tensor, keys_BASD: Tensor, mask_B11S: Tensor | None
) -> Tensor:
    """Return what is added to the attention scores, the mask included: (B or 1, A, T, S)."""
    num, num_keys = queries_BATD.shape[2], keys_BASD.shape[2]
    bias_1ATS = bias_of_tokens(bias_AD, start, num, num_keys)[None]
    if mask_B11S is not None:
        bias_1ATS = bias_1ATS + torch.zeros_like(mask_B11S, dtype=bias_AD.dtype).masked_fill_(
            ~mask_B11S, -torch.inf
        )
    return bias_1ATS.to(queries_BATD.dtype)


def _stacked(key: torch.nn.Linear, value: torch.nn.Linear) -> torch.nn.Linear:
    """Join two linear layers into one, since one large matrix product is faster than two."""
    both = torch.nn.Linear(key.in_features, 2 * key.out_features, device="meta")
    both.weight = torch.nn.Parameter(torch.cat([key.weight, value.weight]).detach())
    both.bias = torch.nn.Parameter(torch.cat([key.bias, value.bias]).detach())
    return both
