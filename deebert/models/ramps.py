"""Ramps: the classifiers on the features that a reader takes from a layer's tokens.

The default is the paper's ramp (section 3.1): a pooler (linear and tanh) on the first token, and a
linear classifier. `conf/ramp/` holds the other kinds, and `ramp_readers` the readers. The module
knows nothing of the backbone or of training.
Shapes: B batch, S tokens, H hidden, F features that a ramp reads, C labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deebert.errors import UserError, unknown
from deebert.models import ramp_readers
from deebert.models.ramp_readers import LayerStates, Reader

PREDICTS = ("wrong", "disagrees")


@dataclass(frozen=True)
class RampKind:
    """The kind of the ramps before the last; the last ramp is always the paper's.

    Attributes:
        reads: name of the reader, which computes the features (`ramp_readers`).
        shared_pooler: True if these ramps share one pooler (PABEE, Zhou et al., NeurIPS 2020).
        sees_previous: True if the classifier of a ramp also reads the probabilities of the ramp
            before it (after sledgehammer, Schwartz et al., ACL 2020). They carry no gradient.
        predicts: the learned exit score. `wrong` is the probability that the ramp is wrong
            (BERxiT's learning to exit, Xin et al., EACL 2021). `disagrees` is the probability that
            it disagrees with the final classifier (CATs, Schuster et al., EMNLP 2021). None: no
            score is learned. For a regression see `losses.exit_loss`.
    """

    reads: str = "first"
    shared_pooler: bool = False
    sees_previous: bool = False
    predicts: str | None = None

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "RampKind":
        """Build a kind from plain values.

        Raises:
            UserError: a key is unknown, or a value is not one of its choices.
        """
        if unknown_keys := set(values) - set(cls.__dataclass_fields__):
            raise unknown("ramp setting", min(unknown_keys), cls.__dataclass_fields__, "ramp.*")
        kind = cls(**values)
        ramp_readers.named(kind.reads)
        if kind.predicts is not None and kind.predicts not in PREDICTS:
            raise unknown("ramp.predicts", kind.predicts, (*PREDICTS, "null"), "ramp.predicts")
        for name in ("shared_pooler", "sees_previous"):
            if not isinstance(getattr(kind, name), bool):
                raise UserError(f"ramp.{name}={getattr(kind, name)} must be true or false")
        return kind

    @property
    def reader(self) -> Reader:
        """The reader, which computes the features of a ramp."""
        return ramp_readers.named(self.reads)

    @property
    def reads_tokens(self) -> bool:
        """True if all tokens of the layer must be computed before the ramp."""
        return self.reader.reads_tokens

    @property
    def exact_first(self) -> bool:
        """True if the first token is computed in float32 in every precision.

        In early layers the first tokens of different inputs differ by a thousandth of their size,
        which 8 or 16 bits cannot represent. One token costs little. Ramps that read all tokens do
        not need it, since the mean of the tokens differs more between inputs.
        """
        return not self.reads_tokens


PAPER = RampKind()


class Ramp(nn.Module):
    """Pooler (linear and tanh), dropout, linear: features (B, F) -> logits (B, C).

    `shift` and `scale` are applied to the features first. They are 0 and 1, as in the paper's ramp,
    unless `standardize` sets them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, hidden_size: int, num_labels: int, dropout: float, kind: RampKind = PAPER
    ) -> None:
        super().__init__()
        self.kind = kind
        self.reader = kind.reader
        self.num_features = self.reader.num_parts * hidden_size
        self.pooler = nn.Linear(self.num_features, hidden_size)
        self.dropout = nn.Dropout(dropout)
        num_previous = num_labels if kind.sees_previous else 0
        self.classifier = nn.Linear(hidden_size + num_previous, num_labels)
        linears = [self.pooler, self.classifier]
        for name, module in self.reader.weights(hidden_size).items():
            self.add_module(name, module)
            linears += [part for part in module.modules() if isinstance(part, nn.Linear)]
        if kind.predicts is not None:
            self.exit_head = nn.Linear(hidden_size, 1)
            linears.append(self.exit_head)
        for linear in linears:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.register_buffer("shift", torch.zeros(self.num_features))
        num_scales = self.num_features if self.reader.num_parts > 1 else ()
        self.register_buffer("scale", torch.ones(num_scales))

    def read(
        self,
        before_BSH: Tensor,
        after_BTH: Tensor,
        mask_BS: Tensor | None,
        second_B: Tensor | None = None,
    ) -> Tensor:
        """Compute the features of the ramp from the states of its layer: -> (B, F).

        Args:
            before_BSH: input of the layer.
            after_BTH: output of the layer; the first token is enough unless `kind.reads_tokens`.
            mask_BS: True or 1 at real tokens; None: all tokens are real.
            second_B: start of the second text of each input (`second_text`); None if the reader
                does not need it.
        """
        return self.reader.read(LayerStates(before_BSH, after_BTH, mask_BS, second_B), self)

    @torch.no_grad()
    def standardize(self, features_NF: Tensor) -> None:
        """Set `shift` and `scale` so that the features have a mean of 0 and a variance of 1.

        In early layers the first token is almost the same vector for all inputs (MiniLM, layer 1:
        entries of about 1 that vary by 0.001). The differences between inputs are there, but too
        small for the optimizer. All features of a token have one scale, so that a feature that is
        only rounding noise does not grow. The pooler could absorb shift and scale, so this is the
        same function class as the paper's ramp.

        Args:
            features_NF: features of the training rows.

        Raises:
            UserError: the features do not vary.
        """
        scales, num_parts = [], self.reader.num_parts
        for part_NH in features_NF.chunk(num_parts, -1):
            deviation = part_NH.var(0, correction=0).mean().sqrt()
            if not deviation > 0:
                raise UserError(
                    "stages.2.standardize=true: what a ramp reads does not vary over the "
                    f"{len(features_NF)} training rows; use more rows, or stages.2.standardize="
                    "false"
                )
            scales.append(1 / deviation)
        self.shift.copy_(features_NF.mean(0))
        if num_parts == 1:
            self.scale.copy_(scales[0])
        else:
            width = self.num_features // num_parts
            self.scale.copy_(torch.stack(scales).repeat_interleave(width))

    def forward(self, features_BF: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """Compute the logits (B, C).

        Args:
            features_BF: the result of `read`.
            previous_BC: logits of the ramp before, if `kind.sees_previous`. None for the first
                ramp, which sees equal probabilities.
        """
        return self._logits(self._pooled(features_BF), previous_BC)

    def logits_and_score(
        self, features_BF: Tensor, previous_BC: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the logits (B, C) and the learned exit score (B,), between 0 and 1.

        The score is None if `kind.predicts` is None. It reads the pooled features of the ramp, and
        no gradient flows from it into these. For the arguments see `forward`.
        """
        pooled_BH = self._pooled(features_BF)
        learned_score_B = None if self.kind.predicts is None else self._learned_score(pooled_BH)
        return self._logits(pooled_BH, previous_BC), learned_score_B

    def _pooled(self, features_BF: Tensor) -> Tensor:
        return torch.tanh(self.pooler((features_BF - self.shift) * self.scale))

    def _logits(self, pooled_BH: Tensor, previous_BC: Tensor | None) -> Tensor:
        pooled_BH = self.dropout(pooled_BH)
        if not self.kind.sees_previous:
            return self.classifier(pooled_BH)
        if previous_BC is None:
            previous_BC = pooled_BH.new_zeros(len(pooled_BH), self.classifier.out_features)
        return self.classifier(torch.cat([pooled_BH, _share(previous_BC).to(pooled_BH)], -1))

    def _learned_score(self, pooled_BH: Tensor) -> Tensor:
        return torch.sigmoid(self.exit_head(pooled_BH.detach()).float()).squeeze(-1)


def _share(logits_BC: Tensor) -> Tensor:
    """Return probabilities, or the value of a regression, without a gradient."""
    logits_BC = logits_BC.detach().float()
    return logits_BC if logits_BC.shape[-1] == 1 else logits_BC.softmax(-1)


def second_text(input_ids_BS: Tensor, separator: int) -> Tensor:
    """Find the start of each second text, after the first separator: (B, S) ids -> (B,).

    Without a second text it is the end of the text, or S if there is no separator. A separator
    inside of a text ("[SEP]") counts as well.
    """
    separates_BS = input_ids_BS == separator
    first_B = separates_BS.int().argmax(1) + 1
    return torch.where(separates_BS.any(1), first_B, input_ids_BS.shape[1])


def make(
    hidden_size: int, num_labels: int, dropout: float, num_layers: int, kind: RampKind
) -> nn.ModuleList:
    """Make a ramp for each layer; the last one, the final classifier, is the paper's."""
    ramps = [Ramp(hidden_size, num_labels, dropout, kind) for _ in range(num_layers - 1)]
    for ramp in ramps[1:]:
        if kind.shared_pooler:
            ramp.pooler = ramps[0].pooler
        if kind.predicts is not None:  # one head for all ramps, as in BERxiT
            ramp.exit_head = ramps[0].exit_head
    return nn.ModuleList([*ramps, Ramp(hidden_size, num_labels, dropout)])
