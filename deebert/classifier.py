"""A trained early-exit model in three lines of Python.

    from deebert import EarlyExitClassifier
    classifier = EarlyExitClassifier.from_pretrained("RUN")
    classifier.predict(["a fine film"], target_saving=0.4)

Knows texts, labels and targets; needs neither Lightning nor Hydra nor the training data.
Shapes: N inputs, L layers (= ramps), C labels.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from deebert.data import tokenization
from deebert.data.tasks import HELD_OUT, Task
from deebert.errors import UserError
from deebert.evaluation import evaluate_records, latency
from deebert.evaluation.evaluate_records import EvaluationConfig
from deebert.evaluation.latency import Protocol
from deebert.evaluation.timing import undisturbed
from deebert.exits import calibration, rules
from deebert.exits.curves import Thresholds, check_thresholds
from deebert.exits.records import Record
from deebert.exits.rules import Rule
from deebert.exits.target import Target
from deebert.hub import locate, model_card, saved_folder
from deebert.hub.saved_folder import Saved
from deebert.inference.engine import WINDOW, Engine

Text = str | Sequence[str] | Mapping[str, Any]  # a text, a pair, or either by the columns' names
Tokens = Mapping[str, Any]

TARGETS = ("threshold", "target_saving", "target_speedup", "max_drop")
MOST_KEPT = 1000  # targets whose thresholds are kept
COST_ROWS = 64  # made-up inputs of the record's lengths that the cost of layers is measured on


@dataclass(frozen=True)
class CalibratedPoint:
    """What inputs are answered by: made by `EarlyExitClassifier.calibrate`.

    Attributes:
        target: as it was asked.
        expected: what the calibration rows say of it (`calibration.calibration`: `expected_saving`,
            `interval`, and with labels `score`, `score_interval`); None for thresholds given.
        split: of the calibration rows, or None.
    """

    rule: Rule
    thresholds: Thresholds
    target: Mapping[str, Any]
    expected: Mapping[str, Any] | None = None
    split: str | None = None


@dataclass(frozen=True)
class Predictions:
    """Answers, in the order of the inputs; a sequence of one dict an input.

    Attributes:
        labels: names of classes, or values of a regression.
        probabilities_NC: of the classes in the order of `classes`; None for a regression.
        exit_layers: where each input left, from 1.
        num_layers: L.
    """

    labels: list[Any]
    probabilities_NC: Tensor | None
    exit_layers: list[int]
    num_layers: int
    classes: tuple[str, ...] | None

    @property
    def saving(self) -> float:
        """Share of the layers that was saved: 1 - mean exit layer / number of layers."""
        return 1 - sum(self.exit_layers) / (len(self) * self.num_layers)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        """`label`, `probability` (of that label; not for a regression) and `exit_layer`; of a
        slice a list of these."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        found = {"label": self.labels[index], "exit_layer": self.exit_layers[index]}
        if self.probabilities_NC is not None:
            found["probability"] = self.probabilities_NC[index].max().item()
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


