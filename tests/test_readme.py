"""The commands of README and docs: every one composes; the own task and the offline command are run.

Those of docs/use.md and docs/scale.md are run by the tests of what they are about.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, CommandFailed, mrpc_rows
from hydra import compose, initialize_config_dir

from deebert.data import demo
from deebert.export.onnx_folder import ExportOptions
from deebert.options import parse
from deebert.predict.command import PredictOptions
from deebert.reporting.sweep import SweepOptions
from deebert.reporting.wandb import DashboardOptions
from deebert.serve.command import ServeOptions

PAGES = ("calibrate", "clock", "data", "index", "ramps", "sweeps", "train")
FILES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in PAGES)]
TEXT = "\n".join(file.read_text() for file in FILES)
COMMANDS = sorted(
    {
        line.split("  #")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
        for line in block.splitlines()
        if line.startswith(("python ", "deebert "))
    }
    | set(re.findall(r"`((?:python (?:train|evaluate)\.py|deebert \w+) [^`]*=[^`]*)`", TEXT))
)
OPTIONS = {
    "predict": PredictOptions, "serve": ServeOptions, "export": ExportOptions, "sweep": SweepOptions,
    "dashboard": DashboardOptions,
}  # fmt: skip
SHORT = {"logger": "csv", "data.max_length": 48, "data.calibration_size": 0}


def test_links_lead_somewhere() -> None:
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8
    assert any("stage=2 ckpt=" in command for command in COMMANDS)


@pytest.mark.parametrize(
    "command",  # that of Optuna is run by the test of the presets
    [c for c in COMMANDS if "--" not in c and "-m deebert" not in c and "optuna" not in c],
)
def test_every_command_composes(command: str) -> None:
    program, script, *overrides = shlex.split(command)
    if script in OPTIONS and program == "deebert":
        parse(OPTIONS[script], overrides)
        return
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(Path(script).stem, [o for o in overrides if o != "-m" and "," not in o])
    assert "trainer" in cfg


@pytest.mark.slow
@pytest.mark.parametrize("file", ["README.md", "docs/index.md"])
def test_the_python_that_trains(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f'"{r["review"]}",{("bad", "good")[r["label"]]}' for r in demo.rows("train")[:200]]
    (tmp_path / "tickets.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    code = (ROOT / file).read_text().split("```python\n")[1].split("```")[0]
    rows = {"data.limit_train": 200} if 'task="demo"' in code else {}
    code = code.replace('backbone="minilm"', f'backbone="tiny", **{SHORT | rows | epochs(1)}')
    exec(code.replace("stage=2,", f"stage=2, **{epochs(2)},"), {})
    assert re.search(r"expected_saving|label", capsys.readouterr().out)


def epochs(stage: int) -> dict[str, Any]:
    """Settings for a stage that takes seconds."""
    return {"stages": {stage: {"epochs": 1, "lr": 1e-3}}}


@pytest.mark.parametrize("setting", re.findall(r"\| `([a-z][\w.]*=[^`|]*)`", TEXT))
def test_every_change_of_the_table_is_a_setting(setting: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("train", ["task=mrpc", *shlex.split(setting)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    # Those with a module of the user's own are run by the tests of rules and readers of one's own.
    [c for c in COMMANDS if re.match(r"python evaluate.py \S+=RUN", c) and "modules=" not in c],
)
def test_every_evaluation_command_runs(
    command: str, run: Callable[..., str], stage2: Path, glue: Path, tmp_path: Path
) -> None:
    """On a tiny run, where some promises are refused for want of rows."""
    model = stage2
    if "exit=learned" in command:
        model = tmp_path / "learned"
        training = (
            "objective=joint",
            "ramp.predicts=wrong",
            "stages.1.epochs=1",
            f"data.root={glue}",
        )
        run("train.py", "task=mrpc", "stage=1", *TINY, *training, f"hydra.run.dir={model}")
    overrides = [
        o.replace("RUN", str(model)).replace("[1,3,5]", "[1,3]") for o in shlex.split(command)[2:]
    ]
    try:
        printed = run(
            "evaluate.py", *overrides, "logger=csv", f"hydra.run.dir={tmp_path / 'answer'}"
        )
    except CommandFailed as refusal:
        printed = str(refusal)
    answers = "Score against saving|cannot be promised by 40|can reach: about|one for each ramp before the last"
    assert re.search(answers, printed)


@pytest.mark.slow
def test_a_task_of_one_s_own(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = re.search(r"```yaml\n(name: reviews.*?)```", TEXT, re.S).group(1)
    assert len(yaml.splitlines()) <= 8
    (tmp_path / "my" / "task").mkdir(parents=True)
    (tmp_path / "my" / "task" / "reviews.yaml").write_text(yaml)
    (tmp_path / "my" / "reviews").mkdir()
    for split in ("train", "validation"):
        rows = demo.rows(split)[:40]
        lines = [f'{r["product"]},"{r["review"]}",{("bad", "good")[r["label"]]}' for r in rows]
        (tmp_path / "my" / "reviews" / f"{split}.csv").write_text(
            "\n".join(["title,text,verdict", *lines]) + "\n"
        )
    monkeypatch.chdir(tmp_path)
    [command] = [c for c in COMMANDS if "task=reviews" in c]
    assert command in TEXT
    overrides = [o.replace("backbone=minilm", "backbone=tiny") for o in shlex.split(command)[2:]]
    run(
        "train.py",
        *overrides,
        "logger=csv",
        "stages.1.epochs=1",
        f"hydra.run.dir={tmp_path / 'out'}",
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["task"], results["metric"], results["num_rows"]) == ("reviews", "accuracy", 40)
    assert set(results["exits"][0]["scores"]) == {"accuracy", "f1"}


def test_the_offline_command(run: Callable[..., str], glue: Path, tmp_path: Path) -> None:
    [command] = [c for c in COMMANDS if "data.root=DIR" in c]
    overrides = [
        o.replace("DIR", str(glue)).replace("minilm", "tiny") for o in shlex.split(command)[2:]
    ]
    run(
        "train.py",
        *overrides,
        "logger=csv",
        "data.max_length=64",
        "stages.1.epochs=1",
        f"hydra.run.dir={tmp_path}",
    )
    assert (
        len(mrpc_rows("validation", 40))
        == json.loads((tmp_path / "results.json").read_text())["num_rows"]
    )
