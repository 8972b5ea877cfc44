"""The packages: what they import, what is in the wheel, how large they are."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "deebert"
PACKAGES = sorted(file.parent for file in PACKAGE.rglob("__init__.py"))
RUNNER = PACKAGE / "export" / "onnx_runner.py"  # one file by design: it is copied into exports


@pytest.mark.slow
def test_neither_lightning_nor_hydra_is_loaded() -> None:
    code = "import sys\n"
    for package in ("exits", "models", "inference"):  # in one process: an import stays
        modules = sorted(file.stem for file in (PACKAGE / package).glob("*.py"))
        names = [f"deebert.{package}.{name}".removesuffix(".__init__") for name in modules]
        code += f"import {', '.join(names)}\n"
        code += f"assert not {{'lightning', 'hydra'}} & {{*sys.modules}}, {package!r}\n"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.slow
def test_the_wheel_holds_every_package_and_every_configuration(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
    ]
    copy = tmp_path / "copy"  # a build leaves files in the folder that it is run in
    for name in ("deebert", "conf"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([*command, str(tmp_path), str(copy)], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        there = set(archive.namelist())
    files = [file for file in PACKAGE.rglob("*") if file.suffix in (".py", ".html", ".typed")]
    wanted = {str(file.relative_to(ROOT)) for file in files}
    wanted |= {f"deebert/{file.relative_to(ROOT)}" for file in (ROOT / "conf").rglob("*.yaml")}
    assert sorted(wanted - there) == []


def test_few_modules_stand_at_the_top_and_none_is_long() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 7
    lengths = {file: len(file.read_text("utf-8").splitlines()) for file in PACKAGE.rglob("*.py")}
    long = {str(file): lines for file, lines in lengths.items() if lines > 400 and file != RUNNER}
    assert not long


@pytest.mark.parametrize("package", PACKAGES, ids=lambda folder: folder.name)
def test_every_package_says_what_is_inside(package: Path) -> None:
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text("utf-8"))) or ""
    if package != PACKAGE:
        missing = [file.stem for file in package.glob("[!_]*.py") if f"`{file.stem}`" not in text]
        assert not missing
    assert text
