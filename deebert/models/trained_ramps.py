"""Which ramps an objective trains, by its name and values. Imports nothing heavy.

Whoever reads results, records or checkpoints asks this; `training.objectives` has the losses.
"""

from collections.abc import Mapping
from typing import Any

FINAL_ALONE = ("final", "student")  # objectives that train the final classifier alone


def trains_ramps(name: Any) -> bool:
    """Say whether the objective of this name trains ramps before the last.

    Leaving early means nothing where it does not.
    """
    return name not in FINAL_ALONE


def untrained(values: Mapping[str, Any]) -> list[int]:
    """List the ramps, from 1, that these values of an objective give no weight."""
    weights = values.get("weights")
    listed = weights if isinstance(weights, list | tuple) else ()
    return [k for k, weight in enumerate(listed, 1) if weight == 0]
