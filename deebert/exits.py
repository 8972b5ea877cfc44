"""Exit rules: a score per ramp, and when to leave. Pure functions on logits (paper, section 3.3).

Knows nothing of models, tasks or files. Shapes: N rows, L layers (= ramps), C labels.
"""

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats: (..., C) -> (...), between 0 and ln C.

    Paper, section 3.3. Computed from a float32 log-softmax: the original's `-sum p log p` on
    probabilities turns to NaN when one underflows, so its most certain rows never leave.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def exit_layer(scores_NL: Tensor, thresholds: Tensor | float) -> Tensor:
    """The layer at which each row leaves: (N, L) -> (N,), 1-based.

    A row leaves at the first ramp whose score is strictly under its threshold (so 0 never exits);
    the last ramp is the final classifier and takes whatever is left.

    Args:
        scores_NL: uncertainty of every ramp; the last column is not looked at.
        thresholds: one number for all ramps, or L-1 numbers.
    """
    num_rows, num_layers = scores_NL.shape
    # A Python number compares in float64; keep the comparison in the scores' own precision.
    limits = torch.as_tensor(thresholds, dtype=scores_NL.dtype).expand(num_layers - 1)
    leaves = scores_NL[:, :-1] < limits
    always = torch.ones(num_rows, 1, dtype=torch.bool)
    return torch.cat([leaves, always], dim=1).int().argmax(1) + 1
