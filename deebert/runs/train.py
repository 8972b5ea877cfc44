"""The training of one of the two stages.

`train` reads the configuration, prepares the model and the data, runs the Trainer and validates the
best epoch. The losses and the parameters of each stage are in `deebert.training`.
"""

import json
import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig

from deebert.data import file_split, tokenization
from deebert.data.datamodule import TextDataModule
from deebert.disk import whole_files
from deebert.errors import UserError, first_line
from deebert.hub.checkpoints import WEIGHTS_FINGERPRINT, Checkpoint
from deebert.hub.run_config import RunConfig
from deebert.models import backbones
from deebert.models.early_exit import EarlyExitModel
from deebert.models.trained_ramps import trains_ramps
from deebert.options import assignment, import_modules, job_command
from deebert.reporting.results import Results
from deebert.runs import build, keys, sources
from deebert.runs.config import TrainConfig
from deebert.runs.job import Job, check_optimize, finish
from deebert.training.callbacks import EarlyExitEvaluation
from deebert.training.feature_cache import FeatureCache
from deebert.training.module import EarlyExitModule
from deebert.training.progress import EpochLine
from deebert.untrusted import tensor_files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The model that a training starts with, and what belongs to it.

    Attributes:
        model: the model.
        run: the configuration of the run, with the layers that the model has kept.
        teacher: the model that a student learns from, or None.
        trained_ramps: the ramps before the last, counted from 0, that are trained already.
    """

    model: EarlyExitModel
    run: RunConfig
    teacher: EarlyExitModel | None = None
    trained_ramps: frozenset[int] = frozenset()


class Prepared(NamedTuple):
    """A training before its Trainer is built.

    Attributes:
        config: the typed configuration.
        module: the LightningModule.
        data: the data module, of tokens or of frozen states.
        source: the checkpoint that the training starts from, or None.
    """

    config: TrainConfig
    module: EarlyExitModule
    data: L.LightningDataModule
    source: Checkpoint | None


def train(cfg: DictConfig) -> float | None:
    """Run one stage.

    Args:
        cfg: the configuration of train.py.

    Returns:
        The value for Hydra's sweepers (`job.finish`); None in all processes but the first.

    Raises:
        UserError: the configuration or the data has a mistake.
    """
    job = Job.current()
    config, module, data, source = prepare(cfg, job)
    with build.closing(job):
        trainer = build.trainer(cfg, config, job, f"stage{config.run.stage}", EpochLine())
        build.refuse_unsafe_sweep(trainer, job)
        _check_strategy(trainer, config)
        _fit(trainer, module, data, config, source)
        if source and config.resume and not _is_evaluated(trainer, job):
            _validate_resumed(trainer, module, data, source, job)
        _validate_kept(trainer, module, data, job)
    is_first = trainer.is_global_zero
    return finish(is_first, job, cfg.optimize, following=partial(_next_command, job))


def prepare(cfg: DictConfig, job: Job) -> Prepared:
    """Check the configuration, read the rows and load the model of a training.

    Args:
        cfg: the configuration of train.py.
        job: the job that runs.

    Raises:
        UserError: the configuration or the data has a mistake.
    """
    import_modules(cfg.get("modules"))
    keys.check(cfg, job)
    source = sources.complete(cfg, job)
    config = TrainConfig.from_hydra(cfg)
    build.check_loggers(cfg)
    check_optimize(cfg.optimize, trained=config.run.objective.trains_ramps)
    L.seed_everything(config.run.seed, workers=True, verbose=False)
    _ = config.run.ramp_kind  # an unknown reader is named before a backbone is fetched
    tokenizer = source.tokenizer() if source else backbones.tokenizer(config.run.backbone)
    files = source.tokenizer_files if source else tokenization.files_of(tokenizer)
    tokens = _read_rows(config.run, tokenizer)
    run = build.with_held_out(build.with_split(config.run, tokens, source), tokens)
    config = replace(config, run=run)
    start = _from_checkpoint(cfg, config, source) if source else _from_backbone(run)
    config = replace(config, run=start.run)
    _prepare_model(start, tokenizer, config)
    module = EarlyExitModule(start.model, config.run, files, start.teacher)
    data = _cache(tokens, start, config, job) if module.is_cached else tokens
    return Prepared(config, module, data, source)


def _next_command(job: Job, results: Results) -> str:
    """Return the command that goes on from this run: stage 2, then an evaluation."""
    ckpt = assignment("ckpt", str(job.folder))
    if trains_ramps(results.objective):
        return f"{job_command('evaluate')} {ckpt} target_saving=0.4"
    return f"{job_command('train')} stage=2 {ckpt}"


def _from_backbone(run: RunConfig) -> Start:
    """Return the start of a training on a pretrained backbone."""
    model = EarlyExitModel.from_backbone(run.backbone, run.task.num_labels, run.ramp)
    return Start(model, run)


def _from_checkpoint(cfg: DictConfig, config: TrainConfig, source: Checkpoint) -> Start:
    """Return the start of a training on a checkpoint, with the ramps of the configuration."""
    run, teacher, model = config.run, None, source.model()
    if run.teacher and config.resume:
        teacher = sources.read_teacher(cfg).model()
    elif run.teacher:
        teacher, layers = source.model(), run.backbone.layers
        assert layers is not None  # a student has no other start
        run = build.cut_layers(model, run, source, "backbone.layers", layers)
    kind = run.ramp_kind
    # A ramp that only predicts something else still reads the same states.
    is_same = kind == replace(model.ramp_kind, predicts=kind.predicts)
    if kind != model.ramp_kind:
        if source.ramps_trained and not is_same:
            log.info(
                "%s: its ramps are replaced by new ones that read %s (ramp=)",
                source.path,
                kind.reads,
            )
        model.new_ramps(kind)
    trained: set[int] = set()
    if source.ramps_trained and is_same:
        untrained = {number - 1 for number in source.config.objective.untrained}
        trained = {*range(len(model.ramps) - 1)} - untrained
    return Start(model, run, teacher, frozenset(trained))


def _prepare_model(start: Start, tokenizer: Any, config: TrainConfig) -> None:
    """Give the model the tokenizer's separator, and check what must fit the model.

    Raises:
        UserError: the tokenizer, the length of the inputs or the objective does not fit the model.
    """
    model, run = start.model, start.run
    tokenization.check(tokenizer, model.config)
    build.check_length(run, model.config)
    if model.ramp_kind.reader.needs_second_text:
        model.backbone.separator = tokenizer.sep_token_id
        if tokenizer.sep_token_id is None:
            reads = model.ramp_kind.reads
            raise UserError(f"ramp.reads={reads}: the tokenizer has no separator; use ramp=mean")
    num_weights = config.objective.num_ramps
    if num_weights not in (None, len(model.ramps)):
        raise UserError(
            f"objective.weights={run.objective.options['weights']} has {num_weights} values; of "
            f"{len(model.ramps)} ramps each needs one"
        )
    build.warn_of_untrained_ramps(run.objective)
    if len(model.ramps) < 2 and run.objective.trains_ramps:
        layers = run.backbone.layers
        cut = f" backbone.layers={layers}" if layers else ""
        raise UserError(
            f"backbone={run.backbone.name}{cut} has one layer: nothing to leave early (it "
            "can be trained with stage=1 objective=final)"
        )


def _read_rows(run: RunConfig, tokenizer: Any) -> TextDataModule:
    """Return the data module, with the rows read and tokenized.

    Mistakes in the data are found here, before weights are loaded and a logger starts.
    """
    data = build.data_module(run, tokenizer, run.recipe.batch_size)
    data.prepare_data()
    data.train_dataloader()
    if run.data.file:
        _describe_rows(data, run.data.file)
    return data


def _describe_rows(data: TextDataModule, file: str) -> None:
    """Say how many rows a user's own file has, and warn of what is odd in them."""
    train, validation = (data.rows(str(split)) for split in (data.task.train, data.eval_splits[0]))
    names = data.task.labels
    log.info(
        "data.file=%s: %s", file, file_split.summary(train["label"][:], len(validation), names)
    )
    for oddity in file_split.oddities(train, validation, names):
        log.warning("data.file=%s: %s", file, oddity)


