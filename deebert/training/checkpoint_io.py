"""Checkpoint reading and writing for Lightning's Trainer, with checks of untrusted files.

A resumed run restores the state of optimizer, schedule, loops and callbacks from a file that
somebody else may have written. Without these checks, Lightning would load and remove the files that
this file names. It would also fail in many different ways where a value has a wrong type. This
module does not know models, losses or data.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.optim import Optimizer

from deebert.disk import whole_files
from deebert.errors import UserError
from deebert.hub.checkpoints import WEIGHTS_FINGERPRINT, by_name
from deebert.untrusted import plain_files, tensor_files

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")  # of ModelCheckpoint
SCORES = ("best_model_score", "current_score", "kth_value")
MOST_STEPS = 2**40
# The attributes that LambdaLR restores. LambdaLR itself would accept any name as an attribute.
SCHEDULE = (
    "base_lrs", "last_epoch", "_last_lr", "_step_count", "_is_initial",
    "_get_lr_called_within_step",
)  # fmt: skip


class SafeCheckpointIO(TorchCheckpointIO):
    """The plugin that reads only local files of tensors and plain values.

    It adds the fingerprint of the weights to each checkpoint that it writes.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, with the fingerprint of its weights.

        Lightning would write it in `$TMPDIR` and copy it from there, if that is another file
        system. A kill during the copy would destroy the checkpoint that was there before.

        Raises:
            OSError: the file cannot be written. The checkpoint that was there stays.
        """
        # Spawned processes return their weights in a checkpoint file without this key.
        if "state_dict" in checkpoint:
            weights = tensor_files.fingerprint(by_name(checkpoint["state_dict"]))
            checkpoint = checkpoint | {WEIGHTS_FINGERPRINT: weights}
        # A place on the network, such as S3. Options are refused there.
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_files.replaced(Path(path)) as part, part.open("wb") as stream:
            torch.save(checkpoint, stream)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint into main memory.

        Args:
            path: the checkpoint file.
            map_location: ignored; the tensors are always loaded onto the CPU.
            weights_only: ignored; only tensors and plain values are ever loaded.

        Raises:
            UserError: the path is no local file, or the file is damaged or holds other objects
                than tensors and plain values.
        """
        return tensor_files.torch_file(Path(path))


def clean(content: dict[str, Any], folder: Path, loops: Mapping[str, Any]) -> None:
    """Remove everything from a training state that a resumed run may not restore.

    Args:
        content: the content of the checkpoint. It is changed in place.
        folder: the folder of the checkpoint file.
        loops: the state of the loops of a new trainer, by the name of the loop.

    Raises:
        UserError: a part is missing, or has a wrong type.
    """
    try:
        # Lightning would train on without a missing state.
        for state in ("optimizer_states", "lr_schedulers"):
            if len(content[state]) != 1:
                raise UserError(f"it holds {len(content[state])} {state}, not 1")
        check_loops(content["loops"], loops)
        callbacks = content["callbacks"].items()
        content["callbacks"] = {name: _own_paths(state, folder) for name, state in callbacks}
        content["lr_schedulers"] = [_schedule(state) for state in content["lr_schedulers"]]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"its training state is damaged ({type(error).__name__})") from error


def check_optimizer(optimizer: Optimizer) -> None:
    """Check the state that an optimizer has restored.

    A fused step would read and write past the end of a moment that is shorter than its parameter.

    Raises:
        UserError: a value has a wrong type or shape.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shape = () if name == "step" else parameter.shape
            if not isinstance(value, Tensor) or value.shape != shape:
                raise UserError(
                    f"the optimizer's {name} is {getattr(value, 'shape', value)} where its "
                    f"parameter is {tuple(parameter.shape)}"
                )
    for group in optimizer.param_groups:
        for name, value in group.items():
            listed = value if isinstance(value, tuple | list) else [value]
            if name != "params" and not all(v is None or _is_number(v) for v in listed):
                raise UserError(f"the optimizer's {name} is no number")


def check_best(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Check that the best checkpoint of a run holds the weights of the same model.

    Args:
        state: the state of Lightning's ModelCheckpoint, as `clean` leaves it.
        weights: the weights of the model whose training is resumed.

    Raises:
        UserError: the file has no weights, or weights with other names or shapes.
    """
    file = Path(state["best_model_path"])
    best_weights: Any = tensor_files.torch_file(file, only=("state_dict",)).get("state_dict")
    tensor_files.check_weights(best_weights)
    shapes = {name: value.shape for name, value in best_weights.items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise UserError(f"{file.name} holds the weights of another model")


def check_loops(given: Any, expected: Mapping[str, Any], flag: str = "loops") -> None:
    """Check the loop counters of a checkpoint: how many batches and epochs are done.

    Args:
        given: the state of Lightning's loops in the checkpoint.
        expected: the state of the loops of a new trainer.
        flag: the path of `given` inside the checkpoint, for error messages.

    Raises:
        UserError: a value has a wrong type, or is no possible count.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"its {flag} is no mapping")
    for key, value in expected.items():
        if key not in given:
            continue  # another version of Lightning has written the checkpoint
        if isinstance(value, Mapping):
            check_loops(given[key], value, f"{flag}.{key}")
        elif type(given[key]) is not type(value) or not 0 <= given[key] < MOST_STEPS:
            raise UserError(f"its {flag}.{key} is no {type(value).__name__} of a count")


def _schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a schedule's state that LambdaLR may restore."""
    values = {name: state[name] for name in SCHEDULE if name in state}
    # Older versions of torch write only the first three.
    if missing := [name for name in SCHEDULE[:3] if name not in values]:
        raise UserError(f"the schedule lacks its {missing[0]}")
    for name, value in values.items():
        if not all(map(_is_number, value if isinstance(value, list) else [value])):
            raise UserError(f"the schedule's {name} is no number")
    return values | {"lr_lambdas": [None]}


def _own_paths(state: Any, folder: Path) -> Any:
    """Return the state of a callback, with all its paths moved into the run's own folder.

    Only the file name of a path is used, so a run folder that was moved keeps its best checkpoint.
    A file that is not inside the folder becomes an empty path.
    """
    if not isinstance(state, Mapping) or not {*PATHS, "dirpath", "best_k_models"} & set(state):
        return state

    def own(path: Any) -> str:
        name = Path(str(path)).name
        return str(folder / name) if name and plain_files.is_inside(folder, name) else ""

    best = {own(path): score for path, score in (state.get("best_k_models") or {}).items()}
    best.pop("", None)
    scores = {name: state.get(name) for name in SCORES}
    for score in (*scores.values(), *best.values()):
        if score is not None and not _is_number(score):
            raise UserError("a score in the state of a callback is no number")
    paths = {name: own(state.get(name, "")) for name in PATHS}
    return {"monitor": state.get("monitor"), **scores, **paths, "best_k_models": best,
            "dirpath": str(folder)}  # fmt: skip


def _is_number(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.numel() == 1) or isinstance(value, int | float)
