"""200 odd rows: training, evaluation, prediction, the service and an export read the same of them."""

import csv
import io
import json
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import command as run_command
from helpers.services import MOST_CHARS, served
from helpers.tables import command
from helpers.trainings import plain
from pyarrow import parquet
from pydantic import ValidationError

from deebert import EarlyExitClassifier
from deebert.data import loading
from deebert.data import texts as input_texts
from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.export.onnx_runner import Runner, RunnerError
from deebert.hub import record_files
from deebert.predict import parts
from deebert.serve.requests import Limits, Request, work

MISSING = object()
LONGEST = 1_000_000
PIECES = (
    "", " ", "\t", "\n", "\r", "\r\n", "\n\n", "\u00a0", "\u2028", "\u2029", "\x85", "\x0b", "\x0c",
    "\x00", "\x01", "\x1f", "\x7f", "\ud800", "\udfff", "\ude00\ud83d", "\ufeff", "\ufffe", "\uffff", "\ufffd",
    '"', '""', "'", '"He said', 'so"', ",", ";", "\\", "\\n", "\\u0000", "a,b", "[SEP]", "<s>", "##a", "${x}", "{}",
    "NA", "null", "NaN", "None", "nan", "true", "False", "-1", "007", "1e5", "1_000", "\u0663", "\u2460",
    "2024-05-06", "2024-05-06T07:08:09Z", "06/05/24", "12:30", "\U0001f600", "\U0001f469\u200d\U0001f52c", "\U0001f1eb\U0001f1f7",
    "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627", "\u202eabc\u202c", "e\u0301", "\u0130", "\u1e9e", "\u5317\u4eac", "\u0e01\u0e33", "a fine film", "dull",
)  # fmt: skip
NO_TEXTS = (None, MISSING, 0, 3, 2.5, True, False, [], ["a"], {}, {"a": "b"}, "x" * (LONGEST + 1))


def values() -> list[Any]:
    """The first text of each row; the second one is always "b"."""
    draw = random.Random(22)
    made: list[Any] = [*PIECES, *NO_TEXTS]
    while len(made) < 200:
        made.append("".join(draw.choices(PIECES, k=draw.randint(2, 5))))
    draw.shuffle(made)
    return made


VALUES = values()


def is_text(value: Any) -> bool:
    """Whether it is to be read: what this test holds the program to."""
    return (
        isinstance(value, str)
        and len(value) <= LONGEST
        and not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)
    )


GOOD = [value for value in VALUES if is_text(value)]


def row(value: Any, **more: Any) -> dict[str, Any]:
    return {**({} if value is MISSING else {"sentence1": value}), "sentence2": "b", **more}


def fits(suffix: str, value: Any) -> bool:
    """Whether a format can hold a value at all, or something like it."""
    if suffix == "jsonl":
        return True
    if suffix == "parquet" and value is None:
        return True
    if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
        return False
    return suffix != "tsv" or not set(value) & set("\t\n\r")


