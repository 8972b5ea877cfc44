"""Prediction over files: every format as the classifier answers, kills, bad rows, one-line errors."""

import csv
import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import ROOT, mrpc_rows
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from deebert import EarlyExitClassifier
from deebert.classifier import Predictions
from deebert.data import tokenization
from deebert.errors import UserError
from deebert.inference import engine
from deebert.options import parse
from deebert.predict import answers, parts
from deebert.predict.answers import Columns, answered, out_names, own_columns
from deebert.predict.command import predict
from deebert.predict.rows import Row, Source
from deebert.predict.rows_in import blocks
from deebert.predict.work import PredictOptions, chosen_columns, locally, run

PAIRS = [(row["sentence1"], row["sentence2"]) for row in mrpc_rows("test", 150)]
SAVING = 0.3


@pytest.fixture(scope="module")
def classifier(stage2: Path) -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(stage2)


def rows() -> list[dict]:
    return [
        {"id": f"r{n}", "sentence1": a, "sentence2": b, "label": n}
        for n, (a, b) in enumerate(PAIRS)
    ]


def write(file: Path, given: list[dict]) -> Path:
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(given), file, row_group_size=40)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
    else:
        with file.open("w", newline="") as out:
            excel = "excel" if file.suffix == ".csv" else "excel-tab"
            writer = csv.DictWriter(out, given[0], dialect=excel)
            writer.writeheader()
            writer.writerows(given)
    return file


def read(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        return parquet.read_table(file).to_pylist()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    with file.open(newline="") as content:
        return list(csv.DictReader(content))


def command(*said: object) -> None:
    predict(parse(PredictOptions, [str(each) for each in said]))


def process(*said: object, **more: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "deebert.predict", *map(str, said)],
        cwd=ROOT, capture_output=True, timeout=200, **more,
    )  # fmt: skip


def test_a_part_is_a_window_of_the_engine() -> None:
    assert PredictOptions().part_rows == engine.WINDOW


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("to", ["csv", "jsonl", "parquet"])
def test_every_format_as_the_classifier(
    ending: str, to: str, stage2: Path, classifier: EarlyExitClassifier, tmp_path: Path
) -> None:
    given = write(tmp_path / f"in.{ending}", rows())
    output = tmp_path / f"out.{to}"
    said = [f"model={stage2}", f"input={given}", f"output={output}", f"target_saving={SAVING}"]
    command(*said, "part_rows=64", "probabilities=true")
    found, expected = read(output), classifier.predict(PAIRS, target_saving=SAVING)
    assert len(set(expected.exit_layers)) > 1
    classes = [f"probability_{label}" for label in classifier.labels]
    columns = ["row", "id", "sentence1", "sentence2", "input_label", "label", "probability"]
    assert [*found[0]] == [*columns, *classes, "exit_layer"]
    assert [int(row["row"]) for row in found] == list(range(len(PAIRS)))
    assert [row["label"] for row in found] == expected.labels
    assert [int(row["exit_layer"]) for row in found] == expected.exit_layers
    probabilities = torch.tensor([[float(row[name]) for name in classes] for row in found])
    torch.testing.assert_close(probabilities, expected.probabilities_NC, atol=1e-5, rtol=0)
    assert [float(row["probability"]) for row in found] == pytest.approx(
        probabilities.amax(-1).tolist()
    )
    for row, (number, (a, b)) in zip(found, enumerate(PAIRS), strict=True):
        assert (row["id"], row["sentence1"], row["sentence2"]) == (f"r{number}", a, b)
        typed = ending in ("jsonl", "parquet") and to != "csv"
        assert row["input_label"] == (number if typed else str(number))
    assert not parts.errors_of(output).exists()
    assert not parts.parts_of(output).exists()


BAD = [
    ({"id": 1, "sentence1": "a film"}, "it has no 'sentence2'"),
    ({"id": 2, "sentence1": "", "sentence2": "b"}, "its 'sentence1' is empty"),
    ({"id": 3, "sentence1": "a", "sentence2": " \n"}, "its 'sentence2' is empty"),
    ({"id": 4, "sentence1": None, "sentence2": "b"}, "its 'sentence1' is null, not a text"),
    ({"id": 5, "sentence1": ["a"], "sentence2": "b"}, "its 'sentence1' is ['a'], not a text"),
    ({"id": 6, "sentence1": "a\0", "sentence2": "b"}, "its 'sentence1' holds a NUL character"),
    ({"id": 7, "sentence1": "a" * 1_000_001, "sentence2": "b"}, "has 1,000,001 characters"),
]


