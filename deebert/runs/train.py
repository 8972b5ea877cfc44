"""train(cfg) and evaluate(cfg): build, run, close."""

import json
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig

from deebert.data import tokenization
from deebert.data.tasks import Task
from deebert.errors import UserError, first_line
from deebert.evaluation import evaluate
from deebert.evaluation.evaluate import Question
from deebert.evaluation.run_latency import Clock
from deebert.exits import calibration, records
from deebert.exits.records import HELD_OUT
from deebert.hub import checkpoint_config, checkpoints
from deebert.hub.checkpoints import Checkpoint, Origin
from deebert.models import backbones
from deebert.models.early_exit import EarlyExitModel
from deebert.models.ramps import RampKind
from deebert.reporting import report
from deebert.runs import build, evaluation_config
from deebert.runs.job import (
    Job,
    check,
    complete,
    complete_evaluation,
    plain,
    read_teacher,
)
from deebert.training import objectives
from deebert.training.callbacks import EarlyExitEvaluation
from deebert.training.feature_cache import FrozenStates
from deebert.training.module import EarlyExitModule

log = logging.getLogger(__name__)


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
    teacher, trained = None, False
    if origin:
        tokenizer, model = origin.tokenizer(), origin.model()
        tokenizer_files = origin.tokenizer_files
        if config["teacher"] and config["resume"]:
            teacher = read_teacher(cfg).model()
        elif config["teacher"]:
            teacher = origin.model()
            _cut(model, config, origin, "backbone.layers", config["backbone"]["layers"])
        kind = RampKind.from_config(config["ramp"])
        before = replace(model.ramp_kind, predicts=kind.predicts)
        trained = origin.ramps_trained and kind == before
        if kind != model.ramp_kind:
            if origin.ramps_trained and not trained:
                log.info(
                    "%s: its ramps are replaced by new ones that read %s (ramp=)",
                    origin.path,
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
    _tell_untrained(config["objective"])
    if len(model.ramps) < 2 and objectives.trains_ramps(config["objective"]["name"]):
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
    source: L.LightningDataModule = data
    if module.is_cached:
        # Not those that are trained: they would read something else than they have learned from.
        new = {*range(len(model.ramps) - 1)}
        if origin and trained:
            new &= {number - 1 for number in objectives.untrained(origin.config["objective"])}
            if recipe["standardize"] and not config["resume"]:
                log.info("stages.2.standardize: ramps that are trained already go on as they are")
        standardize = new if recipe["standardize"] else ()
        source = FrozenStates(data, model, job.folder, standardize=standardize)
    resume = str(origin.path) if origin and config["resume"] else None
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
            trainer.fit(module, datamodule=source, ckpt_path=resume, weights_only=True)
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
                datamodule=source,
                ckpt_path=best.best_model_path,
                verbose=False,
                weights_only=True,
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
    evaluation_config.check(config, job.said)
    task = Task.from_config(config["task"])
    score = None
    if config.get("exit") and (score := build.instantiated("exit", cfg.exit.score)) is None:
        raise UserError("exit.score=null must name a function (exit.score._target_=...)")
    asked = evaluation_config.asked(config, task, score)
    _tell_untrained(origin.config["objective"])
    if not isinstance(origin, Checkpoint):
        return _evaluate_records(config, task, asked, origin, job)
    model = origin.model()
    if config["layers"] is not None:
        _cut(model, config, origin, "layers", config["layers"])
    learned = model.ramp_kind.predicts is not None
    trained = origin.ramps_trained
    evaluation_config.check_model(asked, config, len(model.ramps), learned=learned, trained=trained)
    data = build.data_module(task, origin.tokenizer(), config, origin.architecture, 1)
    if config["split"]:
        data.eval_splits = (config["split"],)
    elif not data.eval_splits:
        data.eval_splits = task.test
    chosen_on = evaluation_config.calibration_split(config, data, origin)
    if chosen_on == HELD_OUT:
        build.remember_held_out(config, data)
    if chosen_on:
        data.eval_splits = (*data.eval_splits, chosen_on)
    for split in data.eval_splits:
        data.tokens(split)
        if split in (task.train, *data.unlabelled):
            log.warning("split=%s: the model was trained on these rows", split)
    if asked.wish and config["calibration"] != "auto":  # auto may yet choose other rows
        named = chosen_on or data.eval_splits[0]
        columns = data.tokens(named)
        labelled = "label" in columns.column_names
        calibration.check(len(columns), labelled, named, task, asked.rule, asked.wish)
    kept = origin.config | {key: config[key] for key in ("task", "data", "backbone")}
    module = EarlyExitModule(model, kept, origin.tokenizer_files)
    ckpt = checkpoints.lasting(str(config["ckpt"]))
    callback = EarlyExitEvaluation(None, asked, chosen_on, config["analysis"], ckpt)
    protocol = evaluation_config.protocol(config)
    if protocol and str(config["trainer"]["precision"]) not in ("32-true", "32"):
        raise UserError(
            f"trainer.precision={config['trainer']['precision']} with timing=: leave it out; what "
            "is timed has its own (precision=bfloat16)"
        )
    with build.closing():
        trainer = build.trainer(cfg, config, job, "evaluate", callback)
        build.refuse_unsafe_sweep(trainer, job)
        for flag, wanted in (("analysis", config["analysis"]), ("timing", protocol)):
            if wanted and trainer.world_size > 1:
                raise UserError(f"{flag}= looks at all rows in one process: trainer.devices=1")
        if protocol:
            clock = Clock(model, task, data, protocol, trainer.strategy.root_device)
            callback.question = asked = clock.with_costs(asked, data.eval_splits[0])
            callback.timed = partial(clock.timed, asked)
        trainer.test(module, datamodule=data, verbose=False)
    at_threshold = config["threshold"] is not None and trained
    return _result(trainer.is_global_zero, job, at_threshold=at_threshold)


def _tell_untrained(objective: dict[str, Any]) -> None:
    """Say which ramps, from 1, no loss has reached: whoever wants to leave elsewhere may do so."""
    if untrained := objectives.untrained(objective):
        is_last = untrained[-1] == len(objective["weights"])
        log.warning(
            "objective.weights: nothing has trained ramp %s, so what leaves there is answered by "
            "chance%s",
            ", ".join(map(str, untrained)),
            " (the last is the final classifier: full depth)" if is_last else "",
        )


def _cut(
    model: EarlyExitModel, config: dict[str, Any], origin: Checkpoint, flag: str, layers: list[int]
) -> None:
    """Leave only these layers of a checkpoint's, and write down which of the pretrained ones."""
    model.keep_layers(layers, flag)
    before = origin.config["backbone"].get("layers")
    config["backbone"]["layers"] = [before[layer - 1] for layer in layers] if before else layers


def _evaluate_records(
    config: dict[str, Any], task: Task, asked: Question, origin: Origin, job: Job
) -> float | None:
    """The same from saved logits: neither model nor data is needed."""
    if job.said("logger"):
        log.warning("record= asks without a run that could be logged: logger= is left out")
    found = [records.load(file)[0] for file in records.files(origin.path, ".")]
    found.sort(key=lambda record: task.order(record.split))
    wanted = config["split"]
    named = HELD_OUT if config["calibration"] in ("auto", "heldout") else config["calibration"]
    held_out = next((r for r in found if r.split == named and r.split != wanted), None)
    reported = [
        r for r in found if (r.split == wanted if wanted else r.split not in (HELD_OUT, named))
    ]
    if not reported:
        splits = ", ".join(record.split for record in found)
        raise UserError(f"split={wanted}: {origin.path} has records of: {splits} (split=...)")
    learned, trained = reported[0].unsure_NL is not None, origin.ramps_trained
    num_layers = reported[0].num_layers
    evaluation_config.check_model(asked, config, num_layers, learned=learned, trained=trained)
    if len({record.logits_NLC.shape[1:] for record in found}) > 1:
        raise UserError(f"record={config['record']}: its records have different numbers of ramps")
    header = report.header(origin.config)
    answer = evaluate.evaluate(reported, task, asked, held_out, trained=trained)
    results = header | {"record": checkpoints.lasting(str(config["record"]))} | answer
    report.save(results, job.folder)
    at_threshold = config["threshold"] is not None and trained
    return _result(True, job, at_threshold=at_threshold)


def _result(is_global_zero: bool, job: Job, *, at_threshold: bool = False) -> float | None:
    """What a sweeper is given: what became of a wish, else full depth, or the one threshold."""
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
