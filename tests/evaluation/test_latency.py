"""What is timed, and that it does what the record says."""

import functools
import math
import time

import numpy as np
import pytest
import torch
from helpers.random_models import (
    NUM_LAYERS,
    SPLIT,
    calls,
    inputs_of,
    middles,
    quantization_of,
    world,
)
from helpers.tiny_models import WHOLE
from hypothesis import given, settings
from hypothesis import strategies as st

from deebert.data.batching import by_length, padded
from deebert.data.tasks import Task
from deebert.evaluation import engine_latency
from deebert.evaluation.engine_latency import FullDepth, Protocol
from deebert.evaluation.timing import Timing, compare
from deebert.exits import curves, rules
from deebert.exits.records import Record
from deebert.exits.rules import exit_layer
from deebert.inference.engine import Engine
from deebert.models.early_exit import INPUTS

# --- batches -------------------------------------------------------------------------------------


def test_by_length() -> None:
    assert list(by_length([3, 1, 2, 9, 2], 6)) == [[1, 2, 4], [0], [3]]
    assert list(by_length([3, 1, 2, 9, 2], 1)) == [[1], [2], [4], [0], [3]]
    assert list(by_length([3, 1, 2, 9, 2], 45)) == [[1, 2, 4, 0, 3]]
    assert list(by_length([4, 4, 4], 8)) == [[0, 1], [2]]
    assert list(by_length([], 8)) == []


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 50)), st.integers(1, 300))
def test_by_length_keeps_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(by_length(lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[row] for row in b) <= budget for b in batches)


def test_padded() -> None:
    actual = padded(
        [
            {"input_ids": [7, 8], "token_type_ids": [0, 1]},
            {"input_ids": [9], "token_type_ids": [1]},
        ],
        3,
    )
    assert {name: values.tolist() for name, values in actual.items()} == {
        "input_ids": [[7, 8], [9, 3]],
        "token_type_ids": [[0, 1], [1, 0]],
        "attention_mask": [[1, 1], [1, 0]],
    }
    assert {values.dtype for values in actual.values()} == {torch.int64}
    assert list(padded([{"input_ids": [7]}], 0)) == ["input_ids", "attention_mask"]
    assert set(actual) == set(INPUTS)


# --- seconds -------------------------------------------------------------------------------------


def test_timing_of_known_seconds() -> None:
    ours = Timing(np.array([[0.001, 0.003], [0.002, 0.002], [0.010, 0.002]]))
    assert ours.seconds == pytest.approx(0.004)
    actual = Timing(np.arange(1, 102)[None] / 1e3).latency_ms
    assert actual == pytest.approx({"p50": 51, "p95": 96, "p99": 100})
    other = Timing(np.array([[0.004, 0.004], [0.003, 0.002], [0.012, 0.012]]))
    assert ours.saving(other) == pytest.approx(1 - 0.5)  # of 0.5, 0.8 and 0.5: turn by turn


def test_systems_take_turns() -> None:
    seen: list[str] = []
    systems = {name: lambda request, name=name: seen.append(f"{name}{request}") for name in "ab"}
    timings = compare(systems, [1, 2], 3)
    warm_up, turn = ["a1", "a2", "b1", "b2"], ["a1", "a2", "b1", "b2"]
    back = ["b1", "b2", "a1", "a2"]
    assert seen == [*warm_up, *turn, *back, *turn]
    assert {name: timing.seconds_RQ.shape for name, timing in timings.items()} == {
        "a": (3, 2),
        "b": (3, 2),
    }
    assert all((timing.seconds_RQ > 0).all() for timing in timings.values())


def test_compare_measures() -> None:
    systems = {"ours": lambda _: time.sleep(0.002), "theirs": lambda _: time.sleep(0.006)}
    timings = compare(systems, range(5), 5)
    assert 0.4 < timings["ours"].saving(timings["theirs"]) < 0.8
    assert 0.03 <= timings["theirs"].seconds < 0.1
    assert timings["theirs"].latency_ms["p50"] >= 6


@pytest.mark.parametrize("model_type", [*SPLIT, *WHOLE])
def test_full_depth_is_the_library_s_own(model_type: str) -> None:
    model, pool, record = world(model_type)
    expected = record.logits_NLC[:, -1]
    torch.testing.assert_close(
        FullDepth(model, token_budget=1).run(pool), expected, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(FullDepth(model).run(pool), expected, atol=1e-5, rtol=0)
    rounded = FullDepth(model, "bfloat16").run(pool[:10])
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - expected[:10]).abs().mean() < 0.1
    assert next(model.backbone.parameters()).dtype == torch.float32, "the model is left alone"


def test_requests() -> None:
    inputs = [{"input_ids": [i]} for i in range(5)]
    folds = torch.tensor([0, 1, 0, 0, 1])

    def listed(size: int | None) -> list:
        return [
            ([given["input_ids"][0] for given in request.inputs], request.fold)
            for request in engine_latency.requests(inputs, folds, size)
        ]

    assert listed(None) == [([0, 2, 3], 0), ([1, 4], 1)]
    assert listed(2) == [([0, 2], 0), ([3], 0), ([1, 4], 1)]
    assert listed(1) == [([i], fold) for i, fold in ((0, 0), (2, 0), (3, 0), (1, 1), (4, 1))]


