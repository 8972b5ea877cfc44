"""The registry of exit rules: a rule is one function under `exit_rule`, found by its name.

Python, the service, file prediction, the export and the configurations build a rule with `named`.
The package's own rules are in `rules`. The module knows nothing of models, tasks or files. Shapes:
N rows, L layers (= ramps), C labels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from deebert.errors import UserError, first_line, is_number, unknown
from deebert.models.ramp_readers import Graph


class ExitScores(NamedTuple):
    """The exit scores and the answers that a rule computes from the logits of N rows.

    Attributes:
        score_NL: exit score of each ramp, >= 0; inf where the rule has no score yet.
        answer_NLC: logits of the answer that a row gets if it leaves at that ramp.
    """

    score_NL: Tensor
    answer_NLC: Tensor


RuleFunction = Callable[..., Tensor | ExitScores]
# Adds the nodes of a score to an ONNX graph: (graph, name of what the rule reads, prior) -> name.
ScoreNodes = Callable[[Graph, str, "list[float] | None"], str]
F = TypeVar("F", bound=RuleFunction)

READS = ("logits", "learned_score")
NOT_LEARNED = (
    "exit={} needs a learned score, and these ramps have none: train them with ramp.predicts=wrong "
    "or disagrees, or use another exit rule"
)
NO_PRIOR = (
    "exit={} needs a prior, which target_saving= and target_speedup= find on the calibration rows; "
    "with anything else evaluate with exit.prior=[...], or use exit=entropy"
)


@dataclass(frozen=True)
class Rule:
    """An exit rule for a task: a registered function (`exit_rule`) and the values of its options.

    Attributes:
        name: name in configurations, results and messages.
        function: function from logits (N, L, C) to scores (N, L), or to `ExitScores` where the
            answer of a row does not come from the ramp at which it leaves alone.
        num_labels: C; 1 for a regression.
        largest: about the threshold at which every row leaves at the first ramps. None stands for
            the larger of 1 and ln C (with a prior: ln of 1 / the smallest share).
        regression: True for a rule that fits regressions only, False for classes only, None for
            both.
        looks_back: True if the score of a ramp depends on the ramps before it, too. If not, the
            engine evaluates only the ramps at which an input may leave.
        reads: argument of the function: `logits`, or `learned_score`, the learned exit scores
            (N, L).
        temperatures: (L,) divisors of the logits of each ramp; None for 1.
        relative: True if the function also takes a prior: a tensor (C,) in float64.
        prior: (C,) shares of the classes, for a relative rule. None: the prior is still to be
            fitted on the calibration rows of a target (`fitting.with_prior`).
        options: the keyword arguments of the function, for results.json, too.
        nodes: adds the score of one ramp to an ONNX graph, so that the graph itself can decide
            (`inference.exit_graphs`). None: torch decides.
    """

    name: str
    function: RuleFunction
    num_labels: int
    largest: float | None = None
    regression: bool | None = False
    looks_back: bool = True
    reads: str = "logits"
    temperatures: Tensor | None = None
    relative: bool = False
    prior: list[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    nodes: ScoreNodes | None = None

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
                f"exit={self.name}: a rule on learned scores reads each ramp alone; say "
                "looks_back=False"
            )

    def __call__(
        self, logits_NLC: Tensor, learned_score_NL: Tensor | None = None, first: int = 0
    ) -> ExitScores:
        """Compute the exit score and the answer of each ramp.

        Args:
            logits_NLC: logits of all ramps, or of consecutive ramps.
            learned_score_NL: learned exit scores, if the model has them.
            first: number of ramps before these ramps; 0 if the rule looks back.

        Raises:
            UserError: the rule's function returns something other than scores (N, L), there are no
                learned scores though the rule reads them, or the rule has no prior yet.
        """
        if self.temperatures is not None:
            temperatures_L = self.temperatures[first : first + logits_NLC.shape[1]]
            logits_NLC = logits_NLC / temperatures_L[:, None]
        read = logits_NLC if self.reads == "logits" else learned_score_NL
        if read is None:
            raise UserError(NOT_LEARNED.format(self.name))
        if self.needs_prior:
            raise UserError(NO_PRIOR.format(self.name))
        prior = [torch.tensor(self.prior, dtype=torch.float64)] if self.relative else []
        result = self.function(read, *prior, **self.options)
        exit_scores = result if isinstance(result, ExitScores) else ExitScores(result, logits_NLC)
        shape = logits_NLC.shape[:2]
        if not isinstance(exit_scores.score_NL, Tensor) or exit_scores.score_NL.shape != shape:
            raise UserError(
                f"exit={self.name}: its function must give a tensor of scores (rows, ramps) = "
                f"{tuple(shape)}, or ExitScores"
            )
        return exit_scores

    @property
    def needs_prior(self) -> bool:
        """True if a prior has to be fitted before the rule can be applied."""
        return self.relative and self.prior is None

    @property
    def fit(self) -> dict[str, list[float] | None]:
        """The values that are fitted on calibration rows, as arguments of `fitted`."""
        scales = self.temperatures
        return {"temperatures": None if scales is None else scales.tolist(), "prior": self.prior}

    def fitted(
        self, temperatures: list[float] | None = None, prior: list[float] | None = None
    ) -> "Rule":
        """Return a copy of the rule with the values that are not None."""
        scales = self.temperatures if temperatures is None else torch.tensor(temperatures).float()
        return replace(self, temperatures=scales, prior=self.prior if prior is None else prior)

    def uniform(self) -> "Rule":
        """Return the rule itself, or with a uniform prior (entropy) if it needs a prior."""
        return (
            self.fitted(prior=[1 / self.num_labels] * self.num_labels) if self.needs_prior else self
        )

    def grid(self, num: int = 200) -> list[float]:
        """List `num` thresholds from conservative to aggressive, which depend on no data."""
        rarest = 1 / self.num_labels
        if self.prior is not None:
            rarest = min(self.prior) / sum(self.prior)
        top = (self.largest or max(1.0, -math.log(rarest))) * 1.01
        # Four digits, so that the threshold that is printed is the one that was tested.
        return [float(f"{top * 10 ** (-4 * (num - 1 - i) / (num - 1)):.4g}") for i in range(num)]


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 < value < 1e30


RULES: dict[str, Callable[[int], Rule]] = {}  # the registered rules, to call with a num_labels
_tried: set[tuple[RuleFunction, int, str]] = set()  # functions, numbers of labels, options
RESERVED = ("name", "module", "prior")  # other keys of conf/exit/NAME.yaml, so no options


def exit_rule(
    name: str,
    *,
    largest: float | None = None,
    regression: bool | None = False,
    looks_back: bool = True,
    reads: str = "logits",
    relative: bool = False,
    nodes: ScoreNodes | None = None,
) -> Callable[[F], F]:
    """Return a decorator that registers a function as an exit rule.

    The keyword arguments of the function are the options of the rule. Each has a default. The
    function checks their values.

    Args:
        name: name of the rule: `exit=NAME`.
        largest: about the threshold at which every row leaves at the first ramps. None stands for
            the larger of 1 and ln C.
        regression: True for a rule that fits regressions only, False for classes only, None for
            both.
        looks_back: whether the score of a ramp depends on the ramps before it, too. False is
            faster, and checked.
        reads: argument of the function: `logits` (N, L, C), or `learned_score` (N, L).
        relative: whether the second argument of the function is a prior, (C,) in float64.
        nodes: adds the same score to an ONNX graph: what the rule reads of one ramp, (1, C) or
            (1,), -> (1,). It serves one input at a time, and is for a rule that does not look back
            and answers with the logits of the ramp. None: such inputs take a little longer.

    Raises:
        UserError: a value has the wrong type, or the name belongs to another function.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"exit_rule({name!r}): the name must be a text")
    given = {"looks_back": looks_back, "relative": relative}
    given |= {} if regression is None else {"regression": regression}
    for key, value in given.items():
        if not isinstance(value, bool):
            raise UserError(f"exit_rule({name!r}): {key}={value} must be True or False")
    if largest is not None and not (is_number(largest) and largest > 0):
        raise UserError(f"exit_rule({name!r}): largest={largest} must be a number above 0, or None")
    if reads not in READS:
        raise unknown(f"exit_rule({name!r}): reads", reads, READS, "reads")

    def register(function: F) -> F:
        for option, default in _options(function, relative).items():
            if default is Parameter.empty or option in RESERVED:
                why = "needs a default" if default is Parameter.empty else "needs another name"
                raise UserError(f"exit_rule({name!r}): option {option} of its function {why}")
        if name in RULES:
            earlier: Any = RULES[name]
            place, other = (
                (f.__module__, getattr(f, "__qualname__", "")) for f in (function, earlier.args[1])
            )
            if place != other:  # else a module is reloaded, or a notebook's cell run again
                raise UserError(
                    f"exit_rule({name!r}): {other[0]} has a rule of that name; choose another name"
                )
        RULES[name] = partial(
            Rule, name, function, largest=largest, regression=regression, looks_back=looks_back,
            reads=reads, relative=relative, nodes=nodes,
        )  # fmt: skip
        return function

    return register


