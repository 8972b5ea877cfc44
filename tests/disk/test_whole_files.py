"""Files that are whole or missing, with the permissions of the user's umask; locks."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.disks import limited_files
from safetensors.torch import save_file

from deebert.disk import locks, whole_files
from deebert.errors import UserError

TENSORS = {"x": torch.arange(100_000)}


def of_torch(part: Path) -> None:
    with part.open("wb") as stream:
        torch.save(TENSORS, stream)


# The three ways in which the packages write.
WRITES: dict[str, Callable[[Path], object]] = {
    "bytes": lambda part: part.write_bytes(b"x" * 800_000),
    "torch": of_torch,
    "safetensors": lambda part: save_file(TENSORS, part),
}


def test_modes_and_full_disks(tmp_path: Path) -> None:
    for name, write in WRITES.items():
        file = tmp_path / "new folder" / name
        before = os.umask(0o027)
        try:
            with whole_files.replaced(file) as part:
                write(part)
        finally:
            os.umask(before)
        assert stat.S_IMODE(file.stat().st_mode) == 0o640, name
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o750
        content = file.read_bytes()
        with (
            limited_files(100_000),
            pytest.raises(OSError, match="File too large") as error,
            whole_files.replaced(file) as part,
        ):
            write(part)
        assert error.value.filename == str(file.parent), name
        assert file.read_bytes() == content, "the old file stays"
        assert [each.name for each in file.parent.iterdir()] == [name], "no half of a file stays"
        file.unlink()


def test_other_errors_pass_and_links_are_not_followed(tmp_path: Path) -> None:
    file, mine = tmp_path / "a", tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / ".a.part").symlink_to(mine)
    whole_files.replace(file, "new")
    assert (file.read_text(), mine.read_text(), file.is_symlink()) == ("new", "mine", False)
    for kind in (UserError, ValueError, KeyboardInterrupt):
        with pytest.raises(kind, match="as it is"), whole_files.replaced(file):
            raise kind("as it is")
    assert file.read_text() == "new"
    says = r"^the place: it cannot be written \(.*\); so$"
    with pytest.raises(UserError, match=says), whole_files.write_errors("the place", "; so"):
        whole_files.replace(mine / "below a file", "x")


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    file = tmp_path / "folder" / ".lock"
    program = f"""
import sys, time
from pathlib import Path
from deebert.disk.locks import locked
lock = locked(Path({str(file)!r}), "")
print("locked", flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="another holds it"):
        locks.locked(file, "another holds it")
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    locks.locked(file, "another holds it").release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_is_the_lock_where_the_file_system_has_none(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = locks.locked(tmp_path / "lock", "taken")
    with pytest.raises(UserError, match="taken"):
        locks.locked(tmp_path / "lock", "taken")
    lock.release()
    locks.locked(tmp_path / "lock", "taken").release()
