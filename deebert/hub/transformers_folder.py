"""A folder of transformers' kind (config.json, weights, tokenizer), read without trusting it.

It is somebody's: what it holds is read as plain values, nothing that it names is run, and no name
in it leads out of it. Knows nothing of what the values mean to this program (`published`).
"""

import json
from collections.abc import Mapping
from os.path import exists
from pathlib import Path
from typing import Any

from torch import Tensor

from deebert.data import tokenization
from deebert.errors import UserError
from deebert.untrusted import plain_files, tensor_files

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("sentencepiece.bpe.model",),
    ("spm.model",),
)
FEWEST_PIECES = 10  # of a vocabulary that texts can be written in


def values(folder: Path) -> dict[str, Any]:
    """What config.json says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return plain_files.json_file(plain_files.inside(folder, "config.json"))
    except FileNotFoundError as error:
        raise UserError("it holds no config.json") from error


def weights(folder: Path) -> dict[str, Tensor]:
    """All weights in float32, by the names they have there.

    Raises:
        UserError: they are missing or damaged, or the file holds anything else.
    """
    name = next((name for name in WEIGHTS if exists(folder / name)), None)
    if name is None:
        split = any(folder.glob("*.index.json"))
        hint = ": it is split; save the model in one piece (max_shard_size)" if split else ""
        raise UserError(f"it holds neither {' nor '.join(WEIGHTS)}{hint}")
    file = plain_files.inside(folder, name)
    if file.suffix == ".bin":
        found = tensor_files.torch_file(file)
    else:
        found, _ = tensor_files.safetensors_file(file)
    # Older ones keep the numbers of positions among their weights.
    whole = {n for n, value in found.items() if isinstance(value, Tensor) and _is_whole(value)}
    weights = {name: value for name, value in found.items() if name not in whole}
    tensor_files.check_weights(weights)
    return {name: value.float() for name, value in weights.items()}


def _is_whole(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex()


def tokenizer_files(folder: Path, architecture: Mapping[str, Any]) -> dict[str, str]:
    """Its tokenizer as plain text by file name (`tokenization.files_of`).

    Raises:
        UserError: there is none, it cannot be loaded, or it has ids that the model has not.
    """
    model_type = architecture["model_type"]
    there = [name for name in tokenization.FILES if exists(folder / name)]
    if not any(set(names) <= set(there) for names in VOCABULARIES):
        choices = ", ".join(" with ".join(names) for names in VOCABULARIES)
        raise UserError(f"it holds no tokenizer: {choices}")
    files = {
        name: plain_files.content(plain_files.inside(folder, name), plain_files.TOKENIZER_BYTES)
        for name in there
    }
    kind = json.dumps({"model_type": model_type})  # for folders that say it nowhere else
    tokenizer = tokenization.from_files({**files, "config.json": kind})
    vocabulary = tokenizer.get_vocab()
    # The library makes up a vocabulary of special tokens where it finds none of the type's own.
    if len(set(vocabulary) - set(tokenizer.all_special_tokens)) < FEWEST_PIECES:
        raise UserError(f"its tokenizer knows no words: it holds no vocabulary of a {model_type}")
    tokenization.check(tokenizer, architecture)
    if tokenizer.pad_token is None:
        raise UserError("its tokenizer has no padding token")
    return tokenization.files_of(tokenizer)
