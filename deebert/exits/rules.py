"""Exit rules: pure functions from the logits of the ramps to exit scores.

A rule computes an exit score and an answer for each ramp. A row leaves at the first ramp whose
score is strictly under its threshold, so with a threshold of 0 no row leaves before the last layer.
The default rule is the paper's: entropy (section 3.3). A new rule is one function under
`exit_rule`; a file `conf/exit/NAME.yaml` names it for the command line.

The module knows nothing of models, tasks or files. Shapes: N rows, L layers (= ramps), C labels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deebert.errors import UserError, is_whole
from deebert.exits.registry import NO_PRIOR as NO_PRIOR
from deebert.exits.registry import NOT_LEARNED as NOT_LEARNED
from deebert.exits.registry import RULES as RULES
from deebert.exits.registry import ExitScores as ExitScores
from deebert.exits.registry import Rule as Rule
from deebert.exits.registry import exit_rule as exit_rule
from deebert.exits.registry import named as named
from deebert.models.ramp_readers import Graph


def _entropy_nodes(graph: Graph, logits: str, prior: list[float] | None = None) -> str:
    log_probabilities = graph.op("LogSoftmax", logits, axis=-1)
    terms = graph.op("Mul", graph.op("Exp", log_probabilities), log_probabilities)
    return graph.op("Neg", graph.op("ReduceSum", terms, graph.integer([-1]), keepdims=0))


def _relative_entropy_nodes(graph: Graph, logits: str, prior: list[float] | None) -> str:
    excess = graph.constant(_excess(torch.tensor(prior, dtype=torch.float64)).numpy())
    terms = graph.op("Mul", graph.op("Softmax", logits, axis=-1), excess)
    more = graph.op("ReduceSum", terms, graph.integer([-1]), keepdims=0)
    return graph.op("Add", _entropy_nodes(graph, logits), more)


@exit_rule("entropy", looks_back=False, nodes=_entropy_nodes)
def entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of softmax(logits) in nats: (..., C) -> (...), between 0 and ln C.

    Paper, section 3.3. It is computed from a float32 log-softmax. The original code computes
    `-sum p log p` from probabilities, which is NaN when one underflows: its most certain rows never
    leave.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


@exit_rule("relative_entropy", looks_back=False, relative=True, nodes=_relative_entropy_nodes)
def relative_entropy(logits: Tensor, prior: Tensor | Sequence[float]) -> Tensor:
    """Compute ln(1 / min q) - KL(p || q) for a prior q: (..., C) -> (...), 0 to ln(1 / min q).

    p are the ramp's probabilities. On an unbalanced task, a ramp that knows nothing of a row
    predicts the most frequent class, which has a low entropy: such rows leave first, all with the
    same answer. Relative to the class frequencies they leave last. A uniform prior gives entropy.

    Args:
        logits: (..., C).
        prior: q, C shares above 0.
    """
    excess_C = _excess(torch.as_tensor(prior, dtype=torch.float64))
    # A sum of terms that are all >= 0: nothing cancels where the ramp is certain.
    return entropy(logits) + (torch.softmax(logits.float(), -1) * excess_C).sum(-1)


def _excess(share_C: Tensor) -> Tensor:
    """Return ln(q / min q) of a prior q: (C,) float64 -> (C,) float32."""
    return (share_C / share_C.min()).log().float()


def _others_nodes(graph: Graph, logits: str, prior: list[float] | None = None) -> str:
    """Add the sum of all probabilities but the largest, as `probability` computes it."""
    return graph.op("ReduceSum", _all_but_largest(graph, logits), graph.integer([-1]), keepdims=0)


def _margin_nodes(graph: Graph, logits: str, prior: list[float] | None = None) -> str:
    others = _all_but_largest(graph, logits)
    total = graph.op("ReduceSum", others, graph.integer([-1]), keepdims=0)
    second = graph.op("ReduceMax", others, graph.integer([-1]), keepdims=0)
    return graph.op("Add", total, second)


def _all_but_largest(graph: Graph, logits: str) -> str:
    """Add the probabilities, with 0 for the largest: (1, C) -> (1, C)."""
    probabilities = graph.op("Softmax", logits, axis=-1)
    largest = graph.op("Mul", probabilities, graph.op("Hardmax", logits, axis=-1))
    return graph.op("Sub", probabilities, largest)


@exit_rule("probability", largest=1.0, looks_back=False, nodes=_others_nodes)
def probability(logits: Tensor) -> Tensor:
    """Compute 1 - the largest probability: (..., C) -> (...), between 0 and 1 - 1/C.

    Sledgehammer and SWEET use this rule. It is computed as a sum over the other classes, because
    1 - p in float32 is 0 for all p above 1 - 6e-8.
    """
    ordered = torch.softmax(logits.float(), dim=-1).sort(-1, descending=True).values
    return ordered[..., 1:].sum(-1)


@exit_rule("margin", largest=1.0, looks_back=False, nodes=_margin_nodes)
def margin(logits: Tensor) -> Tensor:
    """Compute 1 - (largest - second largest probability): (..., C) -> (...), between 0 and 1."""
    ordered = torch.softmax(logits.float(), dim=-1).sort(-1, descending=True).values
    return ordered[..., 1:].sum(-1) + ordered[..., 1]


@exit_rule("patience", largest=1.0)
def patience(logits_NLC: Tensor) -> Tensor:
    """Compute 1 / (1 + number of agreements in a row): (N, L, C) -> (N, L).

    A ramp agrees if it predicts the same class as the ramp before it. PABEE (Zhou et al., NeurIPS
    2020) leaves after p agreements in a row. The threshold for that is 1/p, because
    1 / (1 + agreements) < 1/p is the same condition as agreements >= p.
    """
    return 1 / (1 + _run_length(_agrees(logits_NLC, first=0)))


@exit_rule("confident_patience")
def confident_patience(logits_NLC: Tensor, patience: int = 2) -> Tensor:
    """Compute the largest entropy of the last `patience` ramps, inf where they disagree: -> (N, L).

    PCEE (Zhang et al., NAACL Findings 2022) leaves when several ramps in a row are certain. Here
    they must also agree.

    Raises:
        UserError: `patience` is not a whole number of 1 or more.
    """
    _check_patience(patience)
    agrees_NL = _agrees(logits_NLC, first=1)
    score_NL = _largest_of_last(entropy(logits_NLC), patience)
    # The first of the `patience` ramps need not agree with the ramp before it.
    together_NL = _largest_of_last((1 - agrees_NL).float(), patience - 1) == 0
    return score_NL.where(together_NL, torch.inf)


@exit_rule("change", regression=True)
def change(values_NL1: Tensor, patience: int = 1) -> Tensor:
    """Compute the largest |y_i - y_(i-1)| of the last `patience` steps: (N, L, 1) -> (N, L).

    This is PABEE's rule for STS-B, a regression. The threshold has the unit of the label. The score
    of the first `patience` ramps is inf.

    Raises:
        UserError: `patience` is not a whole number of 1 or more.
    """
    _check_patience(patience)
    values_NL = values_NL1.squeeze(-1).float()
    step_NL = torch.full_like(values_NL, torch.inf)
    step_NL[:, 1:] = (values_NL[:, 1:] - values_NL[:, :-1]).abs()
    return _largest_of_last(step_NL, patience)


@exit_rule("ensemble")
def ensemble(logits_NLC: Tensor) -> ExitScores:
    """Answer with the mean probability of the ramps so far, and score its entropy (section 5)."""
    shares_NLC = torch.softmax(logits_NLC.double(), -1).cumsum(1)
    mean_NLC = shares_NLC / torch.arange(1, shares_NLC.shape[1] + 1)[:, None]
    # A tensor, as ONNX rounds a Python number to float32: 0.
    smallest = torch.tensor(torch.finfo(torch.float64).tiny, dtype=torch.float64)
    logits = mean_NLC.maximum(smallest).log().float()
    return ExitScores(entropy(logits), logits)


@exit_rule("vote", largest=1.0)
def vote(logits_NLC: Tensor) -> ExitScores:
    """Answer with the class that most ramps so far predict; the score is 1 / its votes.

    With a threshold of 1/p a row leaves when a class has more than p votes. Of classes with equal
    votes the one with the larger mean probability is the answer.
    """
    shares_NLC = torch.softmax(logits_NLC.float(), -1)
    ballots_NLC = torch.nn.functional.one_hot(logits_NLC.argmax(-1), logits_NLC.shape[-1])
    votes_NLC = ballots_NLC.cumsum(1)
    num_L = torch.arange(1, logits_NLC.shape[1] + 1)
    tie_break_NLC = shares_NLC.cumsum(1) / (2 * num_L[:, None])  # under 1, so less than a vote
    return ExitScores(1 / votes_NLC.amax(-1).float(), votes_NLC + tie_break_NLC)


def _learned_nodes(graph: Graph, learned_score: str, prior: list[float] | None) -> str:
    return learned_score


@exit_rule(
    "learned", largest=1.0, regression=None, looks_back=False, reads="learned_score",
    nodes=_learned_nodes,
)  # fmt: skip
def learned(learned_score_NL: Tensor) -> Tensor:
    """Return the learned exit scores as they are: (N, L) -> (N, L), between 0 and 1.

    They follow BERxiT (learning to exit) or CATs (agreement with the final classifier); see
    `ramps.RampKind`.
    """
    return learned_score_NL


def default(num_labels: int) -> Rule:
    """Return the paper's rule, or PABEE's rule for a regression, which has no entropy."""
    return named("change" if num_labels == 1 else "entropy", num_labels)


def _check_patience(patience: int) -> None:
    if not is_whole(patience) or patience < 1:
        raise UserError(f"exit.patience={patience} must be a whole number of 1 or more")


def _agrees(logits_NLC: Tensor, first: int) -> Tensor:
    """Return 1 where a ramp predicts as the ramp before, else 0; `first` for ramp 1: -> (N, L)."""
    labels_NL = logits_NLC.argmax(-1)
    agrees_NL = torch.full_like(labels_NL, first)
    agrees_NL[:, 1:] = labels_NL[:, 1:] == labels_NL[:, :-1]
    return agrees_NL


def _run_length(true_NL: Tensor) -> Tensor:
    """Count the ones in a row that end at each position: (N, L) of 0 and 1 -> (N, L)."""
    runs = torch.zeros_like(true_NL)
    runs[:, 0] = true_NL[:, 0]
    for layer in range(1, true_NL.shape[1]):
        runs[:, layer] = (runs[:, layer - 1] + 1) * true_NL[:, layer]
    return runs


def _largest_of_last(values_NL: Tensor, count: int) -> Tensor:
    """Return the largest of the last `count` values, inf where there are fewer: -> (N, L)."""
    if count < 1:
        return torch.zeros_like(values_NL)
    before = values_NL.new_full(
        (values_NL.shape[0], count - 1), torch.inf
    )  # len() is a constant in ONNX
    return torch.cat([before, values_NL], 1).unfold(1, count, 1).amax(-1)


def limits(thresholds: Sequence[float] | float, num_layers: int) -> Tensor:
    """Return the threshold of each ramp except the last: (L-1,) float64.

    Args:
        thresholds: one number >= 0 for all ramps, or L-1 numbers.
        num_layers: L.

    Raises:
        UserError: the number of thresholds is wrong, or one is below 0 or NaN.
    """
    values = torch.as_tensor(thresholds, dtype=torch.float64)
    if values.ndim and len(values) != num_layers - 1:
        raise UserError(
            f"threshold={values.tolist()} has {len(values)} values; give one for all ramps, or "
            f"one for each ramp before the last ({num_layers - 1})"
        )
    if not (values >= 0).all():  # also False for NaN
        raise UserError(f"threshold={thresholds} must be >= 0 (0 never exits)")
    return values.expand(num_layers - 1)


def exit_layer(scores_NL: Tensor, thresholds: Tensor | list[float] | float) -> Tensor:
    """Return the layer at which each row leaves: (N, L) -> (N,), 1-based.

    A row leaves at the first ramp whose score is strictly under its threshold. A row that leaves at
    no ramp before the last one is answered by the last ramp, the final classifier.

    Args:
        scores_NL: exit scores of all ramps; the last column is not read.
        thresholds: one number for all ramps, or L-1 numbers.
    """
    num_rows, num_layers = scores_NL.shape
    # A Python number would be compared in float64. The comparison has the scores' precision.
    limits = torch.as_tensor(thresholds, dtype=scores_NL.dtype).expand(num_layers - 1)
    leaves = scores_NL[:, :-1] < limits
    always = torch.ones(num_rows, 1, dtype=torch.bool)
    return torch.cat([leaves, always], dim=1).int().argmax(1) + 1
