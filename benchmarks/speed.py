"""The engine in torch on the clock, against the library's and the original's ways to run it.

`int8.py` holds it against the engines that a user could install instead.

    python benchmarks/speed.py RUN [RUN ...] [--rows N] [--repeats R] [--only PART ...]

RUN is a stage-2 run; its validation split is what is timed. Three parts a run, each of which is one
comparison in which all systems take turns: `batched` (all rows at once), `single` (one input at a
time, on --rows-single of the rows) and `targets` (target_speedup, on rows not chosen on). After
each part speed.json, speed.md and speed.png are written anew; parts that were measured before
and are not named stay in them.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import rivals
import speed_report
import torch
from rivals import Run

from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import Task
from deebert.data.tokenization import TOKENS
from deebert.disk import whole_files
from deebert.errors import UserError
from deebert.evaluation import engine_latency
from deebert.evaluation.engine_latency import FullDepth, Inputs
from deebert.evaluation.timing import Timing, compare
from deebert.exits import calibration, curves, rules
from deebert.exits.records import Record
from deebert.exits.target import Target
from deebert.hub import checkpoints
from deebert.inference.engine import Engine
from deebert.inference.survivors import Answers
from deebert.models.early_exit import INPUTS, EarlyExitModel
from deebert.reporting import report

HERE = Path(__file__).parent
SAVINGS = (0.2, 0.3, 0.4, 0.5)
SPEEDUPS = (1.3, 1.6, 2.0)
SYSTEMS = "abcde"


@dataclass(frozen=True)
class Subject:
    """What is timed: a trained model on a split, and what its record says."""

    task: Task
    model: EarlyExitModel
    inputs: Inputs
    record: Record

    @property
    def name(self) -> str:
        """Of the task, and of the kind of ramps where it is not the paper's."""
        reads = self.model.ramp_kind.reads
        return self.task.name if reads == "first" else f"{self.task.name}, ramps on {reads}"

    @cached_property
    def rule(self) -> rules.Rule:
        return rules.default(self.task.num_labels)

    @cached_property
    def engines(self) -> dict[str, Engine]:
        """At full depth, by precision."""
        by_precision = {"float32": Engine(self.model, self.rule, 0.0)}
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            by_precision["bfloat16"] = Engine(self.model, self.rule, 0.0, precision="bfloat16")
        return by_precision

    def points(self, engines: Iterable[Engine], batched: bool) -> dict[Engine, dict[str, float]]:
        """Thresholds by engine and by what they were chosen for.

        Chosen on the rows that are timed: speed is measured here, nothing is promised.
        """
        exit_scores = curves.exit_scores_of(self.rule, self.record)
        thresholds = curves.thresholds_for(exit_scores.score_NL, list(SAVINGS))
        shared = {f"{s:.0%} saving": t for s, t in zip(SAVINGS, thresholds, strict=True)}
        return {
            engine: shared | {speed_report.ONE_POINT: self._one_point(engine, batched)}
            for engine in engines
        }

    def _one_point(self, engine: Engine, batched: bool) -> float:
        """The threshold that saves most at a point below full depth, in this precision."""
        record = self.record
        if engine.precision != "float32":
            given = [self.inputs] if batched else [[one] for one in self.inputs]
            ramps_of = [engine.run(inputs, all_ramps=True).ramps_NLC for inputs in given]
            logits_NLC = torch.cat([ramps_NLC for ramps_NLC in ramps_of if ramps_NLC is not None])
            record = replace(record, logits_NLC=logits_NLC)
        score_NL = curves.exit_scores_of(self.rule, record).score_NL
        candidates = curves.thresholds_for(score_NL, np.linspace(0, 1, 401).tolist())
        points = curves.curve(record, self.task, self.rule, [*sorted(set(candidates))])
        least = self.full_score - speed_report.POINT
        good = [point for point in points if point.score >= least]
        best = max(good, key=lambda point: point.expected_saving, default=None)
        return 0.0 if best is None else float(best.threshold)

    @cached_property
    def full_score(self) -> float:
        return curves.ramp_table(self.record, self.task)[-1].score


