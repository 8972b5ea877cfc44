"""Published classifiers: the authors' checkpoints and plain fine-tuned ones become early-exit models
with the same answers; what is hostile or cannot be one is refused in a line."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, results
from helpers.golden_models import FOLDER as GOLDEN
from helpers.golden_models import NAMES
from helpers.tiny_models import batch, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from deebert import EarlyExitClassifier
from deebert.data import tokenization
from deebert.errors import UserError
from deebert.exits.rules import entropy, exit_layer
from deebert.hub import checkpoints, conversion, locate, saved_folder
from deebert.models import backbones

Run = Callable[..., str]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAIRS = [("a fine film", "no film"), ("red", "red"), ("one two three four", "two"), ("x", "y z")]
# Our order of MNLI's labels (entailment, neutral, contradiction) in the original's two.
ORDERS = {"bert-3labels": [1, 2, 0], "roberta-3labels": [2, 1, 0]}


def write_json(file: Path, values: object) -> None:
    file.write_text(json.dumps(values))


def change(folder: Path, **values: object) -> None:
    """Set these in config.json."""
    file = folder / "config.json"
    write_json(file, json.loads(file.read_text()) | values)


def golden_folder(folder: Path, name: str, form: str = "safetensors") -> Path:
    """The golden weights as the authors' code saves a model (transformers 2.1, torch 1.3)."""
    folder.mkdir(parents=True)
    facts = json.loads((GOLDEN / f"{name}.json").read_text())["model"]
    kind = facts.pop("kind")
    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
        write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "max_len": 512})
    else:
        pieces = ["<s>", "<pad>", "</s>", "<unk>", *LETTERS, "Ġ", "Ġa", "no", "<mask>"]
        write_json(folder / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
        (folder / "merges.txt").write_text("#version: 0.2\nĠ a\nn o\n")
        write_json(folder / "tokenizer_config.json", {"max_len": 512})
    task = "mrpc" if facts["num_labels"] == 2 else "mnli"
    more = {"finetuning_task": task, "output_attentions": False, "output_past": True, "pruned_heads": {}, "torchscript": False, "use_bfloat16": False}  # fmt: skip
    del facts["pad_token_id"]
    write_json(folder / "config.json", facts | more)
    weights = load_file(GOLDEN / f"{name}.weights.safetensors")
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")  # fmt: skip
    return folder


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


def test_the_authors_checkpoints_are_scored_saved_and_used(
    run: Run, fails: Run, glue: Path, tmp_path: Path
) -> None:
    folder = golden_folder(tmp_path / "bert_base-MRPC-two_stage", NAMES[0], "legacy")
    data = (f"data.root={glue}", "data.max_length=32", "logger=csv")
    scored = tmp_path / "scored"
    run("evaluate.py", f"ckpt={folder}", *data, f"hydra.run.dir={scored}")
    found = results(scored)
    assert (found["stage"], found["backbone"], found["num_rows"]) == (2, folder.name, 40)
    assert len(found["exits"]) == 4
    again = tmp_path / "again"
    run("evaluate.py", f"ckpt={folder}", "task=mrpc", "target_saving=0.3", *data, f"hydra.run.dir={again}")  # fmt: skip
    assert results(again)["exits"] == found["exits"]
    wished = results(again)["calibration"]
    assert "cross-fitted" in wished["calibration_split"], "no training row is known to be unseen"
    # The evaluation's folder has the records that targets in Python are met from.
    classifier = EarlyExitClassifier.from_pretrained(scored)
    asked = classifier.calibrate(target_saving=0.3)
    assert asked.expected["expected_saving"] == wished["expected"]["expected_saving"]
    assert asked.thresholds == wished["thresholds"]
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


def reference(model_type: str, num_labels: int = 2, **config: object) -> PreTrainedModel:
    """The library's own classifier, with random weights that tell inputs apart."""
    torch.manual_seed(3)
    values = backbones.random_config(tiny(model_type, initializer_range=0.3))
    values = AutoConfig.for_model(**{**values, "num_labels": num_labels, **config})
    return AutoModelForSequenceClassification.from_config(values).eval()


def plain_folder(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    backbones.tokenizer({"config": {}}).save_pretrained(folder)
    return folder


def said(task: str = "mrpc", **more: object) -> dict:
    return {"task": conversion.task_values(task), **more}


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    ids, mask, types = batch()
    typed = {"token_type_ids": types} if model.config.model_type in ("bert", "deberta-v2") else {}
    return model(ids, attention_mask=mask, **typed).logits


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
    found = locate.checkpoint(folder, "ckpt", said=said(seed=5))
    assert (found.config["stage"], found.ramps_trained) == (1, False)
    model = found.model()
    torch.testing.assert_close(model(*batch())[:, -1], logits_of(theirs), atol=1e-5, rtol=0)
    final = model.all_ramps[-1]
    for ramp in model.all_ramps[:-1]:
        assert torch.equal(ramp.pooler.weight, final.pooler.weight)
        assert 0.01 < ramp.classifier.weight.std() < 0.03
    again, other = (
        locate.checkpoint(folder, "ckpt", said=said(seed=seed)).weights for seed in (5, 6)
    )
    differ = {name for name in found.weights if not torch.equal(found.weights[name], other[name])}
    assert differ == {"ramps.0.classifier.weight", "ramps.1.classifier.weight"}
    assert all(torch.equal(found.weights[name], again[name]) for name in again)


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
        locate.checkpoint(folder, "ckpt", said=said())
    assert f"python train.py stage=1 backbone.path={folder}" in str(error.value)
    assert "\n" not in str(error.value)
    backbone, _ = backbones.pretrained({"name": "x", "path": str(folder)})
    assert len(backbone.layers) == 3, "what it says works"


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
    )  # fmt: skip
    unbroken = tmp_path / "unbroken"
    run(*command, f"hydra.run.dir={unbroken}")
    found = results(unbroken)
    assert (found["stage"], found["backbone"], found["seed"]) == (2, "theirs", 3)
    trained = checkpoints.read(unbroken / "checkpoints" / "best.ckpt", "ckpt")
    start = locate.checkpoint(folder, "ckpt", said=said(seed=3))
    after = {name.removeprefix("model."): value for name, value in trained.weights.items()}
    moved = {name for name in after if not torch.equal(after[name], start.weights[name])}
    parts = ("pooler.weight", "pooler.bias", "classifier.weight", "classifier.bias")
    assert moved == {f"ramps.{layer}.{part}" for layer in (0, 1) for part in parts}
    with torch.no_grad():
        torch.testing.assert_close(trained.model()(*batch())[:, -1], expected, atol=1e-5, rtol=0)
    assert trained.config["data"]["max_length"] == 48
    assert trained.config["data"]["calibration_size"] == 0, "it may have seen all training rows"
    assert trained.config["stages"]["2"]["lr"] == 1e-3

    shutil.rmtree(folder)  # nothing below needs it
    run("evaluate.py", f"ckpt={unbroken}", "logger=csv", f"hydra.run.dir={tmp_path / 'scored'}")
    assert results(tmp_path / "scored")["exits"] == found["exits"]
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
    found = checkpoints.read(other / "checkpoints" / "best.ckpt", "ckpt")
    model, before = found.model(), saved_folder.read(folder, "model").checkpoint.model()
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
    logits = locate.checkpoint(folder, "ckpt", said=said(task)).model()(*batch())[:, -1]
    torch.testing.assert_close(logits, logits_of(theirs)[:, order], atol=1e-5, rtol=0)


def test_unnamed_labels_of_three_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = plain_folder(tmp_path / "theirs", reference("bert", 3))
    locate.checkpoint(folder, "ckpt", said=said("mnli"))
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


def test_names_of_tasks_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "TASKS", tmp_path)
    with pytest.raises(UserError, match="give from_pretrained what its file holds"):
        locate.find(tmp_path, "mrpc")


