"""Every objective against its formula, worked out by hand in plain Python."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deebert.data.tasks import UNLABELLED
from deebert.errors import UserError
from deebert.exits import rules
from deebert.models import trained_ramps
from deebert.training import objectives
from deebert.training.losses import final, leaving_shares, ramp_losses, ramps
from deebert.training.objectives import (
    OBJECTIVES,
    Detached,
    Distill,
    Equilibrium,
    ExitWeighted,
    Joint,
    Weighted,
)

# Three ramps, two rows, two labels; loss of a row = log(1 + exp(other - own)).
LOGITS = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [3.0, 1.0]], [[0.0, 0.0], [0.0, 2.0], [0.0, 4.0]]])
LABELS = torch.tensor([0, 1])
VALUES = torch.tensor([[[1.0], [2.0], [4.0]], [[0.0], [5.0], [3.0]]])  # of a regression


def loss(margin: float) -> float:
    return math.log(1 + math.exp(-margin))


FIRST, SECOND, LAST = loss(0), (loss(1) + loss(2)) / 2, (loss(2) + loss(4)) / 2


def apart(teacher: float, student: float, temperature: float = 1) -> float:
    """T² KL of two-label probabilities, given how far the first label's logit is above."""
    p, q = (1 / (1 + math.exp(-margin / temperature)) for margin in (teacher, student))
    return temperature**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))


def test_mean_over_the_batch_for_each_ramp() -> None:
    assert ramp_losses(LOGITS, LABELS).tolist() == pytest.approx([FIRST, SECOND, LAST], abs=1e-6)


