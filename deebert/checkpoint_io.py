"""How Lightning reads and writes checkpoints here: without trusting what a file says.

A resumed run restores the state of optimizer, schedule, loops and callbacks from a file that
somebody else may have written. Lightning would load and remove files that it names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO

from deebert import tensor_files, untrusted
from deebert.checkpoints import WEIGHTS_FINGERPRINT, by_name
from deebert.errors import UserError

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")  # of ModelCheckpoint
SCORES = ("monitor", "best_model_score", "current_score", "kth_value")
# Of LambdaLR, which takes whatever is there for its own attributes.
SCHEDULE = (
    "base_lrs", "last_epoch", "_step_count", "_last_lr", "_is_initial",
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
        file = Path(path)
        content = tensor_files.torch_file(file)
        if not isinstance(content, dict):
            raise UserError(f"{file} is no checkpoint")
        if "callbacks" in content:
            content["callbacks"] = {
                name: _own_paths(state, file.parent) for name, state in content["callbacks"].items()
            }
        if "lr_schedulers" in content:
            content["lr_schedulers"] = [
                {name: state[name] for name in SCHEDULE if name in state}
                | {"lr_lambdas": [None] * len(state["lr_lambdas"])}
                for state in content["lr_schedulers"]
            ]
        return content


def _own_paths(state: Any, folder: Path) -> Any:
    """Return a callback's state that names files of the run's own folder only.

    A path counts by its name alone, so that a run that was moved keeps its best checkpoint.
    """
    if not isinstance(state, Mapping) or not {*PATHS, "dirpath", "best_k_models"} & set(state):
        return state

    def own(path: Any) -> str:
        name = Path(str(path)).name
        return str(folder / name) if name and untrusted.is_inside(folder, name) else ""

    best = state.get("best_k_models") or {}
    return {
        **{name: state.get(name) for name in SCORES},
        **{name: own(state.get(name, "")) for name in PATHS},
        "best_k_models": {own(path): score for path, score in best.items() if own(path)},
        "dirpath": str(folder),
    }
