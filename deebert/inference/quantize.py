"""Measure the ranges that `precision=int8` rounds to, on rows that are not reported.

Shapes: B batch, S tokens, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deebert.data.batching import by_length, padded
from deebert.errors import UserError
from deebert.models.early_exit import EarlyExitModel
from deebert.models.quantization import LARGEST, InputRange, LayerRanges, Quantization

ROWS = 512  # inputs that ranges are measured on
# The module whose input has the range of each field of `LayerRanges`.
MEASURED = {"attention": "query", "output": "output", "up": "up", "down": "down"}


@torch.inference_mode()
def measure(
    model: EarlyExitModel, inputs: Sequence[Mapping[str, Any]], split: str, token_budget: int = 2048
) -> Quantization:
    """Measure the smallest and largest inputs of the linear maps of each layer, in float32.

    Args:
        model: the model, whose layers can be split.
        inputs: the tokens of some inputs, as `Engine.run` takes them. `ROWS` of them are enough.
        split: the split that they are of.
        token_budget: the largest number of tokens in a batch, padding included.

    Raises:
        UserError: there are no inputs, or the states are not finite.
    """
    if not len(inputs):
        raise UserError(f"precision=int8: split {split} has no rows to measure ranges on")
    backbone = model.eval().backbone
    ranges = [dict.fromkeys(MEASURED, (0.0, 0.0)) for _ in model.ramps]
    real_BS = torch.ones(1, 1, dtype=torch.bool)

    def watch(layer: int, name: str) -> Any:
        def hook(_: torch.nn.Module, given: tuple[Tensor]) -> None:
            low, high = ranges[layer][name]
            values = given[0][real_BS]
            ranges[layer][name] = min(low, values.min().item()), max(high, values.max().item())

        return hook

    hooks = [
        getattr(backbone.parts(layer), part).register_forward_pre_hook(watch(layer, name))
        for layer in range(len(ranges))
        for name, part in MEASURED.items()
    ]
    device = next(model.parameters()).device
    try:
        for rows in by_length([len(each["input_ids"]) for each in inputs], token_budget):
            tokens = padded([inputs[row] for row in rows], backbone.pad_token_id)
            on_device = {name: values.to(device) for name, values in tokens.items()}
            real_BS = on_device["attention_mask"].bool()
            hidden_BSH, context = backbone.embed(**on_device)
            for layer in range(len(ranges)):
                hidden_BSH = backbone.run_layer(layer, hidden_BSH, context)
            if not hidden_BSH[real_BS].isfinite().all():
                raise UserError(f"precision=int8: states of split {split} are not finite")
    finally:
        for each in hooks:
            each.remove()
    layers = tuple(
        LayerRanges(**{name: InputRange(*each) for name, each in layer.items()}) for layer in ranges
    )
    if any(max(-low, high) > LARGEST for layer in layers for low, high in layer):
        raise UserError(f"precision=int8: states of split {split} are larger than {LARGEST:g}")
    return Quantization(layers, split, len(inputs))