@dataclass(frozen=True)
class System:
    """A way to answer inputs.

    Attributes:
        letter: of the list in speed.md, (a) to (e).
        point: what its threshold was chosen for, and it.
        depth: the layer at which all leave; None for the last, or where thresholds decide.
    """

    letter: str
    name: str
    run: Run
    precision: str = "float32"
    point: str | None = None
    threshold: float | None = None
    depth: int | None = None
    batched: bool = True

    @property
    def key(self) -> str:
        kind = "batched" if self.batched else "single"
        return f"({self.letter}) {self.name}, {self.precision}, {self.point}, {kind}"

    def timed(self, request: Inputs) -> Any:
        """Its share of requests of one input, and of one of all of them."""
        return self.run(request) if (len(request) > 1) == self.batched else None


def systems(subject: Subject, letters: str, batched: bool) -> Iterator[System]:
    """All that run in batches, or all that run one input at a time."""
    model, engines = subject.model, subject.engines
    budget = engines["float32"].token_budget
    num_layers = len(model.ramps)
    ours = [*(engines.values() if set("ad") & set(letters) else ())]
    points = subject.points(ours, batched)
    for precision in engines:
        yield System("b", speed_report.PLAIN, rivals.plain(model, precision, budget), precision)
    if batched:
        for other in (budget // 2, budget * 2):
            name = f"{speed_report.PLAIN}, batches of {other} tokens"
            yield System("b", name, rivals.plain(model, "float32", other))
    if "a" in letters and not batched:
        for point, threshold in {"no exit": 0.0, **points[engines["float32"]]}.items():
            run = rivals.original(model, threshold)
            yield System("a", "original protocol", run, point=point, threshold=threshold)
    for precision, engine in engines.items():
        if "c" in letters:
            yield System("c", "engine, no exit", engine.run, precision, "no exit", 0.0)
        for point, threshold in points[engine].items() if "d" in letters else ():
            run = engine.at(threshold).run
            yield System("d", "engine", run, precision, point, threshold)
    for depth in range(2, num_layers) if "e" in letters else ():
        yield System("e", f"cut after {depth}", rivals.cut(model, depth, budget), depth=depth)


def timed(subject: Subject, chosen: list[System], singles: list[int], repeats: int) -> list[Any]:
    """Answers of all systems, then their turns: a row of speed.json for each.

    Args:
        singles: rows that are timed one at a time, if any; the batches are of all rows.
    """
    inputs = subject.inputs
    requests: list[Inputs] = [[inputs[row]] for row in singles]
    if any(system.batched for system in chosen):
        requests.append(inputs)
    rows, expected = [], 0.0
    for system in chosen:
        start = time.perf_counter()
        rows.append(_answered(subject, system, singles))
        seconds = time.perf_counter() - start
        expected += seconds if system.batched else seconds * len(singles) / len(inputs)
        row = rows[-1]
        print(f"  {system.key}: score {row['score']:.4f}, {seconds:.1f} s", flush=True)
    print(f"  now {repeats} turns, about {expected * (repeats + 1):.0f} s", flush=True)
    timings = compare({system.key: system.timed for system in chosen}, requests, repeats)
    for system, row in zip(chosen, rows, strict=True):
        seconds_RQ = timings[system.key].seconds_RQ
        mine = Timing(seconds_RQ[:, -1:] if system.batched else seconds_RQ[:, : len(singles)])
        row["turn_seconds"] = mine.seconds_RQ.sum(1).tolist()
        row["latency_ms"] = None if system.batched else mine.latency_ms
    return rows


def _answered(subject: Subject, system: System, singles: list[int]) -> dict[str, Any]:
    """What a system answers to all rows, in the way it is timed, beside what the record says."""
    task, record, inputs = subject.task, subject.record, subject.inputs
    outputs = [system.run(inputs)] if system.batched else [system.run([given]) for given in inputs]
    logits_NC = torch.cat([p.logits_NC if isinstance(p, Answers) else p for p in outputs])
    exit_scores = curves.exit_scores_of(subject.rule, record)
    if system.threshold is None:
        expected_N = torch.full((len(inputs),), system.depth or record.num_layers)
    else:
        expected_N = rules.exit_layer(exit_scores.score_NL, system.threshold)
    layer_N = torch.cat([p.layer_N for p in outputs if isinstance(p, Answers)] or [expected_N])
    predictions_N = task.predict(logits_NC)
    same_N = predictions_N == curves.answered(exit_scores, task, expected_N)
    timed_N = layer_N if system.batched else layer_N[singles]
    return {
        "letter": system.letter,
        "name": system.name,
        "batched": system.batched,
        "precision": system.precision,
        "point": system.point,
        "threshold": system.threshold,
        "num_rows": len(timed_N),
        "layer_saving": 1 - timed_N.double().mean().item() / record.num_layers,
        "score": curves.outcome(record, task, layer_N, predictions_N).score,
        "equal_exits": (layer_N == expected_N).double().mean().item(),
        "equal_predictions": same_N.double().mean().item(),
    }


def batched(subject: Subject, given: argparse.Namespace) -> list[Any]:
    return timed(subject, [*systems(subject, given.systems, True)], [], given.repeats)


def single(subject: Subject, given: argparse.Namespace) -> list[Any]:
    """One input at a time; and the engine's batches, to be timed beside the original protocol."""
    chosen = [replace(s, batched=False) for s in systems(subject, given.systems, False)]
    if "a" in given.systems:
        chosen += [system for system in systems(subject, "cd", True) if system.letter in "cd"]
    return timed(
        subject, chosen, spread(len(subject.inputs), given.rows_single).tolist(), given.repeats
    )


def targets(subject: Subject, given: argparse.Namespace) -> list[Any]:
    """`target_speedup`, cross-fitted as evaluate.py does: costs and thresholds from each half of
    the rows, the clock on the other."""
    inputs, task = subject.inputs, subject.task
    fold_N = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0)) % 2
    rows_of = [(fold_N == fold).nonzero().flatten() for fold in (0, 1)]
    others = rows_of[::-1]  # for whom each fold is unseen
    protocol = engine_latency.Protocol(repeats=given.repeats)
    costs = []
    for seen in others:
        half = [inputs[row] for row in seen.tolist()]
        costs.append(
            tuple(engine_latency.layer_costs(subject.model, half, task.num_labels, protocol))
        )
        print(f"  costs of the layers: {' '.join(f'{cost:.3f}' for cost in costs[-1])}", flush=True)
    rows: list[Any] = []
    full = FullDepth(subject.model)
    runs: dict[str, Callable[[Any], Any]] = {"full depth": lambda request: full.run(request.inputs)}
    for target in SPEEDUPS:
        try:
            speedup_targets = [Target(target_speedup=target, costs=each) for each in costs]
            choices = [
                calibration.choose(subject.record.rows(seen), task, subject.rule, target)
                for seen, target in zip(others, speedup_targets, strict=True)
            ]
        except UserError as error:
            print(f"  target_speedup={target}: {error}", flush=True)
            rows.append({"target": target, "why_not": str(error)})
            continue
        engines = [subject.engines["float32"].at(each.thresholds, each.rule) for each in choices]
        runs[str(target)] = lambda request, engines=engines: engines[request.fold].run(
            request.inputs
        )
        layer_N, predictions_N = (torch.empty(len(inputs), dtype=torch.long) for _ in range(2))
        for mine, operating_point in zip(rows_of, choices, strict=True):
            layer_N[mine], predictions_N[mine] = operating_point(subject.record.rows(mine), task)
        outcome = curves.outcome(subject.record, task, layer_N, predictions_N)
        rows.append(
            {
                "target": target,
                "threshold": [operating_point.thresholds for operating_point in choices],
                "layer_saving": outcome.expected_saving,
                "score": outcome.score,
                "num_rows": len(inputs),
                "costs": costs,
            }
        )
    timings = compare(runs, engine_latency.requests(inputs, fold_N, None), given.repeats)
    for row in rows:
        if timing := timings.get(str(row["target"])):
            row["speed_up"] = 1 / (1 - timing.saving(timings["full depth"]))
            row["turn_seconds"] = timing.seconds_RQ.sum(1).tolist()
            row["turn_seconds_full_depth"] = timings["full depth"].seconds_RQ.sum(1).tolist()
    return rows


