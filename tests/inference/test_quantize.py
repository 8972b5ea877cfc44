"""int8: the ranges that are measured, what is made of them, and the same answers everywhere."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers.random_models import in_precision, inputs_of, model_of, quantization_of, rule_of, world

from deebert.data.batching import padded
from deebert.errors import UserError
from deebert.exits import curves, rules
from deebert.inference import quantize
from deebert.inference.engine import Engine
from deebert.models.quantization import InputRange, LayerRanges, Quantization


def test_ranges_are_those_of_the_real_tokens() -> None:
    model, _, _ = world("bert")
    inputs = inputs_of("bert", [1, 9, 4])
    measured = quantize.measure(model, inputs, "train")
    assert (measured.split, measured.num_rows) == ("train", 3)
    with torch.no_grad():  # each input alone, without padding
        states = [model.backbone.embed(**padded([given], 0)) for given in inputs]
    low = min(0.0, *(hidden.min().item() for hidden, _ in states))
    high = max(hidden.max().item() for hidden, _ in states)
    first = measured.layers[0].attention
    assert first.low == pytest.approx(low, rel=1e-5)
    assert first.high == pytest.approx(high, rel=1e-5)
    for layer in measured.layers:
        assert layer.down.low == pytest.approx(-0.17, abs=0.01), "the least value of GELU"


def test_rows_that_cannot_be_measured() -> None:
    model = model_of("bert")
    with pytest.raises(UserError, match="split train has no rows to measure ranges on"):
        quantize.measure(model, [], "train")
    model.backbone.layers[2].intermediate.dense.weight[3, 3] = math.nan
    with pytest.raises(UserError, match="states of split train are not finite"):
        quantize.measure(model, inputs_of("bert", [4]), "train")


def test_input_ranges() -> None:
    for low, high in ((-2.0, 6.0), (0.0, 3.0), (-1.0, 0.0), (0.0, 0.0)):
        given = InputRange(low, high)
        assert 0 <= given.zero_point <= 255
        close = given.scale + 1e-8
        assert (0 - given.zero_point) * given.scale == pytest.approx(low, abs=close)
        assert (255 - given.zero_point) * given.scale == pytest.approx(high, abs=close)


def test_states_that_no_file_may_hold() -> None:
    model = model_of("bert")
    model.backbone.layers[2].intermediate.dense.weight.mul_(1e9)
    with pytest.raises(UserError, match="states of split train are larger than 1e"):
        quantize.measure(model, inputs_of("bert", [4]), "train")


def test_plain_values() -> None:
    quantization = quantization_of("bert")
    plain = json.loads(json.dumps(quantization.plain()))
    assert Quantization.from_plain(plain) == quantization
    one = plain["ranges"][0]
    for changed, says in (
        (None, "other values than"), ([], "other values than"), ({**plain, "more": 1}, "other values than"),
        ({**plain, "split": 3}, "of split 3"), ({**plain, "split": "\x1b[2J"}, "of split"),
        ({**plain, "num_rows": "x"}, "of 'x' rows"), ({**plain, "num_rows": -5}, "of -5 rows"),
        ({**plain, "ranges": []}, "no list of layers"), ({**plain, "ranges": [one] * 129}, "no list of layers"),
        ({**plain, "ranges": [one[:3]]}, "a layer without 4 ranges"),
        ({**plain, "ranges": [[*one[:3], [0.1, 1.0]]]}, "a layer without 4 ranges"),
        ({**plain, "ranges": [[*one[:3], [0, True]]]}, "a layer without 4 ranges"),
        ({**plain, "ranges": [[*one[:3], [0, math.inf]]]}, "a layer without 4 ranges"),
        ({**plain, "ranges": [[*one[:3], [-1e30, 0]]]}, "a layer without 4 ranges"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"its quantization (has|is) .*{says}|{says}"):
            Quantization.from_plain(changed)


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("ramp", ["first", "mean"])
def test_answers_do_not_depend_on_the_batch(ramp: str, runtime: str) -> None:
    model, pool, _ = world("bert", 3, ramp)
    engine = Engine(model, rule_of("entropy"), 0.0, **in_precision("int8", ramp=ramp))
    every = engine.run(pool, all_ramps=True)
    scores = curves.exit_scores_of(rules.default(3), record := _record(every, pool)).score_NL
    threshold = scores[:, :-1].quantile(0.3).item()
    expected_N = rules.exit_layer(scores, threshold)
    other = Engine(
        model, rule_of("entropy"), threshold, runtime=runtime, **in_precision("int8", ramp=ramp)
    )
    same = []
    for batches in ([pool], [[each] for each in pool], [pool[i : i + 7] for i in range(0, 70, 7)]):
        layer_N = torch.cat([other.run(batch).layer_N for batch in batches])
        same += (layer_N == expected_N[: len(layer_N)]).tolist()
    # InputRange in float32 may tip a value over to the next of the 256 steps.
    assert sum(same) / len(same) >= 0.98
    assert 1 < expected_N.double().mean() < record.num_layers


def _record(answers, inputs):
    from deebert.exits.records import Record

    index = torch.arange(len(inputs))
    return Record("validation", answers.ramps_NLC, None, index, index)


def test_learned_scores_of_all_ramps() -> None:
    model, pool, record = world("bert")
    answers = Engine(model, rule_of("entropy"), 0.0).run(pool, all_ramps=True)
    torch.testing.assert_close(answers.learned_NL, record.learned_score_NL, atol=1e-5, rtol=0)


def test_values_outside_of_the_ranges_are_cut() -> None:
    model, pool, _ = world("bert", 3, "mean")
    narrow = InputRange(-1e-3, 1e-3)
    layers = (LayerRanges(narrow, narrow, narrow, narrow),) * 4
    cut = Quantization(layers, "train", 1)
    answers = Engine(model, rule_of("entropy"), 0.0, precision="int8", quantization=cut).run(pool)
    assert answers.logits_NC.isfinite().all()
    exact = Engine(model, rule_of("entropy"), 0.0).run(pool)
    assert not torch.allclose(answers.logits_NC, exact.logits_NC, atol=0.1)


def test_a_quantization_of_another_model() -> None:
    model, _, _ = world("bert")
    quantization = quantization_of("bert")
    short = Quantization(quantization.layers[:2], "train", 1)
    with pytest.raises(UserError, match="the quantization is of 2 layers, and the model has 4"):
        Engine(model, rule_of("entropy"), 0.0, precision="int8", quantization=short)


OPENVINO = """
import sys
events = []
sys.addaudithook(lambda name, args: events.append((name, str(args))))
from helpers.random_models import inputs_of, model_of, rule_of
from deebert.inference.engine import Engine
model, inputs = model_of("bert"), inputs_of("bert", [3, 9])
Engine(model, rule_of("entropy"), 0.0).run(inputs)
before = len(events)
Engine(model, rule_of("entropy"), 0.0, runtime="openvino").run(inputs)
outward = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "urllib.")
for name, args in events[before:]:
    assert not name.startswith(outward), (name, args)
    writes = name == "open" and ("'w" in args or "'a" in args)
    assert not writes, args
assert "openvino" in sys.modules
"""


@pytest.mark.slow
def test_openvino_sends_nothing() -> None:
    """Its import alone starts a process that sends usage data."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", OPENVINO], cwd=ROOT / "tests", capture_output=True, text=True,
        timeout=280, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
