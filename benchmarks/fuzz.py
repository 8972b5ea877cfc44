"""What hostile checkpoints, saved folders and records can do: nothing but be refused in one line.

    python benchmarks/fuzz.py [--cases 300] [--seed 1] [--only NUMBER ...]

Makes runs of a tiny model, spoils a copy of one of their files for each case (`hostile_files`), and
gives it to the program as a user may: to `from_pretrained`, `predict`, `save_pretrained`, `export`,
`resume=`, `stage=2 ckpt=`, `teacher=`, `evaluate.py ckpt=` or `record=`. Each case is a process of
its own, forked from one that has loaded the program, and Python's audit hooks watch it. A case is
at fault if it starts a process, opens a connection, writes or removes a file outside its own
folder, shows a secret of the environment or of a file beside it, ends in a traceback, takes more
than 5 seconds (10 where it trains) or more than 500 MB. Writes fuzz.json and fuzz.md.
"""

import argparse
import json
import os
import random
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_files import MAKES, SECRET, Evil

os.environ |= {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
    SECRET: "a-secret-of-the-environment",
}  # fmt: skip

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
SECONDS, TRAINING_SECONDS, MEGABYTES = 5.0, 10.0, 500.0
GIVE_UP = 60  # seconds
SECRETS = (os.environ[SECRET], "a-secret-of-a-file-beside-it")
TEXTS = [("a fine film", "no film"), ("x", "y z"), ("one two three " * 30, "four")]
STARTS = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect",
    "socket.getaddrinfo", "socket.bind", "urllib.Request", "webbrowser.open", "ctypes.dlopen",
)  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
TINY = (
    "backbone=tiny", "logger=csv", "data.max_length=64", "data.limit_train=64", "stages.1.lr=1e-3",
    "stages.1.epochs=2", "stages.2.epochs=1",
)  # fmt: skip


class Refused(Exception):
    """A command ended with an exit code; its line is in what it printed."""


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


def prepare(work: Path) -> Path:
    """Make the runs that are spoiled; this also loads whatever a case would load."""
    from deebert import EarlyExitClassifier
    from deebert.data import demo
    from deebert.export import onnx_folder
    from deebert.reporting import report

    runs, data = work / "runs", work / "data"
    (data / "mrpc").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [
            {"sentence1": row["product"], "sentence2": row["review"], "label": row["label"]}
            for row in demo.rows(split)[:80]
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / "mrpc" / f"{split}.jsonl").write_text(text)
    first = ["task=mrpc", *TINY, f"data.root={data}", "callbacks.best.monitor=val/score"]
    command("train.py", *first, f"hydra.run.dir={runs / 'stage1'}")
    command("train.py", *first, "+trainer.max_steps=8", f"hydra.run.dir={runs / 'part'}")
    for run in ("stage1", "part"):  # both have an epoch to go
        for file in (runs / run / "checkpoints").iterdir():
            content = torch.load(file, weights_only=True)
            config = content["hyper_parameters"]["config"]
            config["stages"]["1"]["epochs"] = config["trainer"]["max_epochs"] = 3
            config["trainer"].pop("max_steps", None)
            torch.save(content, file)
    overrides = f"ckpt={runs / 'stage1'}", "logger=csv"
    command("train.py", "stage=2", *overrides, f"hydra.run.dir={runs / 'stage2'}")
    warm = [f"hydra.run.dir={work / 'record'}", f"hydra.run.dir={work / 'resumed'}"]
    command("evaluate.py", f"record={runs / 'stage2'}", warm[0])
    command("train.py", f"resume={runs / 'part'}", "logger=csv", warm[1])
    classifier = EarlyExitClassifier.from_pretrained(runs / "stage2")
    classifier.save_pretrained(runs / "saved")
    onnx_folder.export(classifier, work / "onnx")
    report.environment()  # it asks git, once
    return runs


