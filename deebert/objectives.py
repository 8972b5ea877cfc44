"""Objectives: logits of every ramp + labels -> the loss to minimise. Pure functions.

Knows nothing of stages, optimizers or models. Shapes: B batch, L layers (= ramps), C labels;
C = 1 means regression (mean squared error instead of cross-entropy).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def ramp_losses(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean loss of each ramp over the batch: (B, L, C), (B,) -> (L,)."""
    if logits_BLC.shape[-1] == 1:
        errors_BL = logits_BLC.squeeze(-1).float() - labels_B[:, None].float()
        return errors_BL.square().mean(0)
    losses = [F.cross_entropy(logits_BC.float(), labels_B) for logits_BC in logits_BLC.unbind(1)]
    return torch.stack(losses)


def final(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Stage 1 (paper, equation 2 with i = L): the loss of the final classifier alone."""
    return ramp_losses(logits_BLC[:, -1:], labels_B).sum()


def ramps(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Stage 2 (paper, equation 3): sum of the losses of every ramp but the last."""
    return ramp_losses(logits_BLC[:, :-1], labels_B).sum()


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"final": final, "ramps": ramps}
