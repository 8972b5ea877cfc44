"""Precisions: of a linear map, of a layer, and of what the engine answers."""

import pytest
import torch
from helpers.random_models import CPU, PRECISIONS, SPLIT, in_precision, world
from helpers.tiny_models import WHOLE
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN, GELUActivation

from deebert.data.batching import padded
from deebert.exits import curves, rules
from deebert.exits.rules import exit_layer
from deebert.inference.engine import Engine
from deebert.inference.kernels import PackedLinear, in_few_sizes, linear_map
from deebert.inference.split_layer import SplitLayer


@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("model_type", [*SPLIT, *WHOLE])
def test_other_precisions_predict_the_same(model_type: str, precision: str) -> None:
    if precision == "int8" and model_type in WHOLE:
        return
    model, pool, record = world(model_type)
    pool, record = pool[:40], record.rows(torch.arange(40))  # bfloat16 is slow without AVX512
    exit_scores = curves.exit_scores_of(rules.default(3), record)
    threshold = exit_scores.score_NL[:, :-1].quantile(0.3).item()
    engine = Engine(model, rules.default(3), threshold, **in_precision(precision, model_type))
    layer_N = exit_layer(exit_scores.score_NL, threshold)
    assert (engine.run(pool).layer_N == layer_N).float().mean() >= 0.85
    expected = record.logits_NLC[:, -1]
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.2
    assert clear.sum() > 20
    answers = engine.at(0.0).run(pool)
    assert answers.logits_NC.dtype == torch.float32
    same = answers.logits_NC.argmax(-1) == expected.argmax(-1)
    assert same[clear].float().mean() >= 0.95
    assert not torch.equal(
        answers.logits_NC, Engine(model, rules.default(3), 0.0).run(pool).logits_NC
    )


@pytest.mark.parametrize("precision", PRECISIONS[:2])
@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_the_first_token_is_computed_in_float32(model_type: str, precision: str) -> None:
    model, pool, _ = world(model_type)
    run = Engine(model, rules.default(3), 0.0, precision=precision).stretches.layers[0]
    assert isinstance(run, SplitLayer)
    assert (run.exact is run.fast) == (precision == "float32")
    x = torch.randn(9, 32)
    parts = model.backbone.parts(0)
    for name, part in run.exact._asdict().items():
        x = torch.randn(9, getattr(parts, name).in_features)
        torch.testing.assert_close(part(x), getattr(parts, name)(x), atol=1e-5, rtol=0)
    tokens = padded(pool[:1], 0)
    hidden, context = model.backbone.embed(**tokens)
    with torch.inference_mode():
        first = run.first(hidden, *run.keys_values(hidden), None)
        others = run.others(hidden, *run.keys_values(hidden), None)
        together = run(hidden, None)
    assert first.dtype == others.dtype == torch.float32
    expected = model.backbone.run_layer(0, hidden, context)
    # In bfloat16 only the keys and values that it takes are rounded.
    close = {"bfloat16": 0.05}.get(precision, 1e-5)
    torch.testing.assert_close(first, expected[:, :1], atol=close, rtol=0)
    torch.testing.assert_close(together, torch.cat([first, others], 1), atol=1e-5, rtol=0)


FEW = PackedLinear.FEW
SHAPES = [
    (1,), (3,), (FEW - 1,), (FEW,), (FEW + 1,), (4, FEW // 4), (3, FEW // 3 + 1), (2, 5), (0,), (3, 0), (0, 3),
]  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS[:2])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_maps_against_functional_linear(precision: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 48).requires_grad_(False)
    run = linear_map(linear, precision, CPU)
    close = {"float32": 1e-6, "bfloat16": 0.02}[precision]  # of outputs of size 0.6
    wide = torch.randn(*shape[:-1], shape[-1] * 2, 32)
    turned = torch.randn(32, *shape)
    for x in (torch.randn(*shape, 32), wide[..., ::2, :], turned.movedim(0, -1)):
        assert x.shape == (*shape, 32)
        before = x.clone()
        y = run(x)
        assert y.shape == (*shape, 48)
        assert y.dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
        torch.testing.assert_close(y.float(), linear(x), atol=close, rtol=0)
        assert torch.equal(x, before)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_packed_linear_on_both_sides_of_few() -> None:
    weight, bias = torch.randn(48, 32), torch.randn(48)
    run = linear_map(nn.Linear(32, 48), "float32", CPU)
    assert isinstance(run, PackedLinear)
    run = PackedLinear(weight.T.contiguous().T, bias)  # as a transposed weight lies
    for rows in (1, FEW, FEW + 1, 3 * FEW):
        x = torch.randn(rows, 32)
        expected = nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(run(x), expected, atol=1e-5, rtol=0)


def test_gelu_in_few_sizes() -> None:
    gelu = GELUActivation()
    few = in_few_sizes(gelu, CPU)
    for shape in (1, 1, 32), (3, 21, 32), (1, 64, 32), (5, 13, 32), (2, 130, 32):
        x = torch.randn(shape)
        expected = gelu(x)
        torch.testing.assert_close(few(x), expected, rtol=0, atol=1e-6)
    tanh = ACT2FN["gelu_new"]
    assert in_few_sizes(tanh, CPU) is tanh


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "modernbert"])
def test_onednn_prepares_few_sizes(model_type: str, capfd: pytest.CaptureFixture[str]) -> None:
    # What it keeps for each new size pins the heap: memory grew from window to window.
    model, _, _ = world(model_type)
    engine = Engine(model, rules.default(3), 0.0)
    width = sum(map(ord, model_type))  # a size that was not seen before
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
        for length in range(17, 129):
            engine.run([{"input_ids": [2, *range(5, length + 4)]}] * 4)  # 68 to 512 tokens
        with torch.inference_mode():
            functional.gelu(torch.randn(1021, width))  # or there would be nothing to count
    printed = capfd.readouterr().out
    kept = {
        line.split(",")[-2] for line in printed.splitlines() if "cache_miss,cpu,eltwise" in line
    }
    assert f"1021x{width}" in kept
    assert len(kept) <= 3 + 512 // 64 + 64 // 4  # a first token of each, whole steps, what is left
