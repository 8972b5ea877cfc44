"""What was timed, as tables, sentences and picture: of a real measurement and of one by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers import results as made_by_hand
from helpers.timed import timed
from omegaconf import OmegaConf

from deebert.data.tasks import Task
from deebert.evaluation import engine_latency, evaluate_records
from deebert.exits import rules
from deebert.exits.records import Record
from deebert.models.early_exit import EarlyExitModel
from deebert.reporting import plots, report, tables
from deebert.reporting.results import Calibration, Results, TimedCase

SPEC = ROOT / "conf" / "backbone" / "tiny.yaml"
TASK = Task("demo", ("text",), ("bad", "good"), ("accuracy",))
THRESHOLDS = [0.0, 0.693]


@pytest.fixture(scope="module")
def measured() -> Results:
    """Results of a tiny model with real seconds: two precisions, two batch sizes, two thresholds."""
    torch.manual_seed(0)
    spec = OmegaConf.to_container(OmegaConf.load(SPEC))
    model = EarlyExitModel.from_backbone(spec, 2).eval()
    lengths = torch.randint(3, 20, (24,))
    inputs = [
        {"input_ids": torch.randint(5, 60, (length,)).tolist()} for length in lengths.tolist()
    ]
    with torch.inference_mode():
        tokens = [torch.tensor([one["input_ids"]]) for one in inputs]
        logits = torch.cat([model(ids, torch.ones_like(ids)) for ids in tokens])
    record = Record("validation", logits, torch.arange(24) % 2, torch.arange(24), lengths)
    rule = rules.default(2)
    evaluated = evaluate_records.evaluate_records(
        [record], TASK, evaluate_records.EvaluationConfig(rule, THRESHOLDS)
    )
    timing = engine_latency.measure(
        model, rule, [[threshold] for threshold in THRESHOLDS], record, inputs,
        torch.zeros(24, dtype=torch.long), TASK, engine_latency.Protocol((None, 8), ("float32", "bfloat16"), repeats=2),
    )  # fmt: skip
    results = Results(
        schema=1, task="demo", backbone="tiny", stage=2, objective="ramps", ramp=None, seed=1,
        metric="accuracy", environment=None, timing=timing, **vars(evaluated),
    )  # fmt: skip
    again = Results.from_json(json.loads(json.dumps(results.to_json())))
    assert again == results
    return again


def by_hand(measured: Results, calibration: Calibration | None, *timing: dict[str, Any]) -> Results:
    """The results of ten rows with these timed cases."""
    splits = [replace(measured.headline, num_rows=10)]
    cases = [TimedCase(**case) for case in timing]
    return replace(measured, splits=splits, calibration=calibration, timing=cases)


def latency_measurement(results: Results) -> tuple[str, list[dict[str, str]]]:
    """Title and rows of the two tables together, by column."""
    (title, *first), (_, *second) = list(tables.tables(results))[-2:]
    by_column = [
        [dict(zip(columns, row, strict=True)) for row in rows] for columns, rows in (first, second)
    ]
    return title, [one | more for one, more in zip(*by_column, strict=True)]


def test_the_sample_is_like_a_real_one(measured: Results) -> None:
    assert {tuple(vars(case)) for case in measured.timing} == {tuple(timed())}
    assert {tuple(case.latency_ms) for case in measured.timing} == {tables.PERCENTILES}


def test_every_case_is_a_row(measured: Results) -> None:
    title, rows = latency_measurement(measured)
    assert title == "Latency: demo, validation (24 rows)"
    assert [(row["precision"], row["inputs a request"], row["threshold"]) for row in rows] == [
        (precision, size, threshold)
        for precision in ("float32", "bfloat16")
        for size in ("all", "8")
        for threshold in ("0", "0.693")
    ]
    assert {row["exits equal to the record"] for row in rows[:4]} == {"100.00%"}, "float32"
    for row, case in zip(rows, measured.timing, strict=True):
        assert float(row["ms an input"]) == pytest.approx(1e3 * case.seconds / 24, abs=5e-4)
        assert row["saving (layers)"] == f"{case.expected_saving:.1%}"
    text = report.markdown(measured)
    assert f"## {title}" in text
    assert "| float32 | 8 | 0.693 |" in text


def test_the_numbers_of_a_row(
    measured: Results, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folds = [0.1, 0.2, 0.0, 0.1, 0.3]
    calibration = Calibration.from_json(
        made_by_hand.calibrated(
            {"target_speedup": 1.5},
            0.8,
            0.4,
            expected=made_by_hand.measured(0.8, 0.4, time_speed_up=1.58),
            fold_thresholds=folds,
        )
    )
    results = by_hand(measured, calibration, timed(folds))
    _, [row] = latency_measurement(results)
    assert row == {
        "precision": "float32",
        "inputs a request": "all",
        "threshold": "cross-fitted",
        "accuracy": "0.8391",
        "full depth accuracy": "0.8584",
        "saving (layers)": "32.0%",
        "time saving": "40.0%",
        "speed-up (time)": "1.67x",
        "ms an input": "120.000",
        "full depth ms an input": "200.000",
        "p50 ms": "120.50",
        "p95 ms": "130.25",
        "p99 ms": "131.12",
        "exits equal to the record": "99.00%",
    }
    notes = tables.notes(results)[-2:]
    assert "the library's own forward pass of the same weights, in the same batches" in notes[0]
    assert "(medians of 3 turns, threads: 1, device: cpu). The engine's own speed-up, without any exit: 1.25x." in notes[0]  # fmt: skip
    assert notes[1] == "Speed-up (time): target 1.5x, expected 1.58x, measured 1.67x."
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(report.os, "isatty", lambda number: True)
    report.show(results, Path("RUN"))
    printed = capfd.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    lines = printed.partition("Latency: ")[2].splitlines()
    cells = [line.strip("│").split("│") for line in lines if "float32" in line and "│" in line]
    assert [cell.strip() for line in cells for cell in line] == [
        *list(row.values())[:8], *list(row.values())[:3], *list(row.values())[8:]
    ], "none is cut"  # fmt: skip
    assert "target 1.5x" in printed


def test_what_several_cases_came_to(measured: Results) -> None:
    one, int8 = timed(batch_size=1, counts=(2, 2, 1)), timed([0.1, 0.2], 0.5, precision="int8")
    calibration = Calibration.from_json(made_by_hand.calibrated({"target_speedup": 2}, 0.8, 0.4))
    results = by_hand(measured, calibration, one, int8)
    notes = tables.notes(results)[-2:]
    assert "Requests of a few: on 5 rows, evenly spread." in notes[0]
    assert notes[0].endswith("without any exit: 1.25x."), "int8 has no other full depth"
    assert notes[1] == "Speed-up (time): target 2x, measured 1.67x (float32, 1), 2.00x (int8, all)."  # fmt: skip
    results = replace(results, calibration=None)
    assert [row["threshold"] for row in latency_measurement(results)[1]] == ["0.31", "[0.1,0.2]"]


def test_without_timing_nothing_changes(measured: Results) -> None:
    assert "Latency" not in report.markdown(replace(measured, timing=None))
    assert "Latency" in report.markdown(measured)


def test_the_picture_marks_what_was_timed(
    measured: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    plt = plots._pyplot()
    monkeypatch.setattr(plt, "close", drawn.append)
    plots.curve(measured, "title", tmp_path / "curve.png")
    left = drawn[0].axes[0]
    lines = {line.get_label(): line for line in left.get_lines()}
    case = measured.timing[2:4]
    marks = lines["time saving, float32, 8"].get_xydata().tolist()
    assert marks == [[100 * one.time_saving, one.score] for one in case]
    assert len({lines[name].get_marker() for name in lines if "time saving" in name}) == 4
    calibration = Calibration.from_json(made_by_hand.calibrated({"target_speedup": 2}, 0.8, 0.4))
    plots.curve(by_hand(measured, calibration, timed()), "title", tmp_path / "curve.png")
    texts = [text.get_text() for text in drawn[1].legends[0].get_texts()]
    outcome = calibration.measured
    saving = 100 * outcome.expected_saving
    assert texts[-2:] == [f"your target: {saving:.1f} %, {outcome.score:.3f}", "time saving"]
    lines = {line.get_label(): line for line in drawn[1].axes[0].get_lines()}
    assert lines[texts[-2]].get_xydata().tolist() == [[saving, outcome.score]]
    for change in ({"timing": [TimedCase(**timed(score=None))]}, {"objective": "final"}):
        plots.curve(replace(measured, **change), "title", tmp_path / "curve.png")
        assert not any("time saving" in line.get_label() for line in drawn[-1].axes[0].get_lines())
    monkeypatch.undo()
    for figure in drawn:
        plt.close(figure)
    assert math.isfinite(left.get_xlim()[0])
