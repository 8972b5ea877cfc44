"""Exit rules: a score per ramp, and when to leave. Pure functions on logits.

A rule looks at the logits of every ramp and says how unsure each ramp is and what would be answered
there. A row leaves at the first ramp whose score is strictly under its threshold, so a threshold of
0 never exits. The default is the paper's: entropy (section 3.3).

Knows nothing of models, tasks or files. Shapes: N rows, L layers (= ramps), C labels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deebert.errors import UserError, is_number, is_whole, unknown


class ExitScores(NamedTuple):
    """What a rule makes of the logits of N rows.

    Attributes:
        score_NL: how unsure each ramp is, >= 0 (inf: no opinion yet).
        answer_NLC: the logits that a row leaving there is answered with.
    """

    score_NL: Tensor
    answer_NLC: Tensor


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats: (..., C) -> (...), between 0 and ln C.

    Paper, section 3.3. Computed from a float32 log-softmax: the original's `-sum p log p` on
    probabilities turns to NaN when one underflows, so its most certain rows never leave.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def relative_entropy(logits: Tensor, prior: Sequence[float]) -> Tensor:
    """How little was learned beyond a prior q: (..., C) -> (...), between 0 and ln(1 / min q).

    ln(1 / min q) - KL(p || q), p the ramp's probabilities. Entropy takes a guess at the most
    frequent class for certainty, so on unbalanced tasks rows of which nothing is known leave first,
    all with the same answer; here such a guess says nothing. With a uniform prior it is entropy.

    Args:
        prior: q, C shares above 0.
    """
    share_C = torch.tensor(prior, dtype=torch.float64)
    excess_C = (share_C / share_C.min()).log().float()
    # As a sum of what is >= 0, so that nothing cancels where the ramp is sure.
    return entropy(logits) + (torch.softmax(logits.float(), -1) * excess_C).sum(-1)


def probability(logits: Tensor) -> Tensor:
    """1 - the largest probability: (..., C) -> (...), between 0 and 1 - 1/C (sledgehammer, SWEET).

    As a sum over the other classes: 1 - p in float32 would be 0 for all p beyond 1 - 6e-8.
    """
    ordered = torch.softmax(logits.float(), dim=-1).sort(-1, descending=True).values
    return ordered[..., 1:].sum(-1)


def margin(logits: Tensor) -> Tensor:
    """1 - (largest probability - second largest): (..., C) -> (...), between 0 and 1."""
    ordered = torch.softmax(logits.float(), dim=-1).sort(-1, descending=True).values
    return ordered[..., 1:].sum(-1) + ordered[..., 1]


def patience(logits_NLC: Tensor) -> Tensor:
    """1 / (1 + how many ramps in a row have agreed with the one before): (N, L, C) -> (N, L).

    PABEE (Zhou et al., NeurIPS 2020): leave after p agreements in a row. As a threshold that is
    1/p: 1/(1 + agreements) < 1/p means agreements >= p.
    """
    return 1 / (1 + _run_length(_agrees(logits_NLC, first=0)))


def confident_patience(logits_NLC: Tensor, patience: int = 2) -> Tensor:
    """Largest entropy of the last `patience` ramps where they agree, else inf: -> (N, L).

    After PCEE (Zhang et al., NAACL Findings 2022), which leaves when several ramps in a row are
    sure; here they must also agree.
    """
    _check_patience(patience)
    agrees_NL = _agrees(logits_NLC, first=1)
    score_NL = _largest_of_last(entropy(logits_NLC), patience)
    # The first of `patience` ramps need not agree with the one before it.
    together_NL = _largest_of_last((1 - agrees_NL).float(), patience - 1) == 0
    return score_NL.where(together_NL, torch.inf)


def change(values_NL1: Tensor, patience: int = 1) -> Tensor:
    """For a regression: largest |y_i - y_(i-1)| of the last `patience` steps: -> (N, L).

    PABEE's rule for STS-B; the threshold is in units of the label. inf for the first ramps.
    """
    _check_patience(patience)
    values_NL = values_NL1.squeeze(-1).float()
    step_NL = torch.full_like(values_NL, torch.inf)
    step_NL[:, 1:] = (values_NL[:, 1:] - values_NL[:, :-1]).abs()
    return _largest_of_last(step_NL, patience)


def ensemble(logits_NLC: Tensor) -> ExitScores:
    """Entropy and answer of the mean probability of the ramps so far (paper, section 5)."""
    shares_NLC = torch.softmax(logits_NLC.double(), -1).cumsum(1)
    mean_NLC = shares_NLC / torch.arange(1, shares_NLC.shape[1] + 1)[:, None]
    logits = mean_NLC.clamp_min(torch.finfo(torch.float64).tiny).log().float()
    return ExitScores(entropy(logits), logits)


def vote(logits_NLC: Tensor) -> ExitScores:
    """1 / the votes of the leading class among the ramps so far; the answer is that class.

    A threshold of 1/p leaves with more than p votes. Ties go to the class with more probability.
    """
    shares_NLC = torch.softmax(logits_NLC.float(), -1)
    ballots_NLC = torch.nn.functional.one_hot(logits_NLC.argmax(-1), logits_NLC.shape[-1])
    votes_NLC = ballots_NLC.cumsum(1)
    num_L = torch.arange(1, logits_NLC.shape[1] + 1)
    tie_break_NLC = shares_NLC.cumsum(1) / (2 * num_L[:, None])  # under 1: never wins a vote
    return ExitScores(1 / votes_NLC.amax(-1).float(), votes_NLC + tie_break_NLC)


def learned(learned_score_NL: Tensor) -> Tensor:
    """What the model has learned to say of itself: (N, L) -> (N, L), between 0 and 1.

    BERxiT's learning to exit, or CATs' agreement with the final classifier (`ramps.RampKind`).
    """
    return learned_score_NL


def _check_patience(patience: int) -> None:
    if not is_whole(patience) or patience < 1:
        raise UserError(f"exit.score.patience={patience} must be a whole number of 1 or more")


def _agrees(logits_NLC: Tensor, first: int) -> Tensor:
    """1 where a ramp predicts as the one before it, else 0; `first` for the first: -> (N, L)."""
    labels_NL = logits_NLC.argmax(-1)
    agrees_NL = torch.full_like(labels_NL, first)
    agrees_NL[:, 1:] = labels_NL[:, 1:] == labels_NL[:, :-1]
    return agrees_NL


def _run_length(true_NL: Tensor) -> Tensor:
    """How many ones in a row end here: (N, L) of 0 and 1 -> (N, L)."""
    runs = torch.zeros_like(true_NL)
    runs[:, 0] = true_NL[:, 0]
    for layer in range(1, true_NL.shape[1]):
        runs[:, layer] = (runs[:, layer - 1] + 1) * true_NL[:, layer]
    return runs


def _largest_of_last(values_NL: Tensor, count: int) -> Tensor:
    """The largest of the last `count` values, inf where there are fewer: (N, L) -> (N, L)."""
    if count < 1:
        return torch.zeros_like(values_NL)
    before = values_NL.new_full((len(values_NL), count - 1), torch.inf)
    return torch.cat([before, values_NL], 1).unfold(1, count, 1).amax(-1)


Score = Callable[..., Tensor | ExitScores]
NOT_LEARNED = (
    "exit={} needs a learned score, and these ramps have none: train them with ramp.predicts=wrong "
    "or disagrees, or use another exit rule"
)
NO_PRIOR = (
    "exit={} needs a prior, which target_saving= and target_speedup= find on the calibration rows; "
    "with anything else say exit.prior=[...] to evaluate.py, or use exit=entropy"
)


@dataclass(frozen=True)
class Rule:
    """An exit rule as `conf/exit/` names it.

    Attributes:
        name: what it is called in results and messages.
        score: logits (N, L, C) -> scores (N, L), or a `ExitScores` where a row leaving at a ramp is
            not answered by that ramp alone.
        num_labels: C; 1 for a regression.
        largest: from about here on everything leaves at the first ramps; None for 1, or ln C
            (relative: ln of 1 / the smallest share) where that is more.
        regression: does it fit a regression (and nothing else)? None: it fits all.
        looks_back: does a ramp's score depend on the ramps before it, too? Where it does not, the
            engine evaluates only ramps that an input may leave at.
        reads: what `score` is given: `logits`, or `learned_score`, the learned exit scores (N, L).
        temperatures: (L,) divides the logits of each ramp first; None for 1.
        relative: does `score` also take a prior?
        prior: (C,) shares of the classes, for a relative rule; None: it is to be found on the
            calibration rows of a target (`priors.search`).
        options: what else tells this rule from others of its name, for results.json.
    """

    name: str
    score: Score
    num_labels: int
    largest: float | None = None
    regression: bool | None = False
    looks_back: bool = True
    reads: str = "logits"
    temperatures: Tensor | None = None
    relative: bool = False
    prior: list[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.regression is not None and self.regression != (self.num_labels == 1):
            why = (
                f"exit={self.name} needs classes; a regression has one output, whose entropy is "
                "always 0: use exit=change"
                if self.num_labels == 1
                else f"exit={self.name} is for a regression; use exit=entropy, or another"
            )
            raise UserError(why)
        if self.prior is not None:
            if not self.relative:
                raise UserError(
                    f"exit.prior={self.prior} is for exit=relative_entropy; exit={self.name} has "
                    "no prior"
                )
            numbers = isinstance(self.prior, list) and all(map(_is_share, self.prior))
            if not numbers or len(self.prior) != self.num_labels:
                raise UserError(
                    f"exit.prior={self.prior} must be {self.num_labels} shares above 0, one for "
                    "each class"
                )
        if self.reads == "learned_score" and self.looks_back:
            raise UserError(
                f"exit={self.name}: a rule on learned scores judges each ramp alone; say "
                "exit.looks_back=false"
            )

    def __call__(
        self, logits_NLC: Tensor, learned_score_NL: Tensor | None = None, first: int = 0
    ) -> ExitScores:
        """Scores and answers of every ramp, or of the first so many.

        Args:
            learned_score_NL: learned exit scores, where the model has them.
            first: how many ramps come before these (only where the rule does not look back).

        Raises:
            UserError: the rule's function gives something else than scores (N, L), or it reads
                learned scores and there are none.
        """
        if self.temperatures is not None:
            temperatures_L = self.temperatures[first : first + logits_NLC.shape[1]]
            logits_NLC = logits_NLC / temperatures_L[:, None]
        read = logits_NLC if self.reads == "logits" else learned_score_NL
        if read is None:
            raise UserError(NOT_LEARNED.format(self.name))
        if self.needs_prior:
            raise UserError(NO_PRIOR.format(self.name))
        found = self.score(read, self.prior) if self.relative else self.score(read)
        exit_scores = found if isinstance(found, ExitScores) else ExitScores(found, logits_NLC)
        shape = logits_NLC.shape[:2]
        if not isinstance(exit_scores.score_NL, Tensor) or exit_scores.score_NL.shape != shape:
            raise UserError(
                f"exit={self.name}: its function must give a tensor of scores (rows, ramps) = "
                f"{tuple(shape)}, or ExitScores (exit.score)"
            )
        return exit_scores

    @property
    def needs_prior(self) -> bool:
        """Has a prior to be found first?"""
        return self.relative and self.prior is None

    @property
    def fit(self) -> dict[str, list[float] | None]:
        """What calibration rows may find for a rule; `fitted` takes it again."""
        found = self.temperatures
        return {"temperatures": None if found is None else found.tolist(), "prior": self.prior}

    def fitted(
        self, temperatures: list[float] | None = None, prior: list[float] | None = None
    ) -> "Rule":
        """The same rule with these, where they are given."""
        scales = self.temperatures if temperatures is None else torch.tensor(temperatures).float()
        return replace(self, temperatures=scales, prior=self.prior if prior is None else prior)

    def uniform(self) -> "Rule":
        """The same rule, or with the prior that makes it entropy where one has to be found."""
        return (
            self.fitted(prior=[1 / self.num_labels] * self.num_labels) if self.needs_prior else self
        )

    def grid(self, num: int = 200) -> list[float]:
        """Thresholds from conservative to aggressive that do not depend on any data."""
        rarest = 1 / self.num_labels
        if self.prior is not None:
            rarest = min(self.prior) / sum(self.prior)
        top = (self.largest or max(1.0, -math.log(rarest))) * 1.01
        # Four digits, so that the one that is printed is the one that was tested.
        return [float(f"{top * 10 ** (-4 * (num - 1 - i) / (num - 1)):.4g}") for i in range(num)]

    def tempered(self, logits_NLC: Tensor, labels_N: Tensor) -> "Rule":
        """The same rule with a temperature per ramp, fitted on these rows (Guo et al. 2017)."""
        found = [_temperature(logits_NC, labels_N) for logits_NC in logits_NLC.unbind(1)]
        return replace(self, temperatures=torch.tensor(found))


# The rules of conf/exit/ for whoever has no Hydra: what their files say beside the name.
RULES: dict[str, dict[str, Any]] = {
    "entropy": {"score": entropy, "looks_back": False},
    "relative_entropy": {"score": relative_entropy, "looks_back": False, "relative": True},
    "probability": {"score": probability, "largest": 1.0, "looks_back": False},
    "margin": {"score": margin, "largest": 1.0, "looks_back": False},
    "patience": {"score": patience, "largest": 1.0},
    "confident_patience": {"score": confident_patience, "options": {"patience": 2}},
    "ensemble": {"score": ensemble},
    "vote": {"score": vote, "largest": 1.0},
    "change": {"score": change, "regression": True, "options": {"patience": 1}},
    "learned": {
        "score": learned, "largest": 1.0, "regression": None, "looks_back": False,
        "reads": "learned_score",
    },
}  # fmt: skip


def named(name: str, num_labels: int) -> Rule:
    """The rule of this name.

    Raises:
        UserError: there is none, or it does not fit the number of labels.
    """
    if name not in RULES:
        raise unknown("exit", name, sorted(RULES), "exit")
    return Rule(name, num_labels=num_labels, **RULES[name])


def default(num_labels: int) -> Rule:
    """The paper's rule; for a regression, which has no entropy, PABEE's."""
    return named("change" if num_labels == 1 else "entropy", num_labels)


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 < value < 1e30


def _temperature(logits_NC: Tensor, labels_N: Tensor) -> float:
    """The T between 0.05 and 20 of least cross-entropy: convex in 1/T, so a ternary search."""

    def loss(log_temperature: float) -> float:
        logits = logits_NC / math.exp(log_temperature)
        return torch.nn.functional.cross_entropy(logits, labels_N).item()

    low, high = math.log(0.05), math.log(20)
    while high - low > 0.02:
        third = (high - low) / 3
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    return math.exp((low + high) / 2)


def limits(thresholds: Sequence[float] | float, num_layers: int) -> Tensor:
    """The threshold of each ramp but the last: (L-1,) float64.

    Args:
        thresholds: one number >= 0 for all ramps, or L-1 numbers.

    Raises:
        UserError: they are not as many, or one is no such number.
    """
    found = torch.as_tensor(thresholds, dtype=torch.float64)
    if found.ndim and len(found) != num_layers - 1:
        raise UserError(
            f"threshold={found.tolist()} has {len(found)} values; give one for all ramps, or one "
            f"for each ramp before the last ({num_layers - 1})"
        )
    if not (found >= 0).all():  # NaN is not
        raise UserError(f"threshold={thresholds} must be >= 0 (0 never exits)")
    return found.expand(num_layers - 1)


def exit_layer(scores_NL: Tensor, thresholds: Tensor | list[float] | float) -> Tensor:
    """The layer at which each row leaves: (N, L) -> (N,), 1-based.

    A row leaves at the first ramp whose score is strictly under its threshold (so 0 never exits);
    the last ramp is the final classifier and takes whatever is left.

    Args:
        scores_NL: uncertainty of every ramp; the last column is not looked at.
        thresholds: one number for all ramps, or L-1 numbers.
    """
    num_rows, num_layers = scores_NL.shape
    # A Python number compares in float64; keep the comparison in the scores' own precision.
    limits = torch.as_tensor(thresholds, dtype=scores_NL.dtype).expand(num_layers - 1)
    leaves = scores_NL[:, :-1] < limits
    always = torch.ones(num_rows, 1, dtype=torch.bool)
    return torch.cat([leaves, always], dim=1).int().argmax(1) + 1
