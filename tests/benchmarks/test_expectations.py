"""A short version of benchmarks/expectations.py, and the arithmetic behind it."""

import dataclasses

import pytest
import torch
from expectations import POPULATIONS, SAVING, WAYS, drawn, simulate, summary, task

from deebert.exits import calibration, curves, per_ramp_thresholds, rules
from deebert.exits.records import Record
from deebert.exits.target import Target

TASK = task("accuracy")
UNEVEN = POPULATIONS["ramps differ in how sure they are"]


@pytest.mark.parametrize("way", ["per_ramp=true", "temperature=true", "exit=relative_entropy"])
def test_an_expectation_is_cross_fitted_after_a_search(way: str) -> None:
    """Each fold is answered by what the other rows choose, although all rows choose in the end."""
    record = drawn(600, 1, UNEVEN, 0.3)
    this = task("f1" if way == "exit=relative_entropy" else "accuracy")
    name, switches = WAYS[way]
    rule, target = rules.named(name, 2), Target(target_saving=SAVING, **switches)
    chosen = calibration.choose(record, this, rule, target)
    expected = calibration.expected(record, this, rule, target, chosen, 100)
    fold_N, predictions_N = calibration.folds(600), torch.empty_like(record.labels_N)
    for fold in range(calibration.FOLDS):
        rest, unseen = record.rows(fold_N != fold), record.rows(fold_N == fold)
        if way == "per_ramp=true":
            scores = curves.exit_scores_of(rule, rest)
            right = this.predict(scores.answer_NLC) == rest.labels_N[:, None]
            searched = per_ramp_thresholds.search(scores.score_NL, right, SAVING, is_sure=True)
            assert searched is not None
            point = curves.OperatingPoint(rule, searched)
        else:
            point = calibration.choose(rest, this, rule, target)
        predictions_N[fold_N == fold] = point(unseen, this)[1]
    assert expected.score == this.score(predictions_N, record.labels_N)
    low, high = expected.score_interval
    assert low < expected.score < high
    # The saving is that of the thresholds themselves.
    layer_N, in_sample_N = chosen(record, this)
    assert expected.exit_counts == layer_N.bincount(minlength=7)[1:].tolist()
    assert expected.expected_saving == pytest.approx(1 - layer_N.double().mean().item() / 6)
    if way != "temperature=true":  # it changes few answers
        assert expected.score != this.score(in_sample_N, record.labels_N)


@pytest.mark.parametrize("target", [Target(target_saving=SAVING), Target(target_saving=SAVING, per_ramp=True), Target(max_drop=0.05, temperature=True)])  # fmt: skip
def test_without_a_search_the_rows_themselves_are_expected(target: Target) -> None:
    """One global threshold for a saving knows no label."""
    record, rule = drawn(400, 3, (1.0,) * 6), rules.default(2)
    chosen = calibration.choose(record, TASK, rule, target)
    assert not isinstance(chosen.thresholds, list)
    expected = calibration.expected(record, TASK, rule, target, chosen, 100)
    assert expected == curves.expected(record, TASK, chosen, 100)


def test_so_few_rows_that_no_fold_can_be_calibrated() -> None:
    record = drawn(22, 1, UNEVEN)
    target = Target(target_saving=SAVING, temperature=True)
    chosen = calibration.choose(record, TASK, rules.default(2), target)
    expected = calibration.expected(record, TASK, rules.default(2), target, chosen, 22)
    assert expected == curves.expected(record, TASK, chosen, 22)


def test_noise_promises_nothing() -> None:
    """Ramps that guess: whatever a search finds among them, unseen rows are right half of the time."""
    random = torch.Generator().manual_seed(5)
    record = drawn(300, 5, UNEVEN)
    guesses = torch.randn(record.logits_NLC.shape, generator=random)
    record: Record = dataclasses.replace(record, logits_NLC=guesses)
    scores = curves.exit_scores_of(rules.default(2), record)
    right = TASK.predict(scores.answer_NLC) == record.labels_N[:, None]
    thresholds = per_ramp_thresholds.search(scores.score_NL, right, SAVING, is_sure=True)
    point = curves.OperatingPoint(rules.default(2), thresholds)
    in_sample = curves.expected(record, TASK, point, 300)
    target = Target(target_saving=SAVING, per_ramp=True)
    expected = calibration.expected(record, TASK, rules.default(2), target, point, 300)
    assert in_sample.score > 0.56
    assert expected.score < in_sample.score - 0.03
    low, high = expected.score_interval
    assert low < 0.5 < high


@pytest.mark.slow
def test_the_interval_of_thresholds_per_ramp_covers_unseen_rows() -> None:
    row = summary(simulate(UNEVEN[:4], "per_ramp=true", "accuracy", 300, 40, seed=10_000))
    assert row["per_ramp"] > 0.3
    assert row["covered"] >= 0.93
    assert row["width"] <= 1.5
    # Four standard errors of the mean of 40 draws.
    assert abs(row["bias"]) < 0.017
    assert row["in_sample_bias"] > row["bias"] + 0.008, "on the same draws"
