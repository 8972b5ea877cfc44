"""Write and read saved records: one safetensors file for each split, with a JSON header.

The header is the stamp of what made the record: the weights, the length of the inputs, the rows
and the precision. Whoever uses a record compares weights, task and length (`check_use`); another
precision gets a warning. A record that is saved holds all rows of its split. A file may be somebody
else's, so all its values are checked before use. This module does not know how records are made.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deebert.data.tasks import MOST_GROUPS, SPLIT
from deebert.disk import whole_files
from deebert.errors import UserError, is_whole
from deebert.exits.records import Record
from deebert.hub import checkpoint_config
from deebert.hub.checkpoints import Checkpoint, Source
from deebert.hub.run_config import RunConfig
from deebert.models.quantization import Quantization
from deebert.options import job_command
from deebert.untrusted import plain_files, tensor_files

SCHEMA = 1
FOLDER = "records"  # in a run folder or saved folder
LONGEST = 2**20  # tokens of an input
COLUMNS = {  # name in the file -> allowed types, number of dimensions
    "logits_NLC": ((torch.float32,), 3), "labels_N": ((torch.int64, torch.float32), 1),
    "index_N": ((torch.int64,), 1), "length_N": ((torch.int64,), 1),
    "group_N": ((torch.int64,), 1), "learned_score_NL": ((torch.float32,), 2),
}  # fmt: skip
OLD_NAMES = {"unsure_NL": "learned_score_NL"}  # column in older files -> its name now


@dataclass(frozen=True)
class Header:
    """The facts about a record that stand in its file.

    Attributes:
        checkpoint: the fingerprint of the weights that the record was made with.
        data: the fingerprint of the rows, or None.
        config: the configuration of the run that made the weights.
        max_length: the number of tokens that the inputs were cut to.
    """

    checkpoint: str
    data: str | None
    config: RunConfig
    max_length: int


@dataclass(frozen=True)
class RecordFolder(Source):
    """The records of one checkpoint, as the source of an evaluation.

    Attributes:
        header: the facts that all its records share; those of its first record.
        records: the records, one for each split.
    """

    header: Header
    records: list[Record]


def files(folder: Path, place: str = FOLDER) -> list[Path]:
    """List the saved records of a run folder or saved folder.

    Args:
        folder: the run folder or saved folder.
        place: the folder in it that holds the records.

    Returns:
        Paths, in alphabetical order.

    Raises:
        UserError: a record is no file, or a link that leads out of `folder`.
    """
    names = sorted(file.name for file in (folder / place).glob("*.safetensors"))
    try:
        return [plain_files.inside(folder, f"{place}/{name}") for name in names]
    except (UserError, FileNotFoundError) as error:
        raise UserError(f"{folder}: {error}") from error


def save(record: Record, folder: Path, header: Header) -> None:
    """Write `<split>.safetensors`, whole or not at all.

    Args:
        record: the logits of every ramp for a split.
        folder: where the file is written; it is made if it is missing.
        header: the facts about the record.

    Raises:
        OSError: the file cannot be written. It names the folder.
    """
    tensors = {name: values.contiguous() for name, values in record.tensors().items()}
    facts = {
        "schema": SCHEMA,
        "split": record.split,
        "values": tensor_files.fingerprint(tensors),
        "checkpoint": header.checkpoint,
        "data": header.data,
        "config": header.config.plain(),
        "max_length": header.max_length,
        "precision": record.precision,
        "quantization": record.quantization.plain() if record.quantization else None,
    }
    with whole_files.replaced(folder / f"{record.split}.safetensors") as part:
        save_file(tensors, part, {"deebert": json.dumps(facts)})


def load(file: Path) -> tuple[Record, Header]:
    """Read a saved record.

    Returns:
        The record, and the facts about it.

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
        facts = plain_files.json_mapping(metadata["deebert"], "its header")
        config, _ = checkpoint_config.accepted(facts["config"])
        if "values" in facts and facts["values"] != tensor_files.fingerprint(tensors):
            raise UserError("its values are not those that were written: it is damaged")
        tensors = {OLD_NAMES.get(name, name): values for name, values in tensors.items()}
        _check_split(facts, file)
        _check(tensors, config.task.num_labels)
        # Older files state neither. Their inputs were cut as their configuration says.
        max_length = facts.get("max_length", config.data.max_length)
        precision = facts.get("precision", "float32")
        if not is_whole(max_length) or not isinstance(precision, str):
            raise UserError(f"its max_length is {max_length!a}, its precision {precision!a}")
        columns: dict[str, Any] = {"labels_N": None} | tensors
        quantization = facts.get("quantization")
        if quantization is not None:
            quantization = Quantization.from_plain(quantization)
        if (precision == "int8") != (quantization is not None):
            raise UserError("it was recorded in int8 without a quantization, or has one without it")
        record = Record(facts["split"], **columns, precision=precision, quantization=quantization)
        if quantization and len(quantization.layers) != record.num_layers:
            raise UserError(
                f"its quantization is of {len(quantization.layers)} layers, and it has "
                f"{record.num_layers} ramps"
            )
        record.check()
        header = Header(facts["checkpoint"], facts.get("data"), config, max_length)
    except UserError as error:
        raise UserError(
            f"record={file}: {error}; record again with {job_command('evaluate')} ckpt=RUN"
        ) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"record={file}: not a record of this program") from error
    return record, header


