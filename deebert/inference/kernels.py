"""Linear maps in torch, in float32 and bfloat16, and GELU.

A linear map is a callable (..., in) -> (..., out). It is made once from an `nn.Linear`, with the
weights in the layout that the device runs fastest. This module knows nothing of layers or exits.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation

log = logging.getLogger(__name__)

LinearMap = Callable[[Tensor], Tensor]


def warn_of_slow(precision: str, device: torch.device) -> None:
    """Warn if a device computes in this precision, but slowly."""
    if precision == "bfloat16" and device.type == "cpu" and not _packs(precision):
        log.warning("precision=bfloat16: this processor has no such arithmetic; it will be slow")


def linear_map(linear: nn.Linear, precision: str, device: torch.device) -> LinearMap:
    """Return the linear map of `linear` in a precision.

    The map returns bfloat16 in the precision bfloat16, else float32.
    """
    weight_OI, bias_O = linear.weight.detach(), linear.bias.detach()
    dtype = getattr(torch, precision)
    weight_OI, bias_O = weight_OI.to(device, dtype), bias_O.to(device, dtype)
    if device.type == "cpu" and _packs(precision):
        return PackedLinear(weight_OI, bias_O)
    return lambda x: _as(x, functional.linear(_rows(x, dtype), weight_OI, bias_O))


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of a tensor as a matrix: (..., in) -> (N, in).

    A slice of each input (all tokens but the first) would otherwise be multiplied input by input,
    which takes up to twice as long.
    """
    return x.to(dtype).reshape(-1, x.shape[-1])


def _as(x: Tensor, y: Tensor) -> Tensor:
    """Return the rows of y in the leading shape of x."""
    return y.view(*x.shape[:-1], y.shape[-1])


def _packs(precision: str) -> bool:
    """Say whether oneDNN computes in this precision on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return precision == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_few_sizes(
    activation: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return an activation whose use of memory does not grow. It may change its input.

    On the CPU, oneDNN computes GELU. It keeps a small prepared object for each number of tokens
    that it has seen. These objects lie between the batches and keep the heap from shrinking: with
    8,192 short texts at a time the peak was 1.3 GB, and 2.0 GB after five times as many texts. In
    steps of 64 tokens there are few sizes, and the peak stays at .9 GB. The steps work in place, so
    they are as fast as one piece.
    """
    is_gelu = isinstance(activation, GELUActivation) and activation.act is functional.gelu
    return _gelu_in_steps if is_gelu and device.type == "cpu" else activation


@contextmanager
def without_onednn() -> Iterator[None]:
    """Switch oneDNN off while the context lasts.

    This is for whole layers of the library, whose GELU cannot be replaced (see `in_few_sizes`).
    torch's own GELU keeps nothing and makes the layer a few percent slower. In float32 oneDNN
    computes nothing else in such a layer.
    """
    onednn = torch.backends.mkldnn
    before = onednn.enabled
    onednn.enabled = False  # type: ignore[assignment]  # a property of the module
    try:
        yield
    finally:
        onednn.enabled = before


def _gelu_in_steps(x: Tensor, step: int = 64) -> Tensor:
    """Compute GELU in place, `step` rows at a time."""
    rows = x.flatten(0, -2)
    whole = len(rows) - len(rows) % step
    for part in rows[:whole], rows[whole:]:
        if len(part):
            torch.ops.aten.gelu_(part)
    return rows.view(x.shape)


class PackedLinear:
    """A linear map for a few tokens, with weights in oneDNN's own layout.

    So a call does not have to convert the weights: 25 tokens x 384 x 1536 take 260 us, and 369 us
    with `functional.linear` (2 threads of an AVX2 processor). With more than about 200 tokens
    `functional.linear` is faster, by 9 % at 1,000 tokens, and is called instead.

    oneDNN keeps a prepared object of about 0.2 MB for each number of tokens that it has seen. So
    numbers above 16 are rounded up to a multiple of 16.
    """

    FEW = 200
    STEP = 16

    def __init__(self, weight_OI: Tensor, bias_O: Tensor) -> None:
        self.weight_OI = weight_OI
        # torch.compile calls this function when it freezes a model. It has no other public caller.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), None)
        self.bias_O = bias_O

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map: (..., in) -> (..., out)."""
        rows = _rows(x, self.bias_O.dtype)
        if len(rows) > self.FEW:
            return _as(x, functional.linear(rows, self.weight_OI, self.bias_O))
        spare = -len(rows) % self.STEP if len(rows) > self.STEP else 0
        if spare:
            rows = functional.pad(rows, (0, 0, 0, spare))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.packed, self.bias_O, "none", [], ""
        )
        return _as(x, y[: len(y) - spare])
