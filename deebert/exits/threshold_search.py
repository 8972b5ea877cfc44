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
import torch
from numpy.typing import NDArray
from torch import Tensor

from deebert.exits import curves
from deebert.exits.rules import exit_layer

MOST_ROWS = 5000  # searched on; more don't change the thresholds, only the time
FOLDS = 5
PASSES = 4
SURE = 1.0  # standard errors by which the cross-validated gain must be above 0
Array = NDArray[np.float32]
Values = NDArray[np.float64]


def search(score_NL: Tensor, right_NL: Tensor, saving: float) -> list[float] | None:
    """Thresholds (L-1 of them) that save at least so much on these rows, or None where one global
    threshold is the better choice.

    Args:
        score_NL: how unsure each ramp is (inf: never leaves there); the last column is not used.
        right_NL: True where the ramp's answer is right.
        saving: share of the layers, by which the global threshold is set, too.
    """
    all_scores = score_NL.float().nan_to_num(nan=torch.inf, posinf=torch.inf).numpy()
    all_right = right_NL.double().numpy()
    order = np.random.default_rng(0).permutation(len(all_scores))[:MOST_ROWS]
    score, right = all_scores[order], all_right[order]
    gains = []
    for fold in range(FOLDS):
        seen = np.arange(len(score)) % FOLDS != fold
        found = _best(score[seen], right[seen], saving)
        if found is None:
            return None
        # At equal saving: where per-ramp thresholds save more than was wished, so must this one.
        level = _global(score[seen], _saved(score[seen], found))
        rows = np.arange(len(score) - seen.sum())
        ours, theirs = (_left(score[~seen], given) for given in (found, level))
        gains.append(right[~seen][rows, ours] - right[~seen][rows, theirs])
    gain = np.concatenate(gains)
    sure = gain.mean() > SURE * gain.std() / math.sqrt(len(gain))
    found = _best(score, right, saving) if sure else None
    if found is None or _saved(all_scores, found) < saving:
        return None
    level = _global(all_scores, saving)
    if _worth(all_scores, all_right, found) < _worth(all_scores, all_right, level):
        return None
    return [float(limit) for limit in found]


def _global(score: Array, saving: float) -> Array:
    """The global threshold for a saving, once for each ramp."""
    [level] = curves.thresholds_for(torch.from_numpy(score), [saving])
    return np.full(score.shape[1] - 1, level, np.float32)


def _best(score: Array, right: Values, saving: float) -> Array | None:
    """Thresholds of most worth among those found that save enough."""
    worth = (right + _smooth(score, right)) / 2
    order = [np.argsort(score[:, ramp]) for ramp in range(score.shape[1] - 1)]
    start = _global(score, saving)
    best, most = None, -math.inf
    low, high = 0.0, 4.0  # price of all layers, in right answers
    for _ in range(14):
        price = (low + high) / 2
        found = _ascend(score, worth, price, order, start)
        enough = _saved(score, found) >= saving
        low, high = (low, price) if enough else (price, high)
        if enough and (value := _worth(score, worth, found)) > most:
            best, most = found, value
    return best


def _ascend(
    score: Array, worth: Values, price: float, order: list[NDArray[np.int64]], start: Array
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
            ordered = score[order[ramp], ramp]
            can_leave = int(np.isfinite(ordered).sum())  # inf sorts last: never under a threshold
            total, leaving = np.cumsum(gain[order[ramp]])[:can_leave], ordered[:can_leave]
            total[:-1][leaving[1:] == leaving[:-1]] = -np.inf  # equal scores leave together
            last = int(total.argmax()) if can_leave else 0
            pays = can_leave and total[last] > 0
            found[ramp] = _above(leaving, last) if pays else 0.0
            later = np.where(score[:, ramp] < found[ramp], ramp, later)
        if np.array_equal(before, found):
            break
    return found


def _above(ordered: Array, last: int) -> float:
    """A threshold that the rows up to `last` are under."""
    here = float(ordered[last])
    after = ordered[last + 1 :]
    upper = float(after[after > ordered[last]][:1].sum()) or here * 1.01 + 1e-6
    return curves.between(here, upper)


def _smooth(score: Array, right: Values) -> Values:
    """P(right | score) of each ramp by logistic regression, with a slight ridge: (N, L)."""
    worst = np.max(score, where=np.isfinite(score), initial=0.0)
    score = np.nan_to_num(score.astype(np.float64), posinf=float(worst))
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


def _sigmoid(x: Values) -> Values:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _left(score: Array, thresholds: Array) -> NDArray[np.int64]:
    """The ramp (from 0) at which each row leaves."""
    layers: NDArray[np.int64] = exit_layer(torch.from_numpy(score), thresholds.tolist()).numpy()
    return layers - 1


def _saved(score: Array, thresholds: Array) -> float:
    return float(1 - (_left(score, thresholds) + 1).mean() / score.shape[1])


def _worth(score: Array, worth: Values, thresholds: Array) -> float:
    return float(worth[np.arange(len(score)), _left(score, thresholds)].sum())
