"""The engine: it runs inputs until they exit. No other module of the package skips layers.

The saving comes from five things:

- Batches hold inputs of similar length, cut to their longest.
- Compaction: after a ramp only the inputs that stay go on.
- First token first: if the ramp reads only the first token, the other tokens of its layer are
  computed after the ramp, for the inputs that stay (`split_layer`). So an input that leaves at
  layer k costs about k - 5/6 layers, at the last layer too.
- Regrouping: a small group of survivors waits for the survivors of the next batches.
- A ramp at which nothing can leave is not evaluated. The layers up to the next ramp that is are one
  stretch (`stretches`), which a library of graphs runs in one call. One input alone runs in a graph
  of the whole model (`exit_graphs`).

Whatever the batch, it gives the exit layer and answer that the record of all ramps gives, to
rounding. The engine knows nothing of tasks, texts or how time is measured.
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
from deebert.errors import UserError
from deebert.exits.rules import Rule
from deebert.inference import settings
from deebert.inference.graph_runtimes import GraphRuntime, one_torch_thread
from deebert.inference.onnx_stretches import OnnxStretches
from deebert.inference.operating_points import OperatingPoints, Point
from deebert.inference.stretches import LayerInParts, Stretches, TorchStretches, ramp_output
from deebert.inference.survivors import Answers, Group, merge
from deebert.models.early_exit import EarlyExitModel
from deebert.models.quantization import Quantization

log = logging.getLogger(__name__)

WINDOW = 8192  # inputs that are sorted by length together; no input of a window is kept after it


class Engine:
    """A trained model, an exit rule and its thresholds, ready to run.

    Args:
        model: the model. It is put into eval mode and on the device. Some of its weights are copied
            into the layout that runs fastest, so a new engine is needed when the weights change.
        rule: the exit rule, which computes the exit score of each ramp.
        thresholds: one number for all ramps, or L-1 numbers. An input leaves at the first ramp
            whose score is strictly under its threshold, so 0 never exits.
        precision: the precision of the layers: float32, bfloat16 or int8. States, norms and ramps
            are float32.
        runtime: the library that computes the layers: torch (float32 and bfloat16), onnx or
            openvino (on the processor, in float32 and int8), or auto (`settings.runtime_for`).
        quantization: how the layers are rounded in int8 (`inference.quantize` measures it).
        device: the device to run on.
        token_budget: the largest number of tokens in a batch, padding included. A longer input is
            a batch of its own. None: a number that runs fast on the device.

    Raises:
        UserError: the thresholds, precision, runtime, device or token budget do not fit.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        rule: Rule,
        thresholds: Sequence[float] | float,
        *,
        precision: str = "float32",
        runtime: str = "auto",
        quantization: Quantization | None = None,
        device: torch.device | str = "cpu",
        token_budget: int | None = None,
    ) -> None:
        self.device = settings.device_named(device)
        settings.check(model, precision, self.device, runtime)
        settings.check_quantization(model, precision, quantization)
        runtime = settings.runtime_for(runtime, precision)
        if token_budget is not None and token_budget < 1:
            raise UserError(f"token_budget={token_budget} must be 1 or more")
        self.model = model.to(self.device).eval()
        self.precision = precision
        self.runtime = runtime
        self.quantization = quantization if precision == "int8" else None
        self.graphs = None if runtime == "torch" else GraphRuntime(runtime)
        kind = settings.kind_of(self.device)
        self.token_budget = token_budget or settings.TOKEN_BUDGET[kind]
        self.regroup_below = min(settings.REGROUP_BELOW[kind], self.token_budget)
        self.group_costs = settings.GROUP_COSTS[kind]
        self.first_token_from = settings.FIRST_TOKEN_FROM[kind]
        self.longest_input = model.backbone.longest_input
        self.kind, self.num_layers = model.ramp_kind, len(model.ramps)
        self.stretches: Stretches
        if self.graphs:
            self.stretches = OnnxStretches(model, self.graphs, self.quantization)
        else:
            self.stretches = TorchStretches(self.model, precision, self.device)
        self._set([(rule, thresholds)])

    def _set(self, points: Sequence[Point]) -> None:
        sees_previous = self.kind.sees_previous
        self.points = OperatingPoints(points, self.num_layers, sees_previous=sees_previous)
        self.rule = self.points.rule
        self._warned = False

    def at(self, thresholds: Sequence[float] | float, rule: Rule | None = None) -> "Engine":
        """Return an engine on the same weights with other thresholds, and another rule if given.

        Raises:
            UserError: the thresholds do not fit.
        """
        return self.at_each([(rule or self.rule, thresholds)])

    def at_each(self, points: Sequence[Point]) -> "Engine":
        """Return an engine on the same weights with several operating points.

        Args:
            points: rules and thresholds. `run` takes the place of each input's own among them.

        Raises:
            UserError: the thresholds do not fit.
        """
        other = copy.copy(self)
        other._set(points)
        return other

    def run(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        all_ramps: bool = False,
        point_N: Sequence[int] | None = None,
    ) -> Answers:
        """Run any number of inputs.

        Args:
            inputs: tokens of each input: `input_ids` and, if the backbone knows them,
                `token_type_ids`. They are lists of whole numbers, unpadded, as a tokenizer gives
                them.
            all_ramps: evaluate every ramp up to an input's exit, and return their logits and
                learned exit scores.
            point_N: the operating point of each input, as its place in what `at_each` was given.
                None: the first one.

        Raises:
            UserError: there are no inputs, or one has no tokens.
        """
        parts = list(self.stream(inputs, all_ramps=all_ramps, point_N=point_N))
        if not parts:
            raise UserError("there are no inputs to run; give at least one")
        return Answers.cat(parts)

    def stream(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        all_ramps: bool = False,
        point_N: Iterable[int] | None = None,
    ) -> Iterator[Answers]:
        """Run inputs that may never end, and yield the answers of 8,192 at a time, in their order.

        Args:
            inputs: as `run` takes them.
            all_ramps: as `run` takes it.
            point_N: as `run` takes it.

        Raises:
            UserError: An input has no tokens.
        """
        self._warned = False
        iterator, points = iter(inputs), None if point_N is None else iter(point_N)
        while window := list(islice(iterator, WINDOW)):
            of_window = None if points is None else torch.tensor([*islice(points, len(window))])
            # The context does not span the `yield`, since the caller's own code runs there.
            threads = one_torch_thread() if self.graphs else contextlib.nullcontext()
            with torch.inference_mode(), threads:
                answers = self._run(window, all_ramps, of_window)
            if not_finite := int(answers.not_finite_N.sum()):
                log.warning(
                    "%d of %d inputs came out as NaN or infinity, at full depth (are the "
                    "model's weights damaged?)",
                    not_finite,
                    len(window),
                )
            del window  # two windows would be in memory at the same time otherwise
            yield answers

    def _run(
        self, window: list[Mapping[str, Any]], all_ramps: bool, point_N: Tensor | None
    ) -> Answers:
        """Run one window of inputs."""
        if len(window) == 1 and not all_ramps:
            point = 0 if point_N is None else int(point_N)
            if answers := self._run_alone(self._cut(window[0]), point):
                return answers
        size = len(window), self.num_layers, self.rule.num_labels
        out = Answers.empty(*size, all_ramps, point_N)
        # The groups that wait at each layer (0-based) for more inputs.
        waiting: list[list[Group]] = [[] for _ in range(self.num_layers)]
        window = [self._cut(tokens) for tokens in window]
        for rows in by_length([len(tokens["input_ids"]) for tokens in window], self.token_budget):
            self._advance(self._start([window[row] for row in rows], rows, out), waiting, out)
        for groups in waiting:  # no new input can join the groups that wait now
            for group in merge(groups, self.group_costs):
                survivors = self._stretch(group, out)
                if survivors is not None:
                    waiting[survivors.layer].append(survivors)
        return out

    def _run_alone(self, tokens: Mapping[str, Any], point: int) -> Answers | None:
        """Run one input in a graph of the whole model; None if there is no such graph."""
        rule, limits_K = self.points[point]
        graph = self.stretches.exit_graph(rule if limits_K.any() else None)
        if graph is None:
            return None
        logits_1C, layer = graph.run(tokens, limits_K.float().numpy())
        return Answers(torch.from_numpy(logits_1C), torch.tensor([layer]), None)

    def _advance(self, group: Group, waiting: list[list[Group]], out: Answers) -> None:
        """Run a group until all inputs have left or it must wait."""
        groups = [group]
        if group.layer and group.num_tokens < self.regroup_below:
            waits = waiting[group.layer]
            waits.append(group)
            if sum(each.num_tokens for each in waits) < self.regroup_below:
                return
            groups, waiting[group.layer] = merge(waits, self.group_costs), []
        for each in groups:
            survivors = self._stretch(each, out)
            if survivors is not None:
                self._advance(survivors, waiting, out)

    def _cut(self, tokens: Mapping[str, Any]) -> Mapping[str, Any]:
        """Cut an input that is too long, as the tokenizer does: the closing token stays.

        Raises:
            UserError: the input has no tokens.
        """
        num_tokens, longest = len(tokens["input_ids"]), self.longest_input
        if not num_tokens:
            raise UserError("an input has no tokens (input_ids=[])")
        if num_tokens <= longest:
            return tokens
        if not self._warned:
            log.warning(
                "an input has %d tokens, the model takes %d: it is cut (as others may be, too)",
                num_tokens,
                longest,
            )
            self._warned = True
        names = [name for name in TOKENS if name in tokens]
        return {name: [*tokens[name][: longest - 1], tokens[name][-1]] for name in names}

    def _start(self, inputs: list[Mapping[str, Any]], rows: list[int], out: Answers) -> Group:
        """Return a group of inputs before their embeddings."""
        tokens = padded(inputs, self.model.backbone.pad_token_id)
        second_B = self.model.second_text(tokens["input_ids"])
        size = (len(rows), self.num_layers, self.rule.num_labels)
        all_ramps = out.ramps_NLC is not None
        return Group(
            torch.tensor(rows),
            torch.tensor([len(given["input_ids"]) for given in inputs]),
            tokens["input_ids"].shape[1],
            0,
            None,
            torch.full(size, torch.nan) if all_ramps or self.points.remembers else None,
            None if second_B is None else second_B.to(self.device),
            torch.zeros(size[:2]) if all_ramps else None,
            tokens,
        )

    def _stretch(self, group: Group, out: Answers) -> Group | None:
        """Run the layers up to the next ramp that is evaluated, and that ramp.

        Returns:
            The inputs that go on, or None if all have left.
        """
        layer = group.layer if out.ramps_NLC is not None else self.points.next_ramp[group.layer]
        if (
            layer in self.points.exit_ramps
            and not self.kind.reads_tokens
            and group.num_tokens >= self.first_token_from
            and (in_parts := self.stretches.in_parts(layer)) is not None
        ):
            self.stretches.run(group, layer, ramp=False)
            return self._first_token_first(in_parts, group, out)
        output = self.stretches.run(group, layer + 1, ramp=True)
        assert output is not None
        stay_B = self._decide(layer, group, *output, out)
        if stay_B is None:
            return group
        return group.kept(stay_B)[0] if stay_B.any() else None

    def _first_token_first(self, run: LayerInParts, group: Group, out: Answers) -> Group | None:
        """Run a layer for the first token, then its ramp, then the layer's other tokens.

        Returns:
            The inputs that go on, or None if all have left.
        """
        layer, hidden_BSH, mask = group.layer, group.states_BSH, group.key_mask_B11S
        keys, values = run.keys_values(hidden_BSH)
        first_B1H = run.first(hidden_BSH, keys, values, mask)
        output = ramp_output(self.model, layer, group, hidden_BSH, first_B1H)
        stay_B = self._decide(layer, group, *output, out)
        if stay_B is not None:
            if not stay_B.any():
                return None
            group, index, longest = group.kept(stay_B)
            hidden_BSH, mask, first_B1H = group.states_BSH, group.key_mask_B11S, first_B1H[index]
            keys, values = (each[..., :longest, :][index] for each in (keys, values))
        others = run.others(hidden_BSH, keys, values, mask)
        group.hidden_BSH, group.layer = torch.cat([first_B1H, others], 1), layer + 1
        return group

    def _decide(
        self,
        layer: int,
        group: Group,
        logits_BC: Tensor,
        learned_score_B: Tensor | None,
        out: Answers,
    ) -> Tensor | None:
        """Decide which inputs leave at a ramp, and write their answers into `out`.

        Returns:
            The inputs that stay, as a mask (B,), or None if all stay.
        """
        # The one result that the program waits for on a GPU.
        logits_BC = logits_BC.cpu()
        if group.ramps_BLC is not None:
            group.ramps_BLC[:, layer] = logits_BC
        if group.learned_BL is not None and learned_score_B is not None:
            group.learned_BL[:, layer] = learned_score_B.cpu()
        if layer == self.num_layers - 1:  # the final classifier answers all inputs, by no rule
            self._answer(layer, group, slice(None), logits_BC, out)
            return torch.zeros(len(logits_BC), dtype=torch.bool)
        if layer not in self.points.exit_ramps:
            return None
        stay_B = None
        point_B = None if out.point_N is None else out.point_N[group.rows_B]
        for rule, rows, limit in self.points.at_ramp(layer, point_B):
            if rule.looks_back:
                assert group.ramps_BLC is not None
                exit_scores = rule(group.ramps_BLC[rows, : layer + 1])
            else:
                learned = None if learned_score_B is None else learned_score_B.cpu()[rows, None]
                exit_scores = rule(logits_BC[rows, None], learned, first=layer)
            score = exit_scores.score_NL[:, -1]
            leave = score < limit.to(score.dtype)
            if not leave.any():
                continue
            answer = exit_scores.answer_NLC[:, -1]
            # A rule that counts votes gives NaN logits a score, too. No input is answered by them.
            leave &= answer.isfinite().all(-1)
            leaving = leave if isinstance(rows, slice) else rows[leave]
            self._answer(layer, group, leaving, answer[leave], out)
            if stay_B is None:
                stay_B = torch.ones(len(logits_BC), dtype=torch.bool)
            stay_B[leaving] = False
        return stay_B

    def _answer(
        self, layer: int, group: Group, leave: Tensor | slice, answer_BC: Tensor, out: Answers
    ) -> None:
        """Write the answers of the inputs that leave at a layer into `out`."""
        rows = group.rows_B[leave]
        out.logits_NC[rows] = answer_BC.float()
        out.layer_N[rows] = layer + 1
        if out.ramps_NLC is not None:
            assert group.ramps_BLC is not None
            out.ramps_NLC[rows] = group.ramps_BLC[leave]
        if out.learned_NL is not None:
            assert group.learned_BL is not None
            out.learned_NL[rows] = group.learned_BL[leave]
