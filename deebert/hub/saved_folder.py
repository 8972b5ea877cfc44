"""Write and read a saved folder: a trained model that runs without Lightning, Hydra or data.

    config.json, model.safetensors   the model (`EarlyExitModel.save_pretrained`)
    tokenizer.json, ...              its tokenizer, where the library looks for it
    deebert.json                     its task, training configuration, exit rule and target
    records/SPLIT.safetensors        every ramp's logits for some rows, to choose thresholds on
    README.md                        the model card

A hub repository may hold the same files. Nothing in such a folder is executed, and no name or link
in it leads out of it. This module does not know how a target is met or a model is run.
"""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deebert.data import tokenization
from deebert.disk import whole_files
from deebert.errors import UserError, is_whole
from deebert.exits.records import Record
from deebert.hub import checkpoint_config, record_files, transformers_config
from deebert.hub.checkpoints import Checkpoint
from deebert.models import architectures
from deebert.models.early_exit import EarlyExitModel
from deebert.models.quantization import Quantization
from deebert.options import TARGET, job_command
from deebert.untrusted import plain_files, tensor_files

FILE = "deebert.json"
WEIGHTS = "model.safetensors"
SAVING = ".saving"  # exists while files are moved to their places
STAGED = ".saving-"  # begins the name of the folder that they are written in
SCHEMA = 1


@dataclass(frozen=True)
class Saved:
    """A model that is ready for use, with the records that its thresholds are chosen on.

    Attributes:
        checkpoint: the model.
        records: records by split. A target needs a record with labels.
        exit: name of its exit rule; None for the task's default.
        target: its default target, as `EarlyExitClassifier.calibrate` takes it; {} for full depth.
    """

    checkpoint: Checkpoint
    records: dict[str, Record]
    exit: str | None = None
    target: Mapping[str, Any] = field(default_factory=dict)

    def quantization(self, device: Any = "cpu") -> Quantization:
        """Return how the model is quantized in int8.

        Args:
            device: the device that it is to run on.

        Raises:
            UserError: no record of the model was made in int8, the records differ in it, or the
                device is not the processor.
        """
        if not str(device).startswith("cpu"):
            raise UserError(f"precision=int8 runs on the processor, not on device={device}")
        path, how = self.checkpoint.path, f"{job_command('evaluate')} ckpt=RUN precision=int8"
        several = {record.quantization for record in self.records.values() if record.quantization}
        if not several:
            raise UserError(
                f"precision=int8: {path} has no record in int8; make one with {how}, and use its "
                "run folder"
            )
        if len(several) > 1:
            raise UserError(
                f"precision=int8: the records of {path} have different ranges; record them "
                f"together with {how}"
            )
        return several.pop()


def is_saved(folder: Path) -> bool:
    """Say whether `write` has written this folder."""
    return (folder / FILE).is_file()


