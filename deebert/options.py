"""The `key=value` command line of the commands that do not use Hydra, such as predict and serve.

A dataclass describes the options of a command: each field is one option, and its metadata explain
the option. `import_modules` imports the user's modules, for all commands. This module knows nothing
of models.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml  # type: ignore[import-untyped]

from deebert.disk import whole_files
from deebert.errors import UserError, first_line, unknown

Options = TypeVar("Options")  # the dataclass of a command


def option(
    default: Any, meaning: str, in_request: str | None = None, needs: str | None = None
) -> Any:
    """Return a field of a command's dataclass, with its default and its line of the help text.

    Args:
        default: the default.
        meaning: the line of the help text.
        in_request: the meaning of the field in a request to the service, if it may stand there.
        needs: the option without which this one does nothing: `max_drop`, or `engine=ray` if it
            must have that value.
    """
    metadata = {"meaning": meaning, "in_request": in_request, "needs": needs}
    return field(default=default, metadata=metadata)


MODULES = "your Python modules with readers, exit rules, ...: [my_readers]"


@dataclass
class ModelOptions:
    """Options that name the model, and say how it runs."""

    model: str = option("???", "a run folder, a folder of save_pretrained, or a hub id")
    task: str | None = option(None, "the task of a checkpoint that does not state it: mrpc, ...")
    precision: str = option("float32", "number format of the layers: float32, bfloat16 or int8")
    runtime: str = option("auto", "what computes the layers: torch, onnx, openvino, or auto")
    device: str = option("cpu", "cpu or cuda")
    modules: Any = option(None, MODULES)


@dataclass
class TargetOptions:
    """Options that set the target: the one list of their names, types and meanings.

    The command line, the service's requests, saved folders and `EarlyExitClassifier.calibrate` use
    it. `exits.target.Target` checks the values. Without any option, the saved target of the model
    is used; without that, full depth.
    """

    threshold: Any = option(
        None,
        "a threshold, or one for each ramp but the last: [0,0.1]",
        "a number, or a list of one for each layer but the last; 0 runs all",
    )
    target_saving: float | None = option(
        None, "share of the layers to save: 0.4", "a number: share of the layers to save"
    )
    target_speedup: float | None = option(
        None, "times faster than full depth: 1.5", "a number: how many times faster than full depth"
    )
    max_drop: float | None = option(
        None,
        "how much worse than full depth at most: 0.01",
        "a number: how much worse than full depth it may be",
    )
    confidence: float | None = option(
        0.95,
        "that max_drop holds; null: on average",
        "a number: that max_drop holds; null: on average",
        needs="max_drop",
    )
    loss: str | None = option(
        None,
        "what max_drop limits: excess or disagreement",
        "'excess' or 'disagreement': what max_drop limits",
        needs="max_drop",
    )
    per_ramp: bool | None = option(
        None,
        "choose a threshold for each ramp",
        "true or false: look for a threshold for each layer",
    )
    temperature: bool | None = option(
        None,
        "fit a temperature for each ramp first",
        "true or false: fit a temperature for each layer",
    )
    exit: str | None = option(
        None,
        "the exit rule: entropy, patience, ...",
        "the name of an exit rule: 'entropy', 'patience'",
    )


TARGET = tuple(each.name for each in fields(TargetOptions))
ONE_OF = TARGET[:4]  # a target has one of these; the other options refine it


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a target that are given: None has a meaning for `confidence` only."""
    return {name: v for name, v in values.items() if v is not None or name == "confidence"}


def check_needs(kind: type, values: Mapping[str, Any], names: Collection[str]) -> None:
    """Check that no option does nothing because another one is missing (`option(needs=)`).

    Args:
        kind: the dataclass of the options.
        values: the values of the options, by name.
        names: the options that the user has set.

    Raises:
        UserError: an option does nothing.
    """
    for each in fields(kind):
        if each.name not in names or not (needs := each.metadata.get("needs")):
            continue
        name, _, value = needs.partition("=")
        other = values.get(name)
        if other is None or (value and other != value):
            needed = needs if value else f"{needs}="
            raise UserError(f"{each.name}={values[each.name]} needs {needed}")


def engine_of(options: ModelOptions) -> dict[str, Any]:
    """Return the keyword arguments that `EarlyExitClassifier` takes beside the model."""
    return {name: getattr(options, name) for name in ("precision", "runtime", "device")}


def target_of(options: TargetOptions) -> dict[str, Any]:
    """Return the keyword arguments of `EarlyExitClassifier.calibrate` that the user set."""
    # Only `confidence` gives null a meaning: "on average".
    return {
        each.name: getattr(options, each.name)
        for each in fields(TargetOptions)
        if getattr(options, each.name) != each.default
    }


def refuse_rule_alone(options: TargetOptions) -> None:
    """Refuse an exit rule without a threshold and a target: all inputs would run all layers.

    Raises:
        UserError: the options name a rule alone.
    """
    target = target_of(options)
    if "exit" in target and not {*ONE_OF} & {*target}:
        raise UserError(f"exit={options.exit} needs {' or '.join(f'{name}=' for name in ONE_OF)}")


def import_modules(names: Any) -> None:
    """Import modules of the user, which register readers, objectives and exit rules of their own.

    The names come from the user alone: no checkpoint remembers or names a module. The working
    directory is searched after all other places. It stays among them, because processes that this
    one starts import the modules again.

    Args:
        names: the name of a module, or a list of names; None for no module.

    Raises:
        UserError: this is no list of names, or a module cannot be imported.
    """
    listed = [names] if isinstance(names, str) else names or []
    if not isinstance(listed, Sequence) or not all(isinstance(each, str) for each in listed):
        raise UserError(f"modules={names} must be a list of Python modules: modules=[my_readers]")
    if listed and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in listed:
        try:
            import_module(name)
        except Exception as error:  # the user's own code may fail in any way
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            raise UserError(
                f"modules: {name} cannot be imported: {kind}{first_line(error)} (modules=[...])"
            ) from error


