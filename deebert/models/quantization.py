"""How the linear maps of a model's layers are rounded to 8 bits (`precision=int8`).

The quantization is static: the range of each input is measured once, on rows that are not reported
(`inference.quantize`), and is the same for every batch. So an answer does not depend on the rest of
its batch, and every runtime computes the same numbers, to rounding. Weights have a scale for each
output. States between layers, norms, attention and ramps stay in float32.
L: layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from deebert.errors import UserError, is_number, is_whole
from deebert.untrusted.plain_files import LAYERS

WEIGHT_BITS = (7, 8)
LARGEST = 1e6  # the largest input that a range may hold


class Rounding(NamedTuple):
    """The rounding of one linear map.

    Attributes:
        low: the smallest input, 0 or less; smaller ones become this one.
        high: the largest input, 0 or more.
        weight_bits: 8, or 7 where the processor adds products of 8 bits in 16 bits, which they
            would overflow.
    """

    low: float
    high: float
    weight_bits: int

    @property
    def step(self) -> float:
        """The distance between two of the 256 values that an input can take."""
        return max(self.high - self.low, 1e-9) / 255

    @property
    def zero(self) -> int:
        """The number, from 0 to 255, that stands for an input of 0."""
        return round(-self.low / self.step)

    @property
    def largest_weight(self) -> int:
        """The largest whole number that a weight becomes."""
        return 2 ** (self.weight_bits - 1) - 1


class LayerRounding(NamedTuple):
    """The rounding of a layer's linear maps; query, key and value have the same input."""

    attention: Rounding
    output: Rounding
    up: Rounding
    down: Rounding


@dataclass(frozen=True)
class Quantization:
    """The quantization of a model.

    Attributes:
        layers: the rounding of each layer.
        split: the name of the split whose rows the ranges were measured on.
        num_rows: the number of these rows.
    """

    layers: tuple[LayerRounding, ...]
    split: str
    num_rows: int

    @property
    def weight_bits(self) -> int:
        """The number of bits of the weights."""
        return self.layers[0].attention.weight_bits

    def with_weight_bits(self, bits: int) -> Self:
        """Return the same ranges with weights of other bits."""
        layers = (
            LayerRounding(*(each._replace(weight_bits=bits) for each in layer))
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def plain(self) -> dict[str, Any]:
        """Return plain values, for a file."""
        ranges = [[[each.low, each.high] for each in layer] for layer in self.layers]
        return {
            "weight_bits": self.weight_bits,
            "split": self.split,
            "num_rows": self.num_rows,
            "ranges": ranges,
        }

    @classmethod
    def from_plain(cls, values: Any) -> Self:
        """Build a quantization from the plain values of a file that somebody else may have written.

        Raises:
            UserError: a value is missing or is not one of its kind.
        """
        if not isinstance(values, Mapping) or {*values} != {
            "weight_bits", "split", "num_rows", "ranges"
        }:  # fmt: skip
            raise UserError("its quantization has other values than weight_bits, split, ...")
        bits, ranges = values["weight_bits"], values["ranges"]
        if not is_whole(bits) or bits not in WEIGHT_BITS or not is_whole(values["num_rows"]):
            raise UserError(f"its quantization has weights of {bits!a} bits, not 7 or 8")
        if not isinstance(values["split"], str):
            raise UserError(f"its quantization is of split {values['split']!a}")
        if not isinstance(ranges, list) or not 1 <= len(ranges) <= LAYERS:
            raise UserError("its quantization has no list of layers")
        if not all(_are_ranges(layer) for layer in ranges):
            raise UserError(
                f"its quantization has a layer without {len(LayerRounding._fields)} ranges"
            )
        layers = [
            LayerRounding(*(Rounding(float(low), float(high), bits) for low, high in layer))
            for layer in ranges
        ]
        return cls(tuple(layers), values["split"], values["num_rows"])


def _are_ranges(layer: Any) -> bool:
    """Say whether a layer's plain values are a range for each of its inputs."""
    return (
        isinstance(layer, list)
        and len(layer) == len(LayerRounding._fields)
        and all(
            isinstance(each, list)
            and len(each) == 2
            and all(is_number(value) and math.isfinite(value) for value in each)
            and -LARGEST <= each[0] <= 0 <= each[1] <= LARGEST
            for each in layer
        )
    )
