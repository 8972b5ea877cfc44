"""Saved folders and records that somebody else wrote: links, pipes, wrong types and sizes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hostile_runs import Content, Run, rewrite, saved, say

from deebert import EarlyExitClassifier
from deebert.errors import UserError


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "config.json", "model.safetensors", "records"])  # fmt: skip
def test_a_link_does_not_lead_out_of_a_saved_folder(
    stage2: Path, tmp_path: Path, name: str
) -> None:
    folder = saved(stage2, tmp_path / "saved")
    file = folder / name
    outside = tmp_path / "outside" / name
    outside.parent.mkdir()
    if file.exists():
        shutil.move(file, outside)  # valid as it is
    else:
        outside.write_text("secret")
        say(folder, "deebert.json", lambda about: about["tokenizer"].append(name))
    file.symlink_to(outside)
    with pytest.raises(UserError, match=r"is a link that leads out of the folder"):
        EarlyExitClassifier.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_hub_snapshot_s_links_lead_into_its_cache(stage2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--me--it" / "snapshots" / "abc"
    saved(stage2, folder)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(p for p in list(folder.rglob("*")) if p.is_file()):
        shutil.move(file, blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    assert EarlyExitClassifier.from_pretrained(folder).predict([("a", "b")]).exit_layers == [3]
    (folder / "config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    (folder / "config.json").symlink_to("../../../config.json")
    with pytest.raises(UserError, match=r"config\.json is a link that leads out of the folder"):
        EarlyExitClassifier.from_pretrained(folder)


@pytest.mark.parametrize("place", ["README.md", "records", "records/validation.safetensors"])
def test_saving_over_a_folder_writes_and_removes_nothing_elsewhere(
    stage2: Path, tmp_path: Path, place: str
) -> None:
    folder, outside = saved(stage2, tmp_path / "saved"), tmp_path / "outside"
    outside.mkdir()
    (outside / "validation.safetensors").write_text("mine")
    (outside / "README.md").write_text("mine")
    path = folder / place
    if path.is_dir():
        shutil.rmtree(path)
        path.symlink_to(outside)
    else:
        path.unlink()
        path.symlink_to(outside / path.name)
    with pytest.raises(UserError, match=rf"{path.name} is a link, or no file of its own"):
        EarlyExitClassifier.from_pretrained(stage2).save_pretrained(folder)
    assert {file.read_text() for file in outside.iterdir()} == {"mine"}


@pytest.mark.parametrize("what", ["pipe", "folder", "loop", "device", "empty"])
@pytest.mark.parametrize("name", ["deebert.json", "config.json", "model.safetensors", "tokenizer.json"])  # fmt: skip
def test_what_is_no_regular_file_is_refused(
    stage2: Path, tmp_path: Path, name: str, what: str
) -> None:
    folder = saved(stage2, tmp_path / "saved")
    file = folder / name
    file.unlink()
    {
        "pipe": lambda: os.mkfifo(file), "folder": file.mkdir, "empty": file.touch,
        "loop": lambda: file.symlink_to(name), "device": lambda: file.symlink_to("/dev/zero"),
    }[what]()  # fmt: skip
    with pytest.raises(UserError) as error:
        EarlyExitClassifier.from_pretrained(folder)
    assert "\n" not in str(error.value)


NASTY: list[Any] = [
    None, True, -1, 2.5, "x", "", [], {}, [[]], {"a": 1}, 10**18, "../../x", "a\nb", "???", "\x1b[2J",
    float("nan"), float("inf"), "x" * 100_000,
]  # fmt: skip


def test_wrong_types_in_a_saved_folder_are_never_a_traceback(stage2: Path, tmp_path: Path) -> None:
    folder = saved(stage2, tmp_path / "saved")
    original = (folder / "deebert.json").read_text()
    places = [(key,) for key in json.loads(original)]
    places += [("config", key) for key in json.loads(original)["config"]]
    places += [("config", block, key) for block in ("task", "data", "backbone") for key in json.loads(original)["config"][block]]  # fmt: skip
    for number, place in enumerate(places):
        for value in NASTY[number % 3 :: 3]:
            about = json.loads(original)
            inner = about
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            (folder / "deebert.json").write_text(json.dumps(about))
            try:
                EarlyExitClassifier.from_pretrained(folder).predict([("a", "b")])
            except UserError as error:
                assert str(error).isprintable(), (place, value)  # noqa: PT017


def test_a_hostile_record_is_refused_before_it_costs(
    fails: Run, stage2: Path, tmp_path: Path
) -> None:
    [original] = (stage2 / "records").iterdir()
    cases: dict[str, tuple[Callable[[Content, dict[str, torch.Tensor]], object], str]] = {
        "lengths": (lambda _, c: c["length_N"].fill_(2 * 10**8), "its inputs have from 200000000 to 200000000 tokens"),
        "ramps": (lambda _, c: c.update(logits_NLC=torch.zeros(40, 20_000, 2)), "it has 20000 ramps"),
        "not a number": (lambda _, c: c["logits_NLC"].fill_(float("nan")), "logits that are not finite"),
        "a type": (lambda _, c: c.update(index_N=c["index_N"].float()), "its index_N is (40,) torch.float32"),
        "groups": (lambda _, c: c.update(logits_NLC=torch.zeros(600, 3, 2), group_N=torch.arange(600), **{n: torch.zeros(600, dtype=torch.long) for n in ("labels_N", "index_N", "length_N")}), "its rows are of more than 500 groups"),
        "a column": (lambda _, c: c.update(evil_N=torch.zeros(40)), "not a record of this program"),
        "a callable": (lambda h, _: h["config"]["task"].update(_target_="os.system"), "its task._target_ is no setting"),
        "a deep header": (lambda h, _: h.update(x=json.loads("[" * 900 + "]" * 900)), "too deep inside others"),
    }  # fmt: skip
    for name, (what, says) in cases.items():
        (tmp_path / name / "records").mkdir(parents=True)
        file = Path(shutil.copy(original, tmp_path / name / "records"))
        rewrite(file, what)
        line = fails("evaluate.py", f"record={tmp_path / name}", f"hydra.run.dir={tmp_path / 'out'}")  # fmt: skip
        assert says in line, name


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("README.md", "pipe"),
        ("tokenizer.json", "folder"),
        (".saving", "hard link"),
        ("records", "pipe"),
    ],
)
def test_saving_over_what_is_no_file_of_its_own(
    stage2: Path, tmp_path: Path, place: str, what: str
) -> None:
    folder, mine = saved(stage2, tmp_path / "saved"), tmp_path / "mine"
    mine.write_text("mine")
    if (folder / place).is_dir():
        shutil.rmtree(folder / place)
    (folder / place).unlink(missing_ok=True)
    {"pipe": lambda: os.mkfifo(folder / place), "folder": (folder / place).mkdir, "hard link": lambda: os.link(mine, folder / place)}[what]()  # fmt: skip
    with pytest.raises(UserError, match="is a link, or no file of its own"):
        EarlyExitClassifier.from_pretrained(stage2).save_pretrained(folder)
    assert mine.read_text() == "mine"
