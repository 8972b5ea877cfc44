"""Work in parts: killed at each single step that it takes on the disk, it ends as if it never was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.disks import limited_files

from deebert.errors import UserError
from deebert.predict import parts
from deebert.predict.parts import Parts

# Small enough to be run again and again; dies before the step on the disk of this number.
WORK = """
import os, signal, sys
from pathlib import Path
from deebert.predict import parts
from deebert.predict.parts import Parts

STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

def work(output, overwrite=False):
    def join(files, file):
        file.write_bytes(b"head " + b"".join(each.read_bytes() for each in files))
    parts.check(output, overwrite)
    with Parts(output) as kept:
        job = {"what": ["a", "test"]}
        told = kept.ended(job)
        if told is None:
            found = kept.begin(job, overwrite, lambda: {"pid": os.getpid()})
            for number in range(len(kept.done), 3):
                bad = b"bad %d " % number if number else b""
                kept.add(b"part %d " % number, bad, {"rows": 10})
            told = {"rows": sum(about["rows"] for about in kept.done)}
            kept.finish(job, join, told)
    assert told == {"rows": 30}

def steps(output, most, overwrite):
    taken = 0
    def count(event, arguments):
        nonlocal taken
        if event in STEPS and str(output) in str(arguments[0]):
            taken += 1
            if taken == most:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    work(output, overwrite)

def forked(call, *arguments):
    child = os.fork()
    if not child:
        code = 1
        try:
            call(*arguments)
            code = 0
        except parts.UserError as error:
            print(error)
            code = 2
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

folder = Path(sys.argv[1])
for before in (False, True):  # is there an output that is replaced?
    for step in range(1, 1000):
        output = folder / f"{before}{step}.csv"
        if before:
            output.write_bytes(b"old")
            parts.errors_of(output).write_bytes(b"old")
        code = forked(steps, output, step, before)
        assert code in (0, -signal.SIGKILL), code
        if code == 0:
            break
        if before:
            assert output.read_bytes() in (b"old", b"head part 0 part 1 part 2 ")
        elif output.exists():
            assert output.read_bytes() == b"head part 0 part 1 part 2 "
        ready = output.exists() and output.read_bytes() != b"old"
        begun = parts.parts_of(output).exists()
        again = forked(work, output, before and not begun)
        if again == 2:  # killed before it had noted that the old one may go, or after all was done
            assert ready or (before and output.read_bytes() == b"old")
            if not ready:
                assert forked(work, output, True) == 0
        else:
            assert again == 0
        assert output.read_bytes() == b"head part 0 part 1 part 2 ", step
        assert parts.errors_of(output).read_bytes() == b"bad 1 bad 2 ", step
        assert not parts.parts_of(output).exists(), step
    print(before, step)
"""


@pytest.mark.slow
def test_killed_at_each_step(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-u", "-c", WORK, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ends = [line.split() for line in done.stdout.splitlines() if line.startswith(("False", "True"))]
    assert [before for before, _ in ends] == ["False", "True"]
    assert all(int(steps) > 30 for _, steps in ends), "it was killed at many steps"


def begun(output: Path, job: dict, number: int = 2) -> None:
    with Parts(output) as kept:
        kept.begin(job, False, lambda: {"threshold": 0.25})
        for _ in range(number):
            kept.add(b"rows", b"", {"rows": 1})


def test_what_was_chosen_at_the_first_start_stays(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    begun(output, {"a": (1, 2)})
    with Parts(output) as kept:
        assert kept.begin({"a": (1, 2)}, False, dict) == {"threshold": 0.25}
        assert len(kept.done) == 2
        assert kept.begin({"a": (1, 2)}, True, lambda: {"threshold": 0.5}) == {"threshold": 0.5}
        assert kept.done == []
    names = {file.name for file in parts.parts_of(output).iterdir()}
    assert names - {"lock"} == {"job.json"}, "begun anew"


def test_a_damaged_part_is_done_again(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    begun(output, {}, 3)
    (parts.parts_of(output) / "000001.rows").write_bytes(b"row")
    with Parts(output) as kept:
        kept.begin({}, False, dict)
        assert len(kept.done) == 1


def test_refuses_another_job_and_what_is_there(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    begun(output, {"model": "a", "target": {"target_saving": 0.4}})
    with Parts(output) as kept, pytest.raises(UserError, match="another job, of model=a and not b"):
        kept.begin({"model": "b", "target": {"target_saving": 0.4}}, False, dict)
    output.write_text("finished")
    parts.check(output, False)  # it may be one that was to be replaced
    with Parts(output) as kept, pytest.raises(UserError, match="is there already"):
        kept.begin({"model": "a", "target": {"target_saving": 0.4}}, False, dict)
    assert len(list(parts.parts_of(output).glob("*.rows"))) == 2, "nothing was removed"


def test_refuses_a_place_that_is_not_its_own(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    output.write_text("finished")
    with pytest.raises(UserError, match="is there already"):
        parts.check(output, False)
    parts.check(output, True)
    folder = parts.parts_of(output)
    folder.mkdir()
    (folder / "letters.txt").write_text("dear")
    with pytest.raises(UserError, match="not made by this program"):
        parts.check(output, True)
    with pytest.raises(UserError, match="there is no folder"):
        parts.check(tmp_path / "no" / "out.csv", False)
    with pytest.raises(UserError, match="is a folder"):
        parts.check(tmp_path, False)


def test_only_one_process_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    program = f"""
from pathlib import Path
from deebert.predict.parts import Parts
from deebert.errors import UserError
try:
    Parts(Path({str(output)!r})).__enter__()
except UserError as error:
    print(error)
"""
    with Parts(output) as kept:
        kept.begin({}, False, dict)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    assert "another process is writing it" in done.stdout, done.stderr


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    with Parts(output) as kept:
        kept.begin({}, False, dict)
        with limited_files(1), pytest.raises(UserError, match="File too large") as error:
            kept.add(b"rows", b"", {})
    assert "\n" not in str(error.value)
    assert json.loads((parts.parts_of(output) / "job.json").read_text())["job"] == {}
