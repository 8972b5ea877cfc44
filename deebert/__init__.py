"""Early-exit transformer classifiers: train, calibrate, measure and run them (DeeBERT, ACL 2020).

The import of this package has no side effect and loads no large library: each public name is loaded
at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deebert.classifier import EarlyExitClassifier as EarlyExitClassifier
    from deebert.exits.records import Record as Record
    from deebert.exits.rules import ExitScores as ExitScores
    from deebert.exits.rules import Rule as Rule
    from deebert.exits.rules import exit_rule as exit_rule
    from deebert.exits.target import Target as Target
    from deebert.inference.engine import Engine as Engine
    from deebert.models.early_exit import EarlyExitModel as EarlyExitModel

__version__ = "0.1.0"

_MODULES = {
    "EarlyExitClassifier": "classifier",
    "EarlyExitModel": "models.early_exit",
    "Engine": "inference.engine",
    "ExitScores": "exits.rules",
    "Record": "exits.records",
    "Rule": "exits.rules",
    "Target": "exits.target",
    "exit_rule": "exits.rules",
}
__all__ = [
    "EarlyExitClassifier", "EarlyExitModel", "Engine", "ExitScores", "Record", "Rule", "Target",
    "exit_rule",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name at its first use."""
    if name in _MODULES:
        return getattr(import_module(f"deebert.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
