"""A multirun folder -> sweep.csv, sweep.md, sweep.png: every job in one table and one picture.

Reads only what the jobs left behind (results.json, .hydra/overrides.yaml), so it also works on an
old folder (`python -m deebert.sweep FOLDER`) and after a failed job, when Hydra doesn't call
`on_multirun_end`. Knows nothing of models; imports nothing heavy, as every command loads it.
"""

import argparse
import csv
import io
import json
import logging
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from deebert.errors import UserError

log = logging.getLogger(__name__)

MEASURED = ("score", "expected_saving", "cost_ratio", "speed_up")
COLUMNS = (
    "task", "backbone", "stage", "objective", "seed", "exit", "split", "wish", "threshold",
    "metric", *MEASURED,
)  # fmt: skip
ORIGINS = ("ckpt", "record")  # of an evaluation; each seed has its own
FEW = 16  # points: so many can carry their threshold in the picture and still be read


class SweepSummary(Callback):
    """Keeps the summary of a multirun up to date, as `hydra.callbacks.sweep`.

    After each job, in whichever process it ran: the summary is there even if a later job fails.
    """

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            _keep(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if _keep(config):
            log.info("sweep: %s", _folder(config) / "sweep.md")


@dataclass(frozen=True)
class Job:
    """What one job left in its folder."""

    name: str
    overrides: tuple[str, ...]
    results: dict[str, Any] | None  # None: see `problem`
    problem: str = ""


def rows(folder: Path) -> list[dict[str, Any]]:
    """One row per finished job, split and threshold of its curve.

    A job that was told a wish (a saving, say) has one row, as measured; one whose ramps are
    untrained (objective=final) has full depth only. Columns: `job`, the overrides that differ
    between jobs and are no column yet, then COLUMNS.
    """
    return _rows(_jobs(folder))


@dataclass(frozen=True)
class Mean:
    """A point of the picture: rows that are equal in all but seed and ORIGINS."""

    line: dict[str, Any]  # what tells this line of the picture from the others
    wish: str | None
    threshold: float | str | None
    seeds: tuple[int, ...]
    score: float | None  # None without labels
    score_spread: float | None  # sample standard deviation; None for one seed
    expected_saving: float
    expected_saving_spread: float | None


def over_seeds(rows: list[dict[str, Any]]) -> list[Mean]:
    """Mean and spread over seeds; task, objective, exit rule and overrides stay apart."""
    lines = defaultdict(list)
    for row in rows:
        lines[tuple(_line(row).items())].append(row)
    means = []
    for about, line in lines.items():
        runs = {(row["seed"], _origin(row)) for row in line}
        # A seed twice: these checkpoints differ in something else, and are not to be averaged.
        apart = len(runs) > len({seed for seed, _ in runs})
        groups: dict[Any, dict[Any, dict[str, Any]]] = defaultdict(dict)
        for row in line:
            along = row["wish"] or row["threshold"]  # a wish has another threshold in each seed
            groups[_origin(row) if apart else (), along][row["seed"], _origin(row)] = row
        for (origin, _), group in groups.items():
            means.append(_mean(dict(about) | dict(origin), [*group.values()]))
    return means


def write(folder: Path) -> None:
    """Write sweep.csv, sweep.md and sweep.png; a reader never sees half of one."""
    from filelock import FileLock

    # Jobs may end at once in several processes: the last one to write must have seen all.
    with FileLock(folder / ".sweep.lock", timeout=60):
        jobs = _jobs(folder)
        found = _rows(jobs)
        _replace(folder / "sweep.csv", _csv(found).encode())
        _replace(folder / "sweep.md", _markdown(folder.name, jobs, found).encode())
        if drawn := [mean for mean in over_seeds(found) if mean.score is not None]:
            _replace(folder / "sweep.png", _picture(drawn))


def main(arguments: list[str] | None = None) -> int:
    """The command for a folder that is there already; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m deebert.sweep", description="Write sweep.csv, sweep.md and sweep.png."
    )
    parser.add_argument("folder", type=Path, help="a multirun folder, or any folder of runs")
    folder = parser.parse_args(arguments).folder.absolute()
    try:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give a multirun folder (multirun/...)")
        jobs = _jobs(folder)
        if all(job.results is None for job in jobs):
            raise UserError(
                f"{folder} holds no results: {len(jobs)} jobs, none of them finished; give a "
                "multirun folder (multirun/...) with a results.json in each job's folder"
            )
        write(folder)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"Sweep: {folder / 'sweep.md'}")
    return 0


def _keep(config: DictConfig) -> bool:
    """Write the summary if this is the process to do it; did it work?"""
    if int(os.environ.get("LOCAL_RANK", 0)):
        return False
    try:
        write(_folder(config))
    except Exception as error:  # whatever it is, the job itself is well and finished
        log.warning("no summary of the sweep: %s: %s", type(error).__name__, error)
        return False
    return True


def _folder(config: DictConfig) -> Path:
    return Path(config.hydra.runtime.cwd) / config.hydra.sweep.dir


def _jobs(folder: Path) -> list[Job]:
    """Every job below the folder, by number."""
    places = {file.parent for file in folder.rglob("results.json")}
    places |= {file.parent.parent for file in folder.rglob(".hydra/overrides.yaml")}
    names = [str(place.relative_to(folder)) for place in places - {folder}]
    return [_job(folder, name) for name in sorted(names, key=_by_number)]


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else sys.maxsize, part) for part in Path(name).parts]


def _job(folder: Path, name: str) -> Job:
    place = folder / name
    overrides = _overrides(place / ".hydra" / "overrides.yaml")
    try:
        results = json.loads((place / "results.json").read_text())
        _measured(results)  # all that is needed is in it
    except FileNotFoundError:
        return Job(name, overrides, None, "no results")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Job(name, overrides, None, f"damaged results.json ({reason})")
    if not (place / "results.md").exists():  # written at the end only, results.json at each epoch
        return Job(name, overrides, None, f"stopped after epoch {results.get('epoch', '?')}")
    return Job(name, overrides, results)


def _overrides(file: Path) -> tuple[str, ...]:
    from omegaconf import OmegaConf
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        return tuple(str(override) for override in OmegaConf.load(file))
    except (OSError, YAMLError):  # damaged, or hydra.output_subdir=null
        return ()


def _rows(jobs: list[Job]) -> list[dict[str, Any]]:
    finished = [(job, _said(job), _measured(job.results)) for job in jobs if job.results]
    wishes = {row["wish"] or "" for _, _, measured in finished for row in measured}
    columns = {*COLUMNS, *(part.partition("=")[0] for wish in wishes for part in wish.split())}
    keys = dict.fromkeys(key for _, said, _ in finished for key in said)
    others = [key for key in keys if key not in columns]
    differing = [key for key in others if len({said.get(key) for _, said, _ in finished}) > 1]
    return [
        {"job": job.name, **{key: said.get(key, "") for key in differing}, **row}
        for job, said, measured in finished
        for row in measured
    ]


def _said(job: Job) -> dict[str, str]:
    pairs = (override.lstrip("+~").partition("=") for override in job.overrides)
    return {key: value for key, _, value in pairs}


def _measured(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one job, under COLUMNS."""
    about = {key: results[key] for key in ("task", "backbone", "stage", "objective", "seed")}
    about |= {"exit": results.get("exit", {}).get("name", ""), "metric": results["metric"]}
    wish = None
    if calibration := results.get("calibration"):
        wish = _text(calibration["wish"])
        outcomes = {results["split"]: calibration["measured"]}
        outcomes |= calibration.get("measured_elsewhere", {})
        splits = {split: [outcome] for split, outcome in outcomes.items()}
    else:
        parts = (results, *results.get("other_splits", []))
        splits = {part["split"]: _points(part, results["objective"]) for part in parts}
    found = []
    for split, points in splits.items():
        for point in points:
            cost_ratio = 1 - point["expected_saving"]
            values = about | {"cost_ratio": cost_ratio, "speed_up": 1 / cost_ratio} | point
            values |= {"split": split, "wish": wish, "threshold": _hashable(point.get("threshold"))}
            found.append({column: values[column] for column in COLUMNS})
    return found


def _points(part: dict[str, Any], objective: str) -> list[dict[str, Any]]:
    if objective != "final":
        points: list[dict[str, Any]] = part["curve"]
        return points
    # Exits at untrained ramps mean nothing; threshold 0 never exits.
    return [{"threshold": 0.0, "score": part["exits"][-1]["score"], "expected_saving": 0.0}]


def _hashable(threshold: float | list[float] | None) -> float | str | None:
    """One threshold; where each ramp has its own, as they are written on the command line."""
    return str(threshold).replace(" ", "") if isinstance(threshold, list) else threshold


def _text(wish: Mapping[str, Any]) -> str:
    """What was wished for, then how: "max_drop=0.01 confidence=0.95 loss=excess"."""
    return " ".join(f"{key}={value}" for key, value in wish.items() if value is not False)


def _kind(wish: str | None) -> str:
    """The wish without its value: what a line of the picture has in common."""
    name, _, rest = (wish or "").partition("=")
    return f"{name} {rest.partition(' ')[2]}".strip()


def _origin(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((key, row[key]) for key in ORIGINS if key in row)


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("job", "seed", *ORIGINS, "wish", "threshold", *MEASURED)
    line = {key: value for key, value in row.items() if key not in left_out}
    return line | {"wished": _kind(row["wish"])}


def _mean(line: dict[str, Any], group: list[dict[str, Any]]) -> Mean:
    wish = group[0]["wish"]
    savings = [row["expected_saving"] for row in group]
    scores = [row["score"] for row in group if row["score"] is not None]
    return Mean(
        line=line,
        wish=wish,
        threshold=None if wish else group[0]["threshold"],
        seeds=tuple(row["seed"] for row in group),
        score=statistics.fmean(scores) if scores else None,
        score_spread=statistics.stdev(scores) if len(scores) > 1 else None,
        expected_saving=statistics.fmean(savings),
        expected_saving_spread=statistics.stdev(savings) if len(savings) > 1 else None,
    )


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else ("job", *COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(title: str, jobs: list[Job], rows: list[dict[str, Any]]) -> str:
    missing = [job for job in jobs if job.results is None]
    lines = [f"# Sweep {title}: {len(jobs) - len(missing)} of {len(jobs)} jobs finished", ""]
    if missing:
        table = [
            {"job": job.name, "overrides": " ".join(job.overrides), "what is there": job.problem}
            for job in missing
        ]
        lines += ["## Failed or unfinished", "", *_table(table), ""]
    means = over_seeds(rows)
    if any(len(mean.seeds) > 1 for mean in means):
        table = [
            {key: value for key, value in mean.line.items() if key != "wished"}
            | {key: value for key, value in vars(mean).items() if key not in ("line", "seeds")}
            | {"seeds": " ".join(map(str, mean.seeds)), "n": len(mean.seeds)}
            for mean in means
        ]
        lines += ["## Over seeds: mean and sample standard deviation", "", *_table(table), ""]
    if rows:
        lines += ["## Every job", "", *_table(rows), ""]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Markdown, without the columns that say nothing in any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    yield f"| {' | '.join(column.replace('_', ' ') for column in columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        cells = (_cell(column, row.get(column)) for column in columns)
        yield f"| {' | '.join(cells)} |"


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column.startswith("expected_saving"):
        return f"{value:.1%}"
    if column == "speed_up":
        return f"{value:.2f}x"
    if isinstance(value, float):
        return f"{value:g}" if column == "threshold" else f"{value:.4f}"
    return str(value).replace("|", "\\|")


def _picture(means: list[Mean]) -> bytes:
    """Score against saving: a line a group, with error bars where there are several seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    keys = dict.fromkeys(key for mean in means for key in mean.line if key != "metric")
    values = {key: {mean.line.get(key, "") for mean in means} for key in keys}
    lines = defaultdict(list)
    for mean in means:
        differing = (key for key in keys if len(values[key]) > 1 and mean.line.get(key, "") != "")
        lines[", ".join(_named(key, mean.line[key]) for key in differing)].append(mean)

    figure = Figure(figsize=(9 if len(lines) > 1 else 7, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10" if len(lines) <= 10 else "turbo"]
    for i, (label, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point.expected_saving)
        several = any(len(point.seeds) > 1 for point in points)
        axes.errorbar(
            savings := [100 * point.expected_saving for point in points],
            scores := [point.score for point in points if point.score is not None],  # all have one
            xerr=[100 * (p.expected_saving_spread or 0) for p in points] if several else None,
            yerr=[p.score_spread or 0 for p in points] if several else None,
            marker="osD^v"[i % 5],
            markersize=4,
            capsize=2,
            elinewidth=0.8,
            color=colours(i if len(lines) <= 10 else i / (len(lines) - 1)),
            label=label or None,
        )
        if len(means) <= FEW:
            for point, x, y in zip(points, savings, scores, strict=True):
                text = (point.wish or "").partition(" ")[0] or _cell("threshold", point.threshold)
                axes.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    line = means[0].line
    shared = [key for key in ("task", "backbone", "stage", "exit") if len(values[key]) == 1]
    axes.set(
        xlabel="expected saving (% of layers)",
        ylabel=" or ".join(dict.fromkeys(mean.line["metric"] for mean in means)),
        title=", ".join(_named(key, line[key]) for key in shared if line[key]),
    )
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _named(key: str, value: Any) -> str:
    if key in ORIGINS and len(value) > 30:
        value = f"...{value[-27:]}"  # the end of a path tells more
    if key in ("task", "backbone", "objective", "exit", "wished"):
        return str(value)
    return f"stage {value}" if key == "stage" else f"{key}={value}"


def _replace(file: Path, content: bytes) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(content)
    part.replace(file)


if __name__ == "__main__":
    sys.exit(main())
