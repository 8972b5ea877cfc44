"""Tiny random models of every kind of architecture, inputs for them, and their records."""

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from conftest import ROOT
from helpers.tiny_models import DEBERTA_V3, tiny
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import RobertaTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deebert.exits import rules
from deebert.exits.records import Record
from deebert.exits.rules import Rule
from deebert.inference import quantize
from deebert.models.early_exit import EarlyExitModel
from deebert.models.quantization import Quantization

CPU = torch.device("cpu")
PRECISIONS = ("float32", "bfloat16", "int8")
SPLIT = ("bert", "roberta", "distilbert", "electra", "mpnet")
MORE = {  # what the published models of a type have switched on, or call otherwise
    "distilbert": {"hidden_dim": 64},
    "deberta-v2": DEBERTA_V3 | {"conv_kernel_size": 3},
    "modernbert": {"local_attention": 6},
}
NUM_LAYERS = 4
SEPARATOR = 3


CONF = ROOT / "conf"
RAMPS = sorted(file.stem for file in (CONF / "ramp").glob("*.yaml"))


def model_of(model_type: str, num_labels: int = 3, ramp: str = "first") -> EarlyExitModel:
    """Random weights: large enough for inputs to differ, not so large that rounding grows.

    Ramps as conf/ramp/ names them, with a learned exit score.
    """
    torch.manual_seed(5)
    size = {"num_hidden_layers": NUM_LAYERS, "initializer_range": 0.15}
    spec = tiny(model_type, **size, **MORE.get(model_type, {}))
    kind = OmegaConf.to_container(OmegaConf.load(CONF / "ramp" / f"{ramp}.yaml"))
    kind["predicts"] = "wrong"
    model = EarlyExitModel.from_backbone(spec, num_labels, kind).eval().requires_grad_(False)
    torch.manual_seed(5)
    for each in model.all_ramps:
        nn.init.normal_(each.pooler.weight, std=0.2)
        nn.init.normal_(each.classifier.weight, std=0.3)
    for name, weight in model.ramps.named_parameters():
        if name.endswith(("attention.weight", "exit_head.weight")):
            nn.init.normal_(weight, std=0.3)
    return model


def inputs_of(model_type: str, lengths: list[int], seed: int = 0) -> list[dict]:
    random = torch.Generator().manual_seed(seed)
    inputs = []
    for length in lengths:
        given = {"input_ids": torch.randint(5, 60, (length,), generator=random).tolist()}
        if length % 3:  # two texts, and some that are alone
            given["input_ids"][length // 2] = SEPARATOR
        if model_type in ("bert", "electra"):
            given["token_type_ids"] = [int(i > length // 2) for i in range(length)]
        inputs.append(given)
    return inputs


@torch.no_grad()
def record_of(model: EarlyExitModel, inputs: list[dict]) -> Record:
    """Every ramp of each input, alone and unpadded, through the model's own forward pass."""
    states = torch.cat(
        [
            model.states(ids := torch.tensor([given["input_ids"]]), torch.ones_like(ids), types(given))
            for given in inputs
        ]
    )  # fmt: skip
    lengths = torch.tensor([len(given["input_ids"]) for given in inputs])
    index = torch.arange(len(inputs))
    logits, learned_score = model.logits_and_scores(states)
    return Record("validation", logits, None, index, lengths, learned_score_NL=learned_score)


def types(given: dict) -> Tensor | None:
    return torch.tensor([given["token_type_ids"]]) if "token_type_ids" in given else None


@functools.cache
def world(
    model_type: str, num_labels: int = 3, ramp: str = "first"
) -> tuple[EarlyExitModel, list[dict], Record]:
    """A model, inputs of 1 to 40 tokens, and their record."""
    model = model_of(model_type, num_labels, ramp)
    inputs = inputs_of(model_type, [1 + i * 7 % 40 for i in range(80)])
    record = record_of(model, inputs)
    if num_labels == 1:
        return model, inputs, record
    # Rounding may turn a close vote, so none is close.
    best = record.logits_NLC.topk(2).values
    clear = ((best[..., 0] - best[..., 1]) > 1e-3).all(1)
    assert clear.sum() > 70
    chosen = clear.nonzero().flatten().tolist()
    return model, [inputs[row] for row in chosen], record.rows(clear)


@functools.cache
def quantization_of(model_type: str, num_labels: int = 3, ramp: str = "first") -> Quantization:
    """The ranges of the model of a world, measured on all of its inputs."""
    model, inputs, _ = world(model_type, num_labels, ramp)
    return quantize.measure(model, inputs, "train")


def in_precision(precision: str, model_type: str = "bert", ramp: str = "first") -> dict[str, Any]:
    """Arguments of `Engine` for the model of a world, or one of the same weights."""
    int8 = quantization_of(model_type, ramp=ramp) if precision == "int8" else None
    return {"precision": precision, "quantization": int8}


def rule_of(name: str, num_labels: int = 3, **more: object) -> Rule:
    looks_back = name not in ("entropy", "relative_entropy", "probability", "margin", "learned")
    reads = "learned_score" if name == "learned" else "logits"
    if name == "relative_entropy":
        more |= {"relative": True, "prior": [0.6, 0.3, 0.1]}
    return Rule(
        name, getattr(rules, name), num_labels, regression=num_labels == 1, looks_back=looks_back,
        reads=reads, **more,
    )  # fmt: skip


CLASS_RULES = (
    "entropy", "relative_entropy", "probability", "margin", "patience", "confident_patience",
    "ensemble", "vote", "learned",
)  # fmt: skip


def middles(scores: Tensor) -> list[float]:
    """Thresholds that rounding cannot reach, and those that never and always exit."""
    values = [0.0, *scores[scores.isfinite()].double().unique().tolist()]
    values.append(values[-1] + 1)
    return [0.0, math.inf, *((a + b) / 2 for a, b in pairwise(values) if b - a >= 1e-4)]


def calls(model: EarlyExitModel, run: Callable[[], object]) -> list[int]:
    """How many inputs each ramp is asked about."""
    counts = [0] * len(model.ramps)

    def hook(index: int) -> Callable[..., None]:
        def count(ramp: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            counts[index] += len(args[0])

        return count

    hooks = [ramp.pooler.register_forward_hook(hook(i)) for i, ramp in enumerate(model.ramps)]
    run()
    for handle in hooks:
        handle.remove()
    return counts


def byte_level() -> RobertaTokenizer:
    """With merges, leading spaces and no token types; cuts at the left."""
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    vocab |= {letter: len(vocab) + i for i, letter in enumerate(bytes_to_unicode().values())}
    merges = [("Ġ", "a"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = RobertaTokenizer(vocab=vocab, merges=merges)
    tokenizer.truncation_side = "left"
    return tokenizer