@pytest.mark.parametrize("num_labels", [1, 3])
def test_exits_can_be_forced(num_labels: int) -> None:
    model, pool, record = world("bert", num_labels)
    engine = Engine(model, engine_latency.forced(num_labels), 0.0)
    for layer in range(1, NUM_LAYERS + 1):
        leaving = engine.at(engine_latency.leaving_at(layer, NUM_LAYERS))
        answers = leaving.run(pool)
        assert answers.layer_N.tolist() == [layer] * len(pool)
        expected = record.logits_NLC[:, layer - 1]
        torch.testing.assert_close(answers.logits_NC, expected, atol=1e-5, rtol=0)
        evaluated = [len(pool) if i < layer else 0 for i in range(NUM_LAYERS)]
        assert calls(model, functools.partial(leaving.run, pool)) == evaluated


TASK = Task("x", ("text",), ("a", "b", "c"), ("accuracy",))
KEYS = {
    "precision", "runtime", "batch_size", "protocol", "threads", "device", "repeats", "num_rows", "threshold", "seconds",
    "seconds_full_depth", "seconds_threshold_0", "time_saving", "time_speed_up", "expected_saving", "samples_per_second",
    "latency_ms", "latency_ms_full_depth", "score", "score_full_depth", "exit_counts", "equal_exits",
    "equal_predictions",
}  # fmt: skip


OTHER = "int8"


def test_measured_is_what_the_record_says() -> None:
    model, pool, record = world("bert")
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (len(pool),), generator=random)
    record = Record(
        "validation", record.logits_NLC, labels, torch.arange(len(pool)), record.length_N
    )
    folds = torch.arange(len(pool)) % 2
    scores = rules.entropy(record.logits_NLC)
    each = middles(scores[:, 0])
    cases: list[list[curves.Thresholds]] = [
        [0.0, 0.0],
        [each[20], each[40]],
        [[each[30], 0.0, 0.0], [0.0, each[30], math.inf]],
    ]
    protocol = Protocol(
        batch_sizes=(None, 8),
        precisions=("float32", OTHER),
        repeats=1,
        quantization=quantization_of("bert"),
    )
    pool, record, folds = pool[:50], record.rows(torch.arange(50)), folds[:50]
    labels, scores = labels[:50], scores[:50]
    timing = engine_latency.measure(
        model, rules.default(3), cases, record, pool, folds, TASK, protocol
    )
    assert len(timing) == 2 * 2 * 3
    assert all(set(vars(row)) == KEYS for row in timing)
    assert [row.threshold for row in timing] == cases * 4
    assert [(row.precision, row.batch_size) for row in timing[::3]] == [
        ("float32", None), ("float32", 8), (OTHER, None), (OTHER, 8),
    ]  # fmt: skip
    for row in timing:
        if row.precision == "float32":
            assert row.equal_exits == row.equal_predictions == 1
        layers = torch.empty(len(pool), dtype=torch.long)
        for fold, threshold in enumerate(row.threshold):
            layers[folds == fold] = exit_layer(scores[folds == fold], threshold)
        if row.precision == "float32":
            assert row.exit_counts == layers.bincount(minlength=NUM_LAYERS + 1)[1:].tolist()
            saving = 1 - layers.double().mean().item() / NUM_LAYERS
            assert row.expected_saving == pytest.approx(saving)
        assert row.num_rows == len(pool)
        assert row.samples_per_second == pytest.approx(len(pool) / row.seconds)
        assert row.time_speed_up == pytest.approx(1 / (1 - row.time_saving))
        accuracy = (record.logits_NLC[:, -1].argmax(-1) == labels).double().mean().item()
        assert row.score_full_depth == pytest.approx(accuracy)
        assert min(row.seconds, row.seconds_full_depth, row.seconds_threshold_0) > 0
        assert set(row.latency_ms) == set(row.latency_ms_full_depth) == {"p50", "p95", "p99"}


def test_one_fold_and_requests_of_a_large_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_latency, "REQUEST_ROWS", 20)
    model, pool, record = world("bert")
    folds = torch.zeros(len(pool), dtype=torch.long)
    protocol = Protocol(batch_sizes=(None, 1), repeats=1)
    threshold = middles(rules.entropy(record.logits_NLC[:, :-1]))[100]
    timing = engine_latency.measure(
        model, rules.default(3), [[threshold]], record, pool, folds, TASK, protocol
    )
    assert [row.num_rows for row in timing] == [len(pool), 20]
    assert [row.threshold for row in timing] == [threshold] * 2
    assert [row.score for row in timing] == [None, None], "no labels"
    assert [row.equal_exits for row in timing] == [1, 1]


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_deeper_exits_cost_more(model_type: str) -> None:
    model = world(model_type)[0]
    inputs = inputs_of(model_type, [40] * 60)
    costs = engine_latency.layer_costs(model, inputs, 3, Protocol(repeats=3))
    assert len(costs) == NUM_LAYERS
    assert min(costs) > 0
    assert costs[-1] > costs[0]
