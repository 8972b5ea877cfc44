"""The evaluation of a checkpoint, or of the records of one.

`evaluate` checks the configuration, runs the model over the rows once and saves the results. This
module does not know how scores and savings are computed; `deebert.evaluation` does that.
"""

import logging
from dataclasses import replace
from functools import partial

import lightning as L
import torch
from omegaconf import DictConfig

from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import HELD_OUT
from deebert.errors import UserError, unknown
from deebert.evaluation import evaluate_records
from deebert.evaluation.engine_records import EngineRecords, inputs_of
from deebert.evaluation.evaluate_records import NO_ROWS
from deebert.evaluation.split_latency import LatencyMeasurement
from deebert.evaluation.timing import undisturbed
from deebert.exits import calibration, rules
from deebert.exits.records import Record
from deebert.hub import checkpoints, saved_folder
from deebert.hub.checkpoints import Checkpoint
from deebert.hub.record_files import RecordFolder
from deebert.hub.saved_folder import Saved
from deebert.inference import quantize, settings
from deebert.inference.engine import Engine
from deebert.models.early_exit import EarlyExitModel
from deebert.models.quantization import Quantization
from deebert.options import import_modules
from deebert.reporting import report
from deebert.reporting.results import Results
from deebert.runs import build, keys, sources
from deebert.runs.config import EvaluateConfig
from deebert.runs.job import Job, check_optimize, finish
from deebert.training.callbacks import EarlyExitEvaluation
from deebert.training.module import EarlyExitModule

log = logging.getLogger(__name__)

REPORTED = (
    "calibration={} is the reported split itself: use calibration=crossfit, or report another "
    "(split=...)"
)


def evaluate(cfg: DictConfig) -> float | None:
    """Score a checkpoint on a split, or the records of one.

    Args:
        cfg: the configuration of evaluate.py.

    Returns:
        The value for a sweeper (`job.finish`); None in all processes but the first, and without
        labels.

    Raises:
        UserError: the configuration or the data has a mistake.
    """
    job = Job.current()
    import_modules(cfg.get("modules"))
    keys.check(cfg, job)
    source = sources.complete_evaluation(cfg, job)
    config = EvaluateConfig.from_hydra(cfg, source.config, job)
    check_optimize(cfg.optimize, trained=source.ramps_trained)
    build.warn_of_untrained_ramps(source.config.objective)
    at_threshold = config.threshold is not None and source.ramps_trained
    if isinstance(source, RecordFolder):
        _evaluate_records(config, source, job)
        return finish(True, job, cfg.optimize, at_threshold=at_threshold)
    assert isinstance(source, Checkpoint)
    build.check_loggers(cfg)
    model, config = _model(config, source)
    build.check_length(config.run, source.architecture)
    data = build.data_module(config.run, source.tokenizer(), 1)
    config = replace(config, run=build.with_split(config.run, data, source))
    calibration_split = _choose_splits(config, data, source)
    if calibration_split == HELD_OUT:
        config = replace(config, run=build.with_held_out(config.run, data))
    _read_rows(config, data, calibration_split)
    module = EarlyExitModule(model, config.run, source.tokenizer_files)
    ckpt = checkpoints.lasting(str(config.ckpt))
    callback = EarlyExitEvaluation(
        None, config.evaluation, calibration_split, config.analysis, ckpt
    )
    with build.closing(job):
        trainer = build.trainer(cfg, config, job, "evaluate", callback)
        build.refuse_unsafe_sweep(trainer, job)
        _check_devices(trainer, config)
        _add_engine(callback, trainer, config, model, data, source)
        trainer.test(module, datamodule=data, verbose=False)
    return finish(trainer.is_global_zero, job, cfg.optimize, at_threshold=at_threshold)


def _model(config: EvaluateConfig, source: Checkpoint) -> tuple[EarlyExitModel, EvaluateConfig]:
    """Return the model of the checkpoint, cut to `layers=`, and the configuration with its layers.

    Raises:
        UserError: the evaluation does not fit the model.
    """
    model = source.model()
    if config.layers is not None:
        run = build.cut_layers(model, config.run, source, "layers", config.layers)
        config = replace(config, run=run)
    learned = model.ramp_kind.predicts is not None
    config.check_model(len(model.ramps), learned=learned, trained=source.ramps_trained)
    return model, config


