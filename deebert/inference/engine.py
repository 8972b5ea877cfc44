"""Runs inputs until they exit: the only code that skips layers.

What makes the saving on paper one on the clock, and more:

- batches of inputs of similar length, cut to their longest;
- compaction: after a ramp only the inputs that stay go on;
- first token first: a ramp reads the first token only, so the other tokens of a layer are computed
  after its ramp was asked, for the inputs that stay (`split`). An input that leaves at layer k
  costs about k - 5/6 layers, at the last layer, too. Not for ramps that read all tokens;
- regrouping: few survivors wait for those of the next batches;
- a ramp at which nothing can leave is not evaluated.

It gives what the record of all ramps gives, to rounding: same exit layer, same answer, whatever the
batch (but for int8 in ONNX Runtime, where a batch has one scale). Knows nothing of tasks, texts or
clocks.
Shapes: N inputs, B of them in a group, S tokens, H hidden, L layers (= ramps), C labels.
"""

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from deebert.data.batching import by_length, padded
from deebert.data.tokenization import TOKENS
from deebert.errors import UserError, first_line, unknown
from deebert.exits import rules
from deebert.exits.rules import Rule
from deebert.inference import onnx_layer
from deebert.inference.kernels import check_precision, without_onednn
from deebert.inference.onnx_layer import OnnxEmbeddings, OnnxLayer
from deebert.inference.split_layer import SplitLayer
from deebert.inference.survivors import Answers, Group, merge
from deebert.models.architectures import LayerParts
from deebert.models.early_exit import EarlyExitModel
from deebert.models.ramps import Ramp

log = logging.getLogger(__name__)

RUNTIMES = ("torch", "onnx")
WINDOW = 8192  # inputs that are sorted by length together; nothing is kept from one to the next

# Tokens in a batch, measured on 2 CPU cores (benchmarks/speed.md): matrix products are at their
# fastest from a few hundred rows on, and larger states no longer fit the caches.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}
# Below these a group is too small to be run alone while others may come: with 500 tokens a layer
# takes 6 % more time a token than with 2,000, with 230 tokens 20 %.
REGROUP_BELOW = {"cpu": 512, "cuda": 8192}
# What a layer costs whatever the size of the group, in tokens: so much padding a merger may add.
GROUP_COSTS = {"cpu": 96, "cuda": 2048}
# First token first reads a layer's weights twice; below so many tokens that costs more than it can
# save.
FIRST_TOKEN_FROM = {"cpu": 64, "cuda": 512}


def kind_of(device: torch.device) -> str:
    """Under which name the plan's numbers above stand for a device."""
    return "cpu" if device.type == "cpu" else "cuda"


def check(
    model: EarlyExitModel, precision: str, device: torch.device, runtime: str = "torch"
) -> None:
    """Raises:
    UserError: the model cannot run in this precision here.
    """
    if runtime not in RUNTIMES:
        raise unknown("runtime", runtime, RUNTIMES, "runtime")
    if runtime == "torch":
        check_precision(precision, device)
    parts = model.backbone.parts(0)
    if (precision == "int8" or runtime == "onnx") and parts is None:
        wanted = "runtime=onnx" if runtime == "onnx" else "precision=int8"
        raise UserError(
            f"{wanted} needs layers that can be split, which "
            f"{model.config['model_type']} has not; use runtime=torch and "
            "precision=float32 or bfloat16"
        )
    if runtime == "onnx" and parts is not None:
        onnx_layer.check(parts, precision, device)


def _device(given: torch.device | str) -> torch.device:
    """Raises:
    UserError: there is no such device, or not here.
    """
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        there = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        reason = first_line(error)
        raise UserError(f"device={given} is not here, as are: {there} ({reason})") from error
    return device


