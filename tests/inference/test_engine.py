"""The engine gives what the record of all ramps gives: same exit layer, same answer.

Against the original code (golden models), and by random inputs, rules, thresholds and batches on
tiny random models of every kind of architecture.
"""

import functools
import math
from collections import UserDict
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import golden_models
from helpers.random_models import (
    CLASS_RULES,
    NUM_LAYERS,
    PRECISIONS,
    RAMPS,
    SPLIT,
    calls,
    in_precision,
    inputs_of,
    middles,
    model_of,
    record_of,
    rule_of,
    world,
)
from helpers.tiny_models import WHOLE, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deebert.errors import UserError
from deebert.exits import curves, rules
from deebert.exits.rules import Rule, exit_layer
from deebert.inference import engine as engine_module
from deebert.inference.engine import Engine
from deebert.inference.split_layer import SplitLayer
from deebert.inference.survivors import Answers
from deebert.models import backbones
from deebert.models.early_exit import EarlyExitModel

# --- the answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden_models.NAMES)
@pytest.mark.parametrize("token_budget", [None, 1])
def test_the_original_s_exits_and_predictions(name: str, token_budget: int | None) -> None:
    """Batched and one by one, except where the original answers with its untrained last ramp."""
    model, tensors, facts = golden_models.load(name)
    inputs = [
        {key: tensors[key][row, : mask.sum()].tolist() for key in ("input_ids", "token_type_ids")}
        for row, mask in enumerate(tensors["attention_mask"])
    ]
    engine = Engine(
        model, rules.default(facts["model"]["num_labels"]), 0, token_budget=token_budget
    )
    for key, layers in list(facts["exit_layer"].items())[:: 3 if token_budget else 1]:
        answers = engine.at(float(key)).run(inputs)
        assert answers.layer_N.tolist() == layers, key
        slip = (answers.layer_N == 4) & (tensors["ramp_entropy"][:, -1] < float(key))
        expected = torch.tensor(facts["prediction"][key])
        expected[slip] = tensors["final_logits"].argmax(-1)[slip]
        assert torch.equal(answers.logits_NC.argmax(-1), expected)


KINDS = [(model_type, "first") for model_type in (*SPLIT, *WHOLE)]
KINDS += [("bert", ramp) for ramp in RAMPS if ramp != "first"] + [
    (model_type, ramp) for model_type in ("modernbert", "mpnet") for ramp in ("attention", "pair")
]


