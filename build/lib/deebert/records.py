"""A record: the logits of every ramp for the rows of one split. What every analysis feeds on.

A saved record is one safetensors file with a JSON header that says which weights and which data it
came from. Knows nothing of models or tasks: arithmetic on it needs neither.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deebert.errors import UserError

SCHEMA = 1
HELD_OUT = "calibration"  # the part of the training split that no stage sees


@dataclass(frozen=True)
class Record:
    """Logits of every ramp for N rows of a split, in the order of the rows.

    Attributes:
        split: name of the split.
        logits_NLC: (N, L, C) float32; the last ramp is the final classifier.
        labels_N: (N,) class ids or values; None where the split carries no labels.
        index_N: (N,) position of the row in its split.
        length_N: (N,) number of tokens.
        group_N: (N,) the task's group column (difficulty grade), or None.
        unsure_NL: (N, L) learned exit scores, or None where the ramps have none.
    """

    split: str
    logits_NLC: Tensor
    labels_N: Tensor | None
    index_N: Tensor
    length_N: Tensor
    group_N: Tensor | None = None
    unsure_NL: Tensor | None = None

    @property
    def num_layers(self) -> int:
        return self.logits_NLC.shape[1]

    def __len__(self) -> int:
        return len(self.index_N)

    def rows(self, chosen: Tensor) -> "Record":
        """The record of some rows only: indices or a mask (N,)."""
        changes: Any = {name: values[chosen] for name, values in self._tensors().items()}
        return replace(self, **changes)

    def _tensors(self) -> dict[str, Tensor]:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: values for name, values in columns.items() if isinstance(values, Tensor)}

    def check(self) -> None:
        """Raises:
        UserError: logits are not finite.
        """
        if not (finite := self.logits_NLC.isfinite().flatten(1).all(1)).all():
            raise UserError(
                f"{(~finite).sum()} of {len(self)} rows of split {self.split!r} have logits that "
                "are not finite: training diverged; lower stages.1.lr or stages.2.lr"
            )

    @classmethod
    def from_batches(cls, split: str, batches: list[dict[str, Tensor]]) -> "Record":
        """Join the outputs of evaluation steps (of every process), in row order, each row once.

        A row may come twice: processes that share a split are given equally many batches.
        """
        joined = {key: torch.cat([batch[key].cpu() for batch in batches]) for key in batches[0]}
        order = joined["index"].argsort(stable=True)
        index = joined["index"][order]
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        rows = order[first]
        return cls(
            split,
            joined["logits"][rows].float(),
            joined["labels"][rows] if "labels" in joined else None,
            joined["index"][rows],
            joined["length"][rows],
            joined["group"][rows] if "group" in joined else None,
            joined["unsure"][rows].float() if "unsure" in joined else None,
        )

    def save(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Write `<split>.safetensors`; a reader never sees half of it.

        Args:
            header: plain values: `checkpoint` and `data` (fingerprints) and `config` (of the run).
        """
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{self.split}.part"
        text = json.dumps({"schema": SCHEMA, "split": self.split, **header})
        tensors = {name: values.contiguous() for name, values in self._tensors().items()}
        save_file(tensors, part, {"deebert": text})
        os.replace(part, folder / f"{self.split}.safetensors")


def load(file: Path) -> tuple[Record, dict[str, Any]]:
    """A saved record and its header.

    Raises:
        UserError: the file is missing, is no record of this program, or is damaged.
    """
    try:
        with safe_open(file, "pt") as content:
            header = json.loads((content.metadata() or {})["deebert"])
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        if wrong := _wrong(header, tensors, file):
            raise UserError(f"record={file}: {wrong}; record again with evaluate.py ckpt=RUN")
        return Record(header["split"], **({"labels_N": None} | tensors)), header
    except FileNotFoundError as error:
        raise UserError(f"record={file}: no such record") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"record={file}: not a record of this program") from error


def _wrong(header: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> str | None:
    """What is wrong with a record, or None."""
    config, logits, labels = header["config"], tensors["logits_NLC"], tensors.get("labels_N")
    if header["schema"] != SCHEMA:
        return f"its schema is {header['schema']}, not {SCHEMA}"
    if header["split"] != file.stem:
        return f"the file was renamed, it is of split {header['split']!r}"
    if not {"task", "stage", "stages", "seed", "backbone", "data"} <= set(config):
        return "its configuration is incomplete"
    if logits.ndim != 3 or logits.dtype != torch.float32 or not len(logits) or not logits.shape[1]:
        return f"its logits are {tuple(logits.shape)} {logits.dtype}, not (rows, ramps, labels)"
    num_labels = len(config["task"]["labels"] or "1")  # a regression has one output
    if logits.shape[2] != num_labels:
        return f"it has {logits.shape[2]} outputs a ramp, and its task {num_labels}"
    unsure = tensors.get("unsure_NL")
    if unsure is not None and unsure.shape != logits.shape[:2]:
        return f"its learned exit scores are {tuple(unsure.shape)}, not (rows, ramps)"
    if {len(values) for values in tensors.values()} != {len(logits)}:
        return "its columns are of different lengths"
    if labels is not None and num_labels > 1 and not 0 <= labels.min() <= labels.max() < num_labels:
        return f"its labels are not all between 0 and {num_labels - 1}"
    return None
