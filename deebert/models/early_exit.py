"""DeeBERT: a backbone with a ramp after each layer (paper, section 3.1).

The module knows nothing of training, tasks or exit rules.
Shapes: B batch, S tokens, H hidden, L layers (= ramps), C labels; F features that a ramp reads (H
for most kinds of ramp) and R features of all ramps together.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors.torch import save_model
from torch import Tensor, nn

from deebert.disk import whole_files
from deebert.models import architectures, backbones, ramps
from deebert.models.ramps import Ramp, RampKind

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Flow(NamedTuple):
    """Factors on the gradients that flow back into the states of layer k, k = 1..L.

    Attributes:
        ramp_L: factor on the gradient from ramp k.
        onward_L: factor on the gradient from the layers and ramps above (the last is unused).
    """

    ramp_L: list[float]
    onward_L: list[float]


class EarlyExitModel(nn.Module, PyTorchModelHubMixin):
    """A backbone with a ramp after each layer; the last ramp is the final classifier.

    `save_pretrained(folder)` writes safetensors and config.json, `from_pretrained(folder or id)`
    reads them. For a folder from somebody else use `EarlyExitClassifier`, which also checks sizes
    and links before it builds a model.

    Args:
        config: plain values of the backbone's Hugging Face configuration, with `model_type`.
        num_labels: number of classes, 1 for a regression.
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
        # Somebody else may have written the file that the values come from.
        self.backbone = backbones.from_config(architectures.settings(config))
        self.num_labels = num_labels
        self.new_ramps(RampKind.from_config(ramp or {}))

    @classmethod
    def shapes(cls, *args: Any) -> tuple[dict[str, tuple[int, ...]], int]:
        """Return the shapes of all weights of a model, and the bytes that they would take.

        The call takes no memory, however large the weights are.

        Args:
            *args: arguments of the class.
        """
        with torch.device("meta"):
            model = cls(*args)
        num_bytes = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}, num_bytes

    @classmethod
    def from_backbone(
        cls, spec: backbones.Spec, num_labels: int, ramp: Mapping[str, Any] | None = None
    ) -> "EarlyExitModel":
        """Build a model from a pretrained backbone.

        The pooler of each ramp that reads the first token (`Reader.takes_pooler`) starts as a copy
        of the *pretrained* pooler, in stage 2 as well, as stage 1 does not change it
        (init_highway_pooler in the original code). The pooler of any other ramp starts with small
        random weights.

        Args:
            spec: the place of the backbone, typed or as the values of a file in `conf/backbone/`.
            num_labels: number of classes, 1 for a regression.
            ramp: plain values of the kind of the ramps before the last; None for the paper's.

        Raises:
            UserError: the backbone cannot be loaded, or does not have the layers to keep.
        """
        config = backbones.typed(spec)
        backbone, pooler = backbones.pretrained(config)
        if config.layers is not None:
            backbone.keep_layers(config.layers, "backbone.layers")
        model = cls(backbone.config, num_labels, ramp)
        model.backbone = backbone
        if pooler is not None:
            for each in model.all_ramps:
                if each.reader.takes_pooler:
                    each.pooler.load_state_dict(pooler.state_dict())
        return model

    def new_ramps(self, kind: RampKind) -> None:
        """Put new ramps of this kind after each layer.

        An existing final classifier stays. If the new ramps read the same as the existing ones,
        they take over all weights that fit, trained or pretrained.
        """
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
            if new.kind.reads == old.kind.reads:
                weights = new.state_dict()
                fitting = {
                    name: values
                    for name, values in old.state_dict().items()
                    if name in weights and weights[name].shape == values.shape
                }
                new.load_state_dict(weights | fitting)
        if before:
            self.ramps[-1] = before[-1]

    def save_pretrained(self, save_directory: Any, **options: Any) -> Any:
        """Write safetensors and config.json.

        config.json holds the model's current values, since `new_ramps` and `keep_layers` change it,
        and the values of `config=`, which are not read back.
        """
        arguments = {
            "config": self.config, "num_labels": self.num_labels, "ramp": asdict(self.ramp_kind)
        }  # fmt: skip
        options["config"] = {**(options.get("config") or {}), **arguments}
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights, with the permissions that the user's umask allows."""
        with whole_files.replaced(save_directory / SAFETENSORS_SINGLE_FILE) as part:
            save_model(self, str(part))

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights, also from a file that holds a shared parameter once (safetensors).

        Args:
            weights: tensors by parameter name; one name of a shared parameter is enough.

        Raises:
            RuntimeError: a weight is missing, unknown or of another shape.
        """
        shared: dict[int, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        filled = dict(weights)
        for names in shared.values():
            value = next((weights[name] for name in names if name in weights), None)
            filled |= {name: value for name in names if value is not None and name not in filled}
        self.load_state_dict(filled)

    def keep_layers(self, layers: list[int], flag: str) -> None:
        """Remove all other layers, for a shallower model with the same weights.

        The ramps stay with their layers, except that the last layer gets the final classifier.

        Args:
            layers: the layers to keep, from 1.
            flag: name of the setting, for messages.

        Raises:
            UserError: these are not some of its layers in their order.
        """
        self.backbone.keep_layers(layers, flag)
        ramps = self.all_ramps
        self.ramps = nn.ModuleList([*(ramps[layer - 1] for layer in layers[:-1]), ramps[-1]])

    @property
    def all_ramps(self) -> list[Ramp]:
        """The ramps; the last one is the final classifier."""
        return cast(list[Ramp], list(self.ramps))

    @property
    def ramp_kind(self) -> RampKind:
        """The kind of the ramps before the last."""
        return self.all_ramps[0].kind

    @property
    def config(self) -> dict[str, Any]:
        """The backbone's configuration as plain values; an argument of the class."""
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
        """Compute the features that the ramps read, joined: (B, S) ids and mask -> (B, R).

        Args:
            input_ids: (B, S).
            attention_mask: (B, S), 1 at real tokens.
            token_type_ids: (B, S), or None.
            flow: factors on the gradients; None for 1.
            skipped: layers, from 0, that do nothing; their ramps read the unchanged states of the
                layer before.
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
        """Find the start of each second text: (B, S) -> (B,); None if no ramp needs it.

        See `ramps.second_text`.
        """
        if not self.ramp_kind.reader.needs_second_text:
            return None
        assert self.backbone.separator is not None, "the configuration has no sep_token_id"
        return ramps.second_text(input_ids, self.backbone.separator)

    def ramp_logits(self, states_BR: Tensor) -> Tensor:
        """Compute the logits of each ramp from the features of all ramps: (B, R) -> (B, L, C)."""
        return self.logits_and_scores(states_BR)[0]

    def logits_and_scores(self, states_BR: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the logits (B, L, C) and the learned exit scores (B, L) from features (B, R).

        The score of the final classifier is 0. The scores are None if the ramps learn none.
        """
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
        """Split the result of `states` into the features of each ramp: (B, R) -> (B, F) each."""
        return states_BR.split([ramp.num_features for ramp in self.all_ramps], -1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute the logits of each ramp: (B, S) ids and mask -> (B, L, C)."""
        return self.ramp_logits(self.states(input_ids, attention_mask, token_type_ids))


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x unchanged, and multiply its gradient by `factor`."""
    if factor == 1:
        return x
    if factor == 0:
        return x.detach()
    scaled: Tensor = _ScaledGradient.apply(x, factor)
    return scaled


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor, None
