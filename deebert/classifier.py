"""A trained early-exit model in three lines of Python.

    from deebert import EarlyExitClassifier
    classifier = EarlyExitClassifier.from_pretrained("RUN")
    classifier.predict(["a fine film"], target_saving=0.4)

The module brings texts, labels and targets together. It needs neither Lightning nor Hydra nor the
training data. Shapes: N inputs, C labels.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from deebert.data import texts as input_texts
from deebert.data import tokenization
from deebert.data.tasks import HELD_OUT
from deebert.data.texts import Text
from deebert.errors import UserError, unknown
from deebert.evaluation import engine_latency, evaluate_records
from deebert.evaluation.evaluate_records import EvaluationConfig
from deebert.exits import calibration, curves, rules
from deebert.exits.calibration import CalibratedPoint
from deebert.exits.curves import OperatingPoint, Thresholds, check_thresholds
from deebert.exits.records import Record
from deebert.exits.rules import Rule
from deebert.exits.target import Target
from deebert.hub import locate, model_card, saved_folder
from deebert.hub.saved_folder import Saved
from deebert.inference.engine import WINDOW, Engine
from deebert.inference.predictions import Predictions
from deebert.options import ONE_OF, TARGET, TargetOptions, check_needs, given, job_command

log = logging.getLogger(__name__)

Tokens = Mapping[str, Any]

MOST_KEPT = 1000  # targets whose operating points are kept


class EarlyExitClassifier:
    """A model with its tokenizer and its records, which answers texts.

    Args:
        saved: a loaded model (`from_pretrained` loads one).
        precision: precision of the weights (`Engine`).
        runtime: library that runs the layers (`Engine`).
        device: device that runs them (`Engine`).
    """

    def __init__(
        self,
        saved: Saved,
        *,
        precision: str = "float32",
        runtime: str = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        self.saved = saved
        source = saved.checkpoint
        quantization = saved.quantization(device) if precision == "int8" else None
        self.task = source.config.task
        self.model = source.model()
        self.tokenizer = source.tokenizer()
        self.max_length = source.config.data.max_length
        longest = self.model.backbone.longest_input
        if self.max_length > longest:
            raise UserError(
                f"{source.path}: its data.max_length={self.max_length} is more than the {longest} "
                "tokens that its backbone takes"
            )
        for record in saved.records.values():
            if record.num_layers != self.num_layers:
                raise UserError(
                    f"{source.path}: its record of {record.split} is of {record.num_layers} ramps, "
                    f"and its model has {self.num_layers}"
                )
        self._rules: dict[Any, Rule] = {}
        self.rule = self._rule(saved.exit)
        self.engine = Engine(
            self.model, self.rule, 0.0, precision=precision, runtime=runtime,
            quantization=quantization, device=device,
        )  # fmt: skip
        self._points: dict[Any, CalibratedPoint] = {}

    def to(self, device: torch.device | str) -> Self:
        """Move the model to a device (`Engine`), and return this object."""
        engine = self.engine
        self.engine = Engine(
            self.model, self.rule, 0.0, precision=engine.precision, runtime=engine.runtime,
            quantization=engine.quantization, device=device,
        )  # fmt: skip
        self._points.clear()  # a target_speedup depends on the device
        self.__dict__.pop("costs", None)
        return self

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        task: str | Mapping[str, Any] | None = None,
        precision: str = "float32",
        runtime: str = "auto",
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load a model.

        Args:
            source: a run folder, a checkpoint file, a folder of `save_pretrained`, the id of such a
                repository on the Hugging Face hub, or the folder or id of a DeeBERT checkpoint of
                the original code.
            task: the task of a checkpoint of the original code that does not name its task: a name
                in conf/task/, or the values of such a file.
            precision: precision of the weights (`Engine`).
            runtime: library that runs the layers (`Engine`).
            device: device that runs them (`Engine`).

        Raises:
            UserError: there is no model that can be loaded.
        """
        if not isinstance(source, str | Path):
            raise UserError(
                f"{input_texts.short(source)} is no model: give a folder or the id of one"
            )
        saved = locate.find(source, task)
        return cls(saved, precision=precision, runtime=runtime, device=device)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the probabilities; None for a regression."""
        return self.task.labels

    @property
    def num_layers(self) -> int:
        """Number of layers, which is also the number of ramps."""
        return len(self.model.ramps)

    def predict(self, texts: Text | Iterable[Text], **target: Any) -> Predictions:
        """Answer texts.

        Args:
            texts: one input or many. An input is a text, for a task with two columns a pair of
                texts, or a mapping from the task's columns to texts.
            **target: arguments of `calibrate`.

        Raises:
            UserError: there is no input, one is not a text (or a pair), or the target cannot be
                met.
        """
        if not isinstance(texts, Iterable):
            raise UserError(f"texts are {input_texts.short(texts)}; give one or a list of them")
        one = input_texts.is_one(texts, self.task)
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

    __call__ = predict

    def stream(self, texts: Iterable[Text], **target: Any) -> Iterator[Predictions]:
        """Answer any number of texts, 8,192 at a time and in their order (see `predict`)."""
        point, remaining = self.calibrate(**target), iter(texts)
        while window := list(islice(remaining, WINDOW)):
            yield self.answer(self.encode(window), point)

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Tokenize texts for `answer`.

        Raises:
            UserError: one is not a text, or not a pair although the task has two columns.
        """
        inputs: list[Tokens] = []
        rows_of_texts = [input_texts.columns(text, self.task) for text in texts]
        for portion in tokenization.portions(rows_of_texts):
            columns = list(zip(*portion, strict=True))
            encoded = tokenization.encode(self.tokenizer, columns, self.max_length)
            names = [name for name in tokenization.TOKENS if name in encoded]
            rows = zip(*(encoded[name] for name in names), strict=True)
            inputs += [dict(zip(names, values, strict=True)) for values in rows]
        return inputs

    def answer(
        self, inputs: Sequence[Tokens], point: CalibratedPoint | Sequence[CalibratedPoint]
    ) -> Predictions:
        """Run tokenized inputs at an operating point, all together.

        Args:
            inputs: from `encode`.
            point: from `calibrate`, for all inputs; or one for each.

        Raises:
            UserError: there is no input.
        """
        each = [point] if isinstance(point, CalibratedPoint) else point
        points = {id(one): one for one in each}
        places = {one: place for place, one in enumerate(points)}
        engine = self.engine.at_each([(one.rule, one.thresholds) for one in points.values()])
        point_N = None if len(points) == 1 else [places[id(one)] for one in each]
        exits = engine.run(inputs, point_N=point_N)
        labels = self.task.predict(exits.logits_NC).tolist()
        probabilities_NC = None
        if self.task.labels is not None:
            probabilities_NC = exits.logits_NC.softmax(-1)
            labels = [self.task.labels[index] for index in labels]
        return Predictions(
            labels, probabilities_NC, exits.layer_N.tolist(), self.num_layers, self.task.labels
        )

    def calibrate(self, **target: Any) -> CalibratedPoint:
        """Choose the operating point for a target.

        The result is kept: a second call with the same target returns the same object. Without any
        argument the target is the one that was saved with the model, or full depth.

        Args:
            **target: the values of `options.TargetOptions`. `threshold`: one for all ramps, or one
                for each ramp except the last; 0 runs all layers. `target_saving`: share of the
                layers to save, 0.4 for 40 %. `target_speedup`: time at full depth / time, from the
                costs of the layers on this machine (measured once, in about ten seconds).
                `max_drop`: largest loss against full depth, 0.01 for one point; with `confidence`
                and `loss`. `per_ramp` and `temperature`: see `Target`. `exit`: name of the exit
                rule; None for the rule that was saved with the model.

        Raises:
            UserError: a value is outside its range, several targets contradict each other, or there
                is no record that thresholds can be chosen on.
        """
        target = given(target)
        check_needs(TargetOptions, target, target.keys())
        target = target or dict(self.saved.target)
        if hasattr(target.get("threshold"), "tolist"):  # numpy's and torch's
            target["threshold"] = target["threshold"].tolist()
        targets = [name for name in ONE_OF if name in target]
        if len(targets) > 1:
            both = " and ".join(f"{name}={target[name]}" for name in targets)
            raise UserError(f"{both}: ask for one of them")
        # A notebook may register a rule of the same name again.
        key = repr(sorted(target.items())), rules.RULES.get(str(target.get("exit")))
        if key not in self._points:
            point = self._calibrate(target)
            while len(self._points) >= MOST_KEPT:  # a service may get many different targets
                self._points.pop(next(iter(self._points)))
            self._points[key] = point
        return self._points[key]

    def _calibrate(self, target: dict[str, Any]) -> CalibratedPoint:
        """Choose the operating point for the values of a target that are not None."""
        values = dict(target)
        rule = self._rule(values.pop("exit", None)) if "exit" in values else self.rule
        if rule.reads == "learned_score" and self.model.ramp_kind.predicts is None:
            raise UserError(rules.NOT_LEARNED.format(rule.name))
        known = {*TARGET} - {"exit"}
        if unknown := sorted(set(values) - known):
            raise UserError(f"{unknown[0]}= is no part of a target; {', '.join(sorted(known))} are")
        if not set(values) & set(ONE_OF[1:]):
            threshold = values.pop("threshold", 0.0)
            if values:
                name, value = next(iter(values.items()))
                raise UserError(f"{name}={value} needs {' or '.join(ONE_OF[1:])}")
            listed = isinstance(threshold, list | tuple)
            checked = list(check_thresholds(list(threshold) if listed else threshold, "threshold"))
            thresholds: Thresholds = checked if listed else checked[0]
            if rules.limits(thresholds, self.num_layers).any() and rule.needs_prior:
                raise UserError(rules.NO_PRIOR.format(rule.name))
            return CalibratedPoint(rule, thresholds, target)
        wanted = Target(**values)
        record = self._calibration_rows
        if wanted.target_speedup is not None:
            wanted = replace(wanted, costs=self.costs)
        where = self.saved.checkpoint.path
        evaluate_records.warn_of_other_precision(record, self.engine.precision, where)
        operating_point = calibration.choose(record, self.task, rule, wanted)
        return CalibratedPoint(
            operating_point.rule,
            operating_point.thresholds,
            target,
            calibration.expected(record, self.task, rule, wanted, operating_point, len(record)),
            record.split,
        )

    def _rule(self, name: str | None) -> Rule:
        """Return the exit rule of a name: the same object each time, since requests group by it."""
        if not isinstance(name, str | None):
            raise unknown("exit", name, rules.RULES, "exit", own=True)
        key = name, rules.RULES.get(str(name))
        if key not in self._rules:
            num = self.task.num_labels
            self._rules[key] = rules.default(num) if name is None else rules.named(name, num)
        return self._rules[key]

    @cached_property
    def _calibration_rows(self) -> Record:
        """The rows that thresholds are chosen on.

        They are the rows that were held out of training, unless these are clearly different from
        the rows that the model was scored on.
        """
        records, source = self.saved.records, self.saved.checkpoint
        if not records:
            raise UserError(
                f"{source.path} has no records to choose thresholds on: give threshold=, or let "
                f"{job_command('evaluate')} write some and use its run folder"
            )
        trained = source.config.objective.name
        if not source.ramps_trained:
            raise UserError(
                f"{source.path} was trained with objective={trained}, the final classifier alone: "
                "its ramps say nothing yet; train them with "
                f"{job_command('train')} stage=2 ckpt=RUN"
            )
        held_out = records.get(HELD_OUT)
        reported = [records[split] for split in records if split != HELD_OUT]
        labelled = [record for record in reported if record.labels_N is not None] or reported
        if not labelled:
            assert held_out is not None
            return held_out
        evaluation_config = EvaluationConfig(self.rule, None)
        return (
            evaluate_records.calibration_rows(held_out, labelled[0], evaluation_config)[0]
            or labelled[0]
        )

    def calibration_exits(self, point: CalibratedPoint) -> NDArray[np.int64] | None:
        """Return `curves.exits_of` the calibration rows, or None without rows of this precision."""
        try:
            record = self._calibration_rows
        except UserError:
            return None
        if record.precision != self.engine.precision or len(record) < calibration.FEWEST:
            return None
        return curves.exits_of(record, OperatingPoint(point.rule, point.thresholds))

    @cached_property
    def costs(self) -> tuple[float, ...]:
        """Costs of leaving at each layer on this machine, for inputs as long as the record's."""
        return engine_latency.costs_at_lengths(
            self.engine, self._calibration_rows.length_N.clamp(1, self.max_length),
            len(self.tokenizer), self.task.num_labels,
        )  # fmt: skip

    def save_pretrained(
        self, folder: str | Path, *, exit: str | None = None, **target: Any
    ) -> None:
        """Write all files that are needed to use the model elsewhere, with a model card.

        Args:
            folder: where the files are written.
            exit: name of the exit rule that the saved model uses by default.
            **target: the target that it uses by default (arguments of `calibrate`).

        Raises:
            UserError: the folder cannot be written, or the target cannot be met.
        """
        saved = self.saved
        if exit is not None or target:
            # A target that cannot be met fails here, and not for every user of the folder.
            checked = self.calibrate(exit=exit, **target).target
            plain = {name: value for name, value in checked.items() if name != "exit"}
            saved = replace(saved, exit=exit or saved.exit, target=plain)
        self.model.to("cpu")
        try:
            saved_folder.write(saved, self.model, Path(folder), model_card.render(saved, self.task))
        finally:
            self.model.to(self.engine.device)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **target: Any) -> str:
        """Save the model to a repository on the Hugging Face hub, and return its address.

        Args:
            repo_id: id of the repository, which is made if it does not exist.
            private: visibility of a new repository; None for the hub's default.
            **target: arguments of `save_pretrained`.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **target)
            # Old records of another model would make the repository unreadable.
            api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns="records/*")
        return str(address)
