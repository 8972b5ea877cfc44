"""The Trainer, its callbacks and loggers, the data module: built from the configuration.

The only place that instantiates what a configuration names. Runs nothing.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from omegaconf import DictConfig

from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import HELD_OUT, Task
from deebert.errors import UserError, first_line
from deebert.hub.checkpoints import Checkpoint
from deebert.models import backbones, trained_ramps
from deebert.models.early_exit import EarlyExitModel
from deebert.runs.job import Job
from deebert.training.checkpoint_io import SafeCheckpointIO

log = logging.getLogger(__name__)

# Lightning's advice that does not apply here.
ADVICE = (
    "The dirpath has changed from .*",  # a resumed run writes into a folder of its own
    "Found .* module\\(s\\) in eval mode.*",  # module.py sets the modes deliberately
    ".*does not have many workers.*",  # a fetched batch takes a millisecond
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning #21326
    "Be aware that when using `ckpt_path`, callbacks used .*",  # told in one line (job.py)
    ".*number of training batches .* is smaller than the logging interval.*",
)


def data_module(
    task: Task,
    tokenizer: Any,
    config: dict[str, Any],
    architecture: dict[str, Any],
    batch_size: int,
) -> TextDataModule:
    values = config["data"]
    longest = backbones.longest_input(architecture)
    if values["max_length"] > longest:
        raise UserError(
            f"data.max_length={values['max_length']}: backbone {config['backbone']['name']} takes "
            f"{longest} tokens at most (data.max_length)"
        )
    unlabelled = values.get("unlabelled") or []
    if not isinstance(unlabelled, list) or len(set(map(str, unlabelled))) < len(unlabelled):
        raise UserError(
            f"data.unlabelled={unlabelled} must be a list of different splits: data.unlabelled="
            "[test]"
        )
    # A path that goes into a checkpoint must hold from another working directory too.
    for place in (values, config["task"]):
        if place.get("root"):
            place["root"] = str(Path(place["root"]).absolute())
    return TextDataModule(
        task,
        tokenizer,
        root=values["root"] or config["task"].get("root"),
        max_length=values["max_length"],
        limit_train=values["limit_train"],
        calibration_size=values["calibration_size"],
        unlabelled=[str(split) for split in unlabelled],
        batch_size=batch_size,
        eval_batch_size=values["eval_batch_size"],
        num_workers=values["num_workers"],
        seed=config["seed"],
    )


def remember_held_out(config: dict[str, Any], data: TextDataModule) -> None:
    """Write down which training rows no stage sees; later stages and evaluations hold to it.

    Raises:
        UserError: they are not the rows that an earlier stage left out.
    """
    values = config["data"]
    size = data.calibration_size
    found = data.text_fingerprint(HELD_OUT) if size else None
    expected = values.get("calibration_rows")
    # Older runs remember the rows by their tokens.
    if expected and found != expected and data.fingerprint(HELD_OUT) != expected:
        raise UserError(
            f"data.root={data.root}: the training rows have changed since the checkpoint was "
            "trained, so its held-out rows can no longer be told from those it has seen; give the "
            "same data"
        )
    values |= {"calibration_size": size, "calibration_rows": found}


def trainer(
    cfg: DictConfig, config: dict[str, Any], job: Job, kind: str, *callbacks: L.Callback
) -> L.Trainer:
    """The Trainer with its callbacks and loggers, all writing into the run folder."""
    # Lightning's tips and notes on absent devices have no other switch.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    name = f"{config['task']['name']}-{config['backbone']['name']}-{kind}-seed{config['seed']}"
    made = [instantiated(f"callbacks.{key}", v) for key, v in (cfg.get("callbacks") or {}).items()]
    made = [callback for callback in made if callback is not None]
    for callback in made:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(job.folder / "checkpoints")
    loggers = []
    for key, values in (cfg.get("logger") or {}).items():
        extra: dict[str, Any] = {"save_dir": str(job.folder)}
        if values and values["_target_"].endswith("WandbLogger"):
            group = values.get("group") or (job.sweep.name if job.sweep else None)
            extra |= {"name": name, "group": group}
        if (logger := instantiated(f"logger.{key}", values, **extra)) is not None:
            loggers.append(logger)
    if not loggers:  # LearningRateMonitor would fail
        made = [c for c in made if not isinstance(c, LearningRateMonitor)]
    trainer = instantiated(
        "trainer",
        {key: value for key, value in cfg.trainer.items() if key != "plugins"},
        plugins=_plugins(cfg.trainer.get("plugins")),
        callbacks=[*made, *callbacks],
        logger=loggers,
        default_root_dir=str(job.folder),
        enable_progress_bar=sys.stderr.isatty(),
    )
    for logger in loggers:  # after all that may fail: this opens the W&B run
        logger.log_hyperparams(config)
    return trainer


def _plugins(given: Any) -> list[Any]:
    """The user's, and what reads and writes checkpoints unless one of them does."""
    if given is None or isinstance(given, str):
        found = [given] if given else []
    else:
        made = instantiated("trainer.plugins", given) or []
        found = made if isinstance(made, list) else [made]
    own = [plugin for plugin in found if isinstance(plugin, CheckpointIO)]
    for plugin in own:  # one that wraps another, as AsyncCheckpointIO
        if getattr(plugin, "checkpoint_io", plugin) is None:
            plugin.checkpoint_io = SafeCheckpointIO()  # type: ignore[attr-defined]
    return found if own else [*found, SafeCheckpointIO()]


