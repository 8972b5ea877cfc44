"""What hostile checkpoints, saved folders and records can do: nothing but be refused in one line.

    python benchmarks/fuzz.py [--cases 300] [--seed 1] [--only NUMBER ...]

Makes runs of a tiny model, spoils a copy of one of their files for each case, and gives it to the
program in every way that it may be given: `from_pretrained`, `predict`, `save_pretrained`,
`export`, `resume=`, `stage=2 ckpt=`, `teacher=`, `evaluate.py ckpt=` and `record=`. Each case is a
process of its own, forked from one that has loaded the program. Python's audit hooks watch it: a
case fails if it starts a process, opens a connection, writes or removes a file outside its own
folder, shows a secret of the environment or of a file beside it, ends in a traceback, takes more
than 5 seconds (trainings: 5 more) or more than 500 MB. Writes fuzz.json and fuzz.md.
"""

import argparse
import json
import os
import pickle
import random
import resource
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
    "DEEBERT_SECRET": "a-secret-of-the-environment",
}  # fmt: skip

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ROOT = HERE.parent
SECONDS, TRAINING_SECONDS, MEGABYTES = 5.0, 5.0, 500.0
GIVE_UP = 60  # seconds
SECRETS = (os.environ["DEEBERT_SECRET"], "a-secret-of-a-file-beside-it")
TEXTS = [("a fine film", "no film"), ("x", "y z"), ("one two three " * 30, "four")]
WATCHED = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect",
    "socket.getaddrinfo", "socket.bind", "urllib.Request", "webbrowser.open", "ctypes.dlopen",
}  # fmt: skip
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
Make = Callable[[random.Random, Path, Path], str]  # of a copy of the runs, and the folder of bait


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
    for _ in range(dice.choice((50, 500))):
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
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()  # fmt: skip
    for key, each in items:
        found += places(each, (*path, key))
    return found


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


def saved_json(dice: random.Random, runs: Path, bait: Path) -> str:
    file = runs / "saved" / dice.choice(["deebert.json", "deebert.json", "config.json", "tokenizer.json", "tokenizer_config.json"])  # fmt: skip
    values = json.loads(file.read_text())
    done = spoil(dice, values, bait, dice.choice((1, 1, 3)))
    try:
        file.write_text(json.dumps(values))
    except (RecursionError, ValueError):
        file.write_text("[" * 100_000)
        done = "deep"
    return f"{file.name}: {done}"


def any_file(dice: random.Random, runs: Path, bait: Path) -> str:
    """Something else in the place of a file, or a part of it."""
    files = [p for name in ("saved", "stage2") for p in (runs / name).rglob("*") if p.suffix in (".json", ".safetensors", ".ckpt", ".txt") and ".hydra" not in p.parts]  # fmt: skip
    file = dice.choice(sorted(files))
    content = file.read_bytes()
    name = file.relative_to(runs)
    how = dice.choice(["flip", "flip", "flip", "cut", "pipe", "link", "loop", "zero", "folder", "random", "empty", "sparse", "socket"])  # fmt: skip
    if how == "flip":
        spoiled = bytearray(content)
        for _ in range(dice.choice((1, 3, 50))):
            spoiled[dice.randrange(len(spoiled))] ^= 1 << dice.randrange(8)
        file.write_bytes(spoiled)
        return f"{name}: bits flipped"
    if how == "cut":
        file.write_bytes(content[: dice.randrange(len(content))])
        return f"{name}: cut short"
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
    return f"{name}: a {how}"


def checkpoint_values(dice: random.Random, runs: Path, bait: Path) -> str:
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
    return f"{run}: {done}"


def checkpoint_weights(dice: random.Random, runs: Path, bait: Path) -> str:
    """Other weights in a checkpoint or a saved folder."""
    file = runs / "stage1" / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    content.pop("weights_fingerprint")
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
    return f"stage1: {name} {what}"


