"""Objectives: which losses train the ramps, and when.

Each objective is one class, registered by its name with `@objective("name")`. The class holds the
loss, the options with their checks, and the other facts. `conf/objective/` has one file for each of
them, and `losses` the formulas. This module does not know optimizers or models.

Shapes: B batch, N = B x L, L layers (= ramps), K = L - 1 ramps before the last, C labels.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from torch.nn import functional as F

from deebert.errors import UserError, is_number, unknown
from deebert.models import trained_ramps
from deebert.models.early_exit import Flow
from deebert.training.losses import distance, final, labelled, leaving_shares, ramp_losses, ramps

MOST_WEIGHT = 1_000_000  # sums of losses with such weights do not overflow float32
PAPER = {1: "final", 2: "ramps"}


class Objective:
    """The way in which the ramps are trained; the base class of all objectives.

    A subclass with options is a frozen dataclass, too: each field is an option, and has a default.
    `__post_init__` checks the values. An objective is sent to other processes (ddp_spawn), so it
    can be pickled.

    Attributes:
        name: the name that `@objective` gave it.
        stages: the stages that may use the objective. Stage 1 trains everything that the loss
            depends on, stage 2 only the ramps before the last.
        unlabelled: whether the objective can learn from rows without labels.
        needs_classes: whether the objective needs a classification task.
        needs_teacher: whether a teacher's logits add to the loss (`taught`).
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[int, ...]] = (1,)
    unlabelled: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

    def loss(self, logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
        """Return the loss: logits of every ramp (B, L, C), labels (B,) -> scalar."""
        raise NotImplementedError

    def alone(self, step: int, num_steps: int) -> bool:
        """Say whether a step, from 0, trains on the loss of the final classifier alone."""
        return False

    def flow(self, num_layers: int) -> Flow | None:
        """Return the flow of the ramps' gradients through the backbone; None for no change."""
        return None

    def taught(self, logits_BLC: Tensor, teacher_BC: Tensor) -> Tensor:
        """Return the part of the loss that comes from the teacher, if the objective has one.

        Args:
            logits_BLC: the logits of every ramp.
            teacher_BC: the logits of the teacher's final classifier.
        """
        raise NotImplementedError

    @property
    def num_ramps(self) -> int | None:
        """The number of ramps, the last too, that the objective is made for; None for any."""
        return None

    @property
    def trains_ramps(self) -> bool:
        """True if the objective trains the ramps before the last (`trained_ramps`)."""
        return trained_ramps.trains_ramps(self.name)


OBJECTIVES: dict[str, type[Objective]] = {}
Kind = TypeVar("Kind", bound=type[Objective])


def objective(name: str, *, final_alone: bool = False) -> Callable[[Kind], Kind]:
    """Return the decorator that registers a class of objectives under a name.

    Args:
        name: the value of `objective.name`.
        final_alone: whether an objective that is not in the table of `trained_ramps` trains the
            final classifier alone. Early exits have no meaning after it.

    Raises:
        UserError: another class has the name.
    """

    def register(kind: Kind) -> Kind:
        known = OBJECTIVES.get(name, kind)
        if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise UserError(
                f"the objective {name!r} is {known.__module__}.{known.__qualname__} already; give "
                f"{kind.__module__}.{kind.__qualname__} another name"
            )
        kind.name = name
        OBJECTIVES[name] = kind
        if final_alone and name not in trained_ramps.FINAL_ALONE:
            trained_ramps.FINAL_ALONE.append(name)
        return kind

    return register


def build(values: Mapping[str, Any], stage: int) -> Objective:
    """Return the objective that a file in `conf/objective/` describes.

    Args:
        values: the content of the file: `name` and the objective's options.
        stage: the stage, 1 or 2.

    Raises:
        UserError: the name or an option is unknown, or the objective does not fit the stage.
    """
    name = values.get("name")
    stage_names = [known for known, kind in OBJECTIVES.items() if stage in kind.stages]
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise unknown("objective", name, stage_names, "objective", own=True)
    options = {key: value for key, value in values.items() if key != "name"}
    known = inspect.signature(OBJECTIVES[name]).parameters
    for option in options:
        if option not in known:
            raise UserError(
                f"objective.{option}: {name} has "
                + (f"no such option; it has: {', '.join(known)}" if known else "no options")
            )
    built = OBJECTIVES[name](**options)
    if stage not in built.stages:
        raise UserError(
            f"objective={name} is for stage={built.stages[0]}; in stage={stage} choose one of: "
            f"{', '.join(stage_names)} (objective=...)"
        )
    return built


def _check(option: str, value: Any, low: float, high: float) -> None:
    if not is_number(value) or not low <= value <= high:
        raise UserError(f"objective.{option}={value} must be a number between {low} and {high}")


def _check_weights(temperature: float, label_weight: float) -> None:
    """Check the options of an objective that learns from logits.

    Raises:
        UserError: an option is outside its range.
    """
    _check("temperature", temperature, 0.01, 100)
    _check("label_weight", label_weight, 0, 1)


@objective("final")
class Final(Objective):
    """The final classifier alone."""

    def loss(self, logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
        return final(logits_BLC, labels_B)


@objective("ramps")
class Ramps(Objective):
    """The sum of the losses of every ramp but the last."""

    stages = (2,)

    def loss(self, logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
        return ramps(logits_BLC, labels_B)


@objective("joint")
class Joint(Objective):
    """The sum of the losses of every ramp (BERxiT, Xin et al., EACL 2021, equation 3)."""

    def loss(self, logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
        return ramp_losses(logits_BLC, labels_B).sum()


@objective("weighted")
@dataclass(frozen=True)
class Weighted(Objective):
    """The weighted mean of the losses of every ramp.

    Attributes:
        weights: the weight of each ramp, the last too. None stands for weight k at layer k (PABEE,
            Zhou et al., NeurIPS 2020, equation 5).
    """

    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        weights = self.weights
        if weights is None:
            return
        is_list = isinstance(weights, Sequence) and not isinstance(weights, str)
        if not (
            is_list
            and all(is_number(weight) and 0 <= weight <= MOST_WEIGHT for weight in weights)
            and any(weights[:-1])
        ):
            raise UserError(
                f"objective.weights={weights} must be a list of numbers from 0 to {MOST_WEIGHT}, "
                "one for each ramp, the last too, and not 0 for all before it"
            )

    def loss(self, logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
        losses_L = ramp_losses(logits_BLC, labels_B)
        weight_L = losses_L.new_tensor(self.weights or range(1, len(losses_L) + 1))
        return (weight_L * losses_L).sum() / weight_L.sum()

    @property
    def num_ramps(self) -> int | None:
        """The number of weights."""
        return None if self.weights is None else len(self.weights)


@objective("alternating")
class Alternating(Joint):
    """Steps of the final classifier alone in turn with steps of all ramps (BERxiT, section 3.2)."""

    def alone(self, step: int, num_steps: int) -> bool:
        return step % 2 == 0


@objective("mixed")
@dataclass(frozen=True)
class Mixed(Joint):
    """The backbone first, then everything together ("mixed", Kubaty et al., ICML 2025).

    Attributes:
        final_share: the share of the steps that train the final classifier alone.
    """

    final_share: float = 0.5

    def __post_init__(self) -> None:
        _check("final_share", self.final_share, 0, 1)

    def alone(self, step: int, num_steps: int) -> bool:
        return step < round(self.final_share * num_steps)


@objective("exit_weighted")
@dataclass(frozen=True)
class ExitWeighted(Objective):
    """The sum of the losses of every ramp, weighted by how often each row leaves there.

    The loss is the mean over rows of the sum over k of [1 - a + a L share(k)] loss(k), with
    a = exit_weight. `leaving_shares` gives share(k), the share of thresholds at which the row
    leaves at ramp k. The part with a is L times the mean loss of early exit at these thresholds.
    The other part trains each ramp also on the rows that stay, because the ramp must find out that
    these rows are hard. Only classification has this loss.

    This objective comes from no paper. Its aim is that of L2W-DEN (Han et al., ECCV 2022), where a
    second network learns the weights.

    Attributes:
        exit_weight: a, 0 to 1.
    """

    stages = (1, 2)
    needs_classes = True

    exit_weight: float = 0.5

    def __post_init__(self) -> None:
        _check("exit_weight", self.exit_weight, 0, 1)

    def loss(self, logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
        num_rows, num_layers = logits_BLC.shape[:2]
        labels_N = labels_B.repeat_interleave(num_layers)
        losses_N = F.cross_entropy(logits_BLC.float().flatten(0, 1), labels_N, reduction="none")
        share_BL = leaving_shares(logits_BLC.detach())
        weight_BL = 1 - self.exit_weight + self.exit_weight * num_layers * share_BL
        return (weight_BL * losses_N.view(num_rows, num_layers)).sum(1).mean()


@objective("distill")
@dataclass(frozen=True)
class Distill(Objective):
    """The ramps learn the probabilities of the final classifier.

    The loss is
    loss(L) + sum over k < L of [label_weight loss(k) + (1 - label_weight) T² KL(p_L || p_k)],
    with probabilities p at temperature T and no gradient into p_L. FastBERT (Liu et al., ACL 2020)
    is label_weight 0 and T 1 in stage 2; the direction of KL is that of its code. T² keeps the size
    of the gradients similar at any T (Hinton et al. 2015). In a regression, the squared difference
    of the values takes the place of T² KL. Rows without a label (UNLABELLED, in a regression NaN)
    count in the part of the final classifier's probabilities alone.

    Attributes:
        temperature: T.
        label_weight: the weight of the labels in the losses of the ramps before the last, 0 to 1.
    """

    stages = (1, 2)
    unlabelled = True

    temperature: float = 1.0
    label_weight: float = 0.0

    def __post_init__(self) -> None:
        _check_weights(self.temperature, self.label_weight)

    def loss(self, logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
        teacher_B1C = logits_BLC[:, -1:].detach()
        distance_BK = distance(logits_BLC[:, :-1], teacher_B1C, self.temperature)
        loss = (1 - self.label_weight) * distance_BK.mean(0).sum()
        if (labelled_B := labelled(labels_B)).any():
            losses_L = ramp_losses(logits_BLC[labelled_B], labels_B[labelled_B])
            loss = loss + losses_L[-1] + self.label_weight * losses_L[:-1].sum()
        return loss


@objective("equilibrium")
class Equilibrium(Joint):
    """All ramps, with gradient equilibrium (Li et al., ICCV 2019, section 3.1).

    Of the R ramps from layer k on, the gradient of ramp k counts 1/R, and that of all later ramps
    together (R-1)/R. Gradients then do not grow towards the lower layers. ElasticBERT (Liu et al.,
    NAACL 2022) trains with it, too.
    """

    def flow(self, num_layers: int) -> Flow:
        num_ramps = [num_layers - k for k in range(num_layers)]
        return Flow([1 / r for r in num_ramps], [(r - 1) / r for r in num_ramps])


@objective("detached")
class Detached(Joint):
    """All ramps; each layer learns from its own ramp alone (SWEET, Rotem et al., ACL 2023)."""

    def flow(self, num_layers: int) -> Flow:
        return Flow([1.0] * num_layers, [0.0] * num_layers)


@objective("student")
@dataclass(frozen=True)
class Student(Objective):
    """The final classifier learns from the labels and from a teacher's final classifier.

    The loss is label_weight loss(L), over the rows that have a label, plus
    (1 - label_weight) T² KL(teacher || L) (DistilBERT, Sanh et al. 2019). The authors' code has it
    in run_squad_w_distillation.py, where the two weights are alpha_squad and alpha_ce.

    Attributes:
        temperature: T.
        label_weight: the weight of the labels, 0 to 1.
    """

    unlabelled = True
    needs_teacher = True

    temperature: float = 2.0
    label_weight: float = 0.5

    def __post_init__(self) -> None:
        _check_weights(self.temperature, self.label_weight)

    def loss(self, logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
        labelled_B = labelled(labels_B)
        if not labelled_B.any():  # the loss is 0, but backward() needs a graph
            return 0 * logits_BLC.sum()
        return self.label_weight * final(logits_BLC[labelled_B], labels_B[labelled_B])

    def taught(self, logits_BLC: Tensor, teacher_BC: Tensor) -> Tensor:
        distance_B1 = distance(logits_BLC[:, -1:], teacher_BC[:, None], self.temperature)
        return (1 - self.label_weight) * distance_B1.mean()