class EarlyExitClassifier:
    """A model, its tokenizer and its records, ready to answer.

    Args:
        what: as `from_pretrained` finds it.
        precision, runtime, device: as `engine.Engine` takes them.
    """

    def __init__(
        self,
        what: Saved,
        *,
        precision: str = "float32",
        runtime: str = "torch",
        device: torch.device | str = "cpu",
    ) -> None:
        self.saved = what
        source = what.checkpoint
        self.task = Task.from_config(source.config["task"])
        self.model = source.model()
        self.tokenizer = source.tokenizer()
        self.max_length = int(source.config["data"]["max_length"])
        longest = self.model.backbone.longest_input
        if self.max_length > longest:
            raise UserError(
                f"{source.path}: its data.max_length={self.max_length} is more than the {longest} "
                "tokens that its backbone takes"
            )
        for record in what.records.values():
            if record.num_layers != self.num_layers:
                raise UserError(
                    f"{source.path}: its record of {record.split} is of {record.num_layers} ramps, "
                    f"and its model has {self.num_layers}"
                )
        self._rules: dict[str | None, Rule] = {}
        self.rule = self._rule(what.exit)
        self.engine = Engine(
            self.model, self.rule, 0.0, precision=precision, runtime=runtime, device=device
        )
        self._asked: dict[Any, CalibratedPoint] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        task: str | Mapping[str, Any] | None = None,
        precision: str = "float32",
        runtime: str = "torch",
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load a model.

        Args:
            source: a run folder (or checkpoint file), a folder of `save_pretrained`, or the id of
                such a repository on the Hugging Face hub; also one of the published DeeBERT
                checkpoints (folder or id).
            task: what a published checkpoint was trained for, where it does not say: a name in
                conf/task/, or what such a file holds.

        Raises:
            UserError: nothing that can be loaded is there.
        """
        if not isinstance(source, str | Path):
            raise UserError(f"{_short(source)} is no model: give a folder or the id of one")
        found = locate.find(source, task)
        return cls(found, precision=precision, runtime=runtime, device=device)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the probabilities; None for a regression."""
        return self.task.labels

    @property
    def num_layers(self) -> int:
        return len(self.model.ramps)

    def predict(self, texts: Text | Iterable[Text], **target: Any) -> Predictions:
        """Answer texts.

        Args:
            texts: one or many; each a text, or for a task of two columns a pair. Both may be
                mappings with the task's columns.
            **target: as `calibrate` takes it.

        Raises:
            UserError: there are none, one is not a text (or pair), or the target cannot be met.
        """
        if not isinstance(texts, Iterable):
            raise UserError(f"texts are {_short(texts)}; give one or a list of them")
        one = isinstance(texts, str | bytes | Mapping) or _is_pair(texts, len(self.task.columns))
        parts = list(self.stream([texts] if one else texts, **target))  # type: ignore[list-item]
        if not parts:
            raise UserError("there are no texts to answer; give at least one")
        probabilities = [part.probabilities_NC for part in parts]
        return replace(
            parts[0],
            labels=[label for part in parts for label in part.labels],
            probabilities_NC=None if probabilities[0] is None else torch.cat(probabilities),  # type: ignore[arg-type]
            exit_layers=[layer for part in parts for layer in part.exit_layers],
        )

    def stream(self, texts: Iterable[Text], **target: Any) -> Iterator[Predictions]:
        """The same for texts without end: answers to 8,192 of them at a time, in their order."""
        asked, left = self.calibrate(**target), iter(texts)
        while window := list(islice(left, WINDOW)):
            yield self.answer(self.encode(window), asked)

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Texts -> what `answer` takes, one for each.

        Raises:
            UserError: one is not a text, or not a pair where the task has two columns.
        """
        found: list[Tokens] = []
        for some in tokenization.portions([self._columns(text) for text in texts]):
            columns = list(zip(*some, strict=True))
            encoded = tokenization.encode(self.tokenizer, columns, self.max_length)
            names = [name for name in tokenization.TOKENS if name in encoded]
            rows = zip(*(encoded[name] for name in names), strict=True)
            found += [dict(zip(names, values, strict=True)) for values in rows]
        return found

    def _columns(self, text: Text) -> tuple[str, ...]:
        names = self.task.columns
        given: Any = (text,) if isinstance(text, str) else text
        if isinstance(given, Mapping):
            if missing := [name for name in names if name not in given]:
                raise UserError(
                    f"an input lacks {missing[0]!r}; {self.task.name} reads: {', '.join(names)}"
                )
            given = tuple(given[name] for name in names)
        if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
            raise UserError(f"an input is {_short(text)}, not a text")
        if len(given) != len(names):
            wanted = "a pair of texts" if len(names) == 2 else "one text"
            raise UserError(
                f"an input has {len(given)} texts; task {self.task.name} takes {wanted}: "
                f"{', '.join(names)}"
            )
        try:
            "".join(given).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"an input is {_short(text)}: half of a surrogate pair") from error
        return tuple(given)

    def answer(self, inputs: Sequence[Tokens], asked: CalibratedPoint) -> Predictions:
        """Run inputs that `encode` has made.

        Raises:
            UserError: there are none.
        """
        found = self.engine.at(asked.thresholds, asked.rule).run(inputs)
        predictions = self.task.predict(found.logits_NC).tolist()
        probabilities_NC = None
        if self.task.labels is not None:
            probabilities_NC = found.logits_NC.softmax(-1)
            predictions = [self.task.labels[index] for index in predictions]
        return Predictions(
            predictions, probabilities_NC, found.layer_N.tolist(), self.num_layers, self.task.labels
        )

    def calibrate(
        self,
        *,
        threshold: float | Sequence[float] | None = None,
        target_saving: float | None = None,
        target_speedup: float | None = None,
        max_drop: float | None = None,
        exit: str | None = None,
        **more: Any,
    ) -> CalibratedPoint:
        """Find the thresholds that a target needs. Kept, so that asking again costs nothing.

        Args:
            threshold: one for all ramps, or one for each but the last; 0 runs all layers.
            target_saving: share of the layers to save, 0.4 for 40 %.
            target_speedup: how many times faster than full depth, by what layers cost on this
                machine (measured at the first time: about ten seconds).
            max_drop: how much worse than full depth it may be at most, 0.01 for one point.
            exit: the exit rule; None for the one it was saved with.
            **more: `confidence`, `loss`, `per_ramp`, `temperature` of `calibration.Target`.
                Nothing at all: as the model was saved, full depth unless it says otherwise.

        Raises:
            UserError: a value is out of its range, several targets contradict each other, or there
                is no record to meet them from.
        """
        threshold = getattr(threshold, "tolist", lambda: threshold)()  # numpy's and torch's
        given = {
            "threshold": threshold, "target_saving": target_saving,
            "target_speedup": target_speedup, "max_drop": max_drop, "exit": exit, **more,
        }  # fmt: skip
        # None says something of confidence only: "on average".
        target = {name: v for name, v in given.items() if v is not None or name == "confidence"}
        if not target:
            target = dict(self.saved.target)
        said = [name for name in TARGETS if name in target]
        if len(said) > 1:
            both = " and ".join(f"{name}={target[name]}" for name in said)
            raise UserError(f"{both}: ask for one of them")
        key = repr(sorted(target.items()))
        if key not in self._asked:
            found = self._calibrate(target)
            while len(self._asked) >= MOST_KEPT:  # a service is asked many different ones
                self._asked.pop(next(iter(self._asked)))
            self._asked[key] = found
        return self._asked[key]

    def _calibrate(self, target: dict[str, Any]) -> CalibratedPoint:
        values = dict(target)
        rule = self._rule(values.pop("exit", None)) if "exit" in values else self.rule
        if rule.reads == "learned_score" and self.model.ramp_kind.predicts is None:
            raise UserError(rules.NOT_LEARNED.format(rule.name))
        known = set(Target.__dataclass_fields__) - {"costs"} | {"threshold"}
        if unknown := sorted(set(values) - known):
            raise UserError(f"{unknown[0]}= is no part of a target; {', '.join(sorted(known))} are")
        if not set(values) & set(TARGETS[1:]):
            threshold = values.pop("threshold", 0.0)
            if values:
                name, value = next(iter(values.items()))
                raise UserError(f"{name}={value} needs {' or '.join(TARGETS[1:])}")
            listed = isinstance(threshold, list | tuple)
            checked = list(check_thresholds(list(threshold) if listed else threshold, "threshold"))
            thresholds: Thresholds = checked if listed else checked[0]
            if rules.limits(thresholds, self.num_layers).any() and rule.needs_prior:
                raise UserError(rules.NO_PRIOR.format(rule.name))
            return CalibratedPoint(rule, thresholds, target)
        calibrated = Target(**values)
        record = self._calibration_rows
        if calibrated.target_speedup is not None:
            calibrated = replace(calibrated, costs=self.costs)
        operating_point = calibration.choose(record, self.task, rule, calibrated)
        return CalibratedPoint(
            operating_point.rule,
            operating_point.thresholds,
            target,
            calibration.expected(record, self.task, operating_point, len(record)),
            record.split,
        )

    def _rule(self, name: str | None) -> Rule:
        """The same object for the same name: requests to a service are grouped by it."""
        if name not in self._rules:
            num = self.task.num_labels
            self._rules[name] = rules.default(num) if name is None else rules.named(name, num)
        return self._rules[name]

    @cached_property
    def _calibration_rows(self) -> Record:
        """The rows that thresholds are chosen on: held out of training, unless they are plainly
        unlike those that the model was scored on."""
        found, source = self.saved.records, self.saved.checkpoint
        if not found:
            raise UserError(
                f"{source.path} has no records to choose thresholds on: give threshold=, or let "
                "python evaluate.py write some and use its run folder"
            )
        trained = source.config["objective"]["name"]
        if not source.ramps_trained:
            raise UserError(
                f"{source.path} was trained with objective={trained}, the final classifier alone: "
                "its ramps say nothing yet; train them with python train.py stage=2 ckpt=RUN"
            )
        held_out = found.get(HELD_OUT)
        reported = [found[split] for split in found if split != HELD_OUT]
        labelled = [record for record in reported if record.labels_N is not None] or reported
        if not labelled:
            assert held_out is not None
            return held_out
        evaluation_config = EvaluationConfig(self.rule, None)
        return (
            evaluate_records.calibration_rows(held_out, labelled[0], evaluation_config)[0]
            or labelled[0]
        )

    @cached_property
    def costs(self) -> tuple[float, ...]:
        """What leaving at each layer costs here, on inputs as long as the record's."""
        lengths = self._calibration_rows.length_N
        chosen = lengths[torch.linspace(0, len(lengths) - 1, min(COST_ROWS, len(lengths))).long()]
        random = torch.Generator().manual_seed(0)  # different ones leave at different layers
        inputs: list[Tokens] = [
            {"input_ids": torch.randint(len(self.tokenizer), (int(n),), generator=random).tolist()}
            for n in chosen.clamp(1, self.max_length)
        ]
        protocol = Protocol(
            precisions=(self.engine.precision,), runtime=self.engine.runtime, repeats=3
        )
        with undisturbed(None):
            costs = latency.layer_costs(
                self.model, inputs, self.task.num_labels, protocol, self.engine.device
            )
        return tuple(costs)

    def save_pretrained(
        self, folder: str | Path, *, exit: str | None = None, **target: Any
    ) -> None:
        """Write all that is needed to use the model elsewhere, with a model card.

        Args:
            exit, **target: what it is to answer by where nothing else is asked (`calibrate`).
        """
        what = self.saved
        if exit is not None or target:
            asked = self.calibrate(
                exit=exit, **target
            ).target  # refused here, or by everyone who loads it
            plain = {name: value for name, value in asked.items() if name != "exit"}
            what = replace(what, exit=exit or what.exit, target=plain)
        self.model.to("cpu")
        try:
            saved_folder.write(what, self.model, Path(folder), model_card.card(what, self.task))
        finally:
            self.model.to(self.engine.device)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **target: Any) -> str:
        """Save the model to a hub repository, which is made if it is not there; its address."""
        from huggingface_hub import HfApi

        api = HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **target)
            # Records of another model, from an earlier push, would make the repository unreadable.
            api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns="records/*")
        return str(address)


def _is_pair(texts: Any, num_columns: int) -> bool:
    """One pair of texts, as a tuple; a list of two is two inputs."""
    return num_columns == 2 and isinstance(texts, tuple) and all(isinstance(t, str) for t in texts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
