"""EarlyExitEvaluation: at each validation and test, score against expected saving from one pass.

Turns the logits of every ramp into a record, the record into a curve, and the curve into csv,
results.json, the picture and W&B. Knows nothing of how the logits came about.
"""

import csv
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from deebert.data.tasks import Task
from deebert.evaluation.evaluate_records import EvaluationConfig, evaluate_records
from deebert.evaluation.layers import layer_table
from deebert.exits import curves, rules
from deebert.exits.records import Record
from deebert.hub import record_files
from deebert.models.trained_ramps import trains_ramps
from deebert.reporting import report, tables, wandb
from deebert.training.module import EarlyExitModule
from deebert.training.objectives import Loss
from deebert.untrusted import tensor_files

log = logging.getLogger(__name__)


class EarlyExitEvaluation(Callback):
    """Score and expected saving for each threshold, score of every ramp, exit histogram.

    Logs `val/score` (full depth, headline metric), `val/<metric>`, `val/loss` (the stage's own
    objective, without what a teacher or a learned exit score adds; of an objective in turns all
    ramps'), `val/ramp_<layer>/score`, their mean `val/mean_ramp_score`, and
    `val/threshold_<t>/{score,expected_saving}`; a second validation split is logged under its own
    name, a test under `test/`, without a loss. Files go to the run folder
    (`trainer.default_root_dir`); `results` holds what results.json holds.

    Args:
        thresholds: entropies >= 0; None for the paper's list (`curves.default_thresholds`).
        evaluation_config: what evaluate.py asks; None: the curve of the default rule.
        calibration: the split among those evaluated that thresholds are chosen on, not reported.
        layers: look at every layer, too (`layers.layer_table`).
        ckpt: what is evaluated, as it was given; None: what this run trains.
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
        # Results and the reported record -> what results.json holds under `timing`.
        self.timed: Callable[[dict[str, Any], Record], list[dict[str, Any]]] | None = None
        self.results: dict[str, Any] = {}
        self._records: list[Record] = []
        self._batches: dict[int, list[dict[str, Tensor]]] = defaultdict(list)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._batches[dataloader_idx].append({name: value.cpu() for name, value in outputs.items()})

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, pl_module, "test")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":  # during fit the picture waits for the end
            self._save(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            if self.timed:
                self.results["timing"] = self.timed(self.results, self._records[0])
        finally:  # what has been found out is not lost
            self._save(trainer, pl_module)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, prefix: str) -> None:
        batches, self._batches = self._batches, defaultdict(list)
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, EarlyExitModule)
        config = pl_module.hparams["config"]
        task = Task.from_config(config["task"])
        records = [
            Record.from_batches(name, _gathered(trainer, batches[i]))
            for i, name in enumerate(trainer.datamodule.eval_splits)  # type: ignore[attr-defined]
        ]
        self._records = records
        if trainer.state.fn == "test":  # first: a target that cannot be met loses no pass
            self._save_records(trainer, pl_module)
        reported = [record for record in records if record.split != self.calibration]
        held_out = next((record for record in records if record.split == self.calibration), None)
        evaluation_config = self.evaluation_config or EvaluationConfig(
            rules.default(task.num_labels),
            list(self.thresholds or curves.default_thresholds(task.num_labels)),
        )
        header = report.header(config)
        trained = trains_ramps(header["objective"])
        self.results = header | evaluate_records(
            reported, task, evaluation_config, held_out, trained=trained
        )
        self.results["ckpt"] = self.ckpt or trainer.default_root_dir
        if trainer.state.fn == "fit":
            self.results["epoch"] = trainer.current_epoch + 1  # of the epochs counted from 1
        evaluations = tables.splits(self.results)
        if self.layers:
            for part in evaluations:
                loader = trainer.datamodule.loader(part["split"])  # type: ignore[attr-defined]
                table = layer_table(pl_module.model, loader, task)
                part["analysis"] |= {"layers": table["layers"], "cka": table["cka"]}
        for i, (record, evaluation) in enumerate(zip(reported, evaluations, strict=True)):
            # A loss is of training: a test may be of other ramps than those it was made for.
            loss = None if trainer.state.fn == "test" else pl_module.objective.loss
            scalars = _scalars(record, evaluation, loss)
            name = prefix if i == 0 else record.split.replace("validation", prefix)
            pl_module.log_dict(
                {f"{name}/{key}": value for key, value in scalars.items()}, sync_dist=True
            )
            if trainer.is_global_zero:
                for run in _wandb_runs(trainer):
                    wandb.log_evaluation(run, name, evaluation, trainer.global_step)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            report.save_json(self.results, folder)
            if trainer.state.fn != "validate":  # the best epoch once more, at the end of training
                _append_csv(folder / "csv" / "curve.csv", self.results)
            full = evaluations[0]["exits"][-1]["scores"]
            if "epoch" in self.results:
                scores = ", ".join(f"{name} {value:.4f}" for name, value in full.items())
                log.info("epoch %d: %s at full depth", self.results["epoch"], scores)

    def _save_records(self, trainer: L.Trainer, pl_module: EarlyExitModule) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        weights = tensor_files.fingerprint(pl_module.model.state_dict())
        for record in self._records:
            facts = {"checkpoint": weights, "data": data.fingerprint(record.split)}
            facts["config"] = pl_module.hparams["config"]
            record_files.save(record, Path(trainer.default_root_dir) / "records", facts)

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (trainer.is_global_zero and self.results):
            return
        assert isinstance(pl_module, EarlyExitModule)
        if trainer.state.fn != "test":
            self._save_records(trainer, pl_module)
        folder = Path(trainer.default_root_dir)
        for part in tables.splits(self.results):
            for rows in part.get("examples", {}).values():
                indices = [row["index"] for row in rows]
                texts = trainer.datamodule.texts(part["split"], indices)  # type: ignore[attr-defined]
                for row, text in zip(rows, texts, strict=True):
                    row["text"] = text
        report.save(self.results, folder)
        if trainer.state.fn == "fit" and getattr(trainer.checkpoint_callback, "monitor", None):
            return  # the best epoch is validated once more, and that is the final word
        for run in _wandb_runs(trainer):
            wandb.log_final(run, self.results, folder / "curve.png")


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, but in a resumed run the best of the epochs before comes along.

    A resumed run writes into a folder of its own; Lightning would forget the best score there.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = Path(state_dict["best_model_path"])
        moved = self.monitor and self.dirpath and Path(self.dirpath) != before.parent
        if moved and before.is_file():
            # Under its own name: a state may call any file of that run the best.
            plain = self.filename and "{" not in self.filename
            name = f"{self.filename}{self.FILE_EXTENSION}" if plain else before.name
            ours = Path(str(self.dirpath)) / name
            ours.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(before, ours)
            state_dict = state_dict | {
                "dirpath": str(self.dirpath),
                "best_model_path": str(ours),
                "kth_best_model_path": str(ours),
                "best_k_models": {str(ours): state_dict["best_model_score"]},
                "last_model_path": "",
            }
        super().load_state_dict(state_dict)


def _wandb_runs(trainer: L.Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _gathered(trainer: L.Trainer, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The batches of every process, on every process."""
    if trainer.world_size == 1:
        return batches
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, batches)
    return [batch for part in parts for batch in part]


