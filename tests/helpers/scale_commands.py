"""The commands of docs/scale.md, and what runs them: a folder, and a program called srun.

conftest.py makes the fixture `place` known to all tests.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.ports import free_port

TEXT = (ROOT / "docs" / "scale.md").read_text()

COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
    if line
]

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
    variables = {{
        "JOB_ID": "1", "JOB_NAME": "python", "NODELIST": "127.0.0.1", "NNODES": nodes,
        "NTASKS": nodes * tasks, "NTASKS_PER_NODE": tasks, "PROCID": rank, "LOCALID": rank % tasks,
        "NODEID": rank // tasks,
    }}
    variables = {{"SLURM_" + name: str(value) for name, value in variables.items()}}
    started.append(subprocess.Popen(command, env=os.environ | variables))
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
    """The one command of docs/scale.md that holds these words."""
    [command] = [each for each in COMMANDS if all(word in each for word in words)]
    return shlex.split(command)


def execute(command: list[str], place: Path, *more: str, **environment: str) -> str:
    """Run a command in a folder; returns what it printed."""
    scripts = {name: str(ROOT / name) for name in ("train.py", "evaluate.py")}
    path = os.pathsep.join(
        [str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    port = str(free_port())
    variables = {
        "PATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_PORT": port,
        "PET_MASTER_PORT": port,  # torchrun's
    } | environment
    done = subprocess.run(
        [*(scripts.get(word, word) for word in command), *more],
        cwd=place,
        env=os.environ | variables,
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
