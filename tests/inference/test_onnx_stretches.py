"""Layers in ONNX Runtime and OpenVINO give what they give in torch, whole and in parts."""

import sys

import pytest
import torch
from helpers.random_models import CPU, RAMPS, inputs_of, model_of, rule_of

from deebert.data.batching import padded
from deebert.errors import UserError
from deebert.inference import onnx_graphs
from deebert.inference.engine import Engine
from deebert.inference.graph_runtimes import GraphRuntime
from deebert.inference.onnx_stretches import OnnxStretches
from deebert.inference.split_layer import SplitLayer
from deebert.inference.stretches import TorchStretches
from deebert.inference.survivors import Group
from deebert.models.quantization import InputRange, LayerRanges, Quantization

RUNTIMES = ("onnx", "openvino")
TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")


def group_of(lengths, layer, hidden_BSH=None, tokens=None, **more):
    return Group(
        torch.arange(len(lengths)), torch.tensor(lengths), max(lengths), layer, hidden_BSH,
        more.get("ramps_BLC"), more.get("second_B"), tokens=tokens or {},
    )  # fmt: skip


def mask_of(lengths):
    real_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return real_BS, None if real_BS.all() else real_BS[:, None, None]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("runtime", RUNTIMES)
@torch.inference_mode()
def test_layer_equals_torch(model_type, precision, runtime):
    model = model_of(model_type)
    backbone = model.backbone
    parts = backbone.parts(1)
    widest = InputRange(-6.0, 6.0)  # of the random states below
    ranges = LayerRanges(widest, widest, widest, widest)
    quantization = Quantization((ranges,) * 4, "train", 1) if precision == "int8" else None
    stretches = OnnxStretches(model, GraphRuntime(runtime), quantization)
    ours = stretches.in_parts(1)
    exact = SplitLayer(parts, backbone.num_heads, "float32", CPU)
    random = torch.Generator().manual_seed(3)
    for lengths in ([1], [7], [1, 2], [3, 9, 5], [40] * 20, [*range(1, 41)]):
        hidden_BSH = torch.randn(len(lengths), max(lengths), backbone.hidden_size, generator=random)
        real_BS, mask = mask_of(lengths)
        near = {"rtol": 1e-5, "atol": 1e-5}
        loose = near if precision == "float32" else {"rtol": 0, "atol": 0.2}
        expected_BSH = exact(hidden_BSH, mask)
        group = group_of(lengths, 1, hidden_BSH)
        assert stretches.run(group, 2, ramp=False) is None
        assert group.layer == 2
        whole_BSH = group.hidden_BSH
        keys, values = ours.keys_values(hidden_BSH)
        first_B1H = ours.first(hidden_BSH, keys, values, mask)
        others_BTH = ours.others(hidden_BSH, keys, values, mask)
        torch.testing.assert_close(whole_BSH[:, :1], expected_BSH[:, :1], **near)
        torch.testing.assert_close(first_B1H, expected_BSH[:, :1], **near)
        rest_BT, expected_BTH = real_BS[:, 1:], expected_BSH[:, 1:]
        for actual_BTH in (whole_BSH[:, 1:], others_BTH):
            torch.testing.assert_close(actual_BTH[rest_BT], expected_BTH[rest_BT], **loose)


@pytest.mark.parametrize("model_type", TYPES)
@torch.inference_mode()
def test_embeddings_equal_torch(model_type):
    model = model_of(model_type)
    backbone = model.backbone
    inputs = inputs_of(model_type, [1, 9, 4])
    inputs[2]["input_ids"][1] = backbone.pad_token_id  # RoBERTa does not count it
    tokens = padded(inputs, backbone.pad_token_id)
    stretches = OnnxStretches(model, GraphRuntime("onnx"), None)
    near = {"rtol": 1e-5, "atol": 1e-6}

    def ours():
        group = group_of([1, 9, 4], 0, tokens=tokens)
        stretches.run(group, 0, ramp=False)
        return group.hidden_BSH

    torch.testing.assert_close(ours(), backbone.embeddings(**tokens), **near)
    if "token_type_ids" in tokens:
        tokens["token_type_ids"] = torch.ones_like(tokens["token_type_ids"]).triu()
        torch.testing.assert_close(ours(), backbone.embeddings(**tokens), **near)
        del tokens["token_type_ids"]
        torch.testing.assert_close(ours(), backbone.embeddings(**tokens), **near)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "mpnet"])
@torch.inference_mode()
def test_any_stretch_equals_its_layers(model_type):
    """From the embeddings and from a layer on, with and without the last ramp of the stretch."""
    model, lengths = model_of(model_type, 3, "pair"), [5, 9, 1, 9]
    tokens = padded(inputs_of(model_type, lengths), model.backbone.pad_token_id)
    ours = OnnxStretches(model, GraphRuntime("onnx"), None)
    exact = TorchStretches(model, "float32", CPU)
    second_B = model.second_text(tokens["input_ids"])
    real_BS, _ = mask_of(lengths)
    near = {"rtol": 1e-4, "atol": 1e-4}
    for start, end in ((0, 1), (0, 3), (0, 4), (1, 2), (1, 4), (2, 4), (3, 4)):
        before = group_of(lengths, 0, tokens=tokens)
        exact.run(before, start, ramp=False)
        hidden_BSH = before.hidden_BSH if start else None
        for ramp in (True, False)[: 2 if end < 4 else 1]:
            groups = [
                group_of(lengths, start, hidden_BSH, tokens, second_B=second_B) for _ in range(2)
            ]
            actual, expected = (
                each.run(group, end, ramp=ramp)
                for each, group in zip((ours, exact), groups, strict=True)
            )
            if end < 4:
                states = [group.hidden_BSH[real_BS] for group in groups]
                torch.testing.assert_close(*states, **near)
            assert (actual is None) == (expected is None) == (not ramp)
            if ramp:
                torch.testing.assert_close(actual[0], expected[0], **near)


