"""A trained model as a folder, or a hub repository, that answers without Lightning, Hydra or data.

    config.json, model.safetensors   the model (`EarlyExitModel.save_pretrained`)
    tokenizer.json, ...              its tokenizer, where the library looks for it
    deebert.json                     what it was trained for and how, its exit rule and target
    records/SPLIT.safetensors        every ramp's logits for some rows: what targets are met from
    README.md                        the model card

Nothing that such a folder says is executed, and no name or link in it leads out of it.
"""

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os.path import exists
from pathlib import Path
from typing import Any

from deebert.data import tokenization
from deebert.data.tasks import Task
from deebert.errors import UserError, is_whole
from deebert.exits.records import Record
from deebert.hub import checkpoint_config, record_files
from deebert.hub.checkpoints import Checkpoint
from deebert.models import architectures
from deebert.models.early_exit import EarlyExitModel
from deebert.untrusted import plain_files, tensor_files

FILE = "deebert.json"
SAVING = ".saving"  # beside it until all is written
SCHEMA = 1
TARGET = (
    "threshold", "target_saving", "target_speedup", "max_drop", "confidence", "loss", "per_ramp",
    "temperature", "exit",
)  # fmt: skip
# Of a run's configuration: all but what lies on the machine that it was trained on, or names code.
KEPT = ("task", "backbone", "ramp", "data", "stage", "stages", "objective", "seed", "thresholds")


@dataclass(frozen=True)
class Saved:
    """A model to be used: what it is, and what its ramps have said of rows that were labelled.

    Attributes:
        records: by split; targets need one.
        exit: name of its exit rule; None for the task's default.
        target: its default target, as `EarlyExitClassifier.calibrate` takes it; {} for full
            depth.
    """

    checkpoint: Checkpoint
    records: dict[str, Record]
    exit: str | None = None
    target: Mapping[str, Any] = field(default_factory=dict)


def is_saved(folder: Path) -> bool:
    """Was this folder written by `write`?"""
    return (folder / FILE).is_file()


