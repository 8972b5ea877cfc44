"""Streams that are closed, full or no longer read: one line, and the right exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.tables import many, read

pytestmark = pytest.mark.slow


def shell(line: str) -> subprocess.CompletedProcess[str]:
    own = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=own, capture_output=True, text=True, timeout=120
    )


def test_closed_full_and_unread_streams(stage2: Path, tmp_path: Path) -> None:
    given = many(tmp_path / "in.csv", 30)
    cases = (
        ("input=- format=csv", "<&-", 2, "Error: input=-: stdin is closed; give a file, or pipe the rows in"),
        (f"input={given}", ">/dev/full", 2, "Error: stdout: it cannot be written (No space left on device)"),
        (f"input={given}", ">&-", 0, None),
        (f"input={given}", "2>&-", 0, None),
        (f"input={given}", "| true; exit ${PIPESTATUS[0]}", 1, None),
    )  # fmt: skip
    for number, (words, stream, code, line) in enumerate(cases):
        output = tmp_path / f"{number}.csv"
        done = shell(
            f'"$PYTHON" -m deebert predict model={stage2} {words} output={output} {stream}'
        )
        assert done.returncode == code, (stream, done.stderr)
        assert done.stderr.splitlines()[-1:] == ([line] if line else []), stream
        assert "Traceback" not in done.stderr
        if words.endswith("in.csv"):
            assert len(read(output)) == 29, "the work is done"


def test_a_run_whose_tables_cannot_be_printed(stage2: Path, tmp_path: Path) -> None:
    done = shell(
        f'"$PYTHON" evaluate.py record={stage2} threshold=0.3 hydra.run.dir={tmp_path} >/dev/full'
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "results.json").exists()
