"""The golden models of `tests/golden`, made from the original's key names."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from deebert.hub import conversion
from deebert.models.early_exit import EarlyExitModel

FOLDER = Path(__file__).parent / "golden"
NAMES = ("bert-2labels", "bert-3labels", "roberta-2labels", "roberta-3labels")


def load(name: str) -> tuple[EarlyExitModel, dict[str, Tensor], dict[str, Any]]:
    """The model in eval mode, its inputs and outputs, and the facts of the original's run."""
    facts = json.loads((FOLDER / f"{name}.json").read_text())
    config = dict(facts["model"])
    kind, num_labels = config.pop("kind"), config.pop("num_labels")
    model = EarlyExitModel({"model_type": kind, **config}, num_labels)
    weights = load_file(FOLDER / f"{name}.weights.safetensors")
    last = config["num_hidden_layers"] - 1
    renamed = {renamed_key(key, kind, last): value for key, value in weights.items()}
    renamed.pop("")
    model.load_state_dict(renamed, strict=False)
    missing = set(model.state_dict()) - set(renamed)
    assert all(key.endswith(("shift", "scale")) for key in missing), missing
    return model.eval(), load_file(FOLDER / f"{name}.tensors.safetensors"), facts


def renamed_key(key: str, kind: str, last: int) -> str:
    """The original's name of a parameter -> ours; "" for its last ramp, which nothing trains."""
    return conversion.our_name(key, conversion.DEEBERT[kind], last) or ""
