"""A job of Hydra: its folder, the keys on its command line, and its value for a sweeper.

This module does not know training or evaluation. It reads the value from results.json.
"""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from deebert.errors import UserError, is_number
from deebert.options import drop_stdout
from deebert.reporting import report
from deebert.reporting.results import Results

log = logging.getLogger(__name__)

OPTIMIZE = ("auto", "score", "area")  # values for a sweeper; a saving is another


@dataclass(frozen=True)
class Job:
    """The folder of a job, and the keys that the user has set on the command line.

    Attributes:
        folder: the run folder.
        explicit: the keys of the overrides, such as "task" or "stages.2.lr". An experiment also
            sets "ramp".
        sweep: the folder of the multirun, or None in a single run.
    """

    folder: Path
    explicit: frozenset[str]
    sweep: Path | None

    @classmethod
    def current(cls) -> "Job":
        """Return the job that Hydra runs now."""
        hydra = HydraConfig.get()
        keys = {override.partition("=")[0].lstrip("+~") for override in hydra.overrides.task}
        if "experiment" in keys:
            keys.add("ramp")  # an experiment names a ramp, which wins over the checkpoint's ramp
        sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
        return cls(Path(hydra.runtime.output_dir), frozenset(keys), sweep)

    def is_set(self, key: str) -> bool:
        """Say whether the user has set this key, or a key inside it, on the command line."""
        return any(name == key or name.startswith(f"{key}.") for name in self.explicit)


def check_optimize(optimize: Any, *, trained: bool) -> None:
    """Check the key that chooses the value for a sweeper.

    Args:
        optimize: `auto`, `score`, `area`, or a saving.
        trained: whether the job's ramps are trained.

    Raises:
        UserError: the value is none of these, or needs trained ramps.
    """
    is_saving = is_number(optimize) and 0 <= optimize < 1
    if optimize not in OPTIMIZE and not is_saving:
        raise UserError(
            f"optimize={optimize} must be one of: {', '.join(OPTIMIZE)}, or a saving, such as 0.4 "
            "for the score at 40 % of the layers saved (optimize=...)"
        )
    if not trained and (optimize == "area" or is_saving):
        raise UserError(
            f"optimize={optimize} needs trained ramps, and those of this job say nothing: use "
            "optimize=score"
        )


def read_results(folder: Path) -> Results | None:
    """Return the results of a finished run, or None if nothing was evaluated."""
    file = folder / "results.json"  # with ddp_spawn, the processes return nothing but files
    return Results.from_json(json.loads(file.read_text())) if file.exists() else None


def finish(
    is_global_zero: bool,
    job: Job,
    optimize: Any = "auto",
    *,
    at_threshold: bool = False,
    following: Callable[[Results], str] | None = None,
) -> float | None:
    """Print the results of a job, and return its value for Hydra's sweepers: more is better.

    Args:
        is_global_zero: whether this is the first of all processes of the run.
        job: the job.
        optimize: the value: `score` at full depth, `area` under score against saving, the score at
            a saving, or `auto`.
        at_threshold: whether `auto` means the score at the curve's first threshold.
        following: returns the command that comes next, which is printed; None for none.

    Returns:
        The value. `auto` is the measured score of the target, if there is one; else the score at
        the curve's first threshold, if the user gave it; else the area in stage 2, and the score in
        stage 1. None in other processes, without results, or without labels.
    """
    if not is_global_zero:
        return None
    if (results := read_results(job.folder)) is None:
        log.warning("nothing was evaluated; run folder: %s", job.folder)
        return None
    try:
        report.show(results, job.folder)
        if following and not job.sweep:
            print(f"Next: {following(results)}")
        sys.stdout.flush()
    except OSError as error:  # a full device, or a reader that has closed its end of the pipe
        drop_stdout()
        log.warning("stdout takes no more (%s): the results are in %s", error.strerror, job.folder)
    part = results.headline
    if optimize == "auto":
        if results.calibration:
            return results.calibration.measured.score
        if at_threshold:
            return part.curve[0].score
        optimize = "area" if results.stage == 2 and part.trade_off else "score"
    if optimize == "score":
        return part.exits[-1].score
    return part.area() if optimize == "area" else part.score_at(optimize)
