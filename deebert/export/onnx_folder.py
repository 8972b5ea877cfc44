"""A trained model as a folder of ONNX graphs that needs no torch: `python -m deebert.export ...`

    embeddings.onnx              ids -> states
    layer_1.onnx, ...            states -> states and the ramp's logits; the last one: logits alone
    tokenizer.json, deebert.json how texts are cut, the exit rule, thresholds of targets
    runner.py, README.md         what runs it: a copy of `onnx_runner`

Knows nothing of training, nor of how the graphs are run.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from deebert.classifier import CalibratedPoint, EarlyExitClassifier
from deebert.data.tasks import Task
from deebert.errors import UserError, unknown
from deebert.inference import onnx_graphs
from deebert.inference.onnx_layer import PRECISIONS
from deebert.models.architectures import ARCHITECTURES
from deebert.models.early_exit import EarlyExitModel
from deebert.options import TargetOptions, option, target_of
from deebert.reporting import markdown
from deebert.reporting.markdown import code
from deebert.untrusted import plain_files

log = logging.getLogger(__name__)

RUNNER = Path(__file__).with_name("onnx_runner.py")
FORMAT, SCHEMA = "deebert-onnx", 3  # of deebert.json
SAVINGS = [tenth / 10 for tenth in range(1, 10)]  # asked for, as far as the records meet them
EXPECTED = ("expected_saving", "interval", "score", "score_interval")  # of what is told of a target
CLOSE = 1e-4  # of logits, to the engine's
# What an export is tried on before it is kept: short and long, and what tokenizers are odd about.
TRIED = (
    "x", "Two words.", "a fine film, and a long one", "naïve café 北京 \U0001f600 don't [SEP] <s>",
    "  spaces \t and\nlines ", "the plot thickens, " * 12, "1,234.56 % of everything, " * 60,
)  # fmt: skip


@dataclass
class _Files:
    model: str = option("???", "a run folder, a folder of save_pretrained, or a hub id")
    output: str = option("???", "the folder to write")
    task: str | None = option(None, "what a published checkpoint was trained for: mrpc, ...")
    precision: str = option("float32", "of the layers: float32 or int8")
    overwrite: bool = option(False, "replace an export that is there")


@dataclass
class ExportOptions(TargetOptions, _Files):
    """What is exported, to where, and what it answers by where nothing else is asked."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        megabytes: of all files.
        asked: what it answers by.
        savings: that the runner can be asked for.
        difference: the largest to the engine's logits, on made-up texts.
    """

    folder: Path
    megabytes: float
    asked: CalibratedPoint
    savings: list[float]
    difference: float


def export(
    classifier: EarlyExitClassifier,
    output: str | Path,
    *,
    precision: str = "float32",
    overwrite: bool = False,
    **target: Any,
) -> Exported:
    """Write a folder, in whole or not at all.

    Args:
        classifier: float32, on the processor.
        precision: of the layers, float32 or int8.
        overwrite: replace an export that is there.
        **target: as `EarlyExitClassifier.calibrate` takes it.

    Raises:
        UserError: the model or the target cannot be exported, or something is there.
    """
    folder = Path(output)
    check(classifier.model, precision)
    _check_place(folder, overwrite)
    asked, savings = _asked(classifier, target), []
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output={folder} cannot be written: {error.strerror}") from error
    try:
        about = described(classifier.model, classifier.task, asked, precision)
        about["token_type_ids"] = "token_type_ids" in classifier.encode(_tried(classifier))[0]
        about["max_length"] = classifier.max_length
        about["savings"] = savings = _savings(classifier, asked)
        write(part, classifier.model, about)
        write_tokenizer(part, classifier.tokenizer, classifier.max_length)
        _write_readme(part, about)
        difference_L = _difference(part, classifier)
        if precision == "float32":
            _check_close(folder, difference_L, classifier.model)
        _put(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return Exported(
        folder, size, asked, [each["target_saving"] for each in savings], max(difference_L)
    )


def write(folder: Path, model: EarlyExitModel, about: Mapping[str, Any]) -> None:
    """Graphs, deebert.json and runner.py: all but the tokenizer, for whoever has token ids."""
    for name, content in graphs(model, about["precision"]):
        (folder / f"{name}.onnx").write_bytes(content)
    (folder / "deebert.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    shutil.copyfile(RUNNER, folder / "runner.py")


def graphs(model: EarlyExitModel, precision: str) -> Iterator[tuple[str, bytes]]:
    """Each block's name and content; as the engine has them (`onnx_layer`)."""
    backbone, int8 = model.backbone, precision == "int8"
    first_int8 = int8 and model.ramp_kind.reads_tokens
    yield "embeddings", onnx_graphs.embeddings(backbone.embedding_parts)
    for layer, ramp in enumerate(model.all_ramps, 1):
        parts, heads = backbone.parts(layer - 1), backbone.num_heads
        assert parts is not None  # checked
        if layer == len(model.all_ramps):
            yield f"layer_{layer}", onnx_graphs.last_layer(parts, heads, first_int8, ramp)
        else:
            yield f"layer_{layer}", onnx_graphs.layer(parts, heads, int8, first_int8, ramp)


