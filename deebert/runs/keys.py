"""The keys that a configuration may have, and those that act in a run.

A key that nothing reads is refused by its name, wherever it is written. A key of the command line
that does nothing in this run is refused, too. What is known comes from the place that reads a key:
the fields of a dataclass, or the arguments of what `_target_` names. This module does not know
what the values mean.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from difflib import SequenceMatcher
from itertools import accumulate
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from deebert.data.own_task import Columns
from deebert.data.tasks import DataConfig, Task
from deebert.errors import UserError, check_whole, is_number
from deebert.exits.target import Target
from deebert.hub.run_config import KEYS, Recipe
from deebert.models.backbones import BackboneConfig
from deebert.options import moved
from deebert.runs.job import Job

# The arguments of the Trainer that a run sets itself, or cannot do with: why, and what to say.
REFUSED = {
    "logger": "loggers have a block of their own: logger=csv, or +logger.NAME._target_=...",
    "callbacks": "callbacks have a block of their own: +callbacks.NAME._target_=...",
    "default_root_dir": "all files are written into the run folder: hydra.run.dir=...",
    "overfit_batches": "Lightning would deal out other batches; train on few rows instead: "
    "data.limit_train=N",
    "barebones": "a run needs what it turns off (loggers, checkpoints, validation); leave it out",
}
# Those that do nothing in any run.
IDLE = {
    "trainer.limit_predict_batches": "does nothing here: a run predicts nothing",
    "trainer.enable_autolog_hparams": "does nothing: the whole configuration is logged in any case",
    "trainer.model_registry": "does nothing: no checkpoint is sent to a registry",
    "trainer.reload_dataloaders_every_n_epochs": "does nothing: the rows do not change in a run",
}
# The arguments of the Trainer that act in `Trainer.test`, which is what evaluate.py calls.
TESTING = (
    "_target_", "accelerator", "strategy", "devices", "num_nodes", "precision", "fast_dev_run",
    "limit_test_batches", "deterministic", "benchmark", "inference_mode", "profiler", "plugins",
    "enable_progress_bar", "enable_model_summary", "use_distributed_sampler",
)  # fmt: skip
# Blocks of an evaluation that say how a model is run.
OF_MODEL = ("data", "trainer", "backbone", "seed")
# The smallest values of some arguments of the Trainer, which it does not check itself.
SMALLEST = {
    "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "min_epochs": 0, "min_steps": 0,
    "log_every_n_steps": 0,
}  # fmt: skip

Known = Mapping[str, Any] | None  # the known keys and what may stand in each; None: anything

ANYTHING: Known = None
OF_HYDRA = ("_target_", "_args_", "_convert_", "_recursive_", "_partial_")
# Values that only a checkpoint has, because a run computes them.
COMPUTED = ("calibration_rows", "split_rows", "costs")


def check(cfg: DictConfig, job: Job) -> None:
    """Refuse keys that nothing reads, and keys that do nothing in this run.

    Args:
        cfg: the configuration as Hydra has composed it, before a checkpoint adds to it.
        job: the job that runs.

    Raises:
        UserError: there is such a key, or a key is missing.
    """
    needed = (*KEYS, "ckpt", "resume") if "stage" in cfg else ("ckpt", "record", "data", "trainer")
    for key in needed:
        is_empty = key == "trainer" and OmegaConf.select(cfg, "trainer._target_") is None
        if key != "task" and (key not in cfg or is_empty):
            raise UserError(f"{key}= is missing from the configuration; leave ~{key} out")
    for key, value in (cfg.get("exit") or {}).items():
        if message := moved(f"exit.{key}={value}"):
            raise UserError(message)
    _refuse_unread(cfg)
    _refuse_idle(cfg, job)


def _refuse_unread(cfg: DictConfig) -> None:
    """Refuse keys that nothing reads. A key that a value refers to by ${...} is read.

    Raises:
        UserError: there is such a key.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    known = (_training if "stage" in values else _evaluation)(values)
    used = references(values) | references(
        OmegaConf.to_container(HydraConfig.instance().cfg, resolve=False)
    )
    for key, value, others in _unread(values, known, ""):
        # A reference may begin with dots: it is relative to the block that it stands in.
        if any(f"{name}.".startswith(f"{part}.") for name in used for part in _ends(key)):
            continue
        while isinstance(value, dict) and value:
            name, value = next(iter(value.items()))
            key = f"{key}.{name}"
        nearest = _nearest(key, [*others, *_names(known, "")])
        raise UserError(
            f"{key}={value}: nothing reads this key; the nearest known key is {nearest}"
        )