def test_one_call_up_to_the_next_ramp(monkeypatch):
    """The stretches of an operating point, and no graph for a ramp that is not evaluated."""
    model, inputs = model_of("bert"), inputs_of("bert", [9])
    engine = Engine(model, rule_of("entropy"), 0.0, runtime="onnx")
    loaded = []
    load = onnx_graphs.stretch
    monkeypatch.setattr(
        onnx_graphs, "stretch",
        lambda model, *layers, **how: loaded.append((*layers[:2], how["ramp"])) or load(model, *layers, **how),
    )  # fmt: skip
    engine.run(inputs)
    assert loaded == [(0, 4, True)]
    engine.at([0.0, 1e-9, 0.0]).run(inputs)
    assert loaded[1:] == [(0, 2, True), (2, 4, True)]
    engine.at([1e-9, 1e-9, 0.0]).run(inputs)
    assert loaded[3:] == [(0, 1, True), (1, 2, True)], "the last stretch is loaded already"


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize("runtime", RUNTIMES)
@torch.inference_mode()
def test_layer_with_its_ramp(kind, num_labels, runtime):
    model = model_of("bert", num_labels, kind)
    lengths = [1, 9, 4, 2]
    hidden_BSH = torch.randn(4, 9, model.backbone.hidden_size)
    ramps_BLC = torch.randn(4, 4, num_labels)
    second_B = torch.tensor([1, 5, 9, 1])  # two texts, and in the first and third row one alone
    near = {"rtol": 1e-4, "atol": 1e-5}
    for layer in (0, 1, 3):
        ramp, parts = model.all_ramps[layer], model.backbone.parts(layer)
        exact = SplitLayer(parts, model.backbone.num_heads, "float32", CPU)
        ramp.shift.normal_()
        ramp.scale.fill_(3.0)
        ours = OnnxStretches(model, GraphRuntime(runtime), None)
        for sizes in (lengths, [9] * 4):
            real_BS, mask = mask_of(sizes)
            after_BSH = exact(hidden_BSH, mask)
            features_BF = ramp.read(hidden_BSH, after_BSH, real_BS, second_B)
            previous_BC = ramps_BLC[:, layer - 1] if layer else None
            logits_BC, learned_score_B = ramp.logits_and_score(features_BF, previous_BC)
            group = group_of(sizes, layer, hidden_BSH, ramps_BLC=ramps_BLC, second_B=second_B)
            actual_BC, actual_B = ours.run(group, layer + 1, ramp=True)
            if layer < 3:
                torch.testing.assert_close(group.hidden_BSH, after_BSH, **near)
            torch.testing.assert_close(actual_BC, logits_BC, **near)
            assert (actual_B is None) == (learned_score_B is None)
            if learned_score_B is not None:
                torch.testing.assert_close(actual_B, learned_score_B, **near)


CASES = [(model_type, "first", "entropy") for model_type in TYPES]
CASES += [("bert", kind, rule) for kind in RAMPS for rule in ("entropy", "patience", "learned")]


@pytest.mark.parametrize(("model_type", "kind", "name"), CASES)
def test_engine_equals_torch(model_type, kind, name):
    model = model_of(model_type, ramp=kind)
    inputs = inputs_of(model_type, [1 + i * 7 % 40 for i in range(40)])
    rule = rule_of(name)
    for threshold in (0.0, 0.5):
        exact = Engine(model, rule, threshold).run(inputs, all_ramps=True)
        for batches in ([inputs], [[given] for given in inputs]):
            engine = Engine(model, rule, threshold, runtime="onnx")
            actual = [engine.run(batch, all_ramps=True) for batch in batches]
            assert torch.equal(torch.cat([each.layer_N for each in actual]), exact.layer_N)
            logits_NC = torch.cat([each.logits_NC for each in actual])
            torch.testing.assert_close(logits_NC, exact.logits_NC, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_do():
    rule, bert = rule_of("entropy"), model_of("bert")
    with pytest.raises(UserError, match="float32 or int8, not on cpu in bfloat16"):
        Engine(bert, rule, 0.0, runtime="onnx", precision="bfloat16")
    with pytest.raises(UserError, match="runtime=onnx needs layers that can be split"):
        Engine(model_of("modernbert"), rule, 0.0, runtime="onnx")
    with pytest.raises(UserError, match="runtime"):
        Engine(bert, rule, 0.0, runtime="tensorrt")
    with pytest.raises(UserError, match="precision=int8 runs in ONNX Runtime or OpenVINO, not in"):
        Engine(bert, rule, 0.0, runtime="torch", precision="int8")
    with pytest.raises(UserError, match="precision=int8 needs a quantization"):
        Engine(bert, rule, 0.0, precision="int8")


@pytest.mark.parametrize(("runtime", "package"), [("onnx", "onnxruntime"), ("openvino",) * 2])
def test_names_the_command_when_it_is_missing(runtime, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'pip install "deebert\[{runtime}\]"'):
        Engine(model_of("bert"), rule_of("entropy"), 0.0, runtime=runtime)
