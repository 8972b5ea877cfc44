"""What the jobs of a multirun folder left behind -> rows, and their means over seeds.

Reads results.json and .hydra/overrides.yaml only. Knows nothing of models; imports nothing heavy.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deebert.errors import UserError
from deebert.untrusted import plain_files

MEASURED = ("score", "expected_saving", "cost_ratio", "speed_up")
COLUMNS = (
    "task", "backbone", "stage", "objective", "seed", "exit", "split", "target", "threshold",
    "metric", *MEASURED,
)  # fmt: skip
TIMED = ("seconds", "time_saving")  # columns where any job was timed
SOURCES = ("ckpt", "record", "teacher")  # each seed has its own


@dataclass(frozen=True)
class Job:
    """What one job left in its folder."""

    name: str
    overrides: tuple[str, ...]
    results: dict[str, Any] | None  # None: see `problem`
    problem: str = ""


def rows(folder: Path) -> list[dict[str, Any]]:
    """One row per finished job, split and threshold of its curve.

    A job that was told a target (a saving, say) has one row, as measured; one whose ramps are
    untrained (objective=final, student) has full depth only. Columns: `job`, the overrides that
    differ between jobs and are no column yet, then COLUMNS, then, if any job was timed, TIMED: on
    the headline split, of the first precision and batch size that the job timed; None elsewhere.
    """
    return rows_of(jobs_of(folder))


@dataclass(frozen=True)
class Mean:
    """A point of the picture: rows that are equal in all but seed and ORIGINS."""

    line: dict[str, Any]  # what tells this line of the picture from the others
    target: str | None
    threshold: float | str | None
    seeds: tuple[int, ...]
    score: float | None  # None without labels
    score_spread: float | None  # sample standard deviation; None for one seed
    expected_saving: float
    expected_saving_spread: float | None
    seconds: float | None  # None if not all rows were timed
    time_saving: float | None


def over_seeds(rows: list[dict[str, Any]]) -> list[Mean]:
    """Mean and spread over seeds; task, objective, exit rule and overrides stay apart."""
    lines = defaultdict(list)
    for row in rows:
        lines[tuple(_line(row).items())].append(row)
    means = []
    for about, line in lines.items():
        runs = {(row["seed"], _source(row)) for row in line}
        # A seed twice: these checkpoints differ in something else, and are not to be averaged.
        apart = len(runs) > len({seed for seed, _ in runs})
        groups: dict[Any, dict[Any, dict[str, Any]]] = defaultdict(dict)
        for row in line:
            along = row["target"] or row["threshold"]  # a target has another threshold in each seed
            groups[_source(row) if apart else (), along][row["seed"], _source(row)] = row
        for (source, _), group in groups.items():
            means.append(_mean(dict(about) | dict(source), [*group.values()]))
    return means


def jobs_of(folder: Path) -> list[Job]:
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
        results = plain_files.json_file(place / "results.json")
        _measured(results)  # all that is needed is in it
    except FileNotFoundError:
        return Job(name, overrides, None, "no results")
    except UserError as error:
        return Job(name, overrides, None, str(error))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Job(name, overrides, None, f"damaged results.json ({reason})")
    if not (place / "results.md").exists():  # written at the end only, results.json at each epoch
        return Job(name, overrides, None, f"stopped after epoch {results.get('epoch', '?')}")
    return Job(name, overrides, results)


def _overrides(file: Path) -> tuple[str, ...]:
    from omegaconf import OmegaConf
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        # As they stand: the value of an environment variable that one names is not for a table.
        found: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        return tuple(map(str, found))
    except (OSError, YAMLError, TypeError):  # damaged, or hydra.output_subdir=null
        return ()


def rows_of(jobs: list[Job]) -> list[dict[str, Any]]:
    finished = [(job, _said(job), _measured(job.results)) for job in jobs if job.results]
    targets = {row["target"] or "" for _, _, measured in finished for row in measured}
    columns = {*COLUMNS, *(part.partition("=")[0] for target in targets for part in target.split())}
    keys = dict.fromkeys(key for _, said, _ in finished for key in said)
    others = [key for key in keys if key not in columns]
    differing = [key for key in others if len({said.get(key) for _, said, _ in finished}) > 1]
    timed = any(row["seconds"] is not None for _, _, measured in finished for row in measured)
    kept = (*COLUMNS, *TIMED) if timed else COLUMNS
    return [
        {"job": job.name}
        | {key: said.get(key, "") for key in differing}
        | {key: row[key] for key in kept}
        for job, said, measured in finished
        for row in measured
    ]


def _said(job: Job) -> dict[str, str]:
    pairs = (override.lstrip("+~").partition("=") for override in job.overrides)
    return {key: value for key, _, value in pairs}


def _measured(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one job, under COLUMNS and TIMED."""
    about = {key: results[key] for key in ("task", "backbone", "stage", "objective", "seed")}
    about |= {"exit": results.get("exit", {}).get("name", ""), "metric": results["metric"]}
    target = None
    if calibration := results.get("calibration"):
        target = _text(calibration["wish" if "wish" in calibration else "target"])  # its old name
        outcomes = {results["split"]: calibration["measured"]}
        outcomes |= calibration.get("measured_elsewhere", {})
        splits = {split: [outcome] for split, outcome in outcomes.items()}
    else:
        parts = (results, *results.get("other_splits", []))
        splits = {part["split"]: _points(part, results["objective"]) for part in parts}
    times = _times(results)
    found = []
    for split, points in splits.items():
        for point in points:
            cost_ratio = 1 - point["expected_saving"]
            values = about | {"cost_ratio": cost_ratio, "speed_up": 1 / cost_ratio} | point
            values |= {
                "split": split,
                "target": target,
                "threshold": _hashable(point.get("threshold")),
            }
            row = {column: values[column] for column in COLUMNS}
            # A target has but one case, whose thresholds may have been cross-fitted.
            case = next(iter(times.values()), {}) if target else times.get(row["threshold"], {})
            if split != results["split"]:  # only the first is timed
                case = {}
            found.append(row | {column: case.get(column) for column in TIMED})
    return found