def test_bad_rows_are_reported_and_the_others_answered(
    stage2: Path, classifier: EarlyExitClassifier, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = rows()[:20]
    lines = [json.dumps(row) for row in [*good[:10], *(row for row, _ in BAD), *good[10:]]]
    lines[2:2] = ["{not json", "", "[]"]
    given = tmp_path / "in.jsonl"
    given.write_text("\n".join(lines))
    output = tmp_path / "out.jsonl"
    command(f"model={stage2}", f"input={given}", f"output={output}", "part_rows=6", "keep=[id]")
    said = capsys.readouterr()
    assert f"29 rows, {len(BAD) + 2} of them bad" in said.out
    assert f"{output}; the bad ones: {output}.errors.jsonl" in said.out
    found, bad = read(output), read(parts.errors_of(output))
    assert [row["id"] for row in found] == [row["id"] for row in good]
    assert [row["row"] for row in found] == [0, 1, *range(4, 12), *range(19, 29)]
    assert [*found[0]] == ["row", "id", "label", "probability", "exit_layer"]
    assert [row["label"] for row in found] == classifier.predict(PAIRS[:20]).labels
    assert [row["row"] for row in bad] == [2, 3, *range(12, 19)]
    assert [row["line"] for row in bad] == [3, 5, *range(14, 21)]
    for row, reason in zip(bad, ["no JSON", "no JSON object", *(r for _, r in BAD)], strict=True):
        assert reason in row["reason"]


def test_a_hostile_csv(stage2: Path, classifier: EarlyExitClassifier, tmp_path: Path) -> None:
    """NULs, other bytes, a lone quote, a row of two lines, 30 MB in a line: nothing else is lost."""
    given, output = tmp_path / "in.csv", tmp_path / "out.csv"
    good = b'"a fine film","no\nfilm"\r\n'
    hostile = [b"a\0,b\n", b"\xff\xfe,b\n", b'a,"b\n', b'"' + b"x" * 30_000_000 + b'",b\n', b"a\n"]
    content = b"sentence1,sentence2\r\n" + good + b"".join(line + good for line in hostile)
    given.write_bytes(content)
    command(f"model={stage2}", f"input={given}", f"output={output}", "keep=none", "part_rows=4")
    found, bad = read(output), read(parts.errors_of(output))
    expected = classifier.predict(("a fine film", "no\nfilm"))[0]
    assert [*found[0]] == ["row", "label", "probability", "exit_layer"]
    assert [int(row["row"]) for row in found] == [0, 2, 4, 6, 8, 10]
    assert {row["label"] for row in found} == {expected["label"]}
    assert [row["row"] for row in bad] == [1, 3, 5, 7, 9]
    assert [row["line"] for row in bad] == [4, 7, 10, 13, 16]


def test_nothing_but_bad_rows(stage2: Path, tmp_path: Path) -> None:
    given = tmp_path / "in.csv"
    given.write_text("sentence1,sentence2\na\nb\n")
    for ending in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"out.{ending}"
        command(f"model={stage2}", f"input={given}", f"output={output}")
        assert read(output) == []
        assert [row["row"] for row in read(parts.errors_of(output))] == [0, 1]


def test_answers_that_are_not_finite(classifier: EarlyExitClassifier, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    classifier.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    words = weights["backbone.encoder.embeddings.word_embeddings.weight"]
    words[5:] = 3e38  # finite, as are the answers to special tokens alone
    save_file(weights, folder / "model.safetensors")
    about = json.loads((folder / "deebert.json").read_text())
    del about["weights"]
    (folder / "deebert.json").write_text(json.dumps(about))
    for record in (folder / "records").iterdir():
        record.unlink()  # of other weights
    given, output = write(tmp_path / "in.csv", rows()[:9]), tmp_path / "out.csv"
    command(f"model={folder}", f"input={given}", f"output={output}")
    assert read(output) == []
    assert {row["reason"] for row in read(parts.errors_of(output))} == {answers.NOT_FINITE}


def test_a_regression() -> None:
    predictions = Predictions([1.5, float("nan"), 0.1], None, [1, 3, 2], 3, None)
    assert answers._values(predictions, own_columns(None, True)) == [
        {"label": 1.5, "exit_layer": 1},
        None,
        {"label": 0.1, "exit_layer": 2},
    ]


def test_which_columns_are_read() -> None:
    """Those that are named, those of the task, or the only one that holds texts."""

    def found(names: str, texts: str, of_task: tuple[str, ...], **said: object) -> Columns:
        source = Source(tuple(names), tuple(texts), lambda _: iter(()), lambda: 0, 0, {})
        return chosen_columns(PredictOptions(**said), source, of_task, free=False)

    assert found("ab", "ab", ("a",)) == Columns(("a",), ("a", "b"))
    assert found("xyz", "y", ("a",)).texts == ("y",)
    assert found("xyz", "xy", ("a",), columns="x").texts == ("x",)
    assert found("xyz", "xy", ("a", "b"), columns=["y", "x"], keep=["z", "x"]) == Columns(
        ("y", "x"), ("z", "x")
    )
    assert found("xy", "xy", ("x",), keep="none").kept == ()
    for names, texts, of_task in (
        ("xyz", "xy", ("a",)),
        ("xyz", "xy", ("a", "b")),
        ("x", "", ("a",)),
    ):
        with pytest.raises(UserError, match="it has no column 'a'"):
            found(names, texts, of_task)


def test_names_that_are_taken() -> None:
    own = own_columns(("no", "yes"), True)
    assert own[2:5] == ("probability", "probability_no", "probability_yes")
    assert out_names(["label", "a", "input_label", "row", "probability_no"], own) == {
        "label": "input_input_label",
        "a": "a",
        "input_label": "input_label",
        "row": "input_row",
        "probability_no": "input_probability_no",
    }


def test_tokens_do_not_depend_on_their_company(
    classifier: EarlyExitClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large rows among small ones, encoded apart."""
    texts = [(a * times, b) for (a, b), times in zip(PAIRS, [1, 9] * 20, strict=False)]
    given = [Row(n, n, {"a": a, "b": b}, None, 1) for n, (a, b) in enumerate(texts)]
    asked = classifier.calibrate(target_saving=SAVING)
    monkeypatch.setattr(tokenization, "AT_ONCE", 500)
    found = answered(classifier, asked, given, Columns(("a", "b"), ()))
    expected = classifier.predict(texts, target_saving=SAVING)
    assert [row["label"] for row in found.rows] == expected.labels
    assert [row["exit_layer"] for row in found.rows] == expected.exit_layers
    assert found.layers == sum(expected.exit_layers)


def many(file: Path, number: int) -> Path:
    """Rows of all lengths; some are bad."""
    source = random.Random(3)
    given = [
        {
            "id": str(n),
            "sentence1": " ".join(
                source.choices(PAIRS[n % 150][0].split(), k=source.randint(1, 30))
            ),
            "sentence2": "" if n % 97 == 5 else PAIRS[n % 150][1],
        }
        for n in range(number)
    ]
    return write(file, given)


def test_killed_and_started_again(stage2: Path, tmp_path: Path) -> None:
    given = many(tmp_path / "in.csv", 1500)
    whole, killed = tmp_path / "whole.csv", tmp_path / "killed.csv"
    said = [f"model={stage2}", f"input={given}", f"target_saving={SAVING}", "part_rows=10"]
    command(*said, f"output={whole}")
    source, before = random.Random(8), 0
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-m", "deebert.predict", *said, f"output={killed}"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        target = before + source.randint(5, 40)
        kill_at(lambda target=target: num_parts(killed) >= target, child)
        assert not killed.exists()
        before = num_parts(killed)
        assert before >= target
    done = process(*said, f"output={killed}")
    assert done.returncode == 0, done.stderr
    assert f"{10 * before:,} rows were done before".encode() in done.stderr
    assert killed.read_bytes() == whole.read_bytes()
    assert parts.errors_of(killed).read_bytes() == parts.errors_of(whole).read_bytes()
    assert [row["row"] for row in read(parts.errors_of(whole))] == [*range(5, 1500, 97)]
    assert len(read(whole)) == 1500 - 16
    assert not parts.parts_of(killed).exists()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_gone_on_with(ending: str, stage2: Path, tmp_path: Path) -> None:
    given = write(tmp_path / "in.parquet", rows())
    whole, stopped = tmp_path / f"whole.{ending}", tmp_path / f"stopped.{ending}"
    said = [f"model={stage2}", f"input={given}", f"target_saving={SAVING}", "part_rows=16"]
    command(*said, f"output={whole}")
    started(*said, f"output={stopped}", after=1)
    started(*said, f"output={stopped}", after=3)
    assert num_parts(stopped) == 4
    command(*said, f"output={stopped}")
    assert stopped.read_bytes() == whole.read_bytes()


def num_parts(output: Path) -> int:
    return len(list(parts.parts_of(output).glob("0*.json")))


def kill_at(reached: Callable[[], bool], child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.kill()
    assert child.wait() == -signal.SIGKILL


def interrupted(after: int) -> Callable[..., Iterator]:
    """Answers so many blocks and is then interrupted, as by Ctrl-C."""

    def answer(classifier, asked, columns, given):
        for number, each in enumerate(locally(classifier, asked, columns, given)):
            if number == after:
                raise KeyboardInterrupt
            yield each

    return answer


def started(*said: object, after: int = 2) -> None:
    with pytest.raises(SystemExit) as stop:
        run(parse(PredictOptions, [str(each) for each in said]), interrupted(after))
    assert stop.value.code == 130


def test_thresholds_are_those_of_the_first_start(
    stage2: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Those of a speed-up are measured, and would be others."""
    given, output = many(tmp_path / "in.csv", 100), tmp_path / "out.jsonl"
    said = [f"model={stage2}", f"input={given}", f"output={output}", "target_speedup=1.05"]
    started(*said, "part_rows=20")
    assert "Stopped at 40 rows" in capsys.readouterr().err
    note = parts.parts_of(output) / "job.json"
    about = json.loads(note.read_text())
    assert about["found"]["thresholds"] >= 0  # 0 where the engine alone is fast enough
    about["found"]["thresholds"] = 100.0  # as if it had been that: all leave at once
    note.write_text(json.dumps(about))
    command(*said, "part_rows=20")
    found = read(output)
    assert len(found) == 99
    assert {row["exit_layer"] for row in found if row["row"] >= 40} == {1}
    assert {row["exit_layer"] for row in found if row["row"] < 40} != {1}


def test_another_job_is_refused(stage2: Path, stage1: Path, tmp_path: Path) -> None:
    given, output = many(tmp_path / "in.csv", 100), tmp_path / "out.csv"
    said = {"model": stage2, "input": given, "output": output, "part_rows": 20, "threshold": 0.5}

    def words(**other: object) -> list[str]:
        return [f"{key}={value}" for key, value in {**said, **other}.items()]

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


def test_stdin(
    stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A process whose stdin is still open is killed; the same stream, given again, is gone on with."""
    given = many(tmp_path / "in.csv", 300)
    said = [f"model={stage2}", f"target_saving={SAVING}", "part_rows=20"]
    command(*said, f"input={given}", f"output={tmp_path / 'file.csv'}")
    from_stdin = [*said, "input=-", "format=csv", f"output={tmp_path / 'stdin.csv'}"]
    content = given.read_bytes()
    child = subprocess.Popen(
        [sys.executable, "-m", "deebert.predict", *from_stdin], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    child.stdin.write(content[: len(content) // 2])
    child.stdin.flush()
    kill_at(lambda: num_parts(tmp_path / "stdin.csv") >= 3, child)
    child.stdin.close()

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

    def ahead(classifier, asked, columns, given):
        yield from (answered(classifier, asked, rows, columns) for rows in [*given])

    given = many(tmp_path / "in.csv", 100)
    said = [f"model={stage2}", f"input={given}", f"target_saving={SAVING}", "part_rows=20"]
    command(*said, f"output={tmp_path / 'a.csv'}")
    options = parse(PredictOptions, [*said, f"output={tmp_path / 'b.csv'}"])
    run(options, ahead)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_the_order_of_blocks_is_that_of_the_rows() -> None:
    given = (Row(n, None, {}, None, 1) for n in range(25))
    assert [[row.number for row in block] for block in blocks(given, 10)] == [
        [*range(10)], [*range(10, 20)], [*range(20, 25)]
    ]  # fmt: skip


def test_json_lines_with_keys_of_their_own(
    stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("deebert.predict.rows_in.FIRST_ROWS", 3)
    given = rows()[:5]
    given[1]["stars"], given[4]["late"] = [4], True
    file = write(tmp_path / "in.jsonl", given)
    said = [f"model={stage2}", f"input={file}"]
    command(*said, f"output={tmp_path / 'out.jsonl'}")
    found = read(tmp_path / "out.jsonl")
    assert found[4]["late"] is True
    assert "stars" not in found[0]
    assert "lack" not in capsys.readouterr().out
    command(*said, f"output={tmp_path / 'out.csv'}")
    assert "1 with columns that the first ones lack (not kept)" in capsys.readouterr().out
    assert [row["stars"] for row in read(tmp_path / "out.csv")] == ["", "[4]", "", "", ""]
    command(*said, f"output={tmp_path / 'out.parquet'}", "keep=[stars,id]")
    assert "lack" not in capsys.readouterr().out
    assert [*read(tmp_path / "out.parquet")[1]][:3] == ["row", "stars", "id"]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (["input={csv}"], "output= is missing"),
        (["output={out}.csv"], "input= is missing"),
        (["input={csv}", "output={out}"], "its ending must be one of .csv, .jsonl"),
        (["input={csv}", "output={out}.xlsx"], "its ending must be one of .csv, .jsonl"),
        (["input={csv}", "output={csv}", "overwrite=true"], "is the input"),
        (["input={csv}", "output=/nowhere/out.csv"], "there is no folder /nowhere"),
        (["input=missing.csv", "output={out}.csv"], "input=missing.csv: it cannot be read"),
        (["input={csv}", "output={out}.csv", "columns=[text,id]"], "it has no column 'text'; it has: id, sentence1, sentence2, label"),
        (["input={csv}", "output={out}.csv", "columns=id"], "columns=[id] are 1, and the model reads 2"),
        (["input={csv}", "output={out}.csv", "keep=[ids]"], "it has no column 'ids'"),
        (["input={parquet}", "output={out}.csv", "columns=[id,label]"], "'label' holds no texts; those that do: id, sentence1"),
        (["input={csv}", "output={out}.csv", "part_rows=0"], "part_rows=0 must be 1 or more"),
        (["input={csv}", "output={out}.csv", "part_rows=many"], "part_rows=many"),
        (["input={csv}", "output={out}.csv", "engine=spark"], "engine 'spark' is unknown; choose one of: local, ray"),
        (["input={csv}", "output={out}.csv", "workers=9"], "workers=9 needs engine=ray"),
        (["input={csv}", "output={out}.csv", "format=xlsx"], "format 'xlsx' is unknown"),
        (["input={csv}", "output={out}.csv", "target_saving=2"], "target_saving=2"),
        (["input={csv}", "output={out}.csv", "threshold=[0,"], "threshold=[0,: while parsing"),
        (["input={csv}", "output={out}.csv", "columns=${{input}}"], "columns=${input}: ${...} is not replaced here"),
        (["input={csv}", "output={out}.csv", "saving=0.4"], "option 'saving' is unknown"),
        (["input={csv}", "output={out}.csv", "model=nowhere"], "model=nowhere"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(said: list[str], says: str, stage2: Path, tmp_path: Path) -> None:
    places = {
        "csv": write(tmp_path / "in.csv", rows()[:3]),
        "parquet": write(tmp_path / "in.parquet", rows()[:3]),
        "out": tmp_path / "out",
    }
    words = [each.format(**places) for each in said]
    if not any(each.startswith("model=") for each in words):
        words.append(f"model={stage2}")
    with pytest.raises(UserError) as error:
        command(*words)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"in.csv", "in.parquet"}, "nothing is left"


def test_the_command_line(stage2: Path, tmp_path: Path) -> None:
    usage = process("--help")
    assert usage.returncode == 0
    assert b"target_saving" in usage.stdout
    failed = process(f"model={stage2}", "input=a.csv", f"output={tmp_path / 'a.csv'}")
    assert failed.returncode == 2
    assert failed.stderr.startswith(b"Error: input=a.csv")
    assert failed.stderr.count(b"\n") == 1
    light = (
        "import sys, deebert.predict; print({'torch', 'pyarrow', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", light], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "set()"
