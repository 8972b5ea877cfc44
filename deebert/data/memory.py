"""Rows in memory: write them as Parquet files, which the one reader of rows then reads.

A file has the types of the columns and the names of the classes of a `ClassLabel`. The module does
not know tasks: texts and labels are checked when the file is read.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from deebert.disk import whole_files
from deebert.errors import UserError, first_line

KINDS = (
    "a Dataset or DatasetDict, a pandas DataFrame, a dict of columns, a list of dicts, or a dict "
    "of these by split"
)
NAME = "rows.parquet"


def write(data: Any, folder: Path, split: str | None = None) -> Path:
    """Write rows into a folder.

    Args:
        data: rows of one split, or a mapping from splits to rows.
        folder: the folder, which is made.
        split: the split of rows that do not name one; None: they are to be split.

    Returns:
        The file of rows that are to be split, else the folder with a file for each split.

    Raises:
        UserError: these are no rows.
    """
    is_by_split = _is_by_split(data)
    if is_by_split:
        for name in data:
            if not re.fullmatch(r"\w+", str(name)):
                raise UserError(f"data[{name}]: this is no name of a split, such as train")
        tables = {f"{name}.parquet": _table(rows, f"data[{name}]") for name, rows in data.items()}
    else:
        tables = {f"{split}.parquet" if split else NAME: _table(data, "data")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        with whole_files.write_errors("data="):
            table.to_parquet(folder / name)
    return folder if is_by_split or split else folder / NAME


def _is_by_split(data: Any) -> bool:
    """Say whether this is a mapping from splits to rows, and not from columns to values."""
    return isinstance(data, Mapping) and bool(data) and all(map(_is_rows, data.values()))


def _is_rows(value: Any) -> bool:
    """Say whether a value is a set of rows, and no column."""
    if isinstance(value, Mapping | datasets.Dataset) or _is_frame(value):
        return True
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and bool(value) and isinstance(value[0], Mapping)


def _is_frame(value: Any) -> bool:
    return hasattr(value, "columns") and hasattr(value, "to_dict")


def _table(data: Any, flag: str) -> datasets.Dataset:
    try:
        if isinstance(data, datasets.Dataset):
            return data
        if _is_frame(data):
            return datasets.Dataset(pa.Table.from_pandas(data, preserve_index=False))
        if isinstance(data, Mapping):
            return datasets.Dataset.from_dict(dict(data))
        if isinstance(data, Sequence) and data and not isinstance(data, str):
            return datasets.Dataset.from_list(list(data))
    except (pa.ArrowException, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{flag}: the rows cannot be read: {first_line(error)}") from error
    raise UserError(f"{flag}={type(data).__name__} must be {KINDS}")
