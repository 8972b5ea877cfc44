"""A folder of transformers' kind (config.json, weights, tokenizer), read without trusting it.

It is somebody's: what it holds is read as plain values, nothing that it names is run, and no name
in it leads out of it. Knows nothing of what the values mean to this program (`published`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from deebert import tokens
from deebert.architectures import longest_input
from deebert.errors import UserError, first_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("sentencepiece.bpe.model",),
    ("spm.model",),
)
TOKENIZER = (
    *(name for names in VOCABULARIES for name in names),
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
FEWEST_PIECES = 10  # of a vocabulary that texts can be written in


def values(folder: Path) -> dict[str, Any]:
    """What config.json says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"its config.json cannot be read ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise UserError("its config.json is no mapping")
    return found


def settings(model_type: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of what config.json says, the settings of this model type, completed with its defaults.

    Nothing else: neither code nor a precision, labels or a place.

    Raises:
        UserError: they are not what this model type can be.
    """
    known = set(AutoConfig.for_model(model_type).to_dict()) - set(PreTrainedConfig().to_dict())
    known |= {"pad_token_id", "bos_token_id", "eos_token_id"}
    try:
        chosen = {name: given[name] for name in sorted(known & set(given))}
        found = AutoConfig.for_model(model_type, **chosen).to_dict()
        longest_input(found)
    except Exception as error:  # the library checks its settings in many ways
        raise UserError(f"its config.json is of no {model_type} ({first_line(error)})") from error
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    """All weights in float32, by the names they have there.

    Raises:
        UserError: they are missing or damaged, or the file holds anything else.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        split = any(folder.glob("*.index.json"))
        hint = ": it is split; save the model in one piece (max_shard_size)" if split else ""
        raise UserError(f"it holds neither {' nor '.join(WEIGHTS)}{hint}")
    try:
        if file.suffix == ".bin":
            found = torch.load(file, map_location="cpu", weights_only=True)
        else:
            found = load_file(file)
    except Exception as error:  # unpickling somebody's file fails in many ways
        raise UserError(
            f"its {file.name} is damaged, or holds more than weights ({type(error).__name__}); "
            "nothing in it was executed"
        ) from error
    if not isinstance(found, dict) or not all(map(_is_weight, found.items())):
        raise UserError(f"its {file.name} holds something else than weights by name")
    return {
        name: value.detach().float() for name, value in found.items() if value.is_floating_point()
    }


def _is_weight(item: tuple[Any, Any]) -> bool:
    name, value = item
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


def tokenizer_files(folder: Path, model_type: str, vocab_size: int) -> dict[str, str]:
    """Its tokenizer as plain text by file name (`tokens.files_of`).

    Raises:
        UserError: there is none, it cannot be loaded, or it has ids that the model has not.
    """
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        choices = ", ".join(" with ".join(names) for names in VOCABULARIES)
        raise UserError(f"it holds no tokenizer: {choices}")
    there = {name: (folder / name).read_bytes() for name in TOKENIZER if (folder / name).is_file()}
    kind = json.dumps({"model_type": model_type})  # for folders that say it nowhere else
    tokenizer = tokens.from_files({**there, "config.json": kind.encode()})
    vocabulary = tokenizer.get_vocab()
    # The library makes up a vocabulary of special tokens where it finds none of the type's own.
    if len(set(vocabulary) - set(tokenizer.all_special_tokens)) < FEWEST_PIECES:
        raise UserError(f"its tokenizer knows no words: it holds no vocabulary of a {model_type}")
    largest = max(vocabulary.values())
    if largest >= vocab_size:
        raise UserError(
            f"its tokenizer has ids up to {largest}, and its model {vocab_size} of them"
        )
    if tokenizer.pad_token is None:
        raise UserError("its tokenizer has no padding token")
    return tokens.files_of(tokenizer)
