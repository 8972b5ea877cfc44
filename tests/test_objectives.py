import math

import pytest
import torch

from deebert.objectives import final, ramp_losses, ramps

# Three ramps, two rows, two labels; loss of a row = log(1 + exp(other - own)).
LOGITS = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [3.0, 1.0]], [[0.0, 0.0], [0.0, 2.0], [0.0, 4.0]]])
LABELS = torch.tensor([0, 1])


def loss(margin: float) -> float:
    return math.log(1 + math.exp(-margin))


def test_mean_over_the_batch_for_each_ramp() -> None:
    expected = [loss(0), (loss(1) + loss(2)) / 2, (loss(2) + loss(4)) / 2]
    assert ramp_losses(LOGITS, LABELS).tolist() == pytest.approx(expected, abs=1e-6)


def test_final_is_the_last_ramp_and_ramps_is_the_sum_of_the_others() -> None:
    assert final(LOGITS, LABELS).item() == pytest.approx((loss(2) + loss(4)) / 2, abs=1e-6)
    assert ramps(LOGITS, LABELS).item() == pytest.approx(
        loss(0) + (loss(1) + loss(2)) / 2, abs=1e-6
    )


def test_gradients_reach_only_the_ramps_of_the_objective() -> None:
    logits = LOGITS.clone().requires_grad_()
    ramps(logits, LABELS).backward()
    assert logits.grad[:, -1].abs().sum() == 0
    assert (logits.grad[:, :-1].abs().sum((0, 2)) > 0).all()


def test_regression_is_the_mean_squared_error() -> None:
    logits = torch.tensor([[[1.0], [2.0]], [[0.0], [5.0]]])
    labels = torch.tensor([3.0, 4.0])
    assert ramp_losses(logits, labels).tolist() == pytest.approx([(4 + 16) / 2, (1 + 1) / 2])
