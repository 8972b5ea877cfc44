"""One file is enough: train, stage 2, evaluate and predict on a CSV file of one's own."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import command, results

from deebert.data import demo
from deebert.hub import checkpoints

LABELS = ("bad", "good")
SHORT = ("backbone=tiny", "logger=csv", "data.max_length=48", "stages.1.epochs=1")


def tickets() -> list[dict]:
    return [
        {"id": n, "message": row["review"], "verdict": LABELS[row["label"]]}
        for n, row in enumerate(demo.rows("train")[:100])
    ]


def write(file: Path, rows: list[dict]) -> Path:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.fixture(scope="module")
def first(made_once: Callable[..., Path]) -> Path:
    """A folder with tickets.csv, and the stage-1 run on it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        file = write(folder / "tickets.csv", tickets())
        command("train.py", f"data.file={file}", *SHORT, "data.calibration_size=20",
                "data.metric=f1_macro",
                f"hydra.run.dir={folder / 'run'}")  # fmt: skip

    return made_once("one-file", make)


@pytest.mark.slow
def test_the_checkpoint_remembers_all_of_it(
    run: Callable[..., str], fails: Callable[..., str], first: Path, tmp_path: Path
) -> None:
    assert results(first / "run")["num_rows"] == 20
    config = checkpoints.read(first / "run" / "checkpoints" / "last.ckpt", "ckpt").config
    assert (config.task.name, config.task.columns) == ("tickets", ("message",))
    assert (config.task.label, config.task.labels) == ("verdict", LABELS)
    assert config.data.file == str(first / "tickets.csv")
    assert config.task.metrics == ("f1_macro", "accuracy", "matthews")
    assert not {"text", "label", "regression", "metric"} & config.plain()["data"].keys()

    second = tmp_path / "second"
    printed = run("train.py", "stage=2", f"ckpt={first / 'run'}", "stages.2.epochs=1", "seed=5",
                  "logger=csv", f"hydra.run.dir={second}")  # fmt: skip
    assert f"data.file={first / 'tickets.csv'}, as " in printed
    assert "60 rows to train on, 20 to validate on" in printed, "20 are held out"
    assert f"Next: python evaluate.py ckpt={second} target_saving=0.4" in printed
    run("evaluate.py", f"ckpt={second}", "logger=csv", "target_saving=0.3", "calibration=heldout",
        f"hydra.run.dir={tmp_path / 'scored'}")  # fmt: skip
    scored, trained = results(tmp_path / "scored"), results(second)
    assert scored["num_rows"] == 20
    assert scored["exits"] == trained["exits"], "the same validation rows, though of another seed"
    assert scored["calibration"]["num_calibration"] == 20
    assert scored["metric"] == "f1_macro"
    assert scored["exits"][-1]["score"] == scored["classes"]["full_depth"]["f1_macro"]
    point = scored["classes"]["operating_point"]
    assert scored["calibration"]["measured"]["score"] == point["f1_macro"]
    assert (
        [each["label"] for each in point["per_class"]] == scored["classes"]["labels"] == [*LABELS]
    )
    assert sum(map(sum, point["confusion"])) == 20
    assert "operating_point" not in results(first / "run")["classes"], "its ramps are untrained"
    shown = (tmp_path / "scored" / "results.md").read_text()
    assert "## Classes at the operating point: tickets, validation" in shown

    # The rows of the file decide, not its place.
    moved = shutil.copy(first / "tickets.csv", tmp_path / "moved.csv")
    where = f"hydra.run.dir={tmp_path / 'again'}"
    run("evaluate.py", f"ckpt={second}", "logger=csv", f"data.file={moved}", where)
    assert results(tmp_path / "again")["exits"] == trained["exits"]
    changed = write(tmp_path / "changed.csv", [*tickets(), tickets()[0]])
    for script, overrides in (("evaluate.py", ()), ("train.py", ("stage=2",))):
        ckpt = second if script == "evaluate.py" else first / "run"
        line = fails(script, *overrides, f"ckpt={ckpt}", "logger=csv", f"data.file={changed}")
        assert "its rows have changed since the checkpoint was trained" in line
    line = fails("train.py", f"resume={first / 'run'}", "data.split_seed=3", "logger=csv")
    assert "data.split_seed=3 contradicts" in line
    line = fails("train.py", "stage=2", f"ckpt={first / 'run'}", "data.validation_share=0.3")
    assert "was trained with data.validation_share=0.2" in line
    line = fails("train.py", "stage=2", f"ckpt={first / 'run'}", "data.text=id")
    assert "data.text=id does nothing here" in line
    # Rows of a folder take the place of the file.
    other = tmp_path / "other"
    other.mkdir()
    write(other / "validation.csv", tickets()[:7])
    run("evaluate.py", f"ckpt={second}", "logger=csv", f"data.root={other}", f"hydra.run.dir={tmp_path / 'o'}")  # fmt: skip
    assert results(tmp_path / "o")["num_rows"] == 7

    from deebert import EarlyExitClassifier

    classifier = EarlyExitClassifier.from_pretrained(str(second))
    assert set(classifier.predict(["a fine film"]).labels) <= set(LABELS)
    classifier.save_pretrained(tmp_path / "saved", target_saving=0.3)
    about = json.loads((tmp_path / "saved" / "deebert.json").read_text())
    assert str(first) not in json.dumps(about), "no path of this machine"
    run("evaluate.py", f"ckpt={tmp_path / 'saved'}", "logger=csv", f"data.file={moved}",
        f"hydra.run.dir={tmp_path / 'from-saved'}")  # fmt: skip
    assert results(tmp_path / "from-saved")["exits"] == trained["exits"]
    line = fails("evaluate.py", f"ckpt={tmp_path / 'saved'}", "logger=csv")
    assert "task tickets: no data; give data.file=the file of its rows, data.root=" in line


