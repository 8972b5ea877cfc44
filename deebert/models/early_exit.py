"""DeeBERT: a backbone with an off-ramp after each layer (paper, section 3.1).

Knows nothing of training or tasks.
Shapes: B batch, S tokens, H hidden, L layers (= ramps), C labels; F features that a ramp reads (H,
unless `conf/ramp/` says otherwise) and R, those of all ramps together.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from deebert.models import architectures, backbones, ramps
from deebert.models.ramps import Ramp, RampKind

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Flow(NamedTuple):
    """What becomes of the gradients where layer k's states go two ways: factors, k = 1..L.

    Attributes:
        ramp_L: of the gradient that comes back from ramp k.
        onward_L: of the one that comes back from the layers and ramps above (the last is unused).
    """

    ramp_L: list[float]
    onward_L: list[float]


class EarlyExitModel(nn.Module, PyTorchModelHubMixin):
    """A backbone and a ramp per layer; the last ramp is the final classifier.

    `save_pretrained(folder)` writes safetensors and config.json, `from_pretrained(folder or id)`
    reads them back. A folder of somebody else's is better read by `EarlyExitClassifier`, which
    also checks sizes and links before it builds anything.

    Args:
        config: plain values of the backbone's Hugging Face configuration, `model_type` among them.
        num_labels: number of classes, 1 for regression.
        ramp: plain values of the kind of the ramps before the last (`ramps.RampKind`); None for
            the paper's.
    """

    ramps: nn.ModuleList

    def __init__(
        self,
        config: Mapping[str, Any],
        num_labels: int,
        ramp: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # Of a file that somebody else may have written.
        self.backbone = backbones.from_config(architectures.settings(config))
        self.num_labels = num_labels
        self.new_ramps(RampKind.from_config(ramp or {}))

    @classmethod
    def shapes(cls, *args: Any) -> tuple[dict[str, tuple[int, ...]], int]:
        """The shapes of all weights of such a model, and the bytes that they would take.

        Takes no memory, however large they are.
        """
        with torch.device("meta"):
            model = cls(*args)
        num_bytes = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}, num_bytes

    @classmethod
    def from_backbone(
        cls, spec: Mapping[str, Any], num_labels: int, ramp: Mapping[str, Any] | None = None
    ) -> "EarlyExitModel":
        """Start from the pretrained backbone that `conf/backbone/` names.

        The pooler of every ramp on the first token starts as a copy of the *pretrained* pooler,
        also in stage 2: stage 1 does not touch it (original: init_highway_pooler). One that reads
        something else starts from small random weights.
        """
        backbone, pooler = backbones.pretrained(spec)
        if spec.get("layers") is not None:
            backbone.keep_layers(spec["layers"], "backbone.layers")
        model = cls(backbone.config, num_labels, ramp)
        model.backbone = backbone
        if pooler is not None:
            for each in model.all_ramps:
                if each.kind.reads == "first":
                    each.pooler.load_state_dict(pooler.state_dict())
        return model

    def new_ramps(self, kind: RampKind) -> None:
        """Put untrained ramps of this kind after each layer; an existing final classifier stays."""
        before = self.all_ramps if hasattr(self, "ramps") else []
        backbone = self.backbone
        self.ramps = ramps.make(
            backbone.hidden_size,
            self.num_labels,
            backbone.classifier_dropout,
            len(backbone.layers),
            kind,
        )
        for new, old in zip(self.all_ramps, before, strict=bool(before)):
            if new.kind.reads == old.kind.reads:  # what fits stays: trained, or pretrained
                there = new.state_dict()
                fits = {
                    name: values
                    for name, values in old.state_dict().items()
                    if name in there and there[name].shape == values.shape
                }
                new.load_state_dict(there | fits)
        if before:
            self.ramps[-1] = before[-1]

    def save_pretrained(self, save_directory: Any, **options: Any) -> Any:
        """Write safetensors, and config.json of what the model is now: `new_ramps` and
        `keep_layers` change it after it was made."""
        options["config"] = {
            "config": self.config, "num_labels": self.num_labels, "ramp": asdict(self.ramp_kind)
        }  # fmt: skip
        return super().save_pretrained(save_directory, **options)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """As `load_state_dict`, also from a file that holds shared parameters once, under one of
        their names (safetensors).

        Raises:
            RuntimeError: a weight is missing, unknown or of another shape.
        """
        shared: dict[int, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        filled = dict(weights)
        for names in shared.values():
            there = next((weights[name] for name in names if name in weights), None)
            filled |= {name: there for name in names if there is not None and name not in filled}
        self.load_state_dict(filled)

    def keep_layers(self, layers: list[int], flag: str) -> None:
        """Leave only these layers, from 1: a shallower model with the weights of this one.

        The ramps stay with their layers, but on the last one that is left is the final classifier.

        Raises:
            UserError: these are not some of its layers in their order; `flag` said so.
        """
        self.backbone.keep_layers(layers, flag)
        ramps = self.all_ramps
        self.ramps = nn.ModuleList([*(ramps[layer - 1] for layer in layers[:-1]), ramps[-1]])

    @property
    def all_ramps(self) -> list[Ramp]:
        """The ramps, the final classifier at the end."""
        return cast(list[Ramp], list(self.ramps))

    @property
    def ramp_kind(self) -> RampKind:
        """What the ramps before the last are made of."""
        return self.all_ramps[0].kind

    @property
    def config(self) -> dict[str, Any]:
        """The backbone's configuration as plain values: what rebuilds this model's shape."""
        return self.backbone.config

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        flow: Flow | None = None,
        skipped: Collection[int] = (),
    ) -> Tensor:
        """What the ramps read, one after the other: (B, S) ids and mask -> (B, R).

        Args:
            flow: what becomes of gradients on their way back; None: they flow as they are.
            skipped: layers, from 0, that do nothing; their ramps read the states of the layer
                before, unchanged.
        """
        hidden_BSH, context = self.backbone.embed(input_ids, attention_mask, token_type_ids)
        second_B, features = self.second_text(input_ids), []
        for index, ramp in enumerate(self.all_ramps):
            before_BSH = hidden_BSH
            if index in skipped:
                run = self.backbone.skip_layer
            elif index == len(self.ramps) - 1:  # the final classifier reads the first token
                run = self.backbone.run_layer_for_first
            else:
                run = self.backbone.run_layer
            hidden_BSH = run(index, before_BSH, context)
            to_ramp_BSH = hidden_BSH
            if flow is not None:
                to_ramp_BSH = _scale_gradient(hidden_BSH, flow.ramp_L[index])
                before_BSH = _scale_gradient(before_BSH, flow.ramp_L[index])
                hidden_BSH = _scale_gradient(hidden_BSH, flow.onward_L[index])
            features.append(ramp.read(before_BSH, to_ramp_BSH, attention_mask, second_B))
        return torch.cat(features, -1)

    def second_text(self, input_ids: Tensor) -> Tensor | None:
        """Where the second texts begin (`ramps.second_text`): (B, S) -> (B,), if a ramp asks."""
        if self.ramp_kind.reads != "pair":
            return None
        assert self.backbone.separator is not None, "the configuration has no sep_token_id"
        return ramps.second_text(input_ids, self.backbone.separator)

    def ramp_logits(self, states_BR: Tensor) -> Tensor:
        """Each ramp on what it reads: (B, R) -> (B, L, C)."""
        return self.logits_and_scores(states_BR)[0]

    def logits_and_scores(self, states_BR: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, and the learned exit scores (B, L), 0 for the final classifier; None where the
        ramps learn none."""
        logits: list[Tensor] = []
        scores: list[Tensor] = []
        for ramp, features_BF in zip(self.all_ramps, self.features(states_BR), strict=True):
            logits_BC, learned_score_B = ramp.logits_and_score(
                features_BF, logits[-1] if logits else None
            )
            logits.append(logits_BC)
            if learned_score_B is not None:
                scores.append(learned_score_B)
        if not scores:
            return torch.stack(logits, 1), None
        return torch.stack(logits, 1), torch.stack([*scores, torch.zeros_like(scores[0])], 1)

    def features(self, states_BR: Tensor) -> tuple[Tensor, ...]:
        """What `states` gave, apart: (B, R) -> (B, F) for each ramp."""
        return states_BR.split([ramp.num_features for ramp in self.all_ramps], -1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits of every ramp: (B, S) ids and mask -> (B, L, C)."""
        return self.ramp_logits(self.states(input_ids, attention_mask, token_type_ids))


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient is multiplied on its way back."""
    if factor == 1:
        return x
    if factor == 0:
        return x.detach()
    scaled: Tensor = _ScaledGradient.apply(x, factor)
    return scaled


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor, None