def way(dice: random.Random, folder: Path, how: str, out: Path) -> tuple[str, Callable[[], None]]:
    """Choose one of the ways in which a user may give the program what was spoiled."""
    from deebert import EarlyExitClassifier
    from deebert.export import onnx_folder

    trained = folder.name in ("stage2", "saved")
    overrides = [f"hydra.run.dir={out / 'run'}", "logger=csv"]

    def from_pretrained() -> None:
        classifier = EarlyExitClassifier.from_pretrained(folder)
        classifier.predict(TEXTS)
        classifier.save_pretrained(out / "copy")
        if trained:
            classifier.predict(TEXTS, target_saving=0.3)

    def exported() -> None:
        onnx_folder.export(EarlyExitClassifier.from_pretrained(folder), out / "onnx")

    target = "target_saving=0.3" if trained else "threshold=0"
    ways: dict[str, Callable[[], None]] = {
        "from_pretrained": from_pretrained,
        "export": exported,
        "evaluate.py ckpt=": lambda: command("evaluate.py", f"ckpt={folder}", target, *overrides),
        "evaluate.py record=": lambda: command("evaluate.py", f"record={folder}", *overrides),
        "train.py stage=2 ckpt=": lambda: command(
            "train.py", "stage=2", f"ckpt={folder}", "stages.2.epochs=1", *overrides
        ),
        "train.py resume=": lambda: command("train.py", f"resume={folder}", *overrides),
        "train.py teacher=": lambda: command(
            "train.py", f"teacher={folder}", "backbone.layers=[1]", "stages.1.epochs=1", *overrides
        ),
    }
    if "record" in how:
        names = ["evaluate.py record=", "from_pretrained"]
    elif trained:
        names = ["from_pretrained", "from_pretrained", "evaluate.py ckpt=", "export"]
    else:
        names = ["train.py resume="] * 4 + ["train.py stage=2 ckpt=", "train.py teacher="]
        names += ["evaluate.py ckpt=", "from_pretrained"]
    name = dice.choice(names)
    return name, ways[name]


def watched(do: Callable[[], None], allowed: list[str], report: int) -> None:
    """Do something, watched; write what came of it to a pipe. Ends the process."""
    seen: list[str] = []

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event in STARTS:
            seen.append(f"{event} {ascii(given)[:200]}")
        writes = event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+")
        if (writes or event in CHANGES) and isinstance(given[0], str | bytes | Path):
            real = os.path.realpath(os.fsdecode(given[0]))
            if real != os.devnull and not real.startswith(tuple(allowed)):
                seen.append(f"{event} {real}")

    sys.addaudithook(watch)
    outcome, message, held = "accepted", "", _megabytes("VmRSS")
    try:
        do()
    except Exception as error:
        from deebert.errors import UserError

        outcome, message = "refused", str(error)
        in_one_line = isinstance(error, UserError) and message.isprintable()
        if not isinstance(error, Refused) and not in_one_line:
            outcome = "traceback"
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    with open(report, "w") as stream:
        grown = _megabytes("VmHWM") - held
        json.dump({"outcome": outcome, "said": message, "seen": seen[:5], "grown": grown}, stream)
    os._exit(0)


