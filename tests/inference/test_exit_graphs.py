"""One input at a time: one graph that decides by itself answers as the record of all ramps does."""

import math

import pytest
import torch
from helpers.random_models import RAMPS, inputs_of, model_of, record_of

from deebert.exits import curves, rules
from deebert.exits.rules import RULES
from deebert.inference.engine import Engine
from deebert.inference.graph_runtimes import GraphRuntime
from deebert.models.quantization import InputRange, LayerRanges, Quantization

NUM_LAYERS = 4
ALONE = ("entropy", "relative_entropy", "probability", "margin", "learned")  # the rules with nodes
CASES = [(model_type, "first", "entropy") for model_type in ("roberta", "distilbert", "mpnet")]
CASES += [("bert", kind, "entropy") for kind in RAMPS if kind != "cascade"]
CASES += [("bert", "pair", name) for name in ALONE if name != "entropy"]


def engine_of(model, rule, thresholds, **how):
    engine = Engine(model, rule, thresholds, runtime="onnx", **how)
    assert engine.stretches.exit_graph(rule) is not None
    return engine


@pytest.mark.parametrize(("model_type", "kind", "name"), CASES)
def test_equals_the_record(model_type, kind, name):
    model = model_of(model_type, ramp=kind)
    inputs = inputs_of(model_type, [1 + i * 7 % 40 for i in range(30)])
    prior = [0.6, 0.3, 0.1] if name == "relative_entropy" else None
    rule = rules.named(name, 3).fitted(temperatures=[0.5, 2.0, 1.5, 1.0], prior=prior)
    scores = curves.exit_scores_of(rule, record_of(model, inputs))
    middle = scores.score_NL[:, :-1].median(0).values.add(1e-4).tolist()
    for thresholds in ([0.0] * 3, middle, [0.0, middle[1], 0.0], [math.inf] * 3):
        layer_N = rules.exit_layer(scores.score_NL, thresholds)
        assert thresholds != middle or len(layer_N.unique()) == NUM_LAYERS
        engine = engine_of(model, rule, thresholds)
        for row, given in enumerate(inputs):
            answers = engine.run([given])
            assert answers.layer_N == layer_N[row]
            expected = scores.answer_NLC[row, layer_N[row] - 1]
            torch.testing.assert_close(answers.logits_NC[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["first", "mean"])
def test_int8_equals_its_batches(kind):
    model = model_of("bert", ramp=kind)
    widest = InputRange(-6.0, 6.0)
    quantization = Quantization((LayerRanges(*[widest] * 4),) * NUM_LAYERS, "train", 1)
    inputs = inputs_of("bert", [9, 30, 2, 17] * 5)
    engine = engine_of(
        model, rules.named("entropy", 3), 0.7, precision="int8", quantization=quantization
    )
    together = engine.run(inputs)
    alone = [engine.run([given]) for given in inputs]
    assert len(together.layer_N.unique()) > 1
    assert torch.equal(torch.cat([each.layer_N for each in alone]), together.layer_N)
    logits_NC = torch.cat([each.logits_NC for each in alone])
    torch.testing.assert_close(logits_NC, together.logits_NC, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ALONE)
def test_no_answer_that_is_not_finite(name, bad):
    """The first ramp's logits are not finite, so no input leaves there, whatever the threshold."""
    model = model_of("bert", ramp="mean")
    model.ramps[0].classifier.bias[1] = bad
    rule = rules.named(name, 3)
    rule = rule.fitted(prior=[0.6, 0.3, 0.1]) if rule.relative else rule
    engine = engine_of(model, rule, math.inf)
    assert engine.run(inputs_of("bert", [5])).layer_N == 2


def test_one_graph_for_all_thresholds(monkeypatch):
    model, inputs = model_of("bert", ramp="mean"), inputs_of("bert", [9])
    engine = engine_of(model, rules.named("entropy", 3), 9.0)
    loaded, load = [], GraphRuntime.load
    monkeypatch.setattr(
        GraphRuntime, "load", lambda self, graph: loaded.append(graph) or load(self, graph)
    )
    limits = (9.0, [0.0, 9.0, 0.0], [0.0, 1e-9, 9.0])
    assert [int(engine.at(each).run(inputs).layer_N) for each in limits] == [1, 2, 3]
    assert not loaded
    assert engine.at(0.0).run(inputs).layer_N == 4
    assert len(loaded) == 1, "without exits all layers are one stretch"


def test_the_first_rules_have_a_graph():
    engine = engine_of(model_of("bert"), rules.named("entropy", 3), 0.1)
    several = [engine.rule.fitted(temperatures=[scale] * 4) for scale in (2.0, 3.0, 4.0, 5.0)]
    graphs = [engine.stretches.exit_graph(rule) is not None for rule in several]
    assert graphs == [True, True, True, False]
    assert engine.stretches.exit_graph(several[0]) is engine.stretches.exit_graph(several[0])
    inputs = inputs_of("bert", [9])
    assert engine.at(9.0, several[3]).run(inputs).layer_N == 1
    assert set(ALONE) == {name for name in RULES if name != "change" and RULES[name](3).nodes}


def test_other_rules_and_ramps_have_no_such_graph():
    inputs = inputs_of("bert", [9])
    for kind, name in (("cascade", "entropy"), ("mean", "patience")):
        model = model_of("bert", ramp=kind)
        engine = Engine(model, rules.named(name, 3), 0.9, runtime="onnx")
        assert engine.stretches.exit_graph(engine.rule) is None
        for threshold in (0.0, 0.9):
            exact = Engine(model, engine.rule, threshold).run(inputs)
            answers = engine.at(threshold).run(inputs)
            assert torch.equal(answers.layer_N, exact.layer_N)
            torch.testing.assert_close(answers.logits_NC, exact.logits_NC, rtol=1e-4, atol=1e-4)
