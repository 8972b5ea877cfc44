"""docs/scale.md, training and sweeps, every command as written, against one process: torchrun, srun, joblib,
submitit. In place of a cluster a program called srun gives its tasks SLURM's variables.
"""

import csv
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, results
from helpers.scale_commands import COMMANDS, execute, written
from hydra import compose, initialize_config_dir

from deebert import EarlyExitClassifier
from deebert.exits import records
from deebert.hub import record_files
from deebert.runs import signals

Run = Callable[..., str]

# One step an epoch, and no dropout: what is random differs from process to process.
TRAINING = (
    *TINY, "data.limit_train=16", "data.eval_batch_size=16", "stages.1.epochs=4", "stages.1.lr=1e-3",
    "stages.1.batch_size=8", "stages.2.batch_size=8", "stages.1.warmup=0", "ramp=first",
    "stages.2.standardize=false",
    "stages.2.epochs=4", "stages.2.lr=1e-2", "+backbone.config.hidden_dropout_prob=0",
    "+backbone.config.attention_probs_dropout_prob=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def torchrun(place: Path, glue: Path) -> Path:
    """A stage-1 run of two processes, and a third folder with what two processes say of it."""
    execute(
        written("torchrun", "train.py", "--nproc-per-node=2"), place, *TRAINING, f"data.root={glue}"
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
        ["hydra/launcher=joblib"], ["hydra/launcher=submitit_local"], ["deebert predict", "input=reviews "],
    ):  # fmt: skip
        assert shlex.join(written(*words)) in map(shlex.join, map(shlex.split, here))


@pytest.mark.slow
def test_torchrun_trains_as_one_process_with_twice_the_batch(
    run: Run, torchrun: Path, glue: Path, tmp_path: Path
) -> None:
    run(
        "train.py", "task=mrpc", "stage=1", *TRAINING, f"data.root={glue}", "stages.1.batch_size=16",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert_trained_alike(torchrun / "mrpc-1", tmp_path)


@pytest.mark.slow
def test_torchrun_evaluates_as_one_process(run: Run, torchrun: Path, tmp_path: Path) -> None:
    run("evaluate.py", f"ckpt={torchrun / 'mrpc-1'}", "logger=csv", f"hydra.run.dir={tmp_path}")
    ours, theirs = results(torchrun / "mrpc-1-test"), results(tmp_path)
    assert ours["num_rows"] == theirs["num_rows"] == 40
    assert ours["exits"] == theirs["exits"]
    assert ours["curve"] == theirs["curve"]
    assert torch.equal(recorded(torchrun / "mrpc-1-test").logits_NLC, recorded(tmp_path).logits_NLC)


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_several_processes_trained_is_used_as_any_model(srun: Path, glue: Path) -> None:
    classifier = EarlyExitClassifier.from_pretrained(srun)
    rows = [*map(json.loads, (glue / "mrpc" / "validation.jsonl").read_text().splitlines())]
    answers = classifier.predict(rows, threshold=0)
    expected_NC = recorded(srun).logits_NLC[:, -1].softmax(-1)
    torch.testing.assert_close(answers.probabilities_NC, expected_NC, atol=1e-5, rtol=0)
    assert classifier.calibrate(target_saving=0.4).expected.expected_saving == pytest.approx(
        0.4, abs=0.05
    )


@pytest.mark.parametrize(
    ("variables", "first"),
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
    variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in signals.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert signals.is_first_process() is first


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
@pytest.mark.pictures
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
    script, *overrides = written(f"hydra/launcher={launcher}")[1:]
    overrides = [o for o in overrides if not o.startswith(("hydra/launcher", "hydra.launcher"))]
    run(script, *overrides, "logger=csv", f"hydra.sweep.dir={tmp_path}")
    ours, theirs = ((each / "sweep.csv").read_text() for each in (folder, tmp_path))
    assert ours == theirs
    assert (folder / "sweep.png").read_bytes() == (tmp_path / "sweep.png").read_bytes()
    rows = list(csv.DictReader(ours.splitlines()))
    assert [row["target"] for row in rows] == ["target_saving=0.2", "target_saving=0.4"]
    assert {results(folder / job)["seed"] for job in "01"} == {42}
    assert not list(folder.glob(".*.part"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"/shared.*train\.py|train\.py.*/shared", c)])  # fmt: skip
def test_what_needs_more_machines_composes(command: str) -> None:
    words = shlex.split(command)
    overrides = [o for o in words[words.index("train.py") + 1 :] if not o.startswith("-")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides)
    assert (cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.strategy) == (8, 2, "ddp")


def test_the_sweep_on_slurm_composes(run: Run) -> None:
    script, *overrides = written("submitit_slurm")[1:]
    overrides = [o for o in overrides if o != "-m" and "," not in o]
    printed = run(script, *overrides, "--cfg", "hydra", "-p", "hydra.launcher")
    assert "submitit_launcher.SlurmLauncher" in printed
    assert "partition: gpu" in printed
    assert "timeout_min: 60" in printed
