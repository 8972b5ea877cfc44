"""Lightning callbacks that evaluate early exit in each validation and keep the best checkpoint.

`EarlyExitEvaluation` turns the logits of every ramp into a record, and the record into a curve of
score against expected saving. It writes the results as CSV, results.json and a plot, and gives
them to the loggers. This module does not know how the logits were computed.
"""

import csv
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from deebert.data.datamodule import TextDataModule
from deebert.disk import whole_files
from deebert.errors import UserError
from deebert.evaluation.evaluate_records import EvaluationConfig, evaluate_records
from deebert.evaluation.layers import layer_table
from deebert.exits import curves, rules
from deebert.exits.records import Record
from deebert.hub import record_files
from deebert.reporting import report
from deebert.reporting.results import Calibration, Results, TimedCase
from deebert.reporting.split_results import Example, Examples, SplitResults
from deebert.reporting.wandb import curve_columns, curve_rows
from deebert.training.feature_cache import FeatureCache
from deebert.training.loggers import to_trackers
from deebert.training.module import EarlyExitModule
from deebert.untrusted import tensor_files

log = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]  # logits of every ramp (B, L, C), labels (B,) -> scalar
# Lightning's name of a precision starts with one of these -> the precision of a record.
PRECISIONS = {"32": "float32", "64": "float64", "bf16": "bfloat16", "16": "float16"}


