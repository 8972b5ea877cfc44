"""Saved records: one safetensors file a split, with a JSON header."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deebert.data.tasks import SPLIT
from deebert.errors import UserError
from deebert.exits.records import Record
from deebert.hub import checkpoint_config
from deebert.untrusted import plain_files, tensor_files

SCHEMA = 1
FOLDER = "records"  # of a run or saved folder
MOST_GROUPS = 500  # each has a figure at each threshold
LONGEST = 2**20  # tokens of an input
COLUMNS = {  # name in the file -> types, number of dimensions
    "logits_NLC": ((torch.float32,), 3), "labels_N": ((torch.int64, torch.float32), 1),
    "index_N": ((torch.int64,), 1), "length_N": ((torch.int64,), 1),
    "group_N": ((torch.int64,), 1), "learned_score_NL": ((torch.float32,), 2),
}  # fmt: skip
OLD_NAMES = {"unsure_NL": "learned_score_NL"}  # of columns, in records from before


def files(folder: Path, place: str = FOLDER) -> list[Path]:
    """The saved records in a folder of a run or saved folder.

    Raises:
        UserError: one is a link that leads out of the run or saved folder, or no file.
    """
    names = sorted(file.name for file in (folder / place).glob("*.safetensors"))
    try:
        return [plain_files.inside(folder, f"{place}/{name}") for name in names]
    except (UserError, FileNotFoundError) as error:
        raise UserError(f"{folder}: {error}") from error


def save(record: Record, folder: Path, header: Mapping[str, Any]) -> None:
    """Write `<split>.safetensors`; a reader never sees half of it.

    Args:
        header: plain values: `checkpoint` and `data` (fingerprints) and `config` (of the run).
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{record.split}.part"
    tensors = {name: values.contiguous() for name, values in record.tensors().items()}
    facts = {"schema": SCHEMA, "split": record.split, "values": tensor_files.fingerprint(tensors)}
    text = json.dumps(facts | dict(header))
    save_file(tensors, part, {"deebert": text})
    os.replace(part, folder / f"{record.split}.safetensors")


def load(file: Path) -> tuple[Record, dict[str, Any]]:
    """A saved record and its header, whose `config` is as `checkpoint_config.accepted` has it.

    Raises:
        UserError: the file is missing, is no record of this program, or is damaged.
    """
    if not file.is_file():
        raise UserError(f"record={file}: no such record")
    try:
        tensors, metadata = tensor_files.safetensors_file(file)
    except UserError as error:
        raise UserError(f"record={file}: not a record of this program: {error}") from error
    try:
        header = plain_files.json_mapping(metadata["deebert"], "its header")
        header["config"], _ = checkpoint_config.accepted(header["config"])
        if "values" in header and header["values"] != tensor_files.fingerprint(tensors):
            raise UserError("its values are not those that were written: it is damaged")
        tensors = {OLD_NAMES.get(name, name): values for name, values in tensors.items()}
        _check(header, tensors, file)
        columns: dict[str, Any] = {"labels_N": None} | tensors
        record = Record(header["split"], **columns)
        record.check()
    except UserError as error:
        raise UserError(
            f"record={file}: {error}; record again with evaluate.py ckpt=RUN"
        ) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"record={file}: not a record of this program") from error
    return record, header


def _check(header: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> None:
    """Check that header and columns are those of one record.

    Raises:
        UserError: they are not.
    """
    config, logits = header["config"], tensors["logits_NLC"]
    labels, learned_score = tensors.get("labels_N"), tensors.get("learned_score_NL")
    if header["schema"] != SCHEMA:
        raise UserError(f"its schema is {header['schema']!a}, not {SCHEMA}")
    if not isinstance(header["split"], str) or not re.fullmatch(SPLIT, header["split"]):
        raise UserError(f"its split {header['split']!r} is no name of one")
    if header["split"] != file.stem:
        raise UserError(f"the file was renamed, it is of split {header['split']!a}")
    for name, values in tensors.items():
        dtypes, num_dims = COLUMNS[name]
        if values.ndim != num_dims or values.dtype not in dtypes:
            raise UserError(f"its {name} is {tuple(values.shape)} {values.dtype}")
    if logits.shape[1] > plain_files.LAYERS:
        raise UserError(f"it has {logits.shape[1]} ramps, more than {plain_files.LAYERS}")
    if not len(logits) or not logits.shape[1]:
        raise UserError(f"its logits are {tuple(logits.shape)}, not (rows, ramps, labels)")
    num_labels = len(config["task"]["labels"] or "1")  # a regression has one output
    if logits.shape[2] != num_labels:
        raise UserError(f"it has {logits.shape[2]} outputs a ramp, and its task {num_labels}")
    if learned_score is not None and (
        learned_score.shape != logits.shape[:2] or not learned_score.isfinite().all()
    ):
        raise UserError("its learned exit scores are not (rows, ramps) finite numbers")
    if {len(values) for values in tensors.values()} != {len(logits)}:
        raise UserError("its columns are of different lengths")
    if labels is not None:
        if not labels.isfinite().all() or labels.is_floating_point() != (num_labels == 1):
            raise UserError(f"its labels are {labels.dtype}, and its task has {num_labels} outputs")
        if num_labels > 1 and not 0 <= labels.min() <= labels.max() < num_labels:
            raise UserError(f"its labels are not all between 0 and {num_labels - 1}")
    groups = tensors.get("group_N")
    if groups is not None and len(groups.unique()) > MOST_GROUPS:
        raise UserError(f"its rows are of more than {MOST_GROUPS} groups")
    lengths = tensors["length_N"]
    if not 0 <= lengths.min() <= lengths.max() <= LONGEST:
        raise UserError(f"its inputs have from {lengths.min()} to {lengths.max()} tokens")