def described(
    model: EarlyExitModel, task: Task, asked: CalibratedPoint, precision: str
) -> dict[str, Any]:
    """What deebert.json says of a model; a tokenizer's and the targets' are to be added."""
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
        "sep_token_id": model.backbone.separator,  # known if a ramp asks
        "rule": {"name": asked.rule.name, "options": dict(asked.rule.options)},
        "operating_point": {"target": dict(asked.target), **_calibrated(asked)},
        "savings": [],
        "token_type_ids": False,
        "made_with": {name: version(name) for name in ("deebert", "onnx", "onnxruntime")},
    }


def _calibrated(asked: CalibratedPoint) -> dict[str, Any]:
    expected = asked.expected or {}
    return {
        "thresholds": asked.thresholds,
        **asked.rule.fit,
        **{name: expected[name] for name in EXPECTED if expected.get(name) is not None},
    }


def _asked(classifier: EarlyExitClassifier, target: Mapping[str, Any]) -> CalibratedPoint:
    wanted = dict(target) or dict(classifier.saved.target)
    if "target_speedup" in wanted:
        speedup = wanted["target_speedup"]
        raise UserError(
            f"target_speedup={speedup}: what layers cost is known of the engine, not of the "
            "runner, which pays for each layer alike; give target_saving="
        )
    return classifier.calibrate(**target)


def _savings(classifier: EarlyExitClassifier, asked: CalibratedPoint) -> list[dict[str, Any]]:
    """What the runner can be asked for: with the same rule, in tenths and as it was asked."""
    same = {n: v for n, v in asked.target.items() if n in ("exit", "per_ramp", "temperature")}
    wished = asked.target.get("target_saving")
    found: list[dict[str, Any]] = []
    for saving in sorted({*SAVINGS, *([] if wished is None else [float(wished)])}):
        try:
            calibrated = classifier.calibrate(target_saving=saving, **same)
        except UserError as error:  # no record, or more than the rule can save, as all larger ones
            if not found:
                log.warning("target_saving= cannot be asked of the export: %s", error)
            break
        found.append({"target_saving": saving, **_calibrated(calibrated)})
    return found


