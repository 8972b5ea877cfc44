"""A trained model used from Python: answers, targets, what is saved, and what is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from helpers.disks import limited_files, of_other_modes
from safetensors.torch import load_file, save_file

from deebert import EarlyExitClassifier
from deebert.data import tasks
from deebert.errors import UserError
from deebert.exits import curves
from deebert.exits.rules import entropy, exit_layer
from deebert.hub import model_card
from deebert.untrusted import tensor_files

PAIRS = [("a fine film", "no film"), ("red", "red"), ("one two three four", "two"), ("x", "y z")]


@pytest.fixture(scope="module")
def classifier(stage2: Path) -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(stage2)


def test_answers_as_the_model(classifier: EarlyExitClassifier) -> None:
    tokens = classifier.tokenizer(
        [a for a, _ in PAIRS], [b for _, b in PAIRS], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        logits_NLC = classifier.model(**tokens)
    for threshold in (0.0, 0.68, 0.7):
        layer_N = exit_layer(entropy(logits_NLC), threshold)
        expected_NC = logits_NLC[torch.arange(4), layer_N - 1].softmax(-1)
        answers = classifier.predict(PAIRS, threshold=threshold)
        assert answers.exit_layers == layer_N.tolist()
        torch.testing.assert_close(answers.probabilities_NC, expected_NC, atol=1e-5, rtol=0)
        assert answers.labels == [classifier.labels[i] for i in expected_NC.argmax(-1)]
        assert answers.saving == pytest.approx(1 - layer_N.float().mean().item() / 3)
        assert [each["exit_layer"] for each in answers] == answers.exit_layers
        assert answers[1]["probability"] == pytest.approx(expected_NC[1].max().item(), abs=1e-5)


def test_one_text_or_many_in_every_form(classifier: EarlyExitClassifier) -> None:
    [one] = classifier.predict(PAIRS[0])
    for same in (
        [PAIRS[0]],
        [list(PAIRS[0])],
        {"sentence1": "a fine film", "sentence2": "no film"},
    ):
        assert [*classifier.predict(same)] == [pytest.approx(one)]
    assert one["exit_layer"] == 3, "without a target all layers run"
    streamed = classifier.stream(iter([*PAIRS] * 3000), threshold=0.68)
    assert [len(part) for part in streamed] == [8192, 3808]


def test_targets_are_met_from_the_record(classifier: EarlyExitClassifier, stage2: Path) -> None:
    operating_point = classifier.calibrate(target_saving=0.4)
    [record] = classifier.saved.records.values()
    layer_N = exit_layer(entropy(record.logits_NLC), operating_point.thresholds)
    saving = 1 - layer_N.float().mean().item() / 3
    assert operating_point.split == "validation"
    assert operating_point.expected.expected_saving == pytest.approx(saving)
    assert saving == pytest.approx(0.4, abs=1 / len(record))
    low, high = operating_point.expected.interval
    assert low < saving < high
    assert classifier.calibrate(target_saving=0.4) is operating_point
    disagreeing = classifier.calibrate(max_drop=0.5, loss="disagreement", confidence=0.9)
    assert disagreeing.expected.disagreement <= 0.5
    faster = classifier.calibrate(target_speedup=1.05)
    assert faster.thresholds >= 0
    patient = classifier.calibrate(target_saving=0.1, exit="patience")
    assert patient.rule.name == "patience"


def test_saved_and_loaded_it_is_the_same(classifier: EarlyExitClassifier, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    classifier.save_pretrained(folder, target_saving=0.4)
    again = EarlyExitClassifier.from_pretrained(folder)
    assert again.calibrate().thresholds == classifier.calibrate(target_saving=0.4).thresholds
    expected, answers = classifier.predict(PAIRS, target_saving=0.4), again.predict(PAIRS)
    assert torch.equal(answers.probabilities_NC, expected.probabilities_NC)
    assert answers.exit_layers == expected.exit_layers
    again.save_pretrained(tmp_path / "twice")
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in ("deebert.json", "README.md"):
            assert file.read_bytes() == (tmp_path / "twice" / file.relative_to(folder)).read_bytes()
    about = json.loads((tmp_path / "twice" / "deebert.json").read_text())
    assert about["target"] == {"target_saving": 0.4}, "the target stays"
    everything = "".join(p.read_text() for p in [*folder.glob("*.json"), folder / "README.md"])
    assert "/tmp" not in everything, "no folder of this machine"
    assert str(ROOT) not in everything


def test_an_evaluation_is_loaded_from_anywhere(
    run: Callable[..., str], stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stage2.parent)
    run("evaluate.py", "ckpt=stage2", "threshold=0.69", "logger=csv", f"hydra.run.dir={tmp_path / 'out'}")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    loaded = EarlyExitClassifier.from_pretrained("out")
    assert loaded.saved.records.keys() == {"validation"}
    assert loaded.predict(PAIRS).exit_layers == [3] * 4


def test_a_model_card_names_no_folder_of_this_machine(
    classifier: EarlyExitClassifier, tmp_path: Path
) -> None:
    for path, is_named in ((str(tmp_path / "bert"), False), ("bert-base-uncased", True)):
        config = classifier.saved.checkpoint.config.changed(backbone={"path": path})
        source = dataclasses.replace(classifier.saved.checkpoint, config=config)
        text = model_card.render(
            dataclasses.replace(classifier.saved, checkpoint=source), classifier.task
        )
        assert str(tmp_path) not in text
        assert ("base_model: bert-base-uncased" in text) == is_named


@pytest.mark.parametrize("threshold", [np.float32(0.5), torch.tensor([0.25, 0.5])])
def test_a_target_is_saved_as_plain_numbers(
    classifier: EarlyExitClassifier, tmp_path: Path, threshold: Any
) -> None:
    classifier.save_pretrained(tmp_path / "saved", threshold=threshold)
    again = EarlyExitClassifier.from_pretrained(tmp_path / "saved")
    assert again.calibrate().thresholds == threshold.tolist()


def test_a_threshold_needs_the_prior_it_was_chosen_with(classifier: EarlyExitClassifier) -> None:
    full = classifier.calibrate(threshold=0, exit="relative_entropy")
    assert classifier.predict([("a", "b")], threshold=0, exit="relative_entropy").exit_layers == [3]
    assert full.thresholds == 0
    for target in ({"threshold": 0.5}, {"max_drop": 0.5}):
        with pytest.raises(UserError, match="exit=relative_entropy needs a prior"):
            classifier.calibrate(exit="relative_entropy", **target)
    calibrated = classifier.calibrate(target_saving=0.3, exit="relative_entropy")
    assert calibrated.rule.prior is not None
    saved = dataclasses.replace(classifier.saved, exit="relative_entropy")
    text = model_card.render(saved, classifier.task)
    assert "Exit rule `relative_entropy`; prior and thresholds chosen on these very rows" in text


def test_the_model_card(classifier: EarlyExitClassifier) -> None:
    text = model_card.render(classifier.saved, classifier.task)
    [record] = classifier.saved.records.values()
    score = classifier.task.score(record.logits_NLC[:, -1].argmax(-1), record.labels_N)
    assert f"{score:.4f} |" in text
    threshold = curves.thresholds_for(entropy(record.logits_NLC), [0.4])[0]
    assert f"| {threshold:.4g} |" in text
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "deebert"
    assert header["metrics"] == ["f1", "accuracy"]
    assert "from deebert import EarlyExitClassifier" in text
    assert "with `python train.py stage=1`, then `python train.py stage=2 ckpt=RUN` of" in text


@pytest.mark.slow
def test_loads_without_the_training_libraries(
    classifier: EarlyExitClassifier, tmp_path: Path
) -> None:
    """In a fresh process, elsewhere, from a folder that cannot be written to."""
    folder = tmp_path / "saved"
    classifier.save_pretrained(folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    program = """
