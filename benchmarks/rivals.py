"""What the engine is timed against: the original's protocol, plain full depth, a model cut short.

The engines that a user could install instead are in `full_depth`.

Each is a function of what the engine takes, a list of inputs as a tokenizer gives them. It pads,
batches and answers, so that the clock sees the same work in all. Knows nothing of tasks or clocks.
Shapes: B batch, S tokens, H hidden, N inputs, C labels.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deebert.data.batching import by_length, padded
from deebert.errors import UserError
from deebert.evaluation.engine_latency import Inputs
from deebert.exits import rules
from deebert.inference.survivors import Answers
from deebert.models.early_exit import EarlyExitModel

Run = Callable[[Inputs], Answers | Tensor]

ORIGINAL_LENGTH = 128  # --max_seq_length of castorini/DeeBERT's scripts


def check_paper(model: EarlyExitModel) -> None:
    """Raises:
    UserError: its ramps are not the paper's, and would be asked about what they don't read.
    """
    if model.ramp_kind.reads != "first" or model.ramp_kind.sees_previous:
        raise UserError(
            f"{model.ramp_kind}: the original's protocol and models cut short are for the paper's "
            "ramps alone"
        )


def original(model: EarlyExitModel, threshold: float) -> Run:
    """DeeBERT's own protocol: one input at a time, padded to 128 tokens, every ramp evaluated, and
    after each layer the host decides by the ramp's entropy.
    """
    check_paper(model)
    backbone, ramps = model.backbone, model.ramps

    @torch.inference_mode()
    def run(inputs: Inputs) -> Answers:
        answers = Answers.empty(len(inputs), len(ramps), ramps[-1].classifier.out_features, False)
        for row, given in enumerate(inputs):
            more = max(0, ORIGINAL_LENGTH - len(given["input_ids"]))
            tokens = {
                name: nn.functional.pad(
                    values, (0, more), value=backbone.pad_token_id if name == "input_ids" else 0
                )
                for name, values in padded([given], backbone.pad_token_id).items()
            }
            hidden_1SH, context = backbone.embed(**tokens)
            for layer, ramp in enumerate(ramps):
                hidden_1SH = backbone.run_layer(layer, hidden_1SH, context)
                logits_1C = ramp(hidden_1SH[:, 0])
                if bool(rules.entropy(logits_1C) < threshold):
                    break
            answers.logits_NC[row], answers.layer_N[row] = logits_1C[0], layer + 1
        return answers

    return run


def in_batches(
    forward: Callable[[dict[str, Tensor]], Tensor], pad_token_id: int, token_budget: int
) -> Run:
    """Batches of similar length, cut to their longest, and the answers in the inputs' order."""

    @torch.inference_mode()
    def run(inputs: Inputs) -> Tensor:
        outputs: list[Any] = [None] * len(inputs)
        for rows in by_length([len(given["input_ids"]) for given in inputs], token_budget):
            logits_BC = forward(padded([inputs[row] for row in rows], pad_token_id))
            for row, logits_C in zip(rows, logits_BC, strict=True):
                outputs[row] = logits_C
        return torch.stack(outputs)

    return run


class Full(nn.Module):
    """The library's own forward pass and the final classifier."""

    def __init__(self, model: EarlyExitModel, precision: str) -> None:
        super().__init__()
        self.encoder, self.ramp = model.backbone.encoder, model.ramps[-1]
        if precision != "float32":
            self.encoder = copy.deepcopy(self.encoder).to(getattr(torch, precision))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types)
        return self.ramp(states.last_hidden_state[:, 0].float())


def plain(model: EarlyExitModel, precision: str, token_budget: int) -> Run:
    """Hugging Face's forward pass, with an attention mask, and the final classifier."""
    full = Full(model, precision).eval()
    return in_batches(lambda tokens: full(**tokens), model.backbone.pad_token_id, token_budget)


def cut(model: EarlyExitModel, depth: int, token_budget: int) -> Run:
    """The library's first so many layers; the ramp there answers all inputs."""
    check_paper(model)
    backbone, ramp = model.backbone, model.ramps[depth - 1]

    def forward(tokens: dict[str, Tensor]) -> Tensor:
        hidden_BSH, context = backbone.embed(**tokens)
        for layer in range(depth):
            hidden_BSH = backbone.run_layer(layer, hidden_BSH, context)
        return ramp(hidden_BSH[:, 0])

    return in_batches(forward, backbone.pad_token_id, token_budget)
