"""The engine's settings: runtimes, sizes for each kind of device, and checks of what a user chose.

This module knows neither exit rules and ramps nor how a layer is run.
"""

from importlib.util import find_spec

import torch

from deebert.errors import UserError, first_line, unknown
from deebert.inference import onnx_stretches
from deebert.inference.kernels import warn_of_slow
from deebert.models.early_exit import EarlyExitModel
from deebert.models.quantization import Quantization

PRECISIONS = ("float32", "bfloat16", "int8")
RUNTIMES = ("auto", "torch", "onnx", "openvino")

# The number of tokens in a batch, measured on 2 CPU cores (benchmarks/speed.md). Matrix products
# reach their full speed at a few hundred rows, and larger states no longer fit the caches.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}
# A group of fewer tokens is too small to run alone while other groups may still join it. A layer
# takes 6 % more time a token with 500 tokens than with 2,000, and 20 % more with 230 tokens.
REGROUP_BELOW = {"cpu": 512, "cuda": 8192}
# The fixed cost of running a layer once, as a number of tokens. Merging two groups saves one such
# cost, so it may add as much padding.
GROUP_COSTS = {"cpu": 96, "cuda": 2048}
# "First token first" reads the weights of a layer twice. With fewer tokens that costs more than it
# can save.
FIRST_TOKEN_FROM = {"cpu": 64, "cuda": 512}


def kind_of(device: torch.device) -> str:
    """Return the key of a device in the tables of this module."""
    return "cpu" if device.type == "cpu" else "cuda"


def device_named(name: torch.device | str) -> torch.device:
    """Return the device, after a first allocation on it.

    Raises:
        UserError: there is no such device, or it cannot be used on this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        usable = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        reason = first_line(error)
        raise UserError(
            f"device={name} cannot be used here; choose one of: {usable} ({reason})"
        ) from error
    return device


def runtime_for(runtime: str, precision: str) -> str:
    """Return the library that `auto` stands for, or the one that was named.

    It is torch; in int8 it is ONNX Runtime, or OpenVINO where that alone is installed
    (benchmarks/int8.md).

    Raises:
        UserError: there is no such precision or runtime.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS, "precision")
    if runtime not in RUNTIMES:
        raise unknown("runtime", runtime, RUNTIMES, "runtime")
    if runtime != "auto":
        return runtime
    if precision != "int8":
        return "torch"
    alone = find_spec("onnxruntime") is None and find_spec("openvino") is not None
    return "openvino" if alone else "onnx"


def check(
    model: EarlyExitModel, precision: str, device: torch.device, runtime: str = "auto"
) -> None:
    """Check that a model can run in this precision and runtime on this device.

    Raises:
        UserError: the model cannot run so, or there is no such precision or runtime.
    """
    chosen = runtime_for(runtime, precision)
    if chosen == "torch":
        if precision == "int8":
            raise UserError(
                "precision=int8 runs in ONNX Runtime or OpenVINO, not in torch; use runtime=auto"
            )
        return warn_of_slow(precision, device)
    parts = model.backbone.parts(0)
    if parts is None:
        setting = "precision=int8" if runtime == "auto" else f"runtime={runtime}"
        raise UserError(
            f"{setting} needs layers that can be split, which "
            f"{model.config['model_type']} has not; use runtime=torch and "
            "precision=float32 or bfloat16"
        )
    onnx_stretches.check(parts, model.all_ramps[0], precision, device, chosen)


def check_quantization(
    model: EarlyExitModel, precision: str, quantization: Quantization | None
) -> None:
    """Check that int8 has a quantization, and that it is of as many layers as the model.

    Raises:
        UserError: it has none, or it is of another model.
    """
    if precision == "int8" and quantization is None:
        raise UserError("precision=int8 needs a quantization; `inference.quantize` makes it")
    if quantization and len(quantization.layers) != len(model.ramps):
        raise UserError(
            f"the quantization is of {len(quantization.layers)} layers, and the model has "
            f"{len(model.ramps)}"
        )