import sys
from deebert import EarlyExitClassifier
classifier = EarlyExitClassifier.from_pretrained(sys.argv[1])
print(classifier.predict(("a fine film", "no film"), target_saving=0.4).labels)
heavy = {"lightning", "hydra", "omegaconf", "datasets", "wandb", "torchmetrics", "matplotlib", "pandas"}
print(sorted(heavy & set(sys.modules)))
"""
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    labels, heavy = done.stdout.splitlines()
    assert labels == str(classifier.predict(PAIRS[0], target_saving=0.4).labels)
    assert heavy == "[]"


@pytest.mark.parametrize(
    ("texts", "target", "says"),
    [
        ([], {}, "no texts"),
        (["one text"], {}, "takes a pair of texts: sentence1, sentence2"),
        ([("a", None)], {}, "not a text"),
        ([("a", "b", "c")], {}, "has 3 texts"),
        ([{"sentence1": "a"}], {}, "lacks 'sentence2'"),
        ([7], {}, "an input is 7, not a text"),
        (PAIRS, {"target_saving": 1.5}, "target_saving=1.5 must be in"),
        (PAIRS, {"target_saving": "half"}, "target_saving='half' must be in"),
        (PAIRS, {"target_saving": 0.3, "threshold": 0.1}, "ask for one of them"),
        (PAIRS, {"threshold": -1}, "threshold=-1"),
        (PAIRS, {"threshold": [0.1]}, "2"),
        (PAIRS, {"saving": 0.4}, "saving= is no part of a target"),
        (PAIRS, {"saving": 0.4, "target_saving": 0.4}, "saving= is no part of a target"),
        (PAIRS, {"confidence": 0.9}, "confidence=0.9 needs max_drop="),
        (PAIRS, {"target_saving": 0.3, "confidence": 0.9}, "confidence=0.9 needs max_drop="),
        (PAIRS, {"threshold": 0.3, "loss": "excess"}, "loss=excess needs max_drop="),
        (PAIRS, {"exit": "luck", "threshold": 0.1}, "exit 'luck' is unknown"),
        (PAIRS, {"exit": "change", "threshold": 0.1}, "is for a regression"),
        (PAIRS, {"exit": "learned", "threshold": 0.1}, "needs a learned score"),
        (PAIRS, {"max_drop": 0.001}, "cannot be promised"),
    ],
)
def test_bad_input(classifier: EarlyExitClassifier, texts: list, target: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        classifier.predict(texts, **target)
    assert "\n" not in str(error.value)


def test_untrained_ramps_meet_no_target(stage1: Path) -> None:
    classifier = EarlyExitClassifier.from_pretrained(stage1)
    assert classifier.predict(PAIRS).exit_layers == [3] * 4
    with pytest.raises(UserError, match="its ramps say nothing yet"):
        classifier.calibrate(target_saving=0.4)


def test_without_a_record(stage2: Path) -> None:
    classifier = EarlyExitClassifier.from_pretrained(stage2 / "checkpoints" / "best.ckpt")
    object.__setattr__(classifier.saved, "records", {})
    assert len(classifier.predict(PAIRS, threshold=0.1)) == 4
    with pytest.raises(UserError, match="no records to choose thresholds on"):
        classifier.calibrate(target_saving=0.4)


def damaged(folder: Path, name: str, change) -> None:
    about = json.loads((folder / name).read_text())
    change(about)
    (folder / name).write_text(json.dumps(about))


HOSTILE = {
    "a weight of another shape": "do not fit its shape",
    "a weight is missing": "do not fit its shape",
    "no weights": "model.safetensors is missing",
    "weights that are pickled": "cannot be read as safetensors",
    "a tokenizer outside": "is no file of a tokenizer",
    "a task that names code": "its task._target_ is no setting",
    "another schema": "schema 7",
    "not JSON": "is damaged",
    "a number": "holds no mapping",
    "an unknown model": "is not supported",
    "a size beyond all memory": "its weights do not fit its shape",
    "such a size, and no such weight": "its weights do not fit its shape",
    "a record of other weights": "other weights",
    "a rule that is no name": "is no name",
    "a target's rule that is no name": "is no name",
    "an unknown rule": "exit 'os.system' is unknown",
    "pairs, and no separator": "its configuration has no sep_token_id",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_refuses_a_damaged_or_hostile_folder(
    what: str, classifier: EarlyExitClassifier, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    classifier.save_pretrained(folder)
    weights = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    name = next(iter(weights))
    damaged(folder, "deebert.json", lambda a: a.pop("weights"))  # as in a folder of before
    if what.startswith("a weight"):  # or its records would give it away
        shutil.rmtree(folder / "records")
    if what == "a weight of another shape":
        save_file(weights | {name: torch.zeros(3)}, folder / "model.safetensors")
    elif what == "a weight is missing":
        del weights[name]
        save_file(weights, folder / "model.safetensors")
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "weights that are pickled":
        torch.save(weights, folder / "model.safetensors")
    elif what == "a tokenizer outside":
        damaged(folder, "deebert.json", lambda a: a.update(tokenizer=["../../secret"]))
    elif what == "a task that names code":
        damaged(folder, "deebert.json", lambda a: a["config"]["task"].update(_target_="os.system"))
    elif what == "another schema":
        damaged(folder, "deebert.json", lambda a: a.update(schema=7))
    elif what == "not JSON":
        (folder / "deebert.json").write_text("{")
    elif what == "a number":
        (folder / "deebert.json").write_text("7")
    elif what == "an unknown model":
        damaged(folder, "config.json", lambda a: a["config"].update(model_type="gpt2"))
    elif what == "a size beyond all memory":
        damaged(folder, "config.json", lambda a: a["config"].update(vocab_size=10**12))
    elif what == "such a size, and no such weight":
        damaged(folder, "config.json", lambda a: a["config"].update(vocab_size=10**12))
        shutil.rmtree(folder / "records")
        few = {k: v for k, v in weights.items() if "word_embeddings" not in k}
        assert len(few) < len(weights)
        save_file(few, folder / "model.safetensors")
    elif what == "a record of other weights":
        save_file(weights | {name: weights[name] + 1}, folder / "model.safetensors")
    elif what == "pairs, and no separator":
        damaged(folder, "deebert.json", lambda a: a["config"]["ramp"].update(reads="pair"))
        damaged(folder, "config.json", lambda a: a["config"].update(sep_token_id=None))
    elif what == "a rule that is no name":
        damaged(folder, "deebert.json", lambda a: a.update(exit={"_target_": "os.system"}))
    elif what == "a target's rule that is no name":
        damaged(folder, "deebert.json", lambda a: a["target"].update(exit=["entropy"]))
    else:
        damaged(folder, "deebert.json", lambda a: a.update(exit="os.system"))
    with pytest.raises(UserError, match=HOSTILE[what]) as error:
        EarlyExitClassifier.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_what_a_config_says_beside_the_shape_is_passed_over(
    classifier: EarlyExitClassifier, tmp_path: Path
) -> None:
    classifier.save_pretrained(tmp_path)
    more = {"dtype": "float16", "attn_implementation": "nonsense", "auto_map": {"AutoModel": "x.Y"}}
    damaged(tmp_path, "config.json", lambda a: a["config"].update(more))
    answers = EarlyExitClassifier.from_pretrained(tmp_path).predict(PAIRS)
    assert torch.equal(answers.probabilities_NC, classifier.predict(PAIRS).probabilities_NC)


def test_saved_over_another_model(classifier: EarlyExitClassifier, tmp_path: Path) -> None:
    """Its records would be of other weights."""
    classifier.save_pretrained(tmp_path)
    [record] = (tmp_path / "records").glob("*.safetensors")
    record.rename(record.with_name("other.safetensors"))
    classifier.save_pretrained(tmp_path)
    assert [file.name for file in (tmp_path / "records").iterdir()] == [record.name]


def test_not_saved_over_something_else(classifier: EarlyExitClassifier, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds README\.md, and no saved model"):
        classifier.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {".git", "README.md"}
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(UserError, match=r"README\.md is a file; name a folder"):
        classifier.save_pretrained(tmp_path / "README.md")


def test_a_save_that_breaks_off(
    classifier: EarlyExitClassifier, stage1: Path, tmp_path: Path
) -> None:
    """The old model, whole, rather than a mix of old and new; and it can be done again."""
    classifier.save_pretrained(tmp_path)
    other = EarlyExitClassifier.from_pretrained(stage1)
    largest = max(file.stat().st_size for file in tmp_path.iterdir())
    for size in (1, 2000, largest - 1):
        with limited_files(size), pytest.raises(UserError) as error:
            other.save_pretrained(tmp_path)
        assert "cannot be written (File too large); a model that was saved there before stays" in str(error.value)  # fmt: skip
        answers = EarlyExitClassifier.from_pretrained(tmp_path).predict(PAIRS)
        assert torch.equal(answers.probabilities_NC, classifier.predict(PAIRS).probabilities_NC)
    # Killed while the files were moved.
    (tmp_path / ".saving").touch()
    (tmp_path / "deebert.json").unlink()
    (tmp_path / ".saving-x").mkdir()
    with pytest.raises(UserError):
        EarlyExitClassifier.from_pretrained(tmp_path)
    classifier.save_pretrained(tmp_path)
    answers = EarlyExitClassifier.from_pretrained(tmp_path).predict(PAIRS)
    assert torch.equal(answers.probabilities_NC, classifier.predict(PAIRS).probabilities_NC)
    assert not [file.name for file in tmp_path.iterdir() if file.name[0] == "."]
    assert not of_other_modes(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="run folder"):
            EarlyExitClassifier.from_pretrained(source)


def test_shared_parameters_come_back(tmp_path: Path, stage2: Path) -> None:
    """safetensors holds them once."""
    from helpers.random_models import model_of

    model = model_of("bert", 2, "shared")
    model.save_pretrained(tmp_path)
    loaded = model_of("bert", 2, "shared")
    for parameter in loaded.parameters():
        parameter.zero_()
    loaded.load_weights(load_file(tmp_path / "model.safetensors"))
    expected = model.state_dict()
    assert all(torch.equal(values, expected[name]) for name, values in loaded.state_dict().items())
    assert tensor_files.fingerprint(loaded.state_dict()) == tensor_files.fingerprint(expected)
    assert tasks.HELD_OUT == "calibration"


def test_confidence_none_is_on_average(classifier: EarlyExitClassifier) -> None:
    """A promise needs so many rows; on average fewer will do."""
    with pytest.raises(UserError, match="rows"):
        classifier.calibrate(max_drop=0.05, loss="disagreement")
    on_average = classifier.calibrate(max_drop=0.05, loss="disagreement", confidence=None)
    assert on_average.target["confidence"] is None


def test_numbers_of_numpy_and_slices(classifier: EarlyExitClassifier) -> None:
    for given in (np.float32(0.5), np.array([0.5, 0.5]), torch.tensor([0.5, 0.5])):
        answers = classifier.predict(PAIRS[:3], threshold=given)
        assert answers.exit_layers == classifier.predict(PAIRS[:3], threshold=0.5).exit_layers
    assert answers[1:] == [answers[1], answers[2]]


@pytest.mark.parametrize(
    ("given", "target", "says"),
    [
        (None, {}, "texts are None; give one or a list of them"),
        (7, {}, "texts are 7"),
        (b"abc", {}, "an input is b'abc', not a text"),
        (("\ud800", "b"), {}, "half of a surrogate pair"),
        (PAIRS, {"exit": ["entropy"], "threshold": 0.1}, "is unknown; choose one of: entropy, "),
        (PAIRS, {"target_savings": 0.4}, "target_savings= is no part of a target; "),
        (PAIRS, {"target_saving": "0.4"}, r"target_saving='0\.4' must be in"),
        (PAIRS, {"target_saving": 0.4, "per_ramp": "yes"}, "per_ramp='yes' must be true or false"),
    ],
)
def test_what_is_no_text_or_target(
    given, target: dict, says: str, classifier: EarlyExitClassifier
) -> None:
    with pytest.raises(UserError, match=says) as error:
        classifier.predict(given, **target)
    assert "\n" not in str(error.value)


def test_no_such_device_or_model(stage2: Path) -> None:
    with pytest.raises(UserError, match="device=gpu cannot be used here; choose one of: cpu"):
        EarlyExitClassifier.from_pretrained(stage2, device="gpu")
    with pytest.raises(UserError, match="None is no model"):
        EarlyExitClassifier.from_pretrained(None)
