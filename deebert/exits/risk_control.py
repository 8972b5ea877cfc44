"""Guarantees for unseen rows: tests of a risk, and the number of thresholds that pass them.

Learn then Test (Angelopoulos et al. 2021) with fixed-sequence testing: thresholds are tested from
conservative to aggressive, each at the full delta, up to the first that fails. The last one that
passed has a risk above the limit with probability delta at most. Conformal risk control
(Angelopoulos et al. 2022) bounds the average risk instead. Both hold for rows that are exchangeable
with the calibration rows, and on average over samples of calibration rows.

The module knows nothing of ramps, tasks or files: arithmetic on losses of N rows at T thresholds.
Functions import scipy.stats: the import takes a second, and a given threshold does not need it.
"""

import math

import numpy as np

# Share of delta for a bound on the gains, which the limit leaves open (Berger and Boos 1994).
NUISANCE = 0.04
# With so many losses expected at the limit, or more, gains balance losses. Then several times the
# losses pass if there are as many gains, and a few losses less than by Clopper-Pearson if there is
# no gain. With fewer expected losses that price is too high. The number of rows and the limit
# decide before any loss is seen, so the test stays valid.
# (Two tests at half the level each were worse than either alone on MRPC, SST-2 and CoLA.)
BALANCE_FROM = 18.0


def p_value(losses: int, gains: int | None, num_rows: int, limit: float, delta: float) -> float:
    """Return the p-value of "the mean of -1 (gain), 0 and 1 (loss) is above `limit`".

    With losses alone this is the exact binomial test, the dual of the Clopper-Pearson bound. With
    gains, and enough rows, it is the test of the trinomial difference losses - gains. That test is
    exact for a given probability of a gain. The largest p-value of three probabilities inside a
    confidence set is taken, since the tail grows towards the end of the set.

    Args:
        losses: number of rows with a loss.
        gains: number of rows with a gain; None if the loss function has no gains.
        num_rows: number of rows.
        limit: the risk that is tested.
        delta: the level of the test; it sets the width of the confidence set.
    """
    from scipy import stats

    if gains is None or num_rows * limit < BALANCE_FROM:
        return float(stats.binom.cdf(losses, num_rows, limit))
    beta = NUISANCE * delta
    most = float(stats.beta.ppf(1 - beta, gains + 1, num_rows - gains)) if gains < num_rows else 1.0
    most = min(most, (1 - limit) / 2)
    worst = max(
        _difference_cdf(losses - gains, num_rows, gain + limit, gain)
        for gain in np.linspace(0, most, 3)
    )
    return min(1.0, worst + beta)


def _difference_cdf(value: int, num_rows: int, loss: float, gain: float) -> float:
    """Return P(losses - gains <= value) for num_rows trials with these probabilities of each."""
    from scipy import stats

    tail = 1e-9  # left out on either side, and added, so that the result is still a p-value
    low, high = stats.binom.ppf([tail, 1 - tail], num_rows, gain)
    gains = np.arange(int(low), int(high) + 1)
    given = stats.binom.cdf(value + gains, num_rows - gains, loss / (1 - gain))
    return float((stats.binom.pmf(gains, num_rows, gain) * given).sum()) + 2 * tail


def smallest_limit(num_rows: int, delta: float | None) -> float:
    """Return the smallest limit that can be guaranteed with so many rows, if none has a loss.

    Args:
        num_rows: number of rows.
        delta: 1 - confidence; None for a guarantee on average.
    """
    if delta is None:
        return 1 / (num_rows + 1)
    return -math.expm1(math.log(delta) / num_rows)  # where no loss has the probability delta


def learn_then_test(
    losses_T: np.ndarray, gains_T: np.ndarray | None, num_rows: int, limit: float, delta: float
) -> int:
    """Count the first thresholds that all pass the test; the last of these is the one to take.

    Args:
        losses_T: (T,) numbers of losses at each threshold, from conservative to aggressive.
        gains_T: (T,) numbers of gains; None if the loss function has no gains.
        num_rows: number of rows.
        limit: largest risk.
        delta: 1 - confidence.
    """
    for index, losses in enumerate(losses_T):
        gains = None if gains_T is None else int(gains_T[index])
        if p_value(int(losses), gains, num_rows, limit, delta) > delta:
            return index
    return len(losses_T)


def conformal_risk(largest_T: np.ndarray, num_rows: int, limit: float) -> int:
    """Count the first thresholds that all keep the expected risk at the limit or under it.

    Args:
        largest_T: (T,) sums over the rows of the largest loss at any threshold up to this one,
            full depth (0) included. Conformal risk control needs losses that never fall, so a gain
            never balances a loss here.
        num_rows: number of rows.
        limit: largest expected risk.
    """
    within = (largest_T + 1) / (num_rows + 1) <= limit
    return int(within.argmin()) if not within.all() else len(within)


def mean_interval(
    mean: float, deviation: float, num_seen: float, num_new: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return an interval for the mean over num_new unseen rows, by Student's t.

    Args:
        mean: mean over the rows that were seen.
        deviation: standard deviation of single rows among these.
        num_seen: number of rows that were seen, or of as many independent ones.
        num_new: number of unseen rows.
        confidence: probability that the interval holds the mean.
    """
    from scipy import stats

    width = float(stats.t.ppf((1 + confidence) / 2, max(num_seen - 1, 1))) * deviation
    width *= math.sqrt(1 / num_seen + 1 / num_new)
    return mean - width, mean + width
