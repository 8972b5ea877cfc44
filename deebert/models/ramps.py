"""Ramps: what they read of a layer's tokens, and the classifier on it.

The default is the paper's off-ramp (section 3.1): pooler (linear and tanh) on the first token, and
a linear classifier. `conf/ramp/` names the others. Knows nothing of the backbone or of training.
Shapes: B batch, S tokens, H hidden, F features that a ramp reads, C labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deebert.errors import UserError, unknown

READS = ("first", "mean", "pair", "first_and_mean", "attention")
PREDICTS = ("wrong", "disagrees")


@dataclass(frozen=True)
class RampKind:
    """What the ramps before the last are made of; the last one is always the paper's.

    Attributes:
        reads: what a ramp reads after layer k.
            first: layer k's first token, as the paper.
            mean: the mean of layer k's tokens. They must all be there before the ramp is asked, so
                an input that leaves at layer k costs k layers, not about k - 5/6 (`engine`).
            pair: of the means u and v of the two texts' tokens: (u + v) / 2, u - v and |u - v|, for
                tasks that ask how two texts stand to each other. These are the features of
                Sentence-BERT (Reimers and Gurevych, EMNLP 2019), u and v turned by 45 degrees, so
                that a text alone, which is its own pair, is read as by `mean`: tasks of one text
                get that. Costs as mean.
            first_and_mean: layer k's first token, and the mean of layer k-1's tokens (of the
                embeddings for k = 1), which are there anyway: k - 5/6 layers.
            attention: layer k's tokens, weighted by a softmax over a learned score of each
                (costs as mean; it is trained, so stage 2 cannot read it from its cache).
        shared_pooler: do they share one pooler (PABEE, Zhou et al., NeurIPS 2020)?
        sees_previous: does a ramp's classifier also read the probabilities of the ramp before it
            (after sledgehammer, Schwartz et al., ACL 2020)? No gradient goes back on that way.
        predicts: a learned exit score: `wrong`, how likely the ramp is wrong (BERxiT's learning to
            exit, Xin et al., EACL 2021), or `disagrees`, with the final classifier (CATs, Schuster
            et al., EMNLP 2021); None: none is learned. For a regression see `objectives.exit_loss`.
    """

    reads: str = "first"
    shared_pooler: bool = False
    sees_previous: bool = False
    predicts: str | None = None

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "RampKind":
        """From plain values.

        Raises:
            UserError: there is no such way to read, or a switch is none.
        """
        if unknown_keys := set(values) - set(cls.__dataclass_fields__):
            raise unknown("ramp setting", min(unknown_keys), cls.__dataclass_fields__, "ramp.*")
        kind = cls(**values)
        if kind.reads not in READS:
            raise unknown("ramp.reads", kind.reads, READS, "ramp.reads")
        if kind.predicts is not None and kind.predicts not in PREDICTS:
            raise unknown("ramp.predicts", kind.predicts, (*PREDICTS, "null"), "ramp.predicts")
        for name in ("shared_pooler", "sees_previous"):
            if not isinstance(getattr(kind, name), bool):
                raise UserError(f"ramp.{name}={getattr(kind, name)} must be true or false")
        return kind

    @property
    def reads_tokens(self) -> bool:
        """Must all tokens of the layer be there before the ramp is asked?"""
        return self.reads in ("mean", "pair", "attention")

    @property
    def num_parts(self) -> int:
        """Of how many vectors (H,) are the features that a ramp reads put together?"""
        return {"first_and_mean": 2, "pair": 3}.get(self.reads, 1)


PAPER = RampKind()


class Ramp(nn.Module):
    """Pooler (linear and tanh), dropout, linear: features (B, F) -> logits (B, C).

    `shift` and `scale` are applied to the features first. They are 0 and 1, the paper's ramp,
    unless `standardize` sets them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, hidden_size: int, num_labels: int, dropout: float, kind: RampKind = PAPER
    ) -> None:
        super().__init__()
        self.kind = kind
        self.num_features = kind.num_parts * hidden_size
        self.pooler = nn.Linear(self.num_features, hidden_size)
        self.dropout = nn.Dropout(dropout)
        seen = num_labels if kind.sees_previous else 0
        self.classifier = nn.Linear(hidden_size + seen, num_labels)
        linears = [self.pooler, self.classifier]
        if kind.reads == "attention":
            self.attention = nn.Linear(hidden_size, 1)
            linears.append(self.attention)
        if kind.predicts is not None:
            self.exit_head = nn.Linear(hidden_size, 1)
            linears.append(self.exit_head)
        for linear in linears:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.register_buffer("shift", torch.zeros(self.num_features))
        self.register_buffer("scale", torch.ones(() if kind.num_parts == 1 else self.num_features))

    def read(
        self,
        before_BSH: Tensor,
        after_BTH: Tensor,
        mask_BS: Tensor | None,
        second_B: Tensor | None = None,
    ) -> Tensor:
        """What the ramp takes from its layer: -> (B, F).

        Args:
            before_BSH: the states that went into the layer.
            after_BTH: those that came out; the first token is enough unless `kind.reads_tokens`.
            mask_BS: True or 1 at real tokens; None: all are.
            second_B: where each input's second text begins (`second_text`); for `pair`.
        """
        reads = self.kind.reads
        if reads == "first":
            return after_BTH[:, 0]
        if reads == "mean":
            return _mean(after_BTH, mask_BS)
        if reads == "pair":
            assert second_B is not None
            return _pair(after_BTH, mask_BS, second_B)
        if reads == "first_and_mean":
            return torch.cat([after_BTH[:, 0], _mean(before_BSH, mask_BS)], -1)
        score_BT = self.attention(after_BTH).squeeze(-1)
        if mask_BS is not None:
            score_BT = score_BT.masked_fill(~mask_BS.bool(), -torch.inf)
        return (score_BT.softmax(-1)[:, None] @ after_BTH).squeeze(1)

    @torch.no_grad()
    def standardize(self, features_NF: Tensor) -> None:
        """Make what this ramp will read vary around 0 with a variance of 1.

        In early layers the first token of different inputs is almost the same vector (MiniLM, layer
        1: entries of about 1 that vary by 0.001): what tells inputs apart is there, but too faint
        for the optimizer. One scale for all features of a token, so that none that is mere rounding
        noise is blown up. shift and scale could be folded into the pooler: it stays the same ramp.
        """
        scales = []
        for part_NH in features_NF.chunk(self.kind.num_parts, -1):
            deviation = part_NH.var(0, correction=0).mean().sqrt()
            if not deviation > 0:
                raise UserError(
                    "stages.2.standardize=true: what a ramp reads does not vary over the "
                    f"{len(features_NF)} training rows; use more rows, or stages.2.standardize="
                    "false"
                )
            scales.append(1 / deviation)
        self.shift.copy_(features_NF.mean(0))
        if self.kind.num_parts == 1:
            self.scale.copy_(scales[0])
        else:
            width = self.num_features // self.kind.num_parts
            self.scale.copy_(torch.stack(scales).repeat_interleave(width))

    def forward(self, features_BF: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """Logits (B, C).

        Args:
            features_BF: what `read` gave.
            previous_BC: logits of the ramp before; only where `kind.sees_previous`, and None for
                the first ramp, which sees equal probabilities.
        """
        return self._logits(self._pooled(features_BF), previous_BC)

    def logits_and_score(
        self, features_BF: Tensor, previous_BC: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits as `forward`, and the learned exit score (B,), between 0 and 1, or None where
        `kind.predicts` none. It learns from what the ramp pools, and the ramp nothing from it."""
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
    """Probabilities, or a regression's value. No gradient: each ramp answers for itself."""
    logits_BC = logits_BC.detach().float()
    return logits_BC if logits_BC.shape[-1] == 1 else logits_BC.softmax(-1)


def _mean(states_BSH: Tensor, mask_BS: Tensor | None) -> Tensor:
    """The mean over the real tokens: (B, S, H) -> (B, H)."""
    if mask_BS is None:
        return states_BSH.mean(1)
    mask_BS1 = mask_BS[..., None].to(states_BSH.dtype)
    return (states_BSH * mask_BS1).sum(1) / mask_BS1.sum(1)


def _pair(states_BSH: Tensor, mask_BS: Tensor | None, second_B: Tensor) -> Tensor:
    """(B, S, H) -> (B, 3 H), as `RampKind` says."""
    place_S = torch.arange(states_BSH.shape[1], device=states_BSH.device)
    first_BS = place_S < second_B[:, None]
    second_BS = ~first_BS
    if mask_BS is not None:
        first_BS, second_BS = first_BS & mask_BS.bool(), second_BS & mask_BS.bool()
    second_BS = torch.where(second_BS.any(1, keepdim=True), second_BS, first_BS)
    first_BH, second_BH = _mean(states_BSH, first_BS), _mean(states_BSH, second_BS)
    apart_BH = first_BH - second_BH
    return torch.cat([(first_BH + second_BH) / 2, apart_BH, apart_BH.abs()], -1)


def second_text(input_ids_BS: Tensor, separator: int) -> Tensor:
    """Where the second text of each input begins, behind the first separator: (B, S) ids -> (B,).

    Where there is none it is where the text ends, or S. A separator that a text itself contains
    ("[SEP]") is taken for one.
    """
    separates_BS = input_ids_BS == separator
    first_B = separates_BS.int().argmax(1) + 1
    return torch.where(separates_BS.any(1), first_B, input_ids_BS.shape[1])


def make(
    hidden_size: int, num_labels: int, dropout: float, num_layers: int, kind: RampKind
) -> nn.ModuleList:
    """A ramp for each layer; the last one, the final classifier, is the paper's."""
    ramps = [Ramp(hidden_size, num_labels, dropout, kind) for _ in range(num_layers - 1)]
    for ramp in ramps[1:]:
        if kind.shared_pooler:
            ramp.pooler = ramps[0].pooler
        if kind.predicts is not None:  # one for all, as BERxiT
            ramp.exit_head = ramps[0].exit_head
    return nn.ModuleList([*ramps, Ramp(hidden_size, num_labels, dropout)])
