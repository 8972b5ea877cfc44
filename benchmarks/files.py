"""Prediction over a file: its rate against the engine alone, its memory, and kills at any moment.

    python benchmarks/files.py RUN --root DIR [--rows N] [--kills K] [--repeats R] [--only PART ...]

RUN is a stage-2 run of a GLUE task; its texts are read from DIR and written, over and over, into
a CSV in a temporary folder. The rate is that of the whole command in this process, with loading
the model, against the engine's on the same tokens, in turns. Memory and kills are of real
processes: one is killed (SIGKILL) at a moment drawn from the whole time that it takes, started
again, and so on, and what it has written in the end is compared byte for byte. Writes files.json
and files.md after each part (rate, memory, kills); parts that are not asked for stay in them.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from deebert import EarlyExitClassifier
from deebert.data import loading
from deebert.data.tasks import Task
from deebert.disk import whole_files
from deebert.errors import UserError
from deebert.options import parse
from deebert.predict import parts
from deebert.predict.command import predict
from deebert.predict.work import PredictOptions
from deebert.reporting import report

HERE = Path(__file__).parent
MEMORY_ROWS = (10_000, 100_000)
PARTS = ("rate", "memory", "kills")
# The command, and the peak memory of its process; not ru_maxrss, which starts at the parent's.
COUNTED = """
import sys
from pathlib import Path
from deebert.options import parse
from deebert.predict.command import predict
from deebert.predict.work import PredictOptions
predict(parse(PredictOptions, sys.argv[1:]))
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


def texts(task: Task, root: str) -> Iterator[tuple[str, ...]]:
    """All texts of the task that are there, without end."""
    rows_of_texts: list[tuple[str, ...]] = []
    for split in (*filter(None, [task.train]), *task.validation, *task.test):
        with contextlib.suppress(UserError):
            rows = loading.load(task, split, root)
            columns = ("text_a", "text_b")[: len(task.columns)]
            rows_of_texts += zip(*(rows[name][:] for name in columns), strict=True)
    if not rows_of_texts:
        raise SystemExit(f"no texts of {task.name} under {root}")
    return itertools.cycle(rows_of_texts)


def write(file: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["id", *columns])
        writer.writerows([number, *row] for number, row in enumerate(rows))


def process(*words: str) -> list[str]:
    return [sys.executable, "-m", "deebert", "predict", *words]


def rates(
    classifier: EarlyExitClassifier, rows: list[tuple[str, ...]], words: list[str], repeats: int
) -> dict[str, Any]:
    """Seconds of the whole command and of the engine alone on the same tokens, in turns."""
    saving = next(float(word.partition("=")[2]) for word in words if "target_saving" in word)
    operating_point = classifier.calibrate(target_saving=saving)
    inputs = classifier.encode(rows)
    engine = classifier.engine.at(operating_point.thresholds, operating_point.rule)
    options = parse(PredictOptions, [*words, "overwrite=true"])

    command_rates: list[
        float
    ] = []  # by the command: without loading the model and joining the parts

    def of_file() -> None:
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            predict(options)
        command_rates.append(
            float(re.findall(r"([\d,]+) rows/s", stream.getvalue())[0].replace(",", ""))
        )

    systems = {"file": of_file, "engine": lambda: engine.run(inputs)}
    engine.run(inputs[:1000])
    turns: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(repeats):
        for name in list(systems)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            systems[name]()
            turns[name].append(time.perf_counter() - start)
            print(f"{name}: {turns[name][-1]:.1f} s", flush=True)
    shares = [a / b for a, b in zip(turns["engine"], turns["file"], strict=True)]
    return {
        "rows": len(rows),
        "tokens": sum(len(each["input_ids"]) for each in inputs),
        "file_seconds": turns["file"],
        "engine_seconds": turns["engine"],
        "file_rows_per_second": len(rows) / statistics.median(turns["file"]),
        "engine_rows_per_second": len(rows) / statistics.median(turns["engine"]),
        "rate_against_engine": statistics.median(shares),
        "told_rows_per_second": command_rates,
    }


