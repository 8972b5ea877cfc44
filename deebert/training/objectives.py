"""Objectives: logits of every ramp + labels -> the loss to minimise. Pure functions.

An objective is a loss, the steps in which the final classifier's loss alone stands in for it, and
how the ramps' gradients flow through the backbone. `conf/objective/` names them.
Knows nothing of optimizers or models.
Shapes: B batch, L layers (= ramps), C labels; C = 1 means regression (mean squared error instead of
cross-entropy).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deebert.data.tasks import UNLABELLED
from deebert.errors import UserError, is_number, unknown
from deebert.exits.rules import entropy
from deebert.models.early_exit import Flow

MOST_WEIGHT = 1_000_000  # sums of losses so weighted stay far from float32's end

Loss = Callable[[Tensor, Tensor], Tensor]


def ramp_losses(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean loss of each ramp over the batch: (B, L, C), (B,) -> (L,)."""
    if logits_BLC.shape[-1] == 1:
        errors_BL = logits_BLC.squeeze(-1).float() - labels_B[:, None].float()
        return errors_BL.square().mean(0)
    losses = [F.cross_entropy(logits_BC.float(), labels_B) for logits_BC in logits_BLC.unbind(1)]
    return torch.stack(losses)


def final(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """The loss of the final classifier alone (paper, equation 2 with i = L)."""
    return ramp_losses(logits_BLC[:, -1:], labels_B).sum()


def ramps(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Sum of the losses of every ramp but the last (paper, equation 3)."""
    return ramp_losses(logits_BLC[:, :-1], labels_B).sum()


def joint(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Sum of the losses of every ramp (BERxiT, Xin et al., EACL 2021, equation 3)."""
    return ramp_losses(logits_BLC, labels_B).sum()


def weighted(
    logits_BLC: Tensor, labels_B: Tensor, *, weights: Sequence[float] | None = None
) -> Tensor:
    """Mean of the losses of every ramp, layer k's weighted by k (PABEE, Zhou et al., NeurIPS 2020,
    equation 5), or by the k-th of `weights`."""
    losses_L = ramp_losses(logits_BLC, labels_B)
    weight_L = losses_L.new_tensor(weights or range(1, len(losses_L) + 1))
    return (weight_L * losses_L).sum() / weight_L.sum()


def exit_weighted(logits_BLC: Tensor, labels_B: Tensor, *, exit_weight: float) -> Tensor:
    """Sum of the losses of every ramp, each row's weighted by how often that ramp answers it.

    mean over rows of sum over k of [1 - a + a L share(k)] loss(k), a = exit_weight, where
    `leaving_shares` says for what share of the batch's own entropies as threshold the row leaves at
    k. The part with a is L times the mean loss of early exit at these thresholds; the rest keeps
    ramps from knowing nothing of the rows that they hand on: they must know these as hard. Classes
    only.

    deebert's own. The aim is that of L2W-DEN (Han et al., ECCV 2022), where a second network learns
    the weights.
    """
    num_rows, num_layers = logits_BLC.shape[:2]
    losses_N = F.cross_entropy(
        logits_BLC.float().flatten(0, 1), labels_B.repeat_interleave(num_layers), reduction="none"
    )
    share_BL = leaving_shares(logits_BLC.detach())
    weight_BL = 1 - exit_weight + exit_weight * num_layers * share_BL
    return (weight_BL * losses_N.view(num_rows, num_layers)).sum(1).mean()


def leaving_shares(logits_BLC: Tensor) -> Tensor:
    """For what share of the thresholds each row leaves at each ramp: (B, L, C) -> (B, L).

    A row leaves at the first ramp whose entropy is under the threshold (paper, section 3.3), else
    at the last. The thresholds are the entropies of the batch's ramps before the last, each as
    likely as the others: so that some lie in between at any stage of the training.
    """
    entropy_BK = entropy(logits_BLC[:, :-1])
    thresholds = entropy_BK.flatten().sort().values
    lowest_BK = entropy_BK.cummin(1).values.contiguous()
    stays_BK = torch.searchsorted(thresholds, lowest_BK, right=True) / len(thresholds)
    return -F.pad(F.pad(stays_BK, (1, 0), value=1.0), (0, 1)).diff(dim=1)


def distill(
    logits_BLC: Tensor, labels_B: Tensor, *, temperature: float, label_weight: float
) -> Tensor:
    """The final classifier learns from the labels, the other ramps from it.

    loss(L) + sum over k < L of [label_weight loss(k) + (1 - label_weight) T² KL(p_L || p_k)], with
    probabilities at temperature T and no gradient into p_L. FastBERT (Liu et al., ACL 2020) is
    label_weight 0, T 1 in stage 2 (the direction of KL is its code's); T² keeps gradients alike at
    any T (Hinton et al. 2015). For a regression the second term is the squared difference of the
    values.

    Args:
        labels_B: UNLABELLED (or NaN, for a regression) where a row has no label.
    """
    apart_BK = _apart(logits_BLC[:, :-1], logits_BLC[:, -1:].detach(), temperature)
    loss = (1 - label_weight) * apart_BK.mean(0).sum()
    if (known_B := _labelled(labels_B)).any():
        losses_L = ramp_losses(logits_BLC[known_B], labels_B[known_B])
        loss = loss + losses_L[-1] + label_weight * losses_L[:-1].sum()
    return loss


def _apart(student_BKC: Tensor, teacher_B1C: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher || student) at temperature T, or squared differences of values: -> (B, K)."""
    if student_BKC.shape[-1] == 1:
        return (student_BKC.float() - teacher_B1C.float()).squeeze(-1).square()
    student_BKC = (student_BKC.float() / temperature).log_softmax(-1)
    teacher_B1C = (teacher_B1C.float() / temperature).log_softmax(-1)
    return (teacher_B1C.exp() * (teacher_B1C - student_BKC)).sum(-1) * temperature**2


def _labelled(labels_B: Tensor) -> Tensor:
    """Which rows have a label: (B,) bool."""
    return ~labels_B.isnan() if labels_B.is_floating_point() else labels_B != UNLABELLED


def student(logits_BLC: Tensor, labels_B: Tensor, *, label_weight: float) -> Tensor:
    """What a student learns from the labels: label_weight loss(L), over the rows that have one."""
    known_B = _labelled(labels_B)
    if not known_B.any():  # nothing, but with a way back
        return 0 * logits_BLC.sum()
    return label_weight * final(logits_BLC[known_B], labels_B[known_B])


def taught(
    logits_BLC: Tensor, teacher_BC: Tensor, *, temperature: float, label_weight: float
) -> Tensor:
    """What it learns from a larger model's final classifier: (1 - label_weight) T² KL(teacher || L)
    (DistilBERT, Sanh et al. 2019; in the authors' code run_squad_w_distillation.py, where the two
    weights are alpha_squad and alpha_ce)."""
    apart_B1 = _apart(logits_BLC[:, -1:], teacher_BC[:, None], temperature)
    return (1 - label_weight) * apart_B1.mean()


def exit_loss(
    learned_score_BL: Tensor, logits_BLC: Tensor, labels_B: Tensor, predicts: str
) -> Tensor:
    """What a learned exit score is to learn: sum over the ramps before the last of the mean squared
    difference from 1 where the ramp is off and 0 where not (BERxiT, Xin et al., EACL 2021, section
    4). For a regression that is tanh |difference| (as in its code).

    Args:
        learned_score_BL: the scores, between 0 and 1.
        labels_B: UNLABELLED or NaN where a row has none; what is `wrong` there nobody knows.
        predicts: `wrong`: off from the label; `disagrees`: from the final classifier (CATs).
    """
    if predicts == "wrong":
        known_B = _labelled(labels_B)
        learned_score_BL, logits_BLC, labels_B = (
            learned_score_BL[known_B],
            logits_BLC[known_B],
            labels_B[known_B],
        )
    said_BLC = logits_BLC.detach()
    if logits_BLC.shape[-1] == 1:
        said_BL = said_BLC.squeeze(-1)
        truth_B = labels_B if predicts == "wrong" else said_BL[:, -1]
        off_BL = (said_BL - truth_B[:, None]).abs().tanh()
    else:
        said_BL = said_BLC.argmax(-1)
        truth_B = labels_B if predicts == "wrong" else said_BL[:, -1]
        off_BL = (said_BL != truth_B[:, None]).float()
    return (learned_score_BL - off_BL)[:, :-1].square().sum() / max(len(labels_B), 1)


def equilibrium(num_layers: int) -> Flow:
    """Gradient equilibrium (Li et al., ICCV 2019, section 3.1, as in ElasticBERT, Liu et al., NAACL
    2022): of the R ramps from layer k on, k's own counts 1/R and the others together (R-1)/R, so
    that gradients do not grow towards the lower layers."""
    left = [num_layers - k for k in range(num_layers)]
    return Flow([1 / r for r in left], [(r - 1) / r for r in left])


def detached(num_layers: int) -> Flow:
    """Each layer learns from its own ramp alone (SWEET, Rotem et al., Findings of ACL 2023)."""
    return Flow([1.0] * num_layers, [0.0] * num_layers)


def _never(step: int, num_steps: int) -> bool:
    return False


@dataclass(frozen=True)
class Objective:
    """How the ramps are trained. It goes to other processes (ddp_spawn), so: named functions.

    Attributes:
        name: in results and messages.
        loss: (B, L, C) logits, (B,) labels -> scalar.
        stages: where it makes sense: stage 1 trains everything that the loss depends on, stage 2
            only the ramps before the last.
        alone: (step, number of steps) -> is it the turn of the final classifier's loss alone?
        flow: number of layers -> how gradients flow; None: as they are.
        trains_ramps: does it train ramps before the last?
        unlabelled: can it learn from rows without labels?
        needs_classes: can a regression not have it?
        taught: (B, L, C) logits, (B, C) those of a teacher's final classifier -> scalar that is
            added to the loss; None: there is no teacher.
        num_ramps: how many ramps, the last too, it is made for; None: any number.
    """

    name: str
    loss: Loss
    stages: tuple[int, ...] = (1,)
    alone: Callable[[int, int], bool] = _never
    flow: Callable[[int], Flow] | None = None
    trains_ramps: bool = True
    unlabelled: bool = False
    needs_classes: bool = False
    taught: Callable[[Tensor, Tensor], Tensor] | None = None
    num_ramps: int | None = None


def _in_turns(step: int, num_steps: int) -> bool:
    return step % 2 == 0


def _at_first(final_share: float, step: int, num_steps: int) -> bool:
    return step < round(final_share * num_steps)


def _weighted(weights: Sequence[float] | None = None) -> Objective:
    if weights is None:
        return Objective("weighted", weighted)
    is_list = isinstance(weights, Sequence) and not isinstance(weights, str)
    if not (
        is_list
        and all(is_number(each) and 0 <= each <= MOST_WEIGHT for each in weights)
        and any(weights[:-1])
    ):
        raise UserError(
            f"objective.weights={weights} must be a list of numbers from 0 to {MOST_WEIGHT}, one "
            "for each ramp, the last too, and not 0 for all before it"
        )
    loss = partial(weighted, weights=tuple(weights))
    return Objective("weighted", loss, num_ramps=len(weights))


def _mixed(final_share: float = 0.5) -> Objective:
    """The backbone first, then everything together (Kubaty et al., ICML 2025, "mixed")."""
    _check("final_share", final_share, 0, 1)
    return Objective("mixed", joint, alone=partial(_at_first, final_share))


def _distill(temperature: float = 1.0, label_weight: float = 0.0) -> Objective:
    _check_weights(temperature, label_weight)
    loss = partial(distill, temperature=temperature, label_weight=label_weight)
    return Objective("distill", loss, (1, 2), unlabelled=True)


def _exit_weighted(exit_weight: float = 0.5) -> Objective:
    _check("exit_weight", exit_weight, 0, 1)
    loss = partial(exit_weighted, exit_weight=exit_weight)
    return Objective("exit_weighted", loss, (1, 2), needs_classes=True)


def _student(temperature: float = 2.0, label_weight: float = 0.5) -> Objective:
    _check_weights(temperature, label_weight)
    loss = partial(student, label_weight=label_weight)
    from_teacher = partial(taught, temperature=temperature, label_weight=label_weight)
    return Objective("student", loss, trains_ramps=False, unlabelled=True, taught=from_teacher)


def _check_weights(temperature: float, label_weight: float) -> None:
    _check("temperature", temperature, 0.01, 100)
    _check("label_weight", label_weight, 0, 1)


# Options are keyword arguments; their values stand in conf/objective/.
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "final": lambda: Objective("final", final, trains_ramps=False),
    "ramps": lambda: Objective("ramps", ramps, stages=(2,)),
    "joint": lambda: Objective("joint", joint),
    "weighted": _weighted,
    # BERxiT, section 3.2: the final classifier alone and everything together, in turns.
    "alternating": lambda: Objective("alternating", joint, alone=_in_turns),
    "mixed": _mixed,
    "exit_weighted": _exit_weighted,
    "distill": _distill,
    "equilibrium": lambda: Objective("equilibrium", joint, flow=equilibrium),
    "detached": lambda: Objective("detached", joint, flow=detached),
    "student": _student,
}
PAPER = {1: "final", 2: "ramps"}


def build(values: Mapping[str, Any], stage: int) -> Objective:
    """The objective that `conf/objective/` names.

    Args:
        values: `name`, and what options it has.

    Raises:
        UserError: the name or an option is unknown, or it does not fit the stage.
    """
    name = values.get("name")
    here = [known for known in OBJECTIVES if stage in OBJECTIVES[known]().stages]
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise unknown("objective", name, here, "objective")
    options = {key: value for key, value in values.items() if key != "name"}
    known = inspect.signature(OBJECTIVES[name]).parameters
    for option in options:
        if option not in known:
            raise UserError(
                f"objective.{option}: {name} has "
                + (f"no such option; it has: {', '.join(known)}" if known else "no options")
            )
    objective = OBJECTIVES[name](**options)
    if stage not in objective.stages:
        raise UserError(
            f"objective={name} is for stage={objective.stages[0]}; in stage={stage} choose one of: "
            f"{', '.join(here)} (objective=...)"
        )
    return objective


def _check(option: str, value: Any, low: float, high: float) -> None:
    if not is_number(value) or not low <= value <= high:
        raise UserError(f"objective.{option}={value} must be a number between {low} and {high}")