def write(saved: Saved, model: EarlyExitModel, folder: Path, card: str) -> None:
    """Write everything but what lies on this machine alone.

    Raises:
        UserError: see `check_place`.
    """
    check_place(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    config = public(saved.checkpoint.config)
    about = {
        "schema": SCHEMA,
        "config": config,
        "tokenizer": sorted(Path(name).name for name in saved.checkpoint.tokenizer_files),
        "epochs_done": saved.checkpoint.epochs_done,
        "exit": saved.exit,
        "target": dict(saved.target),
    }
    (folder / SAVING).touch()
    (folder / FILE).unlink(missing_ok=True)  # until the rest is there: nothing, rather than a mix
    model.save_pretrained(folder)
    for name, text in saved.checkpoint.tokenizer_files.items():
        (folder / Path(name).name).write_text(text, "utf-8")
    for old in (folder / "records").glob("*.safetensors"):  # of what was saved here before
        old.unlink()
    # Of weights that share their values the file keeps one.
    weights, _ = tensor_files.safetensors_file(folder / "model.safetensors")
    fingerprint = tensor_files.fingerprint(weights)
    for record in saved.records.values():
        header = {"checkpoint": fingerprint, "data": None, "config": config}
        record_files.save(record, folder / "records", header)
    (folder / "README.md").write_text(card, "utf-8")
    about["weights"] = fingerprint
    (folder / FILE).write_text(json.dumps(about, indent=2, allow_nan=False) + "\n", "utf-8")
    (folder / SAVING).unlink()


def check_place(folder: Path) -> None:
    """Raises:
    UserError: the folder is a file, or holds something else, whose README.md would be gone.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    there = [*folder.iterdir(), *(folder / record_files.FOLDER).glob("*")]
    ours = {FILE, SAVING, "README.md", "config.json", "model.safetensors", *tokenization.FILES}
    for file in there:
        kind = file.lstat()
        if file == folder / record_files.FOLDER:
            fits = stat.S_ISDIR(kind.st_mode)
        elif file.parent == folder and file.name not in ours:
            continue  # of somebody else, and left alone
        else:
            fits = stat.S_ISREG(kind.st_mode) and kind.st_nlink == 1
        if not fits:  # what is written there would be written where it leads, or not at all
            raise UserError(
                f"{folder}: {file.name} is a link, or no file of its own; remove it, or name a new "
                "folder"
            )
    exported = (folder / "runner.py").exists()
    if (is_saved(folder) and not exported) or (folder / SAVING).exists():
        return
    if others := sorted(file.name for file in folder.iterdir() if file.name[0] != "."):
        raise UserError(
            f"{folder} holds {', '.join(others[:3])}{', ...' * (len(others) > 3)}, and no saved "
            "model; name an empty or new folder, or one to replace"
        )


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration without this machine's folders."""
    kept: dict[str, Any] = {name: config[name] for name in KEPT if name in config}
    kept["task"] = {k: v for k, v in config["task"].items() if k != "root"}
    kept["data"] = {k: v for k, v in config["data"].items() if k != "root"} | {"root": None}
    kept["backbone"] = dict(config["backbone"])
    path = str(kept["backbone"].get("path"))
    if Path(path).is_absolute() or exists(path):  # no name on the hub
        del kept["backbone"]["path"]
    return kept


def read(folder: Path, flag: str) -> Saved:
    """Raises:
    UserError: something is missing, damaged, or does not fit the rest.
    """

    if (folder / "runner.py").is_file():
        raise UserError(
            f"{flag}={folder}: an ONNX export, which its own runner.py answers with; give the run "
            "or saved folder that it was made of"
        )
    try:
        found = _read(folder)
    except UserError as error:
        raise UserError(f"{flag}={folder}: {error}; save the model again from its run") from error
    except FileNotFoundError as error:
        reason = f"{error.filename} is missing; save the model again from its run"
        raise UserError(f"{flag}={folder}: {reason}") from error
    except (LookupError, TypeError, AttributeError) as error:
        reason = f"{FILE} or config.json is damaged ({type(error).__name__})"
        raise UserError(f"{flag}={folder}: {reason}; save the model again from its run") from error
    return replace(found, records=records_of(folder, found.checkpoint))


def _read(folder: Path) -> Saved:
    about = plain_files.json_file(plain_files.inside(folder, FILE))
    if about["schema"] != SCHEMA:
        raise UserError(f"{FILE} has schema {about['schema']!a}, not {SCHEMA}")
    shape = plain_files.json_file(plain_files.inside(folder, "config.json"))
    weights, _ = tensor_files.safetensors_file(plain_files.inside(folder, "model.safetensors"))
    tensor_files.check_weights(weights)
    names = about["tokenizer"]
    if strange := [name for name in names if name not in tokenization.FILES]:
        raise UserError(f"{FILE}: {strange[0]!r} is no file of a tokenizer")
    if len(set(names)) < len(names):
        raise UserError(f"{FILE}: it names a file of a tokenizer twice")
    files = {
        name: plain_files.text(plain_files.inside(folder, name), plain_files.TOKENIZER_BYTES)
        for name in names
    }
    epochs_done = about["epochs_done"]
    if not is_whole(epochs_done) or epochs_done < 0:
        raise UserError(f"{FILE}: epochs_done={epochs_done!a} is no number of epochs")
    rule, target = about["exit"], about["wish" if "wish" in about else "target"]  # its old name
    if not isinstance(rule, str | None):
        raise UserError(f"{FILE}: exit={rule!a} is no name")
    if (
        not isinstance(target, dict)
        or not set(target) <= {*TARGET}
        or not checkpoint_config.PLAIN_MAPPING.fits(target)
    ):
        raise UserError(f"{FILE}: target={target!a} is none; its names may be: {', '.join(TARGET)}")
    config, _ = checkpoint_config.accepted(about["config"])
    checkpoint = Checkpoint(
        folder,
        public(config),
        architectures.settings(shape["config"]),
        files,
        weights,
        epochs_done,
    )
    checkpoint.check_fingerprint(about.get("weights"))
    return Saved(checkpoint, {}, rule, target)


def records_of(folder: Path, checkpoint: Checkpoint) -> dict[str, Record]:
    """The records of a run or saved folder, by split.

    Raises:
        UserError: one is damaged, of other weights, or a link that leads out of the folder.
    """
    found, task = {}, Task.from_config(checkpoint.config["task"])
    for file in sorted(record_files.files(folder), key=lambda file: task.order(file.stem)):
        found[file.stem], header = record_files.load(file)
        if header["checkpoint"] != checkpoint.fingerprint:
            raise UserError(f"{file}: a record of other weights than {checkpoint.path}; remove it")
    return found