def read_folder(given: str) -> RecordFolder:
    """Read all records of a run folder, or of a folder of records.

    Args:
        given: the folder, as the user gave it with `record=`.

    Raises:
        UserError: there is no record, or one is damaged, or made in another way than the others.
    """
    folder = Path(given)
    paths = files(folder, FOLDER if (folder / FOLDER).is_dir() else ".")
    if not paths:
        raise UserError(f"record={given}: no records there; give a run folder that has some")
    loaded = [load(path) for path in paths]
    one, first = loaded[0]
    if any(replace(header, data=first.data) != first for _, header in loaded):
        raise UserError(f"record={given}: its records are of different checkpoints")
    if other := next(
        (
            record
            for record, _ in loaded
            if (record.precision, record.quantization) != (one.precision, one.quantization)
        ),
        None,
    ):
        theirs = f"{other.precision}"
        if other.precision == one.precision:
            theirs += " with other ranges"
        raise UserError(
            f"record={given}: {one.split} was recorded in {one.precision}, {other.split} in "
            f"{theirs}; record them together with {job_command('evaluate')} ckpt=RUN"
        )
    records = [record for record, _ in loaded]
    return RecordFolder(paths[0].parent, first.config, first, records)


def check_use(header: Header, record: str, checkpoint: Checkpoint) -> None:
    """Check that a record was made as a model is used.

    Args:
        header: the facts about the record.
        record: name of the record, for error messages.
        checkpoint: the model.

    Raises:
        UserError: it was made with other weights, for another task, or with inputs that were cut to
            another length.
    """
    config = checkpoint.config
    if header.checkpoint != checkpoint.fingerprint:
        raise UserError(
            f"{record}: a record of other weights than {checkpoint.path} ({header.checkpoint}, not "
            f"{checkpoint.fingerprint}); remove it, or record again with {job_command('evaluate')} "
            "ckpt=RUN"
        )
    ours = {"task": config.task.name, "data.max_length": config.data.max_length}
    theirs = {"task": header.config.task.name, "data.max_length": header.max_length}
    if flag := next((flag for flag in ours if ours[flag] != theirs[flag]), None):
        raise UserError(
            f"{record}: recorded with {flag}={theirs[flag]}, and {checkpoint.path} runs with "
            f"{flag}={ours[flag]}; give the run itself, or record again with "
            f"{job_command('evaluate')} ckpt=RUN"
        )


def _check_split(facts: dict[str, Any], file: Path) -> None:
    """Check the schema and the split of a file.

    Raises:
        UserError: a value is invalid, or the split is not the file's name.
    """
    if facts["schema"] != SCHEMA:
        raise UserError(f"its schema is {facts['schema']!a}, not {SCHEMA}")
    if not isinstance(facts["split"], str) or not re.fullmatch(SPLIT, facts["split"]):
        raise UserError(f"its split {facts['split']!r} is no name of one")
    if facts["split"] != file.stem:
        raise UserError(f"the file was renamed, it is of split {facts['split']!a}")


def _check(tensors: dict[str, Tensor], num_labels: int) -> None:
    """Check that the columns of a file fit together.

    Args:
        tensors: the columns by name.
        num_labels: the number of outputs of a ramp.

    Raises:
        UserError: a value is invalid, or contradicts another.
    """
    logits = tensors["logits_NLC"]
    labels, learned_score = tensors.get("labels_N"), tensors.get("learned_score_NL")
    for name, values in tensors.items():
        dtypes, num_dims = COLUMNS[name]
        if values.ndim != num_dims or values.dtype not in dtypes:
            raise UserError(f"its {name} is {tuple(values.shape)} {values.dtype}")
    if logits.shape[1] > plain_files.LAYERS:
        raise UserError(f"it has {logits.shape[1]} ramps, more than {plain_files.LAYERS}")
    if not len(logits) or not logits.shape[1]:
        raise UserError(f"its logits are {tuple(logits.shape)}, not (rows, ramps, labels)")
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
