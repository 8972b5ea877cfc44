"""Saved models in transformers' own classes: the pipeline gives the engine's answers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

import deebert.transformers
from deebert import EarlyExitClassifier
from deebert.errors import UserError
from deebert.models.early_exit import EarlyExitModel

# Long ones are cut in training and here: the longer text of a pair first.
PAIRS = [
    ("a fine film", "no film"), ("red", "red"), ("one two three four", "two"), ("x", "y z"),
    ("film " * 90, "red " * 20), ("red " * 20, "a fine film " * 60), ("red " * 200, "two " * 200),
]  # fmt: skip
AS_DICTS = [{"text": first, "text_pair": second} for first, second in PAIRS]


@pytest.fixture(scope="module")
def classifier(stage2: Path) -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(stage2)


@pytest.fixture
def folder(classifier: EarlyExitClassifier, made_once: Callable[..., Path]) -> str:
    return str(made_once("saved_for_transformers", classifier.save_pretrained))


@pytest.mark.parametrize("target", [{}, {"threshold": 0.68}, {"target_saving": 0.4}, {"max_drop": 0.2, "exit": "margin"}])  # fmt: skip
def test_the_pipeline_gives_the_answers_of_the_engine(
    classifier: EarlyExitClassifier, folder: str, target: dict
) -> None:
    expected = classifier(PAIRS, **target)
    classify = pipeline("text-classification", model=folder, model_kwargs=target, device="cpu")
    model = classify.model
    for batch_size in (1, 3):
        answers = classify(AS_DICTS, batch_size=batch_size)
        assert [each["label"] for each in answers] == expected.labels
        scores = torch.tensor([each["score"] for each in answers])
        torch.testing.assert_close(scores, expected.probabilities_NC.max(-1)[0], atol=1e-6, rtol=0)
    everything = classify(AS_DICTS, top_k=None, function_to_apply="softmax", batch_size=4)
    for scores, given_C in zip(everything, expected.probabilities_NC, strict=True):
        named = {each["label"]: each["score"] for each in scores}
        assert [named[label] for label in classifier.labels] == pytest.approx(given_C.tolist(), abs=1e-6)  # fmt: skip
    assert model.exit_counts == [3 * expected.exit_layers.count(layer) for layer in (1, 2, 3)]
    assert model.saving == pytest.approx(expected.saving)
    out = [model(**classify.preprocess(each)) for each in AS_DICTS]
    assert [each.exit_layer.item() for each in out] == expected.exit_layers
    [one] = classify([AS_DICTS[0]], function_to_apply="none")
    assert one["score"] == pytest.approx(out[0].logits.max().item(), abs=1e-6)


def test_layers_are_skipped(folder: str) -> None:
    """At the largest threshold nothing of the layers after the first is computed."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, threshold=5.0)
    for layer in model.classifier.engine.stretches.layers[1:]:
        layer.__class__ = type("Never", (), {})  # any use of it is an error
    tokens = model.tokenizer("a fine film", "no film", return_tensors="pt")
    assert model(**tokens).exit_layer.tolist() == [1]
    model.set_target(threshold=0.0)
    with pytest.raises((AttributeError, TypeError)):
        model(**tokens)


def test_config_json_says_what_the_model_is(
    classifier: EarlyExitClassifier, folder: str, tmp_path: Path
) -> None:
    values = json.loads((Path(folder) / "config.json").read_text())
    assert values["model_type"] == "deebert"
    assert values["architectures"] == ["EarlyExitForSequenceClassification"]
    assert values["num_labels"] == 2
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is deebert.transformers.EarlyExitConfig
    assert config.id2label == dict(enumerate(classifier.labels))
    assert config.label2id == {label: i for i, label in enumerate(classifier.labels)}
    assert (config.num_labels, config.problem_type) == (2, "single_label_classification")
    assert (config.hidden_size, config.num_hidden_layers) == (32, 3)
    assert config.vocab_size == classifier.model.config["vocab_size"]
    # The bare model reads its own part, also in a folder of an older version.
    whole = EarlyExitModel.from_pretrained(folder).state_dict()
    for name, value in classifier.model.state_dict().items():
        torch.testing.assert_close(whole[name], value, rtol=0, atol=0)
    classifier.save_pretrained(tmp_path)
    old = {key: values[key] for key in ("config", "num_labels", "ramp")}
    (tmp_path / "config.json").write_text(json.dumps(old))
    again = EarlyExitClassifier.from_pretrained(tmp_path)
    assert again(PAIRS, threshold=0.68).exit_layers == classifier(PAIRS, threshold=0.68).exit_layers


