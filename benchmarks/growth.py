"""How the cost grows: with layers, width, length, batch size and the number of inputs.

    python benchmarks/growth.py [--million] [--rows N] [--repeats R] [--only SERIES ...]

Random weights; exits are forced (all inputs leave after half of the layers) or mixed (as many at
each layer). Beside the clock stands the formula of flops.py. The numbers of inputs are run
in processes of their own, from a generator, for their peak memory; --million adds 1,000,000 of
them (some minutes). After each series growth.json and growth.md are written anew.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import flops
import torch
from synthetic import NUM_LABELS, evenly, made, mixed, model_of
from torch import Tensor

from deebert.disk import whole_files
from deebert.evaluation.engine_latency import FullDepth, Inputs, forced, leaving_at
from deebert.evaluation.timing import compare
from deebert.inference.engine import Engine
from deebert.reporting import report

HERE = Path(__file__).parent
BASE = {"layers": 6, "width": 384, "length": 32, "batch": 16}
SERIES = {
    "layers": (6, 12, 24),
    "width": (256, 384, 768),
    "length": (16, 32, 64, 128, 256),
    "batch": (1, 8, 32, 128),
}
COUNTS = (1_000, 10_000, 100_000)
MILLION = 1_000_000
WORK = 20e9  # FLOPs of full depth in a turn, about: half a second of two cores


def point(series: str, size: int, most: int | None, repeats: int) -> list[dict[str, Any]]:
    """Full depth, half of the layers, and a mix, at one size: a row each."""
    shape = BASE | {series: size}
    layers, length, batch = shape["layers"], shape["length"], shape["batch"]
    model = model_of(layers, shape["width"])
    sizes = flops.sizes_of(model.config, NUM_LABELS)
    full = flops.plain(sizes, length, layers, ())
    num = max(batch, round(WORK / full / batch) * batch)
    num = num if most is None else max(1, min(num, most))
    inputs = list(made(num, length, length))
    requests: list[Inputs] = [inputs[i : i + batch] for i in range(0, num, batch)]
    budget = batch * length  # a request is a batch
    engine = Engine(model, forced(NUM_LABELS), 0.0, token_budget=budget)
    engines = {
        "no exit": engine,
        "half of the layers": engine.at(leaving_at(layers // 2, layers)),
        "mix": engine.at(evenly(layers), mixed()),
    }
    library = FullDepth(model, token_budget=budget)
    runs = {name: system.run for name, system in engines.items()}
    timings = compare({"full depth": library.run, **runs}, requests, repeats)
    length_N = torch.full((num,), length)

    def cost(sizes: flops.Sizes, tokens: int, k: int, evaluated_ramps: Collection[int]) -> int:
        """What the engine does: first token first not in small groups, but at the last layer."""
        first = k == layers or batch * tokens >= engine.first_token_from
        return (flops.first_token_first if first else flops.plain)(
            sizes, tokens, k, evaluated_ramps
        )

    rows = []
    for name, timing in timings.items():
        spent, saved = full * num, 0.0
        layer_N: Tensor = torch.full((num,), layers)
        if name != "full depth":
            layer_N = torch.cat([engines[name].run(request).layer_N for request in requests])
            evaluated_ramps = [i + 1 for i in sorted(engines[name].points.exit_ramps)]
            spent, saved = flops.total(sizes, layer_N, length_N, evaluated_ramps, cost)
        rows.append(
            {
                "series": series,
                "size": size,
                "exits": name,
                "num_inputs": num,
                "gflops": spent / 1e9,
                "seconds": timing.seconds,
                "turn_seconds": timing.seconds_RQ.sum(1).tolist(),
                "gflops_per_second": spent / 1e9 / timing.seconds,
                "layer_saving": 1 - layer_N.double().mean().item() / layers,
                "flops_saving": saved,
                "time_saving": timing.saving(timings["full depth"]),
            }
        )
    return rows


def markdown(content: dict[str, Any]) -> str:
    lines = [
        "# How the cost grows",
        "",
        "Random weights. *full depth*: the library's own layers; the others: the engine, where all "
        "ramps up to the exit are asked. *half of the layers*: every input leaves there; *mix*: as "
        "many at each layer. GFLOPs by the formula of `deebert/flops.py`; savings against full "
        "depth, medians over the turns. Every batch is a request. What is not varied: "
        + ", ".join(f"{name} {value}" for name, value in BASE.items())
        + ".",
    ]
    for series, part in content.items():
        where = part["environment"]
        lines += [
            "",
            f"## {series}",
            "",
            f"`{part['command']}`: {part['repeats']} turns, {part['threads']} threads of "
            f"{where['cpus']} CPU cores ({where['device']}), torch {where['versions']['torch']}, "
            f"commit {(where['git_commit'] or 'unknown')[:7]}; {part['minutes']:.1f} minutes.",
            "",
        ]
        lines += _memory(part["rows"]) if series == "inputs" else _table(series, part["rows"])
    return "\n".join(lines) + "\n"


def _table(series: str, rows: list[dict[str, Any]]) -> list[str]:
    columns = [series, "exits", "inputs", "GFLOPs", "seconds", "GFLOP/s", "layer saving"]
    cells = [
        [
            row["size"],
            row["exits"],
            row["num_inputs"],
            f"{row['gflops']:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['gflops_per_second']:.1f}",
            *(f"{row[name]:.1%}" for name in ("layer_saving", "flops_saving", "time_saving")),
        ]
        for row in rows
    ]
    return _lines([*columns, "FLOPs saving", "time saving"], cells)


def _memory(rows: list[dict[str, Any]]) -> list[str]:
    columns = ["inputs", "seconds", "us an input", "MiB before", "MiB results", "MiB peak"]
    base = next((row for row in rows if row["num_inputs"] == 10_000), rows[0])

    def beside(row: dict[str, Any]) -> float:
        return row["peak_mib"] - row["results_mib"]

    cells = [
        [
            f"{row['num_inputs']:,}",
            f"{row['seconds']:.1f}",
            f"{1e6 * row['seconds'] / row['num_inputs']:.0f}",
            *(f"{row[name]:.1f}" for name in ("before_mib", "results_mib", "peak_mib")),
            f"{beside(row) / beside(base):.3f}",
            f"{(beside(row) - row['before_mib']) / (beside(base) - base['before_mib']):.2f}",
        ]
        for row in rows
    ]
    versus = f"against {base['num_inputs']:,}"
    lines = _lines(
        [*columns, f"(peak - results) {versus}", f"(peak - results - before) {versus}"], cells
    )
    largest = rows[-1]
    if largest["num_inputs"] == MILLION:
        growth = beside(largest) / beside(base)
        exit_scores = "reached" if growth <= 1.2 else "**not reached**"
        lines += [
            "",
            f"Bar G (at most 1.2 times the peak with 10,000): {growth:.3f}, {exit_scores}.",
        ]
    return lines


def _lines(columns: list[str], rows: list[list[Any]]) -> list[str]:
    return [
        f"| {' | '.join(map(str, cells))} |" for cells in (columns, ["---:"] * len(columns), *rows)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=[*SERIES, "inputs"], default=[*SERIES, "inputs"]
    )
    parser.add_argument("--rows", type=int, help="inputs at most, in a turn or a process")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--million", action="store_true", help="1,000,000 inputs, too")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    file = given.out / "growth.json"
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for series in given.only:
        start, rows = time.perf_counter(), []
        for size in SERIES.get(series, (*COUNTS, *([MILLION] if given.million else []))):
            if series == "inputs":
                num = min(size, given.rows or size)
                command = [sys.executable, str(HERE / "synthetic.py"), str(num)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            else:
                rows += point(series, size, given.rows, given.repeats)
            print(f"{series} {size}: {time.perf_counter() - start:.0f} s {rows[-1]}", flush=True)
        content[series] = {
            "command": f"python {shlex.join(sys.argv)}",
            "repeats": given.repeats,
            "threads": torch.get_num_threads(),
            "minutes": (time.perf_counter() - start) / 60,
            "environment": vars(report.environment()),
            "rows": rows,
        }
        whole_files.replace(file, json.dumps(content, indent=1) + "\n")
        (given.out / "growth.md").write_text(markdown(content))


if __name__ == "__main__":
    main()
