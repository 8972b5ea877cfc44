"""The W&B dashboard as code: python -m deebert.dashboard ENTITY/PROJECT saves it as a view.

Needs the extra `dashboard` and, to save, the W&B service. Knows the names that callbacks.py and
tracking.py log, nothing else.
"""

import argparse
import sys
from typing import Any

from deebert.errors import UserError, first_line

EXTRA = "pip install 'deebert[dashboard]'"


def workspace(entity: str, project: str) -> Any:
    """The view: trade-off first, then the ramps over training, thresholds, exits and pictures."""
    from wandb_workspaces.reports.v2 import LinePlot, MediaBrowser, ScatterPlot, SummaryMetric
    from wandb_workspaces.workspaces import Section, Workspace

    saving = "curve/expected_saving"

    def curve(title: str, name: str, **more: Any) -> Any:
        return LinePlot(
            title=title, x=saving, y=[f"curve/{name}"], title_x="expected saving", **more
        )

    def training(title: str, **more: Any) -> Any:
        return LinePlot(title=title, x="trainer/global_step", title_x="optimizer steps", **more)

    grouped: dict[str, Any] = {
        "groupby": "Group",
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "stddev",
    }
    target = [SummaryMetric(f"calibration/{name}") for name in ("expected_saving", "score")]
    sections = {
        "Score against saving": [
            curve("Every run", "score"),
            curve("Every sweep, mean and deviation", "score", **grouped),
            ScatterPlot(title="What a target gave", x=target[0], y=target[1]),
        ],
        "Ramps over training": [
            training("Score of every ramp", metric_regex=r"val/ramp_[0-9]+/score"),
            training("Score", y=["val/score", "val/mean_ramp_score"]),
            training("Loss", y=["train/loss", "val/loss"]),
        ],
        "Thresholds": [
            curve("Threshold for a saving", "threshold"),
            training("Saving", metric_regex=r"val/threshold_.*/expected_saving"),
            training("Score", metric_regex=r"val/threshold_.*/score"),
        ],
        "Exits": [
            LinePlot(
                title="Share of the inputs that leave at each layer",
                x=saving,
                title_x="expected saving",
                metric_regex=r"curve/exit_[0-9]+",
                plot_type="stacked-area",
                max_runs_to_show=1,
            )
        ],
        "Pictures": [MediaBrowser(title="curve.png", media_keys=["curve"])],
    }
    return Workspace(
        entity=entity,
        project=project,
        name="DeeBERT",
        sections=[Section(name=n, panels=p, is_open=True) for n, p in sections.items()],
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m deebert.dashboard", description="Save the view.")
    parser.add_argument("place", metavar="ENTITY/PROJECT", help="e.g. my-team/deebert")
    place = parser.parse_args(arguments).place
    try:
        entity, _, project = place.partition("/")
        if not entity or not project or "/" in project:
            raise UserError(f"{place} is no project; give ENTITY/PROJECT, e.g. my-team/deebert")
        _save(entity, project)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _save(entity: str, project: str) -> None:
    try:
        view = workspace(entity, project)
    except ImportError as error:
        raise UserError(f"{error}; it comes with {EXTRA}") from error
    try:
        view.save()  # says where the view is
    except Exception as error:  # W&B's own, gql's and requests' have no common ancestor
        reason = first_line(error)
        raise UserError(f"the view was not saved, W&B says: {reason}") from error


if __name__ == "__main__":
    sys.exit(main())
