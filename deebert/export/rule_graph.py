"""The exit rule as an ONNX graph: the file `exit_rule.onnx` of an exported folder.

torch translates the function of the rule, so that the runner needs no code of its own for a rule.
The graph is compared with the function before it is used. The module knows no models and no files.
Shapes: B inputs, L layers (= ramps), K ramps that the graph reads (1, or L if the rule looks back),
C labels.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deebert.errors import UserError, first_line
from deebert.exits.rules import ExitScores, Rule
from deebert.export.onnx_runner import Block, ExitRule

EXAMPLE_ROWS = 3  # torch treats batches of 0 and 1 as special cases

_graphs: dict[tuple[Any, ...], bytes] = {}  # an export takes seconds


class _Scores(nn.Module):
    """The function of a rule, as the module that torch exports."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, read: Tensor, prior: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute scores (B, K) and, if the rule has answers of its own, answers (B, K, C)."""
        priors = () if prior is None else (prior,)
        result = self.rule.function(read, *priors, **self.rule.options)
        return tuple(result) if isinstance(result, ExitScores) else (result,)


def rule_graph(rule: Rule, num_layers: int) -> bytes:
    """Return the content of `exit_rule.onnx`.

    Inputs: `logits` (B, K, C) after the temperatures, or `learned_score` (B, K); for a relative
    rule also `prior` (C,). Outputs: `score` (B, K) and, if the answers are not the logits of the
    ramps, `answer` (B, K, C).

    Args:
        rule: the exit rule. Its temperatures and its prior are not part of the graph.
        num_layers: L.

    Raises:
        UserError: the rule cannot be exported.
    """
    num_ramps = num_layers if rule.looks_back else 1
    key = (rule.function, repr(rule.options), num_ramps, rule.num_labels)
    if key not in _graphs:
        refused = f"exit={rule.name} cannot be exported: its function"
        try:  # torch, ONNX Runtime and the user's function may fail in any way
            content = _exported(rule, num_ramps)
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            raise UserError(f"{refused} cannot be translated to ONNX: {reason}") from error
        try:
            difference = _difference(rule, ExitRule(Block(content, None)), num_layers)
        except Exception as error:
            raise UserError(
                f"{refused}, translated to ONNX, fails with another number of rows (write "
                f"logits.shape[0] instead of len(logits)): {first_line(error)}"
            ) from error
        if difference is not None:
            raise UserError(f"{refused}, translated to ONNX, gives another {difference}")
        _graphs[key] = content
    return _graphs[key]


def _exported(rule: Rule, num_ramps: int) -> bytes:
    """Translate the function of a rule."""
    size = (EXAMPLE_ROWS, num_ramps, rule.num_labels)
    read = torch.randn(size[: 3 if rule.reads == "logits" else 2])
    prior = [torch.full(size[2:], 1 / size[2], dtype=torch.float64)] * rule.relative
    batch = {0: torch.export.Dim("batch")}
    with _silent(), torch.no_grad():
        program = torch.onnx.export(
            _Scores(rule).eval(),
            (read, *prior),
            dynamo=True,
            verbose=False,
            input_names=[rule.reads, "prior"][: 1 + len(prior)],
            output_names=["score", "answer"],
            dynamic_shapes=(batch, None)[: 1 + len(prior)],
        )
    assert program is not None
    graph: Any = program.model_proto
    del graph.metadata_props[:]
    for each in (graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.functions):
        del each.metadata_props[:]  # the source lines and paths of this machine
    return bytes(graph.SerializeToString())


def _difference(rule: Rule, exported: ExitRule, num_layers: int) -> str | None:
    """Compare an exported rule with its function, after each ramp of random inputs.

    Returns:
        What differs, or None.
    """
    random = torch.Generator().manual_seed(0)
    rows, num_labels = EXAMPLE_ROWS + 4, rule.num_labels
    logits_NLC = 3 * torch.randn(rows, num_layers, num_labels, generator=random)
    logits_NLC[:2] *= 1e4  # so sure that probabilities underflow
    learned_score_NL = torch.rand(rows, num_layers, generator=random)
    rule = replace(rule, temperatures=None)
    if rule.relative:
        total = num_labels * (num_labels + 1) / 2
        rule = rule.fitted(prior=[(label + 1) / total for label in range(num_labels)])
    for ramps in range(1, num_layers + 1):
        expected = rule(logits_NLC[:, :ramps], learned_score_NL[:, :ramps])
        scores = exported(
            logits_NLC[:, :ramps].numpy(), learned_score_NL[:, ramps - 1].numpy(), rule.prior
        )
        for name, values, right in zip(("score", "answer"), scores, expected, strict=True):
            expected_B = right[:, -1].numpy()
            if not np.allclose(values, expected_B, rtol=1e-4, atol=1e-5, equal_nan=True):
                return name
    return None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporter from writing lines that mean nothing to a user."""
    disabled, written = logging.root.manager.disable, io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(written),
        contextlib.redirect_stderr(written),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