def _times(results: dict[str, Any]) -> dict[float | str | None, dict[str, Any]]:
    """What was timed, by threshold: of the first precision and batch size."""
    timing = results.get("timing") or []
    same = ("precision", "batch_size")
    first = [case for case in timing if all(case[key] == timing[0][key] for key in same)]
    return {_hashable(case["threshold"]): case for case in first}


def _points(part: dict[str, Any], objective: str) -> list[dict[str, Any]]:
    from deebert.models.trained_ramps import trains_ramps  # heavy: only where there are results

    if trains_ramps(objective):
        points: list[dict[str, Any]] = part["curve"]
        return points
    # Exits at untrained ramps mean nothing; threshold 0 never exits.
    return [{"threshold": 0.0, "score": part["exits"][-1]["score"], "expected_saving": 0.0}]


def _hashable(threshold: float | list[float] | None) -> float | str | None:
    """One threshold; where each ramp has its own, as they are written on the command line."""
    return str(threshold).replace(" ", "") if isinstance(threshold, list) else threshold


def _text(target: Mapping[str, Any]) -> str:
    """What was wished for, then how: "max_drop=0.01 confidence=0.95 loss=excess"."""
    return " ".join(f"{key}={value}" for key, value in target.items() if value is not False)


def _kind(target: str | None) -> str:
    """The target without its value: what a line of the picture has in common."""
    name, _, rest = (target or "").partition("=")
    return f"{name} {rest.partition(' ')[2]}".strip()


def _source(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((key, row[key]) for key in SOURCES if key in row)


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("job", "seed", *SOURCES, "target", "threshold", *MEASURED, *TIMED)
    line = {key: value for key, value in row.items() if key not in left_out}
    return line | {"target_kind": _kind(row["target"])}


def _mean(line: dict[str, Any], group: list[dict[str, Any]]) -> Mean:
    target = group[0]["target"]
    savings = [row["expected_saving"] for row in group]
    scores = [row["score"] for row in group if row["score"] is not None]
    timed = all(row.get("seconds") is not None for row in group)
    return Mean(
        line=line,
        target=target,
        threshold=None if target else group[0]["threshold"],
        seeds=tuple(row["seed"] for row in group),
        score=statistics.fmean(scores) if scores else None,
        score_spread=statistics.stdev(scores) if len(scores) > 1 else None,
        expected_saving=statistics.fmean(savings),
        expected_saving_spread=statistics.stdev(savings) if len(savings) > 1 else None,
        seconds=statistics.fmean(row["seconds"] for row in group) if timed else None,
        time_saving=statistics.fmean(row["time_saving"] for row in group) if timed else None,
    )
