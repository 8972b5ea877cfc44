"""precision=int8 means the same in evaluate, Python, predict, saved folders and the export."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, results
from helpers.tables import PAIRS, read, rows, write

from deebert import EarlyExitClassifier
from deebert.errors import UserError
from deebert.evaluation.engine_records import check_losses, losses
from deebert.exits.records import Record
from deebert.export.onnx_runner import Runner
from deebert.hub import record_files
from deebert.models.quantization import InputRange, LayerRanges, Quantization

pytestmark = pytest.mark.slow
Run = Callable[..., str]
TARGET = {"target_saving": 0.3}
SEEN = ("train", 96)  # so few rows that none is held out


@pytest.fixture(scope="module")
def int8(stage2: Path, made_once: Callable[..., Path]) -> Path:
    """An evaluation in int8."""
    given = (f"ckpt={stage2}", "precision=int8", "target_saving=0.3", "logger=csv")
    return made_once("int8", lambda to: command("evaluate.py", *given, f"hydra.run.dir={to}"))


@pytest.fixture(scope="module")
def classifier(int8: Path) -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(int8, precision="int8")


def test_the_record_is_that_of_the_quantized_model(
    int8: Path, stage2: Path, classifier: EarlyExitClassifier
) -> None:
    records = {file.stem: record_files.load(file)[0] for file in record_files.files(int8)}
    exact = {file.stem: record_files.load(file)[0] for file in record_files.files(stage2)}
    one = records["validation"]
    assert one.precision == "int8"
    assert one.quantization is not None
    assert (one.quantization.split, one.quantization.num_rows) == SEEN, "never a reported row"
    assert {record.quantization for record in records.values()} == {one.quantization}
    assert exact["validation"].quantization is None
    moved = (one.logits_NLC - exact["validation"].logits_NLC).abs()
    assert 0 < moved.mean() < 0.1
    result = results(int8)
    assert result["precision"] == "int8"
    assert "int8" in (int8 / "results.md").read_text().splitlines()[0]
    predictions_N = classifier.task.predict(one.logits_NLC[:, -1])
    score = classifier.task.score(predictions_N, one.labels_N)
    assert result["exits"][-1]["score"] == pytest.approx(score)


def test_everything_answers_alike(
    int8: Path, classifier: EarlyExitClassifier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert classifier.engine.runtime == "onnx"
    with caplog.at_level(logging.WARNING):
        expected = classifier.predict(PAIRS, **TARGET)
    assert not caplog.messages, "thresholds come from a record in the same precision"
    classifier.save_pretrained(tmp_path / "saved", **TARGET)
    saved = EarlyExitClassifier.from_pretrained(tmp_path / "saved", precision="int8")
    assert saved.engine.quantization == classifier.engine.quantization
    others = [saved.predict(PAIRS), EarlyExitClassifier.from_pretrained(
        tmp_path / "saved", precision="int8", runtime="openvino").predict(PAIRS)]  # fmt: skip
    given, output = write(tmp_path / "in.csv", rows()), tmp_path / "out.jsonl"
    command("-m", "deebert", "predict", f"model={int8}", "precision=int8", f"input={given}",
            f"output={output}", "target_saving=0.3")  # fmt: skip
    command("-m", "deebert", "export", f"model={int8}", "precision=int8",
            f"output={tmp_path / 'export'}", "target_saving=0.3")  # fmt: skip
    lines = read(output)
    exits = [other.exit_layers for other in others] + [[line["exit_layer"] for line in lines]]
    labels = [other.labels for other in others] + [[line["label"] for line in lines]]
    runner = Runner(tmp_path / "export", threads=1)
    answered = runner.predict(PAIRS)
    exits.append([each["exit_layer"] for each in answered])
    labels.append([each["label"] for each in answered])
    for exit_layers, names in zip(exits, labels, strict=True):
        assert np.mean(np.array(exit_layers) == np.array(expected.exit_layers)) >= 0.98
        assert np.mean(np.array(names) == np.array(expected.labels)) >= 0.98


def test_without_a_record_in_int8(stage2: Path, fails: Run, tmp_path: Path) -> None:
    says = "has no record in int8; make one with .* ckpt=RUN precision=int8"
    with pytest.raises(UserError, match=says):
        EarlyExitClassifier.from_pretrained(stage2, precision="int8")
    line = fails("-m", "deebert", "export", f"model={stage2}", "precision=int8", f"output={tmp_path / 'x'}")  # fmt: skip
    assert "has no record in int8" in line
    line = fails("-m", "deebert", "export", f"model={stage2}", "precision=bfloat16", f"output={tmp_path / 'x'}")  # fmt: skip
    assert "precision 'bfloat16' is unknown; choose one of: float32, int8" in line


def test_bfloat16_is_recorded_too(stage2: Path, run: Run, tmp_path: Path) -> None:
    run("evaluate.py", f"ckpt={stage2}", "precision=bfloat16", "logger=csv", f"hydra.run.dir={tmp_path}")  # fmt: skip
    record, _ = record_files.load(tmp_path / "records" / "validation.safetensors")
    assert (record.precision, record.quantization) == ("bfloat16", None)
    assert results(tmp_path)["precision"] == "bfloat16"


def test_records_of_different_ranges(int8: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(int8, tmp_path / "copy")
    [file] = record_files.files(copy)
    record, header = record_files.load(file)
    other = replace(record, split="test", quantization=replace(record.quantization, num_rows=7))
    record_files.save(other, file.parent, header)
    with pytest.raises(UserError, match=r"the records of .* have different ranges; record them"):
        EarlyExitClassifier.from_pretrained(copy, precision="int8")
    with pytest.raises(UserError, match=r"recorded in int8, .* in int8 with other ranges"):
        record_files.read_folder(str(copy))


def test_a_saved_quantization_is_used_again(
    classifier: EarlyExitClassifier, run: Run, tmp_path: Path, glue: Path
) -> None:
    classifier.save_pretrained(tmp_path / "saved")
    model_card = (tmp_path / "saved" / "README.md").read_text()
    assert 'from_pretrained("THIS_FOLDER_OR_REPOSITORY", precision="int8")' in model_card
    assert "rows, int8)" in model_card
    run("evaluate.py", f"ckpt={tmp_path / 'saved'}", f"data.root={glue}", "precision=int8",
        "data.calibration_size=0", "logger=csv", f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    record, _ = record_files.load(tmp_path / "run" / "records" / "validation.safetensors")
    assert record.quantization == classifier.engine.quantization


def test_int8_is_timed_against_its_own_record(stage2: Path, run: Run, tmp_path: Path) -> None:
    run("evaluate.py", f"ckpt={stage2}", "precision=[int8,float32]", "threshold=0.69", "timing=all",
        "repeats=1", "threads=1", "logger=csv", f"hydra.run.dir={tmp_path}")  # fmt: skip
    first, second = results(tmp_path)["timing"]
    assert (first["precision"], first["runtime"]) == ("int8", "onnx")
    assert first["equal_exits"] == first["equal_predictions"] == 1
    assert (second["precision"], second["runtime"]) == ("float32", "torch")


def test_losses_against_float32(classifier: EarlyExitClassifier, caplog) -> None:
    task, num = classifier.task, 100
    index, labels = torch.arange(num), torch.arange(num) % 2
    right = torch.nn.functional.one_hot(labels, 2).float()
    logits_NLC = torch.stack([right, right, right], 1)
    exact = Record("validation", logits_NLC, labels, index, index)
    worse = logits_NLC.clone()
    worse[:5, 1] = 1 - worse[:5, 1]
    worse[:20, 2] = 1 - worse[:20, 2]
    layer = LayerRanges(*[InputRange(-1, 1)] * 4)
    rounded = Record("validation", worse, labels, index, index, precision="int8",
                     quantization=Quantization((layer,) * 3, "train", 1))  # fmt: skip
    lost = losses(exact, rounded, task)
    assert lost == pytest.approx({1: 0, 2: 0.05, 3: 0.2}, abs=0.001)
    unlabelled = [Record(**vars(each) | {"labels_N": None}) for each in (exact, rounded)]
    assert losses(*unlabelled, task) == pytest.approx(lost)
    with pytest.raises(
        UserError, match=r"20.0% of score on validation against the answers in float32"
    ):
        check_losses(lost, unlabelled[1])
    with pytest.raises(UserError, match=r"precision=int8: full depth loses 20.0% of score"):
        check_losses(lost, rounded)
    assert not caplog.messages
    few = rounded.rows(torch.arange(99))
    check_losses(lost, few)
    assert (
        "ramps that lose score on validation (99 rows) against float32: 2 (5.0%), 3 (20.0%)"
        in caplog.text
    )
    caplog.clear()
    check_losses({3: 0.005}, rounded)
    assert not caplog.messages