class Engine:
    """A trained model, an exit rule and its thresholds, ready to run.

    Args:
        model: put into eval mode and on the device; some of its weights are copied in the layout
            that runs fastest, so when they change a new engine is needed.
        rule: how unsure a ramp is.
        thresholds: one for all ramps, or L-1; an input leaves at the first ramp whose score is
            strictly under its threshold. 0 never exits.
        precision: float32, bfloat16 or int8 (of the layers; states, norms and ramps are float32).
        runtime: what computes the layers: torch, or onnx (ONNX Runtime; not in bfloat16, on the
            processor only), which is faster in int8 and with one input at a time.
        device: where to run.
        token_budget: of a batch, padding included; a longer input is a batch of its own. None: what
            runs fast on the device.

    Raises:
        UserError: thresholds, precision, runtime or token budget do not fit.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        rule: Rule,
        thresholds: Sequence[float] | float,
        *,
        precision: str = "float32",
        runtime: str = "torch",
        device: torch.device | str = "cpu",
        token_budget: int | None = None,
    ) -> None:
        self.device = _device(device)
        check(model, precision, self.device, runtime)
        if token_budget is not None and token_budget < 1:
            raise UserError(f"token_budget={token_budget} must be 1 or more")
        self.model = model.to(self.device).eval()
        self.precision = precision
        self.runtime = runtime
        kind = kind_of(self.device)
        self.token_budget = token_budget or TOKEN_BUDGET[kind]
        self.regroup_below = min(REGROUP_BELOW[kind], self.token_budget)
        self.group_costs = GROUP_COSTS[kind]
        self.longest_input = model.backbone.longest_input
        self.first_token_from = FIRST_TOKEN_FROM[kind]
        self.ramps, self.kind = model.all_ramps, model.ramp_kind
        backbone = model.backbone
        parts = [backbone.parts(index) for index in range(len(model.ramps))]
        self.embeddings: Any = backbone.embeddings
        if runtime == "onnx":
            self.embeddings = OnnxEmbeddings(backbone.embedding_parts)
        self.layers = [
            None if part is None else self._made(part, ramp)
            for part, ramp in zip(parts, self.ramps, strict=True)
        ]
        self._set(rule, thresholds)

    def _made(self, parts: LayerParts, ramp: Ramp) -> SplitLayer | OnnxLayer:
        num_heads, exact_first = self.model.backbone.num_heads, not self.kind.reads_tokens
        if self.runtime == "onnx":
            return OnnxLayer(parts, num_heads, self.precision, ramp, exact_first=exact_first)
        return SplitLayer(parts, num_heads, self.precision, self.device, exact_first=exact_first)

    def _set(self, rule: Rule, thresholds: Sequence[float] | float) -> None:
        self.rule = rule
        self.limits = rules.limits(thresholds, len(self.layers)).unbind()
        asked = [layer for layer, limit in enumerate(self.limits) if limit > 0]
        self.exit_ramps = frozenset(asked)  # ramps that an input may leave at
        # Ramps whose logits something needs: the rule, or the ramp after them.
        back = rule.looks_back or self.kind.sees_previous
        self.evaluated = frozenset(range(max(asked) + 1) if asked and back else asked)
        self.remembers = bool(back and asked)
        self._warned = False

    def at(self, thresholds: Sequence[float] | float, rule: Rule | None = None) -> "Engine":
        """The same engine, on the same weights, with other thresholds or another rule."""
        other = copy.copy(self)
        other._set(rule or self.rule, thresholds)
        return other

    def run(self, inputs: Iterable[Mapping[str, Any]], *, all_ramps: bool = False) -> Answers:
        """Run any number of inputs.

        Args:
            inputs: each with `input_ids` and, where the backbone knows them, `token_type_ids`:
                lists of whole numbers, unpadded, as a tokenizer gives them.
            all_ramps: evaluate every ramp that an input comes by, and give their logits, too.

        Raises:
            UserError: there are no inputs, or one has no tokens.
        """
        parts = list(self.stream(inputs, all_ramps=all_ramps))
        if not parts:
            raise UserError("there are no inputs to run; give at least one")
        return Answers.cat(parts)

    def stream(
        self, inputs: Iterable[Mapping[str, Any]], *, all_ramps: bool = False
    ) -> Iterator[Answers]:
        """The same for inputs without end: answers to 8,192 of them at a time, in their order."""
        self._warned = False
        left = iter(inputs)
        while window := list(islice(left, WINDOW)):
            # Not around the `yield`: the caller's own code runs in between.
            threads = onnx_layer.alone() if self.runtime == "onnx" else contextlib.nullcontext()
            with torch.inference_mode(), threads:
                answers = self._run(window, all_ramps)
            if bad := int(answers.not_finite_N.sum()):
                log.warning(
                    "%d of %d inputs came out as NaN or infinity, at full depth (are the weights?)",
                    bad,
                    len(window),
                )
            del window  # or it would be there beside the next
            yield answers

    def _run(self, window: list[Mapping[str, Any]], all_ramps: bool) -> Answers:
        num_layers = len(self.layers)
        num_labels = self.rule.num_labels
        out = Answers.empty(len(window), num_layers, num_labels, all_ramps)
        # Groups that wait at a layer (0-based) for more to come.
        waiting: list[list[Group]] = [[] for _ in range(num_layers)]
        window = [self._cut(given) for given in window]
        for rows in by_length([len(given["input_ids"]) for given in window], self.token_budget):
            self._advance(
                0, self._embed([window[row] for row in rows], rows, all_ramps), waiting, out
            )
        for layer in range(num_layers):  # no more will come
            for group in merge(waiting[layer], self.group_costs):
                left = self._layer(layer, group, out)
                if left is not None:
                    waiting[layer + 1].append(left)
        return out

    def _advance(self, layer: int, group: Group, waiting: list[list[Group]], out: Answers) -> None:
        """Run a group from this layer (0-based) on, until all have left or it waits for others."""
        groups = [group]
        if layer and group.num_tokens < self.regroup_below:
            waiting[layer].append(group)
            if sum(each.num_tokens for each in waiting[layer]) < self.regroup_below:
                return
            groups, waiting[layer] = merge(waiting[layer], self.group_costs), []
        for each in groups:
            left = self._layer(layer, each, out)
            if left is not None:
                self._advance(layer + 1, left, waiting, out)

    def _cut(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """As the tokenizer does: the text is cut, the token that closes it stays."""
        num_tokens, most = len(given["input_ids"]), self.longest_input
        if not num_tokens:
            raise UserError("an input has no tokens (input_ids=[])")
        if num_tokens <= most:
            return given
        if not self._warned:
            log.warning(
                "an input has %d tokens, the model takes %d: it is cut (as others may be, too)",
                num_tokens,
                most,
            )
            self._warned = True
        there = [name for name in TOKENS if name in given]
        return {name: [*given[name][: most - 1], given[name][-1]] for name in there}

    def _embed(self, inputs: list[Mapping[str, Any]], rows: list[int], all_ramps: bool) -> Group:
        tokens = padded(inputs, self.model.backbone.pad_token_id)
        there = {name: values.to(self.device) for name, values in tokens.items()}
        hidden_BSH = self.embeddings(**there)
        size = (len(rows), len(self.layers), self.rule.num_labels)
        return Group(
            torch.tensor(rows),
            tokens["attention_mask"].sum(1),
            hidden_BSH,
            torch.full(size, torch.nan) if all_ramps or self.remembers else None,
            self.model.second_text(there["input_ids"]),
        )

    def _layer(self, layer: int, group: Group, out: Answers) -> Group | None:
        """Run one layer (0-based) and its ramp; the inputs that go on, or None."""
        run, hidden_BSH, mask = self.layers[layer], group.hidden_BSH, group.key_mask_B11S
        last = layer == len(self.layers) - 1
        asks = last or layer in self.evaluated or out.ramps_NLC is not None
        ramp_output: tuple[Tensor, Tensor | None] | None = None
        if run is None:
            group.hidden_BSH = self._whole_layer(layer, group)
        elif last and isinstance(run, OnnxLayer):
            ramp_output = run.answer(hidden_BSH, mask), None
        elif last or (
            layer in self.exit_ramps
            and not self.kind.reads_tokens
            and group.num_tokens >= self.first_token_from
        ):
            return self._first_token_first(layer, run, group, out)
        elif asks and isinstance(run, OnnxLayer):
            previous_BC = self._previous(layer, group)
            group.hidden_BSH, ramp_output = run.with_ramp(
                hidden_BSH, mask, previous_BC, group.second_B
            )
        else:
            group.hidden_BSH = run(hidden_BSH, mask)
        if not asks:
            return group
        if ramp_output is None:
            ramp_output = self._ramp_output(layer, group, hidden_BSH, group.hidden_BSH)
        stay_B = self._decide(layer, group, *ramp_output, out)
        if stay_B is None:
            return group
        return group.kept(stay_B)[0] if stay_B.any() else None

    def _whole_layer(self, layer: int, group: Group) -> Tensor:
        """A layer that cannot be split, by the library."""
        backbone, hidden_BSH = self.model.backbone, group.hidden_BSH
        if group.context is None:
            real_BS = torch.ones(hidden_BSH.shape[:2], dtype=torch.long, device=self.device)
            if group.mask_BS is not None:
                real_BS = group.mask_BS.long()
            group.context = backbone.context(hidden_BSH, real_BS)
        bfloat16 = self.precision == "bfloat16"
        few_sizes = contextlib.nullcontext() if bfloat16 else without_onednn()
        with few_sizes, torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            return backbone.run_layer(layer, hidden_BSH, group.context).float()

    def _first_token_first(
        self, layer: int, run: SplitLayer | OnnxLayer, group: Group, out: Answers
    ) -> Group | None:
        mask = group.key_mask_B11S
        keys, values = run.keys_values(group.hidden_BSH)
        first_B1H = run.first(group.hidden_BSH, keys, values, mask)
        ramp_output = self._ramp_output(layer, group, group.hidden_BSH, first_B1H)
        stay_B = self._decide(layer, group, *ramp_output, out)
        if stay_B is not None:
            if not stay_B.any():
                return None
            group, index, longest = group.kept(stay_B)
            mask, first_B1H = group.key_mask_B11S, first_B1H[index]
            keys, values = (each[..., :longest, :][index] for each in (keys, values))
        others = run.others(group.hidden_BSH, keys, values, mask)
        group.hidden_BSH = torch.cat([first_B1H, others], 1)
        return group

    def _ramp_output(
        self, layer: int, group: Group, before_BSH: Tensor, after_BTH: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What a ramp says of the states before and after its layer (of the first token at
        least): logits and, where it is learned, an exit score."""
        ramp = self.ramps[layer]
        features_BF = ramp.read(before_BSH, after_BTH, group.mask_BS, group.second_B).float()
        return ramp.logits_and_score(features_BF, self._previous(layer, group))

    def _previous(self, layer: int, group: Group) -> Tensor | None:
        """The logits of the ramp before, where this one sees them."""
        if not self.ramps[layer].kind.sees_previous or layer == 0:
            return None
        assert group.ramps_BLC is not None
        return group.ramps_BLC[:, layer - 1].to(self.device)

    def _decide(
        self,
        layer: int,
        group: Group,
        logits_BC: Tensor,
        learned_score_B: Tensor | None,
        out: Answers,
    ) -> Tensor | None:
        """Decide by what a ramp has said, and write down the answers of the inputs that leave.

        Returns:
            Which inputs stay, (B,); None for all.
        """
        # The one decision that a GPU is waited for.
        logits_BC = logits_BC.cpu()
        if group.ramps_BLC is not None:
            group.ramps_BLC[:, layer] = logits_BC
        if layer == len(self.layers) - 1:  # the final classifier answers, alone
            leave_B, answer_BC = torch.ones(len(logits_BC), dtype=torch.bool), logits_BC
        elif layer in self.exit_ramps:
            if self.rule.looks_back:
                assert group.ramps_BLC is not None
                exit_scores = self.rule(group.ramps_BLC[:, : layer + 1])
            else:
                learned_score_BL = (
                    None if learned_score_B is None else learned_score_B.cpu()[:, None]
                )
                exit_scores = self.rule(logits_BC[:, None], learned_score_BL, first=layer)
            score_B, answer_BC = exit_scores.score_NL[:, -1], exit_scores.answer_NLC[:, -1]
            leave_B = score_B < self.limits[layer].to(score_B.dtype)
            # A rule that counts votes has a score for NaN, too; it is nobody's answer.
            if leave_B.any():
                leave_B &= answer_BC.isfinite().all(-1)
        else:
            return None
        if not leave_B.any():
            return None
        rows = group.rows_B[leave_B]
        out.logits_NC[rows] = answer_BC[leave_B].float()
        out.layer_N[rows] = layer + 1
        if out.ramps_NLC is not None:
            assert group.ramps_BLC is not None
            out.ramps_NLC[rows] = group.ramps_BLC[leave_B]
        return ~leave_B
