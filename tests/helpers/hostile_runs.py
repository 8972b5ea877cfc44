"""A run that broke off, copies of it that tests spoil, and what writes hostile content into files.

conftest.py makes the fixtures known to all tests.
"""

import http.client
import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, command
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deebert import EarlyExitClassifier

Run = Callable[..., str]

Content = dict[str, Any]

SECRET = "what-only-the-environment-knows"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


class Reserve:
    """Takes 8 GB when it is unpickled, also where torch lets in weights alone."""

    def __reduce__(self) -> tuple:
        return bytearray, (2**33,)


@pytest.fixture(scope="session")
def broken(glue: Path, made_once: Callable[..., Path]) -> Path:
    """A stage-1 run that broke off after its first epoch."""
    overrides = (
        "task=mrpc", *TINY, f"data.root={glue}", "stages.1.epochs=2", "+trainer.max_steps=12",
        "stages.1.batch_size=8",
        "callbacks.best.monitor=val/score",
    )  # fmt: skip

    def make(folder: Path) -> None:
        command("train.py", *overrides, f"hydra.run.dir={folder}")
        for name in ("best", "last"):
            change(folder, lambda c: config(c)["trainer"].pop("max_steps"), name)

    return made_once("broken", make)


def change(run: Path, what: Callable[[Content], object], name: str = "last") -> Path:
    """Change what a run's checkpoint says; its file."""
    file = run / "checkpoints" / f"{name}.ckpt"
    content = torch.load(file, weights_only=True)
    content.pop("weights_fingerprint", None)
    what(content)
    torch.save(content, file)
    return file


def last_epoch(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["epoch"]


def config(content: Content) -> Content:
    return content["hyper_parameters"]["config"]


@pytest.fixture
def copy(broken: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoiled."""
    return Path(shutil.copytree(broken, tmp_path / "theirs"))


@pytest.fixture
def resume(run: Run, copy: Path, tmp_path: Path) -> Callable[..., str]:
    def go_on(*overrides: str) -> str:
        return run("train.py", f"resume={copy}", "logger=csv", f"hydra.run.dir={tmp_path / 'rest'}", *overrides)  # fmt: skip

    return go_on


def saved(stage2: Path, folder: Path) -> Path:
    EarlyExitClassifier.from_pretrained(stage2).save_pretrained(folder)
    return folder


def say(folder: Path, name: str, what: Callable[[Content], object]) -> None:
    """Change what a file of JSON says."""
    values = json.loads((folder / name).read_text())
    what(values)
    (folder / name).write_text(json.dumps(values))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """An address with an evil pickle, and what was asked of it."""
    torch.save({"x": Evil(tmp_path / "owned")}, tmp_path / "evil.pt")
    content, requests = (tmp_path / "evil.pt").read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as address:
        threading.Thread(target=address.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{address.server_port}/best.ckpt", requests
        address.shutdown()


def rewrite(file: Path, what: Callable[[Content, dict[str, torch.Tensor]], object]) -> None:
    """Change the header and the columns of a record."""
    with safe_open(file, "pt") as content:
        header = json.loads(content.metadata()["deebert"])
    columns = load_file(file)
    header.pop("values", None)
    what(header, columns)
    save_file(columns, file, {"deebert": json.dumps(header)})