class EarlyExitEvaluation(Callback):
    """The callback that measures score and expected saving after each validation and test.

    It logs these values:

    - `val/score`: the task's first metric at full depth; `val/<metric>`: each metric.
    - `val/loss`: the loss of the stage's objective. The terms that a teacher or a learned exit
      score adds are left out. An objective that trains in turns is logged with the loss of all
      ramps.
    - `val/ramp_<layer>/score`, and `val/mean_ramp_score`, the mean of these scores.
    - `val/threshold_<t>/{score,expected_saving}`.

    A second validation split is logged under its own name. A test is logged under `test/`, without
    a loss. The files go to the run folder (`trainer.default_root_dir`). The attribute `results` has
    the last results.

    It works in any Trainer with an `EarlyExitModule`. The rows may come from any loaders whose
    batches the module takes. Records are saved only where the package's own data module knows the
    rows, and only of splits that were evaluated as a whole.

    Args:
        thresholds: the curve's thresholds, entropies >= 0. None stands for the paper's list
            (`curves.default_thresholds`).
        evaluation_config: the exit rule, thresholds and target of evaluate.py. None stands for
            the curve of the task's default rule.
        calibration: the evaluated split that the thresholds are chosen on. It is not reported.
        layers: whether to analyse every layer, too (`layers.layer_table`).
        ckpt: the name of the evaluated checkpoint, as the user gave it. None stands for the run
            folder of the training that this callback is part of.
    """

    def __init__(
        self,
        thresholds: list[float] | float | None,
        evaluation_config: EvaluationConfig | None = None,
        calibration: str | None = None,
        layers: bool = False,
        ckpt: str | None = None,
    ) -> None:
        self.thresholds = (
            None if thresholds is None else curves.check_thresholds(thresholds, "thresholds")
        )
        self.evaluation_config = evaluation_config
        self.calibration = calibration
        self.layers = layers
        self.ckpt = ckpt
        # (chosen thresholds, reported record) -> the timed cases.
        self.timed: Callable[[Calibration | None, Record], list[TimedCase]] | None = None
        # A record of the Trainer's pass -> that of the same rows in another precision.
        self.recorded: Callable[[Record], Record] | None = None
        self.results: Results | None = None
        # Whether the weights that are kept are validated after training, as `runs.train` does.
        self.is_closed = False
        # The epoch of the weights that `Trainer.validate` or `Trainer.test` runs, if it is known.
        self.epoch: int | None = None
        self._records: list[Record] = []
        self._weights = ""  # the fingerprint of the weights that gave these records
        self._batches: dict[int, list[dict[str, Tensor]]] = defaultdict(list)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the callback can evaluate this module.

        Raises:
            UserError: it cannot.
        """
        if not isinstance(pl_module, EarlyExitModule):
            raise UserError(
                f"EarlyExitEvaluation evaluates an EarlyExitModule, and {type(pl_module).__name__} "
                "is none: subclass deebert.training.module.EarlyExitModule, or remove the callback"
            )
        if self.layers and _own_data(trainer) is None:
            raise UserError(
                "EarlyExitEvaluation(layers=True) reads the rows from a TextDataModule: "
                "trainer.test(module, datamodule=...)"
            )

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        columns = {name: value.cpu() for name, value in outputs.items()}
        if "length" not in columns:
            columns["length"] = batch["attention_mask"].sum(1).cpu()
        if "index" not in columns:
            if trainer.world_size > 1:
                raise UserError(
                    "EarlyExitEvaluation in several processes tells rows that come twice by their "
                    "number: let batches have a column `index`, or use trainer.devices=1"
                )
            start = sum(len(each["index"]) for each in self._batches[dataloader_idx])
            columns["index"] = torch.arange(start, start + len(columns["logits"]))
        self._batches[dataloader_idx].append(columns)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, pl_module, "test")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":  # during fit, the files are written at the end
            self._save(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            if self.timed and self.results:
                timing = self.timed(self.results.calibration, self._records[0])
                self.results = replace(self.results, timing=timing)
        finally:  # the results are saved even if the timing fails
            self._save(trainer, pl_module)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, prefix: str) -> None:
        """Turn the outputs of all batches into records and results, and log the results."""
        batches, self._batches = self._batches, defaultdict(list)
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, EarlyExitModule)
        task = pl_module.config.task
        names = _split_names(trainer, len(batches), "test" if prefix == "test" else "validation")
        precision = str(trainer.precision)
        precision = next((PRECISIONS[p] for p in PRECISIONS if precision.startswith(p)), precision)
        records = [
            Record.from_batches(name, _gathered(trainer, batches[i]), precision)
            for i, name in enumerate(names)
        ]
        if self.recorded and trainer.state.fn == "test":
            records = [self.recorded(record) for record in records]
        self._records = records
        if trainer.is_global_zero:
            self._weights = tensor_files.fingerprint(pl_module.model.state_dict())
        # The records are saved first. They are kept even if the target cannot be met.
        if trainer.state.fn == "test":
            self._save_records(trainer, pl_module)
        reported = [record for record in records if record.split != self.calibration]
        held_out = next((record for record in records if record.split == self.calibration), None)
        evaluation_config = self.evaluation_config or EvaluationConfig(
            rules.default(task.num_labels),
            list(self.thresholds or curves.default_thresholds(task.num_labels)),
        )
        header = report.header(pl_module.config.summary())
        trained = pl_module.config.objective.trains_ramps
        evaluated = evaluate_records(reported, task, evaluation_config, held_out, trained=trained)
        if self.layers:
            splits = [self._with_layers(trainer, pl_module, part) for part in evaluated.splits]
            evaluated = replace(evaluated, splits=splits)
        self.results = Results(
            **header,
            **vars(evaluated),
            ckpt=self.ckpt or trainer.default_root_dir,
            epoch=trainer.current_epoch + 1 if trainer.state.fn == "fit" else self.epoch,  # from 1
            weights=self._weights,
            precision=records[0].precision,
        )
        for i, (record, evaluation) in enumerate(zip(reported, evaluated.splits, strict=True)):
            # A test has no loss: its ramps may differ from those that the objective is made for.
            loss = None if trainer.state.fn == "test" else pl_module.objective.loss
            scalars = _scalars(record, evaluation, loss)
            name = prefix if i == 0 else record.split.replace("validation", prefix)
            pl_module.log_dict(
                {f"{name}/{key}": value for key, value in scalars.items()}, sync_dist=True
            )
            if trainer.is_global_zero:
                step = trainer.global_step
                to_trackers(trainer.loggers, "log_evaluation", name, evaluation, step)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)  # a Trainer does not make it
            # The validation after training repeats an epoch, which has its rows in the file. Its
            # results are written at its end.
            if trainer.state.fn != "validate":
                report.save_json(self.results, folder)
                _append_csv(folder / "csv" / "curve.csv", self.results)

    def _with_layers(
        self, trainer: L.Trainer, pl_module: EarlyExitModule, part: SplitResults
    ) -> SplitResults:
        """Return the results of a split with an analysis of each layer."""
        loader = trainer.datamodule.loader(part.split)  # type: ignore[attr-defined]
        table = layer_table(pl_module.model, loader, pl_module.config.task)
        return replace(part, analysis=replace(part.analysis, layers=table.layers, cka=table.cka))

    def _save_records(self, trainer: L.Trainer, pl_module: EarlyExitModule) -> None:
        """Write the records into the run folder, with the stamp of what made them."""
        data = _own_data(trainer)
        if not trainer.is_global_zero or data is None:
            return
        for record in self._records:
            if len(record) < (num_rows := len(data.tokens(record.split))):
                log.warning(
                    "%d of %d rows of split %s were evaluated (trainer.limit_%s_batches): their "
                    "results are not those of the split, and no record of them is saved",
                    len(record),
                    num_rows,
                    record.split,
                    "test" if trainer.state.fn == "test" else "val",
                )
                continue
            rows = data.fingerprint(record.split)
            header = record_files.Header(self._weights, rows, pl_module.config, data.max_length)
            record_files.save(record, Path(trainer.default_root_dir) / "records", header)

    def _are_kept(self, trainer: L.Trainer, pl_module: EarlyExitModule) -> bool:
        """Say whether a training ends with the weights that were evaluated last."""
        if self.is_closed and getattr(trainer.checkpoint_callback, "monitor", None):
            return False  # the best epoch is kept
        return self._weights == tensor_files.fingerprint(pl_module.model.state_dict())

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files of the results, with the texts of the examples, and log them to W&B."""
        if not (trainer.is_global_zero and self.results):
            return
        assert isinstance(pl_module, EarlyExitModule)
        is_kept = trainer.state.fn != "fit" or self._are_kept(trainer, pl_module)
        if trainer.state.fn != "test" and is_kept:
            self._save_records(trainer, pl_module)
        folder = Path(trainer.default_root_dir)
        if data := _own_data(trainer):
            splits = [_with_texts(data, part) for part in self.results.splits]
            self.results = replace(self.results, splits=splits)
        report.save(self.results, folder)
        if not is_kept:
            return  # the weights that are kept are validated after training
        to_trackers(trainer.loggers, "log_final", self.results, folder)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, with the best checkpoint of a resumed run carried over.

    A resumed run writes into its own folder. Lightning would forget the best score there.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a resumed run, and copy its best checkpoint to this run's folder.

        Args:
            state_dict: the state of the callback, as `checkpoint_io.clean` leaves it.
        """
        earlier_best = Path(state_dict["best_model_path"])
        is_moved = self.monitor and self.dirpath and Path(self.dirpath) != earlier_best.parent
        if is_moved and earlier_best.is_file():
            # The copy gets this run's file name: the state may name any file of the earlier run.
            is_fixed = self.filename and "{" not in self.filename
            name = f"{self.filename}{self.FILE_EXTENSION}" if is_fixed else earlier_best.name
            copied_best = Path(str(self.dirpath)) / name
            rank_zero_only(whole_files.copy)(earlier_best, copied_best)
            state_dict = state_dict | {
                "dirpath": str(self.dirpath),
                "best_model_path": str(copied_best),
                "kth_best_model_path": str(copied_best),
                "best_k_models": {str(copied_best): state_dict["best_model_score"]},
                "last_model_path": "",
            }
        super().load_state_dict(state_dict)


def _own_data(trainer: L.Trainer) -> TextDataModule | None:
    """Return the data module that knows the rows; None with loaders of the user's own."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    data = data.data if isinstance(data, FeatureCache) else data
    return data if isinstance(data, TextDataModule) else None


