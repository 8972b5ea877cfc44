"""The time that the engine takes on given inputs, against full depth (evaluate.py's `timing=`).

This module knows models, exit rules and thresholds. It does not know where inputs and thresholds
come from (`split_latency` does), and knows nothing of Hydra, Lightning or files.
Shapes: N inputs, L layers (= ramps), C labels.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deebert.data.batching import by_length, padded
from deebert.data.tasks import Task
from deebert.evaluation.timing import Timing, compare, undisturbed
from deebert.exits import curves, rules
from deebert.exits.curves import Thresholds
from deebert.exits.records import Record
from deebert.exits.rules import Rule, exit_layer
from deebert.inference import settings
from deebert.inference.engine import Engine
from deebert.models.early_exit import EarlyExitModel
from deebert.models.quantization import Quantization
from deebert.reporting.results import TimedCase

Inputs = list[Mapping[str, Any]]

REQUEST_ROWS = 1000  # inputs that are timed in requests of a few, evenly spread over all inputs
MIXED = (0.15, 0.3, 0.45, 0.6)  # savings at which the extra cost of mixed exits is measured
COST_ROWS = 64  # inputs that the costs of layers are measured on
FORCED = 1.0  # the exit score of every ramp under the rule `forced`


class FullDepth:
    """A model that runs all layers for all tokens, in batches of similar length.

    It computes bit for bit what the library's own forward pass computes, and evaluates the last
    ramp only. Savings are measured against it. Inputs must not be longer than the model takes.

    Args:
        model: the model. It is put into eval mode and on the device.
        precision: float32 or bfloat16.
        device: the device to run on.
        token_budget: the largest number of tokens in a batch; None: the engine's default.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        precision: str = "float32",
        device: torch.device | str = "cpu",
        token_budget: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        model = model.to(self.device).eval()
        self.backbone = model.backbone
        if precision != "float32":
            self.backbone = copy.deepcopy(self.backbone).to(getattr(torch, precision))
        self.ramp = model.ramps[-1]
        self.token_budget = token_budget or settings.TOKEN_BUDGET[settings.kind_of(self.device)]

    @torch.inference_mode()
    def run(self, inputs: Inputs) -> Tensor:
        """Return the logits of the final classifier: (N, C) on the CPU."""
        order: list[int] = []
        logits = []
        for rows in by_length([len(each["input_ids"]) for each in inputs], self.token_budget):
            tokens = padded([inputs[row] for row in rows], self.backbone.pad_token_id)
            on_device = {name: values.to(self.device) for name, values in tokens.items()}
            hidden_BSH, context = self.backbone.embed(**on_device)
            for layer in range(len(self.backbone.layers)):
                hidden_BSH = self.backbone.run_layer(layer, hidden_BSH, context)
            logits.append(self.ramp(hidden_BSH[:, 0].float()).cpu())
            order += rows
        sorted_NC = torch.cat(logits)
        logits_NC = torch.empty_like(sorted_NC)
        logits_NC[order] = sorted_NC
        return logits_NC


@dataclass(frozen=True)
class Protocol:
    """The settings of a latency measurement.

    Attributes:
        batch_sizes: the numbers of inputs in a request; None: all inputs, sorted by length.
        precisions: the precisions of the layers.
        runtime: the library that computes the engine's layers.
        repeats: the number of turns.
        threads: the number of the processor's threads; None: torch's own number
            (`timing.undisturbed`).
        quantization: how the layers are rounded in int8.
    """

    batch_sizes: tuple[int | None, ...] = (None,)
    precisions: tuple[str, ...] = ("float32",)
    runtime: str = "auto"
    repeats: int = 5
    threads: int | None = None
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Request:
    """Inputs that arrive together, and the number of their fold."""

    inputs: Inputs
    fold: int


def requests(inputs: Inputs, folds_N: Tensor, batch_size: int | None) -> list[Request]:
    """Divide inputs into requests, in their order and fold by fold.

    Args:
        inputs: the inputs.
        folds_N: the number of each input's fold.
        batch_size: the number of inputs in a request; None: all inputs of a fold.
    """
    result = []
    for fold in folds_N.unique().tolist():
        members = [inputs[row] for row in (folds_N == fold).nonzero().flatten().tolist()]
        size = batch_size or len(members)
        result += [Request(members[i : i + size], fold) for i in range(0, len(members), size)]
    return result


