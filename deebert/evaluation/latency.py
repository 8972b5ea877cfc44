"""The engine's seconds beside those of full depth: what evaluate.py's `timing=` reports.

Knows models and clocks; nothing of Hydra, Lightning or files.
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
from deebert.evaluation.timing import Timing, compare
from deebert.exits import curves, rules
from deebert.exits.curves import Thresholds
from deebert.exits.records import Record
from deebert.exits.rules import Rule, exit_layer
from deebert.inference.engine import TOKEN_BUDGET, Engine, kind_of
from deebert.models.early_exit import EarlyExitModel

Inputs = list[Mapping[str, Any]]

REQUEST_ROWS = 1000  # inputs timed in requests of a few, evenly spread over the split
MIXED = (0.15, 0.3, 0.45, 0.6)  # savings at which it is measured what mixed exits cost more
FORCED = 1.0  # the score of every ramp where exits are forced


class FullDepth:
    """The library's own layers, all of them, on all tokens, in batches of similar length.

    Bit for bit the library's forward pass, with no ramp but the last: what a saving is measured
    against. Inputs may not be longer than the model takes.

    Args:
        precision: float32 or bfloat16.
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
        self.token_budget = token_budget or TOKEN_BUDGET[kind_of(self.device)]

    @torch.inference_mode()
    def run(self, inputs: Inputs) -> Tensor:
        """Logits of the final classifier: (N, C) on the CPU."""
        order: list[int] = []
        logits = []
        for rows in by_length([len(given["input_ids"]) for given in inputs], self.token_budget):
            tokens = padded([inputs[row] for row in rows], self.backbone.pad_token_id)
            there = {name: values.to(self.device) for name, values in tokens.items()}
            hidden_BSH, context = self.backbone.embed(**there)
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
    """How speed is measured.

    Attributes:
        batch_sizes: inputs of a request; None: all inputs in one, sorted by length.
        precisions: of the layers.
        runtime: what computes the engine's layers.
        repeats: turns.
        threads: of the processor; None: as torch has them (for `timing.undisturbed`).
    """

    batch_sizes: tuple[int | None, ...] = (None,)
    precisions: tuple[str, ...] = ("float32",)
    runtime: str = "torch"
    repeats: int = 5
    threads: int | None = None


@dataclass(frozen=True)
class Request:
    """Inputs that arrive together, and the fold that they are of."""

    inputs: Inputs
    fold: int


def requests(inputs: Inputs, folds_N: Tensor, batch_size: int | None) -> list[Request]:
    """Inputs in their order, so many at a time; None: all of a fold."""
    found = []
    for fold in folds_N.unique().tolist():
        mine = [inputs[row] for row in (folds_N == fold).nonzero().flatten().tolist()]
        size = batch_size or len(mine)
        found += [Request(mine[i : i + size], fold) for i in range(0, len(mine), size)]
    return found


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
) -> list[dict[str, Any]]:
    """Time what thresholds save, for every precision and batch size.

    Args:
        cases: thresholds to time, each as a list with those for each fold.
        record: what every ramp says of the inputs, in their order.
        folds_N: which fold an input is of, from 0; thresholds that are cross-fitted differ from
            fold to fold, so that those an input runs with were chosen without it.

    Returns:
        Dicts as results.json holds them under `timing`.

        - `precision`, `runtime`, `batch_size` (None: all), `protocol`, `threads`, `device`,
          `repeats`, `num_rows`, `threshold`;
        - `seconds` of the engine, `seconds_full_depth` of the library's own forward pass
          (`FullDepth`; for int8 and ONNX Runtime, which the library has not, of the engine),
          `seconds_threshold_0` of the engine without exits;
        - `time_saving` and `time_speed_up` against full depth, `expected_saving` (of layers);
        - `samples_per_second`, `latency_ms`, `latency_ms_full_depth` (of a request);
        - `score` and `score_full_depth` of what the engine answered, `exit_counts`;
        - `equal_exits` and `equal_predictions`: shares of the rows at which the engine and the
          record agree.
    """
    found = []
    for precision in protocol.precisions:
        engine = _engine(model, rule, precision, protocol, device)
        library = _library(model, engine)
        for batch_size in protocol.batch_sizes:
            rows_N = torch.arange(len(inputs))
            if batch_size is not None and len(inputs) > REQUEST_ROWS:
                rows_N = torch.linspace(0, len(inputs) - 1, REQUEST_ROWS).long()
            chosen = [inputs[row] for row in rows_N.tolist()]
            asked = requests(chosen, folds_N[rows_N], batch_size)
            engines = [[engine.at(thresholds) for thresholds in case] for case in cases]
            systems = {"threshold 0": _by_fold([engine] * len(cases[0]))}
            systems |= {str(i): _by_fold(several) for i, several in enumerate(engines)}
            if library:
                systems["full depth"] = _by_fold([library] * len(cases[0]))
            timings = compare(systems, asked, protocol.repeats)
            shared = {
                "protocol": "requests of so many inputs, one after the other"
                if batch_size
                else "all inputs, in batches of similar length",
                "precision": precision,
                "runtime": protocol.runtime,
                "batch_size": batch_size,
                "threads": torch.get_num_threads(),
                "device": str(device),
                "repeats": protocol.repeats,
                "num_rows": len(chosen),
            }
            found += [
                shared
                | _case(
                    case,
                    several,
                    timings[str(i)],
                    timings["threshold 0"],
                    timings["full depth" if library else "threshold 0"],
                    record.rows(rows_N),
                    chosen,
                    folds_N[rows_N],
                    task,
                )
                for i, (case, several) in enumerate(zip(cases, engines, strict=True))
            ]
    return found


