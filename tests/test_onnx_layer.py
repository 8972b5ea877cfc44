"""A layer in ONNX Runtime gives what it gives in torch, whole and in parts."""

import sys

import pytest
import torch
from random_models import CPU, inputs_of, model_of, rule_of

from deebert.engine import Engine
from deebert.errors import UserError
from deebert.onnx_layer import OnnxLayer
from deebert.split import SplitLayer

TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("model_type", TYPES)
@torch.inference_mode()
def test_layer_equals_torch(model_type, precision):
    backbone = model_of(model_type).backbone
    parts = backbone.parts(1)
    ours = OnnxLayer(parts, backbone.num_heads, precision)
    exact = SplitLayer(parts, backbone.num_heads, "float32", CPU)
    random = torch.Generator().manual_seed(3)
    for lengths in ([1], [7], [1, 2], [3, 9, 5], [40] * 20, [*range(1, 41)]):
        hidden_BSH = torch.randn(len(lengths), max(lengths), backbone.hidden_size, generator=random)
        real_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        mask = None if real_BS.all() else real_BS[:, None, None]
        near = {"rtol": 1e-5, "atol": 1e-5}
        loose = near if precision == "float32" else {"rtol": 0, "atol": 0.1}
        expected_BSH = exact(hidden_BSH, mask)
        whole_BSH = ours(hidden_BSH, mask)
        keys, values = ours.keys_values(hidden_BSH)
        first_B1H = ours.first(hidden_BSH, keys, values, mask)
        others_BTH = ours.others(hidden_BSH, keys, values, mask)
        torch.testing.assert_close(whole_BSH[:, :1], expected_BSH[:, :1], **near)
        torch.testing.assert_close(first_B1H, expected_BSH[:, :1], **near)
        rest_BT, expected_BTH = real_BS[:, 1:], expected_BSH[:, 1:]
        for found_BTH in (whole_BSH[:, 1:], others_BTH):
            torch.testing.assert_close(found_BTH[rest_BT], expected_BTH[rest_BT], **loose)


@pytest.mark.parametrize("model_type", TYPES)
def test_engine_equals_the_record(model_type):
    model = model_of(model_type)
    inputs = inputs_of(model_type, [1 + i * 7 % 40 for i in range(40)])
    rule = rule_of("entropy")
    for threshold in (0.0, 0.7):
        exact = Engine(model, rule, threshold).run(inputs, all_ramps=True)
        for batches in ([inputs], [[given] for given in inputs]):
            engine = Engine(model, rule, threshold, runtime="onnx")
            found = [engine.run(batch, all_ramps=True) for batch in batches]
            assert torch.equal(torch.cat([each.layer_N for each in found]), exact.layer_N)
            logits_NC = torch.cat([each.logits_NC for each in found])
            torch.testing.assert_close(logits_NC, exact.logits_NC, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_do():
    rule, bert = rule_of("entropy"), model_of("bert")
    with pytest.raises(UserError, match="float32 or int8, not on cpu in bfloat16"):
        Engine(bert, rule, 0.0, runtime="onnx", precision="bfloat16")
    with pytest.raises(UserError, match="runtime=onnx needs layers that can be split"):
        Engine(model_of("mpnet"), rule, 0.0, runtime="onnx")
    with pytest.raises(UserError, match="runtime"):
        Engine(bert, rule, 0.0, runtime="tensorrt")


def test_names_the_command_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'pip install "deebert\[onnx\]"'):
        Engine(model_of("bert"), rule_of("entropy"), 0.0, runtime="onnx")
