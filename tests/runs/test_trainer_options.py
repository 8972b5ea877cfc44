"""What the user says about the Trainer, its callbacks and its loggers is honoured."""

import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
from conftest import TINY, results
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from deebert.runs import build
from deebert.training import progress

Run = Callable[..., str]

# Options of the Trainer that a training takes; the others are refused (test_keys.py). A line is a
# run: what can be said together is.
WORKING = (
    "+trainer.fast_dev_run=true",
    "+trainer.fast_dev_run=2",
    "+trainer.limit_train_batches=2 +trainer.limit_val_batches=1 trainer.num_sanity_val_steps=2 "
    "+trainer.accumulate_grad_batches=3 trainer.gradient_clip_val=null +trainer.profiler=simple "
    "trainer.deterministic=true +trainer.min_epochs=1 +trainer.min_steps=2 +trainer.enable_progress_bar=true",
    "+trainer.limit_train_batches=0.5 +trainer.limit_val_batches=0 +trainer.gradient_clip_algorithm=norm "
    "+trainer.profiler=advanced trainer.deterministic=false +trainer.benchmark=true trainer.log_every_n_steps=1 "
    "+trainer.enable_progress_bar=false",
    "+trainer.detect_anomaly=true +trainer.max_time=00:00:10:00 trainer.enable_model_summary=true "
    "+trainer.inference_mode=false +trainer.sync_batchnorm=true "
    "+callbacks.bar._target_=lightning.pytorch.callbacks.RichProgressBar",
    "trainer.precision=bf16-mixed", "trainer.precision=bf16-true",
    "trainer.precision=64-true", "trainer.precision=16-mixed",
    "+trainer.max_steps=5",
    "+trainer.enable_checkpointing=false callbacks.best=null callbacks.last=null",
    "+trainer.plugins={_target_:lightning.pytorch.plugins.AsyncCheckpointIO}",
    "+trainer.check_val_every_n_epoch=2", "+trainer.val_check_interval=0.5",
    "+trainer.check_val_every_n_epoch=null +trainer.val_check_interval=5",
)  # fmt: skip


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[L.Trainer]:
    """The Trainers that runs make from here on."""
    made, make = [], build.trainer

    def trainer(*arguments: object) -> L.Trainer:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(build, "trainer", trainer)
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_option_of_the_trainer_works_or_is_refused(
    run: Run, glue: Path, tmp_path: Path
) -> None:
    short = ("stages.1.epochs=1", "stages.1.batch_size=8", "data.limit_train=48")
    base = ("task=mrpc", *TINY, f"data.root={glue}", *short)
    for number, options in enumerate(WORKING):
        folder = tmp_path / str(number)
        printed = run("train.py", *base, *options.split(), f"hydra.run.dir={folder}")
        assert "Traceback" not in printed, options
        assert "trained in" in printed, options


def test_a_bar_where_it_can_be_seen_or_is_wanted(
    run: Run, stage2: Path, tmp_path: Path, trainers: list[L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """In a terminal, in a notebook, or as the user says; else there is none."""

    def bar(name: str, *options: str) -> ProgressBar | None:
        run("evaluate.py", f"ckpt={stage2}", "logger=csv", f"hydra.run.dir={tmp_path / name}", *options)  # fmt: skip
        return trainers[-1].progress_bar_callback

    assert bar("file") is None
    assert isinstance(bar("said", "+trainer.enable_progress_bar=true"), TQDMProgressBar)
    own = "+callbacks.bar._target_=lightning.pytorch.callbacks.RichProgressBar"
    assert isinstance(bar("own", own), RichProgressBar)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)  # as in a kernel of IPython
    assert isinstance(bar("notebook"), TQDMProgressBar)
    assert bar("unwanted", "+trainer.enable_progress_bar=false") is None
    monkeypatch.undo()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert progress.with_bar([], None) == ([], True)


def test_one_line_for_each_epoch(run: Run, glue: Path, stage1: Path, tmp_path: Path) -> None:
    """The loss, the scores if the epoch was validated, and the seconds."""

    def lines(name: str, *options: str) -> list[str]:
        printed = run("train.py", *options, "logger=csv", f"hydra.run.dir={tmp_path / name}")
        logged = [line.partition(" - ")[2] for line in printed.splitlines()]
        return [line for line in logged if line.startswith("epoch ")]

    validated = lines("stage2", "stage=2", f"ckpt={stage1}", "stages.2.epochs=2")
    exits = results(tmp_path / "stage2")["exits"]
    mean = sum(ramp["score"] for ramp in exits) / len(exits)
    assert [line[:21] for line in validated] == ["epoch 1 of 2: loss 1.", "epoch 2 of 2: loss 1."]
    full = exits[-1]["scores"]
    scores = f"f1 {full['f1']:.4f}, accuracy {full['accuracy']:.4f} at full depth; f1 {mean:.4f} over all ramps; "  # fmt: skip
    assert scores in validated[1]
    assert validated[1].endswith(" s")
    stage_1 = ("task=mrpc", *TINY, f"data.root={glue}", "stages.1.epochs=2")
    first, second = lines("stage1", *stage_1, "+trainer.check_val_every_n_epoch=2")
    assert "full depth" not in first, "an epoch without a validation has no score"
    assert "at full depth" in second
    assert "over all ramps" not in second, "stage 1 trains no ramp before the last"


def test_a_logger_is_as_the_user_says(
    run: Run, stage2: Path, tmp_path: Path, trainers: list[L.Trainer]
) -> None:
    run("evaluate.py", f"ckpt={stage2}", "logger=csv", f"+logger.csv.save_dir={tmp_path / 'logs'}",
        f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert (tmp_path / "logs" / "csv" / "metrics.csv").is_file()
    assert not (tmp_path / "run" / "csv" / "metrics.csv").exists()
    for name, options in (
        ("named", ["+logger.wandb.name=mine", "logger.wandb.group=ours"]),
        ("own", []),
    ):
        run("evaluate.py", f"ckpt={stage2}", "logger=wandb", *options, f"hydra.run.dir={tmp_path / name}")  # fmt: skip
    named, own = (trainer.loggers[0]._wandb_init for trainer in trainers[1:])
    assert (named["name"], named["group"]) == ("mine", "ours")
    assert (own["name"], own["group"]) == ("mrpc-tiny-evaluate-seed7", None)
    assert json.loads((tmp_path / "named" / "results.json").read_text())["task"] == "mrpc"
