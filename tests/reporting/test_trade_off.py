"""What a sweeper is given."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import results
from helpers import results as by_hand
from helpers.job_values import KEEP, value

from deebert.reporting.results import Results
from deebert.reporting.split_results import SplitResults
from deebert.reporting.sweep_rows import rows

Run = Callable[..., str]


def part(*points: tuple[float | None, float], num_layers: int = 5) -> SplitResults:
    """Results with these scores and savings."""
    listed = [by_hand.point(0.1, score, saving) for score, saving in points]
    return Results.from_json(by_hand.run(trade_off=listed, num_layers=num_layers)).headline


def test_the_area_by_hand() -> None:
    # .9 up to a half of the way, and down to .5 at the end: (.4 x .9 + .4 x .7) / .8
    whole = part((0.9, 0.0), (0.9, 0.4), (0.5, 0.8))
    assert whole.area() == pytest.approx(0.8)
    assert [whole.score_at(saving) for saving in (0, 0.2, 0.4, 0.6, 0.8, 0.9)] == pytest.approx(
        [0.9, 0.9, 0.9, 0.7, 0.5, 0.5]
    )
    assert part((0.9, 0.0), (0.9, 0.4)).area() == pytest.approx(0.45), "it saves no more than 40 %"
    assert part((0.5, 0.8), (0.9, 0.4), (0.9, 0.0)).area() == pytest.approx(0.8), "in any order"
    for nothing in (part(), part((None, 0.0), (None, 0.8)), part((0.9, 0.0))):
        assert nothing.area() is nothing.score_at(0.4) is None


@pytest.mark.slow
def test_a_sweep_over_stage_2_is_told_what_stage_2_changes(
    run: Run, stage1: Path, tmp_path: Path
) -> None:
    """The score at full depth is the same in each job."""
    run("train.py", "-m", "stage=2", f"ckpt={stage1}", "stages.2.lr=1e-6,1e-1", "logger=csv", "stages.2.epochs=2", KEEP, f"hydra.sweep.dir={tmp_path}")  # fmt: skip
    jobs = [results(tmp_path / name) for name in "01"]
    assert jobs[0]["exits"][-1] == jobs[1]["exits"][-1]
    values = [value(tmp_path / name) for name in "01"]
    assert values == [Results.from_json(job).headline.area() for job in jobs]
    assert values[0] != values[1]
    # The table of the sweep tells it, too.
    assert {row["area"] for row in rows(tmp_path)} == set(values)
    assert "| area |" in (tmp_path / "sweep.md").read_text()


@pytest.mark.slow
def test_optimize_chooses_the_value(
    run: Run, fails: Run, stage1: Path, stage2: Path, tmp_path: Path
) -> None:
    headline = Results.from_json(results(stage2)).headline
    full = headline.exits[-1].score
    for i, (overrides, expected) in enumerate(
        (
            ((), headline.area()),
            (("optimize=area",), headline.area()),
            (("optimize=score",), full),
            (("optimize=0.4",), headline.score_at(0.4)),
            (("optimize=score", "target_saving=0.3"), full),
            (("optimize=0", "threshold=0.69"), full),
        )
    ):
        folder = tmp_path / str(i)
        run("evaluate.py", f"record={stage2}", *overrides, KEEP, f"hydra.run.dir={folder}")
        assert value(folder) == pytest.approx(expected), overrides
    run("evaluate.py", f"record={stage1}", KEEP, f"hydra.run.dir={tmp_path / 'stage 1'}")
    assert value(tmp_path / "stage 1") == results(stage1)["exits"][-1]["score"]
    for script, overrides, says in (
        ("train.py", ("stage=2", f"ckpt={stage1}", "optimize=saving"), "optimize=saving must be one of: auto, score, area, or a saving"),
        ("train.py", ("task=mrpc", "backbone=tiny", "optimize=0.4"), "optimize=0.4 needs trained ramps"),
        ("evaluate.py", (f"record={stage1}", "optimize=area"), "optimize=area needs trained ramps"),
        ("evaluate.py", (f"record={stage2}", "optimize=1"), "optimize=1 must be one of"),
    ):  # fmt: skip
        assert says in fails(script, *overrides, f"hydra.run.dir={tmp_path / 'mistake'}")
    assert not (tmp_path / "mistake" / "results.json").exists()