def _split_names(trainer: L.Trainer, number: int, kind: str) -> list[str]:
    """Return the names of the evaluated splits: those of the data module, or ones made up."""
    if data := _own_data(trainer):
        return list(data.eval_splits)
    return [kind, *(f"{kind}_{i}" for i in range(1, number))]


def _gathered(trainer: L.Trainer, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the batches of all processes, on every process."""
    if trainer.world_size == 1:
        return batches
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, batches)
    return [batch for part in parts for batch in part]


def _with_texts(data: TextDataModule, part: SplitResults) -> SplitResults:
    """Return the results of a split with the texts of the examples."""

    def with_texts(rows: list[Example]) -> list[Example]:
        texts = data.texts(part.split, [row.index for row in rows])
        return [replace(row, text=text) for row, text in zip(rows, texts, strict=True)]

    if part.examples is None:
        return part
    first, last = with_texts(part.examples.first), with_texts(part.examples.last)
    return replace(part, examples=Examples(first, last))


def _scalars(record: Record, evaluation: SplitResults, loss: Loss | None) -> dict[str, float]:
    """Return the values that are logged for one split, by their name without the prefix."""
    scalars: dict[str, float] = {}
    if record.labels_N is not None:
        ramps = {ramp.layer: ramp.score for ramp in evaluation.exits if ramp.score is not None}
        scalars |= {"score": ramps[record.num_layers], **evaluation.exits[-1].scores}
        if loss:
            scalars["loss"] = loss(record.logits_NLC, record.labels_N).item()
        scalars["mean_ramp_score"] = sum(ramps.values()) / len(ramps)
        scalars |= {f"ramp_{layer}/score": score for layer, score in ramps.items()}
    for point in evaluation.curve:
        # Thresholds that differ by ramp are a list, which cannot be part of a chart's name.
        if isinstance(point.threshold, list):
            continue
        key = f"threshold_{point.threshold:g}"
        scalars[f"{key}/expected_saving"] = point.expected_saving
        if point.score is not None:
            scalars[f"{key}/score"] = point.score
    return scalars


def _append_csv(file: Path, results: Results) -> None:
    """Append one line per epoch, split and threshold to a CSV file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if is_new:
            writer.writerow(["epoch", "split", *curve_columns(results.headline)])
        for part in results.splits:
            position = ("" if results.epoch is None else results.epoch, part.split)
            writer.writerows([*position, *row] for row in curve_rows(part))