def _refuse_idle(cfg: DictConfig, job: Job) -> None:
    """Refuse what does nothing in this run: arguments of the Trainer, and keys beside others.

    Only keys of the command line can do nothing: a file may be meant for other runs, too.

    Raises:
        UserError: there is such a key, or a value that would fail or be ignored.
    """
    _check_trainer({str(key): value for key, value in cfg.trainer.items() if value is not None})
    idle = IDLE | (_idle_in_training(cfg) if "stage" in cfg else _idle_in_evaluation(cfg))
    for key in sorted(job.explicit):
        blocks = accumulate(key.split("."), "{}.{}".format)  # the key and what it lies in
        why = next((idle[block] for block in blocks if block in idle), None)
        if why and OmegaConf.select(cfg, key) is not None:
            value = HydraConfig.get().runtime.choices.get(key, OmegaConf.select(cfg, key))
            raise UserError(f"{key}={value} {why}")


def _check_trainer(given: Mapping[str, Any]) -> None:
    """Check the values of the Trainer that would be ignored, end in a traceback, or train nothing.

    Raises:
        UserError: there is one.
    """
    for key, why in REFUSED.items():
        if key in given and (given[key] or key in ("logger", "callbacks")):
            raise UserError(f"trainer.{key}={given[key]}: {why}")
    for key, low in SMALLEST.items():
        if key in given:
            check_whole(f"trainer.{key}", given[key], low)
    for key in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
        if key in given and not is_number(given[key]):
            raise UserError(f"trainer.{key}={given[key]} must be a number of batches or a share")
    for key in ("max_steps", "limit_train_batches"):
        if key in given and given[key] == 0 and not isinstance(given[key], bool):
            raise UserError(f"trainer.{key}=0 would train nothing; leave it out")
    clip = given.get("gradient_clip_val")
    if is_number(clip) and clip < 0:
        raise UserError(f"trainer.gradient_clip_val={clip} must be 0 or more; null: no clipping")
    if given.get("deterministic", True) not in (True, False, "warn"):
        raise UserError(
            f"trainer.deterministic={given['deterministic']} must be true, false or warn"
        )
    if given.get("gradient_clip_algorithm", "norm") != "norm":
        raise UserError(
            f"trainer.gradient_clip_algorithm={given['gradient_clip_algorithm']}: gradients are "
            "clipped by their norm; leave it out"
        )
    if given.get("use_distributed_sampler"):
        raise UserError(
            "trainer.use_distributed_sampler=true: the batches are dealt out to the devices by "
            "length already; leave it out"
        )


def _idle_in_training(cfg: DictConfig) -> dict[str, str]:
    """Return the keys that do nothing in this training, each with the reason."""
    idle = {"trainer.limit_test_batches": "does nothing here: a training tests nothing"}
    of_task = ("num_labels", "id2label", "label2id", "problem_type")
    why = "does nothing: the labels of the task decide it"
    idle |= {f"backbone.config.{name}": why for name in of_task}
    if "backbone.epochs" not in references(OmegaConf.to_container(cfg, resolve=False)):
        instead = f"set stages.{cfg.stage}.epochs"
        idle["backbone.epochs"] = f"is read by experiment=deebert_paper alone: {instead}"
    if "backbone.lr" not in references(OmegaConf.to_container(cfg.stages, resolve=False)):
        idle["backbone.lr"] = f"is read by no recipe here: set stages.{cfg.stage}.lr"
    if cfg.stage == 2 and not cfg.resume:
        in_stage_2 = "does nothing in stage=2: set stages.2"
        idle |= {"stages.1": in_stage_2, "backbone.lr": f"{in_stage_2}.lr"}
    return idle


def _idle_in_evaluation(cfg: DictConfig) -> dict[str, str]:
    """Return the keys that do nothing in this evaluation, each with the reason."""
    names = cfg.trainer.keys() - set(TESTING)
    idle = {f"trainer.{name}": "does nothing here: an evaluation trains nothing" for name in names}
    if cfg.max_drop is None:
        idle |= dict.fromkeys(("confidence", "loss"), "does nothing without max_drop=")
    if all(cfg[name] is None for name in ("target_saving", "target_speedup", "max_drop")):
        idle["calibration"] = "does nothing without target_saving=, target_speedup= or max_drop="
    else:
        why = "would choose the thresholds on a part of the rows: leave it out"
        idle["trainer.limit_test_batches"] = why
    if cfg.record:
        why = "does nothing with record=, whose rows have been run: give ckpt= instead of record="
        idle |= dict.fromkeys(OF_MODEL, why)
    return idle


