"""train(cfg) and evaluate(cfg): check, build, run, close. The only place that instantiates.

A stage-2, resumed or evaluated run takes from its checkpoint what the command line does not say.
"""

import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from omegaconf import DictConfig, OmegaConf, open_dict

from deebert import backbones, checkpoints, curves, report
from deebert.callbacks import EarlyExitEvaluation
from deebert.checkpoints import Checkpoint
from deebert.data import TextDataModule
from deebert.errors import UserError, unknown
from deebert.frozen import FrozenStates
from deebert.model import EarlyExitModel
from deebert.module import EarlyExitModule
from deebert.tasks import Task

log = logging.getLogger(__name__)

STAGES = (1, 2)


@dataclass(frozen=True)
class Job:
    """Where Hydra lets this job write, and what the user said on the command line."""

    folder: Path
    explicit: frozenset[str]  # keys of the overrides, e.g. "task", "stages.2.lr"
    sweep: Path | None  # the multirun's folder, None in a single run

    @classmethod
    def current(cls) -> "Job":
        hydra = HydraConfig.get()
        keys = (override.partition("=")[0].lstrip("+~") for override in hydra.overrides.task)
        sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
        return cls(Path(hydra.runtime.output_dir), frozenset(keys), sweep)

    def said(self, key: str) -> bool:
        """Did the user set this key, or something inside it?"""
        return any(said == key or said.startswith(f"{key}.") for said in self.explicit)


def train(cfg: DictConfig) -> float | None:
    """Run one stage; returns the full-depth score, for Hydra's sweepers.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    job = Job.current()
    cfg, origin = _with_checkpoint(cfg, job)
    config = _plain(cfg)
    _check(config)
    L.seed_everything(config["seed"], workers=True, verbose=False)
    task = Task.from_config(config["task"])
    if origin:
        tokenizer, model = origin.tokenizer(), origin.model()
        tokenizer_files = origin.tokenizer_files
    else:
        tokenizer = backbones.tokenizer(config["backbone"])
        tokenizer_files = backbones.tokenizer_files(tokenizer)
        model = EarlyExitModel.from_backbone(config["backbone"], task.num_labels)
    recipe = config["stages"][str(config["stage"])]
    data = _data(task, tokenizer, config, model, recipe["batch_size"])
    data.prepare_data()  # a mistake in the data shows before anything is logged
    data.train_dataloader()
    remembered = {
        key: config[key]
        for key in ("task", "backbone", "data", "stage", "stages", "seed", "trainer")
    }
    module = EarlyExitModule(model, remembered, tokenizer_files)
    trainer = _trainer(cfg, config, job, f"stage{config['stage']}")
    _refuse_unsafe_sweep(trainer, job)
    source: L.LightningDataModule = data
    if module.is_cached:
        source = FrozenStates(data, model, job.folder, standardize=recipe["standardize"])
    resume = str(origin.path) if origin and config["resume"] else None
    try:
        with warnings.catch_warnings():
            _quieten()
            trainer.fit(module, datamodule=source, ckpt_path=resume)
            best = trainer.checkpoint_callback
            if isinstance(best, ModelCheckpoint) and best.monitor and best.best_model_path:
                trainer.validate(
                    module, datamodule=source, ckpt_path=best.best_model_path, verbose=False
                )
    except MisconfigurationException as error:  # a wrong trainer.* or callbacks.* value
        raise UserError(_first_line(error)) from error
    finally:
        _finish_wandb()
    return _result(trainer, job)


def evaluate(cfg: DictConfig) -> float | None:
    """Score a checkpoint on a split; returns the full-depth score."""
    job = Job.current()
    cfg, origin = _with_checkpoint(cfg, job)
    assert origin is not None
    config = _plain(cfg)
    thresholds = None
    if config["threshold"] is not None:
        thresholds = curves.check_thresholds(config["threshold"], "threshold")
    task = Task.from_config(config["task"])
    model = origin.model()
    data = _data(task, origin.tokenizer(), config, model, 1)
    if config["split"]:
        data.eval_splits = (config["split"],)
    elif not data.eval_splits:
        data.eval_splits = task.test
    for split in data.eval_splits:
        data.tokens(split)
    remembered = origin.config | {"task": config["task"], "data": config["data"]}
    module = EarlyExitModule(model, remembered, origin.tokenizer_files)
    callback = EarlyExitEvaluation(thresholds)
    trainer = _trainer(cfg, config, job, "evaluate", callback)
    _refuse_unsafe_sweep(trainer, job)
    try:
        with warnings.catch_warnings():
            _quieten()
            trainer.test(module, datamodule=data, verbose=False)
    finally:
        _finish_wandb()
    return _result(trainer, job)


def refuse(error: UserError) -> NoReturn:
    """Say what the user got wrong, in one line, and end this job.

    In a multirun the other jobs go on; Hydra prints the line and exits with 1 at the end.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise CompactHydraException(str(error)) from None
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)