def write(file: Path, given: list[Any]) -> Path:
    """Write rows with a label as a program of the user's might."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [row(value, label=number % 2) for number, value in enumerate(given)]
    if file.suffix == ".jsonl":  # with a byte order mark and blank lines, which are no rows
        lines = "\n\n \n".join(json.dumps(each) for each in rows)
        file.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    elif file.suffix == ".parquet":
        kinds = {"sentence1": pa.string(), "sentence2": pa.string(), "label": pa.int64()}
        columns = {name: [each[name] for each in rows] for name in kinds}
        parquet.write_table(pa.table(columns, pa.schema(kinds)), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8-sig") as out:
            writer = csv.writer(out, quoting=csv.QUOTE_ALL)
            writer.writerow(rows[0])
            writer.writerows(each.values() for each in rows)
    else:
        cells = [list(rows[0]), *(list(map(str, each.values())) for each in rows)]
        file.write_text("".join("\t".join(each) + "\n" for each in cells), newline="")
    return file


@pytest.fixture(scope="module")
def classifier(stage2: Path) -> EarlyExitClassifier:
    return EarlyExitClassifier.from_pretrained(stage2)


@pytest.fixture(scope="module")
def exported(stage2: Path, made_once: Callable[..., Path]) -> Path:
    def make(folder: Path) -> None:
        run_command("-m", "deebert", "export", f"model={stage2}", f"output={folder}")

    return made_once("exported_for_odd_rows", make)


def mrpc() -> Task:
    return Task.from_config(plain("task", "mrpc"))


def is_read(read: Callable[[], object], *errors: type[Exception]) -> bool:
    try:
        read()
    except errors:
        return False
    return True


def test_there_are_enough_of_both() -> None:
    assert len(VALUES) == 200
    assert 120 < len(GOOD) < 180


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_training_and_prediction(
    suffix: str, stage2: Path, classifier: EarlyExitClassifier, tmp_path: Path
) -> None:
    given = [value for value in VALUES if fits(suffix, value)]
    good = [value for value in given if is_text(value)]
    bad = [number for number, value in enumerate(given) if not is_text(value)]
    task = mrpc()
    write(tmp_path / "all" / f"train.{suffix}", good)
    data = TextDataModule(
        task, classifier.tokenizer, root=str(tmp_path / "all"), max_length=classifier.max_length,
        limit_train=None, calibration_size=0, batch_size=8, eval_batch_size=8, num_workers=0, seed=1,
    )  # fmt: skip
    assert loading.load(task, "train", str(tmp_path / "all"))["text_a"][:] == good
    inputs = classifier.encode([(text, "b") for text in good])
    assert data.tokens("train")["input_ids"][:] == [each["input_ids"] for each in inputs]
    for number in bad:  # each one alone is refused, with its place
        root = tmp_path / str(number)
        write(root / f"train.{suffix}", ["fine", given[number]])
        with pytest.raises(UserError, match=rf"train\.{suffix}, (line|row) \d+: it"):
            loading.load(task, "train", str(root))
    output = tmp_path / "out.jsonl"
    file = write(tmp_path / f"in.{suffix}", given)
    command(f"model={stage2}", f"input={file}", f"output={output}", "keep=[sentence1]")
    answers = [json.loads(line) for line in output.read_text().split("\n") if line]
    assert [answer["sentence1"] for answer in answers] == good
    assert [a["label"] for a in answers] == classifier.predict([(t, "b") for t in good]).labels
    refused = parts.errors_of(output).read_text().split("\n") if bad else []
    assert [json.loads(line)["row"] for line in refused if line] == bad


def test_python_the_service_and_the_runner(
    classifier: EarlyExitClassifier,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runner = Runner(exported, threads=1)
    limits, names = Limits(texts=8, chars=LONGEST), classifier.task.columns
    for value in [*VALUES, "x" * LONGEST]:
        given = row(value)

        def serve(given: dict[str, Any] = given) -> None:
            request = Request.model_validate(json.loads(json.dumps({"text": given})))
            input_texts.columns(work(request, limits, names, {}).texts[0], classifier.task)

        readers = {
            "the service": is_read(serve, ValidationError, UserError),
            "the runner": is_read(lambda given=given: runner.checked(given), RunnerError),
            "Python": is_read(
                lambda given=given: input_texts.columns(given, classifier.task), UserError
            ),
        }
        assert readers == dict.fromkeys(readers, is_text(value)), ascii(value)[:80]
    expected = classifier.predict([(text, "b") for text in GOOD]).labels
    assert [each["label"] for each in runner.predict([(t, "b") for t in GOOD])] == expected
    # The runner by itself, with a byte order mark and blank lines.
    lines = "\n\n \n".join(json.dumps([text, "b"]) for text in GOOD)
    given = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf\n" + lines.encode()))
    monkeypatch.setattr(sys, "stdin", given)
    monkeypatch.setattr(sys, "argv", ["runner.py", str(exported), "threads=1"])
    runpy.run_path(str(exported / "runner.py"), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["label"] for line in printed] == expected


@pytest.mark.slow
def test_end_to_end(
    run: Callable[..., str], fails: Callable[..., str], stage2: Path, classifier: EarlyExitClassifier,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The commands themselves: `evaluate` over all good rows, and a service that runs."""
    root = tmp_path / "data"
    write(root / "validation.jsonl", GOOD)
    folder = tmp_path / "evaluation"
    run("evaluate.py", f"ckpt={stage2}", "logger=csv", f"data.root={root}", f"hydra.run.dir={folder}")  # fmt: skip
    record = record_files.load(folder / "records" / "validation.safetensors")[0]
    assert sorted(record.index_N.tolist()) == list(range(len(GOOD)))
    last_NC = record.logits_NLC[:, -1]
    by_row = dict(zip(record.index_N.tolist(), last_NC.argmax(-1).tolist(), strict=True))
    expected = classifier.predict([(text, "b") for text in GOOD], threshold=0.0).labels
    assert [classifier.labels[by_row[n]] for n in range(len(GOOD))] == expected
    write(root / "validation.jsonl", [*GOOD, "a\0"])
    refusal = fails("evaluate.py", f"ckpt={stage2}", "logger=csv", f"data.root={root}")
    assert f"line {len(GOOD) * 3 + 1}: its 'sentence1' holds a NUL character" in refusal
    by_text = dict(zip(GOOD, expected, strict=True))
    with served(stage2, tmp_path, "threshold=0.0") as service:
        for value in VALUES:
            if isinstance(value, str) and len(value) > MOST_CHARS:
                continue
            status, _, content = service.send(body=json.dumps({"text": row(value)}))
            assert status == (200 if is_text(value) else 422), (ascii(value), content)
            if status == 200:
                assert json.loads(content)["answers"][0]["label"] == by_text[value]
