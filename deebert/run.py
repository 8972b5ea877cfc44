"""train(cfg) and evaluate(cfg): build, run, close. The only place that instantiates."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from omegaconf import DictConfig

from deebert import backbones, calibrate, evaluation, question, records, report
from deebert.callbacks import EarlyExitEvaluation
from deebert.checkpoints import Checkpoint, Origin
from deebert.data import CALIBRATION, TextDataModule
from deebert.errors import UserError
from deebert.evaluation import Question
from deebert.frozen import FrozenStates
from deebert.job import Job, check, complete, complete_evaluation, plain
from deebert.model import EarlyExitModel
from deebert.module import EarlyExitModule
from deebert.tasks import Task

log = logging.getLogger(__name__)

# What makes a checkpoint self-describing, and a run resumable.
REMEMBERED = (
    "task", "backbone", "data", "stage", "stages", "seed", "trainer", "callbacks", "thresholds",
)  # fmt: skip
# Lightning's advice that does not apply here.
ADVICE = (
    "The dirpath has changed from .*",  # a resumed run writes into a folder of its own
    "Found .* module\\(s\\) in eval mode.*",  # module.py sets the modes deliberately
    ".*does not have many workers.*",  # a fetched batch takes a millisecond
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning #21326
    ".*number of training batches .* is smaller than the logging interval.*",
)


def train(cfg: DictConfig) -> float | None:
    """Run one stage; returns the full-depth score, for Hydra's sweepers.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    job = Job.current()
    job.refuse_used_folder()
    origin = complete(cfg, job)
    config = plain(cfg)
    check(config)
    L.seed_everything(config["seed"], workers=True, verbose=False)
    task = Task.from_config(config["task"])
    if origin:
        tokenizer, model = origin.tokenizer(), origin.model()
        tokenizer_files = origin.tokenizer_files
    else:
        tokenizer = backbones.tokenizer(config["backbone"])
        tokenizer_files = backbones.tokenizer_files(tokenizer)
        model = EarlyExitModel.from_backbone(config["backbone"], task.num_labels)
    if len(model.ramps) < 2:
        raise UserError(
            f"backbone {config['backbone']['name']} has one layer: nothing to leave early"
        )
    recipe = config["stages"][str(config["stage"])]
    data = _data(task, tokenizer, config, model.config, recipe["batch_size"])
    data.prepare_data()  # a mistake in the data shows before anything is logged
    data.train_dataloader()
    _remember_held_out(config, data)
    remembered = {key: config[key] for key in REMEMBERED}
    module = EarlyExitModule(model, remembered, tokenizer_files)
    source: L.LightningDataModule = data
    if module.is_cached:
        source = FrozenStates(data, model, job.folder, standardize=recipe["standardize"])
    resume = str(origin.path) if origin and config["resume"] else None
    with _closing():
        trainer = _trainer(cfg, config, job, f"stage{config['stage']}")
        _refuse_unsafe_sweep(trainer, job)
        start = time.perf_counter()
        trainer.fit(module, datamodule=source, ckpt_path=resume)
        log.info("trained in %.1f s", time.perf_counter() - start)
        best = trainer.checkpoint_callback
        if isinstance(best, ModelCheckpoint) and best.monitor and best.best_model_path:
            trainer.validate(
                module, datamodule=source, ckpt_path=best.best_model_path, verbose=False
            )
    return _result(trainer.is_global_zero, job)


