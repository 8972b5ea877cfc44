"""Turn the results of the jobs in a multirun folder into rows, and compute means over seeds.

The module reads results.json and .hydra/overrides.yaml only. It does not know models, and imports
nothing heavy.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deebert.errors import UserError, first_line
from deebert.models.trained_ramps import trains_ramps
from deebert.reporting.results import Results, TimedCase
from deebert.reporting.split_results import Outcome, SplitResults, Thresholds
from deebert.untrusted import plain_files

MEASURED = ("score", "expected_saving", "cost_ratio", "speed_up")
COLUMNS = (
    "task", "backbone", "stage", "objective", "seed", "exit", "split", "target", "threshold",
    "metric", *MEASURED,
)  # fmt: skip
TIMED = ("seconds", "time_saving")  # further columns, if a job was timed
AREA = "area"  # a further column, if a job has one
SOURCE_COLUMNS = ("ckpt", "record", "teacher")  # the source of a job; it differs between seeds


@dataclass(frozen=True)
class Job:
    """One job of a multirun folder.

    Attributes:
        name: the path of its folder below the multirun folder.
        overrides: its overrides, as on the command line.
        measured: its rows, with the columns COLUMNS, AREA and TIMED, or None if there is a problem.
        problem: what is wrong with a job without rows.
    """

    name: str
    overrides: tuple[str, ...]
    measured: list[dict[str, Any]] | None
    problem: str = ""


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each finished job, split and threshold of its curve.

    A job with a target, such as a saving, has one row for each split, with the measured values. A
    job with untrained ramps (objective=final or student) has full depth only.

    Args:
        folder: the multirun folder.

    Returns:
        Rows of equal columns: `job`, the overrides that differ between jobs and are no other
        column, COLUMNS, AREA (the area under score against saving of the split) if a job has one,
        and TIMED if a job was timed. The times are those of the first precision
        and batch size of the job on the headline split, and None elsewhere.
    """
    return rows_of(jobs_of(folder))


@dataclass(frozen=True)
class Mean:
    """A point of the plot: the mean of rows that differ in the seed and SOURCE_COLUMNS only.

    Attributes:
        line: the values by which this line of the plot differs from the others.
        target: the target, or None.
        threshold: the threshold, or None if there is a target.
        seeds: the seeds of the rows.
        score: the mean score, or None without labels.
        score_spread: the sample standard deviation of the score, or None for one seed.
        expected_saving: the mean expected saving.
        expected_saving_spread: its sample standard deviation, or None for one seed.
        seconds: the mean time, or None if a row was not timed.
        time_saving: the mean time saving, or None if a row was not timed.
    """

    line: dict[str, Any]
    target: str | None
    threshold: float | str | None
    seeds: tuple[int, ...]
    score: float | None
    score_spread: float | None
    expected_saving: float
    expected_saving_spread: float | None
    seconds: float | None
    time_saving: float | None


def over_seeds(rows: list[dict[str, Any]]) -> list[Mean]:
    """Compute means and spreads over seeds.

    Rows of another task, objective, exit rule or override are not averaged.

    Args:
        rows: rows with the columns of `rows_of`.
    """
    lines = defaultdict(list)
    for row in rows:
        lines[tuple(_line(row).items())].append(row)
    means = []
    for line_values, line in lines.items():
        runs = {(row["seed"], _source(row)) for row in line}
        # If two sources have the same seed, they differ in something else and are not averaged.
        separate = len(runs) > len({seed for seed, _ in runs})
        groups: dict[Any, dict[Any, dict[str, Any]]] = defaultdict(dict)
        for row in line:
            # The thresholds of one target differ between seeds.
            point = row["target"] or row["threshold"]
            groups[_source(row) if separate else (), point][row["seed"], _source(row)] = row
        for (source, _), group in groups.items():
            means.append(_mean(dict(line_values) | dict(source), [*group.values()]))
    return means


def jobs_of(folder: Path) -> list[Job]:
    """Find every job below a folder, sorted by its number."""
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
        results = Results.from_json(plain_files.json_file(place / "results.json"))
        measured = _measured(results)  # a damaged value may show only where it is used
    except FileNotFoundError:
        return Job(name, overrides, None, "no results")
    except UserError as error:
        return Job(name, overrides, None, str(error))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return Job(name, overrides, None, f"damaged results.json ({reason})")
    if not (place / "results.md").exists():  # only written at the end
        return Job(name, overrides, None, f"stopped after epoch {results.epoch or '?'}")
    return Job(name, overrides, measured)


def _overrides(file: Path) -> tuple[str, ...]:
    from omegaconf import OmegaConf
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        # Not resolved, as a table must not show the value of an environment variable.
        overrides: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        return tuple(map(str, overrides))
    except (OSError, YAMLError, TypeError):  # a damaged file, or hydra.output_subdir=null
        return ()


