"""docs/scale.md, prediction with Ray: on this machine, and on a cluster of two nodes on this machine."""

import csv
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path

import pyarrow.dataset
import pytest
from helpers.ports import free_port
from helpers.scale_commands import execute, written

from deebert.data import demo
from deebert.errors import UserError
from deebert.options import parse
from deebert.predict import command as predict

TARGET = "target_saving=0.4"


@pytest.fixture(scope="module")
def reviews(place: Path) -> Path:
    """Three files of several blocks; rows that cannot be answered; a column called as ours is."""
    folder = place / "reviews"
    (folder / "more").mkdir(parents=True)
    pairs = [(row["product"], row["review"]) for row in demo.rows("train")[:120]]
    pairs[7], pairs[70] = ("a\0", "no text"), ('a "quote", and more', "two\nlines")
    for name, chosen in (("a.csv", pairs[:50]), ("b.csv", pairs[50:60]), ("more/c.csv", pairs)):
        with (folder / name).open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["sentence1", "sentence2", "file" if name == "b.csv" else "id"])
            writer.writerows((*pair, f"no. {i}") for i, pair in enumerate(chosen))
    return folder


def answered_here(file: Path, model: Path, place: Path, *more: str) -> list[dict[str, str]]:
    """By one process."""
    out = place / "single.csv"
    options = [f"model={model}", f"input={file}", f"output={out}", TARGET, "overwrite=true", *more]
    predict.predict(parse(predict.PredictOptions, options))
    return list(csv.DictReader(out.read_text().splitlines(keepends=True)))


def parts_of(folder: Path) -> list[dict[str, str]]:
    """All rows, by file and number."""
    rows = [
        row
        for part in folder.glob("part-*.csv")
        for row in csv.DictReader(part.read_text().splitlines(keepends=True))
    ]
    return sorted(rows, key=lambda row: (row["file"], int(row["row"])))


def answered_alone(reviews: Path, model: Path, place: Path, *more: str) -> list[dict[str, str]]:
    """All rows, file by file, as one process answers them."""
    kept = [word for word in more if not word.startswith("parts=")]
    answers = []
    for file in sorted(reviews.rglob("*.csv")):
        for row in answered_here(file, model, place, *kept):
            if "file" in row:
                row["input_file"] = row.pop("file")
            answers.append({"file": file.relative_to(reviews).as_posix()} | row)
    assert len({row["exit_layer"] for row in answers}) > 1, "the test shows something"
    return answers