def _with_checkpoint(cfg: DictConfig, job: Job) -> tuple[DictConfig, Checkpoint | None]:
    """Find out what this run starts from, and complete the configuration from it."""
    if "stage" not in cfg:  # evaluate.py
        if not cfg.ckpt:
            raise UserError("ckpt= is missing: python evaluate.py ckpt=RUN (a run folder or .ckpt)")
        origin = checkpoints.read(checkpoints.find(str(cfg.ckpt), "ckpt", "best.ckpt"), "ckpt")
        _inherit(cfg, origin, job, fixed=("task",), taken=("backbone", "data", "seed"))
        return cfg, origin
    if cfg.resume:
        if cfg.ckpt:
            raise UserError(f"resume={cfg.resume} and ckpt={cfg.ckpt}: give one of them")
        origin = checkpoints.read(
            checkpoints.find(str(cfg.resume), "resume", "last.ckpt"), "resume"
        )
        fixed = ("stage", "stages", "task", "backbone", "data", "seed")
        _inherit(cfg, origin, job, fixed=fixed, taken=("trainer",))
        return cfg, origin
    if isinstance(cfg.stage, bool) or cfg.stage not in STAGES:
        raise unknown("stage", cfg.stage, STAGES, "stage")
    if cfg.stage == 1:
        if cfg.ckpt:
            raise UserError(
                f"ckpt={cfg.ckpt} with stage=1: stage 1 starts from backbone=...; a checkpoint is "
                "for stage=2, and resume=RUN goes on with an interrupted run"
            )
        return cfg, None
    if not cfg.ckpt:
        raise UserError(
            "stage=2 needs ckpt=RUN, the run folder or checkpoint of a stage-1 run: "
            "python train.py stage=2 ckpt=runs/..."
        )
    origin = checkpoints.read(checkpoints.find(str(cfg.ckpt), "ckpt", "best.ckpt"), "ckpt")
    if origin.config["stage"] != 1:
        raise UserError(
            f"ckpt={cfg.ckpt} is of stage {origin.config['stage']}; stage=2 starts from a stage-1 "
            "checkpoint (to go on with an interrupted stage 2: resume=RUN)"
        )
    # A recipe that the user names now (experiment=...) is not overruled by the one of then.
    taken = ("data", "seed") if job.said("experiment") else ("data", "seed", "stages")
    _inherit(cfg, origin, job, fixed=("task", "backbone"), taken=taken)
    return cfg, origin


def _inherit(
    cfg: DictConfig, origin: Checkpoint, job: Job, *, fixed: tuple[str, ...], taken: tuple[str, ...]
) -> None:
    """Take values from the checkpoint. `fixed` ones may not be contradicted on the command line;
    of the `taken` ones, what is said on the command line wins."""
    with open_dict(cfg):
        for key in (*fixed, *taken):
            theirs = OmegaConf.create({key: origin.config[key]})
            for said in (s for s in job.explicit if s == key or s.startswith(f"{key}.")):
                ours, saved = OmegaConf.select(cfg, said), OmegaConf.select(theirs, said)
                if key in taken:
                    OmegaConf.update(theirs, said, ours, merge=False)
                elif ours != saved and not _scores_other_task(cfg, origin, said):
                    name = f"{said}={_named(ours)}"
                    raise UserError(
                        f"{name} contradicts {origin.path}, which was trained with "
                        f"{said}={_named(saved)}; leave {said}= out, or give another checkpoint"
                    )
                else:
                    OmegaConf.update(theirs, said, ours, merge=False)
            cfg[key] = theirs[key]


def _scores_other_task(cfg: DictConfig, origin: Checkpoint, said: str) -> bool:
    """AX has no training data: evaluate.py scores it with an MNLI checkpoint."""
    other = cfg.task.get("checkpoint_task") if "stage" not in cfg and cfg.task else None
    return said == "task" and other == origin.config["task"]["name"]


def _named(value: Any) -> Any:
    return value.name if isinstance(value, DictConfig) and "name" in value else value


def _plain(cfg: DictConfig) -> dict[str, Any]:
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


