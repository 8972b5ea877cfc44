"""docs/scale.md, every command as written, against one process: torchrun, srun, joblib, submitit, Ray.

What needs a cluster is started here in its place: a program called srun that gives its tasks SLURM's
variables, and a Ray cluster of two nodes on this machine.
"""

import csv
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path

import pyarrow.dataset
import pytest
import torch
from conftest import ROOT, TINY, results
from hydra import compose, initialize_config_dir

from deebert import EarlyExitClassifier
from deebert.data import demo
from deebert.errors import UserError
from deebert.exits import records
from deebert.hub import record_files
from deebert.options import parse
from deebert.predict import command as predict
from deebert.runs import ranks

Run = Callable[..., str]

TEXT = (ROOT / "docs" / "scale.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
    if line
]
# One step an epoch, and no dropout: what is random differs from process to process.
TOLD = (
    *TINY, "data.limit_train=16", "data.eval_batch_size=16", "stages.1.epochs=4", "stages.1.lr=1e-3",
    "stages.2.epochs=4", "stages.2.lr=1e-2", "+backbone.config.hidden_dropout_prob=0",
    "+backbone.config.attention_probs_dropout_prob=0",
)  # fmt: skip

# Starts the tasks of all nodes here. The second node is late: it comes when the first has made a
# folder in the run folder.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys, time
words = sys.argv[1:]
options = dict(word[2:].split("=") for word in words if word.startswith("--"))
command = [word for word in words if not word.startswith("--")]
nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
started = []
for rank in range(nodes * tasks):
    told = {{
        "JOB_ID": "1", "JOB_NAME": "python", "NODELIST": "127.0.0.1", "NNODES": nodes,
        "NTASKS": nodes * tasks, "NTASKS_PER_NODE": tasks, "PROCID": rank, "LOCALID": rank % tasks,
        "NODEID": rank // tasks,
    }}
    told = {{"SLURM_" + name: str(value) for name, value in told.items()}}
    started.append(subprocess.Popen(command, env=os.environ | told))
    while not rank and started[0].poll() is None and not os.path.exists(os.environ["LATE_UNTIL"]):
        time.sleep(0.1)
while any(task.poll() is None for task in started):
    if any(task.poll() for task in started):
        for task in started:
            task.kill()
    time.sleep(0.1)
sys.exit(max(abs(task.wait()) for task in started))
"""


def written(*words: str) -> list[str]:
    """The one command of the page that holds these words."""
    [command] = [each for each in COMMANDS if all(word in each for word in words)]
    return shlex.split(command)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def execute(command: list[str], place: Path, *more: str, **environment: str) -> str:
    """Run a command in a folder; returns what it printed."""
    scripts = {name: str(ROOT / name) for name in ("train.py", "evaluate.py")}
    path = os.pathsep.join(
        [str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    told = {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": str(free_port())} | environment
    done = subprocess.run(
        [*(scripts.get(word, word) for word in command), *more],
        cwd=place,
        env=os.environ | told,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all commands are given in, one after the other."""
    folder = tmp_path_factory.mktemp("scale")
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(SRUN)
    (folder / "bin" / "srun").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def torchrun(place: Path, glue: Path) -> Path:
    """A stage-1 run of two processes, and a third folder with what two processes say of it."""
    execute(
        written("torchrun", "train.py", "--nproc-per-node=2"), place, *TOLD, f"data.root={glue}"
    )
    execute(written("torchrun", "evaluate.py"), place, "logger=csv")
    return place / "runs"


@pytest.fixture(scope="module")
def srun(place: Path, torchrun: Path) -> Path:
    """The stage 2 that follows, under SLURM."""
    late = place / "runs" / "mrpc-2" / "csv"
    execute(written("srun"), place, "logger=csv", LATE_UNTIL=str(late))
    return place / "runs" / "mrpc-2"


def recorded(run: Path) -> records.Record:
    return record_files.load(run / "records" / "validation.safetensors")[0]


