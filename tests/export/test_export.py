"""An exported model answers as the engine does, where there is no torch, transformers or deebert."""

import contextlib
import io
import itertools
import json
import math
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command as run_command
from helpers.disks import limited_files, of_other_modes
from helpers.random_models import (
    CLASS_RULES,
    RAMPS,
    byte_level,
    in_precision,
    inputs_of,
    middles,
    model_of,
    world,
)

from deebert import EarlyExitClassifier
from deebert.data import demo, tokenization
from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.exits import rules
from deebert.exits.calibration import CalibratedPoint
from deebert.export import onnx_folder, onnx_runner, trial
from deebert.export.onnx_runner import Block, ExitRule, Runner, RunnerError
from deebert.export.rule_graph import rule_graph
from deebert.inference.engine import Engine

TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Runs a file where nothing can be imported but what the runner may need.
ALONE = """
import runpy, sys
known = {*sys.stdlib_module_names, "numpy", "onnxruntime", "tokenizers"}
class Alone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in known:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Alone())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ODD = [
    ("", "x"),
    ("naïve café 北京 \U0001f600", "don't"),
    ("[SEP] <s>", " \t\n"),
    ("a " * 90, "b " * 70),
]


def pairs() -> list[tuple[str, str]]:
    """Of a few to more tokens than the model takes."""
    rows = [row["review"] for row in demo.rows("test")]
    return ODD + [(" ".join(rows[i : i + i % 3]), " ".join(rows[i : i + i % 5])) for i in range(60)]


@pytest.fixture(scope="module")
def classifier(stage2: Path) -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(stage2)


@pytest.fixture(scope="module")
def spread(stage1: Path, made_once: Callable[..., Path]) -> EarlyExitClassifier:
    """Ramps that tell inputs apart, though the tiny backbone hardly does: theirs are standardized.

    Else a temperature could make all scores one number but for its last bit, and chance would say
    which rows leave.
    """
    overrides = ("stage=2", f"ckpt={stage1}", "stages.2.standardize=true", "logger=csv")
    folder = made_once(
        "spread", lambda to: run_command("train.py", *overrides, f"hydra.run.dir={to}")
    )
    loaded = EarlyExitClassifier.from_pretrained(folder)
    [record] = loaded.saved.records.values()
    logits_NKC = record.logits_NLC[:, :-1]
    assert (logits_NKC[..., 1] - logits_NKC[..., 0]).std(0).min() > 0.1
    return loaded


@pytest.fixture(scope="module")
def exported(stage2: Path, made_once: Callable[..., Path]) -> Path:
    """By the command."""

    def make(folder: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run_command("-m", "deebert", "export", f"model={stage2}", f"output={folder}", "target_saving=0.35")  # fmt: skip
        assert "can be asked for target_saving=0.1, 0.2, 0.3, 0.35, 0.4" in printed.getvalue()

    folder = made_once("exported", make)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "deebert.json", "embeddings.onnx", "exit_rule.onnx", "layer_1.onnx",
        "layer_2.onnx", "layer_3.onnx", "runner.py", "tokenizer.json",
    ]  # fmt: skip
    return folder


def answers(runner: Path, folder: Path, lines: list, *options: str) -> subprocess.CompletedProcess:
    """What the runner says, in a process of its own, elsewhere."""
    given = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    command = [sys.executable, "-c", ALONE, str(runner), str(folder), *options]
    if not any(option.startswith("threads") for option in options):
        command.append("threads=1")
    return subprocess.run(
        command, cwd=runner.parent, input=given, capture_output=True, text=True, timeout=280
    )


@pytest.mark.parametrize("target", [{}, {"target_saving": 0.2}, {"threshold": None}])
def test_alone_it_answers_as_the_engine(
    target: dict, exported: Path, classifier: EarlyExitClassifier, tmp_path: Path
) -> None:
    runner = tmp_path / "elsewhere" / "answer.py"
    runner.parent.mkdir()
    shutil.copy(exported / "runner.py", runner)
    texts = pairs()
    if "threshold" in target:
        every = classifier.engine.at(0.0).run(classifier.encode(texts), all_ramps=True).ramps_NLC
        target["threshold"] = []
        for logits_NC in every[:, :-1].unbind(1):
            scores = rules.entropy(logits_NC).sort().values[20:50]
            widest = scores.diff().argmax()  # so that rounding turns no exit
            target["threshold"].append(scores[widest : widest + 2].mean().item())
    expected = classifier.predict(texts, **(target or {"target_saving": 0.35}))
    done = answers(runner, exported, texts, *(f"{name}={value}" for name, value in target.items()))
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["exit_layer"] for each in lines] == expected.exit_layers
    assert len(set(expected.exit_layers)) > 1
    assert [each["label"] for each in lines] == expected.labels
    shares = [each["probability"] for each in lines]
    assert shares == pytest.approx([each["probability"] for each in expected], abs=1e-4)


def test_readme_says_how(exported: Path, classifier: EarlyExitClassifier) -> None:
    """Its command and its Python, as they stand there."""
    lines = (exported / "README.md").read_text().splitlines()
    code = [line.strip() for line in lines if line.startswith("    ")]
    assert code[0] == "pip install numpy onnxruntime tokenizers"
    done = subprocess.run(
        code[1].replace("python", sys.executable), shell=True, cwd=exported, capture_output=True,
        text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [expected] = classifier.predict([("a text", "and another")], target_saving=0.3)
    assert json.loads(done.stdout) == pytest.approx(expected, abs=1e-4)
    program = "\n".join(code[2:]).replace("THIS_FOLDER", ".").replace('Runner("', 'print(Runner("')
    done = subprocess.run(
        [sys.executable, "-c", f"{program})"],
        cwd=exported,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.stdout.startswith("[{'label':"), done.stderr
    table = [line.split("|")[1:4] for line in lines if line.startswith("| 0")]
    for saving, expected_saving, score in table:
        expected_point = classifier.calibrate(target_saving=float(saving)).expected
        assert float(expected_saving) == pytest.approx(expected_point.expected_saving, abs=1e-3)
        assert float(score) == pytest.approx(expected_point.score, abs=1e-4)
    assert len(table) > 4


@pytest.mark.parametrize(
    "target",
    [
        {"target_saving": 0.3, "temperature": True},
        {"target_saving": 0.3, "per_ramp": True},
        {"target_saving": 0.1, "exit": "patience"},
        {"target_saving": 0.3, "exit": "relative_entropy"},
        {"max_drop": 0.5, "exit": "ensemble"},
        {"threshold": [0.69, 0.6]},
    ],
)
def test_targets_of_every_kind(target: dict, spread: EarlyExitClassifier, tmp_path: Path) -> None:
    summary = onnx_folder.export(spread, tmp_path / "model", **target)
    assert summary.difference < 1e-5
    expected = spread.predict(pairs(), **target)
    answers = Runner(tmp_path / "model", threads=1).predict(pairs())
    assert [each["exit_layer"] for each in answers] == expected.exit_layers
    shares = [each["probability"] for each in answers]
    assert shares == pytest.approx([each["probability"] for each in expected], abs=1e-4)
    same = {name: target[name] for name in ("exit", "temperature", "per_ramp") if name in target}
    for saving in summary.savings:
        operating_point = Runner(tmp_path / "model").operating_point(target_saving=saving)
        calibrated = spread.calibrate(target_saving=saving, **same)
        assert operating_point["thresholds"] == calibrated.thresholds
        assert {name: operating_point[name] for name in calibrated.rule.fit} == calibrated.rule.fit


def test_texts_in_every_form(exported: Path, classifier: EarlyExitClassifier) -> None:
    runner = Runner(exported, threads=1)
    [one] = runner.predict(("a fine film", "no film"))
    named = {"sentence1": "a fine film", "sentence2": "no film", "label": 1}
    for same in ([("a fine film", "no film")], [["a fine film", "no film"]], named, [named]):
        assert runner.predict(same) == [one]
    assert runner.predict(pairs(), threshold=0)[5]["exit_layer"] == 3


def written(
    folder: Path, model, rule: rules.Rule, precision: str = "float32", quantization=None
) -> Runner:
    """An export without a tokenizer, at full depth."""
    labels = None if rule.num_labels == 1 else [f"class {i}" for i in range(rule.num_labels)]
    metric = "pearson" if labels is None else "accuracy"
    values = {"name": "made-up", "columns": ["text"], "labels": labels, "metrics": [metric]}
    about = onnx_folder.described(
        model, Task.from_config(values), CalibratedPoint(rule, 0.0, {}), precision
    )
    folder.mkdir()
    onnx_folder.write(folder, model, about, rule, quantization)
    return Runner(folder, threads=1)


CASES = [(model_type, 3, "first", "entropy") for model_type in TYPES]
CASES += [("bert", 3, ramp, rule) for ramp in RAMPS for rule in ("entropy", "patience", "learned")]
CASES += [("bert", 3, "cascade", rule) for rule in CLASS_RULES]
CASES += [("bert", 1, ramp, rule) for ramp in ("cascade", "mean") for rule in ("change", "learned")]


@pytest.mark.parametrize(("model_type", "num_labels", "ramp", "name"), [*dict.fromkeys(CASES)])
def test_runner_equals_engine(
    model_type: str, num_labels: int, ramp: str, name: str, tmp_path: Path, monkeypatch
) -> None:
    model, inputs, record = world(model_type, num_labels, ramp)
    rule = rules.named(name, num_labels)
    if rule.needs_prior:
        rule = rule.fitted(prior=[0.6, 0.3, 0.1])
    runner = written(tmp_path / "model", model, rule)
    scores_NL = rule(record.logits_NLC, record.learned_score_NL).score_NL[:, :-1]
    between = middles(scores_NL.flatten())[2:]
    chosen = sorted({between[i * (len(between) - 1) // 3] for i in range(4)})
    layers, engine = set(), Engine(model, rule, 0.0)
    sizes = itertools.cycle([(2048, 8192), (100, 8192), (2048, 13)])
    for threshold in (0.0, math.inf, *chosen, [chosen[0], 0.0, chosen[-1]]):
        expected = engine.at(threshold).run(inputs, all_ramps=True)
        for name, value in zip(("TOKEN_BUDGET", "WINDOW"), next(sizes), strict=True):
            monkeypatch.setattr(onnx_runner, name, value)
        actual = runner.run(inputs, threshold, prior=rule.prior)
        assert actual.layer_N.tolist() == expected.layer_N.tolist()
        torch.testing.assert_close(torch.from_numpy(actual.logits_NC), expected.logits_NC, **CLOSE)
        ramps_NLC = torch.from_numpy(actual.ramps_NLC)
        torch.testing.assert_close(ramps_NLC, expected.ramps_NLC, equal_nan=True, **CLOSE)
        layers |= set(actual.layer_N.tolist())
    assert len(layers) > 2


@pytest.mark.parametrize("ramp", ["first", "mean"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_int8(model_type: str, ramp: str, tmp_path: Path) -> None:
    model, inputs, record = world(model_type, 3, ramp)
    rule = rules.named("entropy", 3)
    int8 = in_precision("int8", model_type, ramp)
    runner = written(tmp_path / "model", model, rule, **int8)
    exact = written(tmp_path / "exact", model, rule)
    size, full_size = (
        (tmp_path / name / "layer_1.onnx").stat().st_size for name in ("model", "exact")
    )
    assert (size < full_size) == (ramp == "mean"), "a ramp on the first token needs it exactly"
    for at_once, expected_NLC in (
        (inputs, record.logits_NLC),
        (inputs[1:2], record.logits_NLC[1:2]),
    ):
        actual_NLC = torch.from_numpy(runner.run(at_once, 0.0).ramps_NLC)
        torch.testing.assert_close(actual_NLC, expected_NLC, rtol=0, atol=0.2)
        assert not np.array_equal(actual_NLC, exact.run(at_once, 0.0).ramps_NLC)
    engine = Engine(model, rule, 0.9, **int8)
    for each in inputs[:20]:
        expected, actual = engine.run([each]), runner.run([each], 0.9)
        assert actual.layer_N.tolist() == expected.layer_N.tolist()
        torch.testing.assert_close(torch.from_numpy(actual.logits_NC), expected.logits_NC, **CLOSE)


@pytest.mark.slow  # torch translates each rule
@pytest.mark.parametrize("num_labels", [1, 3])
def test_graphs_of_rules(num_labels: int) -> None:
    """Each gives what its function gives, for sure rows and ties, too."""
    random = torch.Generator().manual_seed(2)
    logits_NLC = 3 * torch.randn(300, 6, num_labels, generator=random)
    logits_NLC[:20] *= 1e4  # so sure that shares underflow
    logits_NLC[20:40] = logits_NLC[20:40].round()  # ties
    learned_score_NL = torch.rand(300, 6, generator=random)
    for name, kind in rules.RULES.items():
        if kind.keywords["regression"] not in (None, num_labels == 1):
            continue
        rule = rules.named(name, num_labels)
        if rule.relative:
            rule = rule.fitted(prior=[0.1, *[0.9] * (num_labels - 1)])
        variants = [rules.named(name, num_labels, patience=n) for n in (1, 3) if rule.options]
        for each in (rule, *variants):
            graph = ExitRule(Block(rule_graph(each, 6), 1))
            assert graph.num_ramps == (6 if rule.looks_back else 1)
            expected = each(logits_NLC, learned_score_NL)
            for ramps in range(1, 7):
                score_N, answer_NC = graph(
                    logits_NLC[:, :ramps].numpy(),
                    learned_score_NL[:, ramps - 1].numpy(),
                    rule.prior,
                )
                there = expected.score_NL[:, ramps - 1].numpy()
                np.testing.assert_allclose(score_N, there, rtol=1e-5, atol=1e-6, err_msg=name)
                there = expected.answer_NLC[:, ramps - 1].numpy()
                np.testing.assert_allclose(answer_NC, there, rtol=1e-5, atol=1e-6, err_msg=name)


def test_nan_is_answered_at_full_depth(tmp_path: Path) -> None:
    model = model_of("bert")
    model.all_ramps[0].classifier.bias.fill_(torch.nan)
    for name in ("entropy", "vote"):
        runner = written(tmp_path / name, model, rules.named(name, 3))
        actual = runner.run(inputs_of("bert", [3, 9]), [math.inf, 0.0, 0.0])
        assert actual.layer_N.tolist() == [4, 4]
        assert np.isfinite(actual.logits_NC).all()


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_longer_than_the_model_takes(model_type: str, tmp_path: Path) -> None:
    model, rule = model_of(model_type), rules.named("entropy", 3)
    inputs = inputs_of(model_type, [500, 3])
    actual = written(tmp_path / "model", model, rule).run(inputs, 0.5)
    expected = Engine(model, rule, 0.5).run(inputs)
    torch.testing.assert_close(torch.from_numpy(actual.logits_NC), expected.logits_NC, **CLOSE)


@pytest.mark.parametrize("max_length", [8, 9, 64])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("kind", ["stage2", "byte level"])
def test_tokens_are_the_project_s(
    kind: str, columns: int, max_length: int, classifier: EarlyExitClassifier, tmp_path: Path
) -> None:
    tokenizer = byte_level() if kind == "byte level" else classifier.tokenizer
    lengths = [("a " * i, "b " * j) for i in range(10) for j in range(10)]
    texts = list(zip(*ODD, *pairs()[-9:], *lengths, strict=True))[:columns]
    expected = tokenization.encode(tokenizer, texts, max_length)
    runner = written(tmp_path / "model", model_of("bert"), rules.named("entropy", 3))
    runner.about["token_type_ids"], runner.columns = (
        "token_type_ids" in expected,
        ["a", "b"][:columns],
    )
    onnx_folder.write_tokenizer(tmp_path / "model", tokenizer, max_length)
    tokens = runner.encode(list(zip(*texts, strict=True)))
    for name in tokens[0]:
        assert [each[name] for each in tokens] == expected[name]
    assert set(tokens[0]) == set(expected) - {"attention_mask"}
    assert max(len(each["input_ids"]) for each in tokens) == max_length


def test_pairs_of_long_texts(exported: Path) -> None:
    """`tokenizers` itself would take minutes and tens of gigabytes."""
    runner = Runner(exported, threads=1)
    rows = [("word " * 40_000, "x " * 30_000), ("word " * 40, "x " * 30), ("word " * 40_000, "x")]
    first, second, third = runner.encode(rows)
    assert first == second
    assert len(third["input_ids"]) == 64
    assert runner.predict(rows[0]) == [pytest.approx(runner.predict([rows[1]])[0])]


WRONG = {
    "a folder that is not there": ("MISSING", [], [["a", "b"]], "is not there; write one with deebert export"),
    "a saving that is not there": ("", ["target_saving=0.33"], [["a", "b"]], "target_saving=0.33 is not in this export, which has: 0.1, 0.2, 0.3, 0.35"),
    "an option that is none": ("", ["speed=2"], [["a", "b"]], "option 'speed=2' is unknown; choose one of: threshold"),
    "a threshold that is none": ("", ["threshold=high"], [["a", "b"]], "threshold=high: 'high' is no number"),
    "too many thresholds": ("", ["threshold=[0.1,0.2,0.3]"], [["a", "b"]], "a list of 2, one for each ramp but the last"),
    "two targets": ("", ["threshold=0.1", "target_saving=0.3"], [["a", "b"]], "ask for one of them"),
    "no threads": ("", ["threads=0"], [["a", "b"]], "threads=0"),
    "no JSON": ("", [], [["a", "b"], "{'a'"], "line 2 is no JSON"),
    "nested deeply": ("", [], [["a", "b"], "[" * 100_000], "line 2 is no JSON"),
    "a text where a pair is read": ("", [], [["a", "b"], '"a"'], "line 2: 'a' is not a pair of texts (sentence1, sentence2)"),
    "half a letter": ("", [], [["a", "b"], '["\\ud800", "b"]'], "line 2: ['\\ud800', 'b']: a text of it holds half of a surrogate pair"),
    "a NUL": ("", [], [["a", "b"], ["a", "\0"]], "line 2: ['a', '\\x00']: a text of it holds a NUL character"),
    "a huge text": ("", [], [["a", "b"], ["a", "b" * 1_000_001]], "has 1,000,001 characters, more than 1,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_refused_in_one_line(
    what: str, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process; test_missing_packages_in_one_line is by a process of its own."""
    where, options, lines, says = WRONG[what]
    given = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    words = [str(exported / "runner.py"), str(exported / where), *options]
    monkeypatch.setattr(sys, "argv", [*words, "threads=1"] if options != ["threads=0"] else words)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(words[0], run_name="__main__")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith("Error: "), printed.err
    assert says in printed.err
    assert printed.err.count("\n") == 1, printed.err
    num_answers = len(lines) - 1 if lines[1:] else 0
    assert printed.out.count("\n") == num_answers, "what came before is answered"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("deebert.json", "{", "cannot be read"),
        ("deebert.json", '{"schema": 1}', "is of no export"),
        ("deebert.json", '{"format": "deebert-onnx", "schema": 9}', "has schema 9"),
        (
            "deebert.json",
            '{"format": "deebert-onnx", "schema": 2}',
            r"has schema 2, this runner reads 3: use the runner\.py",
        ),
        ("exit_rule.onnx", None, r"exit_rule\.onnx cannot be loaded"),
        ("layer_2.onnx", "nonsense", "layer_2.onnx cannot be loaded"),
        ("layer_2.onnx", None, "layer_2.onnx cannot be loaded"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
    ],
)
def test_a_damaged_export(
    file: str, content: str | None, says: str, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(RunnerError, match=says) as error:
        Runner(folder).predict([("a", "b")])
    assert "\n" not in str(error.value)


def test_missing_packages_in_one_line(exported: Path) -> None:
    alone = ALONE.replace('"tokenizers"', "")
    command = [sys.executable, "-c", alone, str(exported / "runner.py"), str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, input="", timeout=280)
    assert done.returncode == 2
    assert done.stderr == "Error: tokenizers is blocked; pip install numpy onnxruntime tokenizers\n"


def test_what_is_not_exported(classifier: EarlyExitClassifier, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "model"

    def refused(says: str, **more: object) -> None:
        with pytest.raises(UserError, match=says) as error:
            onnx_folder.export(classifier, folder, **more)
        assert "\n" not in str(error.value)
        assert not [*tmp_path.glob(".*")], "nothing half made is left"

    refused("target_speedup=1.5: what layers cost", target_speedup=1.5)
    refused("target_saving=0.9 is more than", target_saving=0.9)
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine").write_text("dear")
    refused("is there; choose another, or give overwrite=true")
    refused("is no export; overwrite=true replaces nothing else", overwrite=True)
    assert (folder / "mine").read_text() == "dear"
    for package in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
        refused(r'pip install "deebert\[onnx\]"', overwrite=True)
        monkeypatch.undo()
    for model_type in ("deberta-v2", "modernbert"):
        with pytest.raises(UserError, match=r"'.*' cannot be exported.*supported: bert, roberta"):
            onnx_folder.check(model_of(model_type), "float32")


def test_replaces_an_export(
    classifier: EarlyExitClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    onnx_folder.export(classifier, folder, threshold=0.2)
    before = (folder / "deebert.json").read_text()
    monkeypatch.setattr(trial, "CLOSE", -1.0)
    with pytest.raises(UserError, match="the logits of ramp 1 differ by"):
        onnx_folder.export(classifier, folder, overwrite=True, threshold=0.6)
    assert (folder / "deebert.json").read_text() == before, "what was there stays"
    monkeypatch.undo()
    for size in (1, 10_000):
        with limited_files(size), pytest.raises(UserError) as error:
            onnx_folder.export(classifier, folder, overwrite=True, threshold=0.6)
        assert str(error.value) == f"output={folder}: it cannot be written (File too large)"
    assert (folder / "deebert.json").read_text() == before
    onnx_folder.export(classifier, folder, overwrite=True, threshold=0.6)
    assert not of_other_modes(tmp_path)
    assert Runner(folder).operating_point()["thresholds"] == 0.6
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_without_trained_ramps(stage1: Path, tmp_path: Path, caplog) -> None:
    classifier = EarlyExitClassifier.from_pretrained(stage1)
    summary = onnx_folder.export(classifier, tmp_path / "model")
    assert summary.savings == []
    assert "its ramps say nothing yet" in caplog.text
    runner = Runner(tmp_path / "model")
    assert [each["exit_layer"] for each in runner.predict(pairs())] == [3] * len(pairs())
    with pytest.raises(RunnerError, match="which has: none"):
        runner.operating_point(target_saving=0.3)


def test_an_export_is_no_saved_folder(exported: Path) -> None:
    with pytest.raises(UserError, match=r"an ONNX export, which its own runner\.py answers with"):
        EarlyExitClassifier.from_pretrained(exported)
