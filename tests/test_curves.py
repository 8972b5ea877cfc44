import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from deebert.curves import PAPER_THRESHOLDS, check_thresholds, curve, default_thresholds, ramp_table
from deebert.errors import UserError
from deebert.records import Record
from deebert.tasks import Task

CONF = Path(__file__).parent.parent / "conf" / "task"


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
SURE, UNSURE = 8.0, 0.0
LOGITS = [
    [[0, SURE], [0, SURE], [0, SURE]],
    [[0, UNSURE], [0, SURE], [SURE, 0]],
    [[UNSURE, 0], [UNSURE, 0], [1, 0]],
]


def test_score_cost_and_counts_by_hand() -> None:
    points = curve(record(LOGITS, [1, 0, 0], [1, 2, 3]), task("demo"), [0.0, 0.1, 0.7])
    full, some, first = points
    assert full["score"] == 1
    assert (full["cost_ratio"], full["expected_saving"], full["speed_up"]) == (1, 0, 1)
    assert full["exit_counts"] == [0, 0, 3]
    assert some["score"] == pytest.approx(2 / 3)
    assert some["exit_counts"] == [1, 1, 1]
    assert some["cost_ratio"] == pytest.approx((1 + 2 + 3) / 9)
    assert some["expected_saving"] == pytest.approx(1 / 3)
    assert some["speed_up"] == pytest.approx(1.5)
    assert some["mean_exit_layer"] == {"1": 1, "2": 2, "3": 3}
    assert first["exit_counts"] == [3, 0, 0], "0.7 > ln 2: everything leaves at the first ramp"


def test_score_of_every_ramp() -> None:
    table = ramp_table(record(LOGITS, [1, 0, 0]), task("sst2"))
    assert [ramp["score"] for ramp in table] == pytest.approx([1, 2 / 3, 1])
    assert [ramp["layer"] for ramp in table] == [1, 2, 3]
    assert [ramp["cost_ratio"] for ramp in table] == pytest.approx([1 / 3, 2 / 3, 1])


def test_both_of_mrpc_s_metrics_with_f1_as_the_score() -> None:
    [point] = curve(record(LOGITS, [1, 0, 0]), task("mrpc"), [0.0])
    assert point["scores"] == {"f1": 1.0, "accuracy": 1.0}
    assert point["score"] == point["scores"]["f1"]


def test_without_labels_there_is_a_saving_but_no_score() -> None:
    [point] = curve(record(LOGITS, None), task("sst2"), [0.1])
    assert point["score"] is None
    assert point["expected_saving"] == pytest.approx(1 / 3)


def test_regression_has_no_entropy() -> None:
    values = record([[[0.0], [1.0]], [[0.0], [2.0]], [[0.0], [4.0]]], [1.0, 2.0, 3.0])
    [point] = curve(values, task("stsb"), default_thresholds(1))
    assert point["expected_saving"] == 0
    assert point["score"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="regression, where entropy means nothing"):
        curve(values, task("stsb"), [0.1])


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
