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


class Ramp(nn.Module):
    """Pooler (linear and tanh on the first token), dropout, linear: (B, H) -> (B, C)."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)
        for linear in (self.pooler, self.classifier):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, first_BH: Tensor) -> Tensor:
        return self.classifier(self.dropout(torch.tanh(self.pooler(first_BH))))


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
        values = self.backbone.encoder.config
        dropout = getattr(
            values, "hidden_dropout_prob", getattr(values, "seq_classif_dropout", 0.1)
        )
        self.ramps = nn.ModuleList(
            Ramp(values.hidden_size, num_labels, dropout) for _ in self.backbone.layers
        )

    @classmethod
    def from_backbone(cls, spec: Mapping[str, Any], num_labels: int) -> "EarlyExitModel":
        """Start from the pretrained backbone that `conf/backbone/` names.

        Every ramp's pooler starts as a copy of the *pretrained* pooler, also in stage 2: stage 1
        does not touch it (original: init_highway_pooler).
        """
        backbone, pooler = backbones.pretrained(spec)
        model = cls(backbone.encoder.config.to_dict(), num_labels)
        model.backbone = backbone
        if pooler is not None:
            for ramp in model.ramps:
                ramp.pooler.load_state_dict(pooler.state_dict())
        return model

    @property
    def config(self) -> dict[str, Any]:
        """The backbone's configuration as plain values: what rebuilds this model's shape."""
        return self.backbone.encoder.config.to_dict()

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        num_layers: int | None = None,
    ) -> Tensor:
        """The first token's state after each layer: (B, S) ids and mask -> (B, L, H).

        Args:
            num_layers: run only this many layers (None: all).
        """
        hidden_BSH, mask = self.backbone.embed(input_ids, attention_mask, token_type_ids)
        states = []
        for layer in self.backbone.layers[:num_layers]:
            hidden_BSH = layer(hidden_BSH, mask)
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
