"""The engine in int8 against full depth, and half depth, in other engines.

    python benchmarks/int8.py --pairs RUN:HALF [RUN:HALF ...] [--turns 5] [--singles 100]

RUN is a stage-2 run with trained ramps; HALF is a plainly fine-tuned model of half of its layers,
on the same data, or nothing ("RUN:"). The validation split is timed, in two folds: thresholds for a
fold are chosen on the other one, from the record of the same precision. Ranges of int8 are measured
on held-out rows of training. Each rival runs with the batch size that is fastest for it. All
systems take turns. int8.json, int8.md and a picture of each task are written after each pair. The
rivals need the extra: pip install -e '.[bench]'.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import full_depth
import int8_report
import numpy as np
import torch
from rivals import in_batches

from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import HELD_OUT, Task
from deebert.disk import whole_files
from deebert.evaluation.engine_latency import Inputs, Request, requests
from deebert.evaluation.engine_records import inputs_of, rows_of
from deebert.evaluation.timing import Timing, compare
from deebert.exits import curves, rules
from deebert.exits.curves import Thresholds
from deebert.exits.records import Record
from deebert.exits.rules import Rule
from deebert.hub import checkpoints
from deebert.inference import quantize
from deebert.inference.engine import Engine
from deebert.inference.survivors import Answers
from deebert.models.early_exit import INPUTS, EarlyExitModel
from deebert.reporting import report

HERE = Path(__file__).parent
SAVINGS = (0.3, 0.4, 0.5)
POINT = 0.01
BUDGETS = (1024, 2048, 4096, 8192)
OURS = (("float32", "torch"), ("bfloat16", "torch"), ("int8", "onnx"), ("int8", "openvino"))


@dataclass(frozen=True)
class Subject:
    """A trained model, the rows that are timed, and the rows that it is quantized with."""

    name: str
    task: Task
    model: EarlyExitModel
    inputs: Inputs
    record: Record
    others: Inputs
    folds_N: torch.Tensor

    @property
    def rule(self) -> Rule:
        return rules.default(self.task.num_labels)


@dataclass(frozen=True)
class System:
    """A way to answer the requests of one or both folds.

    Attributes:
        name: the engine, and "half depth" if it runs the smaller model.
        precision: float32, bfloat16 or int8.
        point: what its thresholds were chosen for; None: full depth of a rival.
        run: answers the inputs of a request, by its fold.
        detail: what the table tells beside it.
    """

    name: str
    precision: str
    point: str | None
    run: Callable[[Request], Any]
    detail: str = ""

    @property
    def key(self) -> str:
        return f"{self.name}, {self.precision}, {self.point}"


def subject_of(run: Path) -> Subject:
    """Read a run, record its validation split in float32, and divide that into two folds."""
    source = checkpoints.read(checkpoints.find(str(run), "RUN", "best.ckpt"), "RUN")
    task, values, model = source.config.task, source.config.data, source.model().eval()
    data = TextDataModule(
        task, source.tokenizer(), root=values.root, max_length=values.max_length,
        limit_train=values.limit_train, calibration_size=values.calibration_size, batch_size=1,
        num_workers=0, seed=source.config.seed, eval_batch_size=values.eval_batch_size,
    )  # fmt: skip
    split = data.eval_splits[0]
    with torch.no_grad():
        outputs = [
            {"logits": model(*(batch.get(name) for name in INPUTS))}
            | {name: batch[name] for name in ("labels", "index", "length")}
            for batch in data.loader(split)
        ]
    record = Record.from_batches(split, outputs)
    inputs = inputs_of(data, split, rows_of(data, record))
    held_out = HELD_OUT if data.calibration_size else str(task.train)
    others = inputs_of(data, held_out, list(range(min(1280, len(data.tokens(held_out))))))
    order = torch.randperm(len(record), generator=torch.Generator().manual_seed(0))
    return Subject(task.name, task, model, inputs, record, others, order % 2)


def ours(subject: Subject) -> Iterator[System]:
    """Yield the engine in each precision and runtime, without exits and at each point."""
    quantization = quantize.measure(subject.model, subject.others, "held out")
    for precision, runtime in OURS:
        if precision == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            continue
        engine = Engine(
            subject.model, subject.rule, 0.0, precision=precision, runtime=runtime,
            quantization=quantization,
        )  # fmt: skip
        answers = engine.run(subject.inputs, all_ramps=True)
        assert answers.ramps_NLC is not None
        record = replace(subject.record, logits_NLC=answers.ramps_NLC)
        name = f"deebert ({runtime})"
        print(f"  {name}, {precision}", flush=True)
        for point, thresholds in points(subject, record).items():
            engines = [engine.at(each) for each in thresholds]
            detail = equal(subject, record, engines, thresholds)
            yield System(name, precision, point, _by_fold(engines), detail)


def points(subject: Subject, record: Record) -> dict[str, list[Thresholds]]:
    """Return the thresholds of each fold, by what they were chosen for on the other fold."""
    chosen: dict[str, list[Thresholds]] = {"no exit": [0.0, 0.0]}
    seen = [record.rows(subject.folds_N != fold) for fold in (0, 1)]
    exact = [subject.record.rows(subject.folds_N != fold) for fold in (0, 1)]
    for saving in SAVINGS:
        chosen[f"{saving:.0%}"] = [
            curves.thresholds_for(curves.exit_scores_of(subject.rule, rows).score_NL, [saving])[0]
            for rows in seen
        ]
    chosen["one point"] = [
        _one_point(subject, rows, curves.ramp_table(full, subject.task)[-1].score)
        for rows, full in zip(seen, exact, strict=True)
    ]
    return chosen


def _one_point(subject: Subject, rows: Record, full_score: float) -> float:
    """Return the threshold that saves most at a point below full depth in float32."""
    score_NL = curves.exit_scores_of(subject.rule, rows).score_NL
    candidates = curves.thresholds_for(score_NL, np.linspace(0, 0.9, 181).tolist())
    good = [
        point
        for point in curves.curve(rows, subject.task, subject.rule, sorted({*candidates}))
        if point.score >= full_score - POINT - 1e-9
    ]
    best = max(good, key=lambda point: point.expected_saving, default=None)
    return 0.0 if best is None else float(best.threshold)


def equal(
    subject: Subject, record: Record, engines: list[Engine], thresholds: list[Thresholds]
) -> str:
    """Say how many exits and answers of the engine are those of its record.

    The least of both, of both folds, in batches and one at a time.
    """
    exit_scores = curves.exit_scores_of(subject.rule, record)
    shares = []
    for fold, engine in enumerate(engines):
        rows = (subject.folds_N == fold).nonzero().flatten()
        expected_N = rules.exit_layer(exit_scores.score_NL[rows], thresholds[fold])
        answers_N = subject.task.predict(exit_scores.answer_NLC[rows, expected_N - 1])
        inputs = [subject.inputs[row] for row in rows.tolist()]
        for batches in ([inputs], [[each] for each in inputs[:100]]):
            out = Answers.cat([engine.run(batch) for batch in batches])
            num = len(out.layer_N)
            exits = (out.layer_N == expected_N[:num]).double().mean().item()
            same_N = subject.task.predict(out.logits_NC) == answers_N[:num]
            shares.append(min(exits, same_N.double().mean().item()))
    return f"equal {min(shares):.2%}"


def theirs(
    model: EarlyExitModel, others: Inputs, inputs: Inputs, name: str, given: argparse.Namespace
) -> Iterator[System]:
    """Yield each rival with the batch size that is fastest for it."""
    pad = model.backbone.pad_token_id
    for engine, precision, forward in full_depth.build(model, others):
        if precision not in given.precisions:
            continue
        seconds = {}
        for budget in given.budgets:
            run = in_batches(forward, pad, budget)
            run(inputs)
            seconds[budget] = _seconds(run, inputs)
        best = min(seconds, key=seconds.__getitem__)
        print(f"  {engine}{name}, {precision}: batches of {best} tokens", flush=True)
        run = in_batches(forward, pad, best)
        yield System(
            f"{engine}{name}", precision, None, lambda request, run=run: run(request.inputs),
            f"batches of {best} tokens",
        )  # fmt: skip


def _seconds(run: Callable[[Inputs], Any], inputs: Inputs) -> float:
    start = time.perf_counter()
    run(inputs)
    return time.perf_counter() - start


def _by_fold(engines: list[Engine]) -> Callable[[Request], Any]:
    return lambda request: engines[request.fold].run(request.inputs)


def measured(subject: Subject, systems: list[System], turns: int, singles: int) -> list[Any]:
    """Return a row of int8.json for each system, in batches and one at a time."""
    every = requests(subject.inputs, subject.folds_N, None)
    rows = [_scored(subject, system, every) for system in systems]
    chosen = torch.linspace(0, len(subject.inputs) - 1, singles).long()
    few = [subject.inputs[row] for row in chosen.tolist()]
    alone = requests(few, subject.folds_N[chosen], 1)
    for kind, given, num in (("batched", every, len(subject.inputs)), ("single", alone, singles)):
        print(f"  {kind}: {turns} turns", flush=True)
        timings: dict[str, Timing] = compare(
            {system.key: system.run for system in systems}, given, turns
        )
        for system, row in zip(systems, rows, strict=True):
            seconds_R = timings[system.key].seconds_RQ.sum(1)
            row[f"{kind}_ms"] = (1e3 * seconds_R / num).tolist()
    return rows


def _scored(subject: Subject, system: System, every: list[Request]) -> dict[str, Any]:
    """Return the score and the saved layers of a system on all rows."""
    num = len(subject.inputs)
    layer_N = torch.full((num,), subject.record.num_layers)
    predictions_N = torch.empty(num, dtype=torch.long)
    for request in every:
        rows = (subject.folds_N == request.fold).nonzero().flatten()
        answers = system.run(request)
        if isinstance(answers, Answers):
            layer_N[rows], answers = answers.layer_N, answers.logits_NC
        predictions_N[rows] = subject.task.predict(answers)
    outcome = curves.outcome(subject.record, subject.task, layer_N, predictions_N)
    return {
        "name": system.name,
        "precision": system.precision,
        "point": system.point,
        "detail": system.detail,
        "score": outcome.score,
        "layer_saving": outcome.expected_saving,
    }


def features() -> list[str]:
    """Return the instructions of this processor that matter here."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return []
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return [name for name in known if name in flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="*", default=[], help="RUN:HALF; none: report only")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--singles", type=int, default=100, help="rows timed one at a time")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="tokens a batch")
    parser.add_argument(
        "--precisions", nargs="+", default=["float32", "bfloat16", "int8"], help="of the rivals"
    )
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    file = given.out / "int8.json"
    content: list[Any] = json.loads(file.read_text()) if file.exists() else []
    for pair in given.pairs:
        run, _, half = pair.partition(":")
        start = time.perf_counter()
        subject = subject_of(Path(run))
        print(f"{run}: {subject.name}, {len(subject.inputs)} rows", flush=True)
        systems = [*ours(subject)]
        systems += theirs(subject.model, subject.others, subject.inputs, "", given)
        if half:
            smaller = checkpoints.read(checkpoints.find(half, "HALF", "best.ckpt"), "HALF").model()
            systems += theirs(smaller.eval(), subject.others, subject.inputs, ", half depth", given)
        rows = measured(subject, systems, given.turns, given.singles)
        source = checkpoints.read(checkpoints.find(run, "RUN", "best.ckpt"), "RUN")
        entry = {
            "task": subject.name,
            "seed": source.config.seed,
            "ramp": subject.model.ramp_kind.reads,
            "metric": subject.task.metrics[0],
            "full_score": curves.ramp_table(subject.record, subject.task)[-1].score,
            "num_rows": len(subject.inputs),
            "command": f"python benchmarks/int8.py --pairs {pair} --turns {given.turns} "
            f"--singles {given.singles} --budgets {' '.join(map(str, given.budgets))} "
            f"--precisions {' '.join(given.precisions)}",
            "turns": given.turns,
            "threads": torch.get_num_threads(),
            "features": features(),
            "environment": vars(report.environment()),
            "minutes": (time.perf_counter() - start) / 60,
            "rows": rows,
        }
        key = ("task", "seed", "ramp", "features")
        content = [e for e in content if any(e[name] != entry[name] for name in key)] + [entry]
        whole_files.replace(file, json.dumps(content, indent=1) + "\n")
        int8_report.write(content, given.out)
    int8_report.write(content, given.out)


if __name__ == "__main__":
    main()
