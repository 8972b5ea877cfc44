"""A rule of one's own is one function and one YAML file: evaluate, Python, files, HTTP, ONNX."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, results

from deebert import EarlyExitClassifier
from deebert.errors import UserError
from deebert.exits import rules
from deebert.exits.rules import ExitScores, Rule, exit_rule
from deebert.export import onnx_folder
from deebert.export.onnx_runner import Runner
from deebert.export.rule_graph import rule_graph
from deebert.options import import_modules, parse
from deebert.predict.command import predict
from deebert.predict.work import PredictOptions
from deebert.serve.predictor import described
from deebert.serve.replies import prepared, replies

MODULE = '''
from deebert import exit_rule


@exit_rule("my_rule", largest=1.0, looks_back=True)
def my_rule(logits_NLC, ramps: int = 2):
    """1 - the mean of the largest probabilities of the last ramps."""
    best_NL = logits_NLC.softmax(-1).amax(-1)
    before_NL = best_NL[:, :1].expand(-1, ramps - 1)
    return 1 - torch_mean(before_NL, best_NL, ramps)


def torch_mean(before_NL, best_NL, ramps):
    import torch

    return torch.cat([before_NL, best_NL], 1).unfold(1, ramps, 1).mean(-1)
'''
PAIRS = [(f"a film {i}", f"{'no ' * (i % 5)}film of {i % 7}") for i in range(40)]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module and its configuration, as the working directory."""
    (tmp_path / "conf" / "exit").mkdir(parents=True)
    (tmp_path / "my_rules_of_a_test.py").write_text(MODULE)
    (tmp_path / "conf" / "exit" / "my_rule.yaml").write_text(
        "{name: my_rule, module: my_rules_of_a_test, ramps: 2}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    rules.RULES.pop("my_rule", None)
    sys.modules.pop("my_rules_of_a_test", None)


def between(classifier: EarlyExitClassifier, rule: Rule) -> list[float]:
    """A threshold for each ramp that lets some rows leave and that rounding does not reach."""
    run = classifier.engine.at(0.0).run(classifier.encode(PAIRS), all_ramps=True)
    thresholds = []
    for score_N in rule(run.ramps_NLC).score_NL[:, :-1].unbind(1):
        middle = score_N.sort().values[10:30]
        widest = int(middle.diff().argmax())
        thresholds.append(middle[widest : widest + 2].mean().item())
    return thresholds


def test_everywhere(own: Path, stage2: Path, run: Callable[..., str]) -> None:
    config = ("--config-dir", str(own / "conf"), f"record={stage2}", "exit=my_rule")
    run("evaluate.py", *config, "target_saving=0.3", f"hydra.run.dir={own / 'out'}")
    result = results(own / "out")
    assert result["exit"] == {"name": "my_rule", "ramps": 2}
    classifier = EarlyExitClassifier.from_pretrained(stage2)
    point = classifier.calibrate(exit="my_rule", target_saving=0.3)
    assert point.rule.options == {"ramps": 2}
    thresholds = between(classifier, point.rule)
    expected = classifier.predict(PAIRS, exit="my_rule", threshold=thresholds)
    assert len(set(expected.exit_layers)) > 1

    run("evaluate.py", *config, "exit.ramps=1", "threshold=1.1", f"hydra.run.dir={own / 'one'}")
    assert results(own / "one")["exit"] == {"name": "my_rule", "ramps": 1}
    assert results(own / "one")["curve"][0]["exit_counts"] == [40, 0, 0]
    config = (f"record={stage2}", "modules=[my_rules_of_a_test]", "+exit.name=my_rule")
    run("evaluate.py", *config, "target_saving=0.3", f"hydra.run.dir={own / 'named'}")
    assert results(own / "named")["curve"] == result["curve"]

    lines = [{"sentence1": first, "sentence2": second} for first, second in PAIRS]
    Path("in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    options = [f"model={stage2}", "exit=my_rule", f"threshold={thresholds}"]
    predict(parse(PredictOptions, [*options, "input=in.jsonl", "output=out.jsonl"]))
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["exit_layer"] for row in rows] == expected.exit_layers
    assert [row["label"] for row in rows] == expected.labels

    onnx_folder.export(classifier, "exported", exit="my_rule", threshold=thresholds)
    answers = Runner("exported", threads=1).predict(PAIRS)
    assert [each["exit_layer"] for each in answers] == expected.exit_layers


def test_served(own: Path, stage2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deebert.serve.command import ServeOptions
    from deebert.serve.requests import Limits, Request, work

    import_modules(["my_rules_of_a_test"])
    classifier = EarlyExitClassifier.from_pretrained(stage2)
    thresholds = between(classifier, rules.named("my_rule", 2))
    options = ServeOptions(model=str(stage2), exit="my_rule", threshold=thresholds)
    about = described(classifier, options)
    assert about.exit == "my_rule"
    request = Request(texts=[list(pair) for pair in PAIRS])
    work_of_it = work(request, Limits(len(PAIRS), 10_000), about.columns, about.target)
    [(_, reply)] = replies(classifier, [prepared(classifier, 0, work_of_it)])
    expected = classifier.predict(PAIRS, exit="my_rule", threshold=thresholds)
    assert len(set(expected.exit_layers)) > 1
    assert list(reply.exit_layers) == expected.exit_layers


@pytest.mark.slow
def test_by_the_command_line(own: Path, stage2: Path) -> None:
    """In a process of its own, where nothing has been imported before."""
    command = [sys.executable, "-m", "deebert", "export", f"model={stage2}", "exit=my_rule"]
    done = subprocess.run(
        [*command, "target_saving=0.3", "output=exported", "modules=[my_rules_of_a_test]"],
        capture_output=True, text=True, timeout=280, env={"PYTHONPATH": str(ROOT), "HOME": str(own)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(Path("exported/deebert.json").read_text())["rule"]["name"] == "my_rule"


@pytest.fixture
def registered() -> Iterator[None]:
    """Forgets the rules that a test registers."""
    before = dict(rules.RULES)
    yield
    for name in set(rules.RULES) - set(before):
        del rules.RULES[name]


@pytest.mark.parametrize(
    ("facts", "function", "says"),
    [
        ({}, lambda logits: logits, r"its function must give .* = \(2, 4\), or ExitScores"),
        ({}, lambda logits: 1 / 0, "its function fails: division by zero"),
        ({}, lambda logits: logits[..., 0] - logits.mean((1, 2))[:, None], "on the ramps after it"),
        ({"looks_back": False}, lambda logits: logits[..., 0].cumsum(1), "say looks_back=True"),
        ({"reads": "learned_score"}, lambda score: score, "reads each ramp alone; say looks_back=False"),
        ({"regression": True}, lambda logits: logits[..., 0], "exit=own is for a regression"),
    ],
)  # fmt: skip
def test_a_function_that_does_not_work(
    facts: dict, function: Callable, says: str, registered: None
) -> None:
    exit_rule("own", **facts)(function)
    with pytest.raises(UserError, match=f"exit=own.*{says}|{says}") as error:
        rules.named("own", 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"largest": "abc"}, "largest=abc must be a number above 0, or None"),
        ({"largest": -1}, "largest=-1 must be a number above 0, or None"),
        ({"regression": "maybe"}, "regression=maybe must be True or False"),
        ({"looks_back": 1}, "looks_back=1 must be True or False"),
        ({"reads": "states"}, "reads 'states' is unknown; choose one of: logits, learned_score"),
    ],
)
def test_facts_that_are_none(facts: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        exit_rule("own", **facts)


def test_names_and_options(registered: None) -> None:
    with pytest.raises(UserError, match=r"deebert.exits.rules has a rule of that name"):
        exit_rule("entropy")(lambda logits: logits[..., 0])
    with pytest.raises(UserError, match="option power of its function needs a default"):
        exit_rule("own")(lambda logits, power: logits[..., 0] ** power)
    with pytest.raises(UserError, match="option prior of its function needs another name"):
        exit_rule("own")(lambda logits, prior=None: logits[..., 0])
    with pytest.raises(
        UserError, match=r"exit.power: exit=entropy has no such option; it has none"
    ):
        rules.named("entropy", 3, power=2)
    with pytest.raises(UserError, match=r"exit.patience=0 must be a whole number"):
        rules.named("change", 1, patience=0)


def test_a_cell_that_is_run_again(stage2: Path, registered: None) -> None:
    classifier = EarlyExitClassifier.from_pretrained(stage2)
    for score, layer in ((0.0, 1), (2.0, 3)):

        @exit_rule("own", looks_back=False)
        def own(logits_NLC: torch.Tensor, score: float = score) -> torch.Tensor:
            return torch.full_like(logits_NLC[..., 0], score)

        answers = classifier.predict(PAIRS, exit="own", threshold=1.0)
        assert set(answers.exit_layers) == {layer}


def with_len(logits_NLC: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(logits_NLC), 1) + logits_NLC.softmax(-1).amin(-1)


def with_a_branch(logits_NLC: torch.Tensor) -> torch.Tensor:
    score_NL = logits_NLC.softmax(-1).amin(-1)
    return score_NL * 2 if score_NL.max() > 9 else score_NL


def with_memory(logits_NLC: torch.Tensor) -> ExitScores:
    score_NL = logits_NLC.softmax(-1).amin(-1)
    return ExitScores(score_NL, logits_NLC + (1.0 if torch.compiler.is_exporting() else 0.0))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (with_len, r"fails with another number of rows \(write logits.shape\[0\]"),
        (with_a_branch, "cannot be translated to ONNX: "),
        (with_memory, "translated to ONNX, gives another answer"),
    ],
)
def test_what_is_not_exported(
    function: Callable, says: str, registered: None, capfd: pytest.CaptureFixture[str]
) -> None:
    exit_rule("own", looks_back=False)(function)
    with pytest.raises(
        UserError, match=rf"^exit=own cannot be exported: its function.*{says}"
    ) as error:
        rule_graph(rules.named("own", 3), 4)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
