"""The scores of each class, by hand, and against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from deebert.data.tasks import Task
from deebert.evaluation.class_scores import MOST_CONFUSED, classes, exits_at
from deebert.evaluation.evaluate_records import EvaluationConfig, evaluate_records
from deebert.exits import rules
from deebert.exits.records import Record
from deebert.exits.target import Target
from deebert.reporting.blocks import plain
from deebert.reporting.class_results import Classes, ClassScore

LETTERS = "abcdefgh"


def task(num_labels: int, metric: str = "accuracy") -> Task:
    return Task("own", ("text",), tuple(LETTERS[:num_labels]), (metric,))


def rows(num_rows: int, num_labels: int, seed: int = 0, layers: int = 4) -> Record:
    """Ramps that get better with depth, on classes of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    share_C = torch.tensor([0.5**label for label in range(num_labels)])
    labels_N = torch.multinomial(share_C, num_rows, replacement=True, generator=draw)
    signal = torch.nn.functional.one_hot(labels_N, num_labels)[:, None]
    strength = torch.linspace(1, 2.5, layers)[:, None]
    noise = torch.randn(num_rows, layers, num_labels, generator=draw)
    number_N = torch.arange(num_rows)
    return Record("validation", signal * strength + noise, labels_N, number_N, number_N % 7 + 3)


def test_by_hand() -> None:
    """Labels a a a b, answers a b a b at full depth; class c has neither label nor answer."""
    answers_N, labels_N = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 0, 1])
    logits_NLC = torch.nn.functional.one_hot(answers_N, 3)[:, None].float().repeat(1, 2, 1)
    number_N = torch.arange(4)
    record = Record("validation", logits_NLC, labels_N, number_N, number_N + 3)
    exits = (torch.tensor([1, 2, 2, 1]), torch.tensor([0, 0, 0, 0]))
    of_three = classes(record, task(3), exits)
    assert of_three is not None
    assert of_three.labels == ["a", "b", "c"]
    full, early = of_three.full_depth, of_three.operating_point
    assert full.confusion == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    third = pytest.approx(2 / 3)
    assert full.per_class == [
        ClassScore("a", 3, 1.0, third, pytest.approx(0.8), 2.0),
        ClassScore("b", 1, 0.5, 1.0, third, 2.0),
        ClassScore("c", 0, 0.0, 0.0, 0.0, None),
    ]
    assert full.f1_macro == pytest.approx((0.8 + 2 / 3) / 2), "c does not count"
    assert full.f1_weighted == pytest.approx((3 * 0.8 + 2 / 3) / 4)
    assert early is not None
    assert early.confusion == [[3, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert early.matthews == 0, "a constant answer"
    assert [each.mean_exit_layer for each in early.per_class] == [5 / 3, 1.0, None]
    assert of_three.shown is early
    assert Classes.from_json(plain(of_three)) == of_three


@pytest.mark.parametrize(
    ("target", "held_out"),
    [
        (Target(target_saving=0.3), None),
        (Target(target_saving=0.3, temperature=True), None),
        (Target(target_saving=0.3, temperature=True), rows(300, 5, seed=1)),
        (Target(max_drop=0.1), rows(300, 5, seed=1)),
    ],
)
def test_the_rows_of_a_target_are_those_that_are_measured(
    target: Target, held_out: Record | None
) -> None:
    """Cross-fitted or held out: the classes are of the same exits as score and saving."""
    records = [rows(400, 5), rows(90, 5, seed=2)]
    config = EvaluationConfig(rules.default(5), None, target, "crossfit")
    if held_out:
        config = EvaluationConfig(rules.default(5), None, target, "heldout")
    result = evaluate_records(records, task(5), config, held_out)
    calibrated = result.calibration
    assert calibrated is not None
    measured = [calibrated.measured, *(calibrated.measured_elsewhere or {}).values()]
    for part, record, seen in zip(result.splits, records, measured, strict=True):
        assert part.classes is not None
        point = part.classes.operating_point
        assert point is not None
        assert np.trace(point.confusion) / len(record) == pytest.approx(seen.score)
        depth = sum(each.rows * (each.mean_exit_layer or 0) for each in point.per_class)
        assert depth / len(record) / 4 == pytest.approx(seen.cost_ratio)
        is_first = record is records[0]
        layer_N, predictions_N = exits_at(record, task(5), config.rule, calibrated, is_first=is_first)  # fmt: skip
        assert layer_N.bincount(minlength=5)[1:].tolist() == seen.exit_counts
        labels = record.labels_N
        confusion = sk.confusion_matrix(labels, predictions_N, labels=range(5))
        assert point.confusion == confusion.tolist()
        precision, recall, f1, number = sk.precision_recall_fscore_support(
            labels, predictions_N, labels=range(5), zero_division=0
        )
        for name, expected in (
            ("precision", precision), ("recall", recall), ("f1", f1), ("rows", number),
        ):  # fmt: skip
            assert [getattr(each, name) for each in point.per_class] == pytest.approx(expected.tolist(), abs=1e-6)  # fmt: skip
        full = part.classes.full_depth
        assert {each.mean_exit_layer for each in full.per_class if each.rows} == {4}
        assert np.trace(full.confusion) / len(record) == pytest.approx(seen.full_depth_score)


def test_a_task_s_score_is_that_of_its_classes() -> None:
    for metric in ("f1_macro", "f1_weighted", "matthews"):
        config = EvaluationConfig(rules.default(4), [0.3])
        [part] = evaluate_records([rows(300, 4)], task(4, metric), config).splits
        assert part.classes is not None
        assert part.classes.operating_point is not None
        assert part.exits[-1].score == getattr(part.classes.full_depth, metric)
        assert part.curve[0].score == getattr(part.classes.operating_point, metric)
        for point in part.trade_off or ():
            assert point.score_interval is not None
            assert point.score_interval[0] < point.score <= point.score_interval[1]


def test_where_there_is_nothing_to_show() -> None:
    labelled = rows(50, 3)
    unlabelled = Record("test", labelled.logits_NLC, None, labelled.index_N, labelled.length_N)
    assert classes(unlabelled, task(3)) is None
    values = Record("validation", torch.randn(50, 2, 1), torch.randn(50), labelled.index_N, labelled.length_N)  # fmt: skip
    assert classes(values, Task("stsb", ("text",), None, ("pearson",))) is None
    config = EvaluationConfig(rules.default(3), None)
    several = evaluate_records([labelled], task(3), config).splits[0].classes
    assert several is not None
    assert several.operating_point is None, "a curve of many thresholds has no operating point"
    untrained = EvaluationConfig(rules.default(3), [0.3])
    stage_1 = evaluate_records([labelled], task(3), untrained, trained=False).splits[0].classes
    assert stage_1 is not None
    assert stage_1.operating_point is None


def test_the_matrix_of_very_many_classes_is_left_out() -> None:
    many = MOST_CONFUSED + 1
    of_many = Task("many", ("text",), tuple(map(str, range(many))), ("f1_macro",))
    number_N = torch.arange(300)
    record = Record("validation", torch.randn(300, 2, many), number_N % many, number_N, number_N)
    result = classes(record, of_many)
    assert result is not None
    assert result.full_depth.confusion == []
    assert len(result.full_depth.per_class) == many
    assert sum(each.rows for each in result.full_depth.per_class) == 300
