"""Spoil a copy of a run, a saved folder or a record, as somebody who means harm might.

`fuzz.py` gives what comes out to the program. Each maker takes a source of chance, the folder of
copies (`stage1`, `part`, `stage2`, `saved`) and a folder of bait, which holds what must not be
touched or shown. It returns which copy it has spoiled, and how.
"""

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Make = Callable[[random.Random, Path, Path], tuple[str, str]]
SECRET = "DEEBERT_SECRET"  # of the environment
DEEPEST = 8  # place that is spoiled


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Reserve:
    """Takes as much memory as it says when it is unpickled, also where weights alone are let in."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return self.kind, (2**33,)


def nasty(dice: random.Random, bait: Path, shares: bool) -> Any:
    """A value that does not belong where it is put.

    Args:
        shares: can the file hold one value in several places?
    """
    call = {"_target_": "os.mkdir", "_args_": [str(bait / "owned")]}
    load = {"_target_": "torch.load", "f": str(bait / "evil.pt"), "weights_only": False}
    deep: Any = []
    for _ in range(dice.choice((50, 200))):
        deep = [deep]
    wide: Any = ["x"]
    for _ in range(30 if shares else 3):
        wide = [wide, wide]  # a thousand million of them, in 30 lists
    return dice.choice([
        None, True, -1, 0, 1, 2.5, 10**6, 10**9, 10**18, 1e308, float("nan"), float("inf"), "", "x",
        "../../../etc/passwd", str(bait / "secret.txt"), "/dev/zero", "http://127.0.0.1:9/x",
        "file:///etc/passwd", "${oc.env:DEEBERT_SECRET}", "${oc.create:${oc.env:DEEBERT_SECRET}}",
        "???", "<script>alert(1)</script>", "a\nlicense: evil\nb: c", "a|b`c`](http://x)", "\x1b[2J",
        "x" * 100_000, "\0", "\ud800", [], {}, [[]], ["x"], [1, 2], [None], {"a": 1}, call, [call],
        load, [load], {"x": [load]}, deep, wide, "os.system", "torch.hub.load", "kernels/evil",
    ])  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a tree of dicts and lists can be changed."""
    paths = [path] if path else []
    listed = dict(enumerate(value)) if isinstance(value, list) else value
    inner = listed if isinstance(listed, dict) and len(path) < DEEPEST else {}
    for key, each in inner.items():
        paths += places(each, (*path, key))
    return paths


def spoil(dice: random.Random, value: Any, bait: Path, times: int = 1, shares: bool = False) -> str:
    """Change a tree of dicts and lists in some place; what was done."""
    done = []
    for _ in range(times):
        place = dice.choice(places(value))
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        how = dice.random()
        name = ".".join(map(str, place))[:60]
        if how < 0.15:
            del inner[place[-1]]
            done.append(f"without {name}")
        elif how < 0.3 and isinstance(inner, dict):
            key = dice.choice(["_target_", "auto_map", "attn_implementation", "plugins", "__class__", "trust_remote_code", "dirpath", "../x", "x.y", "${oc.env:DEEBERT_SECRET}"])  # fmt: skip
            inner[key] = nasty(dice, bait, shares)
            done.append(f"{name} beside {key}={_short(inner[key])}")
        else:
            inner[place[-1]] = nasty(dice, bait, shares)
            done.append(f"{name}={_short(inner[place[-1]])}")
    return "; ".join(done)


def _short(value: Any) -> str:
    return type(value).__name__ if isinstance(value, list) else ascii(value)[:50]


def saved_json(dice: random.Random, runs: Path, bait: Path) -> tuple[str, str]:
    """Another value somewhere in a file of JSON."""
    file = runs / "saved" / dice.choice(["deebert.json", "deebert.json", "config.json", "tokenizer.json", "tokenizer_config.json"])  # fmt: skip
    values = json.loads(file.read_text())
    done = spoil(dice, values, bait, dice.choice((1, 1, 3)))
    try:
        file.write_text(json.dumps(values))
    except (RecursionError, ValueError):
        file.write_text("[" * 100_000)
        done = "deep"
    return "saved", f"{file.name}: {done}"


