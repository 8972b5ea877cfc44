"""Tables of pairs of texts, written and read in every format, and the command that answers them."""

import csv
import json
import random
from pathlib import Path

import pyarrow as pa
from conftest import mrpc_rows
from pyarrow import parquet

from deebert.options import parse
from deebert.predict.command import predict
from deebert.predict.work import PredictOptions

PAIRS = [(row["sentence1"], row["sentence2"]) for row in mrpc_rows("test", 150)]

SAVING = 0.3


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


def command(*options: object) -> None:
    predict(parse(PredictOptions, [str(each) for each in options]))


def many(file: Path, number: int) -> Path:
    """Rows of all lengths; some are bad."""
    source = random.Random(3)
    given = [
        {
            "id": str(n),
            "sentence1": " ".join(
                source.choices(PAIRS[n % 150][0].split(), k=source.randint(1, 30))
            ),
            "sentence2": "\0" if n % 97 == 5 else PAIRS[n % 150][1],
        }
        for n in range(number)
    ]
    return write(file, given)