class Evil:
    def __init__(self, owned: Path) -> None:
        self.owned = owned

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.owned),))


def hostile(folder: Path, owned: Path) -> dict[str, tuple[Callable[[], object], str]]:
    """What somebody may have done to a folder, and what is said of it."""
    weights = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"

    def save(**changes: object) -> None:
        kept = {key: value for key, value in (weights | changes).items() if value is not None}
        save_file(kept, folder / "model.safetensors")

    def pickled(content: object, legacy: bool = False) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)

    def cut(file: str, share: float = 0.5) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    def cut_pickle() -> None:
        pickled(weights)
        cut("pytorch_model.bin")

    def other_vocabulary() -> None:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).unlink()
        (folder / "sentencepiece.bpe.model").write_bytes(b"somebody's pieces")

    return {
        "a pickle with code": (lambda: pickled({"x": Evil(owned)}), "pytorch_model.bin holds more than tensors and plain values (it names 'posix mkdir'); nothing in it was executed"),
        "an old pickle with code": (lambda: pickled({"x": Evil(owned)}, legacy=True), "nothing in it was executed"),
        "a pickle of other things": (lambda: pickled({"x": 1}), "holds something else than weights by name"),
        "a list of weights": (lambda: pickled(list(weights.values())), "pytorch_model.bin holds no mapping"),
        "a pickle cut short": (cut_pickle, "pytorch_model.bin is damaged"),
        "weights cut short": (lambda: cut("model.safetensors"), "model.safetensors cannot be read as safetensors"),
        "weights cut to nothing": (lambda: cut("model.safetensors", 0), "model.safetensors cannot be read as safetensors"),
        "no weights": (lambda: (folder / "model.safetensors").unlink(), "it holds neither model.safetensors nor pytorch_model.bin"),
        "a wrong shape": (lambda: save(**{name: torch.zeros(3)}), "layer.0.attention.self.query.weight is (3,), not (32, 32)"),
        "a wrong classifier": (lambda: save(**{"classifier.weight": torch.zeros(())}), "it has 0 labels, and task mrpc has 2"),
        "a weight too many": (lambda: save(**{"bert.adapter.weight": torch.zeros(3)}), "its weights hold backbone.encoder.adapter.weight, which is no part"),
        "a weight too few": (lambda: save(**{name: None}), "its weights lack backbone.encoder.encoder.layer.0.attention.self.query.weight"),
        "an encoder alone": (lambda: save(**{"classifier.weight": None, "classifier.bias": None}), "it holds no trained classifier"),
        "numbers of half a byte": (lambda: save(**{name: torch.zeros(32, 32, dtype=torch.int8)}), "its weights lack"),
        "config.json cut short": (lambda: cut("config.json"), "config.json is damaged (JSONDecodeError)"),
        "config.json a list": (lambda: write_json(folder / "config.json", []), "config.json holds no mapping"),
        "config.json deep": (lambda: (folder / "config.json").write_text("[" * 100_000), "config.json is damaged (RecursionError)"),
        "a model type that is a list": (lambda: change(folder, model_type=["bert"]), "says no model_type"),
        "an unknown model type": (lambda: change(folder, model_type="llama"), "'llama' is not supported"),
        "more layers than weights": (lambda: change(folder, num_hidden_layers=10**9), "num_hidden_layers=1000000000, and its weights are of 3"),
        "a huge vocabulary": (lambda: change(folder, vocab_size=10**12), "word_embeddings.weight is (141, 32), not (1000000000000, 32)"),
        "a huge width": (lambda: change(folder, hidden_size=2**40), "its configuration is of no model"),
        "no heads": (lambda: change(folder, num_attention_heads=0), "its configuration is of no"),
        "a width in words": (lambda: change(folder, hidden_size="wide"), "its configuration is of no bert"),
        "an activation of its own": (lambda: change(folder, hidden_act="os.system"), "its configuration is of no model"),
        "relative positions": (lambda: change(folder, position_embedding_type="relative_key"), "position_embedding_type='relative_key', not 'absolute'"),
        "a decoder": (lambda: change(folder, is_decoder=True), "is_decoder=True, not False"),
        "several labels at once": (lambda: change(folder, problem_type="multi_label_classification"), "problem_type='multi_label_classification'"),
        "labels of another task": (lambda: change(folder, id2label={"0": "ham", "1": "spam"}), "its labels are ham, spam, and those of task mrpc are not_equivalent, equivalent"),
        "no tokenizer": (lambda: (folder / "tokenizer.json").unlink(), "it holds no tokenizer: tokenizer.json, vocab.txt, vocab.json with merges.txt"),
        "a vocabulary of another type": (other_vocabulary, "its tokenizer knows no words: it holds no vocabulary of a bert"),
        "a tokenizer cut short": (lambda: cut("tokenizer.json"), "the tokenizer cannot be loaded"),
        "a tokenizer's settings a list": (lambda: write_json(folder / "tokenizer_config.json", []), "the tokenizer cannot be loaded"),
        "a vocabulary too large": (lambda: save(**{"bert.embeddings.word_embeddings.weight": torch.zeros(70, 32)}) or change(folder, vocab_size=70), "its tokenizer has input_ids up to 140, and its model 70 of them"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_folder(tmp_path_factory.mktemp("plain") / "theirs", reference("bert"))


def test_refuses_what_is_hostile_or_damaged(plain: Path, tmp_path: Path) -> None:
    wrong = {}
    owned = tmp_path / "owned"
    names = list(hostile(plain, owned))
    for number, name in enumerate(names):
        folder = tmp_path / str(number) / "theirs"
        shutil.copytree(plain, folder)
        act, says = hostile(folder, owned)[name]
        act()
        try:
            locate.checkpoint(folder, "ckpt", said=said())
            found = "was accepted"
        except UserError as error:
            found = str(error)
        if says not in found or "\n" in found or not found.startswith(f"ckpt={folder}: "):
            wrong[name] = found
    assert not wrong
    assert not owned.exists()


def test_never_runs_the_code_that_a_folder_brings(plain: Path, tmp_path: Path) -> None:
    """auto_map in config.json and tokenizer_config.json, and files that lie elsewhere."""
    folder = tmp_path / "theirs"
    shutil.copytree(plain, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
    change(folder, auto_map={name: "evil.Evil" for name in names}, trust_remote_code=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    outside = tmp_path / "outside.json"
    shutil.copy(folder / "tokenizer.json", outside)
    settings |= {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "tokenizer_file": "../outside.json",
        "vocab_file": "../outside.json",
        "fast_tokenizer_files": ["../outside.json"],
    }
    write_json(folder / "tokenizer_config.json", settings)
    found = locate.checkpoint(folder, "ckpt", said=said())
    assert found.fingerprint == locate.checkpoint(plain, "ckpt", said=said()).fingerprint
    expected = backbones.tokenizer({"config": {}})("a fine film", "no film")["input_ids"]
    assert found.tokenizer()("a fine film", "no film")["input_ids"] == expected
    everything = "".join(found.tokenizer_files.values())
    assert "evil" not in everything
    assert "outside" not in everything
    assert not {"auto_map", "trust_remote_code"} & set(found.architecture)
    files = found.tokenizer_files | {"tokenizer_config.json": json.dumps(settings)}
    tokenization.from_files(files)  # as a hostile checkpoint would bring it
    for name in ("..", "", "/"):
        with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
            tokenization.from_files({name: "x"})
    spec = {"name": "x", "path": str(folder)}
    backbones.pretrained(spec)  # stage 1 from the same folder
    assert not (tmp_path / "owned").exists()


def test_precision_and_modes_of_a_folder_change_nothing(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(plain, folder)
    change(folder, dtype="float16", torch_dtype="float16", output_attentions=True, return_dict=False, attn_implementation="flash_attention_2")  # fmt: skip
    model = locate.checkpoint(folder, "ckpt", said=said()).model()
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    expected = locate.checkpoint(plain, "ckpt", said=said()).model()
    with torch.no_grad():
        assert torch.equal(model(*batch()), expected(*batch()))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("ji-xin/bert_base-MRPC-two_stage", "no such file or folder here, and the hub cannot be asked ("),
        ("ji-xin/bert_base-MRPC-two_stage", "hf download ji-xin/bert_base-MRPC-two_stage --local-dir FOLDER"),
        ("runs/of-long-ago", "no such file or folder here, and the hub"),
        ("runs/best.ckpt", "no such file or folder; give a run folder"),
        ("../elsewhere", "no such file or folder; give a run folder"),
        ("a/../b", "no such file or folder; give a run folder"),
        ("a/b/c", "no such file or folder; give a run folder"),
        ("nowhere", "no such file or folder; give a run folder"),
    ],
)  # fmt: skip
def test_what_is_not_there(given: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        EarlyExitClassifier.from_pretrained(given, task="mrpc")
    assert says in str(error.value)
    assert str(error.value).startswith(f"model={given}: ")
    assert "\n" not in str(error.value)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no deebert.json .* and no config.json \(a published"):
        EarlyExitClassifier.from_pretrained(tmp_path)


SHA = "0" * 39 + "1"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str], Path]]:
    """A hub on this machine: its address, the files it was asked for, and the folder that it has as
    `me/it`. It never answers about `me/slow`, and after /off about nothing."""
    asked: list[str] = []
    folder, over = tmp_path / "repository", threading.Event()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
            if path == "/off":
                server.off = True
            if path == "/api/models/me/slow" or server.off:
                over.wait(0.0 if server.off else 60.0)
                self.close_connection = True
            elif path.startswith(resolved := f"/me/it/resolve/{SHA}/"):
                name = path.removeprefix(resolved)
                asked.append(name)
                self.answer((folder / name).read_bytes(), {"ETag": f'"{name}"'})
            elif path in ("/api/models/me/it", "/api/models/me/it/revision/main"):
                siblings = [{"rfilename": file} for file in files]
                self.answer({"id": "me/it", "sha": SHA, "siblings": siblings})
            elif path == f"/api/models/me/it/tree/{SHA}":
                sizes = {file: (folder / file).stat().st_size for file in files}
                self.answer([{"type": "file", "path": f, "size": s, "oid": f} for f, s in sizes.items()])  # fmt: skip
            else:
                self.answer({"error": "not found"}, {"X-Error-Code": "RepoNotFound"}, 404)

        do_HEAD = do_GET

        def answer(self, content: object, headers: dict | None = None, status: int = 200) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            told = {"Content-Length": str(len(body)), "X-Repo-Commit": SHA, **(headers or {})}
            for name, value in told.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.off = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked, folder
    over.set()
    server.shutdown()
    server.server_close()


FROM_THE_HUB = """
import contextlib, os, sys, urllib.request
from deebert import EarlyExitClassifier, origins
from deebert.errors import UserError

origins.PATIENCE = 1.0
for given in ("me/it", "me/another", "me/slow", "off", "me/it", "me/new"):
    if given == "off":
        with contextlib.suppress(OSError):
            urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/off")
        continue
    try:
        found = EarlyExitClassifier.from_pretrained(given, task="mrpc").saved.checkpoint
        print(found.config["backbone"]["name"], found.config["backbone"]["path"], found.fingerprint)
    except UserError as error:
        print(error)
"""


def test_from_the_hub_and_later_without_a_network(
    hub: tuple[str, list[str], Path], tmp_path: Path
) -> None:
    address, asked, repository = hub
    golden_folder(repository, NAMES[0])
    for name in ("pytorch_model.bin", "training_args.bin", "tf_model.h5"):
        (repository / name).write_bytes(b"not needed")
    env = os.environ | {
        "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "*", "no_proxy": "*",
    }  # fmt: skip
    command = [sys.executable, "-c", FROM_THE_HUB]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    first, another, slow, again, new = done.stdout.splitlines()
    fingerprint = EarlyExitClassifier.from_pretrained(repository).saved.checkpoint.fingerprint
    assert first == again == f"it me/it {fingerprint}"
    assert (
        "model=me/another: no such file or folder here, and no repository of this name" in another
    )
    assert "model=me/slow: no such file or folder here, and the hub cannot be asked (" in slow
    assert "model=me/new: no such file or folder here, and the hub cannot be asked (" in new
    wanted = {"config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"}
    assert set(asked) == wanted, "and nothing else of it"
