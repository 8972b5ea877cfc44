"""Read a folder of Transformers (config.json, weights, tokenizer) without trusting it.

Somebody else may have written it: its files are read as plain values and tensors, nothing that it
names is executed, and no name in it leads out of it. This module does not know what the values mean
to this program: `conversion` does.
"""

import json
from collections.abc import Mapping, Sequence
from os.path import exists
from pathlib import Path
from typing import Any

from torch import Tensor

from deebert.data import tokenization
from deebert.errors import UserError
from deebert.untrusted import plain_files, tensor_files

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first one that exists is read
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("sentencepiece.bpe.model",),
    ("spm.model",),
)
FEWEST_PIECES = 10  # a smaller vocabulary cannot spell texts


def values(folder: Path) -> dict[str, Any]:
    """Read the values of config.json.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    try:
        return plain_files.json_file(plain_files.inside(folder, "config.json"))
    except FileNotFoundError as error:
        raise UserError("it holds no config.json") from error


def stated_labels(folder: Path) -> list[str] | None:
    """Return the names of a classifier's labels, in the order of its outputs.

    Returns:
        The names: one for a regression; None if config.json names none (LABEL_0, LABEL_1, ...).

    Raises:
        UserError: config.json cannot be read.
    """
    config = values(folder)
    id2label = config.get("id2label")
    names = label_names(config, len(id2label) if isinstance(id2label, dict) else 0)
    return names if len(names) == 1 or have_meaning(names) else None


def label_names(config: Mapping[str, Any], number: int) -> list[str]:
    """Return the names of so many labels in config.json; LABEL_0 and so on where it has none."""
    id2label = config.get("id2label")
    id2label = id2label if isinstance(id2label, dict) else {}
    return [str(id2label.get(str(i), f"LABEL_{i}")) for i in range(number)]


def have_meaning(names: Sequence[str]) -> bool:
    """Say whether a label has another name than LABEL_0, LABEL_1, ... or its number."""
    return any(name.lower() not in (f"label_{i}", str(i)) for i, name in enumerate(names))


def weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights, in float32.

    Returns:
        Tensors, under the names that the file gives them.

    Raises:
        UserError: the file is missing or damaged, or holds anything but weights.
    """
    name = next((name for name in WEIGHTS if exists(folder / name)), None)
    if name is None:
        split = any(folder.glob("*.index.json"))
        hint = ": it is split; save the model in one piece (max_shard_size)" if split else ""
        raise UserError(f"it holds neither {' nor '.join(WEIGHTS)}{hint}")
    file = plain_files.inside(folder, name)
    if file.suffix == ".bin":
        tensors = tensor_files.torch_file(file)
    else:
        tensors, _ = tensor_files.safetensors_file(file)
    # Older files hold the position numbers among their weights.
    whole = {n for n, value in tensors.items() if isinstance(value, Tensor) and _is_whole(value)}
    weights = {name: value for name, value in tensors.items() if name not in whole}
    tensor_files.check_weights(weights)
    return {name: value.float() for name, value in weights.items()}


def _is_whole(value: Tensor) -> bool:
    """Say whether a tensor holds whole numbers or truth values."""
    return not value.is_floating_point() and not value.is_complex()


def tokenizer_files(folder: Path, architecture: Mapping[str, Any]) -> dict[str, str]:
    """Read the tokenizer.

    Args:
        folder: the folder.
        architecture: the backbone's shape.

    Returns:
        Texts by file name (`tokenization.files_of`).

    Raises:
        UserError: there is no tokenizer, it cannot be loaded, or it gives ids that the model does
            not have.
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
    kind = json.dumps({"model_type": model_type})  # some folders state it nowhere else
    tokenizer = tokenization.from_files({**files, "config.json": kind})
    vocabulary = tokenizer.get_vocab()
    # If there is no vocabulary of this type, the library makes one up of special tokens.
    if len(set(vocabulary) - set(tokenizer.all_special_tokens)) < FEWEST_PIECES:
        raise UserError(f"its tokenizer knows no words: it holds no vocabulary of a {model_type}")
    tokenization.check(tokenizer, architecture)
    if tokenizer.pad_token is None:
        raise UserError("its tokenizer has no padding token")
    return tokenization.files_of(tokenizer)
