"""A job of Hydra: its folder, the keys on its command line, its configuration and its outcome."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from deebert.errors import UserError
from deebert.reporting import report
from deebert.runs import ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Where Hydra lets this job write, and what the user said on the command line."""

    folder: Path
    explicit: frozenset[str]  # keys of the overrides, "task", "stages.2.lr"; of an experiment ramp
    sweep: Path | None  # the multirun's folder, None in a single run

    @classmethod
    def current(cls) -> "Job":
        hydra = HydraConfig.get()
        keys = {override.partition("=")[0].lstrip("+~") for override in hydra.overrides.task}
        if "experiment" in keys:
            keys.add("ramp")  # part of what it stands for, as its stages are
        sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
        return cls(Path(hydra.runtime.output_dir), frozenset(keys), sweep)

    def refuse_used_folder(self) -> None:
        """A run folder is never reused: its results would no longer belong to its weights.

        Raises:
            UserError: another run has written here.
        """
        if not ranks.is_first():
            return  # another process of the run that has just begun here
        for name in ("results.json", "checkpoints", "csv"):
            if (self.folder / name).exists():
                raise UserError(
                    f"hydra.run.dir={self.folder} holds the {name} of another run, and a run "
                    "folder is never reused: choose another hydra.run.dir, or leave it out"
                )

    def said(self, key: str) -> bool:
        """Did the user set this key, or something inside it?"""
        return any(said == key or said.startswith(f"{key}.") for said in self.explicit)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, all references resolved."""
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    if config.get("task") is None:
        raise UserError(
            "task= is missing: python train.py task=mrpc stage=1; choose one of: "
            f"{', '.join(_choices('task'))}"
        )
    return {str(key): value for key, value in config.items()}


def _choices(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group)


def finish(is_global_zero: bool, job: Job, *, at_threshold: bool = False) -> float | None:
    """What a sweeper is given: what became of a target, else full depth, or the one threshold."""
    if not is_global_zero:
        return None
    file = job.folder / "results.json"  # with ddp_spawn all that the processes leave behind
    if not file.exists():
        log.warning("nothing was evaluated; run folder: %s", job.folder)
        return None
    results = json.loads(file.read_text())
    report.show(results, job.folder)
    told = results["curve"][0] if at_threshold else results["exits"][-1]
    asked = results.get("calibration", {}).get("measured") or told
    return None if asked["score"] is None else float(asked["score"])