def _options(function: RuleFunction, relative: bool) -> dict[str, Any]:
    """Return the options of a rule's function with their defaults."""
    parameters = list(signature(function).parameters.values())[2 if relative else 1 :]
    return {each.name: each.default for each in parameters}


def named(name: str, num_labels: int, **options: Any) -> Rule:
    """Return the registered rule of a name, for a task with that many labels.

    The function of the rule is tried on a few logits.

    Args:
        name: name of the rule.
        num_labels: C; 1 for a regression.
        **options: options of the rule that differ from their defaults.

    Raises:
        UserError: there is no such rule, it does not fit the number of labels, it has no such
            option, or its function fails.
    """
    if not isinstance(name, str) or name not in RULES:
        raise unknown("exit", name, RULES, "exit", own=True)
    rule = RULES[name](num_labels)
    defaults = _options(rule.function, rule.relative)
    for option in options:
        if option not in defaults:
            choices = f"choose one of: {', '.join(defaults)}" if defaults else "it has none"
            raise UserError(f"exit.{option}: exit={name} has no such option; {choices}")
    rule = replace(rule, options=defaults | options)
    tried = (rule.function, num_labels, repr(rule.options))
    if tried not in _tried:
        _try_out(rule)
        _tried.add(tried)
    return rule


def _try_out(rule: Rule) -> None:
    """Try a rule on a few logits.

    Raises:
        UserError: the function fails, or an exit score depends on ramps that it must not depend on.
    """
    rule, random = rule.uniform(), torch.Generator().manual_seed(0)
    logits_NLC = torch.randn(8, 4, rule.num_labels, generator=random)
    learned_score_NL = torch.rand(8, 4, generator=random)
    start, end = (0, 3) if rule.looks_back else (3, 4)
    try:
        rule(torch.zeros(2, 4, rule.num_labels), torch.zeros(2, 4))
        together = rule(logits_NLC, learned_score_NL)
        some = rule(logits_NLC[:, start:end], learned_score_NL[:, start:end])
    except UserError:
        raise
    except Exception as error:  # the user's own function may fail in any way
        reason = first_line(error)
        raise UserError(f"exit={rule.name}: its function fails: {reason}") from error
    if not all(
        torch.allclose(all_ramps[:, start:end], few, equal_nan=True)
        for all_ramps, few in zip(together, some, strict=True)
    ):
        raise UserError(
            f"exit={rule.name}: the exit score of a ramp depends on the ramps after it, which have "
            "not run when a row may leave"
            if rule.looks_back
            else f"exit={rule.name} says looks_back=False, but the exit score of a ramp depends on "
            "the ramps before it; say looks_back=True"
        )
