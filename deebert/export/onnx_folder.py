"""The export of a trained model as a folder of ONNX graphs: `deebert export ...`.

    embeddings.onnx     token ids -> states
    layer_1.onnx, ...   states -> states and the ramp's logits; the last layer gives logits only
    exit_rule.onnx      logits of the ramps -> exit scores
    tokenizer.json      the tokenizer, with the length that texts are cut to
    deebert.json        the task, the name of the exit rule and the thresholds of some targets
    runner.py           the program that answers with the folder: a copy of `onnx_runner`
    README.md           how to use it

The folder needs no torch. This module knows neither training nor how the graphs are run.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from deebert.classifier import EarlyExitClassifier
from deebert.data.tasks import Task
from deebert.disk import whole_files
from deebert.errors import UserError, unknown
from deebert.exits.calibration import CalibratedPoint
from deebert.exits.rules import Rule
from deebert.export import readme, trial
from deebert.export.rule_graph import rule_graph
from deebert.inference import graph_runtimes, onnx_graphs
from deebert.inference.onnx_stretches import PRECISIONS
from deebert.models.architectures import ARCHITECTURES
from deebert.models.early_exit import EarlyExitModel
from deebert.models.quantization import Quantization
from deebert.options import MODULES, TargetOptions, import_modules, option, target_of
from deebert.untrusted import plain_files

log = logging.getLogger(__name__)

RUNNER = Path(__file__).with_name("onnx_runner.py")
FORMAT, SCHEMA = "deebert-onnx", 3  # of deebert.json
SAVINGS = [tenth / 10 for tenth in range(1, 10)]  # exported as far as the exit rule reaches them
EXPECTED = ("expected_saving", "interval", "score", "score_interval")  # exported for each target


@dataclass
class _Files:
    model: str = option("???", "a run folder, a folder of save_pretrained, or a hub id")
    output: str = option("???", "the folder to write")
    task: str | None = option(None, "the task of a checkpoint that does not state it: mrpc, ...")
    precision: str = option("float32", "number format of the layers: float32 or int8")
    overwrite: bool = option(False, "replace an export that is there")
    modules: Any = option(None, MODULES)


@dataclass
class ExportOptions(TargetOptions, _Files):
    """The options of the command. The target is the export's default."""


@dataclass(frozen=True)
class Exported:
    """An export that was written.

    Attributes:
        folder: the folder.
        megabytes: the size of all files.
        operating_point: the operating point that the runner uses by default.
        savings: the values of `target_saving` that the runner offers.
        difference: the largest difference from the engine's logits, on the sample texts.
    """

    folder: Path
    megabytes: float
    operating_point: CalibratedPoint
    savings: list[float]
    difference: float


