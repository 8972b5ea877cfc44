"""A folder of parts: whose they are, and who may write them."""

import csv
from pathlib import Path

import pytest

from deebert.errors import UserError
from deebert.predict.folder_out import Folder
from deebert.predict.rows_out import Layout

LAYOUT = Layout("csv", ("row",), {})
COUNTS = {"rows": 1}


def begun(folder: Folder, target: str, overwrite: bool = False) -> str | None:
    with folder.alone():
        folder.begin({"target": target}, overwrite, dict)
    return folder.key()


def keep(folder: Folder, row: int, key: str | None) -> None:
    folder.keep(0, 0, LAYOUT, [{"row": row}], [], COUNTS, key)


def test_a_worker_of_another_job_writes_nothing(tmp_path: Path) -> None:
    """It may outlive the process that began its job by a minute."""
    folder = Folder(tmp_path / "out", "csv")
    old = begun(folder, "0.4")
    keep(folder, 1, old)
    new = begun(folder, "0.5", overwrite=True)
    assert old != new
    with pytest.raises(UserError, match="another job was begun here"):
        keep(folder, 1, old)
    assert folder.done() == {}
    keep(folder, 2, new)
    with (tmp_path / "out" / "part-00000-000000.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"row": "2"}]


def test_who_goes_on_has_the_key_of_the_first_start(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out", "csv")
    key = begun(folder, "0.4")
    keep(folder, 1, key)
    assert begun(folder, "0.4") == key
    assert folder.done() == {(0, 0): COUNTS}


def test_parts_without_their_job_are_somebody_s(tmp_path: Path) -> None:
    """A folder of answers that was copied without what begins with an underscore."""
    folder = Folder(tmp_path / "out", "csv")
    keep(folder, 1, begun(folder, "0.4"))
    with folder.alone():
        folder.finish({})
    (tmp_path / "out" / "_job.json").unlink()
    with pytest.raises(UserError, match="is there already; replace it with overwrite=true"):
        begun(folder, "0.4")
    assert (tmp_path / "out" / "part-00000-000000.csv").exists()
    begun(folder, "0.4", overwrite=True)
    assert not (tmp_path / "out" / "part-00000-000000.csv").exists()
