"""Find checkpoints by file or run folder, read them without trusting them, and rebuild the model.

A checkpoint is a file of Lightning's. Beside the weights it holds the run's configuration, the
backbone's shape and the tokenizer as plain values. It loads with `weights_only=True`, without
Lightning and without a network. This module knows nothing of training.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from os.path import exists
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deebert.data import tokenization
from deebert.errors import UserError, first_line
from deebert.hub import checkpoint_config
from deebert.hub.run_config import RunConfig
from deebert.models import architectures
from deebert.models.early_exit import EarlyExitModel
from deebert.options import job_command
from deebert.untrusted import plain_files, tensor_files

WEIGHTS_FINGERPRINT = "weights_fingerprint"  # a key in a checkpoint; older ones lack it
READ = ("hyper_parameters", "state_dict", "epoch", WEIGHTS_FINGERPRINT)
MOST_GROWTH = 2  # bytes of the model for each byte in the file: 16 bits may become 32
SLACK = 2**20  # bytes of a model that are no weights, such as position numbers
TRIED = 3  # tokens in the input of the trial run


@dataclass(frozen=True)
class Source:
    """The source that a run starts from: a checkpoint, or a folder of its records.

    Attributes:
        path: the file or folder.
        config: the configuration of the run that wrote it.
    """

    path: Path
    config: RunConfig

    @property
    def ramps_trained(self) -> bool:
        """Say whether the ramps before the last one were trained."""
        return self.config.objective.trains_ramps

    @property
    def is_plain_classifier(self) -> bool:
        """Say whether somebody else's classifier without ramps was converted."""
        return False


@dataclass(frozen=True)
class Checkpoint(Source):
    """A source with weights: a checkpoint file, a saved folder or a Transformers folder.

    Attributes:
        architecture: the backbone's shape, as `architectures.settings` returns it.
        tokenizer_files: texts by file name.
        weights: tensors by name, with or without Lightning's prefix "model.".
        epochs_done: number of epochs that this program has trained; 0 if others trained the model.
        not_taken: values of its configuration that were left out, by flag
            (`checkpoint_config.accepted`).
    """

    architecture: dict[str, Any]
    tokenizer_files: dict[str, str]
    weights: dict[str, torch.Tensor]
    epochs_done: int
    not_taken: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain_classifier(self) -> bool:
        """Say whether somebody else's classifier without ramps was converted."""
        return not (self.epochs_done or self.ramps_trained)

    def model(self) -> EarlyExitModel:
        """Rebuild the trained model, in eval mode.

        Raises:
            UserError: the weights do not fit the shape, or are not finite.
        """
        try:
            return self._model()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        except Exception as error:  # the library raises many types for sizes that it refuses
            reason = first_line(error)
            raise UserError(f"{self.path}: its shape is that of no model ({reason})") from error

    def _model(self) -> EarlyExitModel:
        weights = self._by_name
        tensor_files.check_finite(weights)
        kind = self.config.ramp_kind
        if kind.reader.needs_second_text and self.architecture.get("sep_token_id") is None:
            raise UserError(
                "its configuration has no sep_token_id, by which its ramps tell two texts apart"
            )
        shape = self.architecture, self.config.task.num_labels, asdict(kind)
        there = {name: tuple(value.shape) for name, value in weights.items()}
        # Checked before the model is made: a model of a hostile size would take all memory.
        expected, num_bytes = EarlyExitModel.shapes(*shape)
        for name, wanted in expected.items():
            # If weights share their values, the file holds one of them, under any of their names.
            size = there.get(name, wanted if wanted in there.values() else None)
            if size != wanted:
                raise UserError(
                    f"its weights do not fit its shape ({name} is {size or 'missing'}, not "
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
        """The hash of the weights. A record carries it, to name the model that it was made with."""
        return tensor_files.fingerprint(self._by_name)

    def check_fingerprint(self, kept: Any) -> None:
        """Check that the weights are those that were written.

        Args:
            kept: the fingerprint in the file; None if an older version wrote the file.

        Raises:
            UserError: the weights have another fingerprint.
        """
        if kept is not None and kept != self.fingerprint:
            raise UserError("its weights are not those that were written: the file is damaged")

    @property
    def _by_name(self) -> dict[str, torch.Tensor]:
        """The weights under the names that `EarlyExitModel` gives them."""
        return by_name(self.weights)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Rebuild the tokenizer that the model was trained with.

        Raises:
            UserError: the files make no tokenizer, or it gives ids that the model does not have.
        """
        try:
            tokenizer = tokenization.from_files(self.tokenizer_files)
            tokenization.check(tokenizer, self.architecture)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        return tokenizer


def by_name(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a state dict under the names that `EarlyExitModel` gives them."""
    return {name.removeprefix("model."): value for name, value in state_dict.items()}


@torch.inference_mode()
def _try(model: EarlyExitModel) -> None:
    """Run a model once, because the library finds some wrong settings only then.

    Raises:
        UserError: its logits are not finite.
    """
    ids = torch.zeros(1, min(TRIED, model.backbone.longest_input), dtype=torch.long)
    if not model(ids, torch.ones_like(ids)).isfinite().all():
        raise UserError("its logits are not finite")


def find(path: str, flag: str, name: str) -> Path:
    """Find a checkpoint file, or `checkpoints/<name>` of a run folder.

    Args:
        path: the file or the folder, as the user gave it.
        flag: the flag that the user gave it with, for error messages.
        name: file name of the checkpoint in a run folder.

    Returns:
        The path of the file.

    Raises:
        UserError: there is no such file, or it is a link that leads out of the folder.
    """
    given = Path(path)
    if not exists(given):
        raise UserError(f"{flag}={path}: no such file or folder; give a run folder or a .ckpt file")
    if not given.is_dir():
        return given  # a link that the user names may lead to any place
    for file in (f"checkpoints/{name}", name):
        try:
            return plain_files.inside(given, file)
        except FileNotFoundError:
            continue
        except UserError as error:
            raise UserError(f"{flag}={path}: {error}") from error
    raise UserError(f"{flag}={path}: the folder holds no checkpoints/{name}; give a run folder")


def lasting(given: str) -> str:
    """Return the absolute path of a file or folder.

    A text that is no path here, such as an id on the hub, is returned unchanged.
    """
    return str(Path(given).absolute()) if exists(given) else given


def read(path: Path, flag: str) -> Checkpoint:
    """Read a checkpoint that `train.py` wrote. Nothing in it is executed.

    Args:
        path: the file.
        flag: the flag that the user named it with, for error messages.

    Raises:
        UserError: the file is no checkpoint of this program, or is damaged.
    """
    try:
        return _read(path)
    except (UserError, LookupError, TypeError, AttributeError, OSError) as error:
        reason = first_line(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(
            f"{flag}={path}: not a checkpoint of this program, or a damaged one ({reason}); give "
            f"the run folder or checkpoints/best.ckpt of a `{job_command('train')}` run"
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
