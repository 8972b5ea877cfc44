"""Folders as other programs save them: the authors' checkpoints, and plain fine-tuned classifiers."""

import json
from pathlib import Path

import torch
from helpers.golden_models import FOLDER as GOLDEN
from helpers.tiny_models import batch, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from deebert.hub import conversion
from deebert.hub.run_config import RunDefaults
from deebert.models import backbones

LETTERS = "abcdefghijklmnopqrstuvwxyz"

PAIRS = [("a fine film", "no film"), ("red", "red"), ("one two three four", "two"), ("x", "y z")]


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


def config_of(task: str = "mrpc", **more: object) -> RunDefaults:
    return RunDefaults(conversion.task_values(task), **more)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    ids, mask, types = batch()
    typed = {"token_type_ids": types} if model.config.model_type in ("bert", "deberta-v2") else {}
    return model(ids, attention_mask=mask, **typed).logits
