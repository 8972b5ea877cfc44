"""Building the Trainer, its callbacks and loggers, and the data module from the configuration.

This is the only module that instantiates objects that a configuration names. It trains and
evaluates nothing.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from deebert.data.tasks import HELD_OUT
from deebert.errors import UserError, first_line
from deebert.hub.checkpoints import Checkpoint
from deebert.hub.run_config import RunConfig
from deebert.models import backbones
from deebert.models.early_exit import EarlyExitModel
from deebert.models.trained_ramps import ObjectiveConfig
from deebert.runs import signals
from deebert.runs.config import JobConfig
from deebert.runs.job import Job
from deebert.training import loggers, progress
from deebert.training.checkpoint_io import SafeCheckpointIO

log = logging.getLogger(__name__)

# Warnings of Lightning that do not apply here.
ADVICE = (
    "The dirpath has changed from .*",  # a resumed run writes into its own folder
    "Found .* module\\(s\\) in eval mode.*",  # module.py sets the modes deliberately
    ".*does not have many workers.*",  # reading a batch takes a millisecond
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning #21326
    "Be aware that when using `ckpt_path`, callbacks used .*",  # inheritance.py has its own warning
    ".*number of training batches .* is smaller than the logging interval.*",
)


def data_module(run: RunConfig, tokenizer: Any, batch_size: int) -> TextDataModule:
    """Return the data module for a run.

    Args:
        run: the configuration of the run.
        tokenizer: the tokenizer of the model.
        batch_size: the number of rows in a training batch.
    """
    settings = run.data
    return TextDataModule(
        run.task,
        tokenizer,
        root=settings.source(run.task),
        max_length=settings.max_length,
        limit_train=settings.limit_train,
        calibration_size=settings.calibration_size,
        unlabelled=settings.unlabelled,
        batch_size=batch_size,
        eval_batch_size=settings.eval_batch_size,
        num_workers=settings.num_workers,
        seed=run.seed,
    )


def check_length(run: RunConfig, architecture: dict[str, Any]) -> None:
    """Check that a backbone takes inputs as long as the run's.

    Args:
        run: the configuration of the run.
        architecture: the settings of the backbone.

    Raises:
        UserError: the inputs would be longer than the backbone allows.
    """
    longest = backbones.longest_input(architecture)
    if run.data.max_length > longest:
        raise UserError(
            f"data.max_length={run.data.max_length}: backbone {run.backbone.name} takes "
            f"{longest} tokens at most (data.max_length)"
        )


def with_split(run: RunConfig, data: TextDataModule, source: Checkpoint | None) -> RunConfig:
    """Return the configuration with the fingerprint of a file that is split (`data.file`).

    Args:
        run: the configuration of the run.
        data: its rows.
        source: the checkpoint that the run starts from, or None.

    Raises:
        UserError: the validation rows might be rows that the checkpoint was trained on: it was
            trained on other files, or the file has changed since.
    """
    fingerprint, expected = data.split_fingerprint, run.data.split_rows
    if fingerprint is None:  # rows of a folder follow: the split of a file says nothing of them
        return run.changed(data={"split_rows": None}) if expected else run
    if source and not source.is_plain_classifier and not expected:
        raise UserError(
            f"data.file={run.data.file}: {source.path} was trained on other files, and this one, "
            "split anew, may report rows that it was trained on; give a folder with a file "
            "validation: data.file=DIR"
        )
    if expected and fingerprint != expected:
        raise UserError(
            f"data.file={run.data.file}: its rows have changed since the checkpoint was trained, "
            "so the rows it has seen cannot be told from others; give the same file, or a folder "
            "with other rows: data.root=DIR"
        )
    return run.changed(data={"split_rows": fingerprint})


def with_held_out(run: RunConfig, data: TextDataModule) -> RunConfig:
    """Return the configuration with the fingerprint of the held-out training rows.

    No stage trains on these rows. Later stages and evaluations check that the rows are the same.

    Raises:
        UserError: the rows are not those that an earlier stage held out.
    """
    size, expected = data.calibration_size, run.data.calibration_rows
    fingerprint = data.text_fingerprint(HELD_OUT) if size else None
    # Older runs have a fingerprint of the tokens, not of the texts.
    if expected and fingerprint != expected and data.fingerprint(HELD_OUT) != expected:
        raise UserError(
            f"{data.flag}: the training rows have changed since the checkpoint was "
            "trained, so its held-out rows can no longer be told from those it has seen; give the "
            "same data"
        )
    return run.changed(data={"calibration_size": size, "calibration_rows": fingerprint})


def trainer(
    cfg: DictConfig, config: JobConfig, job: Job, kind: str, *callbacks: L.Callback
) -> L.Trainer:
    """Return the Trainer with its callbacks and loggers, all writing into the run folder.

    Args:
        cfg: the configuration, whose `trainer`, `callbacks` and `logger` blocks are instantiated.
        config: the same configuration, typed, for the loggers.
        job: the job that runs.
        kind: the part of the W&B run's name that says what runs, such as `stage1`.
        callbacks: more callbacks.

    Raises:
        UserError: an object that the configuration names cannot be made.
    """
    # Lightning's tips, and its notes on missing devices, cannot be turned off in another way.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    configured = [
        callback
        for key, values in (cfg.get("callbacks") or {}).items()
        if (callback := instantiated(f"callbacks.{key}", values)) is not None
    ]
    for callback in configured:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(job.folder / "checkpoints")
    given_loggers = []
    for key, values in (cfg.get("logger") or {}).items():
        defaults: dict[str, Any] = {"save_dir": str(job.folder)}
        if _is_wandb(values):
            if loggers.wandb_mode(values.get("offline")) == "disabled":
                continue
            defaults |= {"name": config.name(kind), "group": job.sweep.name if job.sweep else None}
        elif str((values or {}).get("_target_")).endswith("MLFlowLogger"):
            defaults |= {"run_name": config.name(kind)}
        extra = {n: v for n, v in defaults.items() if (values or {}).get(n) is None}
        if (logger := instantiated(f"logger.{key}", values, **extra)) is not None:
            given_loggers.append(logger)
    if not given_loggers:  # LearningRateMonitor would fail
        configured = [c for c in configured if not isinstance(c, LearningRateMonitor)]
    settings = {key: value for key, value in cfg.trainer.items() if key != "plugins"}
    wanted = settings.get("enable_progress_bar")
    configured, settings["enable_progress_bar"] = progress.with_bar(configured, wanted)
    trainer = instantiated(
        "trainer",
        settings,
        plugins=_plugins(cfg.trainer.get("plugins")),
        callbacks=[*configured, *callbacks],
        logger=given_loggers,
        default_root_dir=str(job.folder),
    )
    # This opens the W&B run, so it comes after everything that may fail.
    for logger in given_loggers:
        loggers.attempt(logger, logger.log_hyperparams, config.plain())
    return trainer


def check_loggers(cfg: DictConfig) -> None:
    """Check that loggers are installed, and W&B has an account if a run is not offline.

    Raises:
        UserError: one is not, or it has none.
    """
    for values in (cfg.get("logger") or {}).values():
        loggers.check_package(str((values or {}).get("_target_")))
        if _is_wandb(values) and signals.is_first_process():
            loggers.check_login(values.get("offline"))


def _is_wandb(values: Any) -> bool:
    """Say whether a block of the configuration is a logger to W&B."""
    return bool(values) and values.get("_target_", "").endswith("WandbLogger")


def _plugins(given: Any) -> list[Any]:
    """Return the user's plugins, with SafeCheckpointIO unless one of them handles checkpoints."""
    if given is None or isinstance(given, str):
        plugins = [given] if given else []
    else:
        instances = instantiated("trainer.plugins", given) or []
        plugins = instances if isinstance(instances, list) else [instances]
    checkpoint_plugins = [plugin for plugin in plugins if isinstance(plugin, CheckpointIO)]
    for plugin in checkpoint_plugins:
        # AsyncCheckpointIO and its like wrap another plugin, which may be missing.
        if getattr(plugin, "checkpoint_io", plugin) is None:
            plugin.checkpoint_io = SafeCheckpointIO()  # type: ignore[attr-defined]
    return plugins if checkpoint_plugins else [*plugins, SafeCheckpointIO()]


