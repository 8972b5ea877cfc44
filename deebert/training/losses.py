"""Losses: pure functions from the logits of every ramp and the labels.

The objectives are made of them (`objectives`). This module does not know optimizers or models.

Shapes: B batch, L layers (= ramps), K = L - 1 ramps before the last, C labels. C = 1 means
regression, with mean squared error instead of cross-entropy.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from deebert.data.tasks import UNLABELLED
from deebert.exits.rules import entropy


def ramp_losses(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the mean loss of each ramp over the batch: (B, L, C), (B,) -> (L,)."""
    if logits_BLC.shape[-1] == 1:
        errors_BL = logits_BLC.squeeze(-1).float() - labels_B[:, None].float()
        return errors_BL.square().mean(0)
    losses = [F.cross_entropy(logits_BC.float(), labels_B) for logits_BC in logits_BLC.unbind(1)]
    return torch.stack(losses)


def final(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the loss of the final classifier alone (paper, equation 2 with i = L)."""
    return ramp_losses(logits_BLC[:, -1:], labels_B).sum()


def ramps(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the sum of the losses of every ramp but the last (paper, equation 3)."""
    return ramp_losses(logits_BLC[:, :-1], labels_B).sum()


def leaving_shares(logits_BLC: Tensor) -> Tensor:
    """Return the share of thresholds at which each row leaves at each ramp: (B, L, C) -> (B, L).

    A row leaves at the first ramp whose entropy is under the threshold (paper, section 3.3), or at
    the last ramp. The thresholds are all entropies of the batch at the ramps before the last, with
    equal weight. They therefore fit the entropies at every point of the training.
    """
    entropy_BK = entropy(logits_BLC[:, :-1])
    thresholds = entropy_BK.flatten().sort().values
    lowest_BK = entropy_BK.cummin(1).values.contiguous()
    stays_BK = torch.searchsorted(thresholds, lowest_BK, right=True) / len(thresholds)
    return -F.pad(F.pad(stays_BK, (1, 0), value=1.0), (0, 1)).diff(dim=1)


def distance(student_BKC: Tensor, teacher_B1C: Tensor, temperature: float) -> Tensor:
    """Return T² KL(teacher || student), in a regression the squared differences: -> (B, K)."""
    if student_BKC.shape[-1] == 1:
        return (student_BKC.float() - teacher_B1C.float()).squeeze(-1).square()
    student_BKC = (student_BKC.float() / temperature).log_softmax(-1)
    teacher_B1C = (teacher_B1C.float() / temperature).log_softmax(-1)
    return (teacher_B1C.exp() * (teacher_B1C - student_BKC)).sum(-1) * temperature**2


def labelled(labels_B: Tensor) -> Tensor:
    """Say for each row whether it has a label: (B,) bool."""
    return ~labels_B.isnan() if labels_B.is_floating_point() else labels_B != UNLABELLED


def exit_loss(
    learned_score_BL: Tensor, logits_BLC: Tensor, labels_B: Tensor, predicts: str
) -> Tensor:
    """Return the loss that trains a learned exit score to predict errors of its ramp.

    The loss is the sum, over the ramps before the last, of the mean squared difference between the
    score and the error. In classification the error is 1 or 0 (BERxiT, Xin et al., EACL 2021,
    section 4). In a regression it is tanh |difference|, as in BERxiT's code.

    Args:
        learned_score_BL: the scores, between 0 and 1.
        logits_BLC: the logits of every ramp.
        labels_B: the labels; UNLABELLED or NaN where a row has none. With `wrong`, such rows are
            left out.
        predicts: `wrong`: the error is a difference from the label. `disagrees`: it is a difference
            from the final classifier (CATs).
    """
    if predicts == "wrong":
        labelled_B = labelled(labels_B)
        learned_score_BL, logits_BLC, labels_B = (
            learned_score_BL[labelled_B],
            logits_BLC[labelled_B],
            labels_B[labelled_B],
        )
    logits_BLC = logits_BLC.detach()
    if logits_BLC.shape[-1] == 1:
        prediction_BL = logits_BLC.squeeze(-1)
        truth_B = labels_B if predicts == "wrong" else prediction_BL[:, -1]
        error_BL = (prediction_BL - truth_B[:, None]).abs().tanh()
    else:
        prediction_BL = logits_BLC.argmax(-1)
        truth_B = labels_B if predicts == "wrong" else prediction_BL[:, -1]
        error_BL = (prediction_BL != truth_B[:, None]).float()
    return (learned_score_BL - error_BL)[:, :-1].square().sum() / max(len(labels_B), 1)
