"""Define the W&B dashboard as code, and save it as a view of a project.

`deebert dashboard project=ENTITY/PROJECT` needs the extra `dashboard` and the W&B
service. The module knows the names of the logged values. It does not know how they are computed.
"""

from dataclasses import dataclass
from typing import Any

from deebert.errors import UserError, first_line
from deebert.options import option

EXTRA = "pip install 'deebert[dashboard]'"


def workspace(entity: str, project: str) -> Any:
    """Make the view: trade-off, ramps over training, thresholds, exits and plots.

    Args:
        entity: the user or team at W&B.
        project: the name of the project.
    """
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
            ScatterPlot(title="Score and saving measured for a target", x=target[0], y=target[1]),
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
        "Plots": [MediaBrowser(title="curve.png", media_keys=["curve"])],
    }
    return Workspace(
        entity=entity,
        project=project,
        name="DeeBERT",
        sections=[Section(name=n, panels=p, is_open=True) for n, p in sections.items()],
    )


@dataclass
class DashboardOptions:
    """The options of `deebert dashboard`."""

    project: str = option("???", "ENTITY/PROJECT of W&B: my-team/deebert")


def run(options: DashboardOptions) -> None:
    """Save the view of a project.

    Raises:
        UserError: the project has no such name, the extra is missing, or W&B does not save it.
    """
    entity, _, project = options.project.partition("/")
    if not entity or not project or "/" in project:
        raise UserError(
            f"project={options.project} is no project; give ENTITY/PROJECT: my-team/deebert"
        )
    _save(entity, project)


def _save(entity: str, project: str) -> None:
    try:
        view = workspace(entity, project)
    except ImportError as error:
        raise UserError(f"{error}; it comes with {EXTRA}") from error
    try:
        view.save()  # it prints the address of the view
    except Exception as error:  # the errors of W&B, gql and requests have no common base class
        reason = first_line(error)
        raise UserError(f"the view was not saved, W&B says: {reason}") from error
