"""Predictions: labels, probabilities and exit layers of inputs that a model has answered.

The module knows nothing of the model, of texts or of targets. Shapes: N inputs, L layers (= ramps),
C labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """The answers in the order of the inputs; a sequence with a dict for each input.

    Attributes:
        labels: names of classes, or the values of a regression.
        probabilities_NC: (N, C) probabilities in the order of `classes`; None for a regression.
        exit_layers: layer at which each input left, from 1.
        num_layers: L.
        classes: names of the classes; None for a regression.
    """

    labels: list[Any]
    probabilities_NC: Tensor | None
    exit_layers: list[int]
    num_layers: int
    classes: tuple[str, ...] | None

    @property
    def saving(self) -> float:
        """Share of the layers that was saved: 1 - mean exit layer / number of layers."""
        return 1 - sum(self.exit_layers) / (len(self) * self.num_layers)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        """Return the answer to one input, or for a slice a list of answers.

        Returns:
            A dict of `label`, `exit_layer` and, unless the task is a regression, `probability`, the
            probability of that label.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        answer = {"label": self.labels[index], "exit_layer": self.exit_layers[index]}
        if self.probabilities_NC is not None:
            answer["probability"] = self.probabilities_NC[index].max().item()
        return answer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