def instantiated(flag: str, values: Any, **extra: Any) -> Any:
    """Return the object that a block of the configuration names.

    Args:
        flag: the block's key, for error messages.
        values: the block; empty where the user has removed it.
        extra: more keyword arguments of the object.

    Returns:
        The object, or None if the block is empty.

    Raises:
        UserError: the object cannot be made.
    """
    if not values:
        return None
    try:
        return instantiate(values, _convert_="all", **extra)
    except InstantiationException as error:
        raise UserError(f"{flag}: {first_line(error.__cause__ or error)} ({flag}.*)") from error


def refuse_unsafe_sweep(trainer: L.Trainer, job: Job) -> None:
    """Refuse a sweep in which Lightning would start several processes by the command line.

    Lightning's launcher runs the whole command line in each child process, with `-m`. Every process
    would do its own sweep, with other values (Lightning #16694, #18175).

    Raises:
        UserError: the job is such a sweep.
    """
    launcher = trainer.strategy.launcher
    if job.sweep and trainer.world_size > 1 and isinstance(launcher, _SubprocessScriptLauncher):
        raise UserError(
            "--multirun with several devices and trainer.strategy=ddp would run the sweep once per "
            "process; use trainer.strategy=ddp_spawn, trainer.devices=1, or start it with torchrun "
            "or srun"
        )


