"""A trained model as a folder, or a hub repository, that answers without Lightning, Hydra or data.

    config.json, model.safetensors   the model (`EarlyExitModel.save_pretrained`)
    tokenizer.json, ...              its tokenizer, where the library looks for it
    deebert.json                     what it was trained for and how, its exit rule and wish
    records/SPLIT.safetensors        every ramp's logits for some rows: what wishes are granted from
    README.md                        the model card

Nothing that such a folder says is executed, and no name in it leads out of it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from deebert import checkpoints, records
from deebert.checkpoints import Checkpoint
from deebert.errors import UserError
from deebert.model import EarlyExitModel
from deebert.records import Record
from deebert.tasks import Task

FILE = "deebert.json"
SAVING = ".saving"  # beside it until all is written
SCHEMA = 1
# Of a run's configuration: all but what lies on the machine that it was trained on, or names code.
KEPT = ("task", "backbone", "ramp", "data", "stage", "stages", "objective", "seed", "thresholds")
# What transformers heeds in a config, and what is no part of a model's shape.
NO_SHAPE = {
    "dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "auto_map",
    "quantization_config",
}  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """A model to be used: what it is, and what its ramps have said of rows that were labelled.

    Attributes:
        records: by split; wishes need one.
        exit: name of its exit rule; None for the task's default.
        wish: what it answers by where nothing else is asked, as `EarlyExitClassifier.ask` takes
            it; {} for full depth.
    """

    checkpoint: Checkpoint
    records: dict[str, Record]
    exit: str | None = None
    wish: Mapping[str, Any] = field(default_factory=dict)


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
        "wish": dict(saved.wish),
    }
    told = json.dumps(about, indent=2) + "\n"
    (folder / SAVING).touch()
    (folder / FILE).unlink(missing_ok=True)  # until the rest is there: nothing, rather than a mix
    model.save_pretrained(folder)
    for name, text in saved.checkpoint.tokenizer_files.items():
        (folder / Path(name).name).write_text(text, "utf-8")
    for old in (folder / "records").glob("*.safetensors"):  # of what was saved here before
        old.unlink()
    fingerprint = checkpoints.fingerprint(load_file(folder / "model.safetensors"))
    for record in saved.records.values():
        header = {"checkpoint": fingerprint, "data": None, "config": config}
        record.save(folder / "records", header)
    (folder / "README.md").write_text(card, "utf-8")
    (folder / FILE).write_text(told, "utf-8")
    (folder / SAVING).unlink()


def check_place(folder: Path) -> None:
    """Raises:
    UserError: the folder is a file, or holds something else, whose README.md would be gone.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
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
    path = Path(str(kept["backbone"].get("path")))
    if path.is_absolute() or path.exists():  # no name on the hub
        del kept["backbone"]["path"]
    return kept


def read(folder: Path, flag: str) -> Saved:
    """Raises:
    UserError: something is missing, damaged, or does not fit the rest.
    """

    def wrong(what: str, error: Exception | None = None) -> UserError:
        kind = f" ({type(error).__name__})" if error else ""
        return UserError(f"{flag}={folder}: {what}{kind}; save the model again from its run")

    if (folder / "runner.py").is_file():
        raise UserError(
            f"{flag}={folder}: an ONNX export, which its own runner.py answers with; give the run "
            "or saved folder that it was made of"
        )
    weights = folder / "model.safetensors"
    if not weights.is_file():  # safetensors does not say which file it misses
        raise wrong(f"{weights.name} is missing")
    try:
        about = json.loads((folder / FILE).read_text("utf-8"))
        if about["schema"] != SCHEMA:
            raise wrong(f"{FILE} has schema {about['schema']}, not {SCHEMA}")
        shape = json.loads((folder / "config.json").read_text("utf-8"))
        config = about["config"]
        architecture = {k: v for k, v in shape["config"].items() if k not in NO_SHAPE}
        if config["ramp"].get("reads") == "pair" and architecture.get("sep_token_id") is None:
            raise wrong("config.json has no sep_token_id, by which ramps tell two texts apart")
        files = {
            name: (folder / name).read_text("utf-8") for name in map(_inside, about["tokenizer"])
        }
        checkpoint = Checkpoint(
            folder,
            public(checkpoints.of_today(config)),
            architecture,
            files,
            # Copies: the library maps the file, which would pull them from under us if it changed.
            {name: w.clone() for name, w in load_file(weights).items()},
            int(about["epochs_done"]),
        )
        rule, wish = about["exit"], about["wish"]
        if not isinstance(rule, str | None) or not isinstance(wish, dict):
            raise wrong(f"{FILE}: exit={rule!r} is no name, or wish={wish!r} not by name")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise wrong(f"{Path(str(error.filename)).name} is missing") from error
    except (OSError, SafetensorError) as error:
        raise wrong("its weights cannot be read as safetensors", error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise wrong(f"{FILE} or config.json is damaged", error) from error
    return Saved(checkpoint, records_of(folder, checkpoint), rule, wish)


def records_of(folder: Path, checkpoint: Checkpoint) -> dict[str, Record]:
    """The records of a run or saved folder, by split.

    Raises:
        UserError: one is damaged, or of other weights.
    """
    found, task = {}, Task.from_config(checkpoint.config["task"])
    files = (folder / "records").glob("*.safetensors")
    for file in sorted(files, key=lambda file: task.order(file.stem)):
        found[file.stem], header = records.load(file)
        if header["checkpoint"] != checkpoint.fingerprint:
            raise UserError(f"{file}: a record of other weights than {checkpoint.path}; remove it")
    return found


def _inside(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{FILE}: tokenizer file {name!r} would lie outside the folder")
    return name
