"""What the service sees of drift, of all its processes together, and what it does against it.

It lives in the process that speaks HTTP, which sees all answers and outlives the processes that
hold the model. Knows nothing of HTTP and models.
"""

import logging
from collections.abc import Sequence
from typing import Any

from deebert.exits.drift import BROKEN, LEVELS
from deebert.exits.drift_monitor import NOT_CALIBRATED, Drift, Monitor, SavingFollower
from deebert.serve.requests import Work

log = logging.getLogger(__name__)


class Watch:
    """The tests of drift of all targets.

    Args:
        num_layers: the number of layers of the model.
        follows: whether a `target_saving` is followed after a drift (`recalibrate=saving`).
    """

    def __init__(self, num_layers: int, follows: bool) -> None:
        self.num_layers, self.follows = num_layers, follows
        self._monitor = Monitor(num_layers)
        self._followers: dict[str, SavingFollower] = {}

    def expect(self, target: str, calibration_N: Any) -> None:
        """Begin the test of a target (`Work.name`) with the exits of its calibration rows."""
        self._monitor.expect(target, calibration_N)

    def nominal(self, work: Work) -> float | None:
        """Return the saving to choose thresholds for in place of the target's, or None."""
        follower = self._followers.get(work.name)
        return None if follower is None else follower.rounded

    def seen(self, work: Work, exit_layers: Sequence[int], cells: Any) -> None:
        """Read the exits of the texts of a request."""
        if not exit_layers:
            return
        follower = self._followers.get(work.name)
        if follower is not None:
            follower.update([1 - layer / self.num_layers for layer in exit_layers])
        if work.nominal is not None:
            return  # thresholds that no calibration row was compared at
        before = self._monitor.state(work.name)
        state = self._monitor.update(work.name, cells)
        if state in (before, NOT_CALIBRATED):
            return
        log.warning("target %s: %s", work.name, self.drift)
        if state == BROKEN and self.follows and "target_saving" in work.target:
            saving = float(work.target["target_saving"])
            self._followers[work.name] = SavingFollower(saving)
            log.warning(
                "target %s: the thresholds follow the saving from now on, without labels; nothing "
                "is known of the score",
                work.name,
            )

    @property
    def drift(self) -> Drift:
        """The state of the worst target."""
        return self._monitor.worst

    @property
    def followed(self) -> dict[float, float]:
        """The savings that thresholds are chosen for, by the `target_saving` that is followed."""
        return {each.target: each.rounded for each in self._followers.values()}

    def __str__(self) -> str:
        line = str(self.drift)
        for target, nominal in self.followed.items():
            line += f"; target_saving={target} is kept by the thresholds of {nominal}"
        if self.followed and self.drift.state in LEVELS:
            line += "; the score is unknown"
        return line