def checkpoint_file(dice: random.Random, runs: Path, bait: Path) -> str:
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
        for _ in range(400 if what == "deep" else 40):
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
    return f"stage1: {what}"


def record_file(dice: random.Random, runs: Path, bait: Path) -> str:
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
    return f"{run} record: {name} {what}"


MAKES: list[Make] = [
    saved_json, saved_json, any_file, any_file, checkpoint_values, checkpoint_values,
    checkpoint_values, checkpoint_weights, checkpoint_file, record_file, record_file,
]  # fmt: skip


def command(script: str, *overrides: str) -> None:
    """Run train.py or evaluate.py in this process."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    sys.argv = [str(ROOT / script), *overrides]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise Refused(f"exit code {stop.code}") from None
    finally:
        GlobalHydra.instance().clear()


class Refused(Exception):
    """A command ended with an exit code; its line is in the output."""


def uses(dice: random.Random, done: str, runs: Path, out: Path, data: Path) -> Callable[[], None]:
    """One of the ways in which a user may give the program what was spoiled."""
    from deebert import EarlyExitClassifier, export

    folder = runs / done.partition(":")[0].split("/")[0].split()[0]
    if not folder.is_dir() or "saved/" in done or done.startswith(("deebert.json", "config.json", "tokenizer")):  # fmt: skip
        folder = runs / "saved"

    def from_python() -> None:
        classifier = EarlyExitClassifier.from_pretrained(folder)
        classifier.predict(TEXTS)
        classifier.save_pretrained(out / "copy")
        if folder.name != "stage1":
            classifier.predict(TEXTS, target_saving=0.3)

    def exported() -> None:
        export.export(EarlyExitClassifier.from_pretrained(folder), out / "onnx")

    said = [f"hydra.run.dir={out / 'run'}", "logger=csv"]
    ways: dict[str, Callable[[], None]] = {
        "from_pretrained": from_python,
        "export": exported,
        "evaluate.py ckpt=": lambda: command(
            "evaluate.py",
            f"ckpt={folder}",
            *said,
            "target_saving=0.3" if folder.name != "stage1" else "threshold=0",
        ),  # fmt: skip
        "evaluate.py record=": lambda: command("evaluate.py", f"record={folder}", *said),
        "train.py stage=2 ckpt=": lambda: command(
            "train.py", "stage=2", f"ckpt={folder}", "stages.2.epochs=1", *said
        ),  # fmt: skip
        "train.py resume=": lambda: command("train.py", f"resume={folder}", *said),
        "train.py teacher=": lambda: command(
            "train.py", f"teacher={folder}", "backbone.layers=[1]", "stages.1.epochs=1", *said
        ),  # fmt: skip
    }
    if " record: " in done or "records/" in done:
        names = ["evaluate.py record=", "from_pretrained"]
    elif folder.name == "part" or (folder.name == "stage1" and dice.random() < 0.5):
        names = ["train.py resume="]
    elif folder.name == "stage1":
        names = ["train.py stage=2 ckpt=", "train.py teacher=", "evaluate.py ckpt=", "from_pretrained"]  # fmt: skip
    else:
        names = ["from_pretrained", "from_pretrained", "evaluate.py ckpt=", "export"]
    name = dice.choice(names)
    ways[name].__dict__["way"] = name
    return ways[name]


def child(way: Callable[[], None], allowed: list[str], report: int) -> None:
    """Do it, watched; write what came of it to a pipe. Never returns."""
    seen: list[str] = []

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event in WATCHED:
            seen.append(f"{event} {ascii(given)[:200]}")
        elif event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+"):
            outside(event, given[0])
        elif event in CHANGES:
            outside(event, given[0])

    def outside(event: str, path: Any) -> None:
        if isinstance(path, str | bytes | Path):
            real = os.path.realpath(os.fsdecode(path))
            if real != os.devnull and not any(real.startswith(place) for place in allowed):
                seen.append(f"{event} {real}")

    sys.addaudithook(watch)
    try:
        way()
        outcome, said = "accepted", ""
    except Exception as error:
        from deebert.errors import UserError

        said = str(error)
        refused = isinstance(error, Refused) or (
            isinstance(error, UserError) and said.isprintable()
        )
        outcome = "refused" if refused else "traceback"
        if outcome == "traceback":
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    with open(report, "w") as stream:
        json.dump({"outcome": outcome, "said": said[:500], "seen": seen[:5]}, stream)
    os._exit(0)


def memory() -> float:
    """Megabytes that this process holds."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) / 1024