def _engine(
    model: EarlyExitModel, rule: Rule, precision: str, protocol: Protocol, device: Any
) -> Engine:
    """Without exits."""
    return Engine(model, rule, 0.0, precision=precision, runtime=protocol.runtime, device=device)


def _library(model: EarlyExitModel, engine: Engine) -> FullDepth | None:
    """The library in the engine's arithmetic, or None where it has not got it: then full depth is
    the engine, as saved is what leaving early saves, not what other arithmetic does."""
    if engine.precision == "int8" or engine.runtime != "torch":
        return None
    return FullDepth(model, engine.precision, engine.device)


def _by_fold(engines: Sequence[Any]) -> Callable[[Request], Any]:
    return lambda request: engines[request.fold].run(request.inputs)


def _case(
    case: list[Thresholds],
    engines: list[Engine],
    timing: Timing,
    timing_0: Timing,
    timing_full: Timing,
    record: Record,
    inputs: Inputs,
    folds_N: Tensor,
    task: Task,
) -> dict[str, Any]:
    """One timed threshold, and whether the engine did what the record says."""
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
    if task.is_regression:  # rounding is no other prediction
        same_N = torch.isclose(predictions_N, answered_N, atol=1e-2)
    full_N = task.predict(record.logits_NLC[:, -1])
    saving = timing.saving(timing_full)
    return {
        "threshold": case[0] if len(case) == 1 else case,
        "seconds": timing.seconds,
        "seconds_full_depth": timing_full.seconds,
        "seconds_threshold_0": timing_0.seconds,
        "time_saving": saving,
        "time_speed_up": 1 / (1 - saving),
        "expected_saving": outcome["expected_saving"],
        "samples_per_second": len(inputs) / timing.seconds,
        "latency_ms": timing.latency_ms,
        "latency_ms_full_depth": timing_full.latency_ms,
        "score": outcome["score"],
        "score_full_depth": curves.scored(task, full_N, record.labels_N)["score"],
        "exit_counts": outcome["exit_counts"],
        "equal_exits": (layer_N == expected_N).double().mean().item(),
        "equal_predictions": same_N.double().mean().item(),
    }


def layer_costs(
    model: EarlyExitModel,
    inputs: Inputs,
    num_labels: int,
    protocol: Protocol,
    device: torch.device | str = "cpu",
) -> list[float]:
    """What leaving at each layer costs, as a share of the library's time at full depth: L numbers.

    Measured: all inputs are made to leave at layer 1, at layer 2, and so on, with every ramp on the
    way asked. Where some leave and some stay an input costs more: groups shrink, are copied and
    padded anew. How much is measured where the model's own ramps let inputs leave, at the savings
    of MIXED, and the mean of it is added for every layer.
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
    systems["full"] = _library(model, engine) or engine
    timings = compare(
        {name: _by_fold([system]) for name, system in systems.items()},
        requests(inputs, torch.zeros(len(inputs), dtype=torch.long), batch_size),
        protocol.repeats,
    )
    share = {name: 1 - timings[name].saving(timings["full"]) for name in systems}
    costs_L = np.array([share[str(layer)] for layer in range(1, num_layers + 1)])
    tokens_N = np.array([len(given["input_ids"]) for given in inputs])
    more = [
        share[f"mixed {name}"]
        - np.average(costs_L[exit_layer(score_NL, t).numpy() - 1], weights=tokens_N)
        for name, t in mixed.items()
    ]
    return (costs_L + max(0.0, float(np.mean(more)))).tolist()


def forced(num_labels: int) -> Rule:
    """A rule that judges every ramp of every input alike, for exits that `leaving_at` decides."""
    return Rule(
        "forced",
        lambda logits_NLC: torch.full(logits_NLC.shape[:2], FORCED),
        num_labels,
        regression=num_labels == 1,
        looks_back=False,
    )


def leaving_at(layer: int, num_layers: int) -> list[float]:
    """Thresholds at which `forced` inputs leave at this layer, the ramps before asked in vain."""
    return [FORCED * (2.0 if i + 1 == layer else 0.5) for i in range(num_layers - 1)]