def _choose_splits(config: EvaluateConfig, data: TextDataModule, source: Checkpoint) -> str | None:
    """Set the splits that the model runs over.

    Returns:
        The split that thresholds are chosen on, or None if it is not another one than the reported
        split.

    Raises:
        UserError: there is no such split.
    """
    if config.split:
        data.eval_splits = (config.split,)
    elif not data.eval_splits:
        data.eval_splits = config.run.task.test
    calibration_split = _calibration_split(config, data, source)
    if calibration_split:
        data.eval_splits = (*data.eval_splits, calibration_split)
    return calibration_split


def _calibration_split(
    config: EvaluateConfig, data: TextDataModule, source: Checkpoint
) -> str | None:
    """Return the split that thresholds are chosen on, if it differs from the reported split.

    Args:
        config: the configuration.
        data: the data module; its evaluated splits are the reported ones.
        source: the checkpoint that is evaluated.

    Returns:
        The name of the split, or None if there is no target or the thresholds are cross-fitted.

    Raises:
        UserError: there is no such split, or it is the reported one.
    """
    place = config.calibration
    if place == "crossfit" or config.evaluation.target is None:
        return None
    if place not in ("auto", "heldout"):
        splits = [*data.task.validation, *data.task.test]
        if place not in splits:  # the training split is left out: ramps were fitted on it
            choices = ["auto", "heldout", "crossfit", *splits]
            raise unknown("calibration", place, choices, "calibration")
        if place in data.eval_splits:
            raise UserError(REPORTED.format(place))
        return place
    # The rows of another task (ax with an MNLI checkpoint) have no held-out part.
    is_same_task = config.run.task.name == source.config.task.name
    if is_same_task and HELD_OUT not in data.eval_splits and data.calibration_size:
        return HELD_OUT
    if place == "heldout":
        raise UserError(NO_ROWS.format(place))
    return None


def _read_rows(config: EvaluateConfig, data: TextDataModule, calibration_split: str | None) -> None:
    """Read and tokenize the rows of all splits, and check those that thresholds are chosen on.

    Raises:
        UserError: a split cannot be read, or its rows do not fit the target.
    """
    for split in data.eval_splits:
        data.tokens(split)
        if split in (data.task.train, *data.unlabelled):
            log.warning("split=%s: the model was trained on these rows", split)
    target, rule = config.evaluation.target, config.evaluation.rule
    if target and config.calibration != "auto":  # auto may choose other rows later
        split = calibration_split or data.eval_splits[0]
        columns = data.tokens(split)
        labelled = "label" in columns.column_names
        calibration.check(len(columns), labelled, split, data.task, rule, target)


def _check_devices(trainer: L.Trainer, config: EvaluateConfig) -> None:
    """Check that one process sees all rows, if the evaluation needs that.

    Raises:
        UserError: the Trainer has several processes.
    """
    switches = {
        "analysis": config.analysis,
        "timing": config.protocol,
        "precision": config.precision != "float32",
    }
    for flag, is_on in switches.items():
        if is_on and trainer.world_size > 1:
            raise UserError(f"{flag}= looks at all rows in one process: trainer.devices=1")


def _add_engine(
    callback: EarlyExitEvaluation,
    trainer: L.Trainer,
    config: EvaluateConfig,
    model: EarlyExitModel,
    data: TextDataModule,
    source: Checkpoint,
) -> None:
    """Let the callback record another precision, or measure latency, if that is configured.

    Raises:
        UserError: the model cannot run so, or there are no rows to quantize it with.
    """
    device, protocol = trainer.strategy.root_device, config.protocol
    precisions = [config.precision, *(protocol.precisions if protocol else ())]
    # The threads of ONNX Runtime start with the first check. Their number cannot change afterwards.
    with undisturbed(protocol.threads if protocol else None):
        for precision in precisions:
            settings.check(model, precision, device, config.runtime)
        quantization = _quantization(model, data, source) if "int8" in precisions else None
        if config.precision != "float32":
            rule = rules.default(data.task.num_labels)
            engine = Engine(
                model, rule, 0.0, precision=config.precision, runtime=config.runtime,
                quantization=quantization, device=device,
            )  # fmt: skip
            log.info("precision=%s: the layers run in %s", config.precision, engine.runtime)
            callback.recorded = EngineRecords(engine, data, trained=source.ramps_trained)
    if protocol:
        protocol = replace(protocol, quantization=quantization)
        measurement = LatencyMeasurement(model, data.task, data, protocol, device)
        evaluation = measurement.with_costs(config.evaluation, data.eval_splits[0])
        callback.evaluation_config = evaluation
        callback.timed = partial(measurement.timed, evaluation)


