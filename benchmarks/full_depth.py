"""Full depth in the engines that a user could install instead: ONNX Runtime, OpenVINO, CTranslate2.

Each builder takes a model, whose last ramp answers, and inputs to quantize with, and returns its
forward passes by precision. What a library cannot do with a model is left out with one line.
Shapes: B batch, S tokens, C labels.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rivals import Full
from torch import Tensor, nn

from deebert.data.batching import by_length, padded
from deebert.evaluation.engine_latency import Inputs
from deebert.inference import graph_runtimes, onnx_graphs
from deebert.models.early_exit import INPUTS, EarlyExitModel
from deebert.models.ramp_readers import MASK

Forward = Callable[[dict[str, Tensor]], Tensor]
CALIBRATION_BATCHES = 40  # that OpenVINO's int8 is quantized with


def build(model: EarlyExitModel, inputs: Inputs) -> Iterator[tuple[str, str, Forward]]:
    """Yield the name, precision and forward pass of each engine that is installed.

    Args:
        model: the model, on the processor.
        inputs: rows that are not reported, to quantize with.
    """
    for name, builder in BUILDERS.items():
        try:
            for precision, forward in builder(model, inputs):
                _check(model, inputs[:8], name, precision, forward)
                yield name, precision, forward
        except Exception as error:  # a missing package, or a model that a library does not know
            print(f"without {name}: {type(error).__name__}: {error}"[:300], flush=True)


def _check(
    model: EarlyExitModel, inputs: Inputs, name: str, precision: str, forward: Forward
) -> None:
    """Check that a rival runs this model.

    Raises:
        AssertionError: its logits are not those of the model.
    """
    tokens = padded(inputs, model.backbone.pad_token_id)
    with torch.inference_mode():
        expected_BC, actual_BC = Full(model, "float32").eval()(**tokens), forward(tokens)
    close = 1e-3 if precision == "float32" else 1.0
    assert (expected_BC - actual_BC).abs().max() < close, f"{name} runs another model"


def _library(model: EarlyExitModel, inputs: Inputs) -> Iterator[tuple[str, Forward]]:
    precisions = ["float32"]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        precisions.append("bfloat16")
    for precision in precisions:
        full = Full(model, precision).eval()
        yield precision, lambda tokens, full=full: full(**tokens)


def _onnx(model: EarlyExitModel, inputs: Inputs) -> Iterator[tuple[str, Forward]]:
    """ONNX Runtime with its fused operators, in one graph; int8 is dynamic, a scale an output."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    typed = "token_type_ids" in inputs[0]
    with tempfile.TemporaryDirectory() as folder:
        exact, int8 = (Path(folder) / f"{name}.onnx" for name in ("exact", "int8"))
        exact.write_bytes(_whole(model, typed))
        quantize_dynamic(
            str(exact),
            str(int8),
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Without VNNI products of 8 bits overflow the 16 bits that they are added in.
            reduce_range=not torch.cpu._is_vnni_supported(),
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        for precision, file in (("float32", exact), ("int8", int8)):
            yield precision, _session(file, typed)


class _Graph(onnx_graphs.Graph):
    """A graph with the norm that ONNX Runtime's own optimizers make of a user's model.

    deebert's own graphs have a faster one.
    """

    def norm(self, x: str, residual: str, norm: nn.LayerNorm) -> str:
        gain, bias = (self.constant(each.detach().numpy()) for each in (norm.weight, norm.bias))
        return self.op(
            "SkipLayerNormalization", x, residual, gain, bias,
            domain=onnx_graphs.FUSED, epsilon=norm.eps,
        )  # fmt: skip


def _whole(model: EarlyExitModel, typed: bool) -> bytes:
    """Return all layers as one graph. ONNX Runtime's own optimizer fuses fewer operators."""
    graph, backbone = _Graph(), model.backbone
    hidden = graph.embeddings(backbone.embedding_parts)
    for layer in range(len(model.ramps)):
        parts = backbone.parts(layer)
        assert parts is not None
        keys, values = graph.keys_values(hidden, parts, None)
        before = hidden
        bias = [] if parts.bias_AD is None else [graph.bias(parts.bias_AD)]
        if layer == len(model.ramps) - 1:
            hidden = graph.cut(hidden, 0, 1)
            bias = [graph.cut(name, 0, 1, axis=2) for name in bias]
        hidden = graph.tokens(hidden, keys, values, parts, backbone.num_heads, None, *bias)
    names = ["input_ids", *(["token_type_ids"] if typed else []), MASK]
    return graph.serialized(names, graph.ramp(model.all_ramps[-1], before, hidden))


def _session(file: Path, typed: bool) -> Forward:
    session = graph_runtimes.session(file)

    def forward(tokens: dict[str, Tensor]) -> Tensor:
        arrays = {"input_ids": tokens["input_ids"].numpy()}
        if typed:
            arrays["token_type_ids"] = tokens["token_type_ids"].numpy()
        arrays[MASK] = tokens["attention_mask"].int().numpy()
        with graph_runtimes.one_torch_thread():
            return torch.from_numpy(session.run(["logits"], arrays)[0])

    return forward


def _openvino(model: EarlyExitModel, inputs: Inputs) -> Iterator[tuple[str, Forward]]:
    """OpenVINO; int8 is quantized by NNCF on batches of these inputs."""
    openvino = graph_runtimes.import_openvino()
    pad = model.backbone.pad_token_id
    lengths = [len(each["input_ids"]) for each in inputs]
    batches = [padded([inputs[row] for row in rows], pad) for rows in by_length(lengths, 2048)]
    names = [name for name in INPUTS if name in batches[0]]
    graph = openvino.convert_model(
        Full(model, "float32").eval(),
        example_input=tuple(batches[0][name] for name in names),
        input=[openvino.PartialShape([-1, -1])] * len(names),
    )
    yield "float32", _compiled(graph, names, "f32")
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield "bfloat16", _compiled(graph, names, "bf16")
    import nncf

    nncf.set_log_level(logging.ERROR)
    chosen = batches[:: max(1, len(batches) // CALIBRATION_BATCHES)]
    samples = [[batch[name].numpy() for name in names] for batch in chosen]
    quantized = nncf.quantize(
        graph,
        nncf.Dataset(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
    )
    yield "int8", _compiled(quantized, names, "f32")


def _compiled(graph: Any, names: list[str], precision: str) -> Forward:
    request = graph_runtimes.openvino_request(graph, torch.get_num_threads(), precision)

    def forward(tokens: dict[str, Tensor]) -> Tensor:
        outputs = request.infer([tokens[name].numpy() for name in names], share_inputs=True)
        return torch.from_numpy(np.array(next(iter(outputs.values()))))

    return forward


def _ctranslate2(model: EarlyExitModel, inputs: Inputs) -> Iterator[tuple[str, Forward]]:
    """CTranslate2, which knows BERT; the final classifier runs in torch."""
    import ctranslate2
    from ctranslate2.converters.transformers import TransformersConverter

    ramp = model.all_ramps[-1]
    with tempfile.TemporaryDirectory() as folder:
        source, to = Path(folder) / "model", Path(folder) / "converted"
        model.backbone.encoder.save_pretrained(source)
        _complete(source, model.backbone.encoder.config.vocab_size)
        TransformersConverter(str(source)).convert(str(to))
        for precision in ("float32", "int8"):
            encoder = ctranslate2.Encoder(
                str(to), compute_type=precision, intra_threads=torch.get_num_threads()
            )
            yield (
                precision,
                lambda tokens, encoder=encoder: _states(ctranslate2, encoder, ramp, tokens),
            )


def _states(ctranslate2: Any, encoder: Any, ramp: Any, tokens: dict[str, Tensor]) -> Tensor:
    ids_BS = tokens["input_ids"].int().numpy()
    lengths_B = tokens["attention_mask"].sum(1).int().numpy()
    more = {}
    if "token_type_ids" in tokens:
        more["token_type_ids"] = [
            row[:length].tolist()
            for row, length in zip(tokens["token_type_ids"], lengths_B, strict=True)
        ]
    output = encoder.forward_batch(
        ctranslate2.StorageView.from_array(ids_BS),
        ctranslate2.StorageView.from_array(lengths_B),
        **more,
    )
    states_BSH = torch.from_numpy(np.array(output.last_hidden_state))
    return ramp(states_BSH[:, 0])


def _complete(folder: Path, size: int) -> None:
    """Write what the converter also reads: a vocabulary of made-up words, and an older setting."""
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    words = [*special, *(f"w{number}" for number in range(len(special), size))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    config = json.loads((folder / "config.json").read_text())
    config["position_embedding_type"] = "absolute"
    (folder / "config.json").write_text(json.dumps(config))


BUILDERS: dict[str, Callable[[EarlyExitModel, Inputs], Iterator[tuple[str, Forward]]]] = {
    "Hugging Face": _library,
    "ONNX Runtime": _onnx,
    "OpenVINO": _openvino,
    "CTranslate2": _ctranslate2,
}
