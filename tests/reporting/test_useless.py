"""A ramp that is no better than a constant answer is named, and so is what to do."""

import shlex
from dataclasses import replace

import pytest
import torch
from helpers import results as by_hand
from hydra.core.override_parser.overrides_parser import OverridesParser

from deebert.data.tasks import Task
from deebert.options import assignment
from deebert.reporting import report, tables
from deebert.reporting.results import Results
from deebert.reporting.useless import warning


def task(labels: int, metric: str) -> Task:
    names = tuple(map(str, range(labels))) if labels else None
    return Task("x", ("text",), names, (metric,))


def results(constant: float | None, scores: list[float], **fields: object) -> Results:
    exits = [by_hand.ramp(layer, score, 6) for layer, score in enumerate(scores, 1)]
    curve = [by_hand.point(0.1, 0.9, 0.4, (1,) * 6)]
    made = Results.from_json(by_hand.run(num_layers=6, exits=exits, curve=curve))
    splits = [replace(made.headline, constant_score=constant)]
    return replace(made, splits=splits, **fields)


def test_the_best_constant_answer() -> None:
    cases = [
        (task(2, "accuracy"), [0, 0, 0, 1], 0.75),
        (task(2, "f1"), [0, 0, 0, 1], 0.4),  # always 1: precision 1/4, recall 1
        (task(2, "matthews"), [0, 0, 0, 1], 0.0),
        (task(5, "accuracy"), [4, 2, 2, 0, 1], 0.4),
        (task(0, "spearman"), [0.5, 1.0, 2.0], 0.0),
    ]
    for kind, labels, expected in cases:
        assert kind.constant_score(torch.tensor(labels)) == pytest.approx(expected), kind


def test_useless_ramps_are_named_in_one_warning() -> None:
    good = [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    assert warning(results(0.4, good)) is None
    assert warning(results(None, good)) is None, "no labels, or a file of an older version"
    line = warning(results(0.6, good)) or ""
    assert line.startswith("Warning: ramps 1, 2 are no better than a constant answer (f1 0.6000)")
    assert "stages.2.epochs=, stages.2.lr=" in line
    assert "stages.2.standardize=true" in line
    assert "ramp 1 is no better" in (warning(results(0.5, good)) or "")
    assert "stages.1.lr=" in (warning(results(0.5, good, stage=1, objective="joint")) or "")
    # Full depth alone counts where the others are not trained yet, and first where it is useless.
    assert warning(results(0.6, good, stage=1, objective="final")) is None
    line = warning(results(0.9, good, stage=1, objective="final")) or ""
    assert line.startswith("Warning: full depth is no better than a constant answer")
    assert tables.notes(results(0.6, good))[0] == warning(results(0.6, good))
    assert "ramps 1, 2 are no better" in report.markdown(results(0.6, good))


def test_the_constant_score_is_kept_in_results_json() -> None:
    made = results(0.6, [0.5] * 6)
    assert Results.from_json(made.to_json()).headline.constant_score == 0.6
    assert Results.from_json(by_hand.run()).headline.constant_score is None


def test_a_printed_path_is_read_back() -> None:
    """By the shell, and then by Hydra."""
    for path in ("/runs/a-b/12:00", "/my runs/a", "a=b", "it's", 'a"b', "a\\b", "[x]"):
        [word] = shlex.split(assignment("ckpt", path))
        assert OverridesParser.create().parse_override(word).value() == path, word
