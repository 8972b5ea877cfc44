"""Models by the name of a repository: from a hub on this machine, from its cache, and what is not there."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.conversion_folders import golden_folder
from helpers.golden_models import NAMES

from deebert import EarlyExitClassifier
from deebert.errors import UserError


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("ji-xin/bert_base-MRPC-two_stage", "no such file or folder here, and the hub cannot be asked ("),
        ("ji-xin/bert_base-MRPC-two_stage", "hf download ji-xin/bert_base-MRPC-two_stage --local-dir FOLDER"),
        ("runs/of-long-ago", "no such file or folder here, and the hub"),
        ("runs/best.ckpt", "no such file or folder; give a run folder"),
        ("../elsewhere", "no such file or folder; give a run folder"),
        ("a/../b", "no such file or folder; give a run folder"),
        ("a/b/c", "no such file or folder; give a run folder"),
        ("nowhere", "no such file or folder; give a run folder"),
    ],
)  # fmt: skip
def test_what_is_not_there(given: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        EarlyExitClassifier.from_pretrained(given, task="mrpc")
    assert says in str(error.value)
    assert str(error.value).startswith(f"model={given}: ")
    assert "\n" not in str(error.value)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no deebert.json .* and no config.json \(a published"):
        EarlyExitClassifier.from_pretrained(tmp_path)


SHA = "0" * 39 + "1"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str], Path]]:
    """A hub on this machine: its address, the files it was asked for, and the folder that it has as
    `me/it`. It never answers about `me/slow`, and after /off about nothing."""
    requests: list[str] = []
    folder, over = tmp_path / "repository", threading.Event()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
            if path == "/off":
                server.off = True
            if path == "/api/models/me/slow" or server.off:
                over.wait(0.0 if server.off else 60.0)
                self.close_connection = True
            elif path.startswith(resolved := f"/me/it/resolve/{SHA}/"):
                name = path.removeprefix(resolved)
                requests.append(name)
                self.answer((folder / name).read_bytes(), {"ETag": f'"{name}"'})
            elif path in ("/api/models/me/it", "/api/models/me/it/revision/main"):
                siblings = [{"rfilename": file} for file in files]
                self.answer({"id": "me/it", "sha": SHA, "siblings": siblings})
            elif path == f"/api/models/me/it/tree/{SHA}":
                sizes = {file: (folder / file).stat().st_size for file in files}
                self.answer([{"type": "file", "path": f, "size": s, "oid": f} for f, s in sizes.items()])  # fmt: skip
            else:
                self.answer({"error": "not found"}, {"X-Error-Code": "RepoNotFound"}, 404)

        do_HEAD = do_GET

        def answer(self, content: object, headers: dict | None = None, status: int = 200) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            all_headers = {
                "Content-Length": str(len(body)),
                "X-Repo-Commit": SHA,
                **(headers or {}),
            }
            for name, value in all_headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.off = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests, folder
    over.set()
    server.shutdown()
    server.server_close()


FROM_THE_HUB = """
import contextlib, os, sys, urllib.request
from deebert import EarlyExitClassifier
from deebert.errors import UserError
from deebert.hub import locate

locate.PATIENCE = 1.0
for given in ("me/it", "me/another", "me/slow", "off", "me/it", "me/new"):
    if given == "off":
        with contextlib.suppress(OSError):
            urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/off")
        continue
    try:
        found = EarlyExitClassifier.from_pretrained(given, task="mrpc").saved.checkpoint
        print(found.config.backbone.name, found.config.backbone.path, found.fingerprint)
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_from_the_hub_and_later_without_a_network(
    hub: tuple[str, list[str], Path], tmp_path: Path
) -> None:
    address, requests, repository = hub
    golden_folder(repository, NAMES[0])
    for name in ("pytorch_model.bin", "training_args.bin", "tf_model.h5"):
        (repository / name).write_bytes(b"not needed")
    env = os.environ | {
        "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "*", "no_proxy": "*",
    }  # fmt: skip
    command = [sys.executable, "-c", FROM_THE_HUB]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    first, another, slow, again, new = done.stdout.splitlines()
    fingerprint = EarlyExitClassifier.from_pretrained(repository).saved.checkpoint.fingerprint
    assert first == again == f"it me/it {fingerprint}"
    assert (
        "model=me/another: no such file or folder here, and no repository of this name" in another
    )
    assert "model=me/slow: no such file or folder here, and the hub cannot be asked (" in slow
    assert "model=me/new: no such file or folder here, and the hub cannot be asked (" in new
    wanted = {"config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"}
    assert set(requests) == wanted, "and nothing else of it"