def any_file(dice: random.Random, runs: Path, bait: Path) -> tuple[str, str]:
    """Something else in the place of a file, or a part of it."""
    files = [p for name in ("saved", "stage2") for p in (runs / name).rglob("*") if p.suffix in (".json", ".safetensors", ".ckpt", ".txt") and ".hydra" not in p.parts]  # fmt: skip
    file = dice.choice(sorted(files))
    content = file.read_bytes()
    folder, name = file.relative_to(runs).parts[0], file.relative_to(runs)
    how = dice.choice(["flip", "flip", "flip", "cut", "pipe", "link", "loop", "zero", "folder", "random", "empty", "sparse", "socket"])  # fmt: skip
    if how == "flip":
        spoiled = bytearray(content)
        for _ in range(dice.choice((1, 3, 50))):
            spoiled[dice.randrange(len(spoiled))] ^= 1 << dice.randrange(8)
        file.write_bytes(spoiled)
        return folder, f"{name}: bits flipped"
    if how == "cut":
        file.write_bytes(content[: dice.randrange(len(content))])
        return folder, f"{name}: cut short"
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "link":
        copy = bait / file.name  # valid, but not in the folder
        copy.write_bytes(content)
        file.symlink_to(dice.choice([bait / "secret.txt", copy, copy]))
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "zero":
        file.symlink_to("/dev/zero")
    elif how == "folder":
        file.mkdir()
    elif how == "random":
        file.write_bytes(dice.randbytes(4096))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "sparse":
        with file.open("wb") as stream:
            stream.write(content[:8])
            stream.truncate(2**33)
    else:
        os.mknod(file, 0o140600)
    return folder, f"{name}: a {how}"


def checkpoint_values(dice: random.Random, runs: Path, bait: Path) -> tuple[str, str]:
    """Another value somewhere in a checkpoint."""
    run = dice.choice(["stage1", "stage1", "stage2", "part"])
    done = ""
    for name in ("best", "last"):
        file = runs / run / "checkpoints" / f"{name}.ckpt"
        content = torch.load(file, weights_only=True)
        content.pop("weights_fingerprint", None)
        hparams = content["hyper_parameters"]
        roots = [hparams["config"], hparams["config"], hparams["config"]["trainer"], hparams["config"]["callbacks"], hparams["architecture"], hparams["tokenizer"], content["callbacks"], content["loops"], content["lr_schedulers"], content["optimizer_states"]]  # fmt: skip
        if name == "best":
            state = dice.getstate()
        else:
            dice.setstate(state)
        which = dice.randrange(len(roots) + 1)
        done = spoil(dice, content if which == len(roots) else roots[which], bait, dice.choice((1, 2)), shares=True)  # fmt: skip
        torch.save(content, file)
    return run, done


def checkpoint_weights(dice: random.Random, runs: Path, bait: Path) -> tuple[str, str]:
    """Other weights in a checkpoint or a saved folder."""
    file = runs / "stage1" / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    content.pop("weights_fingerprint", None)
    weights = content["state_dict"]
    name = dice.choice(sorted(weights))
    shape = weights[name].shape
    one = torch.zeros(1)
    choices: dict[str, Callable[[], Any]] = {
        "not a number": lambda: torch.full(shape, float("nan")),
        "infinite": lambda: torch.full(shape, float("inf")),
        "near the largest": lambda: torch.full(shape, 3e38),
        "another shape": lambda: torch.zeros(3),
        "no shape": lambda: torch.zeros(()),
        "whole numbers": lambda: torch.zeros(shape, dtype=torch.int64),
        "complex": lambda: torch.zeros(shape, dtype=torch.complex64),
        "sparse": lambda: torch.zeros(shape).to_sparse(),
        "one number, repeated": lambda: one.expand(shape),
        "one number, 2**40 times": lambda: one.expand(2**20, 2**20),
        "a text": lambda: "x",
        "a meta tensor": lambda: torch.zeros(shape, device="meta"),
    }
    what = dice.choice([*choices, "gone", "one too many", "a huge vocabulary, all one number"])
    if what == "gone":
        del weights[name]
    elif what == "one too many":
        weights["model.evil"] = torch.zeros(3)
    elif what.startswith("a huge"):
        name = "model.backbone.encoder.embeddings.word_embeddings.weight"
        content["hyper_parameters"]["architecture"]["vocab_size"] = 10**8
        weights[name] = one.expand(10**8, 32)
    else:
        weights[name] = choices[what]()
    torch.save(content, file)
    shutil.copy(file, file.with_name("best.ckpt"))
    return "stage1", f"{name} {what}"


