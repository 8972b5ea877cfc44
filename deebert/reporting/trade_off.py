"""One number for a whole trade-off of score against saving: the area under it, or a point on it.

A sweeper compares jobs by it, since stage 2 never changes the score at full depth. The module reads
the results of a split, and imports nothing heavy.
"""

from bisect import bisect_left
from itertools import pairwise

from deebert.reporting.split_results import SplitResults


def area(part: SplitResults) -> float | None:
    """Return the area under score against saving, as a mean score over all possible savings.

    The largest possible saving is that of leaving at the first layer, 1 - 1/L. A saving that the
    exit rule cannot reach counts as a score of 0.

    Args:
        part: the results of a split.

    Returns:
        The area, or None without labels and with untrained ramps.
    """
    points = _points(part)
    if not points or part.num_layers < 2:
        return None
    under = sum((b - a) * (low + high) / 2 for (a, low), (b, high) in pairwise(points))
    return under / (1 - 1 / part.num_layers)


def score_at(part: SplitResults, saving: float) -> float | None:
    """Return the score at a saving, in a straight line between the two nearest points.

    Args:
        part: the results of a split.
        saving: share of the layers. Above the largest saving of the exit rule, the score is that of
            the largest.

    Returns:
        The score, or None without labels and with untrained ramps.
    """
    points = _points(part)
    if not points:
        return None
    above = bisect_left(points, saving, key=lambda point: point[0])
    if above in (0, len(points)):
        return points[min(above, len(points) - 1)][1]
    (a, low), (b, high) = points[above - 1 : above + 1]
    return low + (high - low) * (saving - a) / (b - a)


def _points(part: SplitResults) -> list[tuple[float, float]]:
    """Return saving and score of each point with a score, by growing saving."""
    points = [
        (point.expected_saving, point.score)
        for point in part.trade_off or ()
        if point.score is not None
    ]
    return sorted(points) if len(points) > 1 else []
