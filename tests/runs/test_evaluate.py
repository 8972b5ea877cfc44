"""evaluate.py from the command line: curves, targets, promises, records."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, command, mrpc_rows, results, write_rows

from deebert.hub import record_files
from deebert.runs.job import Job, finish

Run = Callable[..., str]


@pytest.mark.pictures
def test_evaluate_gives_the_same_again(run: Run, stage2: Path, tmp_path: Path) -> None:
    printed = run("evaluate.py", f"ckpt={stage2}", "logger=csv", f"hydra.run.dir={tmp_path}")
    result, expected = results(tmp_path), results(stage2)
    for key in ("exits", "curve", "task", "stage", "objective", "split", "num_rows"):
        assert result[key] == expected[key], key
    assert "Score against saving: mrpc, validation (40 rows)" in printed
    assert str(tmp_path) in printed
    assert (tmp_path / "curve.png").is_file()


def test_evaluate_at_thresholds_on_another_split(run: Run, stage2: Path, tmp_path: Path) -> None:
    run("evaluate.py", f"ckpt={stage2}", "split=test", "thresholds=[0.69,0.2]", "logger=csv", f"hydra.run.dir={tmp_path}")  # fmt: skip
    result = results(tmp_path)
    assert [point["threshold"] for point in result["curve"]] == [0.69, 0.2]
    assert (result["split"], result["num_rows"]) == ("test", 16)


def test_evaluate_without_labels_gives_the_saving(run: Run, stage2: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "mrpc", "test", [row | {"label": -1} for row in mrpc_rows("test", 9)])
    printed = run(
        "evaluate.py", f"ckpt={stage2}", "split=test", f"data.root={tmp_path}", "logger=csv",
        f"hydra.run.dir={tmp_path / 'out'}",
    )  # fmt: skip
    result = results(tmp_path / "out")
    assert result["curve"][-1]["expected_saving"] == pytest.approx(2 / 3)
    assert result["curve"][-1]["score"] is None
    assert "This split has no labels" in printed


@pytest.mark.slow
def test_ax_is_scored_with_an_mnli_checkpoint(
    run: Run, fails: Run, stage2: Path, tmp_path: Path
) -> None:
    rows = [{"premise": "a cat", "hypothesis": f"a dog {i}", "label": i % 3} for i in range(12)]
    for split in ("train", "validation_matched", "validation_mismatched"):
        write_rows(tmp_path / "mnli", split, rows)
    write_rows(tmp_path / "ax", "test", rows)
    run("train.py", "task=mnli", *TINY, f"data.root={tmp_path}", "stages.1.epochs=1", f"hydra.run.dir={tmp_path / 'mnli-run'}")  # fmt: skip
    result = results(tmp_path / "mnli-run")
    assert result["split"] == "validation_matched"
    assert [part["split"] for part in result["other_splits"]] == ["validation_mismatched"]
    assert result["curve"][-1]["threshold"] == 1.1
    metrics = (tmp_path / "mnli-run" / "csv" / "metrics.csv").read_text().splitlines()[0]
    assert "val/score" in metrics
    assert "val_mismatched/score" in metrics
    run("evaluate.py", f"ckpt={tmp_path / 'mnli-run'}", "task=ax", "logger=csv", f"hydra.run.dir={tmp_path / 'ax-run'}")  # fmt: skip
    result = results(tmp_path / "ax-run")
    assert (result["task"], result["split"], result["num_rows"]) == ("ax", "test", 12)
    assert result["curve"][0]["score"] is not None
    line = fails("evaluate.py", f"ckpt={stage2}", "task=ax")
    assert "task=ax contradicts" in line


def test_what_a_run_leaves(run: Run, stage2: Path, tmp_path: Path) -> None:
    run("evaluate.py", f"ckpt={stage2}", "logger=csv", f"hydra.run.dir={tmp_path}")
    present = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert present >= {"results.json", "results.md", "curve.png", "report.html", "records/validation.safetensors"}  # fmt: skip
    assert not [name for name in present if "part" in name]
    result = results(tmp_path)
    texts = [row["text"] for rows in result["examples"].values() for row in rows]
    assert len(texts) == 10
    assert all(" / " in text for text in texts), "both texts of a pair"
    assert "## Ramps and layers" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_a_record_answers_without_model_or_data(
    run: Run, stage2: Path, glue: Path, tmp_path: Path
) -> None:
    run("evaluate.py", f"ckpt={stage2}", "target_saving=0.4", "logger=csv", f"hydra.run.dir={tmp_path / 'model'}")  # fmt: skip
    copy = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "model" / "records", copy / "records")
    run("evaluate.py", f"record={copy}", "target_saving=0.4", f"hydra.run.dir={tmp_path / 'record'}")  # fmt: skip
    ours, theirs = results(tmp_path / "record"), results(tmp_path / "model")
    for key in ("exits", "curve", "trade_off", "analysis", "calibration", "task", "seed", "stage"):
        assert ours[key] == theirs[key], key
    assert (tmp_path / "record" / "report.html").is_file()
    # What training left is the same as what evaluation found.
    run("evaluate.py", f"record={stage2}", f"ckpt={stage2}", f"hydra.run.dir={tmp_path / 'both'}")
    assert results(tmp_path / "both")["curve"] == results(stage2)["curve"]


@pytest.mark.parametrize("rule", ["entropy", "relative_entropy", "probability", "margin", "patience", "confident_patience", "ensemble", "vote"])  # fmt: skip
def test_every_rule_meets_a_target_saving(
    run: Run, rule: str, stage2: Path, tmp_path: Path
) -> None:
    printed = run("evaluate.py", f"record={stage2}", f"exit={rule}", "target_saving=0.3", f"hydra.run.dir={tmp_path}")  # fmt: skip
    assert ("To use it again: exit=relative_entropy exit.prior=[0." in printed) == (
        rule == "relative_entropy"
    )
    result = results(tmp_path)
    assert result["exit"]["name"] == result["calibration"]["rule"] == rule
    assert result["calibration"]["expected"]["expected_saving"] >= 0.3 - 1e-9
    assert result["calibration"]["num_calibration"] == 40
    assert (result["calibration"]["prior"] is not None) == (rule == "relative_entropy")
    assert "prior" not in result["exit"], "it was not given"
    assert result["curve"][0]["expected_saving"] == 0
    assert result["curve"][-1]["expected_saving"] > 0.3
    assert f'"exit":{{"name":"{rule}"' in (tmp_path / "report.html").read_text()


def test_a_sweeper_is_given_the_score_of_the_threshold(
    run: Run, stage2: Path, tmp_path: Path
) -> None:
    record, header = record_files.load(stage2 / "records" / "validation.safetensors")
    record.logits_NLC[:, 0] = -record.logits_NLC[:, -1]  # ramp 1 is wrong where full depth is right
    record_files.save(record, tmp_path / "records", header)
    scores = {}
    for threshold in ("0", "0.7"):
        folder = tmp_path / threshold
        run(
            "evaluate.py", f"record={tmp_path}", f"threshold={threshold}", f"hydra.run.dir={folder}"
        )
        [point] = results(folder)["curve"]
        job = Job(folder, frozenset(), None)
        scores[threshold] = finish(True, job, at_threshold=True)
        assert scores[threshold] == point["score"]
        assert finish(True, job, "score") == results(folder)["exits"][-1]["score"]
    assert scores["0"] != scores["0.7"]


def test_the_first_validation_split_is_the_headline(run: Run, stage2: Path, tmp_path: Path) -> None:
    original, header = record_files.load(stage2 / "records" / "validation.safetensors")
    config = header.config.changed(task={"validation": ["validation", "extra"]})
    header = dataclasses.replace(header, config=config)
    for split in ("validation", "extra"):
        record = dataclasses.replace(original, split=split)
        record_files.save(record, tmp_path / "records", header)
    run("evaluate.py", f"record={tmp_path}", f"hydra.run.dir={tmp_path / 'out'}")
    assert results(tmp_path / "out")["split"] == "validation"
    assert [part["split"] for part in results(tmp_path / "out")["other_splits"]] == ["extra"]


def test_a_threshold_per_ramp_is_applied_to_each(run: Run, stage2: Path, tmp_path: Path) -> None:
    run("evaluate.py", f"record={stage2}", "threshold=[0,0.7]", f"hydra.run.dir={tmp_path}")
    [point] = results(tmp_path)["curve"]
    assert point["threshold"] == [0, 0.7]
    assert point["exit_counts"] == [0, 40, 0], "0 never exits, 0.7 > ln 2 always does"


@pytest.fixture(scope="session")
def held_out(glue: Path, made_once: Callable[..., Path]) -> Path:
    """A stage-2 run that kept 40 of its 96 training rows out of both stages."""

    def make(runs: Path) -> None:
        command(
            "train.py", "task=mrpc", *TINY, f"data.root={glue}", "data.calibration_size=40",
            "stages.1.epochs=1", f"hydra.run.dir={runs / '1'}",
        )  # fmt: skip
        command(
            "train.py", "stage=2", f"ckpt={runs / '1'}", "logger=csv", "stages.2.epochs=1",
            f"hydra.run.dir={runs / '2'}",
        )  # fmt: skip

    return made_once("held-out", make) / "2"


@pytest.mark.slow
def test_held_out_rows_are_in_neither_stage(run: Run, held_out: Path, tmp_path: Path) -> None:
    config = torch.load(held_out / "checkpoints" / "best.ckpt", weights_only=True)["hyper_parameters"]["config"]  # fmt: skip
    assert config["data"]["calibration_size"] == 40
    assert config["data"]["calibration_rows"]
    # 56 rows by 16.
    assert torch.load(held_out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    printed = run("evaluate.py", f"ckpt={held_out}", "target_saving=0.3", "logger=csv", f"hydra.run.dir={tmp_path}")  # fmt: skip
    calibrated = results(tmp_path)["calibration"]
    assert (calibrated["calibration_split"], calibrated["num_calibration"]) == ("calibration", 40)
    assert sum(calibrated["measured"]["exit_counts"]) == 40
    assert "chosen on calibration (40 rows)" in printed
    assert {file.stem for file in (tmp_path / "records").iterdir()} == {"calibration", "validation"}
    assert results(tmp_path)["split"] == "validation"
    run("evaluate.py", f"record={tmp_path}", "target_saving=0.3", f"hydra.run.dir={tmp_path / 'again'}")  # fmt: skip
    assert results(tmp_path / "again")["calibration"] == calibrated


@pytest.mark.slow
def test_a_record_meets_every_target_that_its_checkpoint_meets(
    run: Run, held_out: Path, tmp_path: Path
) -> None:
    """The same rows and thresholds, whichever of the two is given."""
    first = tmp_path / "first"
    run("evaluate.py", f"ckpt={held_out}", "target_saving=0.3", "logger=csv", f"hydra.run.dir={first}")  # fmt: skip
    calibrated = {}
    for i, target in enumerate(
        (
            ("target_saving=0.3",),
            ("target_saving=0.3", "calibration=crossfit"),
            ("target_saving=0.3", "calibration=heldout", "temperature=true"),
            ("max_drop=0.3",),
            ("max_drop=0.3", "confidence=0.6"),
            ("max_drop=0.3", "confidence=null"),
            ("max_drop=0.3", "loss=disagreement", "calibration=crossfit"),
        )
    ):
        for source, more in ((f"ckpt={held_out}", ("logger=csv",)), (f"record={first}", ())):
            folder = tmp_path / f"{i}-{source.partition('=')[0]}"
            run("evaluate.py", source, *target, *more, f"hydra.run.dir={folder}")
        ours, theirs = (results(tmp_path / f"{i}-{source}") for source in ("record", "ckpt"))
        assert ours["calibration"] == theirs["calibration"], target
        calibrated[target] = ours["calibration"]
    splits = {target: each["calibration_split"] for target, each in calibrated.items()}
    assert [target for target, split in splits.items() if "cross-fitted" in split] == [
        target for target in calibrated if "calibration=crossfit" in target
    ]
    assert len({str(each) for each in calibrated.values()}) == len(calibrated), (
        "each says another thing"
    )


@pytest.mark.slow
def test_held_out_rows_are_the_same_however_they_are_cut(
    run: Run, held_out: Path, tmp_path: Path
) -> None:
    overrides = ("target_saving=0.3", "calibration=heldout", "data.max_length=10", "logger=csv")
    run("evaluate.py", f"ckpt={held_out}", *overrides, f"hydra.run.dir={tmp_path}")
    assert results(tmp_path)["calibration"]["calibration_split"] == "calibration"
    lengths = record_files.load(tmp_path / "records" / "calibration.safetensors")[0].length_N
    assert lengths.max() == 10, "they were cut"


@pytest.mark.slow
def test_changed_training_rows_are_not_taken_for_held_out(
    fails: Run, held_out: Path, glue: Path, tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        write_rows(tmp_path / "mrpc", split, mrpc_rows("test" if split == "train" else split, 96))
    line = fails("evaluate.py", f"ckpt={held_out}", f"data.root={tmp_path}", "target_saving=0.3", "logger=csv", f"hydra.run.dir={tmp_path / 'out'}")  # fmt: skip
    assert "the training rows have changed since" in line


def test_thresholds_chosen_on_another_split(run: Run, stage2: Path, tmp_path: Path) -> None:
    """Labels are needed to promise, not to be measured: here they are on the split chosen on."""
    run("evaluate.py", f"ckpt={stage2}", "split=test", "calibration=validation", "max_drop=0.2", "logger=csv", f"hydra.run.dir={tmp_path}")  # fmt: skip
    result = results(tmp_path)
    assert (result["split"], result["num_rows"]) == ("test", 16)
    calibrated = result["calibration"]
    assert (calibrated["calibration_split"], calibrated["num_calibration"]) == ("validation", 40)
    assert calibrated["target"] == {"max_drop": 0.2, "confidence": 0.95, "loss": "excess"}
    assert sum(calibrated["measured"]["exit_counts"]) == 16


def test_a_target_that_cannot_be_met_loses_no_pass(
    run: Run, fails: Run, stage2: Path, tmp_path: Path
) -> None:
    """What can be known before the pass is said before; what cannot leaves the record."""
    line = fails("evaluate.py", f"ckpt={stage2}", "max_drop=0.01", "calibration=crossfit", "logger=csv", f"hydra.run.dir={tmp_path / 'early'}")  # fmt: skip
    assert "the smallest is 0.0722" in line
    assert not (tmp_path / "early" / "records").exists()
    line = fails("evaluate.py", f"ckpt={stage2}", "target_saving=0.9", "logger=csv", f"hydra.run.dir={tmp_path / 'a'}")  # fmt: skip
    assert "target_saving=0.9 is more than exit=entropy can save: 0.667" in line
    assert not (tmp_path / "a" / "results.json").exists()
    run("evaluate.py", f"record={tmp_path / 'a'}", "max_drop=0.0722", f"hydra.run.dir={tmp_path / 'b'}")  # fmt: skip
    assert results(tmp_path / "b")["calibration"]["num_calibration"] == 40


@pytest.mark.pictures
def test_analysis_leaves_layers_out(run: Run, stage2: Path, tmp_path: Path) -> None:
    printed = run("evaluate.py", f"ckpt={stage2}", "analysis=true", "logger=csv", f"hydra.run.dir={tmp_path}")  # fmt: skip
    result = results(tmp_path)
    layers = result["analysis"]["layers"]
    assert [layer["layer"] for layer in layers] == [1, 2, 3]
    full = result["exits"][-1]["score"]
    for layer in layers:
        assert layer["score_drop"] == pytest.approx(full - layer["score_without"])
    assert "Ramps and layers: mrpc, validation" in printed
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_the_chosen_threshold_is_what_is_run(run: Run, stage2: Path, tmp_path: Path) -> None:
    """The printed threshold, given back, is the point that was promised."""
    run(
        "evaluate.py",
        f"record={stage2}",
        "target_saving=0.3",
        f"hydra.run.dir={tmp_path / 'target'}",
    )
    calibrated = results(tmp_path / "target")["calibration"]
    run("evaluate.py", f"ckpt={stage2}", f"threshold={calibrated['thresholds']}", "logger=csv", f"hydra.run.dir={tmp_path / 'told'}")  # fmt: skip
    [point] = results(tmp_path / "told")["curve"]
    assert point["exit_counts"] == calibrated["expected"]["exit_counts"]
    assert point["score"] == calibrated["expected"]["score"]
