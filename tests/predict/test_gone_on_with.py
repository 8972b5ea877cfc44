"""Prediction that was killed or stopped: given again, it goes on where it was."""

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from helpers import forked
from helpers.tables import SAVING, command, many, read, rows, write

from deebert import EarlyExitClassifier
from deebert.errors import UserError
from deebert.options import parse
from deebert.predict import command as predict_command
from deebert.predict import parts
from deebert.predict.answers import answered
from deebert.predict.work import PredictOptions, locally


@pytest.mark.slow
def test_killed_and_started_again(
    stage2: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """test_gone_on_with stops twice, and test_parts.py kills at each step."""
    given = many(tmp_path / "in.csv", 600)
    whole, killed = tmp_path / "whole.csv", tmp_path / "killed.csv"
    options = [f"model={stage2}", f"input={given}", f"target_saving={SAVING}", "part_rows=10"]
    command(*options, f"output={whole}")
    child = forked.start("-m", "deebert", "predict", *options, f"output={killed}")
    kill_at(lambda: num_parts(killed) >= 10, child)
    assert not killed.exists()
    before = num_parts(killed)
    assert before >= 10
    command(*options, f"output={killed}")
    assert f"{10 * before:,} rows were done before" in capsys.readouterr().err
    assert killed.read_bytes() == whole.read_bytes()
    assert parts.errors_of(killed).read_bytes() == parts.errors_of(whole).read_bytes()
    assert [row["row"] for row in read(parts.errors_of(whole))] == [*range(5, 600, 97)]
    assert len(read(whole)) == 600 - 7
    assert not parts.parts_of(killed).exists()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_gone_on_with(suffix: str, stage2: Path, tmp_path: Path) -> None:
    given = write(tmp_path / "in.parquet", rows())
    whole, stopped = tmp_path / f"whole.{suffix}", tmp_path / f"stopped.{suffix}"
    options = [f"model={stage2}", f"input={given}", f"target_saving={SAVING}", "part_rows=16"]
    command(*options, f"output={whole}")
    started(*options, f"output={stopped}", after=1)
    started(*options, f"output={stopped}", after=3)
    assert num_parts(stopped) == 4
    command(*options, f"output={stopped}")
    assert stopped.read_bytes() == whole.read_bytes()


def num_parts(output: Path) -> int:
    return len(list(parts.parts_of(output).glob("0*.json")))


def kill_at(reached: Callable[[], bool], child: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert child.exitcode is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def interrupted(after: int) -> Callable[..., Iterator]:
    """Answers so many blocks and is then interrupted, as by Ctrl-C."""

    def answer(classifier, operating_point, columns, given):
        for number, each in enumerate(locally(classifier, operating_point, columns, given)):
            if number == after:
                raise KeyboardInterrupt
            yield each

    return answer


def started(*options: object, after: int = 2) -> None:
    with pytest.raises(SystemExit) as stop:
        predict_command.run(
            parse(PredictOptions, [str(each) for each in options]), interrupted(after)
        )
    assert stop.value.code == 130


def test_thresholds_are_those_of_the_first_start(
    stage2: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Those of a speed-up are measured, and would be others."""
    given, output = many(tmp_path / "in.csv", 100), tmp_path / "out.jsonl"
    options = [f"model={stage2}", f"input={given}", f"output={output}", "target_speedup=1.05"]
    started(*options, "part_rows=20")
    assert "Stopped at 40 rows" in capsys.readouterr().err
    note = parts.parts_of(output) / "job.json"
    about = json.loads(note.read_text())
    assert about["found"]["thresholds"] >= 0  # 0 where the engine alone is fast enough
    about["found"]["thresholds"] = 100.0  # as if it had been that: all leave at once
    note.write_text(json.dumps(about))
    command(*options, "part_rows=20")
    written = read(output)
    assert len(written) == 99
    assert {row["exit_layer"] for row in written if row["row"] >= 40} == {1}
    assert {row["exit_layer"] for row in written if row["row"] < 40} != {1}


def test_another_job_is_refused(stage2: Path, stage1: Path, tmp_path: Path) -> None:
    given, output = many(tmp_path / "in.csv", 100), tmp_path / "out.csv"
    options = {"model": stage2, "input": given, "output": output, "part_rows": 20, "threshold": 0.5}

    def words(**other: object) -> list[str]:
        return [f"{key}={value}" for key, value in {**options, **other}.items()]

    started(*words())
    for other, says in (
        ({"threshold": 0.4}, "of target={'threshold': 0.5} and not {'threshold': 0.4}"),
        ({"part_rows": 30}, "of part_rows=20 and not 30"),
        ({"model": stage1}, "of model="),
        ({"keep": "none"}, "of keep="),
        ({"columns": "[sentence2,sentence1]"}, "of columns="),
        ({"input": many(tmp_path / "b.csv", 100)}, "of input="),
    ):
        with pytest.raises(UserError) as error:
            command(*words(**other))
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    content = given.read_bytes()
    for changed, says in ((b"\n77,", "of size="), (b"\n8,", "has changed")):
        given.write_bytes(content.replace(b"\n7,", changed, 1))
        with pytest.raises(UserError, match=says):
            command(*words())
    given.write_bytes(content)
    command(*words())
    once = output.read_bytes()
    with pytest.raises(UserError, match="is there already; replace it with overwrite=true"):
        command(*words())
    assert output.read_bytes() == once
    started(*words(threshold=100), "overwrite=true")
    assert output.read_bytes() == once, "the old one stays until the new one is whole"
    command(*words(threshold=100))  # that it may be replaced was said at the first start
    assert {row["exit_layer"] for row in read(output)} == {"1"}


def test_a_model_that_has_changed_is_refused(stage2: Path, tmp_path: Path) -> None:
    """Its answers would be mixed with those of the parts that are done."""
    classifier = EarlyExitClassifier.from_pretrained(stage2)
    saved = tmp_path / "saved"
    classifier.save_pretrained(saved)
    shutil.rmtree(saved / "records")  # they would be refused at another max_length first
    given, output = many(tmp_path / "in.csv", 100), tmp_path / "out.csv"
    words = [f"model={saved}", f"input={given}", f"output={output}", "part_rows=20"]
    started(*words)

    def config(about: dict) -> dict:
        return about["config"]

    changes: dict[str, tuple[str, Callable[[dict], object]]] = {
        "labels": ("deebert.json", lambda a: config(a)["task"].update(labels=["bad", "good"])),
        "max_length": ("deebert.json", lambda a: config(a)["data"].update(max_length=16)),
        "rule": ("deebert.json", lambda a: a.update(exit="probability")),
        "target": ("deebert.json", lambda a: a.update(target={"target_saving": 0.3})),
        "architecture": ("config.json", lambda a: a["config"].update(layer_norm_eps=1e-5)),
        "tokenizer": ("tokenizer.json", lambda a: a["normalizer"].update(lowercase=not a["normalizer"].get("lowercase"))),
    }  # fmt: skip
    for key, (name, change) in changes.items():
        file = saved / name
        original = file.read_text("utf-8")
        about = json.loads(original)
        change(about)
        file.write_text(json.dumps(about), "utf-8")
        with pytest.raises(UserError, match=f"parts of another job, of {key}=") as error:
            command(*words)
        assert "\n" not in str(error.value)
        file.write_text(original, "utf-8")
    command(*words)
    assert len(read(output)) == 99


@pytest.mark.slow
def test_stdin(
    stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A process whose stdin is still open is killed; the same stream, given again, is gone on with."""
    given = many(tmp_path / "in.csv", 300)
    options = [f"model={stage2}", f"target_saving={SAVING}", "part_rows=20"]
    command(*options, f"input={given}", f"output={tmp_path / 'file.csv'}")
    from_stdin = [*options, "input=-", "format=csv", f"output={tmp_path / 'stdin.csv'}"]
    content = given.read_bytes()
    os.mkfifo(tmp_path / "pipe")
    child = forked.start("-m", "deebert", "predict", *from_stdin, stdin=tmp_path / "pipe")
    with (tmp_path / "pipe").open("wb") as pipe:
        pipe.write(content[: len(content) // 2])
        pipe.flush()
        kill_at(lambda: num_parts(tmp_path / "stdin.csv") >= 3, child)

    def stdin(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    for other, says in (
        (b"sentence1,sentence2\na,b\n", "another job"),
        (content[: len(content) // 20], "has changed"),
        (content.replace(b"\n7,", b"\n8,", 1), "has changed"),
    ):
        stdin(other)
        with pytest.raises(UserError, match=says):
            command(*from_stdin)
    stdin(content)
    command(*from_stdin)
    assert "rows were done before" in capsys.readouterr().err
    for beside in ("", ".errors.jsonl"):
        expected = (tmp_path / f"file.csv{beside}").read_bytes()
        assert (tmp_path / f"stdin.csv{beside}").read_bytes() == expected


def test_answers_may_be_given_ahead(stage2: Path, tmp_path: Path) -> None:
    """Whoever answers may take blocks ahead, as workers do."""

    def ahead(classifier, operating_point, columns, given):
        yield from (answered(classifier, operating_point, rows, columns) for rows in [*given])

    given = many(tmp_path / "in.csv", 100)
    words = [f"model={stage2}", f"input={given}", f"target_saving={SAVING}", "part_rows=20"]
    command(*words, f"output={tmp_path / 'a.csv'}")
    options = parse(PredictOptions, [*words, f"output={tmp_path / 'b.csv'}"])
    predict_command.run(options, ahead)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