def instantiated(flag: str, values: Any, **extra: Any) -> Any:
    """What a block of the configuration names, or None where the user took it out."""
    if not values:
        return None
    try:
        return instantiate(values, _convert_="all", **extra)
    except InstantiationException as error:
        raise UserError(f"{flag}: {first_line(error.__cause__ or error)} ({flag}.*)") from error


def refuse_unsafe_sweep(trainer: L.Trainer, job: Job) -> None:
    """Lightning's launcher re-runs the command line in each child, `-m` and all: every process
    would do a sweep of its own, with other values (Lightning #16694, #18175)."""
    launcher = trainer.strategy.launcher
    if job.sweep and trainer.world_size > 1 and isinstance(launcher, _SubprocessScriptLauncher):
        raise UserError(
            "--multirun with several devices and trainer.strategy=ddp would run the sweep once per "
            "process; use trainer.strategy=ddp_spawn, trainer.devices=1, or start it with torchrun "
            "or srun"
        )


@contextmanager
def closing() -> Iterator[None]:
    """Around everything that runs: quiet, and closed whatever happens."""
    with warnings.catch_warnings():
        for message in ADVICE:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        except MisconfigurationException as error:  # a wrong trainer.* or callbacks.* value
            raise UserError(first_line(error)) from error
        finally:
            # One W&B run per job: without this all jobs of a sweep would share the first one's.
            wandb = sys.modules.get("wandb")
            if wandb is not None and wandb.run is not None:
                wandb.finish()


def warn_of_untrained_ramps(objective: dict[str, Any]) -> None:
    """Say which ramps, from 1, no loss has reached: whoever wants to leave elsewhere may do so."""
    if untrained := trained_ramps.untrained(objective):
        is_last = untrained[-1] == len(objective["weights"])
        log.warning(
            "objective.weights: nothing has trained ramp %s, so what leaves there is answered by "
            "chance%s",
            ", ".join(map(str, untrained)),
            " (the last is the final classifier: full depth)" if is_last else "",
        )


def cut_layers(
    model: EarlyExitModel, config: dict[str, Any], source: Checkpoint, flag: str, layers: list[int]
) -> None:
    """Leave only these layers of a checkpoint's, and write down which of the pretrained ones."""
    model.keep_layers(layers, flag)
    before = source.config["backbone"].get("layers")
    config["backbone"]["layers"] = [before[layer - 1] for layer in layers] if before else layers
