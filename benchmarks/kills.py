"""Trainings that are killed and resumed, against the same training without interruption.

    python benchmarks/kills.py [--random 10 --checkpoint 5 --closing 5] [--tmpdir DIR] [--seed 0]

A tiny model is trained for a few epochs and killed (SIGKILL) in three kinds of moments: at random;
while a checkpoint is written; and after the last checkpoint, before the results are complete. Half
of the runs monitor a score and validate their best epoch at the end. `TMPDIR` is on another file
system than the run folders (--tmpdir). Each killed run is gone on with by `resume=RUN`, or begun
anew if no epoch had ended. A kill counts as equal if both checkpoints, all results, the records and
the calibrated thresholds are those of the unbroken run, bit by bit. Writes kills.json and kills.md.

The runs are forked from one process that has imported everything, which saves ten seconds a run.
"""

import argparse
import contextlib
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EPOCHS = 3
TRAINING = (
    "task=demo", "backbone=tiny", "objective=joint", "data.max_length=64", "data.limit_train=200",
    f"stages.1.epochs={EPOCHS}", "stages.1.lr=3e-3", "logger=csv",
)  # fmt: skip
MONITORED = "callbacks.best.monitor=val/mean_ramp_score"
MOST_TRIES = 30  # kills until one falls into the moment


