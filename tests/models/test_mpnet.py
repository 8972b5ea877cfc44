"""MPNet, whose layers add a bias to their attention scores, from training to the export."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, mrpc_rows, results

from deebert import EarlyExitClassifier
from deebert.export.onnx_runner import Runner
from deebert.inference.engine import Engine


@pytest.mark.slow
def test_from_training_to_the_export(run: Callable[..., str], glue: Path, tmp_path: Path) -> None:
    stage1, stage2, evaluation = (tmp_path / name for name in ("stage1", "stage2", "evaluation"))
    run(
        "train.py", "task=mrpc", "stage=1", *TINY, "backbone.config.model_type=mpnet", f"data.root={glue}",
        "stages.1.epochs=1", "stages.1.lr=1e-3", f"hydra.run.dir={stage1}",
    )  # fmt: skip
    run("train.py", "stage=2", f"ckpt={stage1}", "logger=csv", "stages.2.epochs=2", "stages.2.standardize=true", f"hydra.run.dir={stage2}")  # fmt: skip

    classifier = EarlyExitClassifier.from_pretrained(stage2)
    [record] = classifier.saved.records.values()
    threshold = record.logits_NLC.softmax(-1).sort(-1).values
    entropies = -(threshold * threshold.log()).sum(-1)[:, :-1].flatten().sort().values
    middle = entropies[10:30].diff().argmax() + 10  # rounding turns no exit
    threshold = entropies[middle : middle + 2].mean().item()
    run("evaluate.py", f"ckpt={stage2}", f"threshold={threshold}", "timing=all", "repeats=1", "runtime=onnx", "logger=csv", f"hydra.run.dir={evaluation}")  # fmt: skip
    assert {case["equal_exits"] for case in results(evaluation)["timing"]} == {1.0}

    pairs = [(row["sentence1"], row["sentence2"]) for row in mrpc_rows("validation", 40)]
    inputs = classifier.encode(pairs)
    expected = classifier.engine.at(threshold).run(inputs, all_ramps=True)
    assert len(expected.layer_N.unique()) > 1
    by_onnx = Engine(classifier.model, classifier.engine.rule, threshold, runtime="onnx")
    run("-m", "deebert", "export", f"model={stage2}", f"output={tmp_path / 'exported'}", f"threshold={threshold}")  # fmt: skip
    runner = Runner(tmp_path / "exported", threads=1)
    near = {"rtol": 1e-3, "atol": 1e-3, "equal_nan": True}  # standardized ramps enlarge rounding
    for answers in (by_onnx.run(inputs, all_ramps=True), runner.run(inputs, threshold)):
        assert torch.as_tensor(answers.layer_N).tolist() == expected.layer_N.tolist()
        torch.testing.assert_close(torch.as_tensor(answers.ramps_NLC), expected.ramps_NLC, **near)

    given = tmp_path / "pairs.jsonl"
    given.write_text("".join(json.dumps({"sentence1": a, "sentence2": b}) + "\n" for a, b in pairs))
    run("-m", "deebert", "predict", f"model={stage2}", f"input={given}", f"output={tmp_path / 'answers.jsonl'}", f"threshold={threshold}")  # fmt: skip
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["exit_layer"] for line in lines] == expected.layer_N.tolist()
    shown = [each["exit_layer"] for each in runner.predict(pairs)]
    assert shown == expected.layer_N.tolist()