def evaluate(cfg: DictConfig) -> float | None:
    """Score a checkpoint on a split, or records of one; returns the score that was asked for.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    job = Job.current()
    job.refuse_used_folder()
    origin = complete_evaluation(cfg, job)
    config = plain(cfg)
    check(config)
    question.check(config)
    task = Task.from_config(config["task"])
    score = None
    if config.get("exit") and (score := _instantiated("exit", cfg.exit.score)) is None:
        raise UserError("exit.score=null must name a function (exit.score._target_=...)")
    asked = question.asked(config, task, score)
    if not isinstance(origin, Checkpoint):
        return _evaluate_records(config, task, asked, origin, job)
    model = origin.model()
    question.check_model(asked, config, len(model.ramps))
    data = _data(task, origin.tokenizer(), config, origin.architecture, 1)
    if config["split"]:
        data.eval_splits = (config["split"],)
    elif not data.eval_splits:
        data.eval_splits = task.test
    chosen_on = question.calibration_split(config, data, origin)
    if chosen_on == CALIBRATION:
        _remember_held_out(config, data)
    if chosen_on:
        data.eval_splits = (*data.eval_splits, chosen_on)
    for split in data.eval_splits:
        data.tokens(split)
    if task.train in data.eval_splits:
        log.warning("split=%s: the model was trained on these rows", task.train)
    if asked.wish and config["calibration"] != "auto":  # auto may yet choose other rows
        named = chosen_on or data.eval_splits[0]
        columns = data.tokens(named)
        labelled = "label" in columns.column_names
        calibrate.check(len(columns), labelled, named, task, asked.wish)
    remembered = origin.config | {"task": config["task"], "data": config["data"]}
    module = EarlyExitModule(model, remembered, origin.tokenizer_files)
    callback = EarlyExitEvaluation(None, asked, chosen_on, config["analysis"], str(config["ckpt"]))
    with _closing():
        trainer = _trainer(cfg, config, job, "evaluate", callback)
        _refuse_unsafe_sweep(trainer, job)
        if config["analysis"] and trainer.world_size > 1:
            raise UserError("analysis=true looks at all rows in one process: trainer.devices=1")
        trainer.test(module, datamodule=data, verbose=False)
    return _result(trainer.is_global_zero, job)


def _evaluate_records(
    config: dict[str, Any], task: Task, asked: Question, origin: Origin, job: Job
) -> float | None:
    """The same from saved logits: neither model nor data is needed."""
    found = [records.load(file)[0] for file in sorted(origin.path.glob("*.safetensors"))]
    wanted = config["split"]
    named = CALIBRATION if config["calibration"] in ("auto", "heldout") else config["calibration"]
    held_out = next((r for r in found if r.split == named and r.split != wanted), None)
    reported = [
        r for r in found if (r.split == wanted if wanted else r.split not in (CALIBRATION, named))
    ]
    if not reported:
        splits = ", ".join(record.split for record in found)
        raise UserError(f"split={wanted}: {origin.path} has records of: {splits} (split=...)")
    question.check_model(asked, config, reported[0].num_layers)
    if len({record.logits_NLC.shape[1:] for record in found}) > 1:
        raise UserError(f"record={config['record']}: its records have different numbers of ramps")
    header = report.header(origin.config)
    trained = header["objective"] != "final"
    answer = evaluation.evaluate(reported, task, asked, held_out, trained=trained)
    results = header | {"record": str(config["record"])} | answer
    report.save(results, job.folder)
    return _result(True, job)


def _data(
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
        batch_size=batch_size,
        eval_batch_size=values["eval_batch_size"],
        num_workers=values["num_workers"],
        seed=config["seed"],
    )


def _remember_held_out(config: dict[str, Any], data: TextDataModule) -> None:
    """Write down which training rows no stage sees; later stages and evaluations hold to it.

    Raises:
        UserError: they are not the rows that an earlier stage left out.
    """
    values = config["data"]
    size = data.calibration_size
    found = data.fingerprint(CALIBRATION) if size else None
    expected = values.get("calibration_rows")
    if expected and found != expected:
        raise UserError(
            f"data.root={data.root}: the training rows have changed since the checkpoint was "
            "trained, so its held-out rows can no longer be told from those it has seen; give the "
            "same data"
        )
    values |= {"calibration_size": size, "calibration_rows": found}


def _trainer(
    cfg: DictConfig, config: dict[str, Any], job: Job, kind: str, *callbacks: L.Callback
) -> L.Trainer:
    """The Trainer with its callbacks and loggers, all writing into the run folder."""
    # Lightning's tips and notes on absent devices have no other switch.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    name = f"{config['task']['name']}-{config['backbone']['name']}-{kind}-seed{config['seed']}"
    made = [_instantiated(f"callbacks.{key}", v) for key, v in (cfg.get("callbacks") or {}).items()]
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
        if (logger := _instantiated(f"logger.{key}", values, **extra)) is not None:
            loggers.append(logger)
    if not loggers:  # LearningRateMonitor would fail
        made = [c for c in made if not isinstance(c, LearningRateMonitor)]
    trainer = _instantiated(
        "trainer",
        cfg.trainer,
        callbacks=[*made, *callbacks],
        logger=loggers,
        default_root_dir=str(job.folder),
        enable_progress_bar=sys.stderr.isatty(),
    )
    for logger in loggers:  # after all that may fail: this opens the W&B run
        logger.log_hyperparams(config)
    return trainer


def _instantiated(flag: str, values: DictConfig | None, **extra: Any) -> Any:
    """What a block of the configuration names, or None where the user took it out."""
    if not values:
        return None
    try:
        return instantiate(values, _convert_="all", **extra)
    except InstantiationException as error:
        raise UserError(f"{flag}: {_first_line(error.__cause__ or error)} ({flag}.*)") from error


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


@contextmanager
def _closing() -> Iterator[None]:
    """Around everything that runs: quiet, and closed whatever happens."""
    with warnings.catch_warnings():
        for message in ADVICE:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        except MisconfigurationException as error:  # a wrong trainer.* or callbacks.* value
            raise UserError(_first_line(error)) from error
        finally:
            # One W&B run per job: without this all jobs of a sweep would share the first one's.
            wandb = sys.modules.get("wandb")
            if wandb is not None and wandb.run is not None:
                wandb.finish()


def _result(is_global_zero: bool, job: Job) -> float | None:
    if not is_global_zero:
        return None
    file = job.folder / "results.json"  # with ddp_spawn all that the processes leave behind
    if not file.exists():
        log.warning("nothing was evaluated; run folder: %s", job.folder)
        return None
    results = json.loads(file.read_text())
    report.show(results, job.folder)
    asked = results.get("calibration", {}).get("measured") or results["exits"][-1]
    return None if asked["score"] is None else float(asked["score"])
