"""`python -m deebert.SOMETHING key=value ...`: the command line of what uses a trained model.

A command's values are the fields of a dataclass; each says in its metadata what it means. Knows
nothing of models.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NoReturn, TypeVar

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deebert.errors import UserError, first_line, unknown

Options = TypeVar("Options")  # a command's dataclass


def option(default: Any, meaning: str) -> Any:
    """A field of a command's dataclass."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass
class ModelOptions:
    """Which model, and how it runs."""

    model: str = option("???", "a run folder, a folder of save_pretrained, or a hub id")
    task: str | None = option(None, "what a published checkpoint was trained for: mrpc, ...")
    precision: str = option("float32", "of the layers: float32, bfloat16 or int8")
    runtime: str = option("torch", "what computes the layers: torch or onnx")
    device: str = option("cpu", "cpu or cuda")


@dataclass
class TargetOptions:
    """What is asked of it; nothing: as it was saved, which is full depth unless it says more."""

    threshold: Any = option(None, "a threshold, or one for each ramp but the last: [0,0.1]")
    target_saving: float | None = option(None, "share of the layers to save: 0.4")
    target_speedup: float | None = option(None, "times faster than full depth: 1.5")
    max_drop: float | None = option(None, "how much worse than full depth at most: 0.01")
    confidence: float | None = option(0.95, "that max_drop holds; null: on average")
    loss: str | None = option(None, "what max_drop limits: excess or disagreement")
    per_ramp: bool | None = option(None, "look for a threshold for each ramp")
    temperature: bool | None = option(None, "first make each ramp as sure as it is right")
    exit: str | None = option(None, "the exit rule: entropy, patience, ...")


def engine_of(options: ModelOptions) -> dict[str, Any]:
    """What `EarlyExitClassifier` takes beside the model."""
    return {name: getattr(options, name) for name in ("precision", "runtime", "device")}


def target_of(options: TargetOptions) -> dict[str, Any]:
    """What `EarlyExitClassifier.calibrate` takes."""
    # null says something of confidence only: "on average".
    return {
        each.name: getattr(options, each.name)
        for each in fields(TargetOptions)
        if getattr(options, each.name) != each.default
    }


def parse(kind: type[Options], arguments: Sequence[str]) -> Options:
    """Values of a command line.

    Raises:
        UserError: a key is unknown, missing or said twice, or a value is of another type.
    """
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    found: Any = OmegaConf.structured(kind)
    said: set[str] = set()
    texts: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is no key=value; see --help")
        if key not in known:
            raise unknown("option", key, known, "KEY")
        if key in said:
            raise UserError(f"{key}= is said twice")
        said.add(key)
        try:
            # A path or a text stays as it is; numbers, lists and null are read as YAML.
            if known[key].type in (str, str | None) and text != "null":
                texts[key] = text
                value: Any = ""
            elif "${" in text:
                raise ValueError("${...} is not replaced here")
            else:
                value = OmegaConf.to_container(OmegaConf.create(f"x: {text}"))["x"]  # type: ignore[index, call-overload]
            OmegaConf.update(found, key, value, merge=False)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"{argument}: {reason} ({known[key].metadata['meaning']})") from error
    for key in known:
        if OmegaConf.is_missing(found, key):
            raise UserError(f"{key}= is missing: {known[key].metadata['meaning']}")
    options: Any = OmegaConf.to_object(found)
    for key, text in texts.items():  # not through OmegaConf, which replaces ${...}
        setattr(options, key, text)
    return options


def usage(kind: type, command: str, example: str) -> str:
    """What --help prints."""
    lines = [f"{command} key=value ...", "", f"  {example}", ""]
    for each in fields(kind):
        default = "" if each.default in (None, "???", MISSING) else f" [{each.default}]"
        lines.append(f"  {each.name:<16} {each.metadata['meaning']}{default}")
    return "\n".join(lines)


def main(kind: type[Options], run: Callable[[Options], None], command: str, example: str) -> None:
    """Run a command; a user's mistake ends it with one line and exit code 2."""
    arguments = sys.argv[1:]
    try:
        if {"-h", "--help"} & set(arguments):
            print(usage(kind, command, example))
        else:
            run(parse(kind, arguments))
        sys.stdout.flush()
    except UserError as error:
        _refuse(error)
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _refuse(error: UserError) -> NoReturn:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)