def _scalars(record: Record, evaluation: dict[str, Any], loss: Loss | None) -> dict[str, float]:
    scalars: dict[str, float] = {}
    if record.labels_N is not None:
        full = evaluation["exits"][-1]
        scalars |= {"score": full["score"], **full["scores"]}
        if loss:
            scalars["loss"] = loss(record.logits_NLC, record.labels_N).item()
        scores = [ramp["score"] for ramp in evaluation["exits"]]
        scalars["mean_ramp_score"] = sum(scores) / len(scores)
        for ramp in evaluation["exits"]:
            scalars[f"ramp_{ramp['layer']}/score"] = ramp["score"]
    for point in evaluation["curve"]:
        if isinstance(point["threshold"], list):  # one for each ramp: no name for a chart
            continue
        key = f"threshold_{point['threshold']:g}"
        scalars[f"{key}/expected_saving"] = point["expected_saving"]
        if point["score"] is not None:
            scalars[f"{key}/score"] = point["score"]
    return scalars


def _append_csv(file: Path, results: dict[str, Any]) -> None:
    """One line per epoch, split and threshold."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if fresh:
            writer.writerow(["epoch", "split", *wandb.curve_columns(results)])
        for part in tables.splits(results):
            where = (results.get("epoch", ""), part["split"])
            writer.writerows([*where, *row] for row in wandb.curve_rows(part))