def parse(kind: type[Options], arguments: Sequence[str]) -> Options:
    """Read the arguments of a command line.

    Args:
        kind: the dataclass of the command.
        arguments: texts of the form `key=value`.

    Returns:
        An object of `kind`.

    Raises:
        UserError: a key is unknown, missing or given twice, or a value has the wrong type.
    """
    # Not at the top: a loaded model needs the options of a target, and no command line.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    values: Any = OmegaConf.structured(kind)
    given_keys: set[str] = set()
    texts: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is no key=value; see --help")
        if key not in known:
            raise unknown("option", key, known, "KEY")
        if key in given_keys:
            raise UserError(f"{key}= is given twice")
        given_keys.add(key)
        try:
            # A path or a text is taken literally. Numbers, lists and null are read as YAML.
            if known[key].type in (str, str | None) and text != "null":
                texts[key] = text
                value: Any = ""
            elif "${" in text:
                raise ValueError("${...} is not replaced here")
            else:
                value = OmegaConf.to_container(OmegaConf.create(f"x: {text}"))["x"]  # type: ignore[index, call-overload]
            OmegaConf.update(values, key, value, merge=False)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"{argument}: {reason} ({known[key].metadata['meaning']})") from error
    for key in known:
        if OmegaConf.is_missing(values, key):
            raise UserError(f"{key}= is missing: {known[key].metadata['meaning']}")
    options: Any = OmegaConf.to_object(values)
    for key, text in texts.items():  # not set through OmegaConf, because it replaces ${...}
        setattr(options, key, text)
    check_needs(kind, vars(options), given_keys)
    return options


def usage(kind: type, command: str, example: str) -> str:
    """Return the text that --help prints."""
    lines = [f"{command} key=value ...", "", f"  {example}", ""]
    for each in fields(kind):
        default = "" if each.default in (None, "???", MISSING) else f" [{each.default}]"
        lines.append(f"  {each.name:<16} {each.metadata['meaning']}{default}")
    return "\n".join(lines)


def run_command(
    kind: type[Options],
    run: Callable[[Options], None],
    command: str,
    example: str,
    arguments: Sequence[str],
) -> None:
    """Run a command. A user's mistake ends it with one line on stderr and exit code 2.

    Args:
        kind: the dataclass of the command.
        run: the command itself, which takes an object of `kind`.
        command: the command's name, for the help text.
        example: one call of the command, for the help text.
        arguments: the words after the command's name.
    """
    open_streams()
    try:
        if {"-h", "--help"} & set(arguments):
            print(usage(kind, command, example))
        else:
            run(parse(kind, arguments))
        sys.stdout.flush()
    except UserError as error:
        refuse(error)
    except BrokenPipeError:  # the reader has closed its end of the pipe
        drop_stdout()
        sys.exit(1)
    except OSError as error:
        if error.errno not in whole_files.FULL:
            raise
        if error.filename is None:
            drop_stdout()
        refuse(UserError(f"{error.filename or 'stdout'}: it cannot be written ({error.strerror})"))


def open_streams() -> None:
    """Replace a closed stdout or stderr (`>&-`) by one that drops what is printed.

    Otherwise the next file that is opened would get its number, and be printed into.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def drop_stdout() -> None:
    """Drop what is still to be printed to a stdout that takes no more.

    Otherwise Python would print a traceback when it flushes stdout at its end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def job_command(name: str) -> str:
    """Return how the user calls a job, for messages: `deebert train`, or `python train.py`.

    Args:
        name: the name of the job, `train` or `evaluate`.
    """
    is_script = Path(sys.argv[0]).name in ("train.py", "evaluate.py")
    return f"python {name}.py" if is_script else f"deebert {name}"


def assignment(key: str, value: str) -> str:
    """Return `key=value` as a user types it for a job: quoted for the shell and for Hydra."""
    if re.fullmatch(r"[\w./:-]+", value):
        return f"{key}={value}"
    escaped = value.replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def moved(setting: str) -> str | None:
    """Return what stands for a former setting of an exit rule, or None if it is none.

    Hydra itself would answer in several lines that the key is unknown.

    Args:
        setting: `key=value` of the command line of train or evaluate.
    """
    key, _, value = setting.lstrip("+~").partition("=")
    if option := re.fullmatch(r"exit\.score\.([A-Za-z]\w*)", key):
        return f"{setting} is now exit.{option[1]}={value}"
    if re.match(r"exit\.score(\.|$)", key):
        return (
            f"{setting}: the function of a rule is now registered with @exit_rule(NAME), and named "
            "by exit=NAME modules=[MODULE]"
        )
    if fact := re.fullmatch(r"exit\.(largest|regression|looks_back|reads|relative)", key):
        return f"{setting} is now said where the rule is defined: @exit_rule(NAME, {fact[1]}=...)"
    return None


def refuse_moved(settings: Sequence[str]) -> None:
    """End the program with one line if the command line has a former setting (`moved`)."""
    for setting in settings:
        if message := moved(setting):
            refuse(UserError(message))


def refuse(error: UserError) -> NoReturn:
    """End the program with the message of an error on stderr, and exit code 2."""
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)


def conf_folder() -> Path:
    """Find the configurations: in the installed package, or beside it in a checkout.

    Hydra's `pkg://` would find those of another checkout that is installed in the environment.

    Raises:
        UserError: neither folder is there.
    """
    package = Path(__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"the configurations are neither in {package} nor beside it; install it again")