def observe(
    do: Callable[[], None], place: Path, out: Path, bait: Path, limit: float
) -> dict[str, Any]:
    """Do something in a process of its own; what came of it, and its faults.

    Args:
        place: for what it prints.
        out: the folder that it may write in.
        bait: what it must neither change nor show.
        limit: seconds.
    """
    cache, temporary = os.environ.get("HF_HOME", str(out)), f"{tempfile.gettempdir()}/tmp"
    allowed = [str(out), cache, temporary, "/dev/shm/"]
    before = _times(bait)
    receive, send = os.pipe()
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        printed = os.open(place / "printed", os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.chdir(out)
        signal.alarm(GIVE_UP)
        watched(do, allowed, send)
    os.close(send)
    with open(receive) as stream:
        reply = stream.read()
    _, status, used = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    killed = {
        "outcome": f"killed ({status})",
        "said": "",
        "seen": [],
        "grown": used.ru_maxrss / 1024,
    }
    observed = json.loads(reply) if reply else killed
    grown = observed["grown"]
    printed = (place / "printed").read_text(errors="replace")
    if "Traceback (most recent" in printed:
        observed["outcome"] = "traceback"
    files = [file for file in out.rglob("*") if file.is_file()]
    shown = (
        printed + observed["said"] + "".join(f.read_bytes().decode(errors="replace") for f in files)
    )
    kept = {
        "code ran": (bait / "owned").exists(),
        "wrote outside": _times(bait) != before,
        "shows a secret": any(secret in shown for secret in SECRETS),
        observed["outcome"]: observed["outcome"] not in ("accepted", "refused"),
        f"{seconds:.1f} s": seconds > limit,
        f"{grown:.0f} MB": grown > MEGABYTES,
    }
    last = (printed.strip().splitlines() or [""])[-1]
    return {
        "outcome": observed["outcome"],
        "says": (last if observed["said"].startswith("exit code") else observed["said"])[:300],
        "seconds": round(seconds, 2),
        "megabytes": round(grown),
        "faults": [*observed["seen"], *(fault for fault, is_so in kept.items() if is_so)],
    }


def _times(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def _megabytes(name: str) -> float:
    """Return what this process holds (VmRSS), or the most that it has held (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def case(number: int, seed: int, originals: Path, work: Path) -> dict[str, Any]:
    """Spoil something and use it."""
    dice, make = random.Random(f"{seed} {number}"), MAKES[number % len(MAKES)]
    place = work / str(number)
    runs, bait, out = place / "runs", place / "bait", place / "out"
    shutil.copytree(originals, runs)
    bait.mkdir()
    out.mkdir()
    (bait / "secret.txt").write_text(SECRETS[1])
    torch.save({"x": Evil(bait / "owned")}, bait / "evil.pt")
    folder, how = make(dice, runs, bait)
    name, do = way(dice, runs / folder, how, out)
    limit = TRAINING_SECONDS if name.startswith("train.py") else SECONDS
    observed = observe(do, place, out, bait, limit)
    if not observed["faults"]:
        shutil.rmtree(place)
    about = {"case": number, "spoiled": make.__name__, "what": f"{folder}: {how}", "way": name}
    return about | observed


def markdown(results: dict[str, Any]) -> str:
    """Count what came of it, by what was spoiled."""
    rows = results["cases"]
    columns = ["spoiled", "cases", "refused in one line", "accepted as harmless", "with a fault",
               "slowest (s)", "most memory (MB)"]  # fmt: skip
    environment = results["environment"]
    lines = [
        "# Hostile files", "", f"`{results['command']}`: {len(rows)} cases, seed "
        f"{results['seed']}, torch {environment['versions']['torch']}, {results['processor']}.", "",
        f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}",
    ]  # fmt: skip
    for name in (*dict.fromkeys(row["spoiled"] for row in rows), "all"):
        mine = [row for row in rows if name in ("all", row["spoiled"])]
        outcomes = Counter(row["outcome"] for row in mine)
        cells = [
            name.replace("_", " "), len(mine), outcomes["refused"], outcomes["accepted"],
            sum(bool(row["faults"]) for row in mine), max(row["seconds"] for row in mine),
            max(row["megabytes"] for row in mine),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def processor() -> str:
    """Return what /proc/cpuinfo calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def main(arguments: list[str]) -> int:
    """The command; returns the exit code, 1 if any case was at fault."""
    parser = argparse.ArgumentParser("python benchmarks/fuzz.py")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*", help="these cases; nothing is written")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of fuzz.json and fuzz.md")
    options = parser.parse_args(arguments)
    work = Path(tempfile.mkdtemp(prefix="deebert-fuzz-"))
    os.environ["HF_HOME"] = str(work / "cache")
    torch.set_num_threads(1)
    originals = prepare(work)
    from deebert.reporting import report

    cases = []
    for number in options.only or range(options.cases):
        cases.append(observed := case(number, options.seed, originals, work))
        if observed["faults"] or options.only:
            print(json.dumps(observed, indent=2), flush=True)
    faulty = [row["case"] for row in cases if row["faults"]]
    counts = ", ".join(f"{n} {name}" for name, n in Counter(r["outcome"] for r in cases).items())
    print(f"{len(cases)} cases: {counts}; with a fault: {faulty or 'none'}")
    if not options.only:
        results = {
            "command": shlex.join(["python", "benchmarks/fuzz.py", *arguments]),
            "seed": options.seed, "processor": processor(),
            "environment": vars(report.environment()),
            "cases": cases,
        }  # fmt: skip
        (options.out / "fuzz.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "fuzz.md").write_text(markdown(results))
    if faulty:
        print(f"kept: {work}")
    else:
        shutil.rmtree(work)
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
