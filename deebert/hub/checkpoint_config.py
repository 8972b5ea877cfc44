"""The table of the keys that are taken from the configuration in a checkpoint, folder or record.

Somebody else may have written such a file. So only the keys of this table are taken, and each value
must have the kind that the table states. Nothing in the file is instantiated, interpolated or
called. This module does not know how the configuration is used: it returns a `RunConfig`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deebert.data.tasks import HUB
from deebert.errors import UserError, is_number, is_whole
from deebert.hub.run_config import RunConfig
from deebert.untrusted import plain_files

NEEDED = ("task", "backbone", "data", "stage", "stages", "seed")  # older files lack the others
LENIENT = ("trainer", "callbacks")  # a value of another kind is left out, and reported
LONGEST_TEXT = 10_000  # characters
MOST_WORKERS = 64


@dataclass(frozen=True)
class Kind:
    """A kind of plain value.

    `accepted` takes null for every kind, because null is a value of every key in a configuration.

    Attributes:
        name: how an error message calls the kind.
        fits: says whether a value is of this kind.
    """

    name: str
    fits: Callable[[Any], bool]

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(f"{self.name} or {other.name}", lambda v: self.fits(v) or other.fits(v))


def _is_text(value: Any) -> bool:
    # OmegaConf reads three question marks as a missing value.
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and value != "???"


def _whole(low: int, high: int) -> Kind:
    return Kind(f"a whole number from {low} to {high}", lambda v: is_whole(v) and low <= v <= high)


def _list_of(kind: Kind) -> Kind:
    return Kind(
        f"a list, each value {kind.name}",
        lambda v: isinstance(v, list) and all(kind.fits(each) for each in v),
    )


def _one_of(*choices: str) -> Kind:
    return Kind(f"one of {', '.join(choices)}", lambda v: v in choices)


TEXT = Kind("a text", _is_text)
# A file system raises an error of its own for a name that is too long.
PATH = Kind(
    "a path",
    lambda v: (
        _is_text(v) and len(v) <= 1000 and all(len(part.encode()) < 256 for part in v.split("/"))
    ),
)
NAME = Kind(
    "a name of at most 200 printable characters",
    lambda v: _is_text(v) and len(v) <= 200 and v.isprintable(),
)
# "${" is excluded, because Hydra resolves the values that it instantiates a second time.
WORD = Kind(
    "a word of letters, digits and _./:,%[]+-",
    lambda v: isinstance(v, str) and re.fullmatch(r"[\w./:,%\[\]+-]{0,200}", v) is not None,
)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
NUMBER = Kind("a finite number", lambda v: is_number(v) and abs(v) < 2**63)
ABOVE_0 = Kind("a number above 0", lambda v: NUMBER.fits(v) and v > 0)
COUNT = _whole(0, 2**40)
SCALAR = TEXT | FLAG | NUMBER
PLAIN = Kind("a number, a text, true, false, null, or a list of these", lambda v: _is_plain(v))
PLAIN_MAPPING = Kind(
    "a mapping of plain values",
    lambda v: isinstance(v, dict) and all(map(_is_plain, v.values())),
)
MAPPING = Kind("a mapping", lambda v: isinstance(v, dict))


def _is_plain(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return all(each is None or SCALAR.fits(each) for each in listed)


def _is_hub(value: Any) -> bool:
    parts = [each for each in value if each is not None] if isinstance(value, list) else []
    return 1 <= len(parts) <= 2 and all(
        isinstance(each, str) and re.fullmatch(HUB, each) for each in parts
    )


# A repository is never a path.
REPOSITORY = Kind("a data set of the hub and its configuration", _is_hub)

# The tables of the blocks. The kind at `REST` is the kind of all keys that a table does not name.
# A table without `REST` takes no such keys.
REST = "*"
TASK = {
    "name": NAME, "columns": _list_of(TEXT), "labels": _list_of(TEXT | NUMBER),
    "metrics": _list_of(TEXT), "label": TEXT, "train": WORD, "validation": _list_of(WORD),
    "test": _list_of(WORD), "hub": REPOSITORY, "root": PATH, "tsv": PLAIN_MAPPING, "group": TEXT,
    "checkpoint_task": WORD, REST: PLAIN,
}  # fmt: skip
LAYERS = Kind(
    f"a list of at most {plain_files.LAYERS} layers",
    lambda v: _list_of(COUNT).fits(v) and len(v) <= plain_files.LAYERS,
)
BACKBONE = {
    "name": NAME, "path": PATH, "package": TEXT | _list_of(TEXT), "sha256": WORD, "install": TEXT,
    "epochs": COUNT, "lr": NUMBER, "layers": LAYERS, "config": MAPPING,
}  # fmt: skip
DATA = {
    "root": PATH, "file": PATH, "validation_share": NUMBER, "split_seed": COUNT,
    "split_rows": WORD, "max_length": _whole(1, 2**20), "calibration_size": COUNT,
    "calibration_rows": WORD, "limit_train": COUNT, "unlabelled": _list_of(WORD),
    "eval_batch_size": _whole(1, 2**16), "num_workers": _whole(0, MOST_WORKERS),
}  # fmt: skip
# The arguments of Lightning's Trainer, except those that name code, files or places, and those that
# start processes: `devices`, `num_nodes` and `strategy` (`STARTS`).
TRAINER = {
    "accelerator": _one_of("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "gradient_clip_algorithm": WORD,
    "precision": WORD | NUMBER,
    "deterministic": WORD | FLAG,
    "val_check_interval": WORD | ABOVE_0,
    **dict.fromkeys(("accumulate_grad_batches", "check_val_every_n_epoch"), ABOVE_0),
    "max_time": WORD,
    **dict.fromkeys(
        (
            "max_epochs", "min_epochs", "max_steps", "min_steps", "gradient_clip_val",
            "num_sanity_val_steps", "log_every_n_steps",
            "limit_train_batches", "limit_val_batches",
            "limit_test_batches", "overfit_batches", "reload_dataloaders_every_n_epochs",
        ),
        NUMBER,
    ),
    **dict.fromkeys(
        (
            "use_distributed_sampler", "enable_model_summary", "benchmark", "sync_batchnorm",
            "detect_anomaly", "inference_mode",
        ),
        FLAG,
    ),
}  # fmt: skip
STARTS = ("trainer.devices", "trainer.num_nodes", "trainer.strategy")
THRESHOLDS = NUMBER | _list_of(NUMBER)
CALLBACKS = {
    "early_exit": {"thresholds": THRESHOLDS},
    "best": {
        "monitor": WORD, "mode": WORD, "save_on_train_epoch_end": FLAG, "every_n_epochs": COUNT,
    },
    "last": {"save_on_train_epoch_end": FLAG, "every_n_epochs": COUNT},
    "learning_rate": {"logging_interval": WORD, "log_momentum": FLAG},
}  # fmt: skip
STAGE = {
    **dict.fromkeys(("epochs", "batch_size"), COUNT),
    **dict.fromkeys(("lr", "weight_decay", "warmup", "layer_drop"), NUMBER),
    **dict.fromkeys(("cache", "standardize"), FLAG),
    REST: PLAIN,
}
TABLE: dict[str, Any] = {
    "task": TASK, "backbone": BACKBONE, "ramp": {REST: PLAIN}, "data": DATA, "stage": _whole(1, 2),
    "stages": {"1": STAGE, "2": STAGE}, "objective": {"name": NAME, REST: PLAIN},
    "seed": _whole(0, 2**32 - 1), "trainer": TRAINER, "callbacks": CALLBACKS,
    "thresholds": THRESHOLDS, "teacher": PATH,
}  # fmt: skip


def accepted(config: Any) -> tuple[RunConfig, dict[str, Any]]:
    """Take the accepted keys of a run's configuration.

    A configuration of an older version, which lacks some keys, is accepted too.

    Args:
        config: plain values (`plain_files.plain`).

    Returns:
        The accepted values, typed; and the values of `trainer` and `callbacks` that were left out,
        by flag ("trainer.plugins").

    Raises:
        UserError: a key is missing, a value has another kind than the table states, or the task is
            invalid.
    """
    rest: dict[str, Any] = {}
    values = _taken(config, TABLE, "", rest)
    if missing := [key for key in NEEDED if values.get(key) is None]:
        raise UserError(f"its configuration says no {missing[0]}")
    for key in ("task", "backbone"):
        if values[key].get("name") is None:
            raise UserError(f"its configuration says no {key}.name")
    recipe = values["stages"].get(str(values["stage"]))
    if recipe is None:
        raise UserError(f"its configuration says no stages.{values['stage']}")
    if values["stage"] == 2 and recipe.get("cache") is None:
        raise UserError("its configuration says no stages.2.cache")
    if values["data"].get("max_length") is None:
        raise UserError("its configuration says no data.max_length")
    values.setdefault("objective", {"name": recipe.get("objective")})
    values = {"ramp": {}, "teacher": None, "thresholds": None} | values
    return RunConfig.from_checked(values), rest


def _taken(given: Any, table: Mapping[str, Any], flag: str, rest: dict[str, Any]) -> dict[str, Any]:
    """Take the values of one block that its table accepts.

    Args:
        given: the block.
        table: kinds, or tables of inner blocks, by key.
        flag: name of the block, "" for the whole configuration.
        rest: receives the values that are left out of the `LENIENT` blocks, by flag.

    Returns:
        The accepted values.

    Raises:
        UserError: the block is no mapping, or a value has another kind than the table states.
    """
    if not isinstance(given, dict):
        raise UserError(f"its {flag or 'configuration'} is no mapping")
    taken: dict[str, Any] = {}
    for key, value in given.items():
        kind, inner = table.get(key, table.get(REST)), f"{flag}.{key}".lstrip(".")
        is_lenient = inner.partition(".")[0] in LENIENT
        fits = kind is not None and (value is None or _kind(kind).fits(value))
        if is_lenient and not fits:
            rest |= _flat(value, inner)
        elif kind is None:
            continue
        elif key.startswith("_"):
            raise UserError(f"its {inner} is no setting; nothing that it names was called")
        elif not fits:
            raise UserError(f"its {inner} must be {_kind(kind).name}, not {_short(value)}")
        elif value is None:
            if isinstance(kind, Kind) or flag in LENIENT:  # null removes a callback
                taken[key] = None
        else:
            taken[key] = value if isinstance(kind, Kind) else _taken(value, kind, inner, rest)
    return taken


def _kind(kind: Any) -> Kind:
    return kind if isinstance(kind, Kind) else MAPPING


def _flat(value: Any, flag: str) -> dict[str, Any]:
    """Return the values of nested mappings, by flag."""
    if not isinstance(value, dict):
        return {flag: value}
    parts = (_flat(inner, f"{flag}.{key}") for key, inner in value.items())
    return {name: each for part in parts for name, each in part.items()}


def left_out(rest: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """List the flags of the values that were left out and that this run sets differently.

    Args:
        rest: the values that were left out, as `accepted` returns them.
        ours: this run's `trainer` and `callbacks`, as plain values.

    Returns:
        Flags of `trainer` and `callbacks`.
    """
    here = {name: each for key in LENIENT for name, each in _flat(ours.get(key), key).items()}
    return [flag for flag, value in rest.items() if value is not None and here.get(flag) != value]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
