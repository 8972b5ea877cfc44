"""A test of whether new rows still come from where the calibration rows came from.

It is a conformal test martingale (Vovk, Nouretdinov and Gammerman 2003; "Retrain or not retrain",
Vovk et al. 2021). Each row gets a p-value: its rank among all rows so far and the calibration rows.
As long as all are exchangeable, the p-values are independent and uniform, and nobody can win by
bets on them. Bettors start with 1 in total. The probability that their capital ever reaches
1 / level is `level` at most (Ville's inequality), so it may be looked at after every row. A drift
may begin at any time, so a share of the capital is kept for bets that begin later (as in
e-detectors, Shin, Ramdas and Rinaldo 2023).

The test needs no labels. The module knows nothing of rules and models. Shapes: N rows, B rows of a
block, K bettors.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

CALIBRATED, DRIFTING, BROKEN = "calibrated", "drifting", "guarantee no longer holds"
# The probability that a stream without drift is ever called so.
LEVELS = {DRIFTING: 0.05, BROKEN: 0.005}

CELLS = 4096  # of a layer; exit scores of one cell are equal for the test
SMALLEST, LARGEST = -8.0, 2.0  # powers of ten of the exit scores that cells tell apart
BLOCK = 32  # rows after which new bets begin
STAKES = (0.2, 0.5, 0.9)  # shares of the capital that bettors set
MOST_CAPITAL = 1e200  # of a bettor; in a block it grows by 2^BLOCK at most


def cells(layer_N: ArrayLike, score_N: ArrayLike) -> NDArray[np.int64]:
    """Return a number for each row that orders rows by exit layer, then by exit score.

    Args:
        layer_N: the exit layers, from 1.
        score_N: the exit scores at these layers, 0 or more.
    """
    layers, scores = np.asarray(layer_N, np.int64), np.asarray(score_N, np.float64)
    powers = np.log10(np.clip(np.nan_to_num(scores, nan=np.inf), 10**SMALLEST, 10**LARGEST))
    places = (powers - SMALLEST) / (LARGEST - SMALLEST) * (CELLS - 1)
    return (layers - 1) * CELLS + places.astype(np.int64)


class DriftTest:
    """The test. It reads rows in their order, any number at a time.

    Args:
        calibration_N: the cells of the calibration rows.
        num_cells: the number of cells; `CELLS` for each layer.
        seed: of the random numbers that break ties.
        share: the share of the levels that this test may use, if there are several tests.

    Attributes:
        num_rows: the number of new rows so far.
        capital: what the bettors have now.
        largest: the most that they have had.
    """

    def __init__(
        self, calibration_N: ArrayLike, num_cells: int, seed: int = 0, share: float = 1.0
    ) -> None:
        self.share = share
        self._counts = np.bincount(np.asarray(calibration_N, np.int64), minlength=num_cells)
        self._random = np.random.default_rng(seed)
        stakes = np.array([sign * stake for stake in STAKES for sign in (1, -1)])
        self._stakes_K = np.concatenate([stakes, stakes])
        self._invested_K = np.zeros(len(self._stakes_K))
        self._blocks = 0
        self.num_rows = 0
        self.capital = self.largest = 1.0

    @property
    def state(self) -> str:
        """`CALIBRATED`, `DRIFTING` or `BROKEN`. It never returns to an earlier one."""
        states = [name for name, level in LEVELS.items() if self.evidence * level >= 1]
        return states[-1] if states else CALIBRATED

    @property
    def evidence(self) -> float:
        """The largest capital so far, as that of a test alone."""
        return self.largest * self.share

    def update(self, new_N: Sequence[int] | NDArray[np.int64]) -> str:
        """Read new rows.

        Args:
            new_N: their cells.

        Returns:
            The state after them.
        """
        rows = np.asarray(new_N, np.int64)
        for start in range(0, len(rows), BLOCK):
            block_B = rows[start : start + BLOCK]
            p_B = self._p_values(block_B)
            # Rows that come in small blocks do not let more bets begin.
            begins = self.num_rows >= self._blocks * BLOCK
            self._bet(p_B, begins)
            self.num_rows += len(block_B)
        return self.state

    def _p_values(self, block_B: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the ranks of rows among all rows up to each of them, from 0 (largest) to 1."""
        up_to = np.cumsum(self._counts)
        num_before = int(up_to[-1])
        earlier_BB = np.tri(len(block_B), k=-1, dtype=bool)
        larger_B = num_before - up_to[block_B]
        larger_B += ((block_B[None] > block_B[:, None]) & earlier_BB).sum(1)
        equal_B = self._counts[block_B] + 1
        equal_B += ((block_B[None] == block_B[:, None]) & earlier_BB).sum(1)
        np.add.at(self._counts, block_B, 1)
        among_B = num_before + 1 + np.arange(len(block_B))
        return (larger_B + self._random.random(len(block_B)) * equal_B) / among_B

    def _bet(self, p_B: NDArray[np.float64], begins: bool) -> None:
        """Let all bettors bet on p-values, one after the other.

        Half of them bet on their mean (rows leave later or earlier), half on their spread.

        Args:
            p_B: the p-values.
            begins: whether new bets begin.
        """
        share = 0.0
        if begins:
            self._blocks += 1
            # 1 / (b (b + 1)) of the first capital is invested at block b: 1 / (b + 1) is left.
            share = 1 / (self._blocks * (self._blocks + 1)) / len(self._invested_K)
        num = len(self._stakes_K) // 2
        gains_KB = np.repeat([2 * p_B - 1, 4 * np.abs(p_B - 0.5) - 1], num, 0)
        paths_KB = np.cumprod(1 + self._stakes_K[:, None] * gains_KB, 1)
        paths_KB = np.minimum((self._invested_K + share)[:, None] * paths_KB, MOST_CAPITAL)
        self._invested_K = paths_KB[:, -1]
        capital_B = paths_KB.sum(0) + 1 / (self._blocks + 1)  # what is not invested yet
        self.capital = float(capital_B[-1])
        self.largest = max(self.largest, float(capital_B.max()))
