"""A layer in ONNX Runtime gives what it gives in torch, whole and in parts."""

import sys

import pytest
import torch
from helpers.random_models import CPU, RAMPS, inputs_of, model_of, rule_of

from deebert.data.batching import padded
from deebert.errors import UserError
from deebert.inference.engine import Engine
from deebert.inference.graph_runtimes import GraphRuntime
from deebert.inference.onnx_layer import OnnxEmbeddings, OnnxLayer
from deebert.inference.split_layer import SplitLayer
from deebert.models.quantization import InputRange, LayerRanges

RUNTIMES = ("onnx", "openvino")
TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("runtime", RUNTIMES)
@torch.inference_mode()
def test_layer_equals_torch(model_type, precision, runtime):
    model = model_of(model_type)
    backbone = model.backbone
    parts = backbone.parts(1)
    widest = InputRange(-6.0, 6.0)  # of the random states below
    int8 = LayerRanges(widest, widest, widest, widest) if precision == "int8" else None
    ours = OnnxLayer(parts, backbone.num_heads, GraphRuntime(runtime), None, int8)
    exact = SplitLayer(parts, backbone.num_heads, "float32", CPU)
    random = torch.Generator().manual_seed(3)
    for lengths in ([1], [7], [1, 2], [3, 9, 5], [40] * 20, [*range(1, 41)]):
        hidden_BSH = torch.randn(len(lengths), max(lengths), backbone.hidden_size, generator=random)
        real_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        mask = None if real_BS.all() else real_BS[:, None, None]
        near = {"rtol": 1e-5, "atol": 1e-5}
        loose = near if precision == "float32" else {"rtol": 0, "atol": 0.2}
        expected_BSH = exact(hidden_BSH, mask)
        whole_BSH = ours(hidden_BSH, mask)
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
    backbone = model_of(model_type).backbone
    inputs = inputs_of(model_type, [1, 9, 4])
    inputs[2]["input_ids"][1] = backbone.pad_token_id  # RoBERTa does not count it
    tokens = padded(inputs, backbone.pad_token_id)
    ours = OnnxEmbeddings(backbone.embedding_parts, GraphRuntime("onnx"))
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(ours(**tokens), backbone.embeddings(**tokens), **near)
    if "token_type_ids" in tokens:
        tokens["token_type_ids"] = torch.ones_like(tokens["token_type_ids"]).triu()
        torch.testing.assert_close(ours(**tokens), backbone.embeddings(**tokens), **near)


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize("runtime", RUNTIMES)
@torch.inference_mode()
def test_layer_with_its_ramp(kind, num_labels, runtime):
    model = model_of("bert", num_labels, kind)
    hidden_BSH = torch.randn(4, 9, model.backbone.hidden_size)
    real_BS = torch.arange(9) < torch.tensor([[1], [9], [4], [2]])
    previous_BC = torch.randn(4, num_labels)
    second_B = torch.tensor([1, 5, 9, 1])  # two texts, and in the first and third row one alone
    parts = model.backbone.parts(1)
    exact = SplitLayer(parts, model.backbone.num_heads, "float32", CPU)
    near = {"rtol": 1e-4, "atol": 1e-5}
    for ramp in (model.all_ramps[1], model.all_ramps[-1]):
        ramp.shift.normal_()
        ramp.scale.fill_(3.0)
        ours = OnnxLayer(parts, model.backbone.num_heads, GraphRuntime(runtime), ramp)
        for mask_BS in (real_BS, None):
            mask = None if mask_BS is None else mask_BS[:, None, None]
            after_BSH = exact(hidden_BSH, mask)
            features_BF = ramp.read(hidden_BSH, after_BSH, mask_BS, second_B)
            for previous in (None, previous_BC):
                logits_BC, learned_score_B = ramp.logits_and_score(features_BF, previous)
                new_BSH, (actual_BC, actual_B) = ours.with_ramp(
                    hidden_BSH, mask, previous, second_B
                )
                torch.testing.assert_close(new_BSH, after_BSH, **near)
                torch.testing.assert_close(actual_BC, logits_BC, **near)
                assert (actual_B is None) == (learned_score_B is None)
                if learned_score_B is not None:
                    torch.testing.assert_close(actual_B, learned_score_B, **near)
            if ramp is model.all_ramps[-1]:
                torch.testing.assert_close(ours.answer(hidden_BSH, mask), logits_BC, **near)


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
