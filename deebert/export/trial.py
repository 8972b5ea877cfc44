"""The trial of an export: the runner answers sample texts, and is compared with the engine.

This module does not know how an export is written.
"""

import math
from pathlib import Path
from typing import Any

import torch

from deebert.classifier import EarlyExitClassifier
from deebert.errors import UserError

CLOSE = 1e-4  # the largest difference of the runner's logits from the engine's
# The texts that an export is tested on before it is kept. They are short, long, and hard to cut.
SAMPLE_TEXTS = (
    "x", "Two words.", "a fine film, and a long one", "naïve café 北京 \U0001f600 don't [SEP] <s>",
    "  spaces \t and\nlines ", "the plot thickens, " * 12, "1,234.56 % of everything, " * 60,
)  # fmt: skip


def sample(classifier: EarlyExitClassifier) -> list[Any]:
    """Return the sample texts, or for a task of two columns pairs of them."""
    if len(classifier.task.columns) == 1:
        return list(SAMPLE_TEXTS)
    return list(zip(SAMPLE_TEXTS, SAMPLE_TEXTS[::-1], strict=True))


def check(folder: Path, difference_L: list[float], classifier: EarlyExitClassifier) -> None:
    """Check that the runner's logits equal the engine's, to rounding; in int8 that they are finite.

    Raises:
        UserError: a ramp's logits differ by more.
    """
    model = classifier.model
    close = CLOSE if classifier.engine.precision == "float32" else math.inf  # NaN is not under it
    for layer, (ramp, difference) in enumerate(zip(model.all_ramps, difference_L, strict=True), 1):
        # A standardized ramp multiplies the rounding of its features, by up to a thousand if the
        # first token hardly differs between inputs.
        limit = close * max(1.0, ramp.scale.max().item())
        if not difference <= limit:
            raise UserError(
                f"{folder} was not written: the logits of ramp {layer} differ by {difference:.2g} "
                f"from the engine's, more than {limit:.2g}; this model cannot be exported"
            )


def differences(folder: Path, classifier: EarlyExitClassifier) -> list[float]:
    """Return each ramp's largest difference between the logits of the runner and the engine.

    Raises:
        UserError: the runner's tokens differ from the tokenizer's.
    """
    from deebert.export.onnx_runner import Runner

    runner, texts = Runner(folder), sample(classifier)
    inputs = runner.encode([runner.checked(text) for text in texts])
    if inputs != classifier.encode(texts):
        raise UserError(
            f"{type(classifier.tokenizer).__name__} cannot be exported: it does more than its "
            "tokenizer.json says"
        )
    expected_NLC = classifier.engine.at(0.0).run(inputs, all_ramps=True).ramps_NLC
    assert expected_NLC is not None
    ramps_NLC = torch.from_numpy(runner.run(inputs, 0.0).ramps_NLC)
    return (ramps_NLC - expected_NLC).abs().amax((0, 2)).tolist()