def assert_trained_alike(ours: Path, theirs: Path) -> None:
    """To what sums in another order leave."""
    a, b = recorded(ours), recorded(theirs)
    assert torch.equal(a.labels_N, b.labels_N)
    torch.testing.assert_close(a.logits_NLC, b.logits_NLC, atol=1e-4, rtol=0)
    steps = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        for run in (ours, theirs)
    ]
    assert steps == [4, 4]


def test_every_command_is_run_here() -> None:
    """As written, or (what is marked with another machine's name) looked at for its settings."""
    here = [c for c in COMMANDS if not re.search("HEAD|/shared|submitit_slurm|^pip|ray start", c)]
    assert len(here) == 6
    for words in (
        ["torchrun", "train.py", "--nproc-per-node=2"], ["torchrun", "evaluate.py"], ["srun"],
        ["hydra/launcher=joblib"], ["hydra/launcher=submitit_local"], ["deebert.predict", "input=reviews "],
    ):  # fmt: skip
        assert shlex.join(written(*words)) in map(shlex.join, map(shlex.split, here))


def test_torchrun_trains_as_one_process_with_twice_the_batch(
    run: Run, torchrun: Path, glue: Path, tmp_path: Path
) -> None:
    run(
        "train.py", "task=mrpc", "stage=1", *TOLD, f"data.root={glue}", "stages.1.batch_size=16",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert_trained_alike(torchrun / "mrpc-1", tmp_path)


def test_torchrun_evaluates_as_one_process(run: Run, torchrun: Path, tmp_path: Path) -> None:
    run("evaluate.py", f"ckpt={torchrun / 'mrpc-1'}", "logger=csv", f"hydra.run.dir={tmp_path}")
    ours, theirs = results(torchrun / "mrpc-1-test"), results(tmp_path)
    assert ours["num_rows"] == theirs["num_rows"] == 40
    assert ours["exits"] == theirs["exits"]
    assert ours["curve"] == theirs["curve"]
    assert torch.equal(recorded(torchrun / "mrpc-1-test").logits_NLC, recorded(tmp_path).logits_NLC)


def test_srun_trains_as_one_process_with_twice_the_batch(
    run: Run, srun: Path, tmp_path: Path
) -> None:
    """On two nodes that share the run folder, one of which comes late."""
    stage1 = srun.parent / "mrpc-1"
    run(
        "train.py", "stage=2", f"ckpt={stage1}", "logger=csv", "stages.2.batch_size=16",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert_trained_alike(srun, tmp_path)
    moved = (recorded(srun).logits_NLC - recorded(stage1).logits_NLC).abs().amax((0, 2))
    assert moved[:-1].min() > 0.01, "the ramps have learned something"
    assert moved[-1] < 1e-5, "the final classifier stays"


def test_what_several_processes_trained_is_used_as_any_model(srun: Path, glue: Path) -> None:
    classifier = EarlyExitClassifier.from_pretrained(srun)
    rows = [*map(json.loads, (glue / "mrpc" / "validation.jsonl").read_text().splitlines())]
    found = classifier.predict(rows, threshold=0)
    expected_NC = recorded(srun).logits_NLC[:, -1].softmax(-1)
    torch.testing.assert_close(found.probabilities_NC, expected_NC, atol=1e-5, rtol=0)
    assert classifier.calibrate(target_saving=0.4).expected["expected_saving"] == pytest.approx(
        0.4, abs=0.05
    )


@pytest.mark.parametrize(
    ("told", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),  # a child of Lightning's
        ({"LOCAL_RANK": "0", "RANK": "8"}, False),  # torchrun on the second machine
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"NODE_RANK": "1"}, False),  # the second machine of Lightning's own start
    ],
)
def test_which_process_is_the_first(
    told: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ranks.NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert ranks.is_first() is first


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_sweep_in_other_processes_is_the_basic_one(
    launcher: str,
    run: Run,
    srun: Path,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(place.glob("multirun/*/*"))
    printed = execute(written(f"hydra/launcher={launcher}"), place, "logger=csv")
    [folder] = set(place.glob("multirun/*/*")) - before
    assert f"sweep: {folder / 'sweep.md'}" in printed
    assert "no summary" not in printed
    monkeypatch.chdir(place)
    script, *said = written(f"hydra/launcher={launcher}")[1:]
    said = [o for o in said if not o.startswith(("hydra/launcher", "hydra.launcher"))]
    run(script, *said, "logger=csv", f"hydra.sweep.dir={tmp_path}")
    ours, theirs = ((each / "sweep.csv").read_text() for each in (folder, tmp_path))
    assert ours == theirs
    rows = list(csv.DictReader(ours.splitlines()))
    assert [row["target"] for row in rows] == ["target_saving=0.2", "target_saving=0.4"]
    assert {results(folder / job)["seed"] for job in "01"} == {42}
    assert not list(folder.glob(".*.part"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"/shared.*train\.py|train\.py.*/shared", c)])  # fmt: skip
def test_what_needs_more_machines_composes(command: str) -> None:
    words = shlex.split(command)
    said = [o for o in words[words.index("train.py") + 1 :] if not o.startswith("-")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", said)
    assert (cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.strategy) == (8, 2, "ddp")


def test_the_sweep_on_slurm_composes(run: Run) -> None:
    script, *said = written("submitit_slurm")[1:]
    said = [o for o in said if o != "-m" and "," not in o]
    printed = run(script, *said, "--cfg", "hydra", "-p", "hydra.launcher")
    assert "submitit_launcher.SlurmLauncher" in printed
    assert "partition: gpu" in printed
    assert "timeout_min: 60" in printed


TARGET = "target_saving=0.4"


@pytest.fixture(scope="module")
def reviews(place: Path) -> Path:
    """Three files of several blocks; rows that cannot be answered; a column called as ours is."""
    folder = place / "reviews"
    (folder / "more").mkdir(parents=True)
    pairs = [(row["product"], row["review"]) for row in demo.rows("train")[:300]]
    pairs[7], pairs[70] = ("", "no text"), ('a "quote", and more', "two\nlines")
    for name, chosen in (("a.csv", pairs[:100]), ("b.csv", pairs[100:110]), ("more/c.csv", pairs)):
        with (folder / name).open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["sentence1", "sentence2", "file" if name == "b.csv" else "id"])
            writer.writerows((*pair, f"no. {i}") for i, pair in enumerate(chosen))
    return folder


def answered_here(file: Path, model: Path, place: Path, *said: str) -> list[dict[str, str]]:
    """By one process."""
    out = place / "single.csv"
    options = [f"model={model}", f"input={file}", f"output={out}", TARGET, "overwrite=true", *said]
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


def answered_alone(reviews: Path, model: Path, place: Path, *said: str) -> list[dict[str, str]]:
    """All rows, file by file, as one process answers them."""
    told = [word for word in said if not word.startswith("parts=")]
    found = []
    for file in sorted(reviews.rglob("*.csv")):
        for row in answered_here(file, model, place, *told):
            if "file" in row:
                row["input_file"] = row.pop("file")
            found.append({"file": file.relative_to(reviews).as_posix()} | row)
    assert len({row["exit_layer"] for row in found}) > 1, "the test shows something"
    return found


def rays() -> set[int]:
    """The processes of Ray on this machine."""
    found = set()
    for each in Path("/proc").glob("[0-9]*"):
        try:
            said = (each / "cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::" in said or b"/ray/" in said:
            found.add(int(each.name))
    return found


def test_ray_on_this_machine(place: Path, reviews: Path, stage2: Path) -> None:
    """Two workers; the answers of one process; nothing of Ray is left behind."""
    before = rays()
    command = [word.replace("RUN", str(stage2)) for word in written("input=reviews ")]
    printed = execute(command, place, "part_rows=16", RAY_ADDRESS="")
    expected = answered_alone(reviews, stage2, place, "part_rows=16")
    assert parts_of(place / "answers") == expected, "to the last digit"
    assert printed.startswith("410 rows, 2 of them bad")
    assert "WARNING" not in printed
    assert "INFO" not in printed
    errors = [*map(json.loads, (place / "answers" / "_errors.jsonl").read_text().splitlines())]
    assert [(row["file"], row["row"]) for row in errors] == [("a.csv", 7), ("more/c.csv", 7)]
    assert errors[0]["reason"] == "its 'sentence1' is empty"
    names = {path.name for path in (place / "answers").iterdir()}
    assert {name for name in names if name[0] in "._"} == {"_job.json", "_errors.jsonl"}
    assert len(names) - 2 == 7 + 1 + 19, "a part a block"
    for _ in range(300):
        if not rays() - before:
            break
        time.sleep(0.2)
    assert not rays() - before
    with pytest.raises(UserError, match="there already; replace it with overwrite=true"):
        asked(place, stage2)


def asked(place: Path, model: Path, *said: str) -> None:
    """The same in this process, up to where Ray would be started."""
    told = {
        "model": model,
        "input": place / "reviews",
        "output": place / "answers",
        "engine": "ray",
    }
    told |= dict(word.split("=", 1) for word in (TARGET, *said))
    options = [f"{key}={value}" for key, value in told.items()]
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
            told, command = apart(written("ray start", where))
            command = [word.replace("HEAD:6379", f"127.0.0.1:{port}") for word in command]
            more = (here, "--num-cpus=1", "--object-store-memory=200000000", "--block")
            if where == "--head":
                more += ("--include-dashboard=false",)
            ray = str(Path(sys.executable).with_name("ray"))
            node = subprocess.Popen(
                [ray, *command[1:], *more],
                env=os.environ | told | token,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(node)  # waits for its end
            stack.callback(node.terminate)
            said = list(takewhile(lambda line: "Ray runtime started" not in line, node.stdout))
            assert node.poll() is None, "".join(said)
        yield token


def test_ray_on_a_cluster_killed_and_given_again(
    place: Path, reviews: Path, stage2: Path, cluster: dict[str, str]
) -> None:
    answers = place / "answers-of-cluster"
    instead = {"RUN": str(stage2), "/shared/reviews": str(reviews), "/shared/answers": str(answers)}
    instead |= {"workers=16": "workers=2"}
    words = written("RAY_ADDRESS=auto")
    for here, there in instead.items():
        words = [word.replace(here, there) for word in words]
    told, command = apart(words)
    told |= cluster
    more = ("part_rows=2", "parts=parquet")
    killed = subprocess.Popen(
        [sys.executable, *command[1:], *more], cwd=place, env=os.environ | told, stdout=subprocess.DEVNULL
    )  # fmt: skip
    while killed.poll() is None and len([*answers.glob("_part-*.json")]) < 5:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    before = {path.name: path.stat().st_mtime_ns for path in answers.glob("part-*.parquet")}
    assert 5 <= len(before) < 200, "killed in the middle of it"
    with pytest.raises(UserError, match="another job, with another target"):
        asked(place, stage2, f"output={answers}", "target_saving=0.2", *more)
    printed = execute(command, place, *more, **told)
    assert "rows were done before; going on with the rest" in printed
    found = pyarrow.dataset.dataset(answers).to_table().to_pylist()  # passes over what is ours
    found.sort(key=lambda row: (row["file"], row["row"]))
    expected = answered_alone(reviews, stage2, place, *more)
    names = ("file", "row", "label", "exit_layer")
    assert [[str(row[name]) for name in names] for row in found] == [
        [row[name] for name in names] for row in expected
    ]
    assert [row["probability"] for row in found] == pytest.approx(
        [float(row["probability"]) for row in expected], abs=1e-5
    )
    after = {path.name: path.stat().st_mtime_ns for path in answers.glob("part-*.parquet")}
    again = sum(after[name] != before[name] for name in before)
    assert again <= 4, "but for what was under way, nothing was done twice"


@pytest.mark.parametrize(
    ("said", "says"),
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
    said: list[str], says: str, place: Path, reviews: Path, stage2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=says) as error:
        asked(place, stage2, *said)
    assert "\n" not in str(error.value)
    assert not (place / "fresh").exists()


def test_without_ray_the_command_says_what_to_install(
    place: Path, stage2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'pip install "deebert\[ray\]"'):
        asked(place, stage2)