@pytest.mark.parametrize(
    ("formula", "expected", "of_values"),
    # Squared errors of the regression, labels 3 and 4: (4 + 16) / 2, (1 + 1) / 2, (1 + 1) / 2.
    [
        (final, LAST, 1),
        (ramps, FIRST + SECOND, 10 + 1),
        (Joint().loss, FIRST + SECOND + LAST, 10 + 1 + 1),
        (Weighted().loss, (1 * FIRST + 2 * SECOND + 3 * LAST) / 6, (10 + 2 * 1 + 3 * 1) / 6),
        (Weighted((0, 3, 1)).loss, (3 * SECOND + LAST) / 4, (3 * 1 + 1) / 4),
    ],
)
def test_sums_of_the_ramps_losses(
    formula: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], expected: float, of_values: float
) -> None:
    assert formula(LOGITS, LABELS).item() == pytest.approx(expected, abs=1e-6)
    assert formula(VALUES, torch.tensor([3.0, 4.0])).item() == pytest.approx(of_values, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("label_weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("labels", [(0, 1), (0, UNLABELLED), (UNLABELLED, UNLABELLED)])
def test_distillation(temperature: float, label_weight: float, labels: tuple[int, int]) -> None:
    """Rows without a label learn from the final classifier alone; others from both."""
    margins = [(0, 1, 2), (0, -2, -4)]  # first label above the second: each row, each ramp
    from_teacher = sum(apart(row[2], row[k], temperature) for row in margins for k in (0, 1)) / 2
    rows = [
        [loss(m if label == 0 else -m) for m in row]
        for row, label in zip(margins, labels, strict=True)
        if label != UNLABELLED
    ]
    losses = [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [0, 0, 0]
    expected = losses[2] + label_weight * (losses[0] + losses[1])
    expected += (1 - label_weight) * from_teacher
    objective = Distill(temperature=temperature, label_weight=label_weight)
    assert objective.loss(LOGITS, torch.tensor(labels)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("labels", "losses"), [((3.0, 4.0), (10, 1, 1)), ((3.0, math.nan), (4, 1, 1)), ((math.nan, math.nan), (0, 0, 0))])  # fmt: skip
def test_distillation_of_a_regression_is_by_squares(labels: tuple, losses: tuple) -> None:
    from_teacher = ((1 - 4) ** 2 + (0 - 3) ** 2) / 2 + ((2 - 4) ** 2 + (5 - 3) ** 2) / 2
    for weight in (0.0, 0.3):
        objective = Distill(temperature=3.0, label_weight=weight)
        expected = losses[2] + weight * (losses[0] + losses[1]) + (1 - weight) * from_teacher
        assert objective.loss(VALUES, torch.tensor(labels)).item() == pytest.approx(
            expected, rel=1e-6
        )


# Entropies of LOGITS' ramps before the last: ln 2 and H(1), ln 2 and H(2); H(2) < H(1) < ln 2. A row
# leaves at ramp 1 over ln 2 (none of the four thresholds), at ramp 2 over its own second entropy.
SHARES = [[0, 2 / 4, 2 / 4], [0, 3 / 4, 1 / 4]]


@pytest.mark.parametrize("exit_weight", [0.0, 0.4, 1.0])
def test_losses_weighted_by_where_rows_leave(exit_weight: float) -> None:
    assert leaving_shares(LOGITS).tolist() == [pytest.approx(row) for row in SHARES]
    rows = [[loss(0), loss(1), loss(2)], [loss(0), loss(2), loss(4)]]
    expected = [
        (1 - exit_weight + exit_weight * 3 * share) * each
        for row, shares in zip(rows, SHARES, strict=True)
        for each, share in zip(row, shares, strict=True)
    ]
    total = ExitWeighted(exit_weight).loss(LOGITS, LABELS).item()
    assert total == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_shares_of_exits_are_those_of_the_rule() -> None:
    """Against the rule itself, at every threshold; confident ramps after unsure ones or before."""
    logits = torch.randn(50, 6, 3, generator=torch.Generator().manual_seed(0)) * 3
    entropy_NL = rules.entropy(logits)
    thresholds = entropy_NL[:, :-1].flatten().tolist()
    left = torch.stack([rules.exit_layer(entropy_NL, each) for each in thresholds], 1)
    expected = torch.stack([(left == layer).float().mean(1) for layer in range(1, 7)], 1)
    torch.testing.assert_close(leaving_shares(logits), expected, atol=1e-6, rtol=0)
    assert (expected.mean(0) > 0.02).all(), "rows leave everywhere"


def test_the_weights_of_exits_are_no_way_for_gradients() -> None:
    """Or ramps would learn to be unsure where they are wrong, instead of right."""
    logits = LOGITS.clone().requires_grad_()
    ExitWeighted(1.0).loss(logits, LABELS).backward()
    for row in (0, 1):
        for k in range(3):
            own = LOGITS[row, k].clone().requires_grad_()
            torch.nn.functional.cross_entropy(own[None], LABELS[row][None]).backward()
            expected = 3 * SHARES[row][k] / 2 * own.grad
            torch.testing.assert_close(logits.grad[row, k], expected, atol=1e-6, rtol=0)


def test_what_is_distilled_does_not_move_the_teacher() -> None:
    logits = LOGITS.clone().requires_grad_()
    objective = objectives.build({"name": "distill", "temperature": 2.0, "label_weight": 0.5}, 1)
    objective.loss(logits, LABELS).backward()
    alone = LOGITS.clone().requires_grad_()
    final(alone, LABELS).backward()
    torch.testing.assert_close(logits.grad[:, -1], alone.grad[:, -1])
    assert (logits.grad[:, :-1].abs().sum((0, 2)) > 0).all()


def test_gradients_reach_only_the_ramps_of_the_objective() -> None:
    logits = LOGITS.clone().requires_grad_()
    ramps(logits, LABELS).backward()
    assert logits.grad[:, -1].abs().sum() == 0
    assert (logits.grad[:, :-1].abs().sum((0, 2)) > 0).all()


def test_how_gradients_flow() -> None:
    """Of three ramps. Every ramp's share in layer 1's gradient is then 1/3, in layer 2's 1/2."""
    ramp, onward = Equilibrium().flow(3)
    assert ramp == pytest.approx([1 / 3, 1 / 2, 1])
    assert onward == pytest.approx([2 / 3, 1 / 2, 0])
    assert Detached().flow(3) == ([1, 1, 1], [0, 0, 0])


@pytest.mark.parametrize(
    ("name", "stages", "flow"),
    [
        ("final", [1], None),
        ("ramps", [2], None),
        ("joint", [1], None),
        ("weighted", [1], None),
        ("alternating", [1], None),
        ("mixed", [1], None),
        ("distill", [1, 2], None),
        ("exit_weighted", [1, 2], None),
        ("equilibrium", [1], Equilibrium().flow(3)),
        ("detached", [1], Detached().flow(3)),
    ],
)
def test_what_the_names_stand_for(name: str, stages: list[int], flow: Any) -> None:
    built = objectives.build({"name": name}, stages[0])
    assert (built.name, list(built.stages), built.flow(3)) == (name, stages, flow)
    assert built.unlabelled == (name == "distill")
    assert built.trains_ramps == trained_ramps.trains_ramps(name) == (name != "final")
    for stage in {1, 2} - set(stages):
        others = [other for other in OBJECTIVES if stage in OBJECTIVES[other]().stages]
        with pytest.raises(UserError) as refused:
            objectives.build({"name": name}, stage)
        assert str(refused.value) == (
            f"objective={name} is for stage={stages[0]}; in stage={stage} choose one of: "
            f"{', '.join(others)} (objective=...)"
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_spawned_processes_get_it_whole(name: str) -> None:
    """trainer.strategy=ddp_spawn pickles the module, its objective too."""
    built = OBJECTIVES[name]()
    again = pickle.loads(pickle.dumps(built))
    assert again.loss(LOGITS, LABELS).item() == built.loss(LOGITS, LABELS).item()
    assert [again.alone(step, 6) for step in range(6)] == [built.alone(k, 6) for k in range(6)]


@pytest.mark.parametrize(
    ("values", "turns"),  # f: the final classifier alone, r: the ramps too; 6 steps
    [
        ({"name": "final"}, "ffffff"),
        ({"name": "joint"}, "rrrrrr"),
        ({"name": "equilibrium"}, "rrrrrr"),
        ({"name": "detached"}, "rrrrrr"),
        ({"name": "alternating"}, "frfrfr"),
        ({"name": "mixed"}, "fffrrr"),
        ({"name": "mixed", "final_share": 0.3}, "ffrrrr"),  # 1.8 steps: the second has begun in it
        ({"name": "mixed", "final_share": 0}, "rrrrrr"),
        ({"name": "mixed", "final_share": 1}, "ffffff"),
    ],
)
def test_whose_turn_a_step_is(values: dict, turns: str) -> None:
    objective = objectives.build(values, 1)
    losses = [final if objective.alone(step, 6) else objective.loss for step in range(6)]
    totals = [loss(LOGITS, LABELS).item() for loss in losses]
    expected = {"f": LAST, "r": FIRST + SECOND + LAST}
    assert totals == pytest.approx([expected[turn] for turn in turns], abs=1e-6)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "sum"}, "objective 'sum' is unknown; choose one of: final, joint, weighted, alternating, mixed, exit_weighted, distill, equilibrium, detached"),
        ({}, "objective None is unknown; choose one of: final, "),
        ({"name": "joint", "temperature": 2}, "objective.temperature: joint has no options"),
        ({"name": "mixed", "share": 2}, "objective.share: mixed has no such option; it has: final_share"),
        ({"name": "distill", "T": 2}, "objective.T: distill has no such option; it has: temperature, label_weight"),
        ({"name": "mixed", "final_share": 1.1}, "objective.final_share=1.1 must be a number between 0 and 1"),
        ({"name": "mixed", "final_share": "half"}, "objective.final_share=half must be a number"),
        ({"name": "mixed", "final_share": True}, "objective.final_share=True must be a number"),
        ({"name": "mixed", "final_share": math.nan}, "objective.final_share=nan must be a number"),
        ({"name": "distill", "temperature": 0}, "objective.temperature=0 must be a number between 0.01 and 100"),
        ({"name": "distill", "label_weight": -0.1}, "objective.label_weight=-0.1 must be a number between 0 and 1"),
        ({"name": "exit_weighted", "exit_weight": 2}, "objective.exit_weight=2 must be a number between 0 and 1"),
        ({"name": "weighted", "weights": 3}, "objective.weights=3 must be a list of numbers from 0 to 1000000, one for each ramp"),
        ({"name": "weighted", "weights": []}, "objective.weights=[] must be"),
        ({"name": "weighted", "weights": [1, "x"]}, "objective.weights=[1, 'x'] must be"),
        ({"name": "weighted", "weights": [1, -1, 1]}, "objective.weights=[1, -1, 1] must be"),
        ({"name": "weighted", "weights": [0, 0.0]}, "objective.weights=[0, 0.0] must be"),
        ({"name": "weighted", "weights": [1, math.nan]}, "objective.weights=[1, nan] must be"),
        ({"name": "distill", "label_weight": None}, "objective.label_weight=None must be a number"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(values: dict, says: str) -> None:
    with pytest.raises(UserError) as refused:
        objectives.build(values, 1)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
