"""train(cfg): run one of the two stages."""

import logging
import time
from dataclasses import replace

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig

from deebert.data import tokenization
from deebert.data.tasks import Task
from deebert.errors import UserError, first_line
from deebert.hub import checkpoint_config
from deebert.models import backbones, trained_ramps
from deebert.models.early_exit import EarlyExitModel
from deebert.models.ramps import RampKind
from deebert.runs import build
from deebert.runs.checks import check
from deebert.runs.inheritance import complete, read_teacher
from deebert.runs.job import Job, finish, plain
from deebert.training import objectives
from deebert.training.feature_cache import FeatureCache
from deebert.training.module import EarlyExitModule

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float | None:
    """Run one stage; returns the full-depth score, for Hydra's sweepers.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    job = Job.current()
    job.refuse_used_folder()
    source = complete(cfg, job)
    config = plain(cfg)
    check(config)
    L.seed_everything(config["seed"], workers=True, verbose=False)
    task = Task.from_config(config["task"])
    teacher, trained = None, False
    if source:
        tokenizer, model = source.tokenizer(), source.model()
        tokenizer_files = source.tokenizer_files
        if config["teacher"] and config["resume"]:
            teacher = read_teacher(cfg).model()
        elif config["teacher"]:
            teacher = source.model()
            build.cut_layers(model, config, source, "backbone.layers", config["backbone"]["layers"])
        kind = RampKind.from_config(config["ramp"])
        before = replace(model.ramp_kind, predicts=kind.predicts)
        trained = source.ramps_trained and kind == before
        if kind != model.ramp_kind:
            if source.ramps_trained and not trained:
                log.info(
                    "%s: its ramps are replaced by new ones that read %s (ramp=)",
                    source.path,
                    kind.reads,
                )
            model.new_ramps(kind)
    else:
        tokenizer = backbones.tokenizer(config["backbone"])
        tokenizer_files = tokenization.files_of(tokenizer)
        model = EarlyExitModel.from_backbone(config["backbone"], task.num_labels, config["ramp"])
    tokenization.check(tokenizer, model.config)
    if model.ramp_kind.reads == "pair":
        model.backbone.separator = tokenizer.sep_token_id
        if tokenizer.sep_token_id is None:
            raise UserError("ramp.reads=pair: the tokenizer has no separator; use ramp=mean")
    wanted = objectives.build(config["objective"], config["stage"]).num_ramps
    if wanted not in (None, len(model.ramps)):
        raise UserError(
            f"objective.weights={config['objective']['weights']} has {wanted} values; of "
            f"{len(model.ramps)} ramps each needs one"
        )
    build.warn_of_untrained_ramps(config["objective"])
    if len(model.ramps) < 2 and trained_ramps.trains_ramps(config["objective"]["name"]):
        layers = config["backbone"].get("layers")
        cut = f" backbone.layers={layers}" if layers else ""
        raise UserError(
            f"backbone={config['backbone']['name']}{cut} has one layer: nothing to leave early (it "
            "can be trained with stage=1 objective=final)"
        )
    recipe = config["stages"][str(config["stage"])]
    data = build.data_module(task, tokenizer, config, model.config, recipe["batch_size"])
    data.prepare_data()  # a mistake in the data shows before anything is logged
    data.train_dataloader()
    build.remember_held_out(config, data)
    kept = {key: config[key] for key in checkpoint_config.KEYS}
    module = EarlyExitModule(model, kept, tokenizer_files, teacher)
    data_source: L.LightningDataModule = data
    if module.is_cached:
        # Not those that are trained: they would read something else than they have learned from.
        new = {*range(len(model.ramps) - 1)}
        if source and trained:
            new &= {number - 1 for number in trained_ramps.untrained(source.config["objective"])}
            if recipe["standardize"] and not config["resume"]:
                log.info("stages.2.standardize: ramps that are trained already go on as they are")
        standardize = new if recipe["standardize"] else ()
        data_source = FeatureCache(data, model, job.folder, standardize=standardize)
    resume = str(source.path) if source and config["resume"] else None
    with build.closing():
        trainer = build.trainer(cfg, config, job, f"stage{config['stage']}")
        build.refuse_unsafe_sweep(trainer, job)
        finds_unused = "find_unused" in str(config["trainer"]["strategy"])
        if recipe.get("layer_drop") and trainer.world_size > 1 and not finds_unused:
            raise UserError(
                f"stages.1.layer_drop={recipe['layer_drop']} with several devices leaves "
                "parameters unused: say trainer.strategy=ddp_find_unused_parameters_true"
            )
        if resume and type(trainer.strategy).load_checkpoint is not Strategy.load_checkpoint:
            raise UserError(
                f"resume={config['resume']} with trainer.strategy={config['trainer']['strategy']}, "
                "which reads checkpoints in a way of its own: use trainer.strategy=auto or ddp"
            )
        start = time.perf_counter()
        try:
            trainer.fit(module, datamodule=data_source, ckpt_path=resume, weights_only=True)
        except (UserError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if resume is None or module.is_restored:
                raise
            # What somebody's file says of optimizer, loops and callbacks fails in many ways.
            raise UserError(
                f"resume={config['resume']}: the run cannot be gone on with from this checkpoint "
                f"({first_line(error)})"
            ) from error
        log.info("trained in %.1f s", time.perf_counter() - start)
        best = trainer.checkpoint_callback
        if isinstance(best, ModelCheckpoint) and best.monitor and best.best_model_path:
            trainer.validate(
                module,
                datamodule=data_source,
                ckpt_path=best.best_model_path,
                verbose=False,
                weights_only=True,
            )
    return finish(trainer.is_global_zero, job)