def test_the_data_is_checked_before_the_weights(fails: Callable[..., str], tmp_path: Path) -> None:
    """A backbone that cannot be made: whoever names it has begun to load it."""
    broken = "backbone.config.num_attention_heads=5"
    given = tickets()
    good = write(tmp_path / "good.csv", given)
    assert "data.file" not in fails("train.py", f"data.file={good}", *SHORT, broken)
    given[50] = given[50] | {"message": "a NUL \0"}
    bad = write(tmp_path / "bad.csv", given)
    line = fails("train.py", f"data.file={bad}", *SHORT, broken)
    assert f"{bad}, line 52: it holds a NUL" in line
    given = [row | {"verdict": "" if row["id"] == 3 else row["verdict"]} for row in tickets()]
    unlabelled = write(tmp_path / "unlabelled.csv", given)
    line = fails("train.py", f"data.file={unlabelled}", *SHORT, broken)
    assert f"{unlabelled}, line 5: label '' is out of range; task unlabelled has: 0 bad" in line


def test_one_line_for_a_mistake(fails: Callable[..., str], glue: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", tickets())
    cases = {
        (): "task= is missing: python train.py task=mrpc stage=1, or a file of your own: data.file=tickets.csv",
        (f"data.file={tmp_path / 'gone.csv'}",): "gone.csv: no such file or folder",
        (f"data.file={file}", f"data.root={glue}"): "give one of them",
        (f"data.file={file}", "data.validation_share=1"): "data.validation_share=1 must be a number between 0 and 1",
        (f"data.file={file}", "data.label=id"): "100 different numbers",
        (f"data.file={file}", "task=mrpc"): "lacks the column 'sentence1'; it has: id, message, verdict",
        (f"data.file={file}", "task=mrpc", "data.label=verdict"): "data.label=verdict does nothing here",
        ("task=mrpc", "data.text=a"): "data.text=a does nothing here: it is of a data.file=",
        ("task=mrpc", "data.metric=f1_macro"): "says how to read it (task.metrics=[f1_macro])",
        (f"data.file={file}", "data.metric=f2"): "data.metric=f2 is no score of 2 labels; choose one of: accuracy, f1, f1_macro, f1_weighted, matthews",
    }  # fmt: skip
    for overrides, message in cases.items():
        assert message in fails("train.py", *overrides, *SHORT), overrides


@pytest.mark.slow
def test_a_task_of_a_yaml_file_reads_one_file_too(
    run: Callable[..., str], fails: Callable[..., str], stage2: Path, glue: Path, tmp_path: Path
) -> None:
    printed = run("train.py", "task=mrpc", f"data.file={glue / 'mrpc' / 'train.jsonl'}", *SHORT,
        "data.limit_train=40", f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert f"Next: python train.py stage=2 ckpt={tmp_path / 'run'}" in printed
    made = results(tmp_path / "run")
    assert 0 < made["constant_score"] < 1
    assert (made["task"], made["metric"], made["num_rows"]) == ("mrpc", "f1", 19)
    file = f"data.file={glue / 'mrpc' / 'train.jsonl'}"
    assert "40 rows to train on, 19 to validate on" in printed
    line = fails("evaluate.py", f"ckpt={stage2}", file, f"data.root={glue}", "logger=csv")
    assert "give one of them" in line


def test_rows_of_a_training_are_not_called_validation(
    run: Callable[..., str],
    fails: Callable[..., str],
    stage1: Path,
    stage2: Path,
    glue: Path,
    tmp_path: Path,
) -> None:
    """A checkpoint that was trained on a folder does not know which rows of a file it has seen."""
    file = f"data.file={glue / 'mrpc' / 'train.jsonl'}"
    for script, *overrides in (
        ("evaluate.py", f"ckpt={stage2}"),
        ("train.py", "stage=2", f"ckpt={stage1}"),
        ("train.py", f"teacher={stage1}", "backbone.layers=[1]"),
    ):
        line = fails(script, *overrides, file, "logger=csv")
        assert "train.jsonl: " in line, overrides
        assert "may report rows that it was trained on; give a folder with a file" in line
    # A folder says itself which rows are of the validation. Nothing is split.
    folder = f"data.file={glue / 'mrpc'}"
    for script, *overrides in (
        ("evaluate.py", f"ckpt={stage2}", folder, "+data.split_seed=3"),
        ("evaluate.py", f"ckpt={stage2}", f"data.root={glue}", "+data.split_seed=3"),
        ("train.py", "stage=2", f"ckpt={stage1}", "data.split_seed=3"),
        ("train.py", "task=mrpc", folder, *SHORT, "data.split_seed=3"),
    ):
        line = fails(script, *overrides)
        assert "data.split_seed=3 does nothing here: it says how one file is split" in line
        assert line.endswith(
            "/mrpc is a folder" if folder in overrides else "no data.file= is given"
        )
    run("evaluate.py", f"ckpt={stage2}", folder, "logger=csv", f"hydra.run.dir={tmp_path}")
    assert results(tmp_path)["num_rows"] == 40


def test_a_checkpoint_leads_to_no_file_elsewhere(
    fails: Callable[..., str], first: Path, tmp_path: Path
) -> None:
    (tmp_path / "place").mkdir()
    link = tmp_path / "place" / "rows.csv"
    link.symlink_to(first / "tickets.csv")
    content = torch.load(first / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["config"]["data"]["file"] = str(link)
    torch.save(content, tmp_path / "other.ckpt")
    line = fails("train.py", "stage=2", f"ckpt={tmp_path / 'other.ckpt'}", "logger=csv")
    assert f"data.file={link}, as {tmp_path / 'other.ckpt'} says: " in line
    link.unlink()
    line = fails("train.py", "stage=2", f"ckpt={tmp_path / 'other.ckpt'}", "logger=csv")
    assert f"data.file={link}: no such file; give its place (data.file=...)" in line