def write(saved: Saved, model: EarlyExitModel, folder: Path, model_card: str) -> None:
    """Write a saved folder, without the paths of this machine.

    Args:
        saved: the model's checkpoint, records, exit rule and target.
        model: the model itself.
        folder: where the files are written; it is made if it is missing.
        model_card: text of README.md.

    Raises:
        UserError: the folder cannot be written, or `check_place` refuses it.
    """
    check_place(folder)
    with whole_files.write_errors(folder, "; a model that was saved there before stays"):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{STAGED}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(dir=folder, prefix=STAGED))
        try:
            _write_files(saved, model, staged, model_card)
            _move(staged, folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _write_files(saved: Saved, model: EarlyExitModel, folder: Path, model_card: str) -> None:
    """Write all files of a saved folder into an empty folder."""
    config = saved.checkpoint.config.public()
    model.save_pretrained(folder, config=transformers_config.describe(config.task, model))
    for name, text in saved.checkpoint.tokenizer_files.items():
        whole_files.replace(folder / Path(name).name, text)
    # Read back, because the file holds only one of the weights that share their values.
    weights, _ = tensor_files.safetensors_file(folder / WEIGHTS)
    fingerprint = tensor_files.fingerprint(weights)
    for record in saved.records.values():
        header = record_files.Header(fingerprint, None, config, config.data.max_length)
        record_files.save(record, folder / "records", header)
    whole_files.replace(folder / "README.md", model_card)
    about = {
        "schema": SCHEMA,
        "config": config.plain(),
        "tokenizer": sorted(Path(name).name for name in saved.checkpoint.tokenizer_files),
        "epochs_done": saved.checkpoint.epochs_done,
        "exit": saved.exit,
        "target": dict(saved.target),
        "weights": fingerprint,
    }
    whole_files.replace(folder / FILE, json.dumps(about, indent=2, allow_nan=False) + "\n")


def _move(staged: Path, folder: Path) -> None:
    """Move the files of a complete staged folder to their places, `FILE` last.

    The moves take milliseconds. A folder in which they were interrupted is not read.
    """
    (folder / SAVING).touch()
    (folder / FILE).unlink(missing_ok=True)
    for old in (folder / record_files.FOLDER).glob("*.safetensors"):
        old.unlink()  # a record of the model that was saved here before
    files = [file for file in staged.rglob("*") if file.is_file() and file != staged / FILE]
    for file in (*files, staged / FILE):
        to = folder / file.relative_to(staged)
        to.parent.mkdir(exist_ok=True)
        os.replace(file, to)
    (folder / SAVING).unlink()
    whole_files.sync(folder)


def check_place(folder: Path) -> None:
    """Check that a saved folder may be written here.

    Raises:
        UserError: the path is a file, or the folder holds something else, whose README.md would be
            overwritten.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    there = [*folder.iterdir(), *(folder / record_files.FOLDER).glob("*")]
    ours = {FILE, SAVING, "README.md", "config.json", WEIGHTS, *tokenization.FILES}
    for file in there:
        kind = file.lstat()
        if file == folder / record_files.FOLDER:
            fits = stat.S_ISDIR(kind.st_mode)
        elif file.parent == folder and file.name not in ours:
            continue  # not written here, so it is left alone
        else:
            fits = stat.S_ISREG(kind.st_mode) and kind.st_nlink == 1
        if not fits:  # writing to a link would write to the place where it leads
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


def read(folder: Path, flag: str) -> Saved:
    """Read a saved folder.

    Args:
        folder: the folder.
        flag: the flag that the user named it with, for error messages.

    Raises:
        UserError: a file is missing or damaged, or does not fit the others.
    """
    if (folder / "runner.py").is_file():
        raise UserError(
            f"{flag}={folder}: an ONNX export, which its own runner.py answers with; give the run "
            "or saved folder that it was made of"
        )
    try:
        saved = _read(folder)
    except UserError as error:
        raise UserError(f"{flag}={folder}: {error}; save the model again from its run") from error
    except FileNotFoundError as error:
        reason = f"{error.filename} is missing; save the model again from its run"
        raise UserError(f"{flag}={folder}: {reason}") from error
    except (LookupError, TypeError, AttributeError) as error:
        reason = f"{FILE} or config.json is damaged ({type(error).__name__})"
        raise UserError(f"{flag}={folder}: {reason}; save the model again from its run") from error
    return replace(saved, records=records_of(folder, saved.checkpoint))


def _read(folder: Path) -> Saved:
    about = plain_files.json_file(plain_files.inside(folder, FILE))
    if about["schema"] != SCHEMA:
        raise UserError(f"{FILE} has schema {about['schema']!a}, not {SCHEMA}")
    shape = plain_files.json_file(plain_files.inside(folder, "config.json"))
    weights, _ = tensor_files.safetensors_file(plain_files.inside(folder, WEIGHTS))
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
    # Older files call the target "wish".
    rule, target = about["exit"], about["wish" if "wish" in about else "target"]
    if (
        not isinstance(target, dict)
        or not set(target) <= {*TARGET}
        or not checkpoint_config.PLAIN_MAPPING.fits(target)
    ):
        raise UserError(f"{FILE}: target={target!a} is none; its names may be: {', '.join(TARGET)}")
    for name in (rule, target.get("exit")):
        if not isinstance(name, str | None):
            raise UserError(f"{FILE}: exit={name!a} is no name")
    config, _ = checkpoint_config.accepted(about["config"])
    checkpoint = Checkpoint(
        folder,
        config.public(),
        architectures.settings(shape["config"]),
        files,
        weights,
        epochs_done,
    )
    checkpoint.check_fingerprint(about.get("weights"))
    return Saved(checkpoint, {}, rule, target)


def records_of(folder: Path, checkpoint: Checkpoint) -> dict[str, Record]:
    """Read the records of a run folder or saved folder.

    Args:
        folder: the run folder or saved folder.
        checkpoint: the model that the records must be made with.

    Returns:
        Records by split, in the task's order of splits.

    Raises:
        UserError: a record is damaged, was made in another way than the model is used
            (`record_files.check_use`), or is a link that leads out of the folder.
    """
    records, order = {}, checkpoint.config.task.order
    for file in sorted(record_files.files(folder), key=lambda file: order(file.stem)):
        records[file.stem], header = record_files.load(file)
        record_files.check_use(header, str(file), checkpoint)
    return records
