"""Early-exit transformer classifiers: train, calibrate, measure and run them (DeeBERT, ACL 2020).

Importing this package has no side effect and pulls in nothing heavy; `EarlyExitClassifier` is
loaded when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deebert.classifier import EarlyExitClassifier

__all__ = ["EarlyExitClassifier"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from deebert import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