@pytest.mark.parametrize(("model_type", "ramp"), KINDS)
@settings(max_examples=24, derandomize=True, deadline=None)
@given(data=st.data())
def test_equals_the_record(model_type: str, ramp: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*CLASS_RULES, "change"]))
    num_labels = 1 if name == "change" else 3
    model, pool, record = world(model_type, num_labels, ramp)
    rows = data.draw(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=24))
    temperatures = None
    if num_labels > 1 and data.draw(st.booleans()):
        several = st.lists(st.floats(0.7, 4), min_size=NUM_LAYERS, max_size=NUM_LAYERS)
        temperatures = torch.tensor(data.draw(several))
    rule = rule_of(name, num_labels, temperatures=temperatures)
    part = record.rows(torch.tensor(rows))
    exit_scores = curves.exit_scores_of(rule, part)
    if data.draw(st.booleans()):
        thresholds = [data.draw(st.sampled_from(middles(s))) for s in exit_scores.score_NL.T[:-1]]
    else:
        thresholds = data.draw(st.sampled_from(middles(exit_scores.score_NL[:, :-1])))
    token_budget = data.draw(st.none() | st.integers(1, 10_000))

    engine = Engine(model, rule, thresholds, token_budget=token_budget)
    engine.regroup_below = data.draw(st.sampled_from([engine.regroup_below, 0, 10**9]))
    engine.first_token_from = data.draw(st.sampled_from([engine.first_token_from, 0, 10**9]))
    all_ramps = data.draw(st.booleans())
    answers = engine.run([pool[row] for row in rows], all_ramps=all_ramps)

    layer_N = exit_layer(exit_scores.score_NL, thresholds)
    assert answers.layer_N.tolist() == layer_N.tolist()
    expected = exit_scores.answer_NLC[torch.arange(len(rows)), layer_N - 1]
    torch.testing.assert_close(answers.logits_NC, expected, atol=1e-5, rtol=1e-5)
    if num_labels > 1:
        assert torch.equal(answers.logits_NC.argmax(-1), expected.argmax(-1))
    assert (answers.ramps_NLC is not None) == all_ramps
    if answers.ramps_NLC is not None:
        passed_NL = torch.arange(NUM_LAYERS) < layer_N[:, None]
        expected = part.logits_NLC.where(passed_NL[..., None], torch.nan)
        torch.testing.assert_close(
            answers.ramps_NLC, expected, atol=1e-5, rtol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize(
    ("model_type", "ramp"), [("bert", "first"), ("bert", "pair"), ("modernbert", "attention")]
)
@settings(max_examples=12, derandomize=True, deadline=None)
@given(data=st.data())
def test_operating_points_run_together(model_type: str, ramp: str, data: st.DataObject) -> None:
    """Inputs with different rules and thresholds leave as if each were alone, in one run."""
    model, pool, record = world(model_type, 3, ramp)
    points = []
    for name in data.draw(st.lists(st.sampled_from(CLASS_RULES), min_size=1, max_size=4)):
        rule = rule_of(name, 3)
        scores = curves.exit_scores_of(rule, record).score_NL
        points.append((rule, data.draw(st.sampled_from(middles(scores[:, :-1])))))
        one_layer = [0.0, points[-1][1], 0.0]
        points += [(rule, one_layer)] if data.draw(st.booleans()) else []
    point_N = data.draw(
        st.lists(st.integers(0, len(points) - 1), min_size=len(pool), max_size=len(pool))
    )
    engine = Engine(model, rules.default(3), 0.0).at_each(points)
    engine.regroup_below = data.draw(st.sampled_from([engine.regroup_below, 0]))
    engine.first_token_from = data.draw(st.sampled_from([engine.first_token_from, 0]))
    answers = engine.run(pool, point_N=point_N)
    assert answers.point_N is not None
    assert answers.point_N.tolist() == point_N
    for number, (rule, thresholds) in enumerate(points):
        exit_scores = curves.exit_scores_of(rule, record)
        rows = (torch.tensor(point_N) == number).nonzero().squeeze(1)
        layer_N = exit_layer(exit_scores.score_NL[rows], thresholds)
        assert answers.layer_N[rows].tolist() == layer_N.tolist()
        expected = exit_scores.answer_NLC[rows, layer_N - 1]
        torch.testing.assert_close(answers.logits_NC[rows], expected, atol=1e-5, rtol=1e-5)


def test_a_ramp_that_only_others_need_is_not_asked() -> None:
    """An input with a rule that has no prior yet runs at full depth, beside inputs that leave."""
    model, pool, record = world("bert")
    no_prior = rules.named("relative_entropy", 3)
    engine = Engine(model, no_prior, 0.0).at_each(
        [(no_prior, 0.0), (rules.default(3), [math.inf, 0, 0])]
    )
    answers = engine.run(pool, point_N=[row % 2 for row in range(len(pool))])
    assert answers.layer_N.tolist() == [1 if row % 2 else NUM_LAYERS for row in range(len(pool))]
    together = calls(model, lambda: engine.run(pool, point_N=[row % 2 for row in range(len(pool))]))
    assert together == [len(pool), 0, 0, len(pool) - len(pool) // 2]
    full = record.logits_NLC[::2, -1]
    torch.testing.assert_close(answers.logits_NC[::2], full, atol=1e-5, rtol=1e-5)


def test_the_longest_input_of_mpnet() -> None:
    """Its attention bias has no distance beyond it. Alone and beside shorter inputs."""
    model = model_of("mpnet")
    inputs = inputs_of("mpnet", [128, 127, 2, 128])
    expected = record_of(model, inputs).logits_NLC
    for token_budget in (None, 1):
        engine = Engine(model, rules.default(3), [0.0, 1e-9, 0.0], token_budget=token_budget)
        engine.first_token_from = 0
        answers = engine.run(inputs, all_ramps=True)
        torch.testing.assert_close(answers.ramps_NLC, expected, atol=1e-5, rtol=1e-5)
    [given] = inputs_of("mpnet", [129])
    torch.testing.assert_close(
        engine.run([given]).logits_NC,
        engine.run([{"input_ids": [*given["input_ids"][:127], given["input_ids"][-1]]}]).logits_NC,
    )


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_exits_of_the_property_are_spread(model_type: str) -> None:
    """What is compared above is not always the same layer."""
    _, _, record = world(model_type)
    scores = rules.entropy(record.logits_NLC)
    layers = exit_layer(scores, scores[:, :-1].median().item())
    assert layers.bincount(minlength=NUM_LAYERS + 1)[1:].min() >= 3


def test_one_layer() -> None:
    torch.manual_seed(0)
    model = EarlyExitModel.from_backbone(tiny("bert", num_hidden_layers=1), 2).eval()
    inputs = inputs_of("bert", [3, 9, 1])
    answers = Engine(model, rule_of("patience", 2), 0.5).run(inputs, all_ramps=True)
    assert answers.layer_N.tolist() == [1, 1, 1]
    expected = record_of(model, inputs).logits_NLC
    torch.testing.assert_close(answers.ramps_NLC, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(answers.logits_NC, expected[:, 0], atol=1e-6, rtol=0)


# --- what is not computed ------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
@pytest.mark.parametrize(
    ("rule", "thresholds", "expected"),
    [
        ("entropy", 0.0, [0, 0, 0, 20]),
        ("entropy", [0.0, 1e-9, 0.0], [0, 20, 0, 20]),
        ("entropy", math.inf, [20, 0, 0, 0]),
        ("entropy", [0.0, 0.0, 9.0], [0, 0, 20, 0]),
        ("vote", 0.0, [0, 0, 0, 20]),
        ("vote", [0.0, 0.1, 0.0], [20, 20, 0, 20]),
        ("patience", [0.0, 0.0, 2.0], [20, 20, 20, 0]),
    ],
)
def test_a_ramp_that_decides_nothing_is_not_evaluated(
    model_type: str, rule: str, thresholds: float | list[float], expected: list[int]
) -> None:
    model, pool, _ = world(model_type)
    engine = Engine(model, rule_of(rule), thresholds)
    assert calls(model, lambda: engine.run(pool[:20])) == expected
    passed = max(i for i, count in enumerate(expected) if count)
    everything = [20 if i <= passed else 0 for i in range(NUM_LAYERS)]
    assert calls(model, lambda: engine.run(pool[:20], all_ramps=True)) == everything


@pytest.mark.parametrize("model_type", WHOLE)
def test_layers_after_the_exit_are_not_run(model_type: str) -> None:
    model, pool, record = world(model_type)
    rows: list[int] = []
    handle = model.backbone.layers[2].register_forward_hook(
        lambda layer, args, out: rows.append(len(args[0]))
    )
    threshold = middles(rules.entropy(record.logits_NLC[:, :2]))[60]
    answers = Engine(model, rules.default(3), threshold).run(pool)
    handle.remove()
    assert 0 < sum(rows) == (answers.layer_N > 2).sum() < len(pool)


def test_other_tokens_wait_for_the_ramp() -> None:
    """First token first: of inputs that leave, the feed-forward sees one token."""
    model, pool, _ = world("bert")
    engine = Engine(model, rules.default(3), [0.0, math.inf, 0.0], token_budget=80)
    engine.first_token_from = 0
    tokens: list[list[int]] = []
    for run in engine.stretches.layers:
        assert isinstance(run, SplitLayer)
        tokens.append([])
        run.activation = functools.partial(_counted, tokens[-1], run.activation)
    engine.run(pool)
    every = sum(len(given["input_ids"]) for given in pool)
    assert [sum(seen) for seen in tokens[1:]] == [len(pool), 0, 0]
    assert every <= sum(tokens[0]) < 1.2 * every  # with the padding


def _counted(seen: list[int], activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    seen.append(x[..., 0].numel())
    return activation(x)


# --- streams -------------------------------------------------------------------------------------


def test_an_endless_stream_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "WINDOW", 7)
    model, pool, record = world("bert")
    scores = rules.entropy(record.logits_NLC)
    threshold = middles(scores[:, :-1])[100]
    taken = 0

    def endless() -> Iterator[dict]:
        nonlocal taken
        while True:
            taken += 1
            yield pool[(taken - 1) % len(pool)]

    stream = Engine(model, rules.default(3), threshold).stream(endless())
    layers = []
    for window in range(1, 4):
        layers += next(stream).layer_N.tolist()
        assert taken == 7 * window
        assert torch.is_grad_enabled(), "the caller's own code is left alone"
        assert not torch.is_inference_mode_enabled()
    assert layers == exit_layer(scores, threshold)[:21].tolist()
    assert len(set(layers)) > 1


class Input(UserDict):
    """Knows how many of it are alive."""

    alive = most = 0

    def __init__(self, *given: dict) -> None:
        super().__init__(*given)
        Input.alive += 1
        Input.most = max(Input.most, Input.alive)

    def __del__(self) -> None:
        Input.alive -= 1


def test_no_more_than_a_window_is_kept() -> None:
    model = world("bert")[0]
    engine = Engine(model, rules.default(3), math.inf)
    given = {"input_ids": [5, 6], "token_type_ids": [0, 0]}
    total = sum(len(part.layer_N) for part in engine.stream(Input(given) for _ in range(30_000)))
    assert total == 30_000
    assert Input.most <= engine_module.WINDOW + 5


# --- bad input -----------------------------------------------------------------------------------


def test_nothing_to_run() -> None:
    engine = Engine(world("bert")[0], rules.default(3), 0.1)
    with pytest.raises(UserError, match="there are no inputs to run"):
        engine.run([])
    assert list(engine.stream([])) == []
    with pytest.raises(UserError, match=r"no tokens \(input_ids=\[\]\)"):
        engine.run([{"input_ids": [5, 6], "token_type_ids": [0, 0]}, {"input_ids": []}])


def test_too_long_is_cut_as_the_tokenizer_cuts(caplog: pytest.LogCaptureFixture) -> None:
    model = world("bert")[0]
    tokenizer = backbones.tokenizer(tiny("bert"))
    texts = ["a long text " * 40, "short", "another " * 200]
    engine = Engine(model, rules.default(3), 0.0)
    assert engine.longest_input == 130
    whole = [dict(tokenizer(text)) for text in texts]
    cut = [dict(tokenizer(text, truncation=True, max_length=130)) for text in texts]
    assert [len(given["input_ids"]) for given in cut] == [130, 7, 130]
    assert cut[0]["input_ids"][-1] == whole[0]["input_ids"][-1] == tokenizer.sep_token_id
    expected = engine.run(cut).logits_NC
    assert not caplog.records
    given_length = len(whole[0]["input_ids"])
    assert torch.equal(engine.run(whole).logits_NC, expected)
    [warning] = caplog.records
    assert f"an input has {given_length} tokens, the model takes 130" in warning.getMessage()
    assert len(whole[0]["input_ids"]) == given_length, "the caller's own list is left alone"


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([0.1, 0.1], r"has 2 values; .* each ramp before the last \(3\)"),
        ([0.1] * 4, "has 4 values"),
        (-0.1, "must be >= 0"),
        (math.nan, "must be >= 0"),
        ([0.1, math.nan, 0.1], "must be >= 0"),
    ],
)
def test_thresholds_that_are_none(thresholds: float | list[float], message: str) -> None:
    model = world("bert")[0]
    with pytest.raises(UserError, match=message):
        Engine(model, rules.default(3), thresholds)
    with pytest.raises(UserError, match=message):
        Engine(model, rules.default(3), 0.1).at(thresholds)


def test_settings_that_are_none() -> None:
    rule = rules.default(3)
    with pytest.raises(
        UserError, match=r"precision 'float16' is unknown; .*float32, bfloat16, int8"
    ):
        Engine(world("bert")[0], rule, 0.1, precision="float16")
    for budget in (0, -5):
        with pytest.raises(UserError, match=rf"token_budget={budget} must be 1 or more"):
            Engine(world("bert")[0], rule, 0.1, token_budget=budget)


@pytest.mark.parametrize("model_type", WHOLE)
def test_int8_needs_layers_that_can_be_split(model_type: str) -> None:
    with pytest.raises(
        UserError, match=f"{model_type} has not; use runtime=torch and precision=float32"
    ):
        Engine(world(model_type)[0], rules.default(3), 0.1, precision="int8")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", CLASS_RULES)
def test_nan_never_leaves_early(
    precision: str, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Layer 2 of 4 is broken: inputs that leave before it are fine, the others are told of."""
    model = model_of("bert")
    _, pool, record = world("bert")
    pool, record = pool[:40], record.rows(torch.arange(40))
    model.backbone.layers[1].intermediate.dense.weight[3, 3] = math.nan
    exit_rule = rule_of(rule)
    if rule == "confident_patience":
        exit_rule = Rule(rule, functools.partial(rules.confident_patience, patience=1), 3)
    exit_scores = curves.exit_scores_of(exit_rule, record)
    some = [0.0] if rule in ("vote", "patience") else [exit_scores.score_NL[:, 0].median().item()]
    for first in (*some, math.inf):
        caplog.clear()
        engine = Engine(model, exit_rule, [first, math.inf, math.inf], **in_precision(precision))
        answers = engine.run(pool)
        bad_N = answers.layer_N > 1
        assert (answers.layer_N[bad_N] == NUM_LAYERS).all()
        assert torch.equal(answers.not_finite_N, bad_N)
        assert bad_N.any() == (first != math.inf)
        expected = exit_scores.answer_NLC[~bad_N, 0]
        close = {"bfloat16": 0.1}.get(precision, 1e-5)
        torch.testing.assert_close(answers.logits_NC[~bad_N], expected, atol=close, rtol=close)
        warnings = [f"{bad_N.sum()} of {len(pool)} inputs came out as NaN"] if bad_N.any() else []
        assert [
            message[: len(warnings[0])] for message in caplog.messages if "came out" in message
        ] == warnings


def test_nan_of_a_regression_never_leaves_early() -> None:
    model = model_of("bert", 1)
    model.ramps[1].classifier.bias[0] = math.nan
    answers = Engine(model, rules.default(1), math.inf).run(world("bert")[1])
    assert (answers.layer_N == NUM_LAYERS).all()
    assert not answers.not_finite_N.any(), "the final classifier is fine"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("default")
def test_an_input_that_is_nan_spoils_no_other(precision: str, bad: float) -> None:
    """In int8 a range over the whole batch would."""
    model = model_of("bert")
    pool = [given for given in world("bert")[1] if 7 not in given["input_ids"]][:40]
    given = in_precision(precision)
    expected = Engine(model, rules.default(3), 0.0, **given).run(pool).logits_NC
    model.backbone.encoder.embeddings.word_embeddings.weight[7] = bad
    engine = Engine(model, rules.default(3), 0.0, **given)  # a graph holds a copy of the weights
    for place in (0, 20, len(pool)):
        given = {"input_ids": [7, 8, 9, 7], "token_type_ids": [0] * 4}
        answers = engine.run([*pool[:place], given, *pool[place:]])
        assert answers.not_finite_N.nonzero().flatten().tolist() == [place]
        others = torch.cat([answers.logits_NC[:place], answers.logits_NC[place + 1 :]])
        close = {"bfloat16": 0.1}.get(precision, 1e-4)
        torch.testing.assert_close(others, expected, atol=close, rtol=close)


def test_answers_without_rows() -> None:
    answers = Answers.empty(0, NUM_LAYERS, 3, all_ramps=True)
    assert answers.not_finite_N.shape == (0,)
    assert Answers.cat([answers, answers]).ramps_NLC.shape == (0, NUM_LAYERS, 3)