def _quantization(model: EarlyExitModel, data: TextDataModule, source: Checkpoint) -> Quantization:
    """Return the quantization that was saved with a model, or measure one.

    It is measured on rows that are not reported: rows held out of training, else rows of training.

    Raises:
        UserError: there are no such rows.
    """
    if saved_folder.is_saved(source.path):
        saved = Saved(source, saved_folder.records_of(source.path, source))
        has_one = any(record.quantization for record in saved.records.values())
        if has_one and len(saved.quantization().layers) == len(model.ramps):
            return saved.quantization()
    reported = data.eval_splits[0]
    held_out = HELD_OUT if data.calibration_size else None
    splits = [each for each in (held_out, data.task.train) if each and each != reported]
    if not splits:
        raise UserError(
            f"precision=int8 measures the ranges of the layers on rows that are not reported, and "
            f"task {data.task.name} has none beside {reported}; use precision=float32"
        )
    split = splits[0]
    num_rows = len(data.tokens(split))
    rows = torch.linspace(0, num_rows - 1, min(quantize.ROWS, num_rows)).long().tolist()
    log.info(
        "precision=int8: the ranges of the layers are those of %d rows of %s", len(rows), split
    )
    return quantize.measure(model, inputs_of(data, split, rows), split)


def _evaluate_records(config: EvaluateConfig, source: RecordFolder, job: Job) -> None:
    """Score the records of a checkpoint. Neither the model nor the data is needed.

    Args:
        config: the configuration.
        source: the records.
        job: the job that runs.

    Raises:
        UserError: no record fits the configuration, or the records do not fit together.
    """
    if job.is_set("logger"):
        log.warning("record= starts no run that could be logged: logger= is left out")
    reported, held_out = _choose_records(config, source)
    learned, trained = reported[0].learned_score_NL is not None, source.ramps_trained
    config.check_model(reported[0].num_layers, learned=learned, trained=trained)
    if len({record.logits_NLC.shape[1:] for record in source.records}) > 1:
        raise UserError(f"record={config.record}: its records have different numbers of ramps")
    evaluated = evaluate_records.evaluate_records(
        reported, config.run.task, config.evaluation, held_out, trained=trained
    )
    results = Results(
        **report.header(source.config.summary()),
        **vars(evaluated),
        record=checkpoints.lasting(str(config.record)),
        weights=source.header.checkpoint,
        precision=reported[0].precision,
    )
    report.save(results, job.folder)


def _choose_records(
    config: EvaluateConfig, source: RecordFolder
) -> tuple[list[Record], Record | None]:
    """Return the records that are reported, and the one that thresholds are chosen on.

    Raises:
        UserError: there is no record of the split, or thresholds would be chosen on it.
    """
    records = sorted(source.records, key=lambda record: config.run.task.order(record.split))
    split, place = config.split, config.calibration
    calibration_split = HELD_OUT if place in ("auto", "heldout") else place
    held_out = None
    if calibration_split != split:
        held_out = next((r for r in records if r.split == calibration_split), None)
    reported = [
        record
        for record in records
        if (record.split == split if split else record.split not in (HELD_OUT, calibration_split))
    ]
    if place == split or (not reported and split is None and held_out is not None):
        raise UserError(REPORTED.format(place))
    if not reported:
        splits = ", ".join(record.split for record in records)
        raise UserError(f"split={split}: {source.path} has records of: {splits} (split=...)")
    return reported, held_out