def case(number: int, seed: int, originals: Path, work: Path, data: Path) -> dict[str, Any]:
    """Spoil something, use it, and tell what came of it."""
    dice = random.Random(f"{seed} {number}")
    place = work / str(number)
    runs, bait, out = place / "runs", place / "bait", place / "out"
    shutil.copytree(originals, runs)
    bait.mkdir()
    out.mkdir()
    (bait / "secret.txt").write_text(SECRETS[1])
    torch.save({"x": Evil(bait / "owned")}, bait / "evil.pt")
    done = MAKES[number % len(MAKES)](dice, runs, bait)
    before = {p: p.lstat().st_mtime_ns for p in bait.rglob("*")}
    way = uses(dice, done, runs, out, data)
    allowed = [str(out), os.environ["HF_HOME"], tempfile.gettempdir() + "/tmp", "/dev/shm/"]
    receive, send = os.pipe()
    held, start = memory(), time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        printed = os.open(place / "printed", os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.chdir(out)
        signal.alarm(GIVE_UP)
        child(way, allowed, send)
    os.close(send)
    with open(receive) as stream:
        told = stream.read()
    _, status, used = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    found = json.loads(told) if told else {"outcome": f"killed by {status}", "said": "", "seen": []}
    printed = (place / "printed").read_text(errors="replace")
    if "Traceback (most recent" in printed:
        found["outcome"] = "traceback"
    after = {p: p.lstat().st_mtime_ns for p in bait.rglob("*")}
    everything = printed + found["said"]
    for file in out.rglob("*"):
        if file.is_file():
            everything += file.read_bytes().decode(errors="replace")
    limit = SECONDS + (TRAINING_SECONDS if "train.py" in way.__dict__["way"] else 0)
    faults = [
        *(["code ran"] if (bait / "owned").exists() else []),
        *(["wrote outside"] if before != after else []),
        *(["shows a secret"] if any(secret in everything for secret in SECRETS) else []),
        *found["seen"],
        *([found["outcome"]] if found["outcome"] not in ("accepted", "refused") else []),
        *([f"{seconds:.1f} s"] if seconds > limit else []),
    ]
    grown = max(0.0, used.ru_maxrss / 1024 - held)
    if grown > MEGABYTES:
        faults.append(f"{grown:.0f} MB")
    if not faults:
        shutil.rmtree(place)
    last = (printed.strip().splitlines() or [""])[-1] if found["outcome"] == "refused" else ""
    return {
        "case": number, "made by": MAKES[number % len(MAKES)].__name__, "what": done,
        "way": way.__dict__["way"], "outcome": found["outcome"], "says": (found["said"] + " " + last).strip()[:300],
        "seconds": round(seconds, 2), "megabytes": round(grown), "faults": faults,
    }  # fmt: skip


def prepare(work: Path) -> tuple[Path, Path]:
    """Runs of a tiny model on rows of the demo; also loads whatever a case would load."""
    from deebert import EarlyExitClassifier, export, report

    originals, data = work / "runs", work / "data"
    tiny = ["backbone=tiny", "logger=csv", "data.max_length=64", "data.limit_train=64"]
    tiny += ["stages.1.lr=1e-3", "stages.1.epochs=2", "stages.2.epochs=1"]
    from deebert import demo

    for split in ("train", "validation"):
        (data / "mrpc").mkdir(parents=True, exist_ok=True)
        rows = [
            {"sentence1": row["product"], "sentence2": row["review"], "label": row["label"]}
            for row in demo.rows(split)[:80]
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / "mrpc" / f"{split}.jsonl").write_text(text)
    best = "callbacks.best.monitor=val/score"
    first = ["task=mrpc", "stage=1", *tiny, f"data.root={data}", best]
    command("train.py", *first, f"hydra.run.dir={originals / 'stage1'}")
    # Resumed, it has an epoch to go: what is broken off here after the first.
    command("train.py", *first, "+trainer.max_steps=8", f"hydra.run.dir={originals / 'part'}")
    for run in ("stage1", "part"):
        for name in ("best", "last"):
            file = originals / run / "checkpoints" / f"{name}.ckpt"
            content = torch.load(file, weights_only=True)
            content["hyper_parameters"]["config"]["stages"]["1"]["epochs"] = 3
            content["hyper_parameters"]["config"]["trainer"]["max_epochs"] = 3
            content["hyper_parameters"]["config"]["trainer"].pop("max_steps", None)
            torch.save(content, file)
    command("train.py", "stage=2", f"ckpt={originals / 'stage1'}", "logger=csv", f"hydra.run.dir={originals / 'stage2'}")  # fmt: skip
    command("evaluate.py", f"record={originals / 'stage2'}", f"hydra.run.dir={work / 'warm'}")
    command("train.py", f"resume={originals / 'part'}", "logger=csv", f"hydra.run.dir={work / 'resumed'}")  # fmt: skip
    classifier = EarlyExitClassifier.from_pretrained(originals / "stage2")
    classifier.save_pretrained(originals / "saved")
    export.export(classifier, work / "onnx")
    report.environment()  # it asks git
    return originals, data


def markdown(results: dict[str, Any]) -> str:
    """The table of what came of it."""
    rows, counts = results["cases"], Counter()
    for row in rows:
        counts[row["made by"], row["outcome"]] += 1
    names = list(dict.fromkeys(row["made by"] for row in rows))
    lines = [
        "# Hostile files", "", f"`{results['command']}`: {results['num_cases']} cases, seed "
        f"{results['seed']}, {results['environment']['device']}.", "",
        "| what was spoiled | cases | refused in one line | harmless, accepted | faults | slowest (s) | most memory (MB) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name in [*names, "all"]:
        mine = [row for row in rows if name in ("all", row["made by"])]
        cells = [
            name.replace("_", " "), len(mine), sum(r["outcome"] == "refused" for r in mine),
            sum(r["outcome"] == "accepted" for r in mine), sum(bool(r["faults"]) for r in mine),
            max(r["seconds"] for r in mine), max(r["megabytes"] for r in mine),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser("python benchmarks/fuzz.py")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*", help="these cases, kept and shown")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of fuzz.json and fuzz.md")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="deebert-fuzz-"))
    os.environ["HF_HOME"] = str(work / "cache")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    originals, data = prepare(work)
    from deebert import report

    numbers = options.only or range(options.cases)
    cases = []
    for number in numbers:
        cases.append(found := case(number, options.seed, originals, work, data))
        if found["faults"] or options.only:
            print(json.dumps(found, indent=2), flush=True)
    faulty = sum(bool(row["faults"]) for row in cases)
    print(Counter(row["outcome"] for row in cases), f"{faulty} with faults")
    if not options.only:
        results = {
            "command": f"python {shlex.join(['benchmarks/fuzz.py', *sys.argv[1:]])}",
            "num_cases": len(cases), "seed": options.seed, "environment": report.environment(),
            "cases": cases,
        }  # fmt: skip
        (options.out / "fuzz.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "fuzz.md").write_text(markdown(results))
    if not faulty:
        shutil.rmtree(work)
    return int(faulty > 0)


if __name__ == "__main__":
    sys.argv, arguments = [sys.argv[0], *sys.argv[1:]], sys.argv[1:]
    sys.exit(main())