def _cache(data: TextDataModule, start: Start, config: TrainConfig, job: Job) -> FeatureCache:
    """Return the cache of the frozen states.

    Trained ramps are not standardized: they would read other features than they were trained on.
    """
    new_ramps = set(range(len(start.model.ramps) - 1)) - start.trained_ramps
    standardize = config.run.recipe.standardize
    if standardize and start.trained_ramps and not config.resume:
        log.info("stages.2.standardize: ramps that are trained already go on as they are")
    return FeatureCache(data, start.model, job.folder, standardize=new_ramps if standardize else ())


def _check_strategy(trainer: L.Trainer, config: TrainConfig) -> None:
    """Check that the Trainer's strategy can do what the configuration needs.

    Raises:
        UserError: it cannot.
    """
    strategy, layer_drop = config.run.trainer["strategy"], config.run.recipe.layer_drop
    if layer_drop and trainer.world_size > 1 and "find_unused" not in str(strategy):
        raise UserError(
            f"stages.1.layer_drop={layer_drop} with several devices leaves "
            "parameters unused: say trainer.strategy=ddp_find_unused_parameters_true"
        )
    reads_alone = type(trainer.strategy).load_checkpoint is not Strategy.load_checkpoint
    if config.resume and reads_alone:
        raise UserError(
            f"resume={config.resume} with trainer.strategy={strategy}, which reads checkpoints in "
            "a way of its own: use trainer.strategy=auto or ddp"
        )


