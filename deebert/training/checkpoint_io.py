"""How Lightning reads and writes checkpoints here: without trusting what a file says.

A resumed run restores the state of optimizer, schedule, loops and callbacks from a file that
somebody else may have written. Lightning would load and remove files that it names, and fails in
many ways where a value is of another kind.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.optim import Optimizer

from deebert.errors import UserError
from deebert.hub.checkpoints import WEIGHTS_FINGERPRINT, by_name
from deebert.untrusted import plain_files, tensor_files

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")  # of ModelCheckpoint
SCORES = ("best_model_score", "current_score", "kth_value")
MOST_STEPS = 2**40
# Of LambdaLR, which takes whatever is there for its own attributes.
SCHEDULE = (
    "base_lrs", "last_epoch", "_last_lr", "_step_count", "_is_initial",
    "_get_lr_called_within_step",
)  # fmt: skip


class SafeCheckpointIO(TorchCheckpointIO):
    """Reads local files of tensors and plain values only; notes the weights' fingerprint."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, with the fingerprint of its weights."""
        if "state_dict" in checkpoint:  # spawned processes hand their weights back in such a file
            weights = tensor_files.fingerprint(by_name(checkpoint["state_dict"]))
            checkpoint = checkpoint | {WEIGHTS_FINGERPRINT: weights}
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the processor, whatever the arguments say.

        Raises:
            UserError: it is no local file, damaged, or holds more than tensors and plain values.
        """
        return tensor_files.torch_file(Path(path))


def clean(content: dict[str, Any], folder: Path, loops: Mapping[str, Any]) -> None:
    """Leave of a training state what a resumed run may restore.

    Args:
        content: of the checkpoint; changed in place.
        folder: that the checkpoint lies in.
        loops: what the loops of a new trainer say.

    Raises:
        UserError: a part is missing, or of another kind.
    """
    try:
        for state in ("optimizer_states", "lr_schedulers"):  # Lightning would go on without
            if len(content[state]) != 1:
                raise UserError(f"it holds {len(content[state])} {state}, not 1")
        check_loops(content["loops"], loops)
        callbacks = content["callbacks"].items()
        content["callbacks"] = {name: _own_paths(state, folder) for name, state in callbacks}
        content["lr_schedulers"] = [_schedule(state) for state in content["lr_schedulers"]]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"its training state is damaged ({type(error).__name__})") from error


def check_optimizer(optimizer: Optimizer) -> None:
    """Check what an optimizer has restored.

    A fused step would read and write past the end of a moment that is shorter than its parameter.

    Raises:
        UserError: a value is of another kind or shape.
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
    """Check that the best checkpoint of a run is one of the same model.

    Args:
        state: of Lightning's ModelCheckpoint, as `clean` leaves it.
        weights: of the model that goes on.

    Raises:
        UserError: it is not.
    """
    file = Path(state["best_model_path"])
    found: Any = tensor_files.torch_file(file, only=("state_dict",)).get("state_dict")
    tensor_files.check_weights(found)
    shapes = {name: value.shape for name, value in found.items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise UserError(f"{file.name} holds the weights of another model")


def check_loops(given: Any, expected: Mapping[str, Any], flag: str = "loops") -> None:
    """Check what a checkpoint says of Lightning's loops: how many batches and epochs are done.

    Args:
        expected: what the loops of a new trainer say.

    Raises:
        UserError: a value is of another kind.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"its {flag} is no mapping")
    for key, value in expected.items():
        if key not in given:
            continue  # of another version of Lightning
        if isinstance(value, Mapping):
            check_loops(given[key], value, f"{flag}.{key}")
        elif type(given[key]) is not type(value) or not 0 <= given[key] < MOST_STEPS:
            raise UserError(f"its {flag}.{key} is no {type(value).__name__} of a count")


def _schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: state[name] for name in SCHEDULE if name in state}
    if missing := [name for name in SCHEDULE[:3] if name not in found]:  # the others came later
        raise UserError(f"the schedule lacks its {missing[0]}")
    for name, value in found.items():
        if not all(map(_is_number, value if isinstance(value, list) else [value])):
            raise UserError(f"the schedule's {name} is no number")
    return found | {"lr_lambdas": [None]}


def _own_paths(state: Any, folder: Path) -> Any:
    """Return a callback's state that names files of the run's own folder only.

    A path counts by its name alone, so that a run that was moved keeps its best checkpoint.
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
