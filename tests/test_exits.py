import math

import pytest
import torch

from deebert.exits import entropy, exit_layer


def test_entropy_in_nats() -> None:
    assert entropy(torch.zeros(2)).item() == pytest.approx(math.log(2))
    assert entropy(torch.zeros(5, 3)).tolist() == pytest.approx([math.log(3)] * 5)
    p = torch.tensor([0.7, 0.2, 0.1])
    assert entropy(p.log()).item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)


@pytest.mark.parametrize("gap", [20.0, 200.0, 2e4])
def test_the_most_certain_rows_have_entropy_0_not_nan(gap: float) -> None:
    """The original's -sum p log p is NaN from a gap of 104, so such rows never left."""
    logits = torch.tensor([gap, 0.0])
    assert 0 <= entropy(logits).item() < 1e-6
    assert 0 <= entropy(logits.half()).item() < 1e-6
    assert exit_layer(entropy(logits.expand(1, 3, 2)), 0.001).tolist() == [1]


def test_leaves_at_the_first_ramp_strictly_under_its_threshold() -> None:
    scores = torch.tensor([[0.3, 0.1, 0.0], [0.5, 0.5, 0.0], [0.2, 0.6, 0.6], [0.1, 0.0, 0.9]])
    assert exit_layer(scores, 0.3).tolist() == [2, 3, 1, 1]
    assert exit_layer(scores, 0.2).tolist() == [2, 3, 3, 1]
    assert exit_layer(scores, 0.0).tolist() == [3, 3, 3, 3]


def test_a_threshold_per_ramp() -> None:
    scores = torch.tensor([[0.3, 0.1, 0.0], [0.3, 0.3, 0.0]])
    assert exit_layer(scores, torch.tensor([0.0, 0.2])).tolist() == [2, 3]
    with pytest.raises(RuntimeError):
        exit_layer(scores, torch.tensor([0.1, 0.1, 0.1]))


def test_nan_goes_to_full_depth() -> None:
    assert exit_layer(torch.tensor([[math.nan, math.nan, 0.1]]), 9.0).tolist() == [3]
