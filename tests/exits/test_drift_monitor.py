"""What a program sees of drift: a test for each operating point, the size, and a saving that is kept."""

import numpy as np
import pytest
import torch

from deebert.exits import curves, rules
from deebert.exits.curves import OperatingPoint
from deebert.exits.drift import BROKEN, CALIBRATED, CELLS, cells
from deebert.exits.drift_monitor import (
    MOST_CHANGE,
    MOST_TESTS,
    NOT_CALIBRATED,
    Monitor,
    SavingFollower,
    exit_cells,
)
from deebert.exits.records import Record

LAYERS = 6


def rows(random: np.random.Generator, num: int, harder: float = 0.0) -> np.ndarray:
    """Cells of rows that leave at random layers; `harder` ones leave later."""
    return cells(1 + random.binomial(LAYERS - 1, 0.4 + harder, num), random.gamma(0.5, 0.2, num))


def test_a_record_and_the_engine_s_answers_give_the_same_cells() -> None:
    logits_NLC = torch.randn(50, LAYERS, 3, generator=torch.Generator().manual_seed(0))
    index_N = torch.arange(50)
    record = Record("validation", logits_NLC, index_N % 3, index_N, index_N + 5)
    rule = rules.named("entropy", 3).fitted(temperatures=[2.0] * LAYERS)
    layer_N = rules.exit_layer(rule(logits_NLC).score_NL, 0.9)
    answer_NC = logits_NLC[index_N, layer_N - 1] / torch.where(layer_N < LAYERS, 2.0, 1.0)[:, None]
    expected_N = exit_cells(layer_N.numpy(), answer_NC.softmax(-1).numpy())
    assert len(layer_N.unique()) > 1
    assert (curves.exits_of(record, OperatingPoint(rule, 0.9)) == expected_N).all()
    assert (expected_N // CELLS == layer_N.numpy() - 1).all()
    assert (exit_cells([1, 3], None) == [0, 2 * CELLS]).all(), "a regression has layers alone"


def test_the_worst_target_with_its_ramp_and_size() -> None:
    random = np.random.default_rng(0)
    monitor = Monitor(LAYERS)
    assert monitor.worst.state == NOT_CALIBRATED
    for point in ("a", "b"):
        monitor.expect(point, rows(random, 400))
    monitor.expect("c", None)
    assert monitor.update("c", rows(random, 50)) == NOT_CALIBRATED
    assert monitor.update("a", rows(random, 500)) == CALIBRATED
    assert str(monitor.worst) == "calibrated"
    assert monitor.update("b", rows(random, 500, 0.4)) == BROKEN
    drift = monitor.worst
    assert (drift.state, drift.num_rows) == (BROKEN, 500)
    assert drift.ramp in (3, 4)
    assert drift.size == pytest.approx(0.65, abs=0.1)
    assert str(drift).startswith("guarantee no longer holds (at ramp ")
    assert monitor.state("a") == CALIBRATED
    for number in range(40):
        monitor.expect(f"more {number}", rows(random, 20))
    known = [monitor.state(f"more {number}") != NOT_CALIBRATED for number in range(40)]
    assert sum(known) == MOST_TESTS - 2


def test_a_sorted_file_is_no_drift() -> None:
    """Rows that come together are read in a random order."""
    random = np.random.default_rng(1)
    monitor = Monitor(LAYERS)
    monitor.expect("", rows(random, 1000))
    assert monitor.update("", np.sort(rows(random, 4000))) == CALIBRATED


def test_a_saving_is_followed_within_two_points() -> None:
    """After a change that makes every row leave 1.2 layers later than the thresholds say."""
    random = np.random.default_rng(2)
    follower, saved = SavingFollower(0.4), []
    for _ in range(4000):
        saving = float(np.clip(random.normal(follower.nominal - 0.2, 0.25), 0, 5 / 6))
        follower.update([saving])
        saved.append(saving)
    assert np.mean(saved[1000:]) == pytest.approx(0.4, abs=0.02)
    assert follower.rounded == round(follower.nominal, 2) > 0.5
    for _ in range(4000):
        follower.update([0.0])
    assert follower.nominal == pytest.approx(0.4 + MOST_CHANGE), "within bounds"
