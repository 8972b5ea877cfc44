"""The quality benchmark: real trainings of tiny models, and reports of hand-made cells."""

import importlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, CommandFailed, results
from helpers.configs import composed
from omegaconf import OmegaConf

from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.exits.records import Record


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("quality")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]) -> list[list[str]]:
    """The overrides of every command from now on, run by the real script, but in this process."""
    seen: list[list[str]] = []
    real = subprocess.run

    def in_process(command: list[str], **streams: Any) -> subprocess.CompletedProcess:
        if "train.py" not in command:  # git tells the commit
            return real(command, **streams)
        script = command.index("train.py")
        seen.append(command[script + 1 :])
        try:
            printed, code = run(*command[script:]), 0
        except CommandFailed as failure:
            printed, code = str(failure), 2
        streams["stdout"].write(printed)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", in_process)
    return seen


@pytest.mark.slow
@pytest.mark.pictures
def test_cells_are_made_once(
    quality: ModuleType, commands: list[list[str]], glue: Path, tmp_path: Path
) -> None:
    # cut_5 fails: the tiny backbone has 3 layers.
    given = ["--root", str(glue), "--out", str(tmp_path / "out"), "--results", str(tmp_path),
             "--tasks", "mrpc", "--recipes", "cut_5", "two_stage", "two_stage_mean",
             "two_stage_relative", "--overrides", "backbone=tiny", "data.max_length=64", "stages.1.epochs=1"]  # fmt: skip
    assert quality.main(given) == 1
    stages = [
        next(word for word in overrides if word.startswith("stage=")) for overrides in commands
    ]
    assert stages == ["stage=1", "stage=1", "stage=2", "stage=2"], "stage 1 is shared"

    content = json.loads((tmp_path / "quality.json").read_text())
    assert list(content["failed"]) == ["mrpc cut_5 1"]
    assert "backbone.layers" in content["failed"]["mrpc cut_5 1"]["error"]
    recipes = ("plain", "two_stage", "two_stage_mean", "two_stage_relative")
    assert list(content["cells"]) == [f"mrpc {recipe} 1" for recipe in recipes]
    plain, first, mean, relative = content["cells"].values()
    assert (first["rule"], relative["rule"]) == ("entropy", "relative_entropy")
    assert (first["commands"], first["ramps"]) == (relative["commands"], relative["ramps"])
    assert plain["full"] == first["full"] == mean["full"], "the same final classifier"
    assert "area" not in plain
    assert [len(cell["seconds"]) for cell in (plain, first, mean)] == [1, 2, 2]
    assert plain["seconds"] == first["seconds"][:1] == mean["seconds"][:1]
    assert min(first["seconds"]) > 0
    assert plain["rows"]["train"] == 96
    assert plain["rows"]["validation"] == 40
    folders = [
        Path(overrides[-1].removeprefix("hydra.run.dir=")).with_suffix("") for overrides in commands
    ]
    assert (folders[0] / "checkpoints" / "best.ckpt").exists()
    assert not (folders[2] / "checkpoints").exists()
    for cell, folder in ((first, folders[2]), (mean, folders[3])):
        theirs = results(folder)
        assert cell["ramps"] == [pytest.approx(r["scores"], abs=1e-5) for r in theirs["exits"]]
        assert cell["curve"][0] == pytest.approx(theirs["exits"][-1]["score"], abs=1e-5)
        assert cell["curve"][-1] == pytest.approx(theirs["exits"][0]["score"], abs=1e-5)
        assert list(cell["targets"]) == ["0.3", "0.4", "0.5", "0.6"], "of 3 layers, 2/3 at most"
        assert all(abs(seen["saving"] - float(w)) < 0.1 for w, seen in cell["targets"].items())
    assert quality.public_command([f"--root={glue}", "--seeds", "2"]) == "python benchmarks/quality.py --root DIR --seeds 2"  # fmt: skip
    text = (tmp_path / "quality.md").read_text()
    assert f"{first['area']:.3f}" in text
    assert "`python benchmarks/quality.py --root DIR --tasks mrpc --recipes cut_5 two_stage" in text
    assert str(glue) not in text.partition("**failed**")[0]
    assert "- **failed** mrpc cut_5 1:" in text
    assert (tmp_path / "quality.png").stat().st_size > 10_000

    # The next start has neither runs nor anything to do, but for the one that failed.
    for folder in (tmp_path / "out").glob("mrpc*"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    commands.clear()
    assert quality.main(given) == 1
    assert [word for overrides in commands for word in overrides if "layers" in word] == [
        quality.FIRST[5]
    ]
    assert len(commands) == 1
    assert json.loads((tmp_path / "quality.json").read_text()) == content

    # What was made by other commands does not stand beside the failure of what was asked for.
    given[given.index("--recipes") + 1 : given.index("--overrides")] = ["two_stage"]
    assert quality.main([*given, "stages.1.lr=fast"]) == 1
    content = json.loads((tmp_path / "quality.json").read_text())
    assert list(content["cells"]) == ["mrpc two_stage_mean 1", "mrpc two_stage_relative 1"]
    failed = [f"mrpc {recipe} 1" for recipe in ("cut_5", "plain", "two_stage")]
    assert list(content["failed"]) == failed


def test_cells_of_overrides_stay_out_of_the_committed_table(
    quality: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--root", "x", "--overrides", "backbone=tiny"])
    assert "say --results=DIR" in capsys.readouterr().err


SCRIPT = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[-1].removeprefix("hydra.run.dir="))
(folder / "checkpoints").mkdir(parents=True)
(folder / "argv").write_text(" ".join(sys.argv[1:]))
seen = pathlib.Path(__file__).with_name("seen")
seen.write_text(seen.read_text() + "x" if seen.exists() else "x")
if len(seen.read_text()) == 1:
    os.kill(os.getpid(), 9)
"""


def test_a_killed_run_is_made_again(quality: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    line, seen = f"{tmp_path / 'script.py'} a=1", tmp_path / "seen"

    def folder(again: bool = False, weights: bool = False, lines: tuple[str, ...] = ()) -> Path:
        """At a start of its own."""
        runs = quality.Runs(tmp_path, again)
        for _ in range(2):  # the second time it is there
            folders = runs.folder([line, *lines], "x", tmp_path / "data", weights)
        return folders

    with pytest.raises(UserError, match="exit code -9"):
        folder()
    assert len(list(tmp_path.glob("x-*.part"))) == 1, "what was left has no name yet"
    made = folder()
    assert not list(tmp_path.glob("x-*.part"))
    assert seen.read_text() == "xx"
    assert not (made / "checkpoints").exists()
    assert folder() == made
    assert seen.read_text() == "xx"
    folder(again=True)
    assert seen.read_text() == "xxx"
    # What goes on from it needs its weights, which nobody has kept.
    after = folder(lines=(f"{tmp_path / 'script.py'} ckpt={{last}}",))
    assert seen.read_text() == "xxxxx"
    assert f"ckpt={made} " in (after / "argv").read_text()
    assert (made / "checkpoints").exists()


def test_best_is_the_default(quality: ModuleType) -> None:
    [_, line] = quality.commands("best", "mrpc", 1, [])
    overrides = [word for word in line.split() if word.startswith(("stages.", "ramp"))]
    measured, default = composed(*overrides), composed()
    assert measured.ramp == default.ramp
    ours, theirs = (OmegaConf.to_container(each.stages["2"]) for each in (default, measured))
    assert theirs.pop("standardize") is True
    assert ours.pop("standardize") is None, "true where the states are frozen"
    assert theirs == ours


def test_area_by_hand(quality: ModuleType) -> None:
    """Full depth is always right and the first of two ramps always wrong: whoever leaves there,
    the score is 1 - 2 x saving, and 0 beyond a saving of 1/2."""
    right = torch.arange(200) % 2
    sure = torch.linspace(0.1, 5, 200)[:, None] * torch.tensor([-1.0, 1.0])
    wrong = torch.where(right[:, None] == 1, -sure, sure)
    record = Record("validation", torch.stack([wrong, -wrong], 1), right, torch.arange(200), right)
    cell = quality.trade_off(record, Task("x", ("a",), ("n", "p"), ("accuracy",)), False)
    assert cell["ramps"] == [{"accuracy": 0}, {"accuracy": 1}]
    assert cell["curve"] == pytest.approx([max(0, 1 - 2 * s) for s in quality.GRID])
    assert cell["area"] == pytest.approx(0.25 / 0.8)
    # Full depth is 7/6 of a layer, and ramp 1 takes 1/6: half, where 7/12 leave at ramp 1.
    assert quality.work(2, False) == pytest.approx((1 / 7, 1))
    assert quality.work(2, True) == pytest.approx((6 / 7, 1))
    assert cell["half_the_work"]["accuracy"] == pytest.approx(5 / 12, abs=0.02)
    assert cell["half_the_work"]["saving"] == pytest.approx(7 / 24, abs=0.01)
    dear = quality.trade_off(record, Task("x", ("a",), ("n", "p"), ("accuracy",)), True)
    assert dear == cell | {"half_the_work": {}}, "leaving at ramp 1 saves a seventh"
    assert list(cell["targets"]) == ["0.3", "0.4"]
    for target, seen in cell["targets"].items():
        assert seen["saving"] == pytest.approx(float(target), abs=0.02)
        assert seen["accuracy"] == pytest.approx(1 - 2 * seen["saving"])


def test_the_rule_is_the_learned_score_or_a_regression_s(quality: ModuleType) -> None:
    """Ramps 1 and 2 of a regression are off by 0 or 1, and the score knows it."""
    off = (torch.arange(100) % 2).float()
    truth = torch.linspace(0, 5, 100)
    values = torch.stack([truth + off, truth + off, truth], 1)[..., None]
    task = Task("x", ("a",), None, ("spearman",))
    every = torch.arange(100)
    change = quality.trade_off(
        Record("validation", values, truth, every, every + 1), task, reads_tokens=False
    )
    assert change["rule"] == "change"
    assert list(change["targets"]) == ["0.3"], "it sees two ramps first: a third at most"
    learned_score = torch.stack([off, off, off * 0], 1) + torch.linspace(0, 0.1, 100)[:, None]
    record = Record("validation", values, truth, every, every + 1, learned_score_NL=learned_score)
    learned = quality.trade_off(record, task, reads_tokens=False)
    assert learned["rule"] == "learned"
    assert learned["targets"]["0.3"]["spearman"] == pytest.approx(1), "only rows that are right go"
    assert learned["area"] > change["area"]


def hand_made(quality: ModuleType) -> dict[str, Any]:
    """Two tasks of one metric: areas, and curves that fall from full depth to ramp 1."""
    start = {"command": "COMMAND", "environment": vars(quality.report.environment())}
    cells = {}

    def add(
        task: str, recipe: str, seed: int, full: float, area: float = 0.0, layers: int = 6
    ) -> None:
        cell: dict[str, Any] = {"task": task, "recipe": recipe, "seed": seed, "commands": [recipe]}
        cell |= {"rows": {"train": 9, "digest": "d"}, "metric": "f1", "num_layers": layers}
        cell |= {"full": {"f1": full, "accuracy": 0.9}, "seconds": [40.0, 2.0], "start": "s"}
        if area:
            cell |= {
                "area": area,
                "ramps": [{"f1": 0.2}],
                "half_the_work": {"f1": area / 4},
                "targets": {"0.5": {"saving": 0.5, "f1": area / 2}},
            }
            cell["curve"] = [full - s for s in quality.GRID]
        cells[f"{task} {recipe} {seed}"] = cell

    for seed, full, joint in ((1, 0.8, 0.72), (2, 0.9, 0.69), (3, 1.0, 0.75)):
        add("mrpc", "plain", seed, full)
        add("mrpc", "two_stage", seed, full, 0.7)
        add("mrpc", "joint", seed, 0.8, joint)
    add("mrpc", "cut_3", 1, 0.29, layers=3)
    add("mrpc", "cut_1", 1, 0.3, layers=1)
    add("qqp", "plain", 1, 0.5)
    add("qqp", "two_stage", 1, 0.5, 0.4)
    add("qqp", "joint", 1, 0.5, 0.3)
    add("qqp", "detached", 1, 0.6, 0.45)
    add("qqp", "best", 1, 0.5, 0.2)
    add("qqp", "cut_3", 1, 0.1, layers=3)
    cells["qqp best 1"]["ramps"] = [{"f1": value} for value in (0.2, 0.3, 0.05, 0.4, 0.5, 0.5)]
    cells["qqp pair_cut_3 1"] = cells["qqp cut_3 1"] | {"recipe": "pair_cut_3", "operations": 3}
    return {"starts": {"s": start}, "failed": {}, "cells": cells, "floors": {"mrpc": 0.45}}


def test_the_committed_report_is_that_of_its_numbers(quality: ModuleType, tmp_path: Path) -> None:
    shutil.copy(quality.HERE / "quality.json", tmp_path)
    assert quality.main(["--report-only", "--results", str(tmp_path)]) == 0
    text = (quality.HERE / "quality.md").read_text()
    assert (tmp_path / "quality.md").read_text() == text


def test_report_by_hand(quality: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text(json.dumps(hand_made(quality)))
    assert quality.main(["--report-only", "--results", str(tmp_path)]) == 0
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tmp_path / "quality.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    joint_summary, joint_mrpc, _, joint_qqp, _ = [row for row in rows if row[0] == "joint"]
    # Areas of 90, 76.7 and 75 % are 80.6 on average, and 60 on the other task; half of that at 50 %.
    assert joint_summary == ["joint", "2", "1, screening", "1 of 2", "70.3", "35.1"]
    assert joint_mrpc == [
        "joint", "3", "0.800 ± 0.000", "89.6 ± 10.0", "0.720 ± 0.030", "80.6 ± 8.2",
        "+0.020 ± 0.030 (2 of 3)", "-", "-", "40.3 ± 4.1", "-", "-", "20.1 ± 2.1", "42 ± 0",
    ]  # fmt: skip
    assert joint_qqp[1:7] == ["1, screening", "0.500", "100.0", "0.300", "60.0", "-0.100 (0 of 1)"]
    # At 50 % both are 0.3 on seed 1's curve, 0.8 - 0.5; at 5/6 they are at the first ramp, 0.2.
    rival, *mrpc, qqp = [row for row in rows if row[0].startswith("cut")]
    # Of its third layer 1/6 is computed: 2.167 of the 5.167 layers that full depth computes. As
    # many are 63.9 % of six layers saved, where the curve is under 0 (0.5 - 0.639).
    assert rival == [
        "cut_3", "50.0%", "1", "1, screening", "20.0", "0.0", "0 of 1", "41.9%", "-27.8", "0 of 1",
    ]  # fmt: skip
    [pair_cut, _] = [row for row in rows if row[0] == "pair_cut_3"]
    assert pair_cut[4:] == ["20.0", "0.0", "0 of 1", "58.1%", "0.0", "0 of 1"]
    # Ramp 2 costs two layers: 2/3 saved, 0.5 - 0.667; it has 0.3 of full depth's 0.5.
    ramps = {row[0]: row[1:] for row in rows if row[0].startswith("ramp ")}
    assert list(ramps) == ["ramp 2", "ramp 3", "ramp 4", "ramp 5"]
    assert ramps["ramp 2"][3:6] == ["60.0", "-33.3", "0 of 1"]
    assert ramps["ramp 5"][3:] == ["100.0", "66.7", "0 of 1", "96.8%", "66.7", "0 of 1"]
    # 0.45 is 56.25, 50 and 45 % of plain fine-tuning's .8, .9 and 1.
    assert ["constant", "100.0%", "1", "-", "50.4"] in [row[:5] for row in rows]
    assert qqp[5:] == ["42", "best", "0.000", "**no**"], "though detached has 0.1 there"
    points = {row[0]: row[1:] for row in mrpc}
    assert points["cut_3"] == [
        "1, screening",
        "50.0%",
        "0.290",
        "36.2",
        "42",
        "two_stage",
        "0.300",
        "yes",
    ]
    assert points["cut_1"][1:] == ["83.3%", "0.300", "37.5", "42", "two_stage", "0.200", "**no**"]
    *_, alone = [row for row in rows if row[0] == "best"]
    assert alone == ["best", "0.200", "0.300", "0.050", "0.400", "0.500", "0.500"]
    [detached, *_] = [row for row in rows if row[0] == "detached"]
    assert detached == ["detached", "1", "1, screening", "1 of 1", "90.0", "45.0"]
    text = (tmp_path / "quality.md").read_text()
    assert "`COMMAND`: 18 cells" in text
    assert text.count("**of other rows or commands**") == 0

    other = hand_made(quality)
    other["cells"]["mrpc joint 2"]["rows"]["digest"] = "other"
    other["cells"]["mrpc joint 3"]["commands"] = ["joint backbone=tiny"]
    (tmp_path / "quality.json").write_text(json.dumps(other))
    assert quality.main(["--report-only", "--results", str(tmp_path)]) == 0
    text = (tmp_path / "quality.md").read_text()
    assert "- **of other rows or commands** mrpc joint 2\n" in text
    assert "- **of other rows or commands** mrpc joint 3\n" in text
    assert text.count("**of other rows or commands**") == 2