def measure(
    model: EarlyExitModel,
    rule: Rule,
    cases: Sequence[list[Thresholds]],
    record: Record,
    inputs: Inputs,
    folds_N: Tensor,
    task: Task,
    protocol: Protocol,
    device: torch.device | str = "cpu",
) -> list[TimedCase]:
    """Time the engine at several thresholds, for every precision and batch size.

    Args:
        model: the model.
        rule: the exit rule.
        cases: the thresholds to time. Each case holds the thresholds of every fold.
        record: the logits of every ramp, for the inputs in their order.
        inputs: the tokens of the inputs.
        folds_N: the number of each input's fold, from 0. Cross-fitted thresholds differ from fold
            to fold, so that the thresholds of an input were chosen without it.
        task: the task.
        protocol: how latency is measured.
        device: the device to run on.

    Returns:
        The cases of each precision and batch size. Full depth is `FullDepth`, or outside of torch
        the engine without exits.
    """
    results = []
    for precision in protocol.precisions:
        engine = _engine(model, rule, precision, protocol, device)
        full_depth = _full_depth(model, engine)
        for batch_size in protocol.batch_sizes:
            rows_N = torch.arange(len(inputs))
            if batch_size is not None and len(inputs) > REQUEST_ROWS:
                rows_N = torch.linspace(0, len(inputs) - 1, REQUEST_ROWS).long()
            chosen = [inputs[row] for row in rows_N.tolist()]
            engines = [[engine.at(thresholds) for thresholds in case] for case in cases]
            systems = {"threshold 0": _by_fold([engine] * len(cases[0]))}
            systems |= {str(i): _by_fold(several) for i, several in enumerate(engines)}
            if full_depth:
                systems["full depth"] = _by_fold([full_depth] * len(cases[0]))
            timings = compare(
                systems, requests(chosen, folds_N[rows_N], batch_size), protocol.repeats
            )
            shared: dict[str, Any] = {
                "protocol": "requests of so many inputs, one after the other"
                if batch_size
                else "all inputs, in batches of similar length",
                "precision": precision,
                "runtime": engine.runtime,
                "batch_size": batch_size,
                "threads": torch.get_num_threads(),
                "device": str(device),
                "repeats": protocol.repeats,
                "num_rows": len(chosen),
            }
            results += [
                _case(
                    shared,
                    case,
                    several,
                    timings[str(i)],
                    timings["threshold 0"],
                    timings["full depth" if full_depth else "threshold 0"],
                    record.rows(rows_N),
                    chosen,
                    folds_N[rows_N],
                    task,
                )
                for i, (case, several) in enumerate(zip(cases, engines, strict=True))
            ]
    return results


def _engine(
    model: EarlyExitModel, rule: Rule, precision: str, protocol: Protocol, device: Any
) -> Engine:
    """Return an engine without exits."""
    return Engine(
        model,
        rule,
        0.0,
        precision=precision,
        runtime=protocol.runtime,
        quantization=protocol.quantization,
        device=device,
    )


def _full_depth(model: EarlyExitModel, engine: Engine) -> FullDepth | None:
    """Return the library's full depth in the engine's precision, or None if it has none.

    With None the engine without exits stands for full depth. So the saving never includes the
    difference between two kinds of arithmetic.
    """
    if engine.runtime != "torch":
        return None
    return FullDepth(model, engine.precision, engine.device)


def _by_fold(engines: Sequence[Any]) -> Callable[[Request], Any]:
    """Return a function that runs each request on the engine of its fold."""
    return lambda request: engines[request.fold].run(request.inputs)


def _case(
    shared: Mapping[str, Any],
    case: list[Thresholds],
    engines: list[Engine],
    timing: Timing,
    timing_0: Timing,
    timing_full: Timing,
    record: Record,
    inputs: Inputs,
    folds_N: Tensor,
    task: Task,
) -> TimedCase:
    """Return the results of one timed case, and compare the engine's answers with the record."""
    exit_scores = curves.exit_scores_of(engines[0].rule, record)
    layer_N = torch.empty(len(inputs), dtype=torch.long)
    expected_N = torch.empty_like(layer_N)
    logits_NC = torch.empty_like(record.logits_NLC[:, -1])
    for fold in folds_N.unique().tolist():
        engine = engines[fold]
        rows = (folds_N == fold).nonzero().flatten()
        answers = engine.run([inputs[row] for row in rows.tolist()])
        layer_N[rows], logits_NC[rows] = answers.layer_N, answers.logits_NC
        expected_N[rows] = exit_layer(exit_scores.score_NL[rows], case[fold])
    predictions_N = task.predict(logits_NC)
    outcome = curves.outcome(record, task, layer_N, predictions_N)
    answered_N = curves.answered(exit_scores, task, expected_N)
    same_N = predictions_N == answered_N
    if task.is_regression:  # values that differ by rounding only count as equal
        same_N = torch.isclose(predictions_N, answered_N, atol=1e-2)
    full_N = task.predict(record.logits_NLC[:, -1])
    saving = timing.saving(timing_full)
    return TimedCase(
        **shared,
        threshold=case[0] if len(case) == 1 else case,
        seconds=timing.seconds,
        seconds_full_depth=timing_full.seconds,
        seconds_threshold_0=timing_0.seconds,
        time_saving=saving,
        time_speed_up=1 / (1 - saving),
        expected_saving=outcome.expected_saving,
        samples_per_second=len(inputs) / timing.seconds,
        latency_ms=timing.latency_ms,
        latency_ms_full_depth=timing_full.latency_ms,
        score=outcome.score,
        score_full_depth=curves.scored(task, full_N, record.labels_N)[0],
        exit_counts=outcome.exit_counts,
        equal_exits=(layer_N == expected_N).double().mean().item(),
        equal_predictions=same_N.double().mean().item(),
    )


