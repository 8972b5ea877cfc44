"""Published classifiers: the authors' checkpoints and plain fine-tuned ones become early-exit models
with the same answers; what cannot be one is refused in a line.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import results
from helpers.conversion_folders import (
    PAIRS,
    change,
    config_of,
    golden_folder,
    logits_of,
    plain_folder,
    reference,
    write_json,
)
from helpers.golden_models import FOLDER as GOLDEN
from helpers.golden_models import NAMES
from helpers.tiny_models import batch
from safetensors.torch import load_file

from deebert import EarlyExitClassifier
from deebert.errors import UserError
from deebert.exits.rules import entropy, exit_layer
from deebert.hub import checkpoints, locate, saved_folder
from deebert.models import backbones

Run = Callable[..., str]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# Our order of MNLI's labels (entailment, neutral, contradiction) in the original's two.
ORDERS = {"bert-3labels": [1, 2, 0], "roberta-3labels": [2, 1, 0]}


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_the_authors_checkpoints_answer_as_they_did(name: str, form: str, tmp_path: Path) -> None:
    folder = golden_folder(tmp_path / name, name, form)
    classifier = EarlyExitClassifier.from_pretrained(folder)  # config.json names the task
    tensors = load_file(GOLDEN / f"{name}.tensors.safetensors")
    expected = torch.cat([tensors["ramp_logits"][:, :-1], tensors["final_logits"][:, None]], 1)
    expected = expected[..., ORDERS.get(name, [0, 1])]
    with torch.inference_mode():
        logits = classifier.model(*(tensors[key] for key in INPUTS))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    rows = [
        {key: tensors[key][row][mask_S.bool()].tolist() for key in ("input_ids", "token_type_ids")}
        for row, mask_S in enumerate(tensors["attention_mask"])
    ]
    answers = classifier.answer(rows, classifier.calibrate(threshold=0.4))
    assert answers.exit_layers == exit_layer(entropy(expected), 0.4).tolist()
    assert classifier.labels == classifier.task.labels
    assert classifier.task.name == ("mrpc" if "2labels" in name else "mnli")


def test_the_authors_tokenizers(tmp_path: Path) -> None:
    """Old folders have no tokenizer.json."""
    bert = EarlyExitClassifier.from_pretrained(golden_folder(tmp_path / "bert", NAMES[0]))
    [tokens] = bert.encode([("Ab", "c")])
    pieces = ["[CLS]", "a", "##b", "[SEP]", "c", "[SEP]"]
    assert bert.tokenizer.convert_ids_to_tokens(tokens["input_ids"]) == pieces
    assert tokens["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    roberta = EarlyExitClassifier.from_pretrained(golden_folder(tmp_path / "roberta", NAMES[2]))
    [tokens] = roberta.encode([("no a", "c")])
    pieces = ["<s>", "no", "Ġa", "</s>", "</s>", "c", "</s>"]
    assert roberta.tokenizer.convert_ids_to_tokens(tokens["input_ids"]) == pieces
    assert (bert.max_length, roberta.max_length) == (40, 38), "no more than their positions"


@pytest.mark.slow
def test_the_authors_checkpoints_are_scored_saved_and_used(
    run: Run, fails: Run, glue: Path, tmp_path: Path
) -> None:
    folder = golden_folder(tmp_path / "bert_base-MRPC-two_stage", NAMES[0], "legacy")
    data = (f"data.root={glue}", "data.max_length=32", "logger=csv")
    scored = tmp_path / "scored"
    run("evaluate.py", f"ckpt={folder}", *data, f"hydra.run.dir={scored}")
    result = results(scored)
    assert (result["stage"], result["backbone"], result["num_rows"]) == (2, folder.name, 40)
    assert len(result["exits"]) == 4
    again = tmp_path / "again"
    run("evaluate.py", f"ckpt={folder}", "task=mrpc", "target_saving=0.3", *data, f"hydra.run.dir={again}")  # fmt: skip
    assert results(again)["exits"] == result["exits"]
    calibrated = results(again)["calibration"]
    assert "cross-fitted" in calibrated["calibration_split"], (
        "no training row is known to be unseen"
    )
    # The evaluation's folder has the records that targets in Python are met from.
    classifier = EarlyExitClassifier.from_pretrained(scored)
    operating_point = classifier.calibrate(target_saving=0.3)
    assert operating_point.expected.expected_saving == calibrated["expected"]["expected_saving"]
    assert operating_point.thresholds == calibrated["thresholds"]
    expected = classifier.predict(PAIRS, target_saving=0.3)
    classifier.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "saved").glob("*.json"))
    loaded = EarlyExitClassifier.from_pretrained(tmp_path / "saved").predict(PAIRS, target_saving=0.3)  # fmt: skip
    assert torch.equal(loaded.probabilities_NC, expected.probabilities_NC)
    assert loaded.exit_layers == expected.exit_layers
    says = fails("evaluate.py", f"ckpt={folder}", "task=rte", *data, f"hydra.run.dir={tmp_path / 'a'}")  # fmt: skip
    assert "task=rte contradicts its config.json, which says finetuning_task=mrpc" in says
    says = fails("evaluate.py", f"ckpt={folder}", *data[1:], "data.max_length=128", f"hydra.run.dir={tmp_path / 'b'}")  # fmt: skip
    assert "takes 40 tokens at most" in says
    change(folder, finetuning_task=None)
    says = fails("evaluate.py", f"ckpt={folder}", *data, f"hydra.run.dir={tmp_path / 'c'}")
    assert "it does not say what it was trained for: give task=mrpc" in says


PLAIN = [
    ("bert", {}),
    ("roberta", {}),
    ("xlm-roberta", {}),
    ("camembert", {}),
    ("mpnet", {}),
    ("deberta-v2", {"pooler_hidden_act": "tanh", "type_vocab_size": 2}),
]


@pytest.mark.parametrize(("model_type", "config"), PLAIN)
@torch.no_grad()
def test_a_plain_classifier_is_full_depth(model_type: str, config: dict, tmp_path: Path) -> None:
    theirs = reference(model_type, **config)
    folder = plain_folder(tmp_path / "theirs", theirs)
    checkpoint = locate.checkpoint(folder, "ckpt", defaults=config_of(seed=5))
    assert (checkpoint.config.stage, checkpoint.ramps_trained) == (1, False)
    model = checkpoint.model()
    torch.testing.assert_close(model(*batch())[:, -1], logits_of(theirs), atol=1e-5, rtol=0)
    final = model.all_ramps[-1]
    for ramp in model.all_ramps[:-1]:
        assert torch.equal(ramp.pooler.weight, final.pooler.weight)
        assert 0.01 < ramp.classifier.weight.std() < 0.03
    again, other = (
        locate.checkpoint(folder, "ckpt", defaults=config_of(seed=seed)).weights for seed in (5, 6)
    )
    differ = {
        name
        for name in checkpoint.weights
        if not torch.equal(checkpoint.weights[name], other[name])
    }
    assert differ == {"ramps.0.classifier.weight", "ramps.1.classifier.weight"}
    assert all(torch.equal(checkpoint.weights[name], again[name]) for name in again)


HEADS = [
    ("distilbert", {}, "computes ReLU where a final classifier here has tanh"),
    ("electra", {}, "computes GELU where"),
    ("deberta-v2", {}, "computes gelu where"),
    ("modernbert", {}, "computes GELU and LayerNorm where"),
]


@pytest.mark.parametrize(("model_type", "config", "says"), HEADS)
def test_refuses_another_head(model_type: str, config: dict, says: str, tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "theirs", reference(model_type, **config))
    with pytest.raises(UserError, match=says) as error:
        locate.checkpoint(folder, "ckpt", defaults=config_of())
    assert f"deebert train stage=1 backbone.path={folder}" in str(error.value)
    assert "\n" not in str(error.value)
    backbone, _ = backbones.pretrained({"name": "x", "path": str(folder)})
    assert len(backbone.layers) == 3, "what it says works"


@pytest.mark.slow
def test_stage_2_makes_an_early_exit_model_of_a_plain_one(
    run: Run, fails: Run, glue: Path, tmp_path: Path
) -> None:
    names = {"id2label": {0: "EQUIVALENT", 1: "Not-Equivalent"}, "label2id": {"EQUIVALENT": 0, "Not-Equivalent": 1}}  # fmt: skip
    theirs = reference("roberta", **names)
    folder = plain_folder(tmp_path / "theirs", theirs)
    expected = logits_of(theirs).flip(-1)  # MRPC has the two the other way round
    command = (
        "train.py", "stage=2", f"ckpt={folder}", "task=mrpc", f"data.root={glue}",
        "data.max_length=48", "stages.2.epochs=2", "stages.2.lr=1e-3", "seed=3", "logger=csv",
        "ramp=first", "stages.2.standardize=false", "stages.2.batch_size=8",
    )  # fmt: skip
    unbroken = tmp_path / "unbroken"
    run(*command, f"hydra.run.dir={unbroken}")
    result = results(unbroken)
    assert (result["stage"], result["backbone"], result["seed"]) == (2, "theirs", 3)
    trained = checkpoints.read(unbroken / "checkpoints" / "best.ckpt", "ckpt")
    start = locate.checkpoint(folder, "ckpt", defaults=config_of(seed=3))
    after = {name.removeprefix("model."): value for name, value in trained.weights.items()}
    moved = {name for name in after if not torch.equal(after[name], start.weights[name])}
    parts = ("pooler.weight", "pooler.bias", "classifier.weight", "classifier.bias")
    assert moved == {f"ramps.{layer}.{part}" for layer in (0, 1) for part in parts}
    with torch.no_grad():
        torch.testing.assert_close(trained.model()(*batch())[:, -1], expected, atol=1e-5, rtol=0)
    assert trained.config.data.max_length == 48
    assert trained.config.data.calibration_size == 0, "it may have seen all training rows"
    assert trained.config.recipe.lr == 1e-3

    shutil.rmtree(folder)  # nothing below needs it
    run("evaluate.py", f"ckpt={unbroken}", "logger=csv", f"hydra.run.dir={tmp_path / 'scored'}")
    assert results(tmp_path / "scored")["exits"] == result["exits"]
    classifier = EarlyExitClassifier.from_pretrained(unbroken)
    assert len(classifier.predict(PAIRS, target_saving=0.3)) == 4
    with torch.no_grad():
        torch.testing.assert_close(classifier.model(*batch())[:, -1], expected, atol=1e-5, rtol=0)

    plain_folder(folder, theirs)
    run(*command, "+trainer.max_steps=12", f"hydra.run.dir={tmp_path / 'part'}")
    shutil.rmtree(folder)
    run("train.py", f"resume={tmp_path / 'part'}", "+trainer.max_steps=-1", "logger=csv", f"hydra.run.dir={tmp_path / 'rest'}")  # fmt: skip
    assert results(tmp_path / "part")["epoch"] == 1
    assert results(tmp_path / "rest")["epoch"] == 2
    resumed = checkpoints.read(tmp_path / "rest" / "checkpoints" / "last.ckpt", "ckpt").weights
    still = {f"model.{name}" for name in set(after) - moved}
    assert all(torch.equal(resumed[name], trained.weights[name]) for name in still)

    plain_folder(folder, theirs)
    bad = {
        "backbone=minilm": "backbone=minilm contradicts",
        "data.calibration_size=8": "data.calibration_size=8 contradicts",
        "task=mnli": "it has 2 labels, and task mnli has 3 (entailment, neutral",
        "task=stsb": "it has 2 labels, and task stsb has 1 (a regression)",
        "task=rte": "its labels are EQUIVALENT, Not-Equivalent, and those of task rte",
        "stages.2=null": "stages.2=None must hold a recipe",
        "seed=abc": "seed=abc must be a whole number",
    }
    for number, (more, says) in enumerate(bad.items()):
        kept = [part for part in command if not part.startswith(more.partition("=")[0])]
        line = fails(*kept, more, f"hydra.run.dir={tmp_path / 'bad' / str(number)}")
        assert says in line, line
    student = ("train.py", f"teacher={folder}", "backbone.layers=[1,3]", *command[3:5], "stages.1.epochs=1", "logger=csv")  # fmt: skip
    run(*student, f"hydra.run.dir={tmp_path / 'student'}")
    assert results(tmp_path / "student")["layers"] == [1, 3]


@pytest.mark.slow
def test_a_saved_folder_is_evaluated_and_given_other_ramps(
    run: Run, glue: Path, stage2: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    EarlyExitClassifier.from_pretrained(stage2).save_pretrained(folder)
    data = (f"data.root={glue}", "logger=csv")
    run("evaluate.py", f"ckpt={folder}", *data, f"hydra.run.dir={tmp_path / 'scored'}")
    assert results(tmp_path / "scored")["exits"] == results(stage2)["exits"]
    other = tmp_path / "other"
    run("train.py", "stage=2", f"ckpt={folder}", "ramp=mean", "stages.2.epochs=1", *data, f"hydra.run.dir={other}")  # fmt: skip
    checkpoint = checkpoints.read(other / "checkpoints" / "best.ckpt", "ckpt")
    model, before = checkpoint.model(), saved_folder.read(folder, "model").checkpoint.model()
    assert model.ramp_kind.reads == "mean"
    ours, theirs = model.state_dict(), before.state_dict()
    kept = {name for name in ours if name.startswith(("backbone.", "ramps.2."))}
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    assert not torch.equal(ours["ramps.0.pooler.weight"], theirs["ramps.0.pooler.weight"])


LABELS = [
    ("mrpc", {}, [0, 1]),
    ("mrpc", {0: "equivalent", 1: "NOT equivalent"}, [1, 0]),
    ("sst2", {0: "POSITIVE", 1: "NEGATIVE"}, [1, 0]),
    ("sst2", {0: "0", 1: "1"}, [0, 1]),
    ("mnli", {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}, [2, 1, 0]),
]


@pytest.mark.parametrize(("task", "names", "order"), LABELS)
@torch.no_grad()
def test_labels_keep_their_meaning(
    task: str, names: dict, order: list[int], tmp_path: Path
) -> None:
    more = {"id2label": names, "label2id": {v: k for k, v in names.items()}} if names else {}
    theirs = reference("bert", len(order), **more)
    folder = plain_folder(tmp_path / "theirs", theirs)
    logits = locate.checkpoint(folder, "ckpt", defaults=config_of(task)).model()(*batch())[:, -1]
    torch.testing.assert_close(logits, logits_of(theirs)[:, order], atol=1e-5, rtol=0)


def test_unnamed_labels_of_three_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = plain_folder(tmp_path / "theirs", reference("bert", 3))
    locate.checkpoint(folder, "ckpt", defaults=config_of("mnli"))
    assert "taken to be entailment, neutral, contradiction" in caplog.text


@torch.no_grad()
def test_a_task_of_one_s_own_and_a_regression(tmp_path: Path) -> None:
    theirs = reference("bert", 1)
    folder = plain_folder(tmp_path / "theirs", theirs)
    task = {"name": "mine", "columns": ["text"], "labels": None, "metrics": ["pearson"]}
    classifier = EarlyExitClassifier.from_pretrained(folder, task=task)
    torch.testing.assert_close(classifier.model(*batch())[:, -1], logits_of(theirs), atol=1e-5, rtol=0)  # fmt: skip
    assert isinstance(classifier.predict(["a text"]).labels[0], float)
    classifier.save_pretrained(tmp_path / "saved")
    assert EarlyExitClassifier.from_pretrained(tmp_path / "saved", task="mine").labels is None
    with pytest.raises(UserError, match="was trained for task=mine"):
        EarlyExitClassifier.from_pretrained(tmp_path / "saved", task="mrpc")
    with pytest.raises(UserError, match="task 'imdb' is unknown; choose one of: ax, cola"):
        EarlyExitClassifier.from_pretrained(folder, task="imdb")


def test_the_name_of_an_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task 'mrcp' is unknown; choose one of: ax, cola"):
        locate.find(tmp_path, "mrcp")


@pytest.mark.slow
def test_a_classifier_asks_only_for_data(run: Run, fails: Run, tmp_path: Path) -> None:
    names = ("POSITIVE", "Very Bad", "neutral")  # in another order than the sorted one
    ids = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    folder = plain_folder(tmp_path / "theirs", reference("bert", 3, **ids))
    given = ("positive", "very_bad", "neutral")
    lines = [f"{a} / {b} {n},{given[n % 3]}" for n, (a, b) in enumerate(PAIRS * 15)]
    file = tmp_path / "own.csv"
    file.write_text("\n".join(["message,verdict", *lines]) + "\n")
    second = ("train.py", "stage=2", f"ckpt={folder}", "data.max_length=32", "stages.2.epochs=1", "logger=csv")  # fmt: skip
    printed = run(*second, f"data.file={file}", f"hydra.run.dir={tmp_path / 'run'}")
    assert "texts in 'message'; labels in 'verdict'" in printed
    trained = checkpoints.read(tmp_path / "run" / "checkpoints" / "best.ckpt", "ckpt")
    assert trained.config.task.labels == given, "in the classifier's order, as the rows write them"
    assert trained.config.ramp_kind.reads == "mean", "the default's, not the paper's"
    assert trained.weights["model.ramps.0.shift"].abs().sum() > 0, "standardized"
    with torch.no_grad():
        theirs = logits_of(reference("bert", 3, **ids))
        torch.testing.assert_close(trained.model()(*batch())[:, -1], theirs, atol=1e-5, rtol=0)
    run("evaluate.py", f"ckpt={tmp_path / 'run'}", "logger=csv", f"hydra.run.dir={tmp_path / 'scored'}")  # fmt: skip
    assert results(tmp_path / "scored")["num_rows"] == 12
    # Without data, and with rows of other labels.
    assert "data.file=FILE" in fails(*second)
    file.write_text(file.read_text().replace("neutral", "nothing"))
    says = fails(*second, f"data.file={file}")
    assert "label 'nothing' is out of range; task own has: 0 positive, 1 very_bad, 2 neutral" in says  # fmt: skip
    # Names without a meaning are not names: those of the rows count, and must be as many.
    change(folder, id2label={"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"})
    file.write_text(file.read_text().replace("nothing", "positive"))
    assert "it has 3 labels, and task own has 2" in fails(*second, f"data.file={file}")


def test_a_lora_folder_is_named(fails: Run, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    write_json(tmp_path / "lora" / "adapter_config.json", {"peft_type": "LORA"})
    file = tmp_path / "own.csv"
    file.write_text("text,label\na b,x\nc d,y\ne f,x\ng h,y\n")
    for overrides in (("train.py", "stage=2", f"data.file={file}"), ("evaluate.py",)):
        says = fails(*overrides, f"ckpt={tmp_path / 'lora'}", "logger=csv")
        assert f"ckpt={tmp_path / 'lora'}: it is a LoRA adapter; merge it into its model" in says
        assert "merge_and_unload()" in says
