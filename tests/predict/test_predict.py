"""Prediction over files: every format as the classifier answers, bad rows, one-line errors."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import ROOT, CommandFailed
from helpers.tables import PAIRS, SAVING, command, read, rows, write
from safetensors.torch import load_file, save_file

from deebert import EarlyExitClassifier
from deebert.data import tokenization
from deebert.data.rows.source import Row, Source, blocks
from deebert.errors import UserError
from deebert.inference import engine
from deebert.inference.predictions import Predictions
from deebert.predict import answers, parts
from deebert.predict.answers import Columns, answered, out_names, own_columns
from deebert.predict.work import PredictOptions, chosen_columns


@pytest.fixture(scope="module")
def classifier(stage2: Path) -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(stage2)


def test_a_part_is_a_window_of_the_engine() -> None:
    assert PredictOptions().part_rows == engine.WINDOW


@pytest.mark.parametrize(
    ("suffix", "to"),  # what is read does not know what is written, but for the types of values
    [
        ("csv", "csv"), ("csv", "jsonl"), ("tsv", "parquet"), ("jsonl", "csv"), ("jsonl", "parquet"),
        ("parquet", "jsonl"), ("parquet", "parquet"),
    ],
)  # fmt: skip
def test_every_format_as_the_classifier(
    suffix: str, to: str, stage2: Path, classifier: EarlyExitClassifier, tmp_path: Path
) -> None:
    given = write(tmp_path / f"in.{suffix}", rows())
    output = tmp_path / f"out.{to}"
    options = [f"model={stage2}", f"input={given}", f"output={output}", f"target_saving={SAVING}"]
    command(*options, "part_rows=64", "probabilities=true")
    written, expected = read(output), classifier.predict(PAIRS, target_saving=SAVING)
    assert len(set(expected.exit_layers)) > 1
    classes = [f"probability_{label}" for label in classifier.labels]
    columns = ["row", "id", "sentence1", "sentence2", "input_label", "label", "probability"]
    assert [*written[0]] == [*columns, *classes, "exit_layer"]
    assert [int(row["row"]) for row in written] == list(range(len(PAIRS)))
    assert [row["label"] for row in written] == expected.labels
    assert [int(row["exit_layer"]) for row in written] == expected.exit_layers
    probabilities = torch.tensor([[float(row[name]) for name in classes] for row in written])
    torch.testing.assert_close(probabilities, expected.probabilities_NC, atol=1e-5, rtol=0)
    assert [float(row["probability"]) for row in written] == pytest.approx(
        probabilities.amax(-1).tolist()
    )
    for row, (number, (a, b)) in zip(written, enumerate(PAIRS), strict=True):
        assert (row["id"], row["sentence1"], row["sentence2"]) == (f"r{number}", a, b)
        typed = suffix in ("jsonl", "parquet") and to != "csv"
        assert row["input_label"] == (number if typed else str(number))
    assert not parts.errors_of(output).exists()
    assert not parts.parts_of(output).exists()


BAD = [
    ({"id": 1, "sentence1": "a film"}, "it has no 'sentence2'"),
    ({"id": 2, "sentence1": True, "sentence2": "b"}, "its 'sentence1' is True, not a text"),
    ({"id": 3, "sentence1": "a", "sentence2": {}}, "its 'sentence2' is {}, not a text"),
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
    printed = capsys.readouterr()
    assert f"29 rows, {len(BAD) + 2} of them bad" in printed.out
    assert "of the layers saved, exits: calibrated: " in printed.out
    assert f"{output}; the bad ones: {output}.errors.jsonl" in printed.out
    written, bad = read(output), read(parts.errors_of(output))
    assert [row["id"] for row in written] == [row["id"] for row in good]
    assert [row["row"] for row in written] == [0, 1, *range(4, 12), *range(19, 29)]
    assert [*written[0]] == ["row", "id", "label", "probability", "exit_layer"]
    assert [row["label"] for row in written] == classifier.predict(PAIRS[:20]).labels
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
    written, bad = read(output), read(parts.errors_of(output))
    expected = classifier.predict(("a fine film", "no\nfilm"))[0]
    assert [*written[0]] == ["row", "label", "probability", "exit_layer"]
    assert [int(row["row"]) for row in written] == [0, 2, 4, 6, 8, 10]
    assert {row["label"] for row in written} == {expected["label"]}
    assert [row["row"] for row in bad] == [1, 3, 5, 7, 9]
    assert [row["line"] for row in bad] == [4, 7, 10, 13, 16]


@pytest.mark.slow
@pytest.mark.timeout(100)  # it took three minutes and more
@pytest.mark.parametrize(("suffix", "num_columns"), [("csv", 100_000), ("jsonl", 100_000), ("parquet", 20_000)])  # fmt: skip
def test_time_grows_with_the_columns_and_not_with_their_square(
    suffix: str, num_columns: int, stage2: Path, tmp_path: Path
) -> None:
    more = {f"column {number}": str(number) for number in range(num_columns)}
    given = write(tmp_path / f"in.{suffix}", [row | more for row in rows()[:3]])
    command(f"model={stage2}", f"input={given}", f"output={tmp_path / 'out'}.{suffix}")
    [*_, last] = read(tmp_path / f"out.{suffix}")
    assert last[f"column {num_columns - 1}"] == str(num_columns - 1)


def test_nothing_but_bad_rows(stage2: Path, tmp_path: Path) -> None:
    given = tmp_path / "in.csv"
    given.write_text("sentence1,sentence2\na\nb\n")
    for suffix in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"out.{suffix}"
        says = "no row has an answer; the first one, line 2: it has 1 field"
        with pytest.raises(UserError, match=says):
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
    with pytest.raises(UserError, match="no row has an answer; the first one, line 2: the model's"):
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
    """Those that are named, those of the task, or the only one whose type is text."""

    def columns_of(
        names: Sequence[str],
        texts: str,
        of_task: tuple[str, ...],
        types: str = "",
        **options: object,
    ) -> Columns:
        rows = (lambda _: iter(()), lambda: 0, 0)
        source = Source(tuple(names), tuple(texts), *rows, dict.fromkeys(types))
        return chosen_columns(PredictOptions(**options), source, of_task, free=False)

    assert columns_of("ab", "ab", ("a",)) == Columns(("a",), ("a", "b"))
    assert columns_of("xyz", "y", ("a",), types="y").texts == ("y",)
    assert columns_of("xyz", "xy", ("a",), columns="x").texts == ("x",)
    assert columns_of("xyz", "xy", ("a", "b"), columns=["y", "x"], keep=["z", "x"]) == Columns(
        ("y", "x"), ("z", "x")
    )
    assert columns_of("xy", "xy", ("x",), keep="none").kept == ()
    for names, texts, of_task in (
        ("xyz", "xy", ("a",)),
        ("xyz", "xy", ("a", "b")),
        ("x", "", ("a",)),
        ("x", "x", ("a",)),  # of CSV, whose header may be a text
    ):
        with pytest.raises(UserError, match="it has no column 'a'"):
            columns_of(names, texts, of_task)
    with pytest.raises(UserError, match="it has: y;x \\(';' looks like its separator"):
        columns_of(["y;x"], "", ("x",))
    source = Source(("a",), ("a",), lambda _: iter(()), lambda: 0, 0, {})
    options = PredictOptions(probabilities=True)
    with pytest.raises(UserError, match="probabilities=true: a regression has none"):
        chosen_columns(options, source, ("a",), free=False, is_regression=True)


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
    operating_point = classifier.calibrate(target_saving=SAVING)
    monkeypatch.setattr(tokenization, "AT_ONCE", 500)
    block = answered(classifier, operating_point, given, Columns(("a", "b"), ()))
    expected = classifier.predict(texts, target_saving=SAVING)
    assert [row["label"] for row in block.rows] == expected.labels
    assert [row["exit_layer"] for row in block.rows] == expected.exit_layers
    assert block.layers == sum(expected.exit_layers)


def test_the_order_of_blocks_is_that_of_the_rows() -> None:
    given = (Row(n, None, {}, None, 1) for n in range(25))
    assert [[row.number for row in block] for block in blocks(given, 10)] == [
        [*range(10)], [*range(10, 20)], [*range(20, 25)]
    ]  # fmt: skip


def test_json_lines_with_keys_of_their_own(
    stage2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("deebert.data.rows.reader.FIRST_ROWS", 3)
    given = rows()[:5]
    given[1]["stars"], given[4]["late"] = [4], True
    file = write(tmp_path / "in.jsonl", given)
    options = [f"model={stage2}", f"input={file}"]
    command(*options, f"output={tmp_path / 'out.jsonl'}")
    written = read(tmp_path / "out.jsonl")
    assert written[4]["late"] is True
    assert "stars" not in written[0]
    assert "lack" not in capsys.readouterr().out
    command(*options, f"output={tmp_path / 'out.csv'}")
    assert "1 with columns that the first ones lack (not kept)" in capsys.readouterr().out
    assert [row["stars"] for row in read(tmp_path / "out.csv")] == ["", "[4]", "", "", ""]
    command(*options, f"output={tmp_path / 'out.parquet'}", "keep=[stars,id]")
    assert "lack" not in capsys.readouterr().out
    assert [*read(tmp_path / "out.parquet")[1]][:3] == ["row", "stars", "id"]


@pytest.mark.parametrize(
    ("options", "says"),
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
        (["input={csv}", "output={out}.csv", "workers=2"], "workers=2 needs engine=ray"),
        (["input={csv}", "output={out}.csv", "threads=2"], "threads=2 needs engine=ray"),
        (["input={csv}", "output={out}.csv", "parts=csv"], "parts=csv needs engine=ray"),
        (["input={csv}", "output={out}.csv", "confidence=0.9", "target_saving=0.3"], "confidence=0.9 needs max_drop="),
        (["input={csv}", "output={out}.csv", "confidence=0.95"], "confidence=0.95 needs max_drop="),
        (["input={csv}", "output={out}.csv", "loss=excess", "target_speedup=1.2"], "loss=excess needs max_drop="),
        (["input={csv}", "output={out}.csv", "exit=margin"], "exit=margin needs threshold= or target_saving= or target_speedup= or max_drop="),
        (["input={csv}", "output={out}.csv", "per_ramp=true", "threshold=0.1"], "per_ramp=True needs target_saving"),
        (["input={csv}", "output={out}.csv", "temperature=true"], "temperature=True needs target_saving"),
        (["input={csv}", "output={out}.csv", "task=rte"], "was trained for task=mrpc; leave task= out"),
        (["input={csv}", "output={out}.csv", "format=xlsx"], "format 'xlsx' is unknown"),
        (["input={csv}", "output={out}.csv", "target_saving=2"], "target_saving=2"),
        (["input={csv}", "output={out}.csv", "threshold=[0,"], "threshold=[0,: while parsing"),
        (["input={csv}", "output={out}.csv", "columns=${{input}}"], "columns=${input}: ${...} is not replaced here"),
        (["input={csv}", "output={out}.csv", "saving=0.4"], "option 'saving' is unknown"),
        (["input={csv}", "output={out}.csv", "model=nowhere"], "model=nowhere"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(options: list[str], says: str, stage2: Path, tmp_path: Path) -> None:
    places = {
        "csv": write(tmp_path / "in.csv", rows()[:3]),
        "parquet": write(tmp_path / "in.parquet", rows()[:3]),
        "out": tmp_path / "out",
    }
    words = [each.format(**places) for each in options]
    if not any(each.startswith("model=") for each in words):
        words.append(f"model={stage2}")
    with pytest.raises(UserError) as error:
        command(*words)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"in.csv", "in.parquet"}, "nothing is left"


@pytest.mark.slow
def test_the_command_line(run: Callable[..., str], stage2: Path, tmp_path: Path) -> None:
    assert "target_saving" in run("-m", "deebert", "predict", "--help")
    with pytest.raises(CommandFailed) as failure:
        run("-m", "deebert", "predict", f"model={stage2}", "input=a.csv", f"output={tmp_path / 'a.csv'}")  # fmt: skip
    printed = str(failure.value)
    assert printed.startswith("Error: input=a.csv")
    assert printed.count("\n") == 1
    light = (
        "import sys, deebert.predict; print({'torch', 'pyarrow', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", light], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "set()"