def memory(options: list[str]) -> float:
    """Peak of a process, in MiB."""
    command = [sys.executable, "-c", COUNTED, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def kills(options: list[str], folder: Path, number: int, suffix: str) -> dict[str, Any]:
    """Kill so many times; where a run gets to its end before, the next one begins anew."""
    whole = folder / f"whole{suffix}"
    start = time.perf_counter()
    subprocess.run(process(*options, f"output={whole}"), check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    source, moments, runs = random.Random(0), [], 0
    equal = True
    while len(moments) < number:
        output = folder / f"killed{runs}{suffix}"
        while not output.exists():
            child = subprocess.Popen(
                process(*options, f"output={output}"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            moment = source.uniform(0, seconds) if len(moments) < number else None
            try:
                code = child.wait(moment)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                done = len(list(parts.parts_of(output).glob("0*.json")))
                ended = output.exists()  # the process had only to end
                moments.append({"seconds": moment, "parts_done": done, "ended": ended, "run": runs})
                print(f"killed after {moment:.1f} of {seconds:.1f} s: {moments[-1]}", flush=True)
            else:
                # Once all was in its place there is nothing to go on with, which is an error, too.
                assert code == 0 or output.exists(), code
        if parts.parts_of(output).exists():  # killed in its very last step
            subprocess.run(process(*options, f"output={output}"), stdout=subprocess.DEVNULL)
        for beside in (lambda file: file, parts.errors_of):
            ours, theirs = beside(output), beside(whole)
            same = ours.exists() == theirs.exists()
            same = same and (not ours.exists() or ours.read_bytes() == theirs.read_bytes())
            equal = equal and same
        runs += 1
    return {"kills": moments, "runs": runs, "seconds_unbroken": seconds, "equal": equal}


def markdown(content: dict[str, Any]) -> str:
    lines = ["# Prediction over files"]
    for part, of in zip(PARTS, (of_rate, of_memory, of_kills), strict=True):
        if part in content:
            about = content[part]
            where = about["environment"]
            lines += [
                "",
                f"## {part.capitalize()}",
                "",
                f"`{about['command']}`: {about['threads']} threads of {where['cpus']} CPU cores "
                f"({where['device']}), torch {where['versions']['torch']}, commit "
                f"{(where['git_commit'] or 'unknown')[:7]}; {about['minutes']:.0f} minutes. Task "
                f"{about['task']}, CSV to {about['ending']}, "
                f"target_saving={about['target_saving']}.",
                "",
                *of(about),
            ]
    return "\n".join(lines) + "\n"


def of_rate(rate: dict[str, Any]) -> list[str]:
    share = rate["rate_against_engine"]
    reached = "reached" if share >= 0.9 else "**not reached**"
    printed_rate = statistics.median(rate["told_rows_per_second"])
    return [
        f"{rate['rows']:,} rows, {rate['tokens']:,} tokens; medians over "
        f"{len(rate['file_seconds'])} turns. The command's own figure leaves out loading the model "
        "and joining the parts.",
        "",
        "| what | seconds | rows/s | against the engine |",
        "| --- | ---: | ---: | ---: |",
        f"| the whole command | {statistics.median(rate['file_seconds']):.1f} | "
        f"{rate['file_rows_per_second']:,.0f} | {share:.1%} |",
        f"| the command's own figure | | {printed_rate:,.0f} | "
        f"{printed_rate / rate['engine_rows_per_second']:.1%} |",
        f"| the engine, same tokens | {statistics.median(rate['engine_seconds']):.1f} | "
        f"{rate['engine_rows_per_second']:,.0f} | 100% |",
        "",
        f"Bar A (within 10 % of the engine's own rate), whole command: {share:.1%}, {reached}.",
    ]


def of_memory(memory: dict[str, Any]) -> list[str]:
    peaks = {int(rows): peak for rows, peak in memory["mebibytes"].items()}
    base = peaks[min(peaks)]
    return [
        "Peak of a process of its own.",
        "",
        "| rows | MiB | against the smallest |",
        "| ---: | ---: | ---: |",
        *(f"| {n:,} | {peak:.0f} | {peak / base:.3f} |" for n, peak in peaks.items()),
    ]


def of_kills(killed: dict[str, Any]) -> list[str]:
    return [
        f"SIGKILL at {len(killed['kills'])} moments, drawn from the whole time of an unbroken run "
        f"({killed['seconds_unbroken']:.1f} s, {killed['rows']:,} rows), over {killed['runs']} "
        f"runs. Output and errors are {'equal' if killed['equal'] else '**not equal**'} to the "
        "unbroken run's, byte for byte.",
        "",
        "| run | killed after, s | parts done by then |",
        "| ---: | ---: | ---: |",
        *(
            f"| {k['run'] + 1} | {k['seconds']:.1f} | {'all' if k['ended'] else k['parts_done']} |"
            for k in killed["kills"]
        ),
    ]


def command(given: argparse.Namespace) -> str:
    """Without the folders of this machine."""
    names = ("rows", "kills", "repeats", "target_saving", "part_rows", "ending")
    options = " ".join(f"--{name.replace('_', '-')} {getattr(given, name)}" for name in names)
    only = "" if given.only == PARTS else f" --only {' '.join(given.only)}"
    return f"python benchmarks/files.py RUN --root DIR {options}{only}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a stage-2 run")
    parser.add_argument("--root", required=True, help="folder of the GLUE files")
    parser.add_argument("--rows", type=int, default=100_000, help="of the file")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--target-saving", type=float, default=0.4)
    parser.add_argument("--part-rows", type=int, default=PredictOptions().part_rows)
    parser.add_argument("--ending", default=".parquet", choices=[".csv", ".jsonl", ".parquet"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    results = given.out / "files.json"
    content = json.loads(results.read_text()) if results.exists() else {}
    classifier = EarlyExitClassifier.from_pretrained(given.run)
    task = classifier.task
    rows = list(itertools.islice(texts(task, given.root), given.rows))
    # Some that are bad, in the file and not in the engine's inputs, would not be the same tokens.
    rows = [row if all(text.strip() for text in row) else ("none",) * len(row) for row in rows]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = {size: folder / f"{size}.csv" for size in {*MEMORY_ROWS, given.rows}}
        inputs = {size: file for size, file in sorted(inputs.items()) if size <= given.rows}
        for size, file in inputs.items():
            write(file, task.columns, rows[:size])
        options = [
            f"model={given.run}",
            f"target_saving={given.target_saving}",
            f"part_rows={given.part_rows}",
        ]
        of_all = [*options, f"input={inputs[given.rows]}"]
        output = f"output={folder / 'out'}{given.ending}"
        about = {
            "command": command(given),
            "task": task.name,
            "ending": given.ending,
            "target_saving": given.target_saving,
            "threads": torch.get_num_threads(),
            "environment": vars(report.environment()),
        }
        measured: dict[str, Callable[[], dict[str, Any]]] = {
            "rate": lambda: rates(classifier, rows, [*of_all, output], given.repeats),
            "memory": lambda: {
                "mebibytes": {
                    str(size): memory([*options, f"input={file}", output, "overwrite=true"])
                    for size, file in inputs.items()
                }
            },
            "kills": lambda: kills(of_all, folder, given.kills, given.ending) | {"rows": len(rows)},
        }
        for part in given.only:
            start = time.perf_counter()
            content[part] = about | measured[part]()
            content[part]["minutes"] = (time.perf_counter() - start) / 60
            whole_files.replace(results, json.dumps(content, indent=1) + "\n")
            whole_files.replace(given.out / "files.md", markdown(content))


if __name__ == "__main__":
    main()
