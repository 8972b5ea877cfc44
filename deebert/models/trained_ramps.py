"""Which ramps an objective trains, by its name and values.

Code that reads results, records or checkpoints needs this without the losses, which are in
`training.objectives`. The module imports no large library.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

# Objectives that train the final classifier alone. `objectives.objective` adds those of users.
FINAL_ALONE = ["final", "student"]


def trains_ramps(name: Any) -> bool:
    """Say whether the objective of this name trains ramps before the last.

    Early exits have no meaning if it does not.
    """
    return name not in FINAL_ALONE


@dataclass(frozen=True)
class ObjectiveConfig:
    """The name and the options of an objective: the block `objective` of the configuration.

    `training.objectives` checks them when it builds the objective. A record can be read without the
    user's module that defines its objective.

    Attributes:
        name: the name, or None in a file of an older version that has none.
        options: the values of the options, by name.
    """

    name: str | None
    options: Mapping[str, Any]

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Build it from the values of a file in `conf/objective/`."""
        options = {key: value for key, value in values.items() if key != "name"}
        return cls(values.get("name"), options)

    def plain(self) -> dict[str, Any]:
        """Return the name and the options as one mapping."""
        return {"name": self.name, **self.options}

    @property
    def trains_ramps(self) -> bool:
        """True if the objective trains ramps before the last."""
        return trains_ramps(self.name)

    @property
    def num_weights(self) -> int:
        """The number of weights, one for each ramp; 0 if the objective has none."""
        return len(self._weights)

    @property
    def untrained(self) -> list[int]:
        """The ramps, counted from 1, to which the objective gives no weight."""
        return [k for k, weight in enumerate(self._weights, 1) if weight == 0]

    @property
    def _weights(self) -> list[Any]:
        weights = self.options.get("weights")
        return list(weights) if isinstance(weights, list | tuple) else []
