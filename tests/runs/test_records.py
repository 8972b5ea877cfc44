"""A record is used only by the weights, and in the way, that it was made with."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import command, results
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deebert import EarlyExitClassifier
from deebert.errors import UserError
from deebert.exits.curves import OperatingPoint
from deebert.hub import record_files

Run = Callable[..., str]

# Optimizer steps follow the last validation of these runs of 3 epochs with 12 steps each.
LATE_STEPS = {
    "every second epoch": ("+trainer.check_val_every_n_epoch=2",),
    "within an epoch": ("+trainer.val_check_interval=5",),
    "stopped within an epoch": ("+trainer.max_steps=30",),
    "stopped before any validation": ("+trainer.max_steps=7",),
    "the best epoch is kept": ("+trainer.check_val_every_n_epoch=2", "callbacks.best.monitor=train/loss"),
}  # fmt: skip


def saved(folder: Path) -> tuple[record_files.Record, record_files.Header]:
    return record_files.load(folder / "records" / "validation.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("what", LATE_STEPS)
def test_a_run_leaves_the_record_of_the_weights_it_leaves(
    what: str, run: Run, stage1: Path, tmp_path: Path
) -> None:
    trained, again = tmp_path / "trained", tmp_path / "again"
    run("train.py", "stage=2", f"ckpt={stage1}", "logger=csv", *LATE_STEPS[what], f"hydra.run.dir={trained}")  # fmt: skip
    run("evaluate.py", f"ckpt={trained}", "logger=csv", f"hydra.run.dir={again}")
    (ours, header), (theirs, expected) = saved(trained), saved(again)
    torch.testing.assert_close(ours.logits_NLC, theirs.logits_NLC, rtol=0, atol=1e-5)
    assert header.checkpoint == expected.checkpoint
    assert results(trained)["exits"] == results(again)["exits"]
    assert results(trained)["weights"] == results(again)["weights"] == header.checkpoint
    # What is asked for is what is got.
    classifier = EarlyExitClassifier.from_pretrained(trained)
    point = classifier.calibrate(target_saving=0.3)
    layer_N, _ = OperatingPoint(point.rule, point.thresholds)(theirs, classifier.task)
    assert 1 - layer_N.double().mean().item() / 3 == pytest.approx(point.expected.expected_saving)


@pytest.fixture(scope="module")
def cut(stage2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation whose inputs were cut to 20 tokens. Its run reads 64."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    command("evaluate.py", f"ckpt={stage2}", "data.max_length=20", "logger=csv", f"hydra.run.dir={folder}")  # fmt: skip
    return folder


def test_a_record_of_shorter_inputs_is_not_used_at_full_length(
    run: Run, fails: Run, cut: Path, stage2: Path, tmp_path: Path
) -> None:
    """Expected 40.1 %, got 45.4."""
    record, header = saved(cut)
    assert (header.max_length, record.length_N.max()) == (20, 20)
    assert saved(stage2)[1].max_length == 64
    mistake = "recorded with data.max_length=20, and .* runs with data.max_length=64"
    with pytest.raises(UserError, match=mistake) as error:
        EarlyExitClassifier.from_pretrained(cut)
    assert "\n" not in str(error.value)
    line = fails("evaluate.py", f"record={cut}", f"ckpt={stage2}", f"hydra.run.dir={tmp_path / 'a'}")  # fmt: skip
    assert "recorded with data.max_length=20" in line
    # Alone, it tells what it is: the results of the inputs that were cut.
    run("evaluate.py", f"record={cut}", f"hydra.run.dir={tmp_path / 'b'}")
    for key in ("exits", "curve", "weights"):
        assert results(tmp_path / "b")[key] == results(cut)[key], key


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_record_of_some_rows_is_not_saved(
    script: str, run: Run, stage1: Path, stage2: Path, tmp_path: Path
) -> None:
    source, flag = {
        "train.py": (("stage=2", f"ckpt={stage1}", "stages.2.epochs=1"), "limit_val_batches"),
        "evaluate.py": ((f"ckpt={stage2}",), "limit_test_batches"),
    }[script]
    printed = run(script, *source, "data.eval_batch_size=8", f"+trainer.{flag}=2", "logger=csv", f"hydra.run.dir={tmp_path}")  # fmt: skip
    assert f"16 of 40 rows of split validation were evaluated (trainer.{flag})" in printed
    assert results(tmp_path)["num_rows"] == 16
    assert not list(tmp_path.glob("records/*"))
    # It is a run all the same, but for targets.
    classifier = EarlyExitClassifier.from_pretrained(tmp_path if script == "train.py" else stage2)
    assert len(classifier.predict([("a", "b")], threshold=0.1)) == 1
    if script == "train.py":
        with pytest.raises(UserError, match="has no records to choose thresholds on"):
            classifier.calibrate(target_saving=0.3)


def restamped(source: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    """Copy the record of a run with other facts in its header."""
    file = source / "records" / "validation.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as content:
        facts = json.loads(content.metadata()["deebert"])
    change(facts)
    (folder / "records").mkdir(parents=True)
    save_file(tensors, folder / "records" / file.name, {"deebert": json.dumps(facts)})
    return folder


def test_a_record_from_before_is_whole_in_float32_at_the_length_of_its_run(
    stage2: Path, tmp_path: Path
) -> None:
    def age(facts: dict) -> None:
        assert facts.pop("max_length") == 64
        assert facts.pop("precision") == "float32"

    shutil.copytree(stage2 / "checkpoints", tmp_path / "checkpoints")
    record, header = saved(restamped(stage2, tmp_path, age))
    assert (header.max_length, record.precision) == (64, "float32")
    ours, theirs = (EarlyExitClassifier.from_pretrained(f) for f in (tmp_path, stage2))
    assert ours.calibrate(target_saving=0.3) == theirs.calibrate(target_saving=0.3)


STAMPS = {
    "other weights": ({"checkpoint": "0" * 16}, "of other weights than"),
    "another length": ({"max_length": 8}, "recorded with data.max_length=8, and"),
    "no length": ({"max_length": "all"}, "its max_length is 'all'"),
    "no precision": ({"precision": 16}, "its precision 16"),
}


@pytest.mark.parametrize("what", STAMPS)
def test_a_stamp_that_does_not_fit_is_one_line(what: str, stage2: Path, tmp_path: Path) -> None:
    changes, says = STAMPS[what]
    shutil.copytree(stage2 / "checkpoints", tmp_path / "checkpoints")
    restamped(stage2, tmp_path, lambda facts: facts.update(changes))
    with pytest.raises(UserError, match=says) as error:
        EarlyExitClassifier.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def half(stage2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "run"
    command("evaluate.py", f"ckpt={stage2}", "trainer.precision=bf16-mixed", "logger=csv", f"hydra.run.dir={folder}")  # fmt: skip
    return folder


def test_a_record_in_another_precision_says_so(
    half: Path, stage2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert saved(half)[0].precision == "bfloat16"
    classifier = EarlyExitClassifier.from_pretrained(half)
    classifier.save_pretrained(tmp_path / "saved")  # the precision stays with the record
    for folder, precision, warns in (
        (half, "float32", True), (tmp_path / "saved", "float32", True),
        (half, "bfloat16", False), (stage2, "float32", False), (stage2, "bfloat16", True),
    ):  # fmt: skip
        caplog.clear()
        loaded = EarlyExitClassifier.from_pretrained(folder, precision=precision)
        loaded.calibrate(target_saving=0.3)
        assert ("thresholds are chosen on logits in" in caplog.text) == warns, (folder, precision)


def test_records_that_were_made_in_two_ways_are_no_evaluation(
    fails: Run, stage2: Path, tmp_path: Path
) -> None:
    record, header = saved(stage2)
    for field, says in (
        ({"max_length": 8}, "its records are of different checkpoints"),
        ({"precision": "bfloat16"}, "validation was recorded in float32, extra in bfloat16"),
    ):
        folder = tmp_path / next(iter(field))
        extra = dataclasses.replace(record, split="extra", precision=field.get("precision", "float32"))  # fmt: skip
        stamp = dataclasses.replace(header, max_length=field.get("max_length", 64))
        record_files.save(record, folder / "records", header)
        record_files.save(extra, folder / "records", stamp)
        line = fails("evaluate.py", f"record={folder}", f"hydra.run.dir={tmp_path / 'out'}")
        assert says in line or "extra was recorded in bfloat16" in line, field


# Keys that do nothing beside a record, or without a target.
IDLE = {
    ("confidence=0.9",): "confidence=0.9 does nothing without max_drop=",
    ("target_saving=0.4", "loss=disagreement"): "loss=disagreement does nothing without max_drop=",
    ("calibration=crossfit",): "calibration=crossfit does nothing without target_saving=, target_",
    ("data.max_length=20",): "data.max_length=20 does nothing with record=",
    ("data.root=gone",): "data.root=gone does nothing with record=",
    ("+trainer.limit_test_batches=2",): "trainer.limit_test_batches=2 does nothing with record=",
    ("trainer.precision=bf16-mixed",): "trainer.precision=bf16-mixed does nothing with record=",
    ("+seed=1",): "seed=1: nothing reads this key",
    ("layers=[1,2]",): "layers=[1, 2] cuts the model, which a record has not",
    ("analysis=true",): "analysis=true runs the model, which a record has not",
    ("timing=all", "threshold=0.1"): "timing= and target_speedup= run the model",
    ("target_speedup=1.5",): "timing= and target_speedup= run the model",
    ("threads=2",): "threads=2 is of what is timed",
    ("precision=int8",): "precision=int8 runs the model: give ckpt=, not record=",
    ("per_ramp=true",): "per_ramp=true needs target_saving=",
    ("target_saving=0.4", "calibration=validation"): "is the reported split itself",
    ("split=validation", "target_saving=0.4", "calibration=validation"): "is the reported split itself",
}  # fmt: skip


def test_a_key_that_does_nothing_for_a_record_is_refused(
    fails: Run, stage2: Path, tmp_path: Path
) -> None:
    for i, (overrides, says) in enumerate(IDLE.items()):
        line = fails("evaluate.py", f"record={stage2}", *overrides, f"hydra.run.dir={tmp_path / str(i)}")  # fmt: skip
        assert says in line, (overrides, line)
        assert not (tmp_path / str(i) / "results.json").exists()
