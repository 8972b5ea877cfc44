import dataclasses
import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf

from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.exits import rules
from deebert.exits.curves import (
    PAPER_THRESHOLDS,
    check_thresholds,
    curve,
    default_thresholds,
    exit_scores_of,
    ramp_table,
    savings,
    score_deviation,
    thresholds_for,
    trade_off,
)
from deebert.exits.records import Record

CONF = ROOT / "conf" / "task"


@cache
def task(name: str) -> Task:
    return Task.from_config(OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")))


def record(logits: list, labels: list | None, group: list | None = None) -> Record:
    n = len(logits)
    return Record(
        "validation",
        torch.tensor(logits),
        None if labels is None else torch.tensor(labels),
        torch.arange(n),
        torch.full((n,), 5),
        None if group is None else torch.tensor(group),
    )


# Row 0: sure and right at once. Row 1: unsure, then sure and wrong, at last right. Row 2: never sure.
RULE = rules.default(2)
SURE, LEARNED_SCORE = 8.0, 0.0
LOGITS = [
    [[0, SURE], [0, SURE], [0, SURE]],
    [[0, LEARNED_SCORE], [0, SURE], [SURE, 0]],
    [[LEARNED_SCORE, 0], [LEARNED_SCORE, 0], [1, 0]],
]


def test_score_cost_and_counts_by_hand() -> None:
    points = curve(record(LOGITS, [1, 0, 0], [1, 2, 3]), task("demo"), RULE, [0.0, 0.1, 0.7])
    full, some, first = points
    assert full.score == 1
    assert (full.cost_ratio, full.expected_saving, full.speed_up) == (1, 0, 1)
    assert full.exit_counts == [0, 0, 3]
    assert some.score == pytest.approx(2 / 3)
    assert some.exit_counts == [1, 1, 1]
    assert some.cost_ratio == pytest.approx((1 + 2 + 3) / 9)
    assert some.expected_saving == pytest.approx(1 / 3)
    assert some.speed_up == pytest.approx(1.5)
    assert some.mean_exit_layer == {"1": 1, "2": 2, "3": 3}
    assert first.exit_counts == [3, 0, 0], "0.7 > ln 2: everything leaves at the first ramp"


def test_score_of_every_ramp() -> None:
    table = ramp_table(record(LOGITS, [1, 0, 0]), task("sst2"))
    assert [ramp.score for ramp in table] == pytest.approx([1, 2 / 3, 1])
    assert [ramp.layer for ramp in table] == [1, 2, 3]
    assert [ramp.cost_ratio for ramp in table] == pytest.approx([1 / 3, 2 / 3, 1])


def test_both_of_mrpc_s_metrics_with_f1_as_the_score() -> None:
    [point] = curve(record(LOGITS, [1, 0, 0]), task("mrpc"), RULE, [0.0])
    assert point.scores == {"f1": 1.0, "accuracy": 1.0}
    assert point.score == point.scores["f1"]


def test_without_labels_there_is_a_saving_but_no_score() -> None:
    [point] = curve(record(LOGITS, None), task("sst2"), RULE, [0.1])
    assert point.score is None
    assert point.expected_saving == pytest.approx(1 / 3)


def test_a_regression_leaves_when_its_value_stops_changing() -> None:
    values = record(
        [[[0.0], [1.0], [1.1]], [[0.0], [0.2], [2.0]], [[3.0], [4.0], [4.5]]], [1.0, 2.0, 3.0]
    )
    full, some = curve(values, task("stsb"), rules.default(1), [0.0, 0.5])
    assert full.expected_saving == 0
    assert full.score == pytest.approx(1, abs=1e-5)
    assert some.exit_counts == [0, 1, 2]
    assert some.scores["pearson"] == pytest.approx(np.corrcoef([1.1, 0.2, 4.5], [1, 2, 3])[0, 1])


@pytest.mark.parametrize("name", ["entropy", "patience"])
def test_thresholds_for_a_saving_are_the_smallest_that_reach_it(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(400, 6, 3) * torch.linspace(0.5, 3, 6)[:, None]
    rule = rules.Rule(name, getattr(rules, name), 3)
    rows = record(logits.tolist(), [0] * 400)
    exit_scores = exit_scores_of(rule, rows)
    for saving in (0.0, 0.01, 0.2, 0.4, 0.7, 0.8):
        [threshold] = thresholds_for(exit_scores.score_NL, [saving])
        calibrated = savings(exit_scores, threshold).mean().item()
        assert calibrated >= saving - 1e-9
        least = exit_scores.score_NL[:, :-1].cummin(1).values
        below = least[least < threshold]
        if len(below) and threshold:
            # One score less meets less, but for the thousandth that the widest gap may cost.
            assert savings(exit_scores, below.max().item()).mean().item() < saving + 0.001
        if name == "entropy":
            assert calibrated < saving + 6 / 2400, "entropies are all different"
    [most] = thresholds_for(exit_scores.score_NL, [0.99])
    assert savings(exit_scores, most).mean() == savings(exit_scores, 1e9).mean(), (
        "as much as can be saved"
    )


def test_a_threshold_lies_between_scores() -> None:
    """So that rounding elsewhere (another batch size, the engine) turns no exit."""
    scores = torch.tensor([[0.1, 0.0], [0.3, 0.0], [0.5, 0.0]])
    assert thresholds_for(scores, [1 / 6, 1 / 3]) == pytest.approx([0.2, 0.4])
    nan = torch.tensor([[math.nan, 0.2, 0.0]])
    assert thresholds_for(nan, [0.1, 0.9])[0] > 0.2


@pytest.mark.parametrize("name", ["sst2", "mrpc", "cola"])
def test_the_bootstrap_s_deviation(name: str) -> None:
    """Against many real samples from a known distribution; for accuracy also the formula."""
    random = torch.Generator().manual_seed(0)
    scores, deviations = [], []
    for sample in range(300):
        labels = (torch.rand(500, generator=random) < 0.6).long()
        wrong = torch.rand(500, generator=random) < 0.2
        scores.append(task(name).score(labels ^ wrong, labels))
        if sample < 20:
            deviations.append(score_deviation(task(name), labels ^ wrong, labels) / 500**0.5)
    assert np.mean(deviations) == pytest.approx(np.std(scores), rel=0.15)
    if name == "sst2":
        assert np.mean(deviations) == pytest.approx((0.2 * 0.8 / 500) ** 0.5, rel=0.1)


@pytest.mark.parametrize("num_labels", [20, 120])
def test_the_deviation_of_the_mean_f1_of_many_labels(num_labels: int) -> None:
    """Rare labels make it much larger than that of the accuracy."""
    many = Task("many", ("text",), tuple(map(str, range(num_labels))), ("f1_macro",))
    random = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, num_labels + 1)
    scores, deviations = [], []
    for sample in range(60):
        labels, others = torch.multinomial(share, 4000, replacement=True, generator=random).chunk(2)
        predictions = torch.where(torch.rand(2000, generator=random) < 0.7, labels, others)
        scores.append(many.score(predictions, labels))
        if sample < 4:
            deviations.append(score_deviation(many, predictions, labels) / 2000**0.5)
    assert np.mean(deviations) == pytest.approx(np.std(scores), rel=0.15)
    assert np.mean(deviations) > 1.2 * (0.72 * 0.28 / 2000) ** 0.5


def test_the_trade_off_is_spread_over_the_saving() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (600,))
    logits = torch.randn(600, 4, 3) + 2 * torch.nn.functional.one_hot(labels, 3)[:, None]
    rows = record(logits.tolist(), labels.tolist())
    rows = dataclasses.replace(rows, length_N=torch.randint(4, 90, (600,)))
    actual = trade_off(rows, task("mnli"), rules.default(3))
    points, bins = actual
    saved = [point.expected_saving for point in points]
    assert saved == sorted(saved)
    assert (saved[0], saved[-1]) == (0, 0.75)
    assert max(b - a for a, b in itertools.pairwise(saved)) < 0.02
    assert all(
        low <= point.score <= high for point in points for low, high in [point.score_interval]
    )
    assert sum(part.count for part in bins) == 600
    for point in points:
        by_length = point.mean_exit_layer_by_length
        mean = sum(b.count * m for b, m in zip(bins, by_length, strict=True)) / 600
        assert mean / 4 == pytest.approx(point.cost_ratio)


