import numpy as np
import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from sklearn import metrics as sk

from deebert.data.metrics import COUNT_METRICS, METRICS, Counts
from deebert.data.tasks import Task
from deebert.errors import UserError

CONF = ROOT / "conf" / "task"


def values(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels, predictions = random.integers(0, 2, 97), random.integers(0, 2, 97)
    pair = (torch.tensor(predictions), torch.tensor(labels))
    assert METRICS["accuracy"](*pair) == pytest.approx(sk.accuracy_score(labels, predictions))
    assert METRICS["f1"](*pair) == pytest.approx(sk.f1_score(labels, predictions), abs=1e-6)
    expected = sk.matthews_corrcoef(labels, predictions)
    assert METRICS["matthews"](*pair) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_labels", [2, 3, 7])
def test_metrics_of_any_number_of_classes(num_labels: int) -> None:
    """Against scikit-learn and torchmetrics; the last class has no rows and may be an answer."""
    from torchmetrics.functional import classification

    random = np.random.default_rng(num_labels)
    for _ in range(5):
        labels = random.integers(0, max(num_labels - 1, 2), 61)
        predictions = np.where(random.random(61) < 0.5, labels, random.integers(0, num_labels, 61))
        pair = (torch.tensor(predictions), torch.tensor(labels))
        for name, average in (("f1_macro", "macro"), ("f1_weighted", "weighted")):
            expected = sk.f1_score(labels, predictions, average=average)
            assert METRICS[name](*pair) == pytest.approx(expected, abs=1e-12)
            theirs = classification.multiclass_f1_score(*pair, num_labels, average=average)
            assert METRICS[name](*pair) == pytest.approx(theirs.item(), abs=1e-6)
        ours = METRICS["matthews"](*pair)
        assert ours == pytest.approx(sk.matthews_corrcoef(labels, predictions), abs=1e-12)
        theirs = classification.multiclass_matthews_corrcoef(*pair, num_labels)
        assert ours == pytest.approx(theirs.item(), abs=1e-6)


def test_matthews_of_two_classes_has_not_changed_by_a_bit() -> None:
    """CoLA's score, and the tables of its intervals, by the formula of two classes."""
    tables = np.random.default_rng(0).integers(0, 900, (3000, 2, 2)).astype(float)
    tables[:40, :, 0] = 0  # constant answers
    tables[40:80, 1] = 0  # constant labels
    difference = tables[:, 1, 1] * tables[:, 0, 0] - tables[:, 0, 1] * tables[:, 1, 0]
    margins = tables.sum(-1).prod(-1) * tables.sum(-2).prod(-1)
    expected = difference / np.sqrt(np.maximum(margins, 1))
    pair_K = torch.arange(4)
    counts = Counts.of(pair_K // 2, pair_K % 2, 2, torch.from_numpy(tables).flatten(1))
    assert (COUNT_METRICS["matthews"](counts) == expected).all()


def test_correlations_equal_numpy_and_ranks() -> None:
    x = torch.tensor([0.1, 2.0, 1.5, 5.0, 3.0])
    y = torch.tensor([0.0, 1.0, 2.0, 4.0, 3.0])
    assert METRICS["pearson"](x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    ranks = np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1]
    assert METRICS["spearman"](x, y) == pytest.approx(ranks, abs=1e-6)


def test_constant_predictions_have_no_skill() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    assert METRICS["matthews"](torch.ones(4, dtype=torch.long), labels) == 0
    assert METRICS["f1"](torch.zeros(4, dtype=torch.long), labels) == 0
    assert METRICS["pearson"](torch.ones(4), labels.float()) == 0
    assert METRICS["spearman"](torch.ones(4), labels.float()) == 0


def test_headline_metrics_are_the_field_s() -> None:
    expected = {
        "sst2": "accuracy", "mrpc": "f1", "qnli": "accuracy", "rte": "accuracy", "qqp": "f1",
        "mnli": "accuracy", "cola": "matthews", "stsb": "spearman", "wnli": "accuracy",
        "ax": "accuracy", "demo": "accuracy",
    }  # fmt: skip
    assert {path.stem for path in CONF.glob("*.yaml")} == set(expected)
    for name, metric in expected.items():
        task = Task.from_config(values(name))
        assert task.name == name
        assert task.metrics[0] == metric
    assert Task.from_config(values("mnli")).num_labels == 3
    assert Task.from_config(values("stsb")).is_regression


def test_predictions_are_classes_or_values() -> None:
    logits = torch.tensor([[0.1, 0.9], [2.0, -1.0]])
    assert Task.from_config(values("mrpc")).predict(logits).tolist() == [1, 0]
    assert Task.from_config(values("stsb")).predict(torch.tensor([[3.5], [0.2]])).tolist() == (
        pytest.approx([3.5, 0.2])
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"metrics": ["f2"]},
            "metric 'f2' does not fit 2 label(s); choose one of: accuracy, f1, f1_macro, f1_weighted, matthews",
        ),
        ({"metrics": ["pearson"]}, "'pearson' does not fit"),
        ({"metrics": []}, "metrics is empty"),
        ({"labels": ["a"]}, "two or more classes"),
        (
            {"labels": ["a", "b", "c"], "metrics": ["f1"]},
            "'f1' does not fit 3 label(s); choose one of: accuracy, f1_macro, f1_weighted, matthews",
        ),
        ({"columns": ["a", "b", "c"]}, "one or two text columns"),
        ({"label": "sentence1"}, "label=sentence1 is one of the columns of texts"),
        ({"columns": "text"}, "columns: 'text' must be a list: columns: [text]"),
        ({"labels": [False, True]}, "quote labels"),
        ({"labels": ["a", "a"]}, "names a class twice"),
        ({"name": "../mrpc"}, "its name must be a word"),
        ({"colums": ["a"]}, "key 'colums' is unknown"),
    ],
)
def test_a_wrong_task_file_is_one_clear_line(change: dict, says: str) -> None:
    with pytest.raises(UserError, match=r".") as error:
        Task.from_config(values("mrpc") | change)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named() -> None:
    incomplete = values("mrpc")
    del incomplete["labels"]
    with pytest.raises(UserError, match="'labels' is missing"):
        Task.from_config(incomplete)
