"""Checkpoints: found by file or run folder, read without trusting them, rebuilt without a hub.

A checkpoint is Lightning's, with the run's configuration, the backbone's shape and the tokenizer as
plain values beside the weights; it loads with `weights_only=True`. Knows nothing of training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os.path import exists
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deebert.data import tokenization
from deebert.data.tasks import Task
from deebert.errors import UserError, first_line
from deebert.hub import checkpoint_config
from deebert.models import architectures
from deebert.models.early_exit import EarlyExitModel
from deebert.models.trained_ramps import trains_ramps
from deebert.untrusted import plain_files, tensor_files

WEIGHTS_FINGERPRINT = "weights_fingerprint"  # in a checkpoint; those of before have none
READ = ("hyper_parameters", "state_dict", "epoch", WEIGHTS_FINGERPRINT)
MOST_GROWTH = 2  # bytes of a model for each in the file, where 16 bits become 32
SLACK = 2**20  # bytes: of what is no weight, the numbers of positions
TRIED = 3  # tokens


@dataclass(frozen=True)
class Source:
    """What a run starts from: a checkpoint, or a record of one."""

    path: Path
    config: dict[str, Any]  # of the run that wrote it, as `checkpoint_config.accepted` has it

    @property
    def ramps_trained(self) -> bool:
        """Do the ramps before the last say anything?"""
        return trains_ramps(self.config["objective"]["name"])


@dataclass(frozen=True)
class Checkpoint(Source):
    """What a checkpoint says of itself, and its weights."""

    architecture: dict[str, Any]
    tokenizer_files: dict[str, str]
    weights: dict[str, torch.Tensor]
    epochs_done: int
    not_taken: Mapping[str, Any] = field(default_factory=dict)  # `checkpoint_config.accepted` tells

    def model(self) -> EarlyExitModel:
        """The trained model, in eval mode.

        Raises:
            UserError: the weights are not those of such a model, or not finite.
        """
        try:
            return self._model()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        except Exception as error:  # the library checks its sizes in many ways
            reason = first_line(error)
            raise UserError(f"{self.path}: its shape is that of no model ({reason})") from error

    def _model(self) -> EarlyExitModel:
        weights, ramp = self._by_name, self.config["ramp"]
        tensor_files.check_finite(weights)
        if ramp.get("reads") == "pair" and self.architecture.get("sep_token_id") is None:
            raise UserError(
                "its configuration has no sep_token_id, by which its ramps tell two texts apart"
            )
        shape = self.architecture, Task.from_config(self.config["task"]).num_labels, ramp
        there = {name: tuple(value.shape) for name, value in weights.items()}
        # Before the model is made: of a hostile size it would take all memory.
        expected, num_bytes = EarlyExitModel.shapes(*shape)
        for name, wanted in expected.items():
            # Of weights that share their values one is kept, under any of their names.
            found = there.get(name, wanted if wanted in there.values() else None)
            if found != wanted:
                raise UserError(
                    f"its weights do not fit its shape ({name} is {found or 'missing'}, not "
                    f"{wanted})"
                )
        storages = [value.untyped_storage() for value in weights.values()]
        there_bytes = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
        if num_bytes > MOST_GROWTH * there_bytes + SLACK:
            raise UserError("its weights are fewer numbers than its shape has")
        model = EarlyExitModel(*shape)
        try:
            model.load_weights(weights)
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise UserError(f"its weights do not fit its shape ({reason})") from error
        _try(model.eval())
        return model

    @cached_property
    def fingerprint(self) -> str:
        """Says which weights these are; records carry it."""
        return tensor_files.fingerprint(self._by_name)

    def check_fingerprint(self, kept: Any) -> None:
        """Compare the weights with what was noted when they were written.

        Args:
            kept: the fingerprint; None in files from before it was noted.

        Raises:
            UserError: these are other weights.
        """
        if kept is not None and kept != self.fingerprint:
            raise UserError("its weights are not those that were written: the file is damaged")

    @property
    def _by_name(self) -> dict[str, torch.Tensor]:
        """The weights as `EarlyExitModel` calls them."""
        return by_name(self.weights)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer it was trained with.

        Raises:
            UserError: the files make none, or it has ids that the model has not.
        """
        try:
            found = tokenization.from_files(self.tokenizer_files)
            tokenization.check(found, self.architecture)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        return found


def by_name(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights as `EarlyExitModel` calls them."""
    return {name.removeprefix("model."): value for name, value in state_dict.items()}


@torch.inference_mode()
def _try(model: EarlyExitModel) -> None:
    """Run a model once: the library finds some settings wrong only then.

    Raises:
        UserError: its logits are not finite.
    """
    ids = torch.zeros(1, min(TRIED, model.backbone.longest_input), dtype=torch.long)
    if not model(ids, torch.ones_like(ids)).isfinite().all():
        raise UserError("its logits are not finite")


def find(path: str, flag: str, name: str) -> Path:
    """A checkpoint file, or `checkpoints/<name>` of a run folder.

    Raises:
        UserError: neither is there, or it is a link that leads out of the folder.
    """
    given = Path(path)
    if not exists(given):
        raise UserError(f"{flag}={path}: no such file or folder; give a run folder or a .ckpt file")
    if not given.is_dir():
        return given  # a link that the user names may lead anywhere
    for file in (f"checkpoints/{name}", name):
        try:
            return plain_files.inside(given, file)
        except FileNotFoundError:
            continue
        except UserError as error:
            raise UserError(f"{flag}={path}: {error}") from error
    raise UserError(f"{flag}={path}: the folder holds no checkpoints/{name}; give a run folder")


def lasting(given: str) -> str:
    """A path that holds from another working directory, too; what is none here, an id on the hub,
    as it is."""
    return str(Path(given).absolute()) if exists(given) else given


def read(path: Path, flag: str) -> Checkpoint:
    """Read a checkpoint written by `train.py`. Nothing in it is executed.

    Raises:
        UserError: it is no checkpoint, not one of this program's, or damaged.
    """
    try:
        return _read(path)
    except (UserError, LookupError, TypeError, AttributeError, OSError) as error:
        reason = first_line(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(
            f"{flag}={path}: not a checkpoint of this program, or a damaged one ({reason}); give "
            "the run folder or checkpoints/best.ckpt of a `python train.py` run"
        ) from error


def _read(path: Path) -> Checkpoint:
    content = tensor_files.torch_file(path, only=READ)
    hparams, weights = content["hyper_parameters"], content["state_dict"]
    tensor_files.check_weights(weights)
    files = plain_files.plain(hparams["tokenizer"], "its tokenizer")
    if not isinstance(epoch := content["epoch"], int) or not 0 <= epoch < 2**31:
        raise UserError("its epoch is no number of one")
    config, not_taken = checkpoint_config.accepted(
        plain_files.plain(hparams["config"], "its configuration")
    )
    checkpoint = Checkpoint(
        path,
        config,
        architectures.settings(hparams["architecture"]),
        tokenization.known_files(files),
        weights,
        epoch + 1,
        not_taken,
    )
    checkpoint.check_fingerprint(content.get(WEIGHTS_FINGERPRINT))
    return checkpoint
