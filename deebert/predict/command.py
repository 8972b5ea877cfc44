"""The command `deebert predict model=RUN input=FILE output=FILE ...`: answers for rows of files.

One process answers one file; with `engine=ray` many processes answer a file or a folder of files.
Knows nothing of how rows are answered (`work`, `answers`) and of Ray itself (`on_ray`).
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deebert.data.rows import reader
from deebert.errors import UserError, unknown
from deebert.options import engine_of, import_modules, refuse_rule_alone
from deebert.predict import long_job, on_ray, parts, rows_out
from deebert.predict.answers import summary, summary_line
from deebert.predict.folder_out import ERRORS, Folder
from deebert.predict.on_ray import COUNTED, FILE, File, renamed
from deebert.predict.parts import Parts
from deebert.predict.rows_out import Layout
from deebert.predict.work import Answer, PredictOptions, Work, chosen_columns, locally

if TYPE_CHECKING:
    from deebert.classifier import EarlyExitClassifier

ENGINES = ("local", "ray")
# The formats of the files that engine=ray writes, by the format of its input.
PARTS = {"csv": "csv", "tsv": "csv", "jsonl": "jsonl", "json": "jsonl", "parquet": "parquet"}


def predict(options: PredictOptions) -> None:
    """Run the command.

    Raises:
        UserError: an option is wrong, or a file or the model cannot be read or written.
    """
    if options.engine not in ENGINES:
        raise unknown("engine", options.engine, ENGINES, "engine")
    refuse_rule_alone(options)
    if options.engine == "ray":
        run_on_ray(options)
    else:
        run(options, locally)


def run(options: PredictOptions, answer: Answer) -> None:
    """Read the input, have its rows answered, and write the output.

    Args:
        options: the options of the command.
        answer: answers the blocks of rows, as `locally` does.

    Raises:
        UserError: an option is wrong, or a file or the model cannot be read or written.
    """
    output = Path(options.output)
    kind = rows_out.format_of(output)
    if options.part_rows < 1:
        raise UserError(f"part_rows={options.part_rows} must be 1 or more")
    from_file = options.input != reader.STDIN and Path(options.input).exists()
    if from_file and output.exists() and output.samefile(options.input):
        raise UserError(f"output={output} is the input; name another file")
    parts.check(output, options.overwrite)
    with reader.opened(options.input, options.format) as source:
        from deebert.classifier import EarlyExitClassifier

        import_modules(options.modules)
        classifier = EarlyExitClassifier.from_pretrained(
            options.model, task=options.task, **engine_of(options)
        )
        task, free = classifier.task, rows_out.is_free(kind)
        columns = chosen_columns(
            options, source, task.columns, free, is_regression=task.is_regression
        )
        work = Work(options, source, classifier, columns)
        with Parts(output) as kept:
            done = kept.ended(work.job) or work.do(kept, answer)
    _report(done, str(output), parts.errors_of(output))


def run_on_ray(options: PredictOptions) -> None:
    """Have the rows of a file or folder answered by many processes, and write a folder of parts.

    Raises:
        UserError: an option is wrong, or a file or the model cannot be read or written.
    """
    ray = on_ray.load_ray()
    for name in ("workers", "threads", "part_rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be 1 or more")
    inputs = _files_of(options)
    folder = Folder(Path(options.output).absolute(), _kind_of_parts(options, inputs))
    if folder.path.resolve().is_relative_to(Path(options.input).resolve()):
        raise UserError(f"output={options.output} lies in the input; name another folder")
    folder.check()
    classifier = _classifier(options)
    files, work = _inspect(options, inputs, classifier, folder.kind)
    with folder.alone():
        job = _job(work, options, inputs)
        point = work.point(folder.begin(job, options.overwrite, work.find))
        done = folder.done()
        files = [replace(f, done=frozenset(b for n, b in done if n == f.number)) for f in files]
        sums = {name: sum(part[name] for part in done.values()) for name in COUNTED}
        began, before = time.monotonic(), sums["rows"]
        if before:
            print(f"{before:,} rows were done before; going on with the rest", file=sys.stderr)

        def now() -> dict[str, Any]:
            rate = (sums["rows"] - before) / (time.monotonic() - began)
            return summary(sums, classifier.num_layers, rate)

        try:
            size = sum(file.size for file in files)
            with (
                on_ray.session(ray, options),
                long_job.Progress(size, sums["bytes"]) as progress,
            ):
                saved = classifier.saved
                for part in on_ray.answer_blocks(ray, options, files, saved, point, folder):
                    sums = {name: sums[name] + part[name] for name in COUNTED}
                    progress.show(sums["bytes"], summary_line(now()))
        except KeyboardInterrupt:
            print(f"\nStopped at {summary_line(now())}; {long_job.GOES_ON}", file=sys.stderr)
            sys.exit(130)
        folder.finish(now())
    _report(now(), options.output, Path(options.output, ERRORS))


def _report(done: Mapping[str, Any], output: str, errors: Path) -> None:
    """Print the summary of a finished job.

    Raises:
        UserError: no row has an answer.
    """
    bad_ones = f"; the bad ones: {errors}" if done["bad"] else ""
    print(f"{summary_line(done)}: {output}{bad_ones}")
    if done["bad"] == done["rows"]:
        with errors.open(encoding="utf-8") as lines:
            first = json.loads(next(lines))
        place = f"line {first['line']}" if "line" in first else f"row {first['row']}"
        raise UserError(f"no row has an answer; the first one, {place}: {first['reason']}")


def _classifier(options: PredictOptions) -> "EarlyExitClassifier":
    """Load the model for this process: to meet the target, and to send it to the workers."""
    from deebert.classifier import EarlyExitClassifier

    import_modules(options.modules)
    # The machine of the command may have no GPU. A target for a speed is measured on it, though.
    here = options.device == "cpu" or options.target_speedup is not None
    engine = engine_of(options) if here else {}
    return EarlyExitClassifier.from_pretrained(options.model, task=options.task, **engine)


def _job(work: Work, options: PredictOptions, inputs: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """Return the values that must be the same for a job to go on."""
    stats = [(name, path.stat()) for name, path in inputs]
    return work.job | {
        "input": str(Path(options.input).resolve()),
        "parts": options.parts,
        "size": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def _files_of(options: PredictOptions) -> list[tuple[str, Path]]:
    """Return the files of the input, each with its name inside the input.

    Raises:
        UserError: there are none.
    """
    given = Path(options.input)
    if options.input == reader.STDIN:
        raise UserError("input=- is for engine=local; give engine=ray a file or a folder")
    if not given.is_dir():
        return [(given.name, given)]
    files = []
    for path in sorted(given.rglob("*")):
        name = path.relative_to(given)
        hidden = any(part.startswith((".", "_")) for part in name.parts)
        known = options.format or path.suffix.lower() in reader.ENDINGS
        if path.is_file() and known and not hidden:
            files.append((name.as_posix(), path))
    if not files:
        raise UserError(f"input={given}: no file there ends with {', '.join(reader.ENDINGS)}")
    return files


def _kind_of_parts(options: PredictOptions, files: Sequence[tuple[str, Path]]) -> str:
    """Return the format of the parts: that of `parts=`, or else that of the input.

    Raises:
        UserError: the format is unknown, or the files have several.
    """
    kinds = {PARTS[reader.format_of(str(path), options.format)] for _, path in files}
    if options.parts is not None:
        if options.parts not in PARTS.values():
            raise unknown("parts", options.parts, dict.fromkeys(PARTS.values()), "parts")
        return options.parts
    if len(kinds) > 1:
        raise UserError(
            f"input={options.input} holds {' and '.join(sorted(kinds))}; say what is to be written "
            "(parts=csv, ...)"
        )
    return kinds.pop()


def _inspect(
    options: PredictOptions,
    files: Sequence[tuple[str, Path]],
    classifier: "EarlyExitClassifier",
    kind: str,
) -> tuple[list[File], Work]:
    """Look into every file before any work is done.

    Returns:
        The files with the work on each, and the work that the last file alone would be.

    Raises:
        UserError: a file cannot be read, has no rows, or lacks a column that is needed.
    """
    inspected, task = [], classifier.task
    for number, (name, path) in enumerate(files):
        single = replace(options, input=str(path))
        with reader.opened(str(path), options.format) as source:
            free = rows_out.is_free(kind)
            columns = chosen_columns(
                single, source, task.columns, free, is_regression=task.is_regression
            )
            if kind == "parquet" and source.free and columns.kept:
                raise UserError(
                    f"input={path}: a column of Parquet has one type, and JSON lines do not say "
                    "which; parts=jsonl, or keep=none"
                )
            work = Work(single, source, classifier, columns)
            wanted, known = work.wanted, work.known
            next(source.rows(wanted))  # a file without rows is refused
            layout = _with_file_column(work.layout(kind))
        stored, size = reader.format_of(str(path), options.format), path.stat().st_size
        where = str(path.absolute())
        inspected.append(File(number, name, where, stored, size, wanted, columns, layout, known))
    return inspected, work


def _with_file_column(layout: Layout) -> Layout:
    names = [renamed(name, layout.names) for name in layout.names]
    types = {renamed(name, layout.names): kind for name, kind in layout.types.items()}
    if layout.kind == "parquet":
        import pyarrow as pa

        types[FILE] = pa.string()
    return Layout(layout.kind, (FILE, *names), types)
