"""Linear maps in the precisions that the engine runs in: float32, bfloat16, int8; and GELU.

A linear map is a callable (..., in) -> (..., out) made once from an `nn.Linear`, its weights laid
out for the device. Knows nothing of layers or exits.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation

from deebert.errors import UserError, unknown

log = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16", "int8")

LinearMap = Callable[[Tensor], Tensor]


def check_precision(precision: str, device: torch.device) -> None:
    """Raises:
    UserError: there is no such precision, or not on this machine.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS, "precision")
    if precision == "int8" and (
        device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines
    ):
        raise UserError(
            f"precision=int8 needs an x86 processor and a torch built with fbgemm (here: "
            f"{device.type}); use precision=float32 or bfloat16"
        )
    if precision == "bfloat16" and device.type == "cpu" and not _packs(precision):
        log.warning("precision=bfloat16: this processor has no such arithmetic; it will be slow")


def linear_map(linear: nn.Linear, precision: str, device: torch.device) -> LinearMap:
    """The linear map of `linear` in this precision; the result is float32, or bfloat16 for that."""
    weight_OI, bias_O = linear.weight.detach(), linear.bias.detach()
    if precision == "int8":
        return Int8Linear(weight_OI, bias_O)
    dtype = getattr(torch, precision)
    weight_OI, bias_O = weight_OI.to(device, dtype), bias_O.to(device, dtype)
    if device.type == "cpu" and _packs(precision):
        return PackedLinear(weight_OI, bias_O)
    return lambda x: _as(x, functional.linear(_rows(x, dtype), weight_OI, bias_O))


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., in) -> (N, in): a slice of each input (all but its first token) would otherwise be one
    product for each, which takes up to twice as long."""
    return x.to(dtype).reshape(-1, x.shape[-1])


def _as(x: Tensor, y: Tensor) -> Tensor:
    """The rows of y, laid out as those of x."""
    return y.view(*x.shape[:-1], y.shape[-1])


def _packs(precision: str) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return precision == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_few_sizes(
    activation: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The activation as the engine runs it: may change what it is given.

    oneDNN computes GELU on the CPU, and keeps what it prepared for each number of tokens that it
    sees. Between batches that come and go, these small things pin the heap: with 8,192 short texts
    at a time its peak was 1.3 GB, then 2.0 GB after five times as many. In steps of 64 tokens there
    are few sizes: .9 GB, flat. In place it is as fast as in one piece.
    """
    is_gelu = isinstance(activation, GELUActivation) and activation.act is functional.gelu
    return _gelu_in_steps if is_gelu and device.type == "cpu" else activation


@contextmanager
def without_onednn() -> Iterator[None]:
    """For whole layers of the library, whose GELU is out of reach: torch's own is a few percent of
    the layer slower and keeps nothing. In float32 nothing else there is oneDNN's."""
    onednn = torch.backends.mkldnn
    before = onednn.enabled
    onednn.enabled = False  # type: ignore[assignment]  # a property of the module
    try:
        yield
    finally:
        onednn.enabled = before


def _gelu_in_steps(x: Tensor, step: int = 64) -> Tensor:
    rows = x.flatten(0, -2)
    whole = len(rows) - len(rows) % step
    for part in rows[:whole], rows[whole:]:
        if len(part):
            torch.ops.aten.gelu_(part)
    return rows.view(x.shape)


class PackedLinear:
    """For a few tokens, weights that lie as oneDNN wants them and are not laid out in each call.

    25 tokens x 384 x 1536: 260 us against 369 us of `functional.linear` (2 threads of an AVX2
    processor). With more than about 200 tokens `functional.linear` is faster, by 9 % at 1,000.

    oneDNN keeps what it prepares for each number of tokens that it sees, about 0.2 MB a time: from
    16 on they are rounded up to a multiple of 16.
    """

    FEW = 200
    STEP = 16

    def __init__(self, weight_OI: Tensor, bias_O: Tensor) -> None:
        self.weight_OI = weight_OI
        # What torch.compile calls when it freezes a model; the public way to it is that compiler.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), None)
        self.bias_O = bias_O

    def __call__(self, x: Tensor) -> Tensor:
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


class Int8Linear:
    """8-bit weights with a scale for each output, 8-bit inputs with a scale for each token.

    torch's kernels (fbgemm) take one scale for all tokens, by default the range of whatever else is
    in the batch. So each token is brought to [0, 1] first, and its range put back: an answer does
    not depend on the batch, and a token that is NaN spoils no other.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor) -> None:
        scale_O = weight_OI.abs().amax(1).clamp_min(1e-12) / 127
        with warnings.catch_warnings():  # the tensor type is on its way out, its kernels are not
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_channel(
                weight_OI.contiguous(),
                scale_O.double(),
                torch.zeros_like(scale_O, dtype=torch.long),
                axis=0,
                dtype=torch.qint8,
            )
            self.weight = torch.ops.quantized.linear_prepack(quantized, None)
            self.sum_O = quantized.dequantize().sum(1)  # of the weights as the kernel has them
        self.bias_O = bias_O
        # Without VNNI the kernel adds products in 16 bits, which 7-bit inputs cannot overflow.
        self.step = 1 / (255 if torch.cpu._is_vnni_supported() else 127)

    def __call__(self, x: Tensor) -> Tensor:
        least, largest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        span = (largest - least).clamp_min(1e-12)
        # With scale and zero point given; what torch.export makes of a quantized model calls it.
        y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            (x - least).div_(span), self.step, 0, self.weight
        )
        return y.mul_(span).addcmul_(least, self.sum_O).add_(self.bias_O)
