"""Rows written as CSV, JSON lines or Parquet: part by part, and the parts joined into one file.

The same rows give the same bytes. Knows nothing of what the rows mean and of where the parts are.
"""

import base64
import io
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deebert.errors import UserError

ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
SPECIAL = re.compile('[",\r\n]')
JSON = {b"deebert": b"json"}  # marks a column of a Parquet part whose texts are JSON


def format_of(output: Path) -> str:
    """Return the format that the ending of a file says.

    Raises:
        UserError: the ending is not one of a format.
    """
    if output.suffix.lower() not in ENDINGS:
        raise UserError(f"output={output}: its ending must be one of {', '.join(ENDINGS)}")
    return ENDINGS[output.suffix.lower()]


def is_free(kind: str) -> bool:
    """Say whether every row of a format may have columns of its own."""
    return kind == "jsonl"


@dataclass(frozen=True)
class Layout:
    """The way in which rows are written.

    Attributes:
        kind: csv, jsonl or parquet.
        names: the columns in their order. In JSON lines a row has its own columns instead.
        types: the pyarrow types of the columns whose types are known (for Parquet).
    """

    kind: str
    names: tuple[str, ...]
    types: Mapping[str, Any]

    def part(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Return some rows as a part: not yet a complete file, but an input of `join`."""
        if self.kind == "parquet":
            return self._parquet_part(rows)
        if self.kind == "jsonl":
            return "".join(json_line(row) for row in rows).encode()
        return "".join(_csv_line(row.get(name) for name in self.names) for row in rows).encode()

    def join(self, parts: Sequence[Path], file: Path) -> None:
        """Join the parts, in their order, into one file. At most one part is in memory."""
        if self.kind == "parquet":
            self._join_parquet(parts, file)
            return
        with file.open("wb") as out:
            if self.kind == "csv":
                out.write(_csv_line(self.names).encode())
            for part in parts:
                with part.open("rb") as content:
                    shutil.copyfileobj(content, out)

    def _parquet_part(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        import pyarrow as pa
        from pyarrow import parquet

        fields, columns = [], []
        for name in self.names:
            values = [row.get(name) for row in rows]
            field = _field(name, self.types.get(name), values)
            if field.metadata == JSON:
                values = [_as_json(value) for value in values]
            fields.append(field)
            columns.append(pa.array(values, field.type))
        out = io.BytesIO()
        parquet.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), out)
        return out.getvalue()

    def _join_parquet(self, parts: Sequence[Path], file: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        schemas = []
        for part in parts:
            with part.open("rb") as content:
                schemas.append(parquet.read_schema(content))
        # By place: a search by name goes through all columns, of which there may be many.
        fields = [
            _common(name, [schema.field(place) for schema in schemas])
            for place, name in enumerate(self.names)
        ]
        # The mark of JSON texts is of use for joining only.
        plain = pa.schema([field.remove_metadata() for field in fields])
        with file.open("wb") as sink, parquet.ParquetWriter(sink, plain) as out:
            for part in parts:
                with part.open("rb") as content:
                    table = parquet.ParquetFile(content).read()
                if len(table):
                    columns = [_fitted(table, place, field) for place, field in enumerate(fields)]
                    out.write_table(pa.Table.from_arrays(columns, schema=plain))


def json_line(row: Mapping[str, Any]) -> str:
    """Write a row as a line of JSON lines."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Convert a value for JSON: bytes to base64, dates to ISO 8601, NaN and infinity to null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _csv_line(values: Any) -> str:
    # Before Python 3.13, csv.writer leaves a lone \r without quotes, which no reader accepts.
    return ",".join(_cell(value) for value in values) + "\n"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else _plain(value)
    if text is None:
        return ""
    if not isinstance(text, str):
        text = json.dumps(text, ensure_ascii=False)
    return '"' + text.replace('"', '""') + '"' if SPECIAL.search(text) else text


def _field(name: str, known: Any, values: Sequence[Any]) -> Any:
    """Return the field of a column of a part: of its known type, or of the type of its values."""
    import pyarrow as pa

    if known is not None:
        return pa.field(name, known)
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.field(name, pa.null())
    if kinds == {str}:
        return pa.field(name, pa.string())
    if kinds == {bool}:
        return pa.field(name, pa.bool_())
    if kinds <= {int, float} and all(-(2**63) <= v < 2**63 for v in values if type(v) is int):
        return pa.field(name, pa.int64() if kinds == {int} else pa.float64())
    return pa.field(name, pa.string(), metadata=JSON)


def _common(name: str, fields: Sequence[Any]) -> Any:
    """Return the field of a joined column: of the type of all parts, or else of JSON texts."""
    import pyarrow as pa

    kinds = {(field.type, field.metadata == JSON) for field in fields} - {(pa.null(), False)}
    if not kinds:
        return pa.field(name, pa.string())
    if len(kinds) == 1:
        [(kind, is_json)] = kinds
        return pa.field(name, kind, metadata=JSON if is_json else None)
    if kinds == {(pa.int64(), False), (pa.float64(), False)}:
        return pa.field(name, pa.float64())
    return pa.field(name, pa.string(), metadata=JSON)


def _fitted(table: Any, place: int, field: Any) -> Any:
    """Convert a column of a part to the field of the joined file."""
    import pyarrow as pa

    column = table.column(place)
    if field.metadata == JSON and table.schema.field(place).metadata != JSON:
        return pa.chunked_array([[_as_json(v) for v in column.to_pylist()]], field.type)
    # Integers beyond 2^53 in a column of floats are rounded, as by other readers of JSON.
    return column.cast(field.type, safe=False)


def _as_json(value: Any) -> str | None:
    return None if value is None else json.dumps(_plain(value), ensure_ascii=False)