def export(
    classifier: EarlyExitClassifier,
    output: str | Path,
    *,
    overwrite: bool = False,
    **target: Any,
) -> Exported:
    """Write the folder of an export. A failure leaves no half-written folder.

    Args:
        classifier: the model, on the processor, in the precision that the layers are exported in:
            float32 or int8.
        output: the folder to write.
        overwrite: whether an existing export is replaced.
        **target: the default target, as `EarlyExitClassifier.calibrate` takes it.

    Raises:
        UserError: the model or the target cannot be exported, or the folder exists.
    """
    folder = Path(output)
    check(classifier.model, classifier.engine.precision)
    _check_output(folder, overwrite)
    point, savings = _calibrated_point(classifier, target), []
    rule_graph(point.rule, classifier.num_layers)  # it is kept; a rule may have none
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with whole_files.write_errors(f"output={folder}"), _removed_at_the_end(part):
        part.mkdir(parents=True)
        about = described(classifier.model, classifier.task, point, classifier.engine.precision)
        about["token_type_ids"] = "token_type_ids" in classifier.encode(trial.sample(classifier))[0]
        about["max_length"] = classifier.max_length
        about["savings"] = savings = _savings(classifier, point)
        write(part, classifier.model, about, point.rule, classifier.engine.quantization)
        write_tokenizer(part, classifier.tokenizer, classifier.max_length)
        (part / "README.md").write_text(readme.text(about), "utf-8")
        difference_L = trial.differences(part, classifier)
        trial.check(folder, difference_L, classifier)
        _move(part, folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return Exported(
        folder, size, point, [each["target_saving"] for each in savings], max(difference_L)
    )


def write(
    folder: Path,
    model: EarlyExitModel,
    about: Mapping[str, Any],
    rule: Rule,
    quantization: Quantization | None = None,
) -> None:
    """Write the graphs, deebert.json and runner.py. Inputs that are token ids need no other file.

    Args:
        folder: an existing folder.
        model: the model.
        about: the content of deebert.json.
        rule: the exit rule.
        quantization: how the layers are rounded; None for float32.
    """
    (folder / "exit_rule.onnx").write_bytes(rule_graph(rule, about["num_layers"]))
    for name, content in graphs(model, quantization):
        (folder / f"{name}.onnx").write_bytes(content)
    (folder / "deebert.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    shutil.copyfile(RUNNER, folder / "runner.py")


def graphs(
    model: EarlyExitModel, quantization: Quantization | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the graph of each block, as the engine runs them (`onnx_stretches`)."""
    yield "embeddings", onnx_graphs.stretch(model, 0, 0, quantization, embeds=True, ramp=False)
    for layer in range(len(model.ramps)):
        graph = onnx_graphs.stretch(model, layer, layer + 1, quantization, embeds=False, ramp=True)
        yield f"layer_{layer + 1}", graph


def described(
    model: EarlyExitModel, task: Task, point: CalibratedPoint, precision: str
) -> dict[str, Any]:
    """Return the content of deebert.json, without the values of a tokenizer and other targets.

    Args:
        model: the model.
        task: its task.
        point: the default operating point.
        precision: the precision of the layers.
    """
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "task": {"name": task.name, "columns": task.columns, "labels": task.labels},
        "model_type": model.config["model_type"],
        "precision": precision,
        "num_layers": len(model.ramps),
        "num_labels": model.num_labels,
        "longest_input": model.backbone.longest_input,
        "pad_token_id": model.backbone.pad_token_id,
        "sep_token_id": model.backbone.separator,  # not None if a ramp reads the second text
        "rule": {"name": point.rule.name, "options": dict(point.rule.options)},
        "operating_point": {"target": dict(point.target), **_point_values(point)},
        "savings": [],
        "token_type_ids": False,
        "made_with": {name: version(name) for name in ("deebert", "onnx", "onnxruntime")},
    }


def _point_values(point: CalibratedPoint) -> dict[str, Any]:
    """Return the values of an operating point for deebert.json."""
    values = {name: getattr(point.expected, name, None) for name in EXPECTED}
    return {
        "thresholds": point.thresholds,
        **point.rule.fit,
        **{name: value for name, value in values.items() if value is not None},
    }


def _calibrated_point(
    classifier: EarlyExitClassifier, target: Mapping[str, Any]
) -> CalibratedPoint:
    """Return the operating point of a target.

    Raises:
        UserError: the target is a speed-up, or cannot be met.
    """
    values = dict(target) or dict(classifier.saved.target)
    if "target_speedup" in values:
        raise UserError(
            f"target_speedup={values['target_speedup']}: what layers cost is measured for the "
            "engine, not for the exported runner; give target_saving="
        )
    return classifier.calibrate(**target)


def _savings(classifier: EarlyExitClassifier, point: CalibratedPoint) -> list[dict[str, Any]]:
    """Return the operating points that the runner offers, one for each saving.

    They use the exit rule of the default operating point. The savings are all tenths and the
    default target's.
    """
    options = {n: v for n, v in point.target.items() if n in ("exit", "per_ramp", "temperature")}
    default = point.target.get("target_saving")
    points: list[dict[str, Any]] = []
    for saving in sorted({*SAVINGS, *([] if default is None else [float(default)])}):
        try:
            calibrated = classifier.calibrate(target_saving=saving, **options)
        except UserError as error:  # there is no record, or the rule cannot save as much or more
            if not points:
                log.warning("target_saving= cannot be asked of the export: %s", error)
            break
        points.append({"target_saving": saving, **_point_values(calibrated)})
    return points


def check(model: EarlyExitModel, precision: str) -> None:
    """Check that a model can be exported.

    Raises:
        UserError: it cannot, there is no such precision, or a package is missing.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS, "precision")
    graph_runtimes.check("onnx", "export")
    if find_spec("onnxscript") is None:
        raise UserError(
            'export needs onnxscript, which is not installed: pip install "deebert[onnx]"'
        )
    parts = model.backbone.parts(0)
    if parts is None:
        able = ", ".join(name for name, kind in ARCHITECTURES.items() if kind.parts is not None)
        raise UserError(
            f"a model of type {model.config['model_type']!r} cannot be exported, its layers cannot "
            f"be split; supported: {able}"
        )
    onnx_graphs.check_layer(parts, model.all_ramps[0])


def _check_output(folder: Path, overwrite: bool) -> None:
    """Check that the folder can be written.

    Raises:
        UserError: it exists and must not be replaced, or it is a path without a name.
    """
    if not folder.name:
        raise UserError(f"output={folder} has no name of its own; give a folder to write")
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"output={folder} is there; choose another, or give overwrite=true")
    try:
        ours = plain_files.json_file(folder / "deebert.json").get("format") == FORMAT
    except (FileNotFoundError, UserError):
        ours = False
    if not ours:
        raise UserError(f"output={folder} is no export; overwrite=true replaces nothing else")


@contextmanager
def _removed_at_the_end(folder: Path) -> Iterator[None]:
    """Remove a folder after the `with` block, if it is still there."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(part: Path, folder: Path) -> None:
    """Rename the finished folder. An existing export is removed after that."""
    for file in part.rglob("*"):
        whole_files.sync(file)
    if not folder.exists():
        part.rename(folder)
        return
    old = part.with_suffix(".old")
    folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Write tokenizer.json, which also holds how texts are cut (as `tokenization.encode` does)."""
    exported = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    exported.no_padding()
    exported.enable_truncation(
        max_length, strategy="longest_first", direction=tokenizer.truncation_side
    )
    with whole_files.replaced(folder / "tokenizer.json") as part:
        exported.save(str(part))


def run(options: ExportOptions) -> None:
    """Run the command.

    Raises:
        UserError: there is no such model, or it cannot be exported (`export`).
    """
    _check_output(Path(options.output), options.overwrite)  # before a large model is loaded
    import_modules(options.modules)
    if options.precision not in PRECISIONS:
        raise unknown("precision", options.precision, PRECISIONS, "precision")
    graph_runtimes.check("onnx", "export")
    classifier = EarlyExitClassifier.from_pretrained(
        options.model,
        task=options.task,
        precision=options.precision,
        runtime="onnx" if options.precision == "int8" else "torch",
    )
    exported = export(
        classifier,
        options.output,
        overwrite=options.overwrite,
        **target_of(options),
    )
    print(
        f"{exported.folder}: {exported.megabytes:.1f} MB in {options.precision}; on made-up texts "
        f"its logits differ by {exported.difference:.1g} from the engine's"
    )
    expected = exported.operating_point.expected
    saving = f", about {expected.expected_saving:.1%} of the layers saved" if expected else ""
    print(f"answers by {dict(exported.operating_point.target) or 'full depth'}{saving}")
    print(f"can be asked for target_saving={', '.join(map(str, exported.savings)) or 'none'}")
