"""A threshold for each ramp: the most right answers at a target saving, on calibration rows.

One global threshold is the same for all ramps, though some ramps are overconfident and some are not
worth an exit. Here coordinate ascent maximizes right answers - price x layers: it sets the
threshold of one ramp after the other, with the other thresholds fixed. A ramp that is not worth an
exit gets the threshold 0. Bisection finds the price. Thresholds for a few hundred rows overfit. So
half of the worth of a row is a smooth estimate from its score, and a cross-validation decides
whether the thresholds are used at all.

Arithmetic on arrays, without tasks or files. Shapes: N rows, L layers (= ramps).
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deebert.exits import curves
from deebert.exits.rules import exit_layer

MOST_ROWS = 5000  # rows of a search; more rows take longer and do not change the thresholds
FOLDS = 5
PASSES = 4
SURE = 1.0  # standard errors by which the cross-validated gain must be above 0
Array = NDArray[np.float32]
Values = NDArray[np.float64]


def search(
    score_NL: Tensor, right_NL: Tensor, saving: float, *, is_sure: bool = False
) -> list[float] | None:
    """Search a threshold per ramp that saves at least so much on these rows.

    Args:
        score_NL: exit scores (inf: the row never leaves there); the last column is not used.
        right_NL: True where the answer of the ramp is right.
        saving: share of the layers. The global threshold of the comparison saves as much.
        is_sure: whether to skip the cross-validation, because it is known that thresholds per ramp
            are better.

    Returns:
        L-1 thresholds, or None if one global threshold is better.
    """
    all_scores = score_NL.float().nan_to_num(nan=torch.inf, posinf=torch.inf).numpy()
    all_right = right_NL.double().numpy()
    order = np.random.default_rng(0).permutation(len(all_scores))[:MOST_ROWS]
    score, right = all_scores[order], all_right[order]
    if not is_sure and not _is_better(score, right, saving):
        return None
    thresholds = _best(score, right, saving)
    if thresholds is None or _saved(all_scores, thresholds) < saving:
        return None
    level = _global(all_scores, saving)
    if _worth(all_scores, all_right, thresholds) < _worth(all_scores, all_right, level):
        return None
    return [float(threshold) for threshold in thresholds]


def _is_better(score: Array, right: Values, saving: float) -> bool:
    """Say whether thresholds per ramp are better than a global one, by cross-validation."""
    gains = []
    for fold in range(FOLDS):
        seen = np.arange(len(score)) % FOLDS != fold
        thresholds = _best(score[seen], right[seen], saving)
        if thresholds is None:
            return False
        # Compare at equal saving: thresholds per ramp may save more than `saving`.
        level = _global(score[seen], _saved(score[seen], thresholds))
        rows = np.arange(len(score) - seen.sum())
        ours, theirs = (_left(score[~seen], limits) for limits in (thresholds, level))
        gains.append(right[~seen][rows, ours] - right[~seen][rows, theirs])
    gain = np.concatenate(gains)
    return bool(gain.mean() > SURE * gain.std() / math.sqrt(len(gain)))


def _global(score: Array, saving: float) -> Array:
    """Return the global threshold for a saving, repeated for each ramp."""
    [level] = curves.thresholds_for(torch.from_numpy(score), [saving])
    return np.full(score.shape[1] - 1, level, np.float32)


def _best(score: Array, right: Values, saving: float) -> Array | None:
    """Return the thresholds with the most worth that save enough; None if none do."""
    worth = (right + _smooth(score, right)) / 2
    order = [np.argsort(score[:, ramp]) for ramp in range(score.shape[1] - 1)]
    start = _global(score, saving)
    best, most = None, -math.inf
    low, high = 0.0, 4.0  # price of all layers, in right answers
    for _ in range(14):
        price = (low + high) / 2
        thresholds = _ascend(score, worth, price, order, start)
        enough = _saved(score, thresholds) >= saving
        low, high = (low, price) if enough else (price, high)
        if enough and (value := _worth(score, worth, thresholds)) > most:
            best, most = thresholds, value
    return best


def _ascend(
    score: Array, worth: Values, price: float, order: list[NDArray[np.int64]], start: Array
) -> Array:
    """Set each threshold to its best value, with the others fixed, until none changes."""
    rows, num_layers = np.arange(len(score)), score.shape[1]
    value = worth - price * np.arange(1, num_layers + 1) / num_layers
    thresholds = start.copy()
    for _ in range(PASSES):
        before = thresholds.copy()
        # The rows that reach each ramp. The thresholds of lower ramps decide it; they change later.
        reach = np.ones(score.shape, bool)
        reach[:, 1:] = np.logical_and.accumulate(score[:, :-1] >= thresholds, 1)
        later = np.full(len(score), num_layers - 1)  # the ramp at which a row leaves if it goes on
        for ramp in range(num_layers - 2, -1, -1):
            gain = np.where(reach[:, ramp], value[:, ramp] - value[rows, later], 0.0)
            ordered = score[order[ramp], ramp]
            can_leave = int(np.isfinite(ordered).sum())  # inf sorts last, under no threshold
            total, leaving = np.cumsum(gain[order[ramp]])[:can_leave], ordered[:can_leave]
            total[:-1][leaving[1:] == leaving[:-1]] = -np.inf  # equal scores leave together
            last = int(total.argmax()) if can_leave else 0
            pays = can_leave and total[last] > 0
            thresholds[ramp] = _above(leaving, last) if pays else 0.0
            later = np.where(score[:, ramp] < thresholds[ramp], ramp, later)
        if np.array_equal(before, thresholds):
            break
    return thresholds


def _above(ordered: Array, last: int) -> float:
    """Return a threshold that the scores up to index `last` are under, and no later score."""
    here = float(ordered[last])
    after = ordered[last + 1 :]
    upper = float(after[after > ordered[last]][:1].sum()) or here * 1.01 + 1e-6
    return curves.between(here, upper)


def _smooth(score: Array, right: Values) -> Values:
    """Estimate P(right | score) of each ramp by logistic regression with a small ridge: (N, L)."""
    worst = np.max(score, where=np.isfinite(score), initial=0.0)
    score = np.nan_to_num(score.astype(np.float64), posinf=float(worst))
    estimate = np.empty_like(right)
    for ramp in range(score.shape[1]):
        spread = score[:, ramp].std() or 1.0
        x = np.stack([np.ones(len(score)), (score[:, ramp] - score[:, ramp].mean()) / spread], 1)
        weight = np.zeros(2)
        for _ in range(20):  # Newton's method
            p = _sigmoid(x @ weight)
            curvature = (x * (p * (1 - p))[:, None]).T @ x + 0.1 * np.eye(2)
            weight += np.linalg.solve(curvature, x.T @ (right[:, ramp] - p) - 0.1 * weight)
        estimate[:, ramp] = _sigmoid(x @ weight)
    return estimate


def _sigmoid(x: Values) -> Values:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _left(score: Array, thresholds: Array) -> NDArray[np.int64]:
    """Return the ramp, from 0, at which each row leaves: (N, L) -> (N,)."""
    layers: NDArray[np.int64] = exit_layer(torch.from_numpy(score), thresholds.tolist()).numpy()
    return layers - 1


def _saved(score: Array, thresholds: Array) -> float:
    """Return the share of the layers that these thresholds save."""
    return float(1 - (_left(score, thresholds) + 1).mean() / score.shape[1])


def _worth(score: Array, worth: Values, thresholds: Array) -> float:
    """Return the sum over the rows of the worth of the ramp at which a row leaves."""
    return float(worth[np.arange(len(score)), _left(score, thresholds)].sum())
