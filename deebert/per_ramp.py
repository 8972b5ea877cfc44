"""A threshold for each ramp: the most right answers at a wished saving, on calibration rows.

One global threshold treats all ramps alike, though some are overconfident and some never pay. Here
each ramp's threshold is set in turn, the others given, to what is best for
right answers - price x layers (coordinate ascent); a ramp that does not pay gets 0 and is dropped.
The price is found by bisection. Thresholds for a few hundred rows overfit, so half of what a row is
worth is a smooth guess from its score, and a cross-validation decides whether to use them at all.

Arithmetic on arrays. Shapes: N rows, L layers (= ramps).
"""

import math

import numpy as np
from numpy.typing import NDArray

MOST_ROWS = 5000  # searched on; more don't change the thresholds, only the time
FOLDS = 5
PASSES = 4
SURE = 1.0  # standard errors by which the cross-validated gain must be above 0
Array = NDArray[np.float64]


def search(score_NL: Array, right_NL: Array, saving: float) -> Array | None:
    """Thresholds (L-1,) that save at least so much on these rows, or None where one global
    threshold is the better choice.

    Args:
        score_NL: how unsure each ramp is; the last column is not looked at.
        right_NL: 1 where the ramp's answer is right, else 0.
        saving: share of the layers, by which the global threshold is set, too.
    """
    worst = np.max(score_NL, where=np.isfinite(score_NL), initial=0.0)
    score_NL = np.nan_to_num(score_NL, nan=worst, posinf=worst)
    order = np.random.default_rng(0).permutation(len(score_NL))[:MOST_ROWS]
    score, right = score_NL[order], right_NL[order]
    gains = []
    for fold in range(FOLDS):
        seen = np.arange(len(score)) % FOLDS != fold
        found = _best(score[seen], right[seen], saving)
        if found is None:
            return None
        # At equal saving: where per-ramp thresholds save more than was wished, so must this one.
        level = global_threshold(score[seen], _saved(score[seen], found))
        rows = np.arange(len(score) - seen.sum())
        ours, theirs = (_left(score[~seen], given) for given in (found, np.full_like(found, level)))
        gains.append(right[~seen][rows, ours] - right[~seen][rows, theirs])
    gain = np.concatenate(gains)
    sure = gain.mean() > SURE * gain.std() / math.sqrt(len(gain))
    found = _best(score, right, saving) if sure else None
    if found is None or _saved(score_NL, found) < saving:
        return None
    level = global_threshold(score_NL, saving)
    better = _right(score_NL, right_NL, found) >= _right(
        score_NL, right_NL, np.full_like(found, level)
    )
    return found if better else None


def global_threshold(score_NL: Array, saving: float) -> float:
    """The smallest threshold for all ramps that saves so much (see `curves.thresholds_for`)."""
    least = np.sort(np.minimum.accumulate(score_NL[:, :-1], 1), axis=None)
    needed = math.ceil(saving * score_NL.size - 1e-6)
    return float(np.nextafter(least[min(needed, len(least)) - 1], math.inf)) if needed else 0.0


def _best(score: Array, right: Array, saving: float) -> Array | None:
    """Thresholds of most worth among those found that save enough."""
    num_layers = score.shape[1]
    worth = (right + _smooth(score, right)) / 2
    order = [np.argsort(score[:, ramp]) for ramp in range(num_layers - 1)]
    start = np.full(num_layers - 1, global_threshold(score, saving))
    best, most = None, -math.inf
    low, high = 0.0, 4.0  # price of all layers, in right answers
    for _ in range(14):
        price = (low + high) / 2
        found = _ascend(score, worth, price, order, start)
        enough = _saved(score, found) >= saving
        low, high = (low, price) if enough else (price, high)
        if enough and (value := _right(score, worth, found)) > most:
            best, most = found, value
    return best


def _ascend(
    score: Array, worth: Array, price: float, order: list[NDArray[np.int64]], start: Array
) -> Array:
    """Each threshold in turn to its best, the others given, until none moves."""
    rows, num_layers = np.arange(len(score)), score.shape[1]
    value = worth - price * np.arange(1, num_layers + 1) / num_layers
    found = start.copy()
    for _ in range(PASSES):
        before = found.copy()
        # Which rows reach each ramp, by the thresholds below it, which are moved after it.
        reach = np.ones(score.shape, bool)
        reach[:, 1:] = np.logical_and.accumulate(score[:, :-1] >= found, 1)
        later = np.full(len(score), num_layers - 1)  # where a row leaves that goes on
        for ramp in range(num_layers - 2, -1, -1):
            gain = np.where(reach[:, ramp], value[:, ramp] - value[rows, later], 0.0)
            total = np.cumsum(gain[order[ramp]])
            last = int(total.argmax())
            found[ramp] = _above(score[order[ramp], ramp], last) if total[last] > 0 else 0.0
            later = np.where(score[:, ramp] < found[ramp], ramp, later)
        if np.array_equal(before, found):
            break
    return found


def _above(ordered: Array, last: int) -> float:
    """A threshold that the rows up to `last` are under: in the middle, if there is one."""
    here = ordered[last]
    upper = ordered[last + 1] if last + 1 < len(ordered) else here * 1.01 + 1e-6
    middle = (here + upper) / 2
    return float(middle if np.float32(middle) > np.float32(here) else np.nextafter(here, math.inf))


def _smooth(score: Array, right: Array) -> Array:
    """P(right | score) of each ramp by logistic regression, with a slight ridge: (N, L)."""
    found = np.empty_like(right)
    for ramp in range(score.shape[1]):
        spread = score[:, ramp].std() or 1.0
        x = np.stack([np.ones(len(score)), (score[:, ramp] - score[:, ramp].mean()) / spread], 1)
        weight = np.zeros(2)
        for _ in range(20):  # Newton's method
            p = _sigmoid(x @ weight)
            curvature = (x * (p * (1 - p))[:, None]).T @ x + 0.1 * np.eye(2)
            weight += np.linalg.solve(curvature, x.T @ (right[:, ramp] - p) - 0.1 * weight)
        found[:, ramp] = _sigmoid(x @ weight)
    return found


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _left(score: Array, thresholds: Array) -> NDArray[np.int64]:
    """The ramp (from 0) at which each row leaves."""
    leaves = np.column_stack([score[:, :-1] < thresholds, np.ones(len(score), bool)])
    return leaves.argmax(1)


def _saved(score: Array, thresholds: Array) -> float:
    return float(1 - (_left(score, thresholds) + 1).mean() / score.shape[1])


def _right(score: Array, worth: Array, thresholds: Array) -> float:
    return float(worth[np.arange(len(score)), _left(score, thresholds)].sum())
