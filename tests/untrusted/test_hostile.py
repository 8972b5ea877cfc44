"""Checkpoints, saved folders and records that somebody else wrote: nothing in them is executed,
written elsewhere, fetched or shown. `benchmarks/fuzz.py` tries many more."""

import http.client
import http.server
import io
import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, TINY, CommandFailed, results
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deebert import EarlyExitClassifier
from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.export import onnx_folder
from deebert.hub import checkpoint_config, locate
from deebert.reporting import markdown
from deebert.untrusted import plain_files, tensor_files

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


@pytest.fixture(scope="module")
def broken(glue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-1 run that broke off after its first epoch."""
    folder = tmp_path_factory.mktemp("runs") / "broken"
    command = [
        sys.executable, "train.py", "task=mrpc", *TINY, f"data.root={glue}", "stages.1.epochs=2",
        "+trainer.max_steps=12", "callbacks.best.monitor=val/score", f"hydra.run.dir={folder}",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    for name in ("best", "last"):
        change(folder, lambda c: c["hyper_parameters"]["config"]["trainer"].pop("max_steps"), name)
    return folder


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
    def command(*said: str) -> str:
        return run("train.py", f"resume={copy}", "logger=csv", f"hydra.run.dir={tmp_path / 'rest'}", *said)  # fmt: skip

    return command


def saved(stage2: Path, folder: Path) -> Path:
    EarlyExitClassifier.from_pretrained(stage2).save_pretrained(folder)
    return folder


def say(folder: Path, name: str, what: Callable[[Content], object]) -> None:
    """Change what a file of JSON says."""
    values = json.loads((folder / name).read_text())
    what(values)
    (folder / name).write_text(json.dumps(values))


# The five that were reproduced.


@pytest.mark.parametrize("block", ["trainer", "callbacks", "best"])
@pytest.mark.parametrize("target", ["torch.load", "torch.hub.load"])
def test_resume_takes_nothing_that_can_be_called(
    resume: Callable[..., str], copy: Path, tmp_path: Path, block: str, target: str
) -> None:
    owned = tmp_path / "owned"
    torch.save({"x": Evil(owned)}, tmp_path / "evil.pt")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(f"import os\ndef x(): os.mkdir({str(owned)!r})\n")
    calls = {
        "torch.load": {"f": str(tmp_path / "evil.pt"), "weights_only": False},
        "torch.hub.load": {"repo_or_dir": str(tmp_path / "hub"), "model": "x", "source": "local"},
    }
    call = [{"_target_": target, **calls[target]}]

    def spoil(content: Content) -> None:
        values = config(content)
        if block == "trainer":
            values["trainer"] |= {"plugins": call, "callbacks": call, "_target_": "os.mkdir"}
        elif block == "callbacks":
            values["callbacks"] |= {"evil": call[0], "more": call, "x": {"y": call}}
        else:
            values["callbacks"]["best"] |= {"x": call, "_target_": target, "dirpath": call}

    change(copy, spoil)
    told = resume()
    assert not owned.exists()
    assert "not taken from the checkpoint" in told
    first = {
        "trainer": "trainer.plugins",
        "callbacks": "callbacks.evil",
        "best": "callbacks.best.x",
    }
    assert first[block] in told
    assert last_epoch(tmp_path / "rest") == 1, "it went on"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """An address with an evil pickle, and what was asked of it."""
    torch.save({"x": Evil(tmp_path / "owned")}, tmp_path / "evil.pt")
    content, asked = (tmp_path / "evil.pt").read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as address:
        threading.Thread(target=address.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{address.server_port}/best.ckpt", asked
        address.shutdown()


@pytest.mark.parametrize("where", ["http", "a pickle here", "a link", "a run elsewhere"])
def test_the_best_checkpoint_is_one_of_the_run_s_own(
    resume: Callable[..., str], copy: Path, broken: Path, server: tuple[str, list[str]],
    tmp_path: Path, where: str,
) -> None:  # fmt: skip
    address, asked = server
    path = {
        "http": address, "a pickle here": str(tmp_path / "evil.pt"), "a link": "link.ckpt",
        "a run elsewhere": str(broken / "checkpoints" / "last.ckpt"),
    }[where]  # fmt: skip
    (copy / "checkpoints" / "link.ckpt").symlink_to(tmp_path / "evil.pt")
    (copy / "checkpoints" / "best.ckpt").unlink()
    kept = tmp_path / "kept.ckpt"
    kept.write_text("a file that is none of its business")

    def spoil(content: Content) -> None:
        for state in content["callbacks"].values():
            state |= {
                "best_model_path": path, "kth_best_model_path": str(kept), "dirpath": str(tmp_path),
                "last_model_path": str(kept), "best_k_models": {str(kept): torch.tensor(9.0)},
                "best_model_score": torch.tensor(9.0),  # no epoch to come is better
            }  # fmt: skip

    change(copy, spoil)
    resume()
    assert not asked, "nothing is fetched"
    assert not (tmp_path / "owned").exists()
    assert kept.exists(), "nothing is removed"
    assert last_epoch(tmp_path / "rest") == 1, "it went on"


def test_a_run_that_was_moved_keeps_its_best_checkpoint(
    resume: Callable[..., str], copy: Path, tmp_path: Path
) -> None:
    """Its state names the folder that it was written in."""

    def better(content: Content) -> None:
        for state in content["callbacks"].values():
            state["best_model_score"] = torch.tensor(9.0)

    change(copy, better)
    shutil.move(copy, copy := tmp_path / "elsewhere")
    (tmp_path / "theirs").symlink_to(copy)  # what `resume` names
    resume()
    best = torch.load(tmp_path / "rest" / "checkpoints" / "best.ckpt", weights_only=True)
    assert (best["epoch"], last_epoch(tmp_path / "rest")) == (0, 1)


def test_resume_writes_into_its_own_folder_alone(
    resume: Callable[..., str], copy: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"

    def spoil(content: Content) -> None:
        callbacks = config(content)["callbacks"]
        callbacks["last"] |= {"dirpath": str(outside), "filename": "../../x", "save_last": True}
        callbacks["best"] |= {"dirpath": str(outside), "filename": str(outside / "y")}
        config(content)["trainer"] |= {"default_root_dir": str(outside), "profiler": "simple"}

    change(copy, spoil)
    told = resume()
    assert not outside.exists()
    files = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")}
    assert files == {"theirs", "rest"}
    assert {p.name for p in (tmp_path / "rest" / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}  # fmt: skip
    assert "callbacks.last.dirpath" in told


@pytest.mark.parametrize("flag", ["resume", "stage=2", "evaluate", "record", "teacher"])
def test_a_text_of_a_checkpoint_is_literal(
    run: Run, copy: Path, stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setenv("DEEBERT_SECRET", SECRET)
    name = "${oc.env:DEEBERT_SECRET}\\${stage}"

    def spoil(content: Content) -> None:
        config(content)["backbone"]["name"] = name
        config(content)["task"]["labels"] = ["${oc.env:DEEBERT_SECRET}", "b"]
        config(content)["data"]["calibration_rows"] = None

    change(copy, spoil)
    said = ["logger=csv", f"hydra.run.dir={tmp_path / 'out'}"]
    if flag == "resume":
        told = run("train.py", f"resume={copy}", *said)
    elif flag == "stage=2":
        told = run("train.py", "stage=2", f"ckpt={copy}/checkpoints/last.ckpt", *said, "stages.2.epochs=1")  # fmt: skip
    elif flag == "teacher":
        told = run("train.py", f"teacher={copy}/checkpoints/last.ckpt", *said, "backbone.layers=[1,2]", "stages.1.epochs=1")  # fmt: skip
    elif flag == "evaluate":
        told = run("evaluate.py", f"ckpt={copy}/checkpoints/last.ckpt", *said)
    else:
        shutil.copytree(stage2 / "records", tmp_path / "records")
        [file] = (tmp_path / "records").iterdir()
        rewrite(file, lambda header, _: header["config"]["backbone"].update(name=name))
        told = run("evaluate.py", f"record={tmp_path}", *said[1:])
    assert results(tmp_path / "out")["backbone"] == name
    assert SECRET not in told
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


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


# Attacks of our own.


def rewrite(file: Path, what: Callable[[Content, dict[str, torch.Tensor]], object]) -> None:
    """Change the header and the columns of a record."""
    with safe_open(file, "pt") as content:
        header = json.loads(content.metadata()["deebert"])
    columns = load_file(file)
    header.pop("values", None)
    what(header, columns)
    save_file(columns, file, {"deebert": json.dumps(header)})


def test_a_link_does_not_lead_out_of_a_run(fails: Run, copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")
    (copy / "checkpoints" / "last.ckpt").symlink_to(tmp_path / "last.ckpt")
    for said in (["train.py", f"resume={copy}"], ["evaluate.py", f"ckpt={copy}/checkpoints/none"]):
        told = fails(*said, f"hydra.run.dir={tmp_path / 'out'}")
    told = fails("train.py", f"resume={copy}", f"hydra.run.dir={tmp_path / 'out'}")
    assert "checkpoints/last.ckpt is a link that leads out of the folder" in told
    locate.checkpoint(copy / "checkpoints" / "last.ckpt", "ckpt")  # the user names the link itself


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


def spoiled(copy: Path, tmp_path: Path) -> dict[str, tuple[Callable[[Content], object], str]]:
    """What a checkpoint may say -> what is said of it."""
    repeated = torch.zeros(1).expand(10**8, 32)
    words = "model.backbone.encoder.embeddings.word_embeddings.weight"
    loop: list[Any] = []
    loop.append(loop)
    wide: Any = ["x"]
    for _ in range(40):
        wide = [wide, wide]

    def shape(**values: object) -> Callable[[Content], object]:
        return lambda content: content["hyper_parameters"]["architecture"].update(values)

    def said(block: str, **values: object) -> Callable[[Content], object]:
        return lambda content: config(content)[block].update(values)

    def huge(content: Content) -> None:
        shape(vocab_size=10**8)(content)
        content["state_dict"][words] = repeated

    def weight(value: Any) -> Callable[[Content], object]:
        return lambda content: content["state_dict"].update({words: value})

    return {
        "a million layers": (shape(num_hidden_layers=10**6), "num_hidden_layers=1000000 must be a whole number from 1 to 128"),
        "a vocabulary of one number": (huge, "holds a tensor that is larger than its numbers"),
        "a huge vocabulary": (shape(vocab_size=10**12), "word_embeddings.weight is (141, 32), not (1000000000000, 32)"),
        "no heads": (shape(num_attention_heads=0), "its shape is that of no model (integer modulo by zero)"),
        "heads that do not divide": (shape(num_attention_heads=5), "its shape is that of no model (The hidden size (32) is not a multiple"),
        "a model type of its own": (shape(model_type="evil/model"), "backbone of type 'evil/model' is not supported"),
        "memory": (lambda content: content.update(x=Reserve()), "it names '__builtin__ bytearray'"),
        "a loop": (said("stages", x=loop, **{"1": {"x": loop}}), "too many values, or values too deep"),
        "a thousand million values": (said("stages", **{"1": {"x": wide}}), "too deep inside others"),
        "a callable": (said("task", _target_="os.system"), "its task._target_ is no setting"),
        "a task outside": (said("task", name=".."), "'..': its name must be a word"),
        "a folder outside": (said("task", tsv={"folder": "../../etc"}), "'../../etc': its folder must be a word"),
        "a split outside": (said("task", validation=["../../x"]), "'../../x': its validation must be a word"),
        "a path for a hub": (said("task", hub=["/tmp/evil", "x"]), "its task.hub must be a data set of the hub"),
        "a million processes": (said("data", num_workers=10**6), "its data.num_workers must be a whole number from 0 to 64"),
        "a batch of everything": (said("data", eval_batch_size=10**9), "its data.eval_batch_size must be a whole number from 1 to 65536"),
        "a name of two lines": (said("backbone", name="a\nb"), "its backbone.name must be a name of at most 200 printable characters"),
        "a number for a name": (said("backbone", name=7), "its backbone.name must be a name"),
        "a stage of its own": (lambda content: config(content).update(stage="1"), "its stage must be a whole number from 1 to 2"),
        "half a character": (said("backbone", path="\ud800"), "half a character"),
        "no backbone": (lambda content: config(content).pop("backbone"), "its configuration says no backbone"),
        "not a number": (weight(torch.full((141, 32), float("nan"))), "holds numbers that are not finite: training diverged"),
        "numbers near the largest": (weight(torch.full((141, 32), 3e38)), "its logits are not finite"),
        "whole numbers": (weight(torch.zeros(141, 32, dtype=torch.long)), "is no array of real numbers"),
        "a text for a weight": (weight("x"), "something else than weights by name"),
        "no weights": (lambda content: content.update(state_dict={}), "it holds no weights"),
        "another shape": (weight(torch.zeros(3)), "is (3,), not (141, 32)"),
        "a tokenizer that is a number": (lambda content: content["hyper_parameters"].update(tokenizer={"tokenizer.json": 1}), "its tokenizer.json is no text"),
        "ids beyond the vocabulary": (lambda content: word(content, 9999), "its tokenizer has input_ids up to 9999, and its model 141 of them"),
    }  # fmt: skip


def word(content: Content, number: int) -> None:
    """Give a tokenizer a word whose id the model has not."""
    files = content["hyper_parameters"]["tokenizer"]
    values = json.loads(files["tokenizer.json"])
    values["model"]["vocab"]["film"] = number
    files["tokenizer.json"] = json.dumps(values)


def test_a_spoiled_checkpoint_is_refused_in_one_line(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "records")  # which say what weights they are of
    file, wrong = copy / "checkpoints" / "last.ckpt", {}
    original = file.read_bytes()
    for name, (what, says) in spoiled(copy, tmp_path).items():
        file.write_bytes(original)
        change(copy, what)
        start = time.perf_counter()
        try:
            EarlyExitClassifier.from_pretrained(file)
            told = "was accepted"
        except UserError as error:
            told = str(error)
        if says not in told or "\n" in told or time.perf_counter() - start > 5:
            wrong[name] = told
    assert not wrong


USES = {
    "stage=2": ("train.py", "stage=2", "ckpt={}"),
    "teacher": ("train.py", "backbone.layers=[1]", "teacher={}"),
    "resume": ("train.py", "resume={}"),
    "evaluate": ("evaluate.py", "ckpt={}"),
    "predict": ("-m", "deebert.predict", "model={}", "input=rows.jsonl", "output=x.csv"),
    "serve": ("-m", "deebert.serve", "model={}", "port=18237"),
    "export": ("-m", "deebert.export", "model={}", "output=x"),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_a_pickle_with_code_is_refused_whoever_reads_it(
    run: Run, copy: Path, tmp_path: Path, use: str
) -> None:
    file = change(copy, lambda content: content.update(callbacks=Evil(tmp_path / "owned")))
    (tmp_path / "rows.jsonl").write_text('{"sentence1": "a", "sentence2": "b"}\n')
    script, *said = USES[use]
    said = [each.format(file) for each in said]
    if script.endswith(".py"):
        with pytest.raises(CommandFailed) as failure:
            run(script, *said, f"hydra.run.dir={tmp_path / 'out'}")
        printed = str(failure.value)
    else:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, script, *said], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)  # fmt: skip
        assert done.returncode == 2
        printed = done.stderr
    [line] = [line for line in printed.splitlines() if line.startswith("Error: ")]
    assert "(it names 'posix mkdir'); nothing in it was executed" in line
    assert "Traceback" not in printed
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "x").exists()


def test_torch_reads_no_other_archive_than_the_one_that_is_checked(tmp_path: Path) -> None:
    """Two readers of one file may see two archives in it."""
    torch.save({"x": torch.ones(3)}, tmp_path / "good")
    torch.save({"x": Reserve()}, tmp_path / "bad")
    good, bad = (tmp_path / "good").read_bytes(), (tmp_path / "bad").read_bytes()
    renamed, packed = io.BytesIO(), io.BytesIO()
    for stream, name, kind in (
        (renamed, "DATA.PKL", 0),
        (packed, "data.pkl", zipfile.ZIP_DEFLATED),
    ):
        with zipfile.ZipFile(tmp_path / "bad") as old, zipfile.ZipFile(stream, "w", kind) as new:
            for part in old.infolist():
                new.writestr(part.filename.replace("data.pkl", name), old.read(part))
    with tarfile.open(tmp_path / "tar", "w") as old_kind:
        old_kind.add(tmp_path / "bad", "pickle")
    cases = {
        "behind another": (bad + good, "is packed in another way"),
        "with a comment": (good + b"x", "is packed in another way"),
        "two ends": (bad[:-22] + good, "is packed in another way"),
        "another case": (renamed.getvalue(), "it names '__builtin__ bytearray'"),
        "deflated": (packed.getvalue(), "is packed in another way"),
        "tar": ((tmp_path / "tar").read_bytes(), "is a tar archive"),
    }
    file = tmp_path / "x.ckpt"
    for name, (content, says) in cases.items():
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            tensor_files.torch_file(file)
        assert says in str(error.value), name
    file.write_bytes(good)
    assert tensor_files.torch_file(file)["x"].tolist() == [1, 1, 1]


def test_tensors_are_no_larger_than_their_file(tmp_path: Path) -> None:
    numbers, file = torch.arange(1000.0), tmp_path / "x.pt"
    cases = {
        "many names": ([numbers] * 500, "the same numbers under too many names"),
        "repeated": ([numbers[:1].expand(10**9)], "larger than its numbers"),
        "views": ([numbers.reshape(10, 100).t()] * 3, "more views of its numbers than numbers"),
    }
    for tensors, says in cases.values():
        torch.save({str(i): tensor for i, tensor in enumerate(tensors)}, file)
        with pytest.raises(UserError, match=says):
            tensor_files.torch_file(file)
    shared = {"a": numbers, "b": numbers[5:], "c": numbers.reshape(10, 100).t()}
    torch.save(shared, file)
    found = tensor_files.torch_file(file)
    assert all(torch.equal(found[name], value) for name, value in shared.items())
    assert found["a"].data_ptr() + 20 == found["b"].data_ptr(), "what is shared stays shared"
    assert found["c"].is_contiguous()
    torch.save(shared, file, _use_new_zipfile_serialization=False)
    assert torch.equal(tensor_files.torch_file(file)["c"], shared["c"])
    assert set(tensor_files.torch_file(file, only=["a"])) == {"a"}


def test_what_reaches_the_library_of_kernels_is_passed_over(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """attn_implementation may name a repository of code."""
    kernels = {"attn_implementation": "evil/kernels", "_attn_implementation": "evil/kernels"}
    more = {**kernels, "auto_map": {"AutoModel": "x.Y"}, "dtype": "float16", "num_labels": 10**9}
    file = change(copy, lambda content: content["hyper_parameters"]["architecture"].update(more))
    found = locate.checkpoint(file, "ckpt")
    assert "evil" not in str(found.architecture)
    assert found.architecture["dtype"] is None
    assert found.model().backbone.encoder.config._attn_implementation == "sdpa"


def test_flipped_bytes_are_noticed(copy: Path, stage2: Path, tmp_path: Path) -> None:
    file = copy / "checkpoints" / "last.ckpt"
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:  # in the middle of the numbers of each part
        places = [p.header_offset + 200 + p.file_size // 2 for p in archive.infolist() if p.file_size > 500]  # fmt: skip
    assert len(places) > 50
    for place in places[::7]:
        spoiled = bytearray(content)
        spoiled[place] ^= 1
        file.write_bytes(spoiled)
        with pytest.raises(UserError, match="is damaged"):
            locate.checkpoint(file, "ckpt")
    folder = saved(stage2, tmp_path / "saved")
    for name in ("model.safetensors", "records/validation.safetensors"):
        written = (folder / name).read_bytes()
        flipped = bytearray(written)
        flipped[-100] ^= 1
        (folder / name).write_bytes(flipped)
        with pytest.raises(UserError, match="damaged"):
            EarlyExitClassifier.from_pretrained(folder)
        (folder / name).write_bytes(written)


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
        told = fails("evaluate.py", f"record={tmp_path / name}", f"hydra.run.dir={tmp_path / 'out'}")  # fmt: skip
        assert says in told, name


def test_names_are_escaped_where_they_are_written(
    run: Run, stage2: Path, copy: Path, tmp_path: Path
) -> None:
    name = "<script>alert(1)</script> `a`|b [x](http://x)"
    labels = ["a\nlicense: evil", "<b>|[x](http://x)"]

    def spoil(content: Content) -> None:
        config(content)["backbone"] |= {"name": name, "path": "me/it\nlicense: evil"}
        config(content)["task"] |= {"labels": labels}

    file = change(copy, spoil)
    run("evaluate.py", f"ckpt={file}", "logger=csv", f"hydra.run.dir={tmp_path / 'out'}")
    written = (tmp_path / "out" / "results.md").read_text()
    assert "<script>" not in written
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\`a\\`\\|b [x\\](http://x)" in written
    classifier = EarlyExitClassifier.from_pretrained(file)
    classifier.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header).keys() == {"library_name", "pipeline_tag", "tags", "base_model", "datasets", "metrics"}  # fmt: skip
    assert yaml.safe_load(header)["base_model"] == "me/it\nlicense: evil"
    assert "<" not in text
    assert "a license: evil, &lt;b&gt;\\|[x\\](http://x)." in text


def test_an_error_is_one_line_that_a_terminal_does_not_obey() -> None:
    assert str(UserError("a\nb\x1b[2J\u202ec café")) == "a\\nb\\x1b[2J\\u202ec café"


def test_what_is_named_in_a_file_is_not_fetched(
    fails: Run, stage2: Path, tmp_path: Path, copy: Path
) -> None:
    """The user may name a hub's repository; a checkpoint or results.json may not."""
    folder = tmp_path / "scored"
    shutil.copytree(stage2 / "records", folder / "records")
    (folder / "results.json").write_text(json.dumps({"ckpt": "evil/model"}))
    with pytest.raises(UserError, match="it is named in a file, so it is not fetched"):
        EarlyExitClassifier.from_pretrained(folder)

    def spoil(content: Content) -> None:
        config(content).update(teacher="evil/model", objective={"name": "student"})

    change(copy, spoil)
    told = fails("train.py", f"resume={copy}", f"hydra.run.dir={tmp_path / 'out'}")
    assert "teacher=evil/model: no such file or folder here, and it is named in a file" in told


def test_a_training_state_that_does_not_fit_is_one_line(
    fails: Run, copy: Path, tmp_path: Path
) -> None:
    original = (copy / "checkpoints" / "last.ckpt").read_bytes()

    def moment(content: Content) -> None:
        state = content["optimizer_states"][0]["state"]
        state[next(iter(state))]["exp_avg"] = torch.zeros(3)

    cases: list[Callable[[Content], object]] = [
        lambda content: content.update(optimizer_states=[]),
        lambda content: content.update(optimizer_states=[{"state": {}, "param_groups": 7}]),
        lambda content: content.update(loops="x"),
        lambda content: content.update(callbacks=7),
        lambda content: content.update(lr_schedulers=[{"optimizer": 1}]),
        moment,
    ]
    for number, what in enumerate(cases):
        (copy / "checkpoints" / "last.ckpt").write_bytes(original)
        change(copy, what)
        told = fails("train.py", f"resume={copy}", "logger=csv", f"hydra.run.dir={tmp_path / str(number)}")  # fmt: skip
        assert "the run cannot be gone on with from this checkpoint" in told


def test_the_table_takes_what_today_s_runs_say(stage1: Path, stage2: Path) -> None:
    """Nothing of a run of ours is refused, and all but what names code or files is taken."""
    for run in (stage1, stage2):
        content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        said = config(content)
        found, rest = checkpoint_config.accepted(plain_files.plain(said, "it"))
        for key in checkpoint_config.KEYS:
            if key != "callbacks":
                gone = set(said[key] or ()) - set(found[key] or ()) if isinstance(said[key], dict) else set()  # fmt: skip
                assert gone <= {"_target_", "devices", "strategy"}, key
        assert checkpoint_config.left_out(rest, said) == []
        assert content["weights_fingerprint"] == locate.checkpoint(run, "ckpt").fingerprint


def test_a_sweep_s_table_shows_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deebert.reporting import sweep_rows

    monkeypatch.setenv("DEEBERT_SECRET", SECRET)
    file = tmp_path / "overrides.yaml"
    file.write_text("- data.root=${oc.env:DEEBERT_SECRET}\n")
    assert sweep_rows._overrides(file) == ("data.root=${oc.env:DEEBERT_SECRET}",)


@pytest.mark.parametrize("hub", ["json", "pandas", "/tmp/data", "../data"])
def test_a_hub_s_data_set_is_no_reader_and_no_path(fails: Run, tmp_path: Path, hub: str) -> None:
    told = fails("train.py", "task=mrpc", *TINY, f"task.hub=['{hub}',x]", f"hydra.run.dir={tmp_path}")  # fmt: skip
    assert f"hub={hub} is no data set of the hub" in told


def test_an_export_of_a_hostile_name(stage2: Path, tmp_path: Path) -> None:
    classifier = EarlyExitClassifier.from_pretrained(stage2)
    values = {"name": "mrpc", "columns": ["<script>`", "b"], "labels": ["<b>", "c|d"], "metrics": ["f1"]}  # fmt: skip
    classifier.task = Task.from_config(values)
    onnx_folder.export(classifier, tmp_path / "onnx")
    text = (tmp_path / "onnx" / "README.md").read_text()
    assert "`<script>'` and `b`" in text
    assert "one of: &lt;b&gt;, c\\|d" in text


def test_markdown() -> None:
    assert markdown.text("a\n b") == "a b"
    assert markdown.code("a`b\n|") == "`a'b \\|`"


@pytest.mark.parametrize("values", [{"strategy": "ddp", "num_nodes": 2}, {"devices": 64}, {"strategy": "fsdp"}])  # fmt: skip
def test_a_checkpoint_starts_no_processes(
    fails: Run, resume: Callable[..., str], copy: Path, tmp_path: Path, values: Content
) -> None:
    """They would listen for others on all addresses, and some strategies unpickle checkpoints."""
    change(copy, lambda content: config(content)["trainer"].update(values))
    told = fails("train.py", f"resume={copy}", f"hydra.run.dir={tmp_path / 'out'}")
    named = " ".join(f"trainer.{key}={value}" for key, value in values.items())
    assert f"was trained with {named}: say so again" in told
    resume("trainer.devices=1", "trainer.strategy=auto", "+trainer.num_nodes=1")
    assert last_epoch(tmp_path / "rest") == 1


def test_a_strategy_that_reads_checkpoints_itself_is_refused(
    fails: Run, copy: Path, tmp_path: Path
) -> None:
    strategy = "{_target_: test_hostile.Reader}"
    told = fails("train.py", f"resume={copy}", f"trainer.strategy={strategy}", "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path / 'out'}")  # fmt: skip
    assert "which reads checkpoints in a way of its own" in told


class Reader(SingleDeviceStrategy):
    """As FSDP, whose own way is a full unpickler."""

    def load_checkpoint(self, *_: object, **__: object) -> dict[str, Any]:
        raise AssertionError("it was asked")


@pytest.mark.parametrize("form", ["one", "a list"])
def test_a_plugin_of_the_user_s_own_reads_as_safely(
    resume: Callable[..., str], copy: Path, server: tuple[str, list[str]], tmp_path: Path, form: str
) -> None:
    address, asked = server

    def spoil(content: Content) -> None:
        for state in content["callbacks"].values():
            state |= {"best_model_path": address, "best_model_score": torch.tensor(9.0)}

    change(copy, spoil)
    plugin = "{_target_: lightning.pytorch.plugins.io.AsyncCheckpointIO}"
    resume(f"+trainer.plugins={plugin if form == 'one' else f'[{plugin}]'}")
    assert not asked
    assert "weights_fingerprint" in torch.load(tmp_path / "rest" / "checkpoints" / "last.ckpt", weights_only=True)  # fmt: skip


def test_a_best_checkpoint_of_another_model_is_refused(
    fails: Run, copy: Path, tmp_path: Path
) -> None:
    def better(content: Content) -> None:
        for state in content["callbacks"].values():
            state["best_model_score"] = torch.tensor(9.0)

    change(copy, better)
    change(copy, lambda content: content["state_dict"].popitem(), "best")
    told = fails("train.py", f"resume={copy}", "logger=csv", f"hydra.run.dir={tmp_path / 'out'}")
    assert "best.ckpt holds the weights of another model" in told


def test_a_tokenizer_s_settings_name_no_file(stage2: Path, tmp_path: Path) -> None:
    """`vocab` may be a path to the library `tokenizers`."""
    secret, folder = tmp_path / "secret.txt", saved(stage2, tmp_path / "saved")
    secret.write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\nswordfish\n")
    more = {"vocab": str(secret), "merges": str(secret), "tokenizer_class": "BertTokenizer"}
    say(folder, "tokenizer_config.json", lambda values: values.update(more))
    (folder / "special_tokens_map.json").write_text(json.dumps({"vocab": str(secret)}))
    say(folder, "deebert.json", lambda about: about["tokenizer"].append("special_tokens_map.json"))
    classifier = EarlyExitClassifier.from_pretrained(folder)
    assert "swordfish" not in classifier.tokenizer.get_vocab()
    classifier.save_pretrained(tmp_path / "copy")
    assert not [f for f in (tmp_path / "copy").rglob("*") if f.is_file() and b"swordfish" in f.read_bytes()]  # fmt: skip


def parts(**values: Any) -> Callable[[Content], object]:
    return lambda tokenizer: tokenizer.update(values)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (parts(normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "i"}, "content": "ii"}] * 26}), "parts, more than 16"),
        (parts(normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "i"}, "content": "ii"}] * 9}), "puts in characters too many times"),
        (parts(normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "\ufdfa"}, {"type": "NFKD"}]}), "takes characters apart more than once"),
        (parts(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFKC"}]}), "takes characters apart more than once"),
        (parts(normalizer={"type": "Prepend", "prepend": "x" * 10**6}), "puts in more than 4 characters at once"),
        (parts(post_processor={"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}] * 40, "special_tokens": {}}), "its template of a pair has not each text once"),
        (parts(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////////////////////w=="}), "its precompiled map of characters is damaged"),
        (parts(pre_tokenizer={"type": "FixedLength", "length": 0}), "a part of type 'FixedLength' is not supported"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_makes_much_of_little_is_refused(
    stage2: Path, tmp_path: Path, what: Callable[[Content], object], says: str
) -> None:
    folder = saved(stage2, tmp_path / "saved")
    say(folder, "tokenizer.json", what)
    with pytest.raises(UserError, match=says):
        EarlyExitClassifier.from_pretrained(folder)


def test_a_panic_in_rust_is_one_line(stage2: Path, tmp_path: Path) -> None:
    folder = saved(stage2, tmp_path / "saved")
    merges = {"type": "BPE", "continuing_subword_prefix": "####", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}  # fmt: skip
    say(folder, "tokenizer.json", lambda tokenizer: tokenizer.update(model=merges))
    say(folder, "tokenizer_config.json", lambda v: v.update(tokenizer_class="TokenizersBackend"))
    with pytest.raises(UserError, match="the tokenizer cannot be"):
        EarlyExitClassifier.from_pretrained(folder)


def test_old_files_of_torch_fill_what_they_claim(tmp_path: Path) -> None:
    """torch would leave as it is what a file reserves and does not fill: bytes of this process."""
    file = tmp_path / "x.bin"
    torch.save(
        {"a": torch.ones(1000), "b": torch.zeros(3)}, file, _use_new_zipfile_serialization=False
    )
    content, stream = file.read_bytes(), io.BytesIO(file.read_bytes())
    ends = []
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    assert tensor_files.torch_file(file)["a"].sum() == 1000
    nothing = content[: ends[3]] + pickle.dumps([], protocol=2) + content[ends[4] :]
    cases = {
        "unlisted": (nothing, "lists other tensors than it holds"),
        "cut": (content[:-100], "claims more numbers than it has bytes for"),
        "huge": (content.replace(b"M\xe8\x03", b"J\x00\xca\x9a\x3b"[:3]), ""),
    }
    for name, (spoiled, says) in cases.items():
        file.write_bytes(spoiled)
        with pytest.raises(UserError) as error:
            tensor_files.torch_file(file)
        assert says in str(error.value), name


def test_rows_are_where_the_user_or_glue_says(
    run: Run, fails: Run, glue: Path, copy: Path, stage2: Path, tmp_path: Path
) -> None:
    """A checkpoint names the folder of its rows, but no file elsewhere, and nothing to fetch."""
    root = Path(shutil.copytree(glue, tmp_path / "rows"))
    change(copy, lambda content: config(content)["data"].update(root=str(root)))
    file = root / "mrpc" / "validation.jsonl"
    shutil.move(file, tmp_path / "secret.jsonl")
    file.symlink_to(tmp_path / "secret.jsonl")
    said = [f"ckpt={copy}/checkpoints/last.ckpt", "logger=csv"]
    told = fails("evaluate.py", *said, f"hydra.run.dir={tmp_path / 'a'}")
    assert "mrpc/validation.jsonl is a link that leads out of the folder" in told
    run("evaluate.py", *said, f"data.root={root}", f"hydra.run.dir={tmp_path / 'b'}")
    file.unlink()
    os.mkfifo(file)
    told = fails("evaluate.py", *said, f"hydra.run.dir={tmp_path / 'c'}")
    assert "mrpc/validation.jsonl is no regular file" in told

    def elsewhere(content: Content) -> None:
        config(content)["data"]["root"] = None
        config(content)["task"] |= {"name": "mine", "hub": ["evil/dataset", "x"]}

    change(copy, elsewhere)
    told = fails("evaluate.py", *said, f"hydra.run.dir={tmp_path / 'd'}")
    assert "task mine: no data; give data.root=a folder" in told
    (tmp_path / "evil" / "dataset").mkdir(parents=True)
    told = fails("train.py", "task=mrpc", *TINY, f"task.hub=['{tmp_path.name}',x]", f"hydra.run.dir={tmp_path / 'e'}")  # fmt: skip
    assert "mrpc" in told


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


def test_unusual_runs_of_before_still_load(resume: Callable[..., str], copy: Path, tmp_path: Path) -> None:  # fmt: skip
    """What the table does not take of trainer and callbacks is told, not refused."""

    def unusual(content: Content) -> None:
        config(content)["trainer"] |= {
            "max_time": {"hours": 2}, "gradient_clip_val": float("inf"), "devices": 1,
            "limit_predict_batches": 3, "logger": {"_target_": "x"},
        }  # fmt: skip
        config(content)["callbacks"] |= {
            "mine": {"_target_": "x", "limit": float("inf")},
            "best": None,
        }
        config(content)["task"] |= {"hub": ["nyu-mll/glue", None], "tsv": {"folder": "GLUE/MRPC"}}
        config(content)["backbone"]["config"] |= {"rope_parameters": {"a": {"b": 1}}}
        content["callbacks"]["mine"] = {"losses": [0.5] * 600_000}

    change(copy, unusual)
    told = resume()
    for flag in ("trainer.max_time.hours", "trainer.limit_predict_batches", "callbacks.mine.limit"):
        assert flag in told
    assert not (tmp_path / "rest" / "checkpoints" / "best.ckpt").exists(), "it was taken out"


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


def test_a_short_fuzz(tmp_path: Path) -> None:
    """As many cases as there are makers, twice over."""
    command = [sys.executable, "benchmarks/fuzz.py", "--cases", "22", "--seed", "3", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    told = json.loads((tmp_path / "fuzz.json").read_text())["cases"]
    # Seconds and megabytes are for a quiet machine: those faults alone begin with a number.
    faults = {row["case"]: [f for f in row["faults"] if not f[0].isdigit()] for row in told}
    assert not any(faults.values()), (faults, done.stdout[-2000:])
    assert len(told) == 22
    assert sum(row["outcome"] == "refused" for row in told) > 10
    assert "| all | 22 |" in (tmp_path / "fuzz.md").read_text()


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
