"""Rows read and written: every format gives the same, a broken row costs itself, nothing grows."""

import csv
import datetime
import io
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from pyarrow import parquet

from deebert.data.rows import reader, source
from deebert.data.rows.lines import Lines, csv_records
from deebert.data.rows.source import Row
from deebert.errors import UserError
from deebert.predict import rows_out
from deebert.predict.rows_out import Layout

ROWS = [
    {"id": "7", "text": "a fine film"},
    {"id": "8", "text": 'quoted "so", and\nover two lines'},
    {"id": "x y", "text": "ünï — 漢字 🎬"},
]


def read(file: Path, file_format: str | None = None) -> list[Row]:
    with reader.opened(str(file), file_format) as given:
        return list(given.rows(given.names))


def facts(rows: list[Row]) -> list[tuple]:
    """Number, line, and values or what is wrong."""
    return [(row.number, row.line, row.fault or tuple(row.values.values())) for row in rows]


def written(tmp_path: Path, content: bytes, suffix: str = "csv") -> Path:
    file = tmp_path / f"input.{suffix}"
    file.write_bytes(content)
    return file


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    as_csv, as_jsonl, as_parquet = (tmp_path / f"a.{e}" for e in ("csv", "jsonl", "parquet"))
    with as_csv.open("w", newline="") as out:  # \r\n, as csv writes it
        writer = csv.DictWriter(out, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    as_jsonl.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parquet.write_table(pa.Table.from_pylist(ROWS), as_parquet)
    for file in (as_csv, as_jsonl, as_parquet):
        assert [row.values for row in read(file)] == ROWS
        assert [row.number for row in read(file)] == [0, 1, 2]
    assert [row.line for row in read(as_csv)] == [2, 3, 5]
    assert [row.line for row in read(as_parquet)] == [None] * 3
    flat = [row for row in ROWS if "\n" not in row["text"]]
    as_tsv = tmp_path / "a.txt"
    as_tsv.write_text("id\ttext\n" + "".join(f'{r["id"]}\t"{r["text"]}\n' for r in flat))
    assert facts(read(as_tsv, "tsv"))[1] == (1, 3, ("x y", '"ünï — 漢字 🎬')), "quotes are texts"


BROKEN = [
    (b"a,b\n1,2\n1\n1,2,3\n5,6\n", ["has 1 fields, the header has 2", "has 3 fields"]),
    (b"a,b\r\n1,2\r\n\r\nx\0y,2\r\n\r\n5,6\r\n", ["NUL byte"]),
    (b"a,b\n1,2\n\xff\xfe,2\n5,6\n", ["not UTF-8 (byte 0xff)"]),
    (b'a,b\n1,2\n3,"4" x\n5,6\n', ["no CSV"]),
    (b'a,b\n1,2\n3,"4\n5,6\n', ["no CSV"]),  # never closed: the rows after it are not lost
    (b'a,b\n1,2\n3,"4\n5,6\n7,"8"\n', ["no CSV"]),  # closed by the next one
    (b'a,b\n1,2\n3,"4\n\xff"\n5,6\n', ["not UTF-8"]),  # one row of two lines
    (b'a,b\n1,2\n3,"4\n\0\n4"\n5,6', ["NUL byte"]),
    (b"\xef\xbb\xbfa,b\n1,2\n%s\n5,6\n" % (b"x" * 500), ["longer than 200 bytes"]),
    (b'a,b\n1,2\n"%s\n4",8\n5,6\n' % (b"x" * 500), ["longer than 200 bytes"]),
    (b'a,b\n1,2\n"x\n%s",8\n5,6\n' % (b"x" * 500), ["longer than 200 bytes"]),
    (b'a,b\n1,2\n3,"' + b"4\n" * 150 + b'"\n5,6\n', ["no CSV"]),  # too long as a whole
]


@pytest.mark.parametrize(("content", "reasons"), BROKEN)
def test_a_broken_csv_row_costs_itself(
    content: bytes, reasons: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deebert.data.rows.lines.LONGEST", 200)
    rows = read(written(tmp_path, content))
    assert [row.number for row in rows] == list(range(len(rows)))
    assert rows[0].values == {"a": "1", "b": "2"}
    bad = [row for row in rows if row.fault]
    for row, reason in zip(bad, reasons, strict=False):
        assert reason in row.fault
        assert content.splitlines()[row.line - 1], "the line where it begins"
    if len(bad) == len(reasons):
        assert [row.values for row in rows if not row.fault][1]["a"] == "5"
    else:  # the lines of the quote that was too long are rows of their own, of one field
        assert len(bad) == 151
    assert rows[-1].values.get("b") in ("6", "8")


def test_a_quote_that_is_never_closed_takes_no_row_with_it(tmp_path: Path) -> None:
    good = [f"{number},text {number}\n" for number in range(1000)]
    broken = [*good[:500], '77,"never closed\n', *good[500:]]
    rows = read(written(tmp_path, ("a,b\n" + "".join(broken)).encode()))
    assert [row.number for row in rows if row.fault] == [500]
    assert [row.line for row in rows if row.fault] == [502]
    assert [row.values["b"] for row in rows if not row.fault] == [f"text {n}" for n in range(1000)]


JSON_LINES = [
    ('{"text": 7', "no JSON"),
    ('["text"]', "no JSON object"),
    ('{"text": "\\ud800"}', "surrogate"),
    ('{"text": ' + "[" * 50_000, "nested deeper than 100"),
    ('{"text": ' + "[" * 150 + "]" * 150 + "}", "nested deeper than 100"),
    ('{"text": ' + "1" * 5000 + "}", "no JSON"),
    ("hello", "no JSON"),
    ("x\0", "NUL byte"),
]


def test_broken_json_lines(tmp_path: Path) -> None:
    good = '{"text": "\\ud83c\\udfac", "n": [1, {"a": null}]}'
    content = "\n\n".join([good, *(line for line, _ in JSON_LINES), good])
    rows = read(written(tmp_path, content.encode(), "jsonl"))
    assert len(rows) == len(JSON_LINES) + 2
    assert rows[0].values == rows[-1].values == {"text": "🎬", "n": [1, {"a": None}]}
    for row, (_, reason) in zip(rows[1:-1], JSON_LINES, strict=True):
        assert reason in row.fault
        assert row.line == 1 + 2 * row.number


def test_parquet_of_every_type(tmp_path: Path) -> None:
    columns = {
        "text": pa.array(["a", None, "c"]).dictionary_encode(),
        "when": pa.array([datetime.datetime(2024, 5, 6, 7, 8, 9)] * 3, pa.timestamp("us")),
        "price": pa.array([Decimal("1.50")] * 3, pa.decimal128(5, 2)),
        "tags": pa.array([["x"], [], None]),
        "raw": pa.array([b"\xff", b"", None]),
        "score": pa.array([0.5, float("nan"), None], pa.float32()),
    }
    file = tmp_path / "a.parquet"
    table = pa.table(columns)
    parquet.write_table(table, file, row_group_size=2)
    with reader.opened(str(file)) as source:
        assert source.texts == ("text",)
        assert source.size == 3
        rows = list(source.rows(["when", "text", "price", "tags", "raw", "score"]))
        assert source.position() == 3
        types = source.types
    assert [row.values["text"] for row in rows] == ["a", None, "c"]
    values = [row.values for row in rows]
    layout = Layout("parquet", tuple(columns), types)
    (tmp_path / "part").write_bytes(layout.part(values))
    layout.join([tmp_path / "part"], tmp_path / "again.parquet")
    again = parquet.read_table(tmp_path / "again.parquet")
    for name in columns:
        expected = table[name].combine_chunks()
        if name == "text":
            expected = expected.dictionary_decode()
        assert str(again[name].combine_chunks()) == str(expected), name
    assert json.loads(rows_out.json_line(values[1])) == {
        "text": None, "when": "2024-05-06T07:08:09", "price": "1.50", "tags": [], "raw": "",
        "score": None,
    }  # fmt: skip


def test_parquet_in_the_file_s_order(tmp_path: Path) -> None:
    """Whatever order is asked for: rows are compared when work goes on in another process."""
    parquet.write_table(pa.table({name: ["x"] for name in "abc"}), tmp_path / "a.parquet")
    for wanted in ("abc", "cba", "ca"):
        with reader.opened(str(tmp_path / "a.parquet")) as source:
            [row] = source.rows(list(wanted))
        assert list(row.values) == sorted(wanted)


def test_a_date_that_python_has_not_costs_its_row(tmp_path: Path) -> None:
    days = pa.array([1, 2**30, 3], pa.int32()).cast(pa.date32())
    table = pa.table({"text": ["a", "b", "c"], "day": days})
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [row.fault is None for row in rows] == [True, False, True]
    assert rows[1].fault.startswith("its 'day' cannot be read (")
    assert rows[2].values == {"text": "c", "day": datetime.date(1970, 1, 4)}


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xfe", b"too"])
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert facts(rows) == [
        (0, None, ("fine",)),
        (1, None, "its 'text' is not UTF-8"),
        (2, None, ("too",)),
    ]


@settings(deadline=None, max_examples=100)
@drawn(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))),
        min_size=1,
    )
)
def test_what_is_written_is_read_back(cells: list[tuple[str]]) -> None:
    rows = [{"n": number, "text": text} for number, (text,) in enumerate(cells)]
    layout = Layout("csv", ("n", "text"), {})
    content = b"n,text\n" + layout.part(rows)
    expected = [["n", "text"], *([str(row["n"]), row["text"]] for row in rows)]
    assert list(csv.reader(io.StringIO(content.decode(), newline=""), strict=True)) == expected
    actual = csv_records(Lines("here", io.BytesIO(content)))
    assert [(record.fields, record.fault) for record in actual] == [(row, None) for row in expected]


