"""How the linear maps of a model's layers are quantized to 8 bits (`precision=int8`).

The quantization is static: the range of each input is measured once, on rows that are not reported
(`inference.quantize`), and is the same for every batch. So an answer does not depend on the rest of
its batch, and every runtime and processor computes the same numbers, to rounding. States between
layers, norms, attention and ramps stay in float32.
L: layers.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from deebert.errors import UserError, is_number, is_whole
from deebert.untrusted.plain_files import LAYERS

LARGEST = 1e6  # the largest input that a range may hold
# The largest whole number that a weight becomes; each output has a scale. 127 would fit, too. But
# processors without VNNI add two products of 8 bits in 16 bits, which they would overflow.
LARGEST_WEIGHT = 63
SPLIT = r"[\w.+-]{1,64}"


class InputRange(NamedTuple):
    """The inputs of a linear map that 8 bits can represent; others become the nearest of them.

    Attributes:
        low: the smallest input, 0 or less.
        high: the largest input, 0 or more.
    """

    low: float
    high: float

    @property
    def scale(self) -> float:
        """The distance between two of the 256 values that an input can take."""
        return max(self.high - self.low, 1e-9) / 255

    @property
    def zero_point(self) -> int:
        """The number, from 0 to 255, that stands for an input of 0."""
        return round(-self.low / self.scale)


class LayerRanges(NamedTuple):
    """The ranges of a layer's linear maps; query, key and value have the same input."""

    attention: InputRange
    output: InputRange
    up: InputRange
    down: InputRange


@dataclass(frozen=True)
class Quantization:
    """The quantization of a model.

    Attributes:
        layers: the ranges of each layer.
        split: the name of the split whose rows the ranges were measured on.
        num_rows: the number of these rows.
    """

    layers: tuple[LayerRanges, ...]
    split: str
    num_rows: int

    def plain(self) -> dict[str, Any]:
        """Return plain values, for a file."""
        ranges = [[list(each) for each in layer] for layer in self.layers]
        return {"split": self.split, "num_rows": self.num_rows, "ranges": ranges}

    @classmethod
    def from_plain(cls, values: Any) -> Self:
        """Build a quantization from the plain values of a file that somebody else may have written.

        Raises:
            UserError: a value is missing or is not one of its kind.
        """
        if not isinstance(values, Mapping) or {*values} != {"split", "num_rows", "ranges"}:
            raise UserError("its quantization has other values than split, num_rows and ranges")
        split, num_rows, ranges = values["split"], values["num_rows"], values["ranges"]
        if not isinstance(split, str) or not re.fullmatch(SPLIT, split):
            raise UserError(f"its quantization is of split {split!a}")
        if not is_whole(num_rows) or num_rows < 1:
            raise UserError(f"its quantization is of {num_rows!a} rows")
        if not isinstance(ranges, list) or not 1 <= len(ranges) <= LAYERS:
            raise UserError("its quantization has no list of layers")
        if not all(_are_ranges(layer) for layer in ranges):
            raise UserError(
                f"its quantization has a layer without {len(LayerRanges._fields)} ranges"
            )
        layers = [
            LayerRanges(*(InputRange(float(low), float(high)) for low, high in layer))
            for layer in ranges
        ]
        return cls(tuple(layers), split, num_rows)


def _are_ranges(layer: Any) -> bool:
    """Say whether a layer's plain values are a range for each of its inputs."""
    return (
        isinstance(layer, list)
        and len(layer) == len(LayerRanges._fields)
        and all(
            isinstance(each, list)
            and len(each) == 2
            and all(is_number(value) and math.isfinite(value) for value in each)
            and -LARGEST <= each[0] <= 0 <= each[1] <= LARGEST
            for each in layer
        )
    )
