"""Early-exit transformer classifiers: train, calibrate, measure and run them (DeeBERT, ACL 2020).

The import of this package has no side effect and loads no large library: each public name is loaded
at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deebert.classifier import EarlyExitClassifier as EarlyExitClassifier
    from deebert.data.datamodule import TextDataModule as TextDataModule
    from deebert.exits.records import Record as Record
    from deebert.exits.rules import ExitScores as ExitScores
    from deebert.exits.rules import Rule as Rule
    from deebert.exits.rules import exit_rule as exit_rule
    from deebert.exits.target import Target as Target
    from deebert.inference.engine import Engine as Engine
    from deebert.models.early_exit import EarlyExitModel as EarlyExitModel
    from deebert.runs.from_python import Run as Run
    from deebert.runs.from_python import evaluate as evaluate
    from deebert.runs.from_python import modules as modules
    from deebert.runs.from_python import train as train
    from deebert.training.callbacks import EarlyExitEvaluation as EarlyExitEvaluation
    from deebert.training.module import EarlyExitModule as EarlyExitModule

__version__ = "0.1.0"

_MODULES = {
    "EarlyExitClassifier": "classifier",
    "EarlyExitEvaluation": "training.callbacks",
    "EarlyExitModel": "models.early_exit",
    "EarlyExitModule": "training.module",
    "Engine": "inference.engine",
    "ExitScores": "exits.rules",
    "Record": "exits.records",
    "Rule": "exits.rules",
    "Run": "runs.from_python",
    "Target": "exits.target",
    "TextDataModule": "data.datamodule",
    "evaluate": "runs.from_python",
    "exit_rule": "exits.rules",
    "modules": "runs.from_python",
    "train": "runs.from_python",
}
__all__ = [
    "EarlyExitClassifier", "EarlyExitEvaluation", "EarlyExitModel", "EarlyExitModule", "Engine",
    "ExitScores", "Record", "Rule", "Run", "Target", "TextDataModule", "evaluate", "exit_rule",
    "modules", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name at its first use."""
    if name in _MODULES:
        return getattr(import_module(f"deebert.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
