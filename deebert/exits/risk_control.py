"""Promises that hold on unseen rows: tests of a risk, and the thresholds that pass them.

Learn then Test (Angelopoulos et al. 2021) with fixed-sequence testing: thresholds are tried from
conservative to aggressive, each tested at the full delta, up to the first that fails; the last one
that passed has a risk above the limit with probability delta at most. Conformal risk control
(Angelopoulos et al. 2022) bounds the risk on average instead.

Both hold for rows that are exchangeable with the calibration rows, and on average over calibration
samples. Knows nothing of ramps, tasks or files: arithmetic on losses, (N rows, T thresholds).
scipy.stats is imported where it is used: it takes a second, and who only gives a threshold needs
none of it.
"""

import math

import numpy as np

# Share of delta for bounding the gains, which the limit says nothing of (Berger and Boos 1994).
NUISANCE = 0.04
# From so many losses on expected at the limit, gains balance losses: with as many gains several
# times the losses pass, without a gain a few less than Clopper-Pearson would let pass. Under it
# that price is too high. Decided by n and the limit, before any loss is seen: the test stays valid.
# (Both tests at half the level each were tried: worse than either on MRPC, SST-2 and CoLA.)
BALANCE_FROM = 18.0


def p_value(losses: int, gains: int | None, num_rows: int, limit: float, delta: float) -> float:
    """P-value of "the mean of -1 (gain), 0 and 1 (loss) is above `limit`"; small: it is not.

    Of losses alone this is the exact binomial test, the dual of the Clopper-Pearson bound. With
    gains, and rows enough, it is the test of the trinomial difference losses - gains, exact for a
    given chance of gains, which is taken for the worst of three inside a confidence set for it (its
    tail grows towards the set's end).

    Args:
        gains: None where the loss knows none.
        delta: the level that the test is made for; only says how wide that set is.
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
    """P(losses - gains <= value) for num_rows trials with these chances of each."""
    from scipy import stats

    tail = 1e-9  # left out on either side, and added, so that the p-value stays one
    low, high = stats.binom.ppf([tail, 1 - tail], num_rows, gain)
    gains = np.arange(int(low), int(high) + 1)
    given = stats.binom.cdf(value + gains, num_rows - gains, loss / (1 - gain))
    return float((stats.binom.pmf(gains, num_rows, gain) * given).sum()) + 2 * tail


def smallest_limit(num_rows: int, delta: float | None) -> float:
    """The smallest limit that so many rows can promise: without a single loss among them.

    Args:
        delta: one minus the confidence; None for a promise on average.
    """
    if delta is None:
        return 1 / (num_rows + 1)
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        passes = p_value(0, None, num_rows, middle, delta) <= delta
        low, high = (low, middle) if passes else (middle, high)
    return high


def learn_then_test(
    losses_T: np.ndarray, gains_T: np.ndarray | None, num_rows: int, limit: float, delta: float
) -> int:
    """How many thresholds, in this order, are certified: the last of them is the one to take.

    Args:
        losses_T, gains_T: (T,) numbers of losses and gains among num_rows rows at each threshold.
    """
    for tried, losses in enumerate(losses_T):
        gains = None if gains_T is None else int(gains_T[tried])
        if p_value(int(losses), gains, num_rows, limit, delta) > delta:
            return tried
    return len(losses_T)


def conformal_risk(largest_T: np.ndarray, num_rows: int, limit: float) -> int:
    """How many thresholds, in this order, keep the expected risk under the limit.

    Args:
        largest_T: (T,) sums over the rows of the largest loss at any threshold up to this one,
            full depth (0) among them: conformal risk control needs losses that never fall. So a
            gain never balances a loss here.
    """
    within = (largest_T + 1) / (num_rows + 1) <= limit
    return int(within.argmin()) if not within.all() else len(within)


def mean_interval(
    mean: float, deviation: float, num_seen: int, num_new: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Where the mean over num_new unseen rows will lie, by Student's t.

    Args:
        deviation: of single rows, among the num_seen that gave the mean.
    """
    from scipy import stats

    width = float(stats.t.ppf((1 + confidence) / 2, max(num_seen - 1, 1))) * deviation
    width *= math.sqrt(1 / num_seen + 1 / num_new)
    return mean - width, mean + width