def test_thresholds_end_where_everything_leaves_at_the_first_ramp() -> None:
    assert default_thresholds(2) == list(PAPER_THRESHOLDS)
    assert default_thresholds(3) == [*PAPER_THRESHOLDS, 0.8, 0.9, 1.0, 1.1]
    for labels in (2, 3, 5, 20):
        listed = default_thresholds(labels)
        assert listed[-2] <= math.log(labels) < listed[-1]


@pytest.mark.parametrize("bad", [-1, [0.1, -0.5], "high", math.nan, math.inf, [], True])
def test_a_bad_threshold_is_one_clear_line(bad: object) -> None:
    with pytest.raises(UserError, match="threshold="):
        check_thresholds(bad, "threshold")


def test_a_row_that_two_processes_scored_counts_once() -> None:
    batches = [
        {"index": torch.tensor([2, 0]), "logits": torch.tensor([[[2.0]], [[0.0]]]), "length": torch.tensor([3, 1])},
        {"index": torch.tensor([1, 2]), "logits": torch.tensor([[[1.0]], [[2.0]]]), "length": torch.tensor([2, 3])},
    ]  # fmt: skip
    joined = Record.from_batches("validation", batches)
    assert joined.index_N.tolist() == [0, 1, 2]
    assert joined.logits_NLC.flatten().tolist() == [0, 1, 2]
    assert joined.length_N.tolist() == [1, 2, 3]
    assert joined.labels_N is None