def check(model: EarlyExitModel, precision: str) -> None:
    """Raises:
    UserError: this model cannot be exported, or not so, or not without more packages.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS, "precision")
    onnx_graphs.check("export")
    parts = model.backbone.parts(0)
    if parts is None:
        able = ", ".join(name for name, kind in ARCHITECTURES.items() if kind.parts is not None)
        raise UserError(
            f"a model of type {model.config['model_type']!r} cannot be exported, its layers cannot "
            f"be split; supported: {able}"
        )
    onnx_graphs.check_layer(parts)


def _check_place(folder: Path, overwrite: bool) -> None:
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


def _put(part: Path, folder: Path) -> None:
    """Into place; an export that is there goes when the new one is complete."""
    if not folder.exists():
        part.rename(folder)
        return
    old = part.with_suffix(".old")
    folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old)


def write_tokenizer(folder: Path, given: PreTrainedTokenizerBase, max_length: int) -> None:
    """One file that also says how texts are cut, as `tokenization.encode` does."""
    tokenizer = Tokenizer.from_str(given.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(
        max_length, strategy="longest_first", direction=given.truncation_side
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def _tried(classifier: EarlyExitClassifier) -> list[Any]:
    if len(classifier.task.columns) == 1:
        return list(TRIED)
    return list(zip(TRIED, TRIED[::-1], strict=True))


def _check_close(folder: Path, difference_L: list[float], model: EarlyExitModel) -> None:
    """Raises:
    UserError: a ramp says something else than in the engine.
    """
    for layer, (ramp, difference) in enumerate(zip(model.all_ramps, difference_L, strict=True), 1):
        # A standardized ramp multiplies the rounding of what it reads, too: by a thousand where
        # the first token hardly differs between inputs.
        close = CLOSE * max(1.0, ramp.scale.max().item())
        if not difference <= close:
            raise UserError(
                f"{folder} was not written: the logits of ramp {layer} differ by {difference:.2g} "
                f"from the engine's, more than {close:.2g}; this model cannot be exported"
            )


def _difference(folder: Path, classifier: EarlyExitClassifier) -> list[float]:
    """The largest between the logits of the runner and of the engine, of each ramp.

    Raises:
        UserError: tokens differ.
    """
    from deebert.export.onnx_runner import Runner

    runner, texts = Runner(folder), _tried(classifier)
    inputs = runner.encode([runner.checked(text) for text in texts])
    if inputs != classifier.encode(texts):
        raise UserError(
            f"{type(classifier.tokenizer).__name__} cannot be exported: it does more than its "
            "tokenizer.json says"
        )
    expected_NLC = classifier.engine.at(0.0).run(inputs, all_ramps=True).ramps_NLC
    assert expected_NLC is not None
    found_NLC = torch.from_numpy(runner.run(inputs, 0.0).ramps_NLC)
    return (found_NLC - expected_NLC).abs().amax((0, 2)).tolist()


def _write_readme(folder: Path, about: Mapping[str, Any]) -> None:
    task = about["task"]
    text = '"a text"' if len(task["columns"]) == 1 else '["a text", "and another"]'
    reads = " and ".join(map(code, task["columns"]))
    classes = task["labels"]
    answer = "a number" if classes is None else f"one of: {', '.join(map(markdown.text, classes))}"
    savings = [each["target_saving"] for each in about["savings"]]
    target = "threshold=0.1" if not savings else f"target_saving={savings[len(savings) // 2]}"
    lines = [
        f"# An early-exit {about['model_type']} for {task['name']}, in ONNX",
        "",
        f"Written by `python -m deebert.export`. It reads {reads} and answers",
        f"with {answer}. Easy inputs leave after a few of its {about['num_layers']} layers.",
        "",
        "    pip install numpy onnxruntime tokenizers",
        f"    echo '{text}' | python runner.py . {target}",
        "",
        "A line in is a text (or a pair of texts) in JSON, a line out an answer. From Python, with",
        "`runner.py` copied to where you need it:",
        "",
        "    from runner import Runner",
        f'    Runner("THIS_FOLDER").predict([{text}], {target})',
        "",
        "Without a target it answers as it was exported: "
        f"`{json.dumps(about['operating_point']['target'] or 'full depth')}`.",
    ]
    if savings:
        lines += [
            "",
            "| target_saving | expected saving of layers | expected score |",
            "|---|---|---|",
        ]
    for each in about["savings"]:
        score = f"{each['score']:.4f}" if "score" in each else ""
        lines.append(f"| {each['target_saving']} | {each['expected_saving']:.3f} | {score} |")
    (folder / "README.md").write_text("\n".join(lines) + "\n", "utf-8")


def run(options: ExportOptions) -> None:
    """What the command does.

    Raises:
        UserError: as `export`, or there is no such model.
    """
    _check_place(Path(options.output), options.overwrite)  # before a large model is loaded
    classifier = EarlyExitClassifier.from_pretrained(options.model, task=options.task)
    found = export(
        classifier,
        options.output,
        precision=options.precision,
        overwrite=options.overwrite,
        **target_of(options),
    )
    print(
        f"{found.folder}: {found.megabytes:.1f} MB in {options.precision}; on made-up texts its "
        f"logits differ by {found.difference:.1g} from the engine's"
    )
    expected = found.asked.expected
    saving = f", about {expected['expected_saving']:.1%} of the layers saved" if expected else ""
    print(f"answers by {dict(found.asked.target) or 'full depth'}{saving}")
    print(f"can be asked for target_saving={', '.join(map(str, found.savings)) or 'none'}")
