"""A job of Hydra: its folder, the keys on its command line, and its score.

This module does not know training or evaluation. It reads the score from results.json.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from deebert.options import drop_stdout
from deebert.reporting import report
from deebert.reporting.results import Results

log = logging.getLogger(__name__)


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


def finish(is_global_zero: bool, job: Job, *, at_threshold: bool = False) -> float | None:
    """Print the results of a job, and return its score for Hydra's sweepers.

    Args:
        is_global_zero: whether this is the first of all processes of the run.
        job: the job.
        at_threshold: whether the score is that of the curve's first threshold.

    Returns:
        The measured score of the target, if there is one; else the score at the curve's first
        threshold or at full depth. None in other processes, without results, or without labels.
    """
    if not is_global_zero:
        return None
    file = job.folder / "results.json"  # with ddp_spawn, the processes return nothing but files
    if not file.exists():
        log.warning("nothing was evaluated; run folder: %s", job.folder)
        return None
    results = Results.from_json(json.loads(file.read_text()))
    try:
        report.show(results, job.folder)
        sys.stdout.flush()
    except OSError as error:  # a full device, or a reader that has closed its end of the pipe
        drop_stdout()
        log.warning("stdout takes no more (%s): the results are in %s", error.strerror, job.folder)
    if results.calibration:
        return results.calibration.measured.score
    return results.headline.curve[0].score if at_threshold else results.headline.exits[-1].score
