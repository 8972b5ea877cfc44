"""A key that nothing reads, or that does nothing in a run, is refused by its name in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

from deebert.runs import keys

Run = Callable[..., str]

UNREAD = "nothing reads this key; the nearest known key is"


def refused(glue: Path, stage1: Path, stage2: Path) -> list[tuple[str, list[str], str]]:
    train = ("train.py", ["task=mrpc", *TINY, f"data.root={glue}"])
    second = ("train.py", ["stage=2", f"ckpt={stage1}", "logger=csv"])
    evaluate = ("evaluate.py", [f"ckpt={stage2}", "logger=csv"])
    strategy = "{_target_:lightning.pytorch.strategies.SingleDeviceStrategy,devise:cpu}"
    cases = [
        (train, "+foo=1", f"foo=1: {UNREAD} "),
        (train, "+lr=1e-4", f"lr=0.0001: {UNREAD} stages.1.lr"),
        (train, "+my={lr:1}", f"my.lr=1: {UNREAD} stages.1.lr"),
        (train, "+stages.1.learning_rate=1e-4", f"stages.1.learning_rate=0.0001: {UNREAD} stages.1.lr"),
        (train, "+stages.1.standardize=true", f"stages.1.standardize=True: {UNREAD} stages.2.standardize"),
        (second, "+stages.2.layer_drop=0.1", f"stages.2.layer_drop=0.1: {UNREAD} stages.1.layer_drop"),
        (train, "+stages.3.lr=1", f"stages.3.lr=1: {UNREAD} stages.1"),
        (train, "+backbone.paht=x", f"backbone.paht=x: {UNREAD} backbone.path"),
        (train, "+backbone.config.hiden_size=8", f"backbone.config.hiden_size=8: {UNREAD} backbone.config.hidden_size"),
        (train, "+data.max_len=8", f"data.max_len=8: {UNREAD} data.max_length"),
        (train, "+data.calibration_rows=x", f"data.calibration_rows=x: {UNREAD} data.calibration_size"),
        (train, "+task.lable=x", f"task.lable=x: {UNREAD} task.label"),
        (train, "+ramp.readers=x", "ramp setting 'readers' is unknown; choose one of: reads, shared_pooler"),
        (train, "+objective.temperature=2", "objective.temperature: final has no options"),
        (train, "+trainer.max_epoch=2", f"trainer.max_epoch=2: {UNREAD} trainer.max_epochs"),
        (train, f"trainer.strategy={strategy}", f"trainer.strategy.devise=cpu: {UNREAD} trainer.strategy.device"),
        (train, "+callbacks.best.monitr=1", f"callbacks.best.monitr=1: {UNREAD} callbacks.best.monitor"),
        (train, "+callbacks.early_exit.threshold=1", f"{UNREAD} callbacks.early_exit.thresholds"),
        (train, "+callbacks.mine.monitor=1", f"callbacks.mine.monitor=1: {UNREAD} callbacks.best.monitor"),
        (train, "+logger.csv.prefixes=1", f"logger.csv.prefixes=1: {UNREAD} logger.csv.prefix"),
        (train, "logger=wandb +logger.wandb.note=x", f"logger.wandb.note=x: {UNREAD} logger.wandb.notes"),
        (train, "~callbacks", "callbacks= is missing from the configuration; leave ~callbacks out"),
        (evaluate, "~trainer", "trainer= is missing from the configuration; leave ~trainer out"),
        (evaluate, "+target_savings=0.4", f"target_savings=0.4: {UNREAD} target_saving"),
        (evaluate, "+seed=3", f"seed=3: {UNREAD} "),
        (evaluate, "+backbone.path=x", f"backbone.path=x: {UNREAD} "),
        (evaluate, "+data.unlabelled=[test]", f"data.unlabelled=['test']: {UNREAD} "),
        (evaluate, "exit=patience +exit.patients=3", "exit.patients: exit=patience has no such option"),
        # What a run sets itself, or cannot do.
        (train, "+trainer.logger=true", "trainer.logger=True: loggers have a block of their own: logger=csv"),
        (train, "+trainer.logger=false", "trainer.logger=False: loggers have a block of their own"),
        (train, "+trainer.callbacks=[]", "trainer.callbacks=[]: callbacks have a block of their own"),
        (train, "+trainer.default_root_dir=x", "trainer.default_root_dir=x: all files are written into the run folder: hydra.run.dir=..."),
        (evaluate, "+trainer.default_root_dir=x", "hydra.run.dir=..."),
        (train, "+trainer.overfit_batches=3", "train on few rows instead: data.limit_train=N"),
        (train, "+trainer.overfit_batches=0.5", "trainer.overfit_batches=0.5: "),
        (train, "+trainer.barebones=true", "trainer.barebones=True: a run needs what it turns off"),
        (train, "trainer.use_distributed_sampler=true", "trainer.use_distributed_sampler=true: the batches are dealt out"),
        # What would end in a traceback or be ignored.
        (train, "+trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0 must be a whole number of 1 or more"),
        (train, "+trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch=0 must be a whole number of 1 or more"),
        (train, "+trainer.min_epochs=few", "trainer.min_epochs=few must be a whole number"),
        (train, "+trainer.max_steps=0", "trainer.max_steps=0 would train nothing"),
        (train, "+trainer.limit_train_batches=0", "trainer.limit_train_batches=0 would train nothing"),
        (train, "+trainer.limit_train_batches=few", "limit_train_batches=few must be a number"),
        (train, "+trainer.val_check_interval=1000", "trainer.val_check_interval: `val_check_interval` (1000) must be less than"),
        (train, "trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1 must be 0 or more"),
        (train, "+trainer.gradient_clip_algorithm=value", "clipped by their norm; leave it out"),
        (train, "+callbacks.es._target_=lightning.pytorch.callbacks.EarlyStopping +callbacks.es.monitor=val/scroe", "conditioned on metric `val/scroe` which is not available"),
        (train, "trainer.deterministic=maybe", "trainer.deterministic=maybe must be true, false or warn"),
        (train, "trainer.precision=8", "Precision 8 is invalid"),
        (train, "+trainer.profiler=fast", "it can only be one of ['simple', 'advanced'"),
        (train, "+trainer.max_time=long", "not a valid duration"),
        (train, "+trainer.enable_checkpointing=false", "found `ModelCheckpoint` in callbacks list"),
        # What does nothing in this run.
        (train, "+trainer.limit_test_batches=1", "trainer.limit_test_batches=1 does nothing here: a training tests nothing"),
        (train, "+trainer.limit_predict_batches=1", "trainer.limit_predict_batches=1 does nothing here"),
        (train, "+trainer.enable_autolog_hparams=false", "trainer.enable_autolog_hparams=False does nothing"),
        (train, "+trainer.reload_dataloaders_every_n_epochs=1", "trainer.reload_dataloaders_every_n_epochs=1 does nothing"),
        (train, "+trainer.model_registry=x", "trainer.model_registry=x does nothing"),
        (train, "backbone.epochs=4", "backbone.epochs=4 is read by experiment=deebert_paper alone: set stages.1.epochs"),
        (train, "+backbone.config.num_labels=7", "backbone.config.num_labels=7 does nothing: the labels of the task decide it"),
        (evaluate, "+trainer.limit_test_batches=2 target_saving=0.3", "limit_test_batches=2 would choose the thresholds on a part of the rows"),
        (second, "stages.1.lr=1", "stages.1.lr=1 does nothing in stage=2: set stages.2"),
        (second, "backbone.epochs=4", "backbone.epochs=4 is read by experiment=deebert_paper alone: set stages.2.epochs"),
        (second, "backbone.lr=1e-4", "backbone.lr=0.0001 does nothing in stage=2: set stages.2.lr"),
        (train, "experiment=deebert_paper +backbone.lr=1e-4", "is read by no recipe here: set stages.1.lr"),
        (evaluate, "trainer.max_epochs=2", "trainer.max_epochs=2 does nothing here: an evaluation trains nothing"),
        (evaluate, "+trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches=2 does nothing here"),
        (evaluate, "confidence=0.9", "confidence=0.9 does nothing without max_drop="),
        (evaluate, "loss=disagreement target_saving=0.3", "loss=disagreement does nothing without max_drop="),
        (evaluate, "calibration=crossfit", "calibration=crossfit does nothing without target_saving="),
        (evaluate, "calibration=crossfit threshold=0.1", "calibration=crossfit does nothing without target_saving="),
        (evaluate, "runtime=onnx threshold=0.1", "runtime=onnx is of int8 or of what is timed"),
        (evaluate, "repeats=2 target_saving=0.3", "repeats=2 is of what is timed"),
        (evaluate, "threads=1", "threads=1 is of what is timed"),
        (evaluate, "per_ramp=true threshold=0.1", "per_ramp=true needs target_saving="),
        (evaluate, "temperature=true thresholds=[0.1]", "temperature=true needs target_saving="),
    ]  # fmt: skip
    return [(script, [*base, *more.split()], line) for (script, base), more, line in cases]


@pytest.mark.slow
def test_a_key_without_effect_is_refused_by_name(
    fails: Run, glue: Path, stage1: Path, stage2: Path, tmp_path: Path
) -> None:
    wrong = {}
    for number, (script, overrides, line) in enumerate(refused(glue, stage1, stage2)):
        try:
            printed = fails(script, *overrides, f"hydra.run.dir={tmp_path / str(number)}")
        except pytest.fail.Exception:  # nothing was raised
            printed = "was accepted"
        if line not in printed:
            wrong[line] = printed
    assert not wrong


def test_a_key_that_a_value_refers_to_is_read() -> None:
    values = {
        "data": {"base": "/x", "root": "${.base}/a"},
        "my-key": 3,
        "paths": {"a": 1},
        "lists": "${my-key} ${oc.dict.values:paths} ${oc.select:outer.inner,1}",
    }
    assert {"base", "my-key", "paths", "outer.inner"} <= keys.references(values)
    assert keys._ends("data.base") == ["data.base", "base"]


def test_a_key_of_a_file_is_refused_too(fails: Run, glue: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    file = tmp_path / "conf" / "experiment" / "mine.yaml"
    base = (f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "task=mrpc", *TINY, "experiment=mine")
    for text, key in (
        ("stages: {'1': {learning_rate: 1e-4}}", "stages.1.learning_rate="),
        ("trainer: {gradient_clip: 1}", "trainer.gradient_clip=1"),
        ("extra: {a: {b: 1}}", "extra.a.b=1"),
    ):
        file.write_text(f"# @package _global_\n{text}\n")
        line = fails("train.py", *base, f"data.root={glue}", f"hydra.run.dir={tmp_path / 'run'}")
        assert f"{key}" in line
        assert UNREAD in line
