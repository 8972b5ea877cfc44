"""Against scikit-learn, torchmetrics and numpy, and by hand."""

import json
import math
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchmetrics.classification import MulticlassCalibrationError

from deebert.data.tasks import Task
from deebert.evaluation.analysis import analysis, auroc, calibration, correlation
from deebert.exits.records import Record
from deebert.reporting.blocks import plain
from deebert.reporting.split_results import Analysis, EnsembleScore, RampAnalysis

DEMO = Task("demo", ("text",), ("bad", "good"), ("accuracy",))
THREE = Task("three", ("text",), ("a", "b", "c"), ("accuracy",))
STSB = Task("stsb", ("text",), None, ("pearson",))


def record(logits_NLC: torch.Tensor, labels_N: torch.Tensor | None) -> Record:
    rows = torch.arange(len(logits_NLC))
    return Record("validation", logits_NLC, labels_N, rows, torch.full_like(rows, 5))


def random(num_rows: int, num_layers: int, num_labels: int) -> Record:
    """Ramps that get better with depth and share a part of their noise."""
    torch.manual_seed(0)
    labels_N = torch.randint(num_labels, (num_rows,))
    shared = torch.randn(num_rows, 1, num_labels)
    signal = torch.nn.functional.one_hot(labels_N, num_labels)[:, None]
    strength = torch.linspace(0.3, 2, num_layers)[:, None]
    logits = signal * strength + shared + torch.randn(num_rows, num_layers, num_labels)
    return record(logits, labels_N)


def by_probability(class_1: list[list[float]], labels: list[int] | None) -> Record:
    p = torch.tensor(class_1)
    return record(
        torch.stack([1 - p, p], -1).log(), None if labels is None else torch.tensor(labels)
    )


# Row 0 is right everywhere, row 1 late, row 2 early only, row 3 nowhere; labels 1, 0, 0, 1.
TINY = by_probability([[0.875, 0.8, 0.95], [0.7, 0.6, 0.3], [0.4, 0.2, 0.55], [0.125, 0.3, 0.2]], [1, 0, 0, 1])  # fmt: skip