def test_the_model_saves_itself_and_reads_runs(stage2: Path, folder: str, tmp_path: Path) -> None:
    model = deebert.transformers.EarlyExitForSequenceClassification.from_pretrained(stage2)
    classify = pipeline("text-classification", model=model, tokenizer=model.tokenizer)
    before = classify(AS_DICTS)
    classify.save_pretrained(tmp_path / "again")
    again = pipeline("text-classification", model=str(tmp_path / "again"))
    assert again(AS_DICTS) == before
    assert model.to("cpu") is model.cpu() is model
    assert again.model.classifier.to("cpu").predict(PAIRS[0]).labels == [before[0]["label"]]


def test_nothing_of_a_folder_runs(folder: str, tmp_path: Path) -> None:
    """A folder of somebody else names code, files and a pipeline: none is run or read."""
    for file in Path(folder).rglob("*"):
        if file.is_file():
            to = tmp_path / file.relative_to(folder)
            to.parent.mkdir(exist_ok=True)
            to.write_bytes(file.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    values = json.loads((tmp_path / "config.json").read_text())
    code = {f"Auto{name}": "evil.Evil" for name in ("Config", "Model", "ModelForSequenceClassification", "Tokenizer")}  # fmt: skip
    values |= {
        "auto_map": code,
        "custom_pipelines": {"text-classification": {"impl": "evil.Evil", "pt": [], "type": "text"}},
        "id2label": {"0": "swapped", "1": "labels"}, "quantization_config": {"quant_method": "evil"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    classify = pipeline("text-classification", model=str(tmp_path))
    assert classify(AS_DICTS) == pipeline("text-classification", model=folder)(AS_DICTS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 0.5, "target_saving": 0.4}, "ask for one of them"),
        ({"target_savings": 0.4}, "target_savings= is no part of a target"),
        ({"dtype": torch.float16}, "dtype=float16 is not supported"),
        ({"precision": "int8"}, "has no record in int8"),
        ({"device_map": {"": 0, "ramps": 1}}, "runs on one device"),
    ],
)
def test_one_line_for_a_mistake(folder: str, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        AutoModelForSequenceClassification.from_pretrained(folder, **options)
    assert "\n" not in str(error.value)


def test_the_model_is_for_inference(folder: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.classifier.engine.precision == "bfloat16"
    tokens = model.tokenizer("a", "b", return_tensors="pt")
    with pytest.raises(UserError, match="deebert train"):
        model(**tokens, labels=torch.tensor([1]))
    with pytest.raises(UserError, match="precision="):
        model.to(torch.float16)
    assert model(tokens["input_ids"], return_dict=False)[0].shape == (1, 2)


@pytest.mark.slow
def test_the_lines_of_the_model_card_run(folder: str, tmp_path: Path) -> None:
    """In a fresh process; the import of deebert alone stays light."""
    text = (Path(folder) / "README.md").read_text()
    [program] = [part for part in text.split("```python\n")[1:] if "pipeline" in part]
    program = program.split("```")[0].replace("THIS_FOLDER_OR_REPOSITORY", folder)
    program = "import sys, deebert\nassert 'transformers' not in sys.modules\n" + program
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "label" in done.stdout
