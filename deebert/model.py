"""DeeBERT: a backbone with an off-ramp after each layer (paper, section 3.1).

Knows nothing of training or tasks.
Shapes: B batch, S tokens, H hidden, L layers (= ramps), C labels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from deebert import backbones
from deebert.errors import UserError

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Ramp(nn.Module):
    """Pooler (linear and tanh on the first token), dropout, linear: (B, H) -> (B, C).

    `shift` and `scale` are applied to the input first. They are 0 and 1, the paper's ramp, unless
    `standardize` sets them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)
        for linear in (self.pooler, self.classifier):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.register_buffer("shift", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def standardize(self, states_NH: Tensor) -> None:
        """Make the states that this ramp will read vary around 0 with a variance of 1.

        In early layers the first token of different inputs is almost the same vector (MiniLM, layer
        1: entries of about 1 that vary by 0.001): what tells inputs apart is there, but too faint
        for the optimizer. One scale for all features, so that none that is mere rounding noise is
        blown up. shift and scale could be folded into the pooler: it stays the paper's ramp.
        """
        deviation = states_NH.var(0, correction=0).mean().sqrt()
        if not deviation > 0:
            raise UserError(
                "stages.2.standardize=true: what a ramp reads does not vary over the "
                f"{len(states_NH)} training rows; use more rows, or stages.2.standardize=false"
            )
        self.shift.copy_(states_NH.mean(0))
        self.scale.copy_(1 / deviation)

    def forward(self, first_BH: Tensor) -> Tensor:
        return self.classifier(
            self.dropout(torch.tanh(self.pooler((first_BH - self.shift) * self.scale)))
        )


class EarlyExitModel(nn.Module, PyTorchModelHubMixin):
    """A backbone and a ramp per layer; the last ramp is the final classifier.

    `save_pretrained(folder)` writes safetensors and config.json, `from_pretrained(folder or id)`
    reads them back.

    Args:
        config: plain values of the backbone's Hugging Face configuration, `model_type` among them.
        num_labels: number of classes, 1 for regression.
    """

    def __init__(self, config: Mapping[str, Any], num_labels: int) -> None:
        super().__init__()
        self.backbone = backbones.from_config(config)
        self.ramps = nn.ModuleList(
            Ramp(self.backbone.hidden_size, num_labels, self.backbone.classifier_dropout)
            for _ in self.backbone.layers
        )

    @classmethod
    def from_backbone(cls, spec: Mapping[str, Any], num_labels: int) -> "EarlyExitModel":
        """Start from the pretrained backbone that `conf/backbone/` names.

        Every ramp's pooler starts as a copy of the *pretrained* pooler, also in stage 2: stage 1
        does not touch it (original: init_highway_pooler).
        """
        backbone, pooler = backbones.pretrained(spec)
        model = cls(backbone.config, num_labels)
        model.backbone = backbone
        if pooler is not None:
            for ramp in model.ramps:
                assert isinstance(ramp, Ramp)
                ramp.pooler.load_state_dict(pooler.state_dict())
        return model

    @property
    def config(self) -> dict[str, Any]:
        """The backbone's configuration as plain values: what rebuilds this model's shape."""
        return self.backbone.config

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """The first token's state after each layer: (B, S) ids and mask -> (B, L, H)."""
        hidden_BSH, context = self.backbone.embed(input_ids, attention_mask, token_type_ids)
        states = []
        for index in range(len(self.ramps)):
            hidden_BSH = self.backbone.run_layer(index, hidden_BSH, context)
            states.append(hidden_BSH[:, 0])
        return torch.stack(states, dim=1)

    def ramp_logits(self, states_BLH: Tensor) -> Tensor:
        """Each ramp on its layer's state: (B, l, H) for the first l layers -> (B, l, C)."""
        states = states_BLH.unbind(1)
        return torch.stack(
            [ramp(state) for ramp, state in zip(self.ramps, states, strict=False)], 1
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Logits of every ramp: (B, S) ids and mask -> (B, L, C)."""
        return self.ramp_logits(self.states(input_ids, attention_mask, token_type_ids))