@contextmanager
def closing(job: Job) -> Iterator[None]:
    """Silence needless warnings while the Trainer runs, and close the W&B run at the end.

    Args:
        job: the job that runs, whose folder W&B writes into.

    Raises:
        UserError: Lightning refuses a value of the configuration.
    """
    with warnings.catch_warnings(), loggers.wandb_inside(job.folder):
        for message in ADVICE:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        except MisconfigurationException as error:  # a wrong trainer.* or callbacks.* value
            raise UserError(first_line(error)) from error
        finally:
            # Without this, all jobs of a sweep would write into the W&B run of the first job.
            wandb = sys.modules.get("wandb")
            if wandb is not None and wandb.run is not None:
                try:
                    wandb.finish()
                except Exception as error:  # what is logged must not end a run
                    log.warning("W&B has not finished its run: %s", first_line(error))


def warn_of_untrained_ramps(objective: ObjectiveConfig) -> None:
    """Warn if the objective has trained some ramps with a weight of 0."""
    if untrained := objective.untrained:
        is_last = untrained[-1] == objective.num_weights
        log.warning(
            "objective.weights: nothing has trained ramp %s, so what leaves there is answered by "
            "chance%s",
            ", ".join(map(str, untrained)),
            " (the last is the final classifier: full depth)" if is_last else "",
        )


def cut_layers(
    model: EarlyExitModel, run: RunConfig, source: Checkpoint, flag: str, layers: list[int]
) -> RunConfig:
    """Keep only some layers of a model.

    Args:
        model: the model of the checkpoint. It is changed in place.
        run: the configuration of the run.
        source: the checkpoint that the model comes from.
        flag: the key that the user has set, for error messages.
        layers: the layers to keep, counted from 1 in the checkpoint's model.

    Returns:
        The configuration with the numbers that the layers have in the pretrained backbone.

    Raises:
        UserError: the layers are not those of the model (`EarlyExitModel.keep_layers`).
    """
    model.keep_layers(layers, flag)
    pretrained = source.config.backbone.layers
    numbers = [pretrained[layer - 1] for layer in layers] if pretrained else layers
    return run.changed(backbone={"layers": numbers})