def rows_of(jobs: list[Job]) -> list[dict[str, Any]]:
    """Return the rows of jobs, as `rows` describes them."""
    finished = [
        (job, _override_values(job), job.measured) for job in jobs if job.measured is not None
    ]
    targets = {row["target"] or "" for _, _, measured in finished for row in measured}
    columns = {*COLUMNS, *(part.partition("=")[0] for target in targets for part in target.split())}
    keys = dict.fromkeys(key for _, overrides, _ in finished for key in overrides)
    others = [key for key in keys if key not in columns]
    differing = [
        key for key in others if len({overrides.get(key) for _, overrides, _ in finished}) > 1
    ]
    timed = any(row["seconds"] is not None for _, _, measured in finished for row in measured)
    with_area = any(row[AREA] is not None for _, _, measured in finished for row in measured)
    kept = (*COLUMNS, *((AREA,) if with_area else ()), *(TIMED if timed else ()))
    return [
        {"job": job.name}
        | {key: overrides.get(key, "") for key in differing}
        | {key: row[key] for key in kept}
        for job, overrides, measured in finished
        for row in measured
    ]


def _override_values(job: Job) -> dict[str, str]:
    pairs = (override.lstrip("+~").partition("=") for override in job.overrides)
    return {key: value for key, _, value in pairs}


def _measured(results: Results) -> list[dict[str, Any]]:
    """Return the rows of one job, with the columns COLUMNS, AREA and TIMED."""
    run_values = {
        key: getattr(results, key)
        for key in ("task", "backbone", "stage", "objective", "seed", "metric")
    }
    headline, target = results.headline.split, None
    splits: Mapping[str, Sequence[tuple[Thresholds | None, Outcome]]]
    if calibration := results.calibration:
        target = _text(calibration.target)
        outcomes = {headline: calibration.measured} | (calibration.measured_elsewhere or {})
        splits = {split: [(None, outcome)] for split, outcome in outcomes.items()}
    else:
        splits = {part.split: _points(part, results.objective) for part in results.splits}
    times = _times(results.timing or [])
    areas = {part.split: part.area() for part in results.splits}
    measured = []
    for split, points in splits.items():
        for threshold, outcome in points:
            values = run_values | {key: getattr(outcome, key) for key in MEASURED}
            values |= {"exit": results.exit_name, "split": split, "target": target}
            values["threshold"] = _hashable(threshold)
            row = {column: values[column] for column in COLUMNS} | {AREA: areas.get(split)}
            # A target has one case only. Its thresholds may be cross-fitted.
            case = next(iter(times.values()), None) if target else times.get(row["threshold"])
            if split != headline:  # only the headline split is timed
                case = None
            measured.append(row | {column: case and getattr(case, column) for column in TIMED})
    return measured


def _times(timing: list[TimedCase]) -> dict[float | str | None, TimedCase]:
    """Return the timed cases of the first precision and batch size by threshold."""
    same = [(case.precision, case.batch_size) for case in timing]
    return {
        _hashable(case.threshold): case
        for case, kind in zip(timing, same, strict=True)
        if kind == same[0]
    }


def _points(part: SplitResults, objective: str) -> list[tuple[Thresholds, Outcome]]:
    """Return the curve, or full depth alone if early exit has no meaning: ramps are untrained."""
    if trains_ramps(objective):
        return [(point.threshold, point) for point in part.curve]
    full, counts = part.exits[-1], [0] * (part.num_layers - 1) + [part.num_rows]
    outcome = Outcome(
        score=full.score, scores=full.scores, cost_ratio=1.0, expected_saving=0.0, speed_up=1.0,
        exit_counts=counts,
    )  # fmt: skip
    return [(0.0, outcome)]


def _hashable(threshold: Thresholds | list[Thresholds] | None) -> float | str | None:
    """Return one threshold. Thresholds for each ramp become a text, as on the command line."""
    return str(threshold).replace(" ", "") if isinstance(threshold, list) else threshold


def _text(target: Mapping[str, Any]) -> str:
    """Return a target as text, such as "max_drop=0.01 confidence=0.95 loss=excess"."""
    return " ".join(f"{key}={value}" for key, value in target.items() if value is not False)


def _kind(target: str | None) -> str:
    """Return a target without its value. It is the same for all points of a line of the plot."""
    name, _, rest = (target or "").partition("=")
    return f"{name} {rest.partition(' ')[2]}".strip()


def _source(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((key, row[key]) for key in SOURCE_COLUMNS if key in row)


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("job", "seed", *SOURCE_COLUMNS, "target", "threshold", *MEASURED, AREA, *TIMED)
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
