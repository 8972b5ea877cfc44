"""The files that people really have: read as they are meant, or refused in one line.

Each case is read through Python and through the command line, in training and in evaluation.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from conftest import TINY
from helpers.trainings import plain
from pyarrow import parquet

from deebert.data import loading
from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.hub import record_files
from deebert.models import backbones

Run = Callable[..., str]
Rows = list[tuple[str, int]]


def task(labels: list[str]) -> Task:
    values = {"name": "own", "columns": ["text"], "labels": labels, "metrics": ["accuracy"]}
    return Task.from_config(values)


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(**columns: object) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def with_names(names: list[str], labels: list[int]) -> bytes:
    """Parquet as the library `datasets` writes it, with names for the ids of its labels."""
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    rows = {"text": [f"t{n}" for n in range(len(labels))], "label": labels}
    sink = pa.BufferOutputStream()
    schema = datasets.Features(features).arrow_schema
    parquet.write_table(pa.Table.from_pydict(rows, schema=schema), sink)
    return sink.getvalue().to_pybytes()


def labelled(values: list) -> bytes:
    return json_lines([{"text": f"t{n}", "label": value} for n, value in enumerate(values)])


def numbered(ids: list[int]) -> Rows:
    return [(f"t{n}", each) for n, each in enumerate(ids)]


def lines(rows: list[str]) -> bytes:
    return ("text,label\n" + "\n".join(rows) + "\n").encode()


@dataclass
class Case:
    """Files of a split, the rows or what the refusal says, and the names of the classes."""

    files: dict[str, bytes]
    expected: Rows | str
    labels: tuple[str, ...] = ("bad", "good")


def file(suffix: str, content: bytes, expected: Rows | str, *labels: str) -> Case:
    return Case({f"train.{suffix}": content}, expected, labels or ("bad", "good"))


EIGHTY = [f"film {n} is long,{n % 2}" for n in range(80)]
AT_THE_START = [f'"{row}' if n in (10, 65) else row for n, row in enumerate(EIGHTY)]
AT_BOTH_ENDS = [*EIGHTY[:10], '"film 10 is long,0', *EIGHTY[11:65], 'film 65 is long",1']
# Dates, other types and late columns beside the task's columns.
OTHERS = [
    {"text": f"2024-05-0{n % 9 + 1}", "label": n % 2, "other": [n, str(n), None, {"a": n}][n % 4]}
    for n in range(30)
]
OTHERS.append({"text": "2024-05-06T07:08:09Z", "label": 0, "late": True})

CASES = {
    "labels of its own, the other way round": file("parquet", with_names(["good", "bad"], [0, 1, 1]), numbered([1, 0, 0])),
    "labels of its own, in order": file("parquet", with_names(["bad", "good"], [0, 1, 1]), numbered([0, 1, 1])),
    "labels of its own that are ids": file("parquet", with_names(["0", "1"], [0, 1, 1]), numbered([0, 1, 1])),
    "labels of its own that the task lacks": file("parquet", with_names(["fair", "good"], [1, 0]), "train.parquet, row 1: label 'fair' is out of range; task own has: 0 bad, 1 good"),
    "true and false": file("jsonl", labelled([True, False, True]), numbered([0, 1, 0]), "true", "false"),
    "true and false, as pandas writes them": file("csv", b"text,label\nt0,True\nt1,False\n", numbered([0, 1]), "true", "false"),
    "true and false, as Python writes them": file("jsonl", labelled([True, False]), numbered([1, 0]), "False", "True"),
    "true and false in Parquet": file("parquet", table(text=["t0", "t1"], label=[True, False]), numbered([1, 0]), "false", "true"),
    "true for a word": file("jsonl", labelled([True]), "train.jsonl, line 1: label True is out of range; task own has: 0 bad, 1 good"),
    "true for two words": file("jsonl", labelled([True]), "label True is out of range; 2 classes have this value", "true", "True"),
    "whole numbers as floats": file("jsonl", labelled([1, 2.0, "3", 3.0]), numbered([0, 1, 2, 2]), "1.0", "2.0", "3.0"),
    "half numbers": file("csv", b"text,label\nt0,2\nt1,1.50\nt2,.5\nt3,1e0\n", numbered([3, 2, 0, 1]), "0.5", "1.0", "1.5", "2.0"),
    "a number that is no name": file("jsonl", labelled([0]), "label 0 is out of range", "1", "2"),
    "a number of two names": file("jsonl", labelled([1]), "2 classes have this value", "1", "1.0"),
    "numbers in circles": file("jsonl", labelled(["②", "①", 1]), numbered([1, 0, 1]), "①", "②"),
    "digits of another script": file("jsonl", labelled(["\u0662", 2]), "line 2: label 2 is out of range", "\u0661", "\u0662"),
    "ids": file("jsonl", labelled([1, 0.0, "1", "0.0"]), numbered([1, 0, 1, 0])),
    "half an id": file("jsonl", labelled([0.5]), "label 0.5 is out of range"),
    "a huge number": file("jsonl", labelled([10**400]), "label 1000000"),
    "a label that is null": file("jsonl", labelled([None]), "line 1: label null is out of range"),
    "a label that is missing": file("jsonl", json_lines([{"text": "a", "label": 1}, {"text": "b"}]), "train.jsonl, line 2: it has no 'label'"),
    "a row without its text": file("csv", b"label,text\n1,a\n0\n", "train.csv, line 3: it has 1 fields, the header has 2"),
    "a text that is missing": file("jsonl", json_lines([{"text": "a", "label": 1}, {"label": 1}]), "train.jsonl, line 2: it has no 'text'"),
    "a text that is null": file("parquet", table(text=["a", None], label=[0, 1]), "train.parquet, row 1: its 'text' is null, not a text"),
    "empty texts": file("csv", b'text,label\n"",1\n,0\n', [("", 1), ("", 0)]),
    "empty texts in JSON": file("jsonl", json_lines([{"text": "", "label": 1}]), [("", 1)]),
    "a NUL": file("csv", b"text,label\na,1\nb\0,0\n", "train.csv, line 3: it holds a NUL byte"),
    "a NUL in JSON": file("jsonl", json_lines([{"text": "a\0", "label": 1}]), "train.jsonl, line 1: its 'text' holds a NUL character"),
    "a NUL in Parquet": file("parquet", table(text=["a", "\0"], label=[0, 1]), "train.parquet, row 1: its 'text' holds a NUL character"),
    "two stray quotes": file("csv", lines(AT_THE_START), "train.csv, line 12: it is no CSV"),
    "two stray quotes that fit": file("csv", lines(AT_BOTH_ENDS), "train.csv, line 12: its quotes hold several lines, and line 12 looks like a row"),
    "a quote that is not closed": file("csv", lines([*EIGHTY[:70], '"film', *EIGHTY[70:]]), "train.csv, line 72: it is no CSV"),
    "a text of three lines": file("csv", b'text,label\n"one,\ntwo, three\nfour",1\n', [("one,\ntwo, three\nfour", 1)]),
    "a text after its label": file("csv", b'label,text\n1,"one, 0\n0 two"\n', [("one, 0\n0 two", 1)]),
    "stray quotes side by side": file("csv", b'label,text\n1,"one\n0,two"\n', "train.csv, line 2: its quotes hold several lines, and line 3 looks like a row"),
    "duplicate columns": file("csv", b"text,label,text\na,1,b\n", "train.csv: it has 2 columns 'text'; rename them"),
    "a lone carriage return": file("csv", b"text,label\r\na\rb,1\r\n", "train.csv, line 2: it holds a carriage return that ends no line"),
    "the same in TSV": file("tsv", b"text\tlabel\na\rb\t1\n", "train.tsv, line 2: it holds a carriage return that ends no line"),
    "a carriage return in quotes": file("csv", b'text,label\r\n"a\rb",1\r\n', [("a\rb", 1)]),
    "a field too many": file("csv", b"text,label\na,b,1\n", "train.csv, line 2: it has 3 fields, the header has 2"),
    "no UTF-8": file("csv", b"text,label\ncaf\xe9,1\n", "train.csv, line 2: it is not UTF-8 (byte 0xe9)"),
    "UTF-16": file("csv", "text,label\na,1\n".encode("utf-16"), "train.csv: it is UTF-16"),
    "half of a surrogate pair": file("jsonl", b'{"text": "\\ud800", "label": 1}\n', "train.jsonl, line 1: it holds half of a surrogate pair"),
    "other columns of any kind": file("jsonl", json_lines(OTHERS), [(row["text"], row["label"]) for row in OTHERS]),
    "a list of JSON": file("json", json.dumps(OTHERS, indent=1).encode(), [(row["text"], row["label"]) for row in OTHERS]),
    "JSON lines of another suffix": file("json", labelled([1, 0]), numbered([1, 0])),
    "two shards": Case({f"train-0000{n}-of-00002.csv": lines([f"t{n},{n}"]) for n in range(2)}, numbered([0, 1])),
    "two shards with hashes": Case({f"train-0000{n}-of-00002-a{n}f.csv": lines([f"t{n},{n}"]) for n in range(2)}, numbered([0, 1])),
    "an empty shard": Case({f"train-0000{n}-of-00002.csv": lines(["t0,1"] * n) for n in range(2)}, [("t0", 1)]),
    "shards with labels of their own": Case(
        {"train-00000-of-00002.parquet": with_names(["good", "bad"], [0]), "train-00001-of-00002.parquet": with_names(["bad", "good"], [0])},
        [("t0", 1), ("t0", 0)],
    ),
    "a shard is missing": Case({f"train-0000{n}-of-00003.csv": lines(["a,1"]) for n in (0, 2)}, "train-00000-of-00003.csv is one of 3 files, numbered from 0, and these are missing: 00001"),
    "millions of shards are missing": Case({"train-00000-of-99999999.csv": lines(["a,1"])}, "these are missing: 00001, 00002, 00003, 00004, 00005, ..."),
    "a shard too many": Case({f"train-0000{n}-of-00002.csv": lines(["a,1"]) for n in range(3)}, "is one of 2 files, numbered from 0, and there are 3"),
    "shards of two exports": Case({f"train-00000-of-0000{n}.csv": lines(["a,1"]) for n in (1, 2)}, "train-00000-of-00001.csv and train-00000-of-00002.csv are of two exports"),
    "shards of two hashes": Case({f"train-00000-of-00001-{n}.csv": lines(["a,1"]) for n in "ab"}, "are of two exports; keep the files of one"),
    "a whole file and shards": Case({name: lines(["a,1"]) for name in ("train.csv", "train-00000-of-00001.csv")}, "train.csv and train-00000-of-00001.csv are of two exports"),
}  # fmt: skip

ODD_FOLDERS = ("set[AB]", "run*", "what?", "a::b", "{x}", "%41", "~", "a b'\"")


def written(folder: Path, case: Case) -> Path:
    """A folder with the files of a case as its training and its validation split."""
    folder.mkdir(parents=True)
    for name, content in case.files.items():
        for split in ("train", "validation"):
            (folder / name.replace("train", split)).write_bytes(content)
    return folder


def rows_of(kind: Task, root: Path) -> Rows:
    data = loading.load(kind, "train", str(root))
    return list(zip(data["text_a"][:], data["label"][:], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_through_python(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    root, kind = written(tmp_path / "own", case), task(list(case.labels))
    if not isinstance(case.expected, str):
        assert rows_of(kind, root) == case.expected
        return
    with pytest.raises(UserError) as error:
        rows_of(kind, root)
    assert case.expected in str(error.value)
    assert "\n" not in str(error.value)
    assert str(root) in str(error.value), "the file is named"


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_names_of_folders_are_no_patterns(suffix: str, tmp_path: Path) -> None:
    """Folders that a pattern would match hold other rows."""

    def content(text: str) -> bytes:
        rows = [{"text": text, "label": 1}]
        return {
            "csv": f"text,label\n{text},1\n".encode(), "jsonl": json_lines(rows),
            "parquet": table(text=[text], label=[1]),
        }[suffix]  # fmt: skip

    for decoy in ("setA", "setB", "run1", "run2", "whats", "b", "A", "x"):
        written(tmp_path / decoy, file(suffix, content("of another folder"), ""))
    for number, name in enumerate(ODD_FOLDERS):
        root = written(tmp_path / name, file(suffix, content(f"own {number}"), ""))
        assert rows_of(task(["bad", "good"]), root) == [(f"own {number}", 1)]
        assert loading.exists(task(["bad", "good"]), "validation", str(root))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_no_stale_rows(suffix: str, tmp_path: Path) -> None:
    """A file of the same path, size and time, but other contents: an unpacked archive, a link."""
    contents = {
        "csv": [f"text,label\n{word},1\n".encode() for word in ("old", "new")],
        "jsonl": [json_lines([{"text": word, "label": 1}]) for word in ("old", "new")],
        "parquet": [table(text=[word], label=[1]) for word in ("old", "new")],
    }[suffix]
    assert len(contents[0]) == len(contents[1])
    path = tmp_path / f"train.{suffix}"
    tokens, prints = [], []
    for content in contents:
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))
        data = TextDataModule(
            task(["bad", "good"]), backbones.tokenizer(plain("backbone", "tiny")), root=str(tmp_path),
            max_length=16, limit_train=None, calibration_size=0, batch_size=2, eval_batch_size=2,
            num_workers=0, seed=1,
        )  # fmt: skip
        tokens.append(data.tokens("train")["input_ids"][:])
        prints.append((data.fingerprint("train"), data.text_fingerprint("train")))
    assert tokens[0] != tokens[1]
    assert prints[0][0] != prints[1][0]
    assert prints[0][1] != prints[1][1]


def configured(folder: Path, case: Case) -> tuple[str, ...]:
    """The words of the command line for the task of a case."""
    (folder / "task").mkdir(parents=True, exist_ok=True)
    values = {"name": "own", "columns": ["text"], "labels": case.labels, "metrics": ["accuracy"]}
    (folder / "task" / "own.yaml").write_text(json.dumps(values))
    return "--config-dir", str(folder), "task=own", *TINY, "stage=1", "stages.1.epochs=1"


@pytest.mark.slow
def test_through_the_command_line(run: Run, fails: Run, tmp_path: Path) -> None:
    """What is refused: in training, and in evaluation. What is read: the record has its labels."""
    trained = tmp_path / "run"
    for name in (
        "true and false", "half numbers", "empty texts", "other columns of any kind", "two shards",
        "labels of its own, the other way round",
    ):  # fmt: skip
        case = CASES[name]
        root = tmp_path / "set[AB]" / "own"
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(trained, ignore_errors=True)
        written(root, case)
        words = configured(tmp_path / "conf", case)
        run("train.py", *words, f"data.root='{root.parent}'", f"hydra.run.dir={trained}")
        record = record_files.load(trained / "records" / "validation.safetensors")[0]
        in_order = sorted(zip(record.index_N.tolist(), record.labels_N.tolist(), strict=True))
        assert [label for _, label in in_order] == [label for _, label in case.expected], name
    for number, (name, case) in enumerate(CASES.items()):
        if isinstance(case.expected, list):
            continue
        root, words = written(tmp_path / f"case{number}", case), configured(tmp_path / "conf", case)
        says = fails("train.py", *words, f"data.root={root}")
        # Shards are counted for all splits before a split is read.
        assert case.expected in says.replace("validation", "train"), name
        if number % 3 == 0 and case.labels == ("bad", "good"):  # the same reader
            says = fails("evaluate.py", f"ckpt={trained}", "logger=csv", f"data.root={root}")
            assert case.expected in says.replace("validation", "train"), name