def _check(config: dict[str, Any]) -> None:
    """What would otherwise fail late, or train on nonsense."""
    stage = str(config["stage"])
    positive = {
        "data.max_length": config["data"]["max_length"],
        "data.limit_train": config["data"]["limit_train"] or 1,
        "data.eval_batch_size": config["data"]["eval_batch_size"],
        **{
            f"stages.{stage}.{key}": config["stages"][stage][key]
            for key in ("epochs", "batch_size")
        },
    }
    for flag, value in positive.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{flag}={value} must be a whole number of 1 or more")
    lr = config["stages"][stage]["lr"]
    if not isinstance(lr, int | float) or not 0 < lr < 1:
        raise UserError(f"stages.{stage}.lr={lr} must be a number between 0 and 1, such as 2e-5")
    recipe = config["stages"][stage]
    if recipe.get("standardize") and not recipe["cache"]:
        raise UserError(
            "stages.2.standardize=true needs the frozen states: leave stages.2.cache=true"
        )
    if config["thresholds"] is not None:
        curves.check_thresholds(config["thresholds"], "thresholds")


def _data(
    task: Task, tokenizer: Any, config: dict[str, Any], model: EarlyExitModel, batch_size: int
) -> TextDataModule:
    values = config["data"]
    longest = backbones.longest_input(model.config)
    if values["max_length"] > longest:
        raise UserError(
            f"data.max_length={values['max_length']}: backbone {config['backbone']['name']} takes "
            f"{longest} tokens at most (data.max_length)"
        )
    # A path that goes into a checkpoint must hold from another working directory too.
    root = str(Path(values["root"]).absolute()) if values["root"] else None
    values["root"] = root
    return TextDataModule(
        task,
        tokenizer,
        root=root,
        max_length=values["max_length"],
        limit_train=values["limit_train"],
        batch_size=batch_size,
        eval_batch_size=values["eval_batch_size"],
        num_workers=values["num_workers"],
        seed=config["seed"],
    )


def _trainer(
    cfg: DictConfig, config: dict[str, Any], job: Job, kind: str, *callbacks: L.Callback
) -> L.Trainer:
    """The Trainer with its callbacks and loggers, all writing into the run folder."""
    name = f"{config['task']['name']}-{config['backbone']['name']}-{kind}-seed{config['seed']}"
    made = [instantiate(values) for values in cfg.get("callbacks", {}).values() if values]
    for callback in made:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(job.folder / "checkpoints")
    loggers = []
    for values in cfg.logger.values():
        extra: dict[str, Any] = {"save_dir": str(job.folder)}
        if values and values["_target_"].endswith("WandbLogger"):
            group = values.get("group") or (job.sweep.name if job.sweep else None)
            extra |= {"name": name, "group": group}
        if values:
            loggers.append(instantiate(values, **extra))
            loggers[-1].log_hyperparams(config)
    if not loggers:  # LearningRateMonitor would fail
        made = [c for c in made if not isinstance(c, LearningRateMonitor)]
    try:
        return instantiate(
            cfg.trainer,
            callbacks=[*made, *callbacks],
            logger=loggers,
            default_root_dir=str(job.folder),
            enable_progress_bar=sys.stderr.isatty(),
        )
    except InstantiationException as error:
        raise UserError(f"trainer: {_first_line(error.__cause__ or error)} (trainer.*)") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refuse_unsafe_sweep(trainer: L.Trainer, job: Job) -> None:
    """Lightning's launcher re-runs the command line in each child, `-m` and all: every process
    would do a sweep of its own, with other values (Lightning #16694, #18175)."""
    launcher = trainer.strategy.launcher
    if job.sweep and trainer.world_size > 1 and isinstance(launcher, _SubprocessScriptLauncher):
        raise UserError(
            "--multirun with several devices and trainer.strategy=ddp would run the sweep once per "
            "process; use trainer.strategy=ddp_spawn, trainer.devices=1, or start it with torchrun "
            "or srun"
        )


def _quieten() -> None:
    """Advice that does not apply here."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        "The dirpath has changed from .*",  # a resumed run writes into a folder of its own
        "Found .* module\\(s\\) in eval mode.*",  # module.py sets the modes deliberately
        ".*does not have many workers.*",  # a fetched batch takes a millisecond
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning #21326
        ".*number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _finish_wandb() -> None:
    """One W&B run per job: without this all jobs of a sweep would share the first one's."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def _result(trainer: L.Trainer, job: Job) -> float | None:
    evaluation = next(c for c in trainer.callbacks if isinstance(c, EarlyExitEvaluation))  # type: ignore[attr-defined]
    if not evaluation.results:
        return None
    if trainer.is_global_zero:
        report.show(evaluation.results, job.folder)
    return evaluation.results["exits"][-1]["score"]