def test_by_hand() -> None:
    measures = analysis(TINY, DEMO)
    assert measures.oracle.score == 3 / 4
    assert measures.oracle.exit_counts == [2, 0, 2], (
        "the row that no ramp gets right runs all layers"
    )
    assert measures.oracle.expected_saving == pytest.approx(1 - (1 + 3 + 1 + 3) / 12)
    assert measures.overthinking_rate == 1 / 4
    first, second, last = measures.ramps
    assert [ramp.layer for ramp in measures.ramps] == [1, 2, 3]
    assert first.agreement == second.agreement == 2 / 4
    assert last.agreement == 1
    assert first.share_right_where_last_is_wrong == 1 / 2
    assert last.share_right_where_last_is_wrong == 0
    # Confidences .875 and .6 where right, .7 and .875 where wrong: of four pairs a win and a draw.
    assert first.auroc == pytest.approx((0.5 + 1 + 0 + 0) / 4)
    assert [(bin.confidence, bin.accuracy, bin.count) for bin in first.reliability] == [
        (pytest.approx(0.6), 1, 1), (pytest.approx(0.7), 0, 1), (pytest.approx(0.875), 0.5, 2),
    ]  # fmt: skip
    assert first.ece == pytest.approx((0.4 + 0.7 + 2 * 0.375) / 4)
    # Errors: 0101, 0101, 0011.
    assert np.allclose(measures.error_correlation, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    single, mean, vote = (
        [getattr(layer, key) for layer in measures.ensemble] for key in ("single", "mean", "vote")
    )
    assert single == [1 / 2, 1 / 2, 1 / 2]
    assert mean == [1 / 2, 1 / 2, 1 / 2], (
        "row 1: (.7 + .6 + .3) / 3 > .5 is wrong, row 2: .38 right"
    )
    assert vote == [1 / 2, 1 / 2, 1 / 2]


def test_a_draw_of_the_vote_goes_to_the_higher_mean_probability() -> None:
    measures = analysis(by_probability([[0.9, 0.4], [0.2, 0.6]], [1, 0]), DEMO)
    assert measures.ensemble[1] == EnsembleScore(layer=2, single=0, mean=1, vote=1)


def test_a_majority_beats_the_mean() -> None:
    measures = analysis(by_probability([[0.6, 0.6, 0.05]], [1]), DEMO)
    assert (measures.ensemble[2].vote, measures.ensemble[2].mean) == (1, 0)


@pytest.mark.parametrize("decimals", [1, 12])
def test_auroc_is_scikit_learn_s(decimals: int) -> None:
    """With one decimal nearly all confidences are tied."""
    rows = random(500, 4, 3)
    confidence = rows.logits_NLC.double().softmax(-1).amax(-1).round(decimals=decimals)
    right = rows.logits_NLC.argmax(-1) == rows.labels_N[:, None]
    expected = [roc_auc_score(right[:, i], confidence[:, i]) for i in range(4)]
    areas = [auroc(confidence[:, i], right[:, i]) for i in range(4)]
    assert areas == pytest.approx(expected, abs=1e-6)
    assert math.isnan(auroc(confidence[:, 0], torch.ones(500, dtype=torch.bool)))


def test_auroc_and_ece_of_a_record() -> None:
    rows = random(700, 3, 3)
    for i, ramp in enumerate(analysis(rows, THREE).ramps):
        logits = rows.logits_NLC[:, i].double()
        confidence, prediction = logits.softmax(-1).max(-1)
        right = prediction == rows.labels_N
        reference = MulticlassCalibrationError(3, n_bins=15, norm="l1").set_dtype(torch.float64)
        expected = reference(logits.softmax(-1), rows.labels_N).item()
        assert ramp.ece == pytest.approx(expected, abs=1e-6)
        assert ramp.auroc == pytest.approx(roc_auc_score(right, confidence), abs=1e-6)
        bins = ramp.reliability
        gaps = [bin.count * abs(bin.accuracy - bin.confidence) for bin in bins]
        assert sum(gaps) / 700 == pytest.approx(ramp.ece)
        assert sum(bin.count for bin in bins) == 700
        assert sum(bin.count * bin.accuracy for bin in bins) == pytest.approx(right.sum())


def test_a_bin_has_its_upper_end_and_not_its_lower() -> None:
    _, bins = calibration(
        torch.tensor([1.0, 14.5 / 15, 14 / 15]), torch.tensor([True, False, True])
    )
    assert [bin.count for bin in bins] == [1, 2]


def test_error_correlation_is_numpy_s() -> None:
    rows = random(600, 5, 3)
    wrong = (rows.logits_NLC.argmax(-1) != rows.labels_N[:, None]).numpy()
    expected = np.corrcoef(wrong, rowvar=False)
    assert np.allclose(analysis(rows, THREE).error_correlation, expected, atol=1e-12)


def test_agreement_oracle_and_overthinking_of_a_record() -> None:
    rows = random(400, 4, 3)
    predictions = rows.logits_NLC.argmax(-1).tolist()
    exits, overthought, right = [0] * 4, 0, 0
    for row, label in zip(predictions, rows.labels_N.tolist(), strict=True):
        hits = [layer for layer in range(4) if row[layer] == label]
        exits[hits[0] if hits else 3] += 1
        right += bool(hits)
        overthought += bool(hits) and row[3] != label
    measures = analysis(rows, THREE)
    assert measures.oracle.exit_counts == exits
    assert measures.oracle.score == pytest.approx(right / 400)
    assert measures.overthinking_rate == pytest.approx(overthought / 400)
    for layer, ramp in enumerate(measures.ramps):
        same = sum(row[layer] == row[3] for row in predictions)
        assert ramp.agreement == pytest.approx(same / 400)
    assert measures.ensemble[0].mean == measures.ensemble[0].single == measures.ensemble[0].vote


def test_undefined_is_none() -> None:
    always, never = [0.9, 0.8], [0.3, 0.2]
    measures = analysis(by_probability([[*always, *never]] * 2, [1, 1]), DEMO)
    assert [ramp.auroc for ramp in measures.ramps] == [None] * 4
    assert measures.error_correlation == [[None] * 4] * 4
    perfect = analysis(by_probability([always, always], [1, 1]), DEMO)
    assert perfect.ramps[0].share_right_where_last_is_wrong is None
    assert perfect.overthinking_rate == 0
    json.dumps(plain([measures, perfect]), allow_nan=False)


def test_without_labels_there_is_only_agreement() -> None:
    measures = analysis(record(TINY.logits_NLC, None), DEMO)
    ramps = [RampAnalysis(layer, agreement, None, None, None, None) for layer, agreement in ((1, 0.5), (2, 0.5), (3, 1))]  # fmt: skip
    assert measures == Analysis(None, None, ramps, None, None)


def test_regression() -> None:
    torch.manual_seed(0)
    labels = torch.rand(300) * 5
    values = labels[:, None] + torch.randn(300, 1) + torch.randn(300, 4) / torch.arange(1, 5)
    values[:, 0] = 0.1  # a ramp that learned nothing
    measures = analysis(record(values[..., None], labels), STSB)
    with np.errstate(invalid="ignore"):
        agreement = np.corrcoef(values[:, 1:].double(), rowvar=False)[-1]
    errors = np.corrcoef(values.double() - labels[:, None].double(), rowvar=False)
    assert measures.ramps[0].agreement is None
    assert [ramp.agreement for ramp in measures.ramps[1:]] == pytest.approx(agreement.tolist())
    assert np.allclose(measures.error_correlation, errors)
    mean = STSB.score(values.double().mean(1), labels)
    single = STSB.score(values[:, 3], labels)
    assert measures.ensemble[3] == EnsembleScore(4, single, pytest.approx(mean), None)
    assert measures.oracle is measures.overthinking_rate is measures.ramps[1].ece is None
    json.dumps(plain(measures), allow_nan=False)


def test_equal_values_have_no_correlation_though_their_mean_is_rounded() -> None:
    values = torch.stack([torch.full((7,), 0.1).double(), torch.arange(7).double()], 1)
    assert correlation(values).isnan().tolist() == [[True, True], [True, False]]


def test_the_headline_metric_is_the_score() -> None:
    f1 = Task("mrpc", ("text",), ("no", "yes"), ("f1", "accuracy"))
    measures = analysis(TINY, f1)
    assert measures.oracle.score == pytest.approx(2 / 3), "predicts 1, 0, 0, 0 for 1, 0, 0, 1"
    assert measures.ensemble[2].single == pytest.approx(1 / 2), "predicts 1, 0, 1, 0"


def test_a_large_record_takes_no_time() -> None:
    rows = random(40_000, 12, 3)
    analysis(random(10, 12, 3), THREE)
    start = time.process_time()
    measures = analysis(rows, THREE)
    assert time.process_time() - start < 3, "0.3 s on an idle machine"
    json.dumps(plain(measures), allow_nan=False)
    assert math.isclose(sum(measures.oracle.exit_counts), 40_000)