def _ends(key: str) -> list[str]:
    """Return a key, and what is left of it without its first blocks: a.b.c, b.c, c."""
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def references(values: Any) -> set[str]:
    """Return the words inside ${...}, among them the keys that values refer to."""
    inside = re.findall(r"\$\{([^{}]*)", repr(values))
    return {word.strip(".") for text in inside for word in re.split(r"[^\w.-]+", text)} - {""}


def _names_of(kind: type) -> dict[str, Known]:
    """Return the keys that the fields of a dataclass stand for."""
    return {each.name: ANYTHING for each in fields(kind) if each.name not in COMPUTED}


def _training(values: Mapping[str, Any]) -> dict[str, Known]:
    """Return the known keys of train.py."""
    return {
        **dict.fromkeys((*KEYS, "ckpt", "resume", "modules", "optimize"), ANYTHING),
        "task": _names_of(Task),
        "stages": {str(stage): dict.fromkeys(Recipe.keys(stage)) for stage in (1, 2)},
        "backbone": _names_of(BackboneConfig),
        "data": _names_of(DataConfig) | _names_of(Columns),
        **_instantiated(values),
    }


def _evaluation(values: Mapping[str, Any]) -> dict[str, Known]:
    """Return the known keys of evaluate.py."""
    return {
        **dict.fromkeys(
            ("ckpt", "record", "split", "layers", "modules", "exit", "calibration", "optimize")
        ),
        **dict.fromkeys(("threshold", "thresholds", "analysis")),
        **dict.fromkeys(("timing", "precision", "runtime", "repeats", "threads")),
        **_names_of(Target),
        "task": _names_of(Task),
        "data": {key: inner for key, inner in _names_of(DataConfig).items() if key != "unlabelled"},
        **_instantiated(values),
    }


def _instantiated(values: Mapping[str, Any]) -> dict[str, Known]:
    """Return the blocks that name what is built: their keys are the arguments of it."""
    named = {
        block: {key: _arguments_of(inner) for key, inner in (values.get(block) or {}).items()}
        for block in ("callbacks", "logger")
    }
    return {**named, "trainer": _arguments_of(values["trainer"])}


def _arguments_of(block: Any) -> Known:
    is_built = isinstance(block, dict) and "_target_" in block
    return _arguments(block["_target_"]) if is_built else {"_target_": ANYTHING}


def _arguments(target: Any) -> Known:
    """Return the arguments of what `_target_` names; anything if it takes any, or is not there."""
    try:
        called = get_object(target)
        parameters = inspect.signature(called).parameters
    except Exception:  # what cannot be found is refused where it is built
        return ANYTHING
    names = [*OF_HYDRA, *parameters]
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        if not (isinstance(called, type) and issubclass(called, WandbLogger)):
            return ANYTHING
        import wandb  # takes a second, and a run with another logger does not need it

        names += inspect.signature(wandb.init).parameters  # it gets the other arguments
    return dict.fromkeys(name for name in names if name not in ("kwargs", "self"))


def _unread(values: Any, known: Known, path: str) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield the keys that are not known, each with its value and the known keys beside it."""
    if isinstance(values, list):
        for value in values:
            yield from _unread(value, ANYTHING, path)
    if not isinstance(values, dict):
        return
    if "_target_" in values:
        known = _arguments(values["_target_"])
    for key, value in values.items():
        inner = f"{path}.{key}".lstrip(".")
        if known is None:
            yield from _unread(value, ANYTHING, inner)
        elif key in known:
            yield from _unread(value, known[key], inner)
        else:
            yield inner, value, [f"{path}.{name}".lstrip(".") for name in known]


def _names(known: Known, path: str) -> Iterator[str]:
    """Yield the names of all known keys."""
    for key, inner in (known or {}).items():
        name = f"{path}.{key}".lstrip(".")
        yield name
        yield from _names(inner, name)


def _nearest(key: str, names: Iterable[str]) -> str:
    """Return the known key that is most like an unknown one."""
    block, _, last = key.rpartition(".")

    def likeness(name: str) -> float:
        other_block, _, other = name.rpartition(".")
        if "".join(word[:1] for word in last.split("_")) == other:
            alike = 0.95  # learning_rate and lr
        else:
            alike = SequenceMatcher(None, last, other).ratio()
        same_block = SequenceMatcher(None, block, other_block).ratio()
        of_stage = 0.01 * name.startswith("stages")  # of two rates, that of a stage
        return alike + 0.4 * same_block + of_stage

    return max(names, key=likeness)
