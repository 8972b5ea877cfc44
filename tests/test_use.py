"""docs/use.md and the Python of the README, as written but for the model and its texts."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, mrpc_rows

from deebert.options import parse
from deebert.serve.command import ServeOptions

USE = (ROOT / "docs" / "use.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/use.md")}
SNIPPETS = [
    (name, code)
    for name, text in PAGES.items()
    for code in re.findall(r"```python\n(.*?)```", text, re.S)
    if "EarlyExitClassifier" in code  # the others are run in test_from_python, test_transformers
]
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", USE, re.S)
    for line in block.splitlines()
]


@pytest.mark.parametrize(("file", "code"), SNIPPETS)
def test_snippet(
    file: str, code: str, stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    pairs = '[("a fine film", "a film"), ("no", "yes")]'  # the tiny model reads pairs
    code = code.replace('"RUN"', repr(str(stage2))).replace('["a fine film", "no"]', pairs)
    exec(code.replace("max_drop=0.02", "max_drop=0.2"), {})  # 40 rows promise no more
    printed = capsys.readouterr().out
    assert re.search(r"0\.\d+", printed)
    assert "equivalent" in printed
    assert ("save_pretrained" in code) == (tmp_path / "folder" / "deebert.json").is_file()


def command(start: str) -> list[str]:
    [match] = [line for line in COMMANDS if line.startswith(start)]
    return shlex.split(match)


@pytest.mark.slow
def test_files(
    run: Callable[..., str], stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command in this process, and the one with a pipe in a process of its own."""
    monkeypatch.chdir(tmp_path)
    rows = [(row["sentence1"], row["sentence2"]) for row in mrpc_rows("test", 30)]
    lines = ["sentence1,sentence2", *(f'"{a}","{b}"' for a, b in rows)]
    (tmp_path / "reviews.csv").write_text("\n".join(lines) + "\n")
    printed = run("-m", *(word.replace("RUN", str(stage2)) for word in command("deebert predict")))
    assert (tmp_path / "out.parquet").is_file(), printed
    _, piped = " ".join(command("cat reviews.csv")).split(" | ")
    with (tmp_path / "reviews.csv").open() as given:
        python(shlex.split(piped), stage2, tmp_path, given)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 31


@pytest.mark.slow
def test_export(
    run: Callable[..., str], stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("-m", *(word.replace("RUN", str(stage2)) for word in command("deebert export")))
    (tmp_path / "texts.jsonl").write_text('["a fine film", "a film"]\n["no", "yes"]\n')
    words = command("python exported/runner.py")[:3]  # without its < and >
    with (tmp_path / "texts.jsonl").open() as given:
        printed = python(words, stage2, tmp_path, given)
    assert printed.count("exit_layer") == 2


def test_serve_takes_these_options() -> None:
    options = parse(ServeOptions, command("deebert serve")[2:])
    assert (options.port, options.target_saving) == (8000, 0.4)


def python(words: list[str], run: Path, folder: Path, given=None) -> str:
    start = ["-m", "deebert"] if words[0] == "deebert" else []
    words = [sys.executable, *start, *(part.replace("RUN", str(run)) for part in words[1:])]
    done = subprocess.run(
        words, cwd=folder, stdin=given, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