def layer_costs(
    model: EarlyExitModel,
    inputs: Inputs,
    num_labels: int,
    protocol: Protocol,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Measure the cost of leaving at each layer, as a share of the time at full depth.

    All inputs are made to leave at layer 1, then at layer 2, and so on, and every ramp on the way
    is evaluated. An input costs more if only some inputs of its group leave: the group then becomes
    smaller, and is copied and padded anew. This extra cost is measured with the exits of the
    model's own ramps, at the savings of MIXED. Its mean is added to the cost of every layer.

    Args:
        model: the model.
        inputs: the tokens of the inputs.
        num_labels: the number of labels.
        protocol: how latency is measured, with one batch size and one precision.
        device: the device to run on.

    Returns:
        L numbers.
    """
    [precision], [batch_size] = protocol.precisions, protocol.batch_sizes
    num_layers = len(model.ramps)
    engine = _engine(model, forced(num_labels), precision, protocol, device)
    systems: dict[str, Any] = {
        str(layer): engine.at(leaving_at(layer, num_layers)) for layer in range(1, num_layers + 1)
    }
    rule = rules.default(num_labels)
    ramps_NLC = engine.run(inputs, all_ramps=True).ramps_NLC
    assert ramps_NLC is not None
    score_NL = rule(ramps_NLC).score_NL
    mixed = {str(t): t for t in curves.thresholds_for(score_NL, list(MIXED))}
    systems |= {f"mixed {name}": engine.at(t, rule) for name, t in mixed.items()}
    systems["full"] = _full_depth(model, engine) or engine
    timings = compare(
        {name: _by_fold([system]) for name, system in systems.items()},
        requests(inputs, torch.zeros(len(inputs), dtype=torch.long), batch_size),
        protocol.repeats,
    )
    share = {name: 1 - timings[name].saving(timings["full"]) for name in systems}
    costs_L = np.array([share[str(layer)] for layer in range(1, num_layers + 1)])
    tokens_N = np.array([len(each["input_ids"]) for each in inputs])
    extra = [
        share[f"mixed {name}"]
        - np.average(costs_L[exit_layer(score_NL, t).numpy() - 1], weights=tokens_N)
        for name, t in mixed.items()
    ]
    return (costs_L + max(0.0, float(np.mean(extra)))).tolist()


def costs_at_lengths(
    engine: Engine, length_N: torch.Tensor, vocabulary: int, num_labels: int
) -> tuple[float, ...]:
    """Measure `layer_costs` on random inputs, in the way that an engine runs.

    Args:
        engine: the engine, whose model, precision, runtime and device are measured.
        length_N: the lengths of the inputs that the costs are for.
        vocabulary: the number of ids of the tokenizer.
        num_labels: the number of labels.
    """
    chosen = length_N[torch.linspace(0, len(length_N) - 1, min(COST_ROWS, len(length_N))).long()]
    random = torch.Generator().manual_seed(0)  # equal inputs would leave at one layer
    inputs: Inputs = [
        {"input_ids": torch.randint(vocabulary, (int(n),), generator=random).tolist()}
        for n in chosen
    ]
    protocol = Protocol(
        precisions=(engine.precision,),
        runtime=engine.runtime,
        repeats=3,
        quantization=engine.quantization,
    )
    with undisturbed(None):
        return tuple(layer_costs(engine.model, inputs, num_labels, protocol, engine.device))


def forced(num_labels: int) -> Rule:
    """Return a rule that gives every ramp the same exit score.

    With it the thresholds of `leaving_at` alone decide where inputs leave.
    """
    return Rule(
        "forced",
        lambda logits_NLC: torch.full(logits_NLC.shape[:2], FORCED),
        num_labels,
        regression=num_labels == 1,
        looks_back=False,
    )


def leaving_at(layer: int, num_layers: int) -> list[float]:
    """Return thresholds at which all inputs leave at this layer under the rule `forced`.

    The ramps before it are evaluated, but no input leaves there.
    """
    return [FORCED * (2.0 if i + 1 == layer else 0.5) for i in range(num_layers - 1)]
