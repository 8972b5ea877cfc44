"""What a program sees of the exits of new rows, against those of the calibration rows.

A program may use several operating points at the same time. Each has a test of its own (`drift`),
because its rows leave at other layers. The k-th test may use 1 / (k (k + 1)) of the levels, so the
probability that any of them is wrong is the level at most. A `SavingFollower` keeps a saving after
a drift. Neither needs labels. The module knows nothing of rules, models and HTTP.
Shapes: N rows, C labels.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deebert.exits.drift import CALIBRATED, CELLS, LEVELS, DriftTest, cells

NOT_CALIBRATED = "not calibrated"
STATES = (NOT_CALIBRATED, CALIBRATED, *LEVELS)  # from no knowledge to the worst
MOST_TESTS = 16  # operating points; rows of further ones are not tested
RECENT = 1000  # rows, the latest, that the size of a drift is measured on

RATE = 0.005  # how far a row moves the saving that thresholds are chosen for
MOST_CHANGE = 0.25  # of that saving


def exit_cells(layer_N: ArrayLike, probabilities_NC: ArrayLike | None) -> NDArray[np.int64]:
    """Return the cells of rows by their exit layers and the entropies of their answers.

    Every exit rule gives these two, and so does a row that no rule has let leave.

    Args:
        layer_N: the exit layers, from 1.
        probabilities_NC: the probabilities of the answers; None for a regression.
    """
    if probabilities_NC is None:
        return cells(layer_N, np.zeros(len(np.asarray(layer_N))))
    shares_NC = np.asarray(probabilities_NC, np.float64)
    logs_NC = np.log(np.maximum(shares_NC, np.finfo(np.float64).tiny))
    return cells(layer_N, np.maximum(-(shares_NC * logs_NC).sum(-1), 0))


@dataclass(frozen=True)
class Drift:
    """The state of the test that is the worst of all.

    Attributes:
        state: one of `STATES`.
        num_rows: the number of new rows that it has read.
        ramp: the ramp, from 1, up to which the shares of rows that have left differ the most.
        size: this difference: the largest one of the distribution functions of the latest rows and
            the calibration rows (Kolmogorov and Smirnov's distance), from 0 to 1.
    """

    state: str = NOT_CALIBRATED
    num_rows: int = 0
    ramp: int | None = None
    size: float = 0.0

    def __str__(self) -> str:
        if self.state in LEVELS:
            return f"{self.state} (at ramp {self.ramp} by {self.size:.0%} of the rows)"
        return self.state


class Monitor:
    """Tests of drift, one for each operating point.

    Args:
        num_layers: the number of layers of the model.
        seed: of the random numbers.
    """

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        self._num_cells = num_layers * CELLS
        self._random = np.random.default_rng(seed)
        self._tests: dict[str, DriftTest] = {}
        self._expected: dict[str, NDArray[np.float64]] = {}
        self._recent: dict[str, deque[int]] = {}

    def expect(self, point: str, calibration_N: ArrayLike | None) -> None:
        """Begin the test of an operating point, unless it is there or there are too many.

        Args:
            point: a name of the operating point.
            calibration_N: the cells of the calibration rows; None if there are none.
        """
        number = len(self._tests) + 1
        if calibration_N is None or point in self._tests or number > MOST_TESTS:
            return
        counts = np.bincount(np.asarray(calibration_N, np.int64), minlength=self._num_cells)
        self._expected[point] = np.cumsum(counts) / counts.sum()
        share = 1 / (number * (number + 1))
        seed = int(self._random.integers(2**32))
        self._tests[point] = DriftTest(calibration_N, self._num_cells, seed, share)
        self._recent[point] = deque(maxlen=RECENT)

    def update(self, point: str, new_N: ArrayLike) -> str:
        """Read new rows in a random order, and return the state of their operating point.

        The order of the rows that came together says nothing: a file may be sorted.

        Args:
            point: the name of their operating point.
            new_N: their cells.
        """
        if point not in self._tests:
            return NOT_CALIBRATED
        rows = self._random.permutation(np.asarray(new_N, np.int64))
        self._recent[point].extend(rows.tolist())
        return self._tests[point].update(rows)

    def state(self, point: str) -> str:
        """Return the state of an operating point, one of `STATES`."""
        return self._tests[point].state if point in self._tests else NOT_CALIBRATED

    @property
    def worst(self) -> Drift:
        """The state of the worst test, with the ramp and the size."""
        if not self._tests:
            return Drift()
        point, test = max(self._tests.items(), key=lambda each: each[1].evidence)
        recent = self._recent[point]
        if not recent:
            return Drift(test.state, test.num_rows)
        counts = np.bincount(recent, minlength=self._num_cells)
        apart = np.abs(np.cumsum(counts) / len(recent) - self._expected[point])
        cell = int(apart.argmax())
        return Drift(test.state, test.num_rows, cell // CELLS + 1, float(apart[cell]))


class SavingFollower:
    """A saving that thresholds are chosen for, so that rows save what the target says.

    After every row the saving moves by `RATE` times what the row has saved too little. So the mean
    over T rows is within (largest step + MOST_CHANGE) / (RATE T) of the target, whatever the rows
    are, as long as no bound is reached (adaptive conformal inference, Gibbs and Candes 2021,
    proposition 4.1). It needs no labels, and says nothing of the score.

    Args:
        target: the `target_saving`.

    Attributes:
        nominal: the saving to choose thresholds for on the calibration rows.
    """

    def __init__(self, target: float) -> None:
        self.target = self.nominal = target

    @property
    def rounded(self) -> float:
        """The saving in steps of a point, so that few operating points are calibrated."""
        return round(self.nominal, 2)

    def update(self, saving_N: Sequence[float]) -> None:
        """Read what rows have saved, as shares of the layers."""
        for saving in saving_N:
            moved = self.nominal + RATE * (self.target - saving)
            low, high = max(0.0, self.target - MOST_CHANGE), min(0.99, self.target + MOST_CHANGE)
            self.nominal = min(max(moved, low), high)
