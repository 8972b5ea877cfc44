"""`benchmarks/fuzz.py`: a few of its cases, and whether it notices what is wrong."""

import http.client
import http.server
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", os.environ["HF_HOME"])  # it changes more of the environment
        patch.syspath_prepend(ROOT / "benchmarks")
        before = dict(os.environ)
        import fuzz

        yield fuzz
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.slow
def test_a_short_fuzz(tmp_path: Path) -> None:
    """As many cases as there are makers."""
    command = [sys.executable, "benchmarks/fuzz.py", "--cases", "11", "--seed", "3", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    cases = json.loads((tmp_path / "fuzz.json").read_text())["cases"]
    # Seconds and megabytes are for a quiet machine: those faults alone begin with a number.
    faults = {row["case"]: [f for f in row["faults"] if not f[0].isdigit()] for row in cases}
    assert not any(faults.values()), (faults, done.stdout[-2000:])
    assert len(cases) == 11
    assert sum(row["outcome"] == "refused" for row in cases) > 4
    assert "| all | 11 |" in (tmp_path / "fuzz.md").read_text()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("code", "code ran"), ("process", "os.system"), ("connection", "socket.connect"),
        ("outside", "open"), ("secret", "shows a secret"), ("traceback", "traceback"),
        ("memory", " MB"), ("crash", "killed"), ("time", " s"), ("nothing", ""),
    ],
)  # fmt: skip
def test_the_fuzz_sees_what_is_wrong(fuzz: Any, tmp_path: Path, what: str, fault: str) -> None:
    """A fault that it could not see would never be found."""
    place, out, bait = tmp_path / "place", tmp_path / "place" / "out", tmp_path / "bait"
    out.mkdir(parents=True)
    bait.mkdir()

    def raises() -> None:
        raise KeyError("x")

    deeds: dict[str, Callable[[], object]] = {
        "code": lambda: (bait / "owned").mkdir(),
        "process": lambda: os.system("true"),
        "connection": lambda: http.client.HTTPConnection("127.0.0.1", 9).connect(),
        "outside": lambda: (tmp_path / "x").write_text("x"),
        "secret": lambda: (out / "x").write_text(f"a {fuzz.SECRETS[0]}"),
        "traceback": raises,
        "memory": lambda: bytearray(b"x") * (600 * 2**20),
        "crash": lambda: os.kill(os.getpid(), 11),
        "time": lambda: time.sleep(1.1),
        "nothing": lambda: (out / "x").write_text("x"),
    }
    faults = fuzz.observe(deeds[what], place, out, bait, 1.0)["faults"]
    assert any(fault in each for each in faults) if fault else not faults
