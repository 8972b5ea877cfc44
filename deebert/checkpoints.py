"""Checkpoints: found by file or run folder, read without trusting them, rebuilt without a hub.

A checkpoint is Lightning's, with the run's configuration, the backbone's shape and the tokenizer as
plain values beside the weights; it loads with `weights_only=True`. Knows nothing of training.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deebert import tokens
from deebert.errors import UserError
from deebert.model import EarlyExitModel
from deebert.objectives import trains_ramps
from deebert.tasks import Task


@dataclass(frozen=True)
class Origin:
    """What a run starts from: a checkpoint, or a record of one."""

    path: Path
    config: dict[str, Any]  # of the run that wrote it

    @property
    def ramps_trained(self) -> bool:
        """Do the ramps before the last say anything?"""
        return trains_ramps(self.config["objective"]["name"])


@dataclass(frozen=True)
class Checkpoint(Origin):
    """What a checkpoint says of itself, and its weights."""

    architecture: dict[str, Any]
    tokenizer_files: dict[str, str]
    weights: dict[str, torch.Tensor]
    epochs_done: int

    def model(self) -> EarlyExitModel:
        """The trained model, in eval mode."""
        task = Task.from_config(self.config["task"])
        weights = self._by_name
        shape = self.architecture, task.num_labels, self.config["ramp"]
        there = {name: tuple(value.shape) for name, value in weights.items()}
        # Before the model is made: of a hostile size it would take all memory.
        for name, wanted in EarlyExitModel.shapes(*shape).items():
            # Of weights that share their values one is kept, under any of their names.
            found = there.get(name, wanted if wanted in there.values() else None)
            if found != wanted:
                raise UserError(
                    f"{self.path}: its weights do not fit its shape ({name} is "
                    f"{found or 'missing'}, not {wanted})"
                )
        model = EarlyExitModel(*shape)
        try:
            model.load_weights(weights)
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise UserError(f"{self.path}: its weights do not fit its shape ({reason})") from error
        return model.eval()

    @cached_property
    def fingerprint(self) -> str:
        """Says which weights these are; records carry it."""
        return fingerprint(self._by_name)

    @property
    def _by_name(self) -> dict[str, torch.Tensor]:
        """The weights as `EarlyExitModel` calls them."""
        return {name.removeprefix("model."): value for name, value in self.weights.items()}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer it was trained with."""
        return tokens.from_files(self.tokenizer_files)


def find(path: str, flag: str, name: str) -> Path:
    """A checkpoint file, or `checkpoints/<name>` of a run folder.

    Raises:
        UserError: neither is there.
    """
    given = Path(path)
    if not given.exists():
        raise UserError(f"{flag}={path}: no such file or folder; give a run folder or a .ckpt file")
    if given.is_file():
        return given
    for file in (given / "checkpoints" / name, given / name):
        if file.is_file():
            return file
    raise UserError(f"{flag}={path}: the folder holds no checkpoints/{name}; give a run folder")


def lasting(given: str) -> str:
    """A path that holds from another working directory, too; what is none here, an id on the hub,
    as it is."""
    return str(Path(given).absolute()) if Path(given).exists() else given


def read(path: Path, flag: str) -> Checkpoint:
    """Read a checkpoint written by `train.py`. Nothing in it is executed.

    Raises:
        UserError: it is no checkpoint, or not one of this program's.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        hparams = content["hyper_parameters"]
        checkpoint = Checkpoint(
            path,
            of_today(hparams["config"]),
            hparams["architecture"],
            hparams["tokenizer"],
            content["state_dict"],
            content["epoch"] + 1,
        )
        checkpoint.config["stage"], checkpoint.config["task"]["name"], checkpoint.config["data"]
    except Exception as error:  # unpickling somebody's file fails in many ways
        raise UserError(
            f"{flag}={path}: not a checkpoint of this program ({type(error).__name__}); give the "
            "run folder or checkpoints/best.ckpt of a `python train.py` run"
        ) from error
    return checkpoint


def of_today(config: dict[str, Any]) -> dict[str, Any]:
    """A saved run's configuration, also of one from before there were some of its choices."""
    name = config["stages"][str(config["stage"])].get("objective")
    return {"objective": {"name": name}, "ramp": {}, "teacher": None} | config


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of a model's weights: names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, values in sorted(weights.items()):
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