def test_parquet_parts_whose_types_differ(tmp_path: Path) -> None:
    layout = Layout("parquet", ("none", "number", "mixed", "deep"), {})
    parts = [
        [{"none": None, "number": 1, "mixed": 1, "deep": {"a": [1]}}],
        [],
        [{"none": None, "number": 0.5, "mixed": "one", "deep": None}, {"number": None}],
        [{"number": 2**53, "mixed": 2**70}],
    ]
    files = []
    for number, rows in enumerate(parts):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(layout.part(rows))
    layout.join(files, tmp_path / "all.parquet")
    joined = parquet.read_table(tmp_path / "all.parquet")
    assert joined.to_pydict() == {
        "none": [None] * 4,
        "number": [1.0, 0.5, None, 2.0**53],
        "mixed": ["1", '"one"', None, str(2**70)],
        "deep": ['{"a": [1]}', None, None, None],
    }
    assert joined.schema.field("mixed").metadata is None
    once = (tmp_path / "all.parquet").read_bytes()
    layout.join(files, tmp_path / "all.parquet")
    assert (tmp_path / "all.parquet").read_bytes() == once


def test_blocks_are_bounded_in_rows_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(given: list[int]) -> list[int]:
        rows = [Row(number, None, {}, None, size) for number, size in enumerate(given)]
        return [len(block) for block in source.blocks(rows, 4)]

    assert sizes([1] * 9) == [4, 4, 1]
    monkeypatch.setattr(source, "ONE_BLOCK", 100)
    assert sizes([1, 1, 100, 1, 1, 1, 1, 50, 50]) == [3, 4, 2]


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [
        ("csv", b"", "it is empty"),
        ("csv", b"\n\n", "it is empty"),
        ("csv", b"a,b\n", "it holds no rows"),
        ("csv", b"a,b,a\n1,2,3\n", "2 columns 'a'"),
        ("csv", b'a,"b\n', "its first line should name the columns, but it is no CSV"),
        (
            "csv",
            b"PK\x03\x04\x00\n1\n",
            "its first line should name the columns, but it holds a NUL",
        ),
        ("csv", "a,b\n1,2\n".encode("utf-16"), "it is UTF-16"),
        ("tsv", b"", "it is empty"),
        ("jsonl", b"", "it holds no rows"),
        ("jsonl", b"\n\n", "it holds no rows"),
        ("parquet", b"", "cannot be read as Parquet"),
        ("parquet", b"PAR1 no more PAR1", "cannot be read as Parquet"),
        ("docx", b"a", "its ending is none of .csv, .tsv, .jsonl"),
    ],
)
def test_refuses(suffix: str, content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(written(tmp_path, content, suffix))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_what_is_not_there(tmp_path: Path) -> None:
    for given, file_format, says in (
        (tmp_path / "missing.csv", None, "No such file"),
        (tmp_path, "csv", "Is a directory"),
        ("-", None, "input=- needs a format"),
        ("-", "parquet", "input=- needs a format of stdin, one of: csv, tsv, jsonl"),
        ("a.csv", "xlsx", "format 'xlsx' is unknown"),
    ):
        with pytest.raises(UserError, match=says):
            read(given, file_format)


def test_a_parquet_file_that_breaks_off(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [f"text {n}" for n in range(5000)]}), file)
    content = bytearray(file.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    file.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as Parquet") as error:
        read(file)
    assert "\n" not in str(error.value)


HOSTILE = """
import sys
from pathlib import Path
from deebert.data.rows import reader
from deebert.data.rows.source import blocks
with reader.opened(sys.argv[1]) as source:
    for block in blocks(source.rows(source.names), 8192):
        for row in block:
            print(row.number, row.line, row.fault or "fine")
status = Path("/proc/self/status").read_text().splitlines()
print([line.split()[1] for line in status if line.startswith("VmHWM:")][0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_line_of_100_megabytes(kind: str, tmp_path: Path) -> None:
    """Passed over, not taken into memory."""
    first, good = {
        "csv": ("text,n\n", '"a film",1\n'), "tsv": ("text\tn\n", "a film\t1\n"),
        "jsonl": ("", '{"text": "a film"}\n'),
    }[kind]  # fmt: skip
    file = tmp_path / f"hostile.{kind}"
    with file.open("w") as out:
        out.write(first + good + '"')
        for _ in range(100):
            out.write("x" * 1_000_000)
        out.write('",1\n' + good)
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    *lines, peak_kib = done.stdout.splitlines()
    start = 1 + bool(first)
    assert lines == [
        f"0 {start} fine",
        f"1 {start + 1} it is longer than 10,000,000 bytes",
        f"2 {start + 2} fine",
    ]
    assert int(peak_kib) < 80 * 1024


@pytest.mark.slow
def test_a_value_that_is_stored_once_and_stands_in_every_row(tmp_path: Path) -> None:
    """A Parquet file of a kilobyte whose rows would take three gigabytes together."""
    indices = pa.array([0] * 1000 + [1], pa.int32())
    texts = pa.DictionaryArray.from_arrays(indices, pa.array(["a" * 3_000_000, "b"]))
    file = tmp_path / "bomb.parquet"
    parquet.write_table(pa.table({"text": texts}), file, compression="zstd")
    assert file.stat().st_size < 5000
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    *lines, peak_kib = done.stdout.splitlines()
    assert lines == [f"{number} None fine" for number in range(1001)]
    assert int(peak_kib) < 300 * 1024


def test_columns_that_take_far_more_memory_than_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "large.parquet"
    table = pa.table({"text": ["a", "b"], "other": ["c" * 50_000] * 2})
    monkeypatch.setattr(source, "SMALL", 2000)
    for dictionary in (True, False):
        parquet.write_table(table, file, compression="zstd", use_dictionary=dictionary)
        with reader.opened(str(file)) as given:
            assert [row.values["text"] for row in given.rows({"text"})] == ["a", "b"]
        with (
            reader.opened(str(file)) as given,
            pytest.raises(UserError, match=r"its column 'other' holds .* more than 100 times"),
        ):
            list(given.rows({"other"}))


def test_few_rows_at_once_where_values_are_large(tmp_path: Path) -> None:
    """In nested columns, too; and a large value that no row of the first ones has."""
    from deebert.data.rows.parquet import _rows_at_once

    many, large = ["a"] * 5000, "b" * 100_000
    columns = {
        "text": [*many, large], "list": [*([each] for each in many), [large, large]],
        "struct": [*({"x": each} for each in many), {"x": large}], "small": [*many, "c"],
        "map": [*([(each, 1)] for each in many), [(large, 1)]], "number": [1] * 5001,
        "raw": [*map(str.encode, many), large.encode()],
    }  # fmt: skip
    types = {"map": pa.map_(pa.string(), pa.int64())}
    table = pa.table({name: pa.array(c, types.get(name)) for name, c in columns.items()})
    parquet.write_table(table, tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as stream:
        file = parquet.ParquetFile(stream)
        at_once = {name: _rows_at_once("", file, stream, 0, [name]) for name in columns}
    assert at_once["small"] == at_once["number"] == 1024
    assert all(at_once[name] * 100_000 <= 8_000_000 for name in ("text", "list", "struct", "map"))
    with reader.opened(str(tmp_path / "a.parquet")) as given:
        values = [row.values for row in given.rows(columns)]
    assert [value["text"] for value in values] == columns["text"]
    assert [value["list"] for value in values] == columns["list"]