def _fit(
    trainer: L.Trainer,
    module: EarlyExitModule,
    datamodule: L.LightningDataModule,
    config: TrainConfig,
    source: Checkpoint | None,
) -> None:
    """Train, from the state of a checkpoint if the run is resumed.

    Raises:
        UserError: the run cannot be resumed from this checkpoint.
    """
    resume = str(source.path) if source and config.resume else None
    for evaluation in _evaluations(trainer):
        evaluation.is_closed = True
    start = time.perf_counter()
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    except (UserError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "conditioned on metric" in str(error):  # EarlyStopping knows no such value
            raise UserError(
                f"callbacks: {first_line(error)} (callbacks.NAME.monitor=...)"
            ) from error
        if "val_check_interval" in str(error):  # more than the batches of an epoch
            raise UserError(f"trainer.val_check_interval: {first_line(error)}") from error
        if resume is None or module.is_restored:
            raise
        # A checkpoint with wrong states of optimizer, loops or callbacks fails in many ways.
        raise UserError(
            f"resume={config.resume}: the run cannot be gone on with from this checkpoint "
            f"({first_line(error)})"
        ) from error
    log.info("trained in %.1f s", time.perf_counter() - start)


def _evaluations(trainer: L.Trainer) -> list[EarlyExitEvaluation]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, EarlyExitEvaluation)]


def _is_evaluated(trainer: L.Trainer, job: Job) -> bool:
    """Say whether an epoch has ended with results. All processes get the same answer."""
    return trainer.strategy.broadcast((job.folder / "results.json").exists())


def _validate_resumed(
    trainer: L.Trainer,
    module: EarlyExitModule,
    datamodule: L.LightningDataModule,
    source: Checkpoint,
    job: Job,
) -> None:
    """Validate a run that was interrupted after its last epoch, and take over its checkpoints.

    The results of a run with a monitored score are those of its best epoch (`_validate_kept`).
    """
    folder = job.folder / "checkpoints"
    if trainer.is_global_zero:
        for callback in trainer.checkpoint_callbacks:
            file = folder / f"{getattr(callback, 'filename', None)}.ckpt"
            if file.name in ("best.ckpt", "last.ckpt") and not file.exists():
                whole_files.copy(source.path, file)
    if getattr(trainer.checkpoint_callback, "monitor", None):
        return
    for evaluation in _evaluations(trainer):
        evaluation.epoch = source.epochs_done
    trainer.validate(
        module, datamodule=datamodule, ckpt_path=str(source.path), verbose=False, weights_only=True
    )


def _validate_kept(
    trainer: L.Trainer, module: EarlyExitModule, datamodule: L.LightningDataModule, job: Job
) -> None:
    """Validate the weights that the run leaves, if other weights were validated last.

    These are the weights of the best epoch, or those of the last step if steps followed the last
    validation (max_steps, check_val_every_n_epoch, val_check_interval).
    """
    callback = trainer.checkpoint_callback
    trainer.strategy.barrier()  # the first process may still copy the checkpoint of an earlier run
    if not isinstance(callback, ModelCheckpoint) or not callback.best_model_path:
        return
    if not _evaluations(trainer):
        return
    # One process decides for all of them.
    is_validated = not callback.monitor and _is_validated(Path(callback.best_model_path), job)
    if not trainer.strategy.broadcast(is_validated):
        trainer.validate(
            module,
            datamodule=datamodule,
            ckpt_path=callback.best_model_path,
            verbose=False,
            weights_only=True,
        )


def _is_validated(ckpt: Path, job: Job) -> bool:
    """Say whether the results of a run are those of the weights in a checkpoint."""
    if not ckpt.is_file():  # some strategies write folders, each process a part
        return True
    kept = tensor_files.torch_file(ckpt, only=(WEIGHTS_FINGERPRINT,)).get(WEIGHTS_FINGERPRINT)
    file = job.folder / "results.json"  # with ddp_spawn, the processes return nothing but files
    return file.exists() and json.loads(file.read_text()).get("weights") == kept