def rays() -> set[int]:
    """The processes of Ray on this machine."""
    processes = set()
    for each in Path("/proc").glob("[0-9]*"):
        try:
            command_line = (each / "cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::" in command_line or b"/ray/" in command_line:
            processes.add(int(each.name))
    return processes


@pytest.mark.slow
def test_ray_on_this_machine(place: Path, reviews: Path, stage2: Path) -> None:
    """Two workers; the answers of one process; nothing of Ray is left behind."""
    before = rays()
    command = [word.replace("RUN", str(stage2)) for word in written("input=reviews ")]
    printed = execute(command, place, "part_rows=16", RAY_ADDRESS="")
    expected = answered_alone(reviews, stage2, place, "part_rows=16")
    assert parts_of(place / "answers") == expected, "to the last digit"
    assert printed.startswith("180 rows, 2 of them bad")
    assert "WARNING" not in printed
    assert "INFO" not in printed
    errors = [*map(json.loads, (place / "answers" / "_errors.jsonl").read_text().splitlines())]
    assert [(row["file"], row["row"]) for row in errors] == [("a.csv", 7), ("more/c.csv", 7)]
    assert errors[0]["reason"] == "it holds a NUL byte"
    names = {path.name for path in (place / "answers").iterdir()}
    assert {name for name in names if name[0] in "._"} == {"_job.json", "_errors.jsonl"}
    assert len(names) - 2 == 4 + 1 + 8, "a part a block"
    for _ in range(300):
        if not rays() - before:
            break
        time.sleep(0.2)
    assert not rays() - before
    with pytest.raises(UserError, match="there already; replace it with overwrite=true"):
        in_this_process(place, stage2)


def in_this_process(place: Path, model: Path, *more: str) -> None:
    """The same in this process, up to where Ray would be started."""
    values = {
        "model": model,
        "input": place / "reviews",
        "output": place / "answers",
        "engine": "ray",
    }
    values |= dict(word.split("=", 1) for word in (TARGET, *more))
    options = [f"{key}={value}" for key, value in values.items()]
    predict.predict(parse(predict.PredictOptions, options))


def apart(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The variables before a command, and the command."""
    begin = next(number for number, word in enumerate(words) if "=" not in word)
    return dict(word.split("=") for word in words[:begin]), words[begin:]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Two nodes of one core each; the variables with which it lets somebody in."""
    port, token = free_port(), {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with ExitStack() as stack:
        for where, here in (("--head", f"--port={port}"), ("--address=", "--num-gpus=0")):
            variables, command = apart(written("ray start", where))
            command = [word.replace("HEAD:6379", f"127.0.0.1:{port}") for word in command]
            more = (here, "--num-cpus=1", "--object-store-memory=200000000", "--block")
            if where == "--head":
                more += ("--include-dashboard=false",)
            ray = str(Path(sys.executable).with_name("ray"))
            node = subprocess.Popen(
                [ray, *command[1:], *more],
                env=os.environ | variables | token,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            stack.enter_context(node)  # waits for its end
            # A node that is told to end waits for each of its processes: a quarter of a minute.
            stack.callback(os.killpg, node.pid, signal.SIGKILL)
            lines = list(takewhile(lambda line: "Ray runtime started" not in line, node.stdout))
            assert node.poll() is None, "".join(lines)
        yield token


@pytest.mark.slow
def test_ray_on_a_cluster_killed_and_given_again(
    place: Path, reviews: Path, stage2: Path, cluster: dict[str, str]
) -> None:
    answers = place / "answers-of-cluster"
    instead = {"RUN": str(stage2), "/shared/reviews": str(reviews), "/shared/answers": str(answers)}
    instead |= {"workers=16": "workers=2"}
    words = written("RAY_ADDRESS=auto")
    for here, there in instead.items():
        words = [word.replace(here, there) for word in words]
    variables, command = apart(words)
    variables |= cluster
    more = ("part_rows=2", "parts=parquet")
    program = str(Path(sys.executable).with_name(command[0]))  # `deebert`
    killed = subprocess.Popen(
        [program, *command[1:], *more], cwd=place, env=os.environ | variables, stdout=subprocess.DEVNULL
    )  # fmt: skip
    while killed.poll() is None and len([*answers.glob("_part-*.json")]) < 5:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    before = {path.name: path.stat().st_mtime_ns for path in answers.glob("part-*.parquet")}
    assert 5 <= len(before) < 85, "killed in the middle of it"
    with pytest.raises(UserError, match="another job, with another target"):
        in_this_process(place, stage2, f"output={answers}", "target_saving=0.2", *more)
    printed = execute(command, place, *more, **variables)
    assert "rows were done before; going on with the rest" in printed
    rows = pyarrow.dataset.dataset(answers).to_table().to_pylist()  # passes over what is ours
    rows.sort(key=lambda row: (row["file"], row["row"]))
    expected = answered_alone(reviews, stage2, place, *more)
    names = ("file", "row", "label", "exit_layer")
    assert [[str(row[name]) for name in names] for row in rows] == [
        [row[name] for name in names] for row in expected
    ]
    assert [row["probability"] for row in rows] == pytest.approx(
        [float(row["probability"]) for row in expected], abs=1e-5
    )
    after = {path.name: path.stat().st_mtime_ns for path in answers.glob("part-*.parquet")}
    again = sum(after[name] != before[name] for name in before)
    assert again <= 4, "but for what was under way, nothing was done twice"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["input=-"], "input=- is for engine=local"),
        (["input=bin"], "no file there ends with .csv"),
        (["output=reviews/out"], "lies in the input"),
        (["output=bin"], "holds other files"),
        (["output=none/out"], "there is no folder"),
        (["output=bin/srun"], "is a file; engine=ray writes a folder"),
        (["workers=0"], "workers=0 must be 1 or more"),
        (["parts=xml"], "choose one of: csv, jsonl, parquet"),
        (["columns=[a,b]"], "it has no column 'a'"),
        (["target_saving=2", "output=fresh"], "target_saving=2"),
    ],
)  # fmt: skip
def test_ray_is_not_started_in_vain(
    options: list[str], says: str, place: Path, reviews: Path, stage2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=says) as error:
        in_this_process(place, stage2, *options)
    assert "\n" not in str(error.value)
    assert not (place / "fresh").exists()


def test_without_ray_the_command_says_what_to_install(
    place: Path, stage2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'pip install "deebert\[ray\]"'):
        in_this_process(place, stage2)