class Run:
    """One training in a process of its own.

    Args:
        folder: its run folder. What it prints goes to a file beside it.
        tmpdir: its `TMPDIR`.
        words: its command line.
    """

    def __init__(self, folder: Path, tmpdir: Path, *words: str) -> None:
        self.folder, self.code = folder, None
        self.last, self.log = folder / "checkpoints" / "last.ckpt", folder.with_suffix(".log")
        self.pid = os.fork()
        if not self.pid:
            os._exit(self._train(tmpdir, *words))

    def _train(self, tmpdir: Path, *words: str) -> int:
        stream = os.open(self.log, os.O_WRONLY | os.O_CREAT)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.environ["TMPDIR"] = tempfile.tempdir = str(tmpdir)
        sys.argv = ["train.py", *words, f"hydra.run.dir={self.folder}"]
        try:
            runpy.run_path(str(HERE.parent / "train.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        finally:
            sys.stdout.flush()
        return 0

    def is_alive(self) -> bool:
        """Say whether the process has not ended yet."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def end(self) -> None:
        """Wait for the end of the process.

        Raises:
            RuntimeError: it has failed.
        """
        while self.is_alive():
            time.sleep(0.005)
        if self.code:
            raise RuntimeError(f"{self.folder.name} failed: {self.log.read_text()[-2000:]}")

    def kill(self, moment: Callable[[], bool], delay: float) -> None:
        """Wait for a moment and some seconds more, and kill the process, unless it has ended."""
        while self.is_alive() and not moment():
            time.sleep(0.0002)
        until = time.perf_counter() + delay
        while self.is_alive() and time.perf_counter() < until:
            time.sleep(0.0002)
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)
            while self.is_alive():
                time.sleep(0.001)

    def is_complete(self) -> bool:
        """Say whether the run has written all of its results."""
        results = self.folder / "results.json"
        if not (self.folder / "curve.png").exists() or not results.exists():
            return False
        return not self.monitored or json.loads(results.read_text()).get("epoch") is None

    @property
    def monitored(self) -> bool:
        """Whether the best epoch is validated at the end."""
        overrides = self.folder / ".hydra" / "overrides.yaml"
        return overrides.exists() and MONITORED in overrides.read_text()

    def is_writing(self) -> bool:
        """Say whether a checkpoint is partly written."""
        return any(self.last.parent.glob(".*.part"))

    def counter(self, number: int) -> Callable[[], bool]:
        """Return a function that says whether last.ckpt has been written so many times."""
        seen: set[int] = set()

        def reached() -> bool:
            with contextlib.suppress(FileNotFoundError):
                seen.add(self.last.stat().st_mtime_ns)
            return len(seen) >= number

        return reached


def damaged(run: Run) -> list[str]:
    """Return the names of the checkpoints that cannot be read."""
    from deebert.errors import UserError
    from deebert.hub import checkpoints

    names = []
    for file in sorted(run.last.parent.glob("*.ckpt")):
        try:
            checkpoints.read(file, "ckpt")
        except UserError:
            names.append(file.name)
    return names


def difference(a: Path, b: Path) -> str | None:
    """Return what differs between the outcomes of two runs; None if nothing does."""
    import torch
    from safetensors.torch import load_file

    from deebert import EarlyExitClassifier

    for name in ("best", "last"):
        ours, theirs = (
            torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (a, b)
        )
        ours, theirs = (
            x["state_dict"] | {"epoch": torch.tensor(x["epoch"])} for x in (ours, theirs)
        )
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
            return f"{name}.ckpt"
    ours, theirs = (json.loads((run / "results.json").read_text()) for run in (a, b))
    keys = [k for k in {**ours, **theirs} if k != "ckpt" and ours.get(k) != theirs.get(k)]
    if keys:
        return f"results.json: {keys[0]}"
    names = sorted(file.name for file in (b / "records").iterdir())
    if sorted(file.name for file in (a / "records").iterdir()) != names:
        return "the names of the records"
    for name in names:
        ours, theirs = (load_file(run / "records" / name) for run in (a, b))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
            return f"records/{name}"
    points = [
        EarlyExitClassifier.from_pretrained(run).calibrate(target_saving=0.3) for run in (a, b)
    ]
    return None if points[0].thresholds == points[1].thresholds else "the thresholds"


class Benchmark:
    """The kills, and the unbroken runs that they are compared with.

    Args:
        work: the folder of the runs.
        tmpdir: their `TMPDIR`.
        seed: the seed of the moments.
    """

    def __init__(self, work: Path, tmpdir: Path, seed: int) -> None:
        self.work, self.tmpdir, self.dice = work, tmpdir, random.Random(seed)
        self.number = 0
        self.unbroken: dict[bool, Run] = {}
        self.seconds: dict[bool, tuple[float, float]] = {}  # of a run; of its end

    def start(self, *words: str) -> Run:
        """Start a run in a new folder."""
        self.number += 1
        return Run(self.work / f"run{self.number}", self.tmpdir, *words)

    def measure(self, kinds: Sequence[bool]) -> None:
        """Run the unbroken trainings, the first one twice because it fills the caches.

        Args:
            kinds: whether a score is monitored, for each of them.
        """
        for monitored in (kinds[0], *kinds):
            start = time.perf_counter()
            run = self.start(*self.words(monitored))
            run.end()
            closing = (run.folder / "curve.png").stat().st_mtime - run.last.stat().st_mtime
            self.unbroken[monitored] = run
            self.seconds[monitored] = time.perf_counter() - start, closing

    def words(self, monitored: bool) -> list[str]:
        """Return the command line of a training."""
        return [*TRAINING, *([MONITORED] if monitored else [])]

    def killed(self, kind: str, monitored: bool) -> tuple[Run, int]:
        """Start runs until one was killed in a moment of a kind.

        Returns:
            The killed run, and how many runs were started.
        """
        for tries in range(1, MOST_TRIES + 1):
            run = self.start(*self.words(monitored))
            whole, closing = self.seconds[monitored]
            if kind == "random":
                run.kill(lambda: True, self.dice.uniform(0, whole))
                return run, tries
            if kind == "closing":
                run.kill(run.counter(EPOCHS), self.dice.uniform(0, closing))
                if not run.is_complete():
                    return run, tries
            else:
                before = run.counter(self.dice.randrange(EPOCHS))
                run.kill(
                    lambda r=run, b=before: b() and r.is_writing(), self.dice.uniform(0, 0.003)
                )
                if run.is_writing() or damaged(run):
                    return run, tries
        raise RuntimeError(f"none of {MOST_TRIES} kills fell into a moment of the kind {kind}")

    def row(self, kind: str, monitored: bool) -> dict[str, Any]:
        """Kill a run, go on with it, and compare it with the unbroken run."""
        run, tries = self.killed(kind, monitored)
        row: dict[str, Any] = {"kind": kind, "monitored": monitored, "tries": tries}
        files = sorted(file.name for file in run.last.parent.glob("*.ckpt"))
        row |= {"checkpoints": files, "half_written": run.is_writing(), "damaged": damaged(run)}
        if run.is_complete():
            end, row["then"] = run, "complete"
        elif files:
            end, row["then"] = self.start(f"resume={run.folder}", "logger=csv"), "resumed"
        else:
            end, row["then"] = self.start(*self.words(monitored)), "begun anew"
        try:
            if end is not run:
                end.end()
            row["difference"] = difference(end.folder, self.unbroken[monitored].folder)
        except RuntimeError as error:
            row["difference"] = str(error)
        return row


def markdown(content: dict[str, Any]) -> str:
    """Return the table of the kills."""
    lines = [
        "# Killed trainings against unbroken ones", "",
        f"`{content['command']}`, {content['minutes']:.1f} minutes. TMPDIR on another file system: "
        f"{'yes' if content['other_file_system'] else 'no'}.", "",
        f"**{content['equal']} of {content['kills']}** end with the weights, results, records and "
        "thresholds of the unbroken run.", "",
        "| killed | best epoch validated | half-written checkpoint | then | difference |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in content["rows"]:
        cells = [row["kind"], *("yes" if row[k] else "no" for k in ("monitored", "half_written"))]
        lines.append(f"| {' | '.join([*cells, row['then'], row['difference'] or 'none'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind, number in (("random", 10), ("checkpoint", 5), ("closing", 5)):
        parser.add_argument(f"--{kind}", type=int, default=number)
    parser.add_argument("--tmpdir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of kills.json and kills.md")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="kills-") as work,
        tempfile.TemporaryDirectory(prefix="kills-", dir=given.tmpdir) as tmpdir,
    ):
        os.environ["HF_HOME"] = f"{work}/hf"
        import torch

        from deebert.disk import whole_files
        from deebert.reporting import report

        torch.set_num_threads(1)
        for module in ("deebert.runs.train", "deebert.classifier", "matplotlib.pyplot"):
            import_module(module)  # before the processes are forked
        environment = vars(report.environment())
        benchmark = Benchmark(Path(work), Path(tmpdir), given.seed)
        most = max(given.random, given.checkpoint, given.closing)
        benchmark.measure((False, True)[:most])
        rows = []
        for kind in ("random", "checkpoint", "closing"):
            for number in range(getattr(given, kind)):
                rows.append(benchmark.row(kind, monitored=number % 2 == 1))
                print(json.dumps(rows[-1]), flush=True)
        other = os.stat(work).st_dev != os.stat(tmpdir).st_dev
    content = {
        "command": " ".join(["python benchmarks/kills.py", *sys.argv[1:]]),
        "environment": environment,
        "minutes": (time.perf_counter() - start) / 60,
        "other_file_system": other,
        "kills": len(rows),
        "equal": sum(row["difference"] is None for row in rows),
        "rows": rows,
    }
    whole_files.replace(given.out / "kills.json", json.dumps(content, indent=1) + "\n")
    whole_files.replace(given.out / "kills.md", markdown(content))
    print(f"{content['equal']} of {content['kills']} equal")


if __name__ == "__main__":
    main()
