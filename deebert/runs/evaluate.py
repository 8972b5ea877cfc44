"""evaluate(cfg): score a checkpoint, or the records of one."""

import logging
from functools import partial
from typing import Any

from omegaconf import DictConfig

from deebert.data.tasks import HELD_OUT, Task
from deebert.errors import UserError
from deebert.evaluation import evaluate_records
from deebert.evaluation.evaluate_records import EvaluationConfig
from deebert.evaluation.run_latency import LatencyMeasurement
from deebert.exits import calibration
from deebert.hub import checkpoints, record_files
from deebert.hub.checkpoints import Checkpoint, Source
from deebert.reporting import report
from deebert.runs import build, evaluation_config
from deebert.runs.checks import check
from deebert.runs.inheritance import complete_evaluation
from deebert.runs.job import Job, finish, plain
from deebert.training.callbacks import EarlyExitEvaluation
from deebert.training.module import EarlyExitModule

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> float | None:
    """Score a checkpoint on a split, or records of one; returns the score that was asked for.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    job = Job.current()
    job.refuse_used_folder()
    source = complete_evaluation(cfg, job)
    config = plain(cfg)
    check(config)
    evaluation_config.check(config, job.said)
    task = Task.from_config(config["task"])
    score = None
    if config.get("exit") and (score := build.instantiated("exit", cfg.exit.score)) is None:
        raise UserError("exit.score=null must name a function (exit.score._target_=...)")
    asked = evaluation_config.asked(config, task, score)
    build.warn_of_untrained_ramps(source.config["objective"])
    if not isinstance(source, Checkpoint):
        return _evaluate_records(config, task, asked, source, job)
    model = source.model()
    if config["layers"] is not None:
        build.cut_layers(model, config, source, "layers", config["layers"])
    learned = model.ramp_kind.predicts is not None
    trained = source.ramps_trained
    evaluation_config.check_model(asked, config, len(model.ramps), learned=learned, trained=trained)
    data = build.data_module(task, source.tokenizer(), config, source.architecture, 1)
    if config["split"]:
        data.eval_splits = (config["split"],)
    elif not data.eval_splits:
        data.eval_splits = task.test
    chosen_on = evaluation_config.calibration_split(config, data, source)
    if chosen_on == HELD_OUT:
        build.remember_held_out(config, data)
    if chosen_on:
        data.eval_splits = (*data.eval_splits, chosen_on)
    for split in data.eval_splits:
        data.tokens(split)
        if split in (task.train, *data.unlabelled):
            log.warning("split=%s: the model was trained on these rows", split)
    if asked.target and config["calibration"] != "auto":  # auto may yet choose other rows
        named = chosen_on or data.eval_splits[0]
        columns = data.tokens(named)
        labelled = "label" in columns.column_names
        calibration.check(len(columns), labelled, named, task, asked.rule, asked.target)
    kept = source.config | {key: config[key] for key in ("task", "data", "backbone")}
    module = EarlyExitModule(model, kept, source.tokenizer_files)
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
            latency_measurement = LatencyMeasurement(
                model, task, data, protocol, trainer.strategy.root_device
            )
            callback.evaluation_config = asked = latency_measurement.with_costs(
                asked, data.eval_splits[0]
            )
            callback.timed = partial(latency_measurement.timed, asked)
        trainer.test(module, datamodule=data, verbose=False)
    at_threshold = config["threshold"] is not None and trained
    return finish(trainer.is_global_zero, job, at_threshold=at_threshold)


def _evaluate_records(
    config: dict[str, Any], task: Task, asked: EvaluationConfig, source: Source, job: Job
) -> float | None:
    """The same from saved logits: neither model nor data is needed."""
    if job.said("logger"):
        log.warning("record= asks without a run that could be logged: logger= is left out")
    found = [record_files.load(file)[0] for file in record_files.files(source.path, ".")]
    found.sort(key=lambda record: task.order(record.split))
    wanted = config["split"]
    named = HELD_OUT if config["calibration"] in ("auto", "heldout") else config["calibration"]
    held_out = next((r for r in found if r.split == named and r.split != wanted), None)
    reported = [
        r for r in found if (r.split == wanted if wanted else r.split not in (HELD_OUT, named))
    ]
    if not reported:
        splits = ", ".join(record.split for record in found)
        raise UserError(f"split={wanted}: {source.path} has records of: {splits} (split=...)")
    learned, trained = reported[0].learned_score_NL is not None, source.ramps_trained
    num_layers = reported[0].num_layers
    evaluation_config.check_model(asked, config, num_layers, learned=learned, trained=trained)
    if len({record.logits_NLC.shape[1:] for record in found}) > 1:
        raise UserError(f"record={config['record']}: its records have different numbers of ramps")
    header = report.header(source.config)
    answer = evaluate_records.evaluate_records(reported, task, asked, held_out, trained=trained)
    results = header | {"record": checkpoints.lasting(str(config["record"]))} | answer
    report.save(results, job.folder)
    at_threshold = config["threshold"] is not None and trained
    return finish(True, job, at_threshold=at_threshold)
