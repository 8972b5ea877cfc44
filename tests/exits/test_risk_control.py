import numpy as np
import pytest
from mapie.risk_control import BinaryClassificationController
from scipy import stats

from deebert.exits import risk_control
from deebert.exits.risk_control import (
    BALANCE_FROM,
    conformal_risk,
    learn_then_test,
    p_value,
    smallest_limit,
)


def clopper_pearson(losses: int, num_rows: int, delta: float) -> float:
    return 1.0 if losses == num_rows else stats.beta.ppf(1 - delta, losses + 1, num_rows - losses)


@pytest.mark.parametrize(("losses", "num_rows"), [(0, 400), (3, 400), (17, 2000), (0, 50)])
def test_losses_alone_have_the_clopper_pearson_bound(losses: int, num_rows: int) -> None:
    for delta in (0.05, 0.1):
        bound = clopper_pearson(losses, num_rows, delta)
        assert p_value(losses, None, num_rows, bound * 1.001, delta) <= delta
        assert p_value(losses, None, num_rows, bound * 0.999, delta) > delta


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.1])
def test_certifies_what_mapie_certifies(limit: float) -> None:
    """MAPIE's Learn then Test with fixed-sequence testing, early exit dressed up as a classifier:
    its "predicted positive fraction" is our share of losses."""
    uniform_N1 = np.random.default_rng(0).random((1000, 1))
    grid = np.linspace(0, 0.2, 41)[1:]
    theirs = BinaryClassificationController(
        lambda X: np.hstack([X, 1 - X]),  # "positive" above 1 - threshold: a loss
        "predicted_positive_fraction",
        target_level=limit,
        confidence_level=0.95,
        best_predict_param_choice="accuracy",
        list_predict_params=1 - grid,
        fwer_method="fixed_sequence",
    ).calibrate(uniform_N1, np.ones(1000, int))
    certified = learn_then_test((uniform_N1 < grid).sum(0), None, 1000, limit, 0.05)
    assert certified == len(theirs.valid_predict_params)
    assert 1 < certified < 40


@pytest.mark.parametrize("gain", [0.0, 0.001, 0.01, 0.05])
@pytest.mark.parametrize(
    ("num_rows", "limit"), [(400, 0.01), (600, 0.02), (1500, 0.01), (2000, 0.05)]
)
def test_a_risk_at_the_limit_is_passed_with_probability_delta_at_most(
    gain: float, num_rows: int, limit: float
) -> None:
    """Exactly, over all outcomes: the sum of the chances of those that pass."""
    delta = 0.1
    passed = 0.0
    loss = limit + gain
    most = -1  # losses that may be had with so many gains; rises with them
    for g in range(int(stats.binom.ppf(1 - 1e-7, num_rows, gain)) + 1):
        while most < num_rows - g and p_value(most + 1, g, num_rows, limit, delta) <= delta:
            most += 1
        chance = stats.binom.pmf(g, num_rows, gain)
        passed += chance * stats.binom.cdf(most, num_rows - g, loss / (1 - gain))
    assert passed <= delta + 1e-6
    if gain == 0 and num_rows * limit < BALANCE_FROM:
        assert passed > delta / 3, "as tight as whole numbers allow"


def test_gains_balance_losses() -> None:
    """2 % at 2,000 rows: 29 losses alone would pass; with as many gains, 200."""
    assert p_value(29, None, 2000, 0.02, 0.05) <= 0.05 < p_value(30, None, 2000, 0.02, 0.05)
    assert p_value(200, 200, 2000, 0.02, 0.05) <= 0.05
    assert p_value(300, 300, 2000, 0.02, 0.05) > 0.05


@pytest.mark.parametrize(("num_rows", "limit"), [(1210, 0.01), (872, 0.02), (1810, 0.01), (2000, 0.05)])  # fmt: skip
def test_without_gains_little_is_lost_to_clopper_pearson(num_rows: int, limit: float) -> None:
    def most(delta: float, gains: int | None) -> int:
        passing = (k for k in range(150) if p_value(k, gains, num_rows, limit, delta) <= delta)
        return max(passing)

    assert most(0.05, 0) >= 0.75 * most(0.05, None)


def test_the_smallest_promise() -> None:
    """field.md's feasibility: no error at 95 % among RTE's 277, MRPC's 408, SST-2's 872 rows."""
    limits = [round(100 * smallest_limit(n, 0.05), 2) for n in (277, 408, 872)]
    assert limits == [1.08, 0.73, 0.34]
    assert smallest_limit(99, None) == pytest.approx(0.01)
    for num_rows in (50, 408, 5000):
        least = smallest_limit(num_rows, 0.05)
        assert p_value(0, None, num_rows, least * 1.001, 0.05) <= 0.05
        assert p_value(0, None, num_rows, least * 0.99, 0.05) > 0.05


def test_the_sequence_stops_at_the_first_failure() -> None:
    losses = np.array([0, 0, 1, 40, 0, 0])
    assert learn_then_test(losses, None, 1000, 0.01, 0.05) == 3, "not the ones after the failure"
    assert learn_then_test(np.zeros(4), None, 1000, 0.01, 0.05) == 4
    assert learn_then_test(np.zeros(4), None, 100, 0.01, 0.05) == 0, "too few rows for any"


def test_conformal_risk_control_by_hand() -> None:
    # (sum + 1) / (n + 1) <= limit: 99 rows at 0.05 allow a sum of 4.
    sums = np.array([0, 2, 4, 5, 9])
    assert conformal_risk(sums, 99, 0.05) == 3
    assert conformal_risk(sums, 99, 0.009) == 0
    assert conformal_risk(sums, 99, 1.0) == 5


def test_conformal_risk_holds_on_average() -> None:
    """Simulated monotone losses with a known truth: the mean risk is under the limit, and near."""
    random = np.random.default_rng(0)
    grid = np.linspace(0, 0.2, 201)
    risks = []
    for _ in range(2000):
        uniform_N1 = random.random((200, 1))
        chosen = conformal_risk((uniform_N1 < grid).sum(0), 200, 0.05)
        risks.append(grid[chosen - 1] if chosen else 0.0)
    assert 0.045 < np.mean(risks) <= 0.05


def test_interval_of_a_mean_of_new_rows() -> None:
    """Simulated: the mean of 100 new rows lies inside the interval from 300 others 95 % of times."""
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        seen, new = random.exponential(size=300), random.exponential(size=100)
        low, high = risk_control.mean_interval(seen.mean(), seen.std(), 300, 100)
        inside += low <= new.mean() <= high
    assert 0.93 < inside / 2000 < 0.97