PARTS: dict[str, Callable[[Subject, argparse.Namespace], list[Any]]] = {
    "batched": batched,
    "single": single,
    "targets": targets,
}


def spread(num: int, most: int | None) -> torch.Tensor:
    """At most so many of the row numbers, evenly spread."""
    return torch.arange(num) if (most or num) >= num else torch.linspace(0, num - 1, most).long()


def subject_of(run: Path, most: int | None) -> Subject:
    """A stage-2 run, its validation split (some rows of it) and the record of them."""
    source = checkpoints.read(checkpoints.find(str(run), "RUN", "best.ckpt"), "RUN")
    task = source.config.task
    if task.is_regression:
        raise UserError(f"{run}: task {task.name} is a regression; give a run with classes")
    model, values = source.model().eval(), source.config.data
    data = TextDataModule(
        task, source.tokenizer(), root=values.root, max_length=values.max_length,
        limit_train=None, calibration_size=0, batch_size=1, num_workers=0, seed=0,
        eval_batch_size=values.eval_batch_size,
    )  # fmt: skip
    split = data.eval_splits[0]
    with torch.no_grad():
        outputs = [
            {"logits": model(*(b.get(name) for name in INPUTS))}
            | {name: b[name] for name in ("labels", "index", "length")}
            for b in data.loader(split)
        ]
    record = Record.from_batches(split, outputs)
    tokens = {given["index"]: given for given in data.tokens(split)}
    chosen_N = spread(len(record), most)
    inputs: Inputs = [
        {name: tokens[index][name] for name in TOKENS if name in tokens[index]}
        for index in record.index_N[chosen_N].tolist()
    ]
    return Subject(task, model, inputs, record.rows(chosen_N))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="none: only write the report again")
    parser.add_argument("--rows", type=int, help="at most, evenly spread over the split")
    parser.add_argument("--rows-single", type=int, default=100, help="timed one at a time")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--systems", default=SYSTEMS, help="letters; (b) is always there")
    parser.add_argument("--threads", type=int, help="default: as torch has them")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    file = given.out / "speed.json"
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for run in given.runs:
        print(f"{run}: record", flush=True)
        subject = subject_of(run, given.rows)
        for part in given.only:
            print(f"{subject.task.name}, {part}: {len(subject.inputs)} rows", flush=True)
            start = time.perf_counter()
            rows = PARTS[part](subject, given)
            content.setdefault(subject.name, {})[part] = {
                "command": f"python {shlex.join(sys.argv)}",
                "metric": subject.task.metrics[0],
                "full_score": subject.full_score,
                "num_layers": subject.record.num_layers,
                "token_budget": subject.engines["float32"].token_budget,
                "repeats": given.repeats,
                "threads": torch.get_num_threads(),
                "minutes": (time.perf_counter() - start) / 60,
                "environment": vars(report.environment()),
                "rows": rows,
            }
            whole_files.replace(file, json.dumps(content, indent=1) + "\n")
            speed_report.write(content, given.out)
    speed_report.write(content, given.out)


if __name__ == "__main__":
    main()