def checkpoint_file(dice: random.Random, runs: Path, bait: Path) -> tuple[str, str]:
    """A checkpoint that is another kind of file."""
    file = runs / "stage1" / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    loop: list[Any] = []
    loop.append(loop)
    what = dice.choice(["code", "old code", "plain pickle", "bytes", "tensor", "loop", "wide", "packed", "twice", "deep", "big number", "old", "list", "text", "torchscript", "moved paths"])  # fmt: skip
    more: dict[str, Any] = {
        "code": Evil(bait / "owned"), "bytes": Reserve(bytearray), "tensor": Reserve(torch.Tensor),
        "loop": loop, "big number": 1 << 2000,
    }  # fmt: skip
    if what in more:
        content[dice.choice(["x", "epoch", "callbacks", "loops"])] = more[what]
        torch.save(content, file)
    elif what == "old code":
        torch.save(
            content | {"x": Evil(bait / "owned")}, file, _use_new_zipfile_serialization=False
        )
    elif what == "old":
        torch.save(content, file, _use_new_zipfile_serialization=False)
    elif what == "plain pickle":
        file.write_bytes(pickle.dumps(Evil(bait / "owned")))
    elif what in ("wide", "deep"):
        inner: Any = ["x"]
        for _ in range(200 if what == "deep" else 40):
            inner = [inner] if what == "deep" else [inner, inner]
        content["hyper_parameters"]["config"]["stages"]["1"]["x"] = inner
        torch.save(content, file)
    elif what in ("packed", "twice"):
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(bait / "x", "w", zipfile.ZIP_DEFLATED if what == "packed" else 0) as new:  # fmt: skip
            for part in old.infolist():
                new.writestr(part.filename, bytes(2**28) if what == "packed" and part.filename.endswith("/0") else old.read(part))  # fmt: skip
        shutil.move(bait / "x", file)
    elif what == "list":
        torch.save([content], file)
    elif what == "text":
        torch.save("x", file)
    elif what == "torchscript":
        torch.jit.script(torch.nn.Linear(2, 2)).save(file)
    else:
        for state in content["callbacks"].values():
            for key in ("best_model_path", "kth_best_model_path", "last_model_path", "dirpath"):
                state[key] = dice.choice(["http://127.0.0.1:9/x.ckpt", str(bait / "evil.pt"), "../../../bait/evil.pt", "s3://x/y"])  # fmt: skip
            state["best_k_models"] = {str(bait / "secret.txt"): torch.tensor(9.0)}
        torch.save(content, file)
    shutil.copy(file, file.with_name("best.ckpt"))
    return "stage1", what


def record_file(dice: random.Random, runs: Path, bait: Path) -> tuple[str, str]:
    """Another value or column in a record."""
    run = dice.choice(["stage2", "saved"])
    file = next((runs / run / "records").glob("*.safetensors"))
    with safe_open(file, "pt") as content:
        header = json.loads(content.metadata()["deebert"])
    columns = load_file(file)
    name = dice.choice(sorted(columns))
    number = columns[name].double().flatten()[0].item()
    choices: dict[str, Callable[[], torch.Tensor]] = {
        "not a number": lambda: torch.full(columns[name].shape, float("nan")),
        "infinite": lambda: columns[name].float() * float("inf"),
        "huge": lambda: torch.full(columns[name].shape, 2 * 10**8),
        "below zero": lambda: -columns[name] - 1,
        "another type": lambda: columns[name].to(torch.int8),
        "double": lambda: columns[name].double(),
        "short": lambda: columns[name][:3].clone(),
        "empty": lambda: columns[name][:0].clone(),
        "flat": lambda: columns[name].flatten(),
        "one more dimension": lambda: columns[name][..., None].clone(),
        "many ramps": lambda: torch.zeros(len(columns["index_N"]), 20_000, 2),
        "the same": lambda: torch.full(columns[name].shape, number).to(columns[name].dtype),
    }
    what = dice.choice([*choices, "header", "header", "header", "gone", "another", "no header"])
    if what == "header":
        what = spoil(dice, header, bait)
    elif what == "gone":
        del columns[name]
    elif what == "another":
        columns["evil_N"] = torch.zeros(len(columns["index_N"]))
    elif what != "no header":
        columns["logits_NLC" if what == "many ramps" else name] = choices[what]()
    if dice.random() < 0.8:
        header.pop("values", None)
    try:
        text = json.dumps(header)
        text.encode()
    except (RecursionError, ValueError):
        text = "{" * 100_000
    save_file(columns, file, None if what == "no header" else {"deebert": text})
    return run, f"record: {name} {what}"


MAKES: list[Make] = [
    saved_json, saved_json, any_file, any_file, checkpoint_values, checkpoint_values,
    checkpoint_values, checkpoint_weights, checkpoint_file, record_file, record_file,
]  # fmt: skip
