"""Does the printed 95 % interval hold what unseen rows show, also after a search with labels?

    python benchmarks/expectations.py [--draws 1000] [--rows 400 2000] [--jobs 2]

Rows are drawn from a population: calibration rows, and as many unseen ones. An operating point is
chosen on the first, and measured on the others. `covered` is the share of draws whose measured
score lies in the interval of the expected score; `bias` is expected - measured; `width` is the
width of the interval, as a multiple of that of one global threshold for the same saving. `in
sample` is the expectation without cross-fitting. Some minutes a row of the table on one core.
Writes benchmarks/expectations.json and .md after each row; rows of an earlier call that this one
does not make again stay there.
"""

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deebert.data.tasks import Task
from deebert.exits import calibration, curves, rules
from deebert.exits.records import Record
from deebert.exits.target import Target
from deebert.reporting import report

HERE = Path(__file__).parent
PART = 50  # draws that a process makes at once
SAVING = 0.4
# Factors of the logits of each ramp. Ramps that are trained one by one are not equally sure of what
# they are equally right about.
POPULATIONS = {
    "ramps are as right as sure": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "ramps differ in how sure they are": (4.0, 0.7, 2.5, 1.0, 0.5, 1.0),
}
WAYS: dict[str, tuple[str, dict[str, bool]]] = {  # exit rule, and switches of the target
    "one threshold": ("entropy", {}),
    "per_ramp=true": ("entropy", {"per_ramp": True}),
    "temperature=true": ("entropy", {"temperature": True}),
    "exit=relative_entropy": ("relative_entropy", {}),
}


def task(metric: str) -> Task:
    """A task of two classes with this score."""
    return Task.from_config(
        {"name": "simulated", "columns": ["text"], "labels": ["a", "b"], "metrics": [metric]}
    )


def drawn(num_rows: int, seed: int, scales: Sequence[float], share: float = 0.5) -> Record:
    """Draw rows of any difficulty; ramps get better with depth, and are not always right.

    Args:
        num_rows: number of rows.
        seed: of the draw.
        scales: a factor of the logits of each ramp.
        share: share of the second class.
    """
    random, layers = torch.Generator().manual_seed(seed), len(scales)
    labels_N = (torch.rand(num_rows, generator=random) < share).long()
    ease_N1 = 3 * torch.rand(num_rows, 1, generator=random)
    noise_NL = torch.randn(num_rows, layers, generator=random) * torch.linspace(2.5, 0.8, layers)
    gap_NL = (1.5 * (ease_N1 + noise_NL) + 0.3) * torch.tensor(scales)
    gap_NL *= 2.0 * labels_N[:, None] - 1
    logits_NLC = torch.stack([-gap_NL / 2, gap_NL / 2], -1)
    length_N = torch.randint(5, 60, (num_rows,), generator=random)
    return Record("simulated", logits_NLC, labels_N, torch.arange(num_rows), length_N)


def simulate(
    population: Sequence[float], way: str, metric: str, num_rows: int, draws: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Choose on drawn rows and measure on others, again and again.

    Args:
        population: the factors of the ramps.
        way: one of `WAYS`.
        metric: the score.
        num_rows: number of calibration rows, and of unseen rows.
        draws: number of draws.
        seed: of the first draw.

    Returns:
        What each draw shows; `summary` takes the means.
    """
    torch.set_num_threads(1)
    name, switches = WAYS[way]
    this, target = task(metric), Target(target_saving=SAVING, **switches)
    rule, plain = rules.named(name, 2), rules.default(2)
    kept = []
    for draw in range(draws):
        share = 0.5 if metric == "accuracy" else 0.3
        seen, new = (
            drawn(num_rows, 2 * (seed + draw) + part, population, share) for part in range(2)
        )
        operating_point = calibration.choose(seen, this, rule, target)
        measured = curves.measured(new, this, *operating_point(new, this))
        printed = calibration.expected(seen, this, rule, target, operating_point, num_rows)
        in_sample = curves.expected(seen, this, operating_point, num_rows)
        one = calibration.choose(seen, this, plain, Target(target_saving=SAVING))
        by_one = curves.expected(seen, this, one, num_rows)
        kept.append(
            {
                "covered": _inside(printed.score_interval, measured.score),
                "bias": printed.score - measured.score,
                "width": _width(printed.score_interval) / _width(by_one.score_interval),
                "in_sample_covered": _inside(in_sample.score_interval, measured.score),
                "in_sample_bias": in_sample.score - measured.score,
                "saving_covered": _inside(printed.interval, measured.expected_saving),
                "saving_width": _width(printed.interval) / _width(by_one.interval),
                "per_ramp": isinstance(operating_point.thresholds, list),
            }
        )
    return kept


def summary(kept: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means over draws."""
    return {key: float(np.mean([each[key] for each in kept])) for key in kept[0]}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["rows"], row["population"], row["way"]


def _inside(interval: Sequence[float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def _width(interval: Sequence[float]) -> float:
    return interval[1] - interval[0]


def markdown(listed: list[dict[str, Any]]) -> str:
    """Return the results as a table."""
    columns = list(listed[0])
    lines = [
        f"| {' | '.join(name.replace('_', ' ') for name in columns)} |",
        "|---" * len(columns) + "|",
    ]
    for row in listed:
        cells = [
            f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="+", default=[400, 2000])
    parser.add_argument("--populations", nargs="+", default=list(POPULATIONS), choices=POPULATIONS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    file = HERE / "expectations.json"
    for num_rows in given.rows:
        for population in given.populations:
            for way in given.ways:
                start = time.perf_counter()
                metric = "f1" if way == "exit=relative_entropy" else "accuracy"
                more = POPULATIONS[population], way, metric, num_rows
                with ProcessPoolExecutor(given.jobs) as pool:
                    parts = [
                        pool.submit(simulate, *more, min(PART, given.draws - start), start)
                        for start in range(0, given.draws, PART)
                    ]
                    kept = [draw for part in parts for draw in part.result()]
                about = {"population": population, "way": way, "metric": metric, "rows": num_rows}
                row = about | {"draws": len(kept)} | summary(kept)
                print(f"{markdown([row])}\n({time.perf_counter() - start:.0f} s)", flush=True)
                earlier = json.loads(file.read_text())["results"] if file.exists() else []
                listed = sorted([row, *(r for r in earlier if _key(r) != _key(row))], key=_key)
                content = {"environment": vars(report.environment()), "results": listed}
                file.write_text(json.dumps(content, indent=2) + "\n")
                text = f"# Expected and measured score\n\n{__doc__}\n{markdown(listed)}\n"
                (HERE / "expectations.md").write_text(text)


if __name__ == "__main__":
    main()
