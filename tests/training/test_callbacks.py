"""The callback in a Trainer that is not the package's own."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.trainings import QUIET, build
from torch.utils.data import DataLoader

from deebert.errors import UserError
from deebert.hub import record_files
from deebert.hub.run_config import RunConfig
from deebert.training.callbacks import EarlyExitEvaluation
from deebert.training.module import EarlyExitModule

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def plain_trainer(folder: Path, *callbacks: L.Callback, **options: object) -> L.Trainer:
    """A Trainer as a user writes it. Its folder does not exist yet."""
    return L.Trainer(
        default_root_dir=folder / "new" / "run", max_epochs=1, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **({"use_distributed_sampler": False} | options),
    )  # fmt: skip


def test_with_the_package_s_rows_it_leaves_what_a_run_leaves(glue: Path, tmp_path: Path) -> None:
    module, data = build("stage 1", glue)
    callback = EarlyExitEvaluation(None)
    plain_trainer(tmp_path, callback).fit(module, datamodule=data)
    folder = tmp_path / "new" / "run"
    written = json.loads((folder / "results.json").read_text())
    assert (written["split"], written["num_rows"], written["epoch"]) == ("validation", 40, 1)
    record, header = record_files.load(folder / "records" / "validation.safetensors")
    assert header.checkpoint == written["weights"]
    assert (len(record), header.max_length, header.data) == (40, 64, data.fingerprint("validation"))
    assert {file.name for file in folder.iterdir()} == {
        "csv", "curve.png", "records", "report.html", "results.json", "results.md",
    }  # fmt: skip


class Own(L.LightningDataModule):
    """A user's data module: the batches of another one, as far as the model needs them."""

    def __init__(self, data: L.LightningDataModule, columns: set[str]) -> None:
        super().__init__()
        self.data, self.columns = data, columns

    def _loader(self, loader: DataLoader) -> DataLoader:
        rows = [{k: v for k, v in batch.items() if k in self.columns} for batch in loader]
        return DataLoader(rows, batch_size=None)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.data.train_dataloader())

    def val_dataloader(self) -> list[DataLoader]:
        return [self._loader(loader) for loader in (*self.data.val_dataloader(), self.data.loader("test"))]  # fmt: skip


NEEDED = {"input_ids", "attention_mask", "token_type_ids", "labels"}


@pytest.mark.parametrize("how", ["a data module", "loaders"])
def test_with_rows_of_the_user_s_own_it_evaluates(how: str, glue: Path, tmp_path: Path) -> None:
    """Such batches have neither the number of a row nor its length."""
    module, data = build("stage 1", glue)
    own = Own(data, NEEDED)
    callback, theirs = EarlyExitEvaluation([0, 0.1]), EarlyExitEvaluation([0, 0.1])
    trainer = plain_trainer(tmp_path, callback, num_sanity_val_steps=2)
    if how == "loaders":
        trainer.fit(module, own.train_dataloader(), own.val_dataloader())
    else:
        trainer.fit(module, datamodule=own)
    assert callback.results is not None
    assert [part.split for part in callback.results.splits] == ["validation", "validation_1"]
    assert [part.num_rows for part in callback.results.splits] == [40, 16]
    assert trainer.callback_metrics["val/score"] == callback.results.headline.exits[-1].score
    assert "val_1/score" in trainer.callback_metrics
    folder = tmp_path / "new" / "run"
    assert not (folder / "records").exists(), "nothing is known of these rows"
    assert (folder / "report.html").is_file()
    # The same numbers as with rows of the package.
    plain_trainer(tmp_path / "theirs", theirs).validate(module, datamodule=data, verbose=False)
    assert theirs.results is not None
    ours, expected = callback.results.headline, theirs.results.headline
    assert (ours.exits, ours.curve) == (expected.exits, expected.curve)
    trainer.test(module, own.val_dataloader(), verbose=False)
    assert [part.split for part in callback.results.splits] == ["test", "test_1"]


def test_no_record_is_left_of_weights_that_steps_have_changed(
    glue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, data = build("stage 1", glue)
    trainer = plain_trainer(tmp_path, EarlyExitEvaluation(None), val_check_interval=5)
    trainer.fit(module, datamodule=data)
    assert not (tmp_path / "new" / "run" / "records").exists()
    trainer.validate(module, datamodule=data, verbose=False)
    written = json.loads((tmp_path / "new" / "run" / "results.json").read_text())
    _, header = record_files.load(tmp_path / "new/run/records/validation.safetensors")
    assert header.checkpoint == written["weights"]


class Wrapped(L.LightningModule):
    """A user's module around the model."""

    def __init__(self, module: EarlyExitModule) -> None:
        super().__init__()
        self.model = module.model

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        logits = self.model(batch["input_ids"], batch["attention_mask"])
        return torch.nn.functional.cross_entropy(logits[:, -1], batch["labels"])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Subclass(EarlyExitModule):
    """A user's module of ours, with a step of its own."""

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * 2


def test_a_module_it_cannot_evaluate_is_one_line(glue: Path, tmp_path: Path) -> None:
    module, data = build("stage 1", glue)
    trainer = plain_trainer(tmp_path, EarlyExitEvaluation(None))
    with pytest.raises(UserError, match="evaluates an EarlyExitModule, and Wrapped is none: sub"):
        trainer.fit(Wrapped(module), datamodule=data)
    with pytest.raises(UserError, match=r"layers=True\) reads the rows from a TextDataModule"):
        plain_trainer(tmp_path, EarlyExitEvaluation(None, layers=True)).fit(
            module, data.train_dataloader(), data.val_dataloader()
        )
    for make in (RunConfig.from_checked, RunConfig.from_plain):
        values = module.config.plain()
        del values["task"]
        with pytest.raises(UserError, match="a run's configuration has no task, "):
            make(values)
    callback = EarlyExitEvaluation(None)
    own = Subclass(module.model, module.config, {})
    plain_trainer(tmp_path, callback).fit(own, datamodule=data)
    assert callback.results is not None
