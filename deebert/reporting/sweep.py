"""Write sweep.csv, sweep.md and sweep.png, which show every job of a multirun folder.

The module reads only files of the jobs (results.json, .hydra/overrides.yaml). So it also works on
an old folder (`deebert sweep folder=FOLDER`) and after a failed job, when Hydra does
not call `on_multirun_end`. It does not know models, and imports nothing heavy, as every command
loads it.
"""

import csv
import io
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deebert.disk import whole_files
from deebert.errors import UserError
from deebert.options import option
from deebert.reporting.markdown import text
from deebert.reporting.sweep_rows import (
    COLUMNS,
    SOURCE_COLUMNS,
    Job,
    Mean,
    jobs_of,
    over_seeds,
    rows_of,
)

log = logging.getLogger(__name__)

FEW = 16  # up to this number of points, each point of the plot is labelled with its threshold


def write(folder: Path) -> None:
    """Write sweep.csv, sweep.md and sweep.png, each in one step.

    Args:
        folder: the multirun folder.
    """
    from filelock import FileLock

    # Jobs may end in several processes at once. With the lock, the last one to write reads all.
    with FileLock(folder / ".sweep.lock", timeout=60):
        jobs = jobs_of(folder)
        rows = rows_of(jobs)
        whole_files.replace(folder / "sweep.csv", _csv(rows))
        whole_files.replace(folder / "sweep.md", _markdown(folder.name, jobs, rows))
        if points := [mean for mean in over_seeds(rows) if mean.score is not None]:
            whole_files.replace(folder / "sweep.png", _plot(points))


@dataclass
class SweepOptions:
    """The options of `deebert sweep`."""

    folder: str = option("???", "a multirun folder, or any folder of runs")


def run(options: SweepOptions) -> None:
    """Write the summary of an existing folder.

    Raises:
        UserError: it is no folder, or no job in it has finished.
    """
    folder = Path(options.folder).absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a multirun folder (folder=multirun/...)")
    jobs = jobs_of(folder)
    if all(job.measured is None for job in jobs):
        raise UserError(
            f"{folder} holds no results: {len(jobs)} jobs, none of them finished; give a "
            "multirun folder (folder=multirun/...) with a results.json in each job's folder"
        )
    write(folder)
    print(f"Sweep: {folder / 'sweep.md'}")


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else ("job", *COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(title: str, jobs: list[Job], rows: list[dict[str, Any]]) -> str:
    missing = [job for job in jobs if job.measured is None]
    lines = [f"# Sweep {text(title)}: {len(jobs) - len(missing)} of {len(jobs)} jobs finished", ""]
    if missing:
        table = [
            {"job": job.name, "overrides": " ".join(job.overrides), "what is there": job.problem}
            for job in missing
        ]
        lines += ["## Failed or unfinished", "", *_table(table), ""]
    means = over_seeds(rows)
    if any(len(mean.seeds) > 1 for mean in means):
        table = [
            {key: value for key, value in mean.line.items() if key != "target_kind"}
            | {key: value for key, value in vars(mean).items() if key not in ("line", "seeds")}
            | {"seeds": " ".join(map(str, mean.seeds)), "n": len(mean.seeds)}
            for mean in means
        ]
        lines += ["## Over seeds: mean and sample standard deviation", "", *_table(table), ""]
    if rows:
        lines += ["## Every job", "", *_table(rows), ""]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Yield the lines of a Markdown table, without the columns that are empty in every row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    yield f"| {' | '.join(text(column.replace('_', ' ')) for column in columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        cells = (_cell(column, row.get(column)) for column in columns)
        yield f"| {' | '.join(cells)} |"


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column.startswith(("expected_saving", "time_saving")):
        return f"{value:.1%}"
    if column == "speed_up":
        return f"{value:.2f}x"
    if isinstance(value, float):
        return f"{value:g}" if column == "threshold" else f"{value:.4f}"
    return text(value)


def _plot(means: list[Mean]) -> bytes:
    """Draw score against saving, with a line for each group and error bars over several seeds.

    Where the time saving was measured, a dashed line shows the score against it.

    Returns:
        The content of a PNG file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    keys = dict.fromkeys(key for mean in means for key in mean.line if key != "metric")
    values = {key: {mean.line.get(key, "") for mean in means} for key in keys}
    lines = defaultdict(list)
    for mean in means:
        differing = (key for key in keys if len(values[key]) > 1 and mean.line.get(key, "") != "")
        lines[", ".join(_label(key, mean.line[key]) for key in differing)].append(mean)

    figure = Figure(figsize=(9 if len(lines) > 1 else 7, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10" if len(lines) <= 10 else "turbo"]
    for i, (label, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point.expected_saving)
        several = any(len(point.seeds) > 1 for point in points)
        colour = colours(i if len(lines) <= 10 else i / (len(lines) - 1))
        axes.errorbar(
            savings := [100 * point.expected_saving for point in points],
            scores := [point.score for point in points if point.score is not None],  # none is None
            xerr=[100 * (p.expected_saving_spread or 0) for p in points] if several else None,
            yerr=[p.score_spread or 0 for p in points] if several else None,
            marker="osD^v"[i % 5],
            markersize=4,
            capsize=2,
            elinewidth=0.8,
            color=colour,
            label=label or None,
        )
        timed = [
            (100 * point.time_saving, score)
            for point, score in zip(points, scores, strict=True)
            if point.time_saving is not None
        ]
        if timed:
            axes.plot(*zip(*timed, strict=True), "x--", color=colour, linewidth=1)
        if len(means) <= FEW:
            for point, x, y in zip(points, savings, scores, strict=True):
                text = (point.target or "").partition(" ")[0] or _cell("threshold", point.threshold)
                axes.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    line = means[0].line
    shared = [key for key in ("task", "backbone", "stage", "exit") if len(values[key]) == 1]
    any_timed = any(mean.time_saving is not None for mean in means)
    axes.set(
        xlabel="expected saving (% of layers)" + ("; dashed: time saving (%)" if any_timed else ""),
        ylabel=" or ".join(dict.fromkeys(mean.line["metric"] for mean in means)),
        title=", ".join(_label(key, line[key]) for key in shared if line[key]),
    )
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _label(key: str, value: Any) -> str:
    if key in SOURCE_COLUMNS and len(value) > 30:
        value = f"...{value[-27:]}"  # the end of a path differs most
    if key in ("task", "backbone", "objective", "exit", "target_kind"):
        return str(value)
    return f"stage {value}" if key == "stage" else f"{key}={value}"
