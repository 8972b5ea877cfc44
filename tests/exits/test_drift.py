"""The test of drift: its level on streams without drift, and how soon it sees one."""

import numpy as np
import pytest
from scipy import stats

from deebert.exits.drift import BROKEN, CALIBRATED, CELLS, DRIFTING, LEVELS, DriftTest, cells

LAYERS = 6


def rows(random: np.random.Generator, num: int, harder: float = 0.0) -> np.ndarray:
    """Rows that leave at random layers with random scores; `harder` ones later."""
    layer_N = 1 + random.binomial(LAYERS - 1, 0.4 + harder, num)
    return cells(layer_N, random.gamma(0.5, 0.2 + harder, num))


def started(seed: int, num: int = 400) -> tuple[DriftTest, np.random.Generator]:
    random = np.random.default_rng(seed)
    return DriftTest(rows(random, num), LAYERS * CELLS, seed), random


def test_cells_order_rows_by_layer_then_by_score() -> None:
    given = [
        (1, 0.0),
        (1, 1e-6),
        (1, 1.01e-6),
        (1, 0.3),
        (1, 0.303),
        (1, 50.0),
        (2, 0.0),
        (2, np.nan),
        (3, 0.1),
    ]
    numbers = cells(*zip(*given, strict=True))
    assert (np.diff(numbers) > 0).all()
    assert numbers[0] == 0
    assert numbers[7] == 2 * CELLS - 1, "what is no number is the hardest"
    assert cells([1], [1e9]) == CELLS - 1


def test_p_values_are_uniform_and_independent_with_ties() -> None:
    """Of rows that have few different cells, and in blocks of any size."""
    random = np.random.default_rng(0)
    drawn = []
    for seed in range(300):
        test = DriftTest(random.integers(0, 4, 10), 4, seed)
        drawn.append(
            np.concatenate([test._p_values(random.integers(0, 4, num)) for num in (1, 7, 32)])
        )
    p_values = np.array(drawn)
    assert stats.kstest(p_values.ravel(), "uniform").pvalue > 0.01
    for column in (0, 1, 20):
        assert stats.kstest(p_values[:, column], "uniform").pvalue > 0.01
    assert abs(np.corrcoef(p_values[:, 0], p_values[:, 1])[0, 1]) < 0.15


def test_nobody_wins_without_drift() -> None:
    """The capital stays 1 in the mean."""
    random = np.random.default_rng(1)
    capitals = []
    for seed in range(2000):
        test = DriftTest(random.integers(0, 5, 4), 5, seed)
        test.update(random.integers(0, 5, 3))
        test.update(random.integers(0, 5, 5))
        capitals.append(test.capital)
    error = np.std(capitals) / len(capitals) ** 0.5
    assert abs(np.mean(capitals) - 1) < 4 * error < 0.1


def test_false_alarms() -> None:
    """Looked at after every block of 100 streams of 3,200 rows. A fixed sample would raise many."""
    states = []
    for seed in range(100):
        test, random = started(seed, 200)
        states.append({test.update(rows(random, 320)) for _ in range(10)})
    for state, level in LEVELS.items():
        alarms = sum(state in each for each in states)
        assert alarms <= stats.binom.ppf(0.999, len(states), level), state


@pytest.mark.parametrize(("before", "median"), [(0, 200), (6400, 400)])
@pytest.mark.parametrize("harder", [0.2, -0.2])
def test_a_drift_is_seen_soon(before: int, median: int, harder: float) -> None:
    """Whether it is there at once or comes later, to harder or to easier rows."""
    needed = []
    for seed in range(20):
        test, random = started(seed, 1000)
        if before:
            assert test.update(rows(random, before)) != BROKEN
        drifted = np.split(rows(random, 1600, harder * (0.9 if harder < 0 else 1)), 100)
        states = [test.update(each) for each in drifted]
        assert states[-1] == BROKEN
        assert DRIFTING not in states[states.index(BROKEN) :], "no way back"
        needed.append(16 * (1 + states.index(BROKEN)))
    assert np.median(needed) <= median


def test_a_drift_that_goes_on_for_ever_has_no_overflow() -> None:
    """A service runs for weeks after it. Warnings are errors here."""
    test, _ = started(0)
    for size in (1, 8, 32, 10_000):
        assert test.update([LAYERS * CELLS - 1] * size) in {CALIBRATED, DRIFTING, BROKEN}
    assert test.state == BROKEN
    assert 1e200 <= test.largest < np.inf
    test.update(np.arange(10_000) % 2 * (LAYERS * CELLS - 1))
    assert 0 <= test.capital < np.inf
