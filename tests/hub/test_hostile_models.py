"""Published classifiers that are hostile or damaged: refused in one line, and no code is run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.conversion_folders import change, config_of, plain_folder, reference, write_json
from helpers.tiny_models import batch
from safetensors.torch import load_file, save_file

from deebert.data import tokenization
from deebert.errors import UserError
from deebert.hub import locate
from deebert.models import backbones


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
            locate.checkpoint(folder, "ckpt", defaults=config_of())
            message = "was accepted"
        except UserError as error:
            message = str(error)
        if says not in message or "\n" in message or not message.startswith(f"ckpt={folder}: "):
            wrong[name] = message
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
    checkpoint = locate.checkpoint(folder, "ckpt", defaults=config_of())
    assert (
        checkpoint.fingerprint == locate.checkpoint(plain, "ckpt", defaults=config_of()).fingerprint
    )
    expected = backbones.tokenizer({"config": {}})("a fine film", "no film")["input_ids"]
    assert checkpoint.tokenizer()("a fine film", "no film")["input_ids"] == expected
    everything = "".join(checkpoint.tokenizer_files.values())
    assert "evil" not in everything
    assert "outside" not in everything
    assert not {"auto_map", "trust_remote_code"} & set(checkpoint.architecture)
    files = checkpoint.tokenizer_files | {"tokenizer_config.json": json.dumps(settings)}
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
    model = locate.checkpoint(folder, "ckpt", defaults=config_of()).model()
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    expected = locate.checkpoint(plain, "ckpt", defaults=config_of()).model()
    with torch.no_grad():
        assert torch.equal(model(*batch()), expected(*batch()))
