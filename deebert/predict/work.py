"""The options of `deebert predict`, its job, and the work on one input and one output.

Reads a block of rows, has the rows answered and keeps the answers as a part, block after block. A
run that was killed goes on after its last part. Knows neither formats nor models: `data.rows`
reads, `answers` answers, `rows_out` writes, and `parts` manages the files on the disk.
"""

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deebert.data.rows import reader
from deebert.data.rows.source import Row, Source, blocks, separator_hint
from deebert.errors import UserError
from deebert.exits.drift_monitor import Monitor
from deebert.options import ModelOptions, TargetOptions, engine_of, option, target_of
from deebert.predict import long_job, rows_out
from deebert.predict.answers import (
    COUNTED,
    Answered,
    Columns,
    answered,
    num_cut_rows,
    out_names,
    own_columns,
    summary,
    summary_line,
)
from deebert.predict.parts import Parts

if TYPE_CHECKING:  # torch takes seconds, and --help and most mistakes need none of it
    from deebert.classifier import EarlyExitClassifier
    from deebert.exits.calibration import CalibratedPoint

VERSION = 2  # of the files of the parts; parts of another version cannot be used


@dataclass
class PredictOptions(TargetOptions, ModelOptions):
    """The options of `deebert predict`: the input, the output, and how the work is done."""

    input: str = option("???", "a .csv, .tsv, .jsonl or .parquet file, - for stdin; or a folder")
    output: str = option("???", "a .csv, .jsonl or .parquet file; with engine=ray a folder")
    format: str | None = option(None, "format of stdin, or of a file of another ending: csv, ...")
    columns: Any = option(None, "columns that hold the texts: [a,b]; null: those of the task")
    keep: Any = option("all", "columns of the input to write again: all, none or [a,b]")
    probabilities: bool = option(False, "write the probabilities of all classes")
    part_rows: int = option(8192, "rows that are answered and kept at a time")
    overwrite: bool = option(False, "begin anew, and replace an output that is there")
    engine: str = option("local", "local, or ray for many processes or machines")
    workers: int = option(2, "with engine=ray: processes that hold the model", needs="engine=ray")
    threads: int | None = option(
        None, "with engine=ray: threads of each worker; null: its share", needs="engine=ray"
    )
    parts: str | None = option(
        None, "with engine=ray: csv, jsonl or parquet; null: as the input", needs="engine=ray"
    )


# Takes blocks of rows and gives their results, in their order. It may take some blocks ahead.
Answer = Callable[
    ["EarlyExitClassifier", "CalibratedPoint", Columns, Iterator[list[Row]]], Iterator[Answered]
]


def locally(
    classifier: "EarlyExitClassifier",
    point: "CalibratedPoint",
    columns: Columns,
    blocks: Iterator[list[Row]],
) -> Iterator[Answered]:
    """Answer block after block in this process; an `Answer`."""
    for rows in blocks:
        yield answered(classifier, point, rows, columns)


@dataclass
class Work:
    """The work on one input.

    Attributes:
        options: the options of the command.
        source: the input.
        classifier: the model.
        columns: the columns that are read and written.
        pending: the notes on the blocks that are read and not yet answered.
    """

    options: PredictOptions
    source: Source
    classifier: "EarlyExitClassifier"
    columns: Columns
    pending: deque[dict[str, Any]] = field(default_factory=deque)

    @property
    def job(self) -> dict[str, Any]:
        """The values that all parts have in common.

        The time of the input is not among them: its rows are compared instead.
        """
        options, saved, stdin = self.options, self.classifier.saved, reader.STDIN
        return {
            "version": VERSION,
            "input": stdin if options.input == stdin else str(Path(options.input).resolve()),
            "size": self.source.size,
            "format": reader.format_of(options.input, options.format),
            "columns": self.columns.texts,
            "keep": self.columns.kept,
            "probabilities": options.probabilities,
            "part_rows": options.part_rows,
            **self._model,
            **engine_of(options),
            "target": target_of(options) or dict(saved.target),
        }

    @cached_property
    def _model(self) -> dict[str, Any]:
        """The values of the model that decide its answers, by the names that a message shows."""
        classifier, checkpoint = self.classifier, self.classifier.saved.checkpoint
        given = self.options.modules
        modules = {name: sys.modules[name] for name in (_listed(given) if given else ())}
        files = {name: getattr(module, "__file__", None) for name, module in modules.items()}
        return {
            "model": checkpoint.fingerprint,
            "labels": classifier.labels,
            "max_length": classifier.max_length,
            "ramps": asdict(checkpoint.config.ramp_kind),
            "rule": [classifier.rule.name, dict(classifier.rule.options)],
            "tokenizer": _hash(checkpoint.tokenizer_files),
            "architecture": _hash(checkpoint.architecture),
            "modules": {n: _hash(Path(file).read_bytes()) for n, file in files.items() if file},
        }

    @property
    def wanted(self) -> frozenset[str]:
        """The columns that are read."""
        again = self.source.names if self.columns.kept is None else self.columns.kept
        return frozenset((*self.columns.texts, *again))

    @property
    def known(self) -> frozenset[str] | None:
        """The columns that can be kept, if rows may have others; else None."""
        cut = self.options.keep == "all" and self.columns.kept is not None and self.source.free
        return frozenset(self.source.names) if cut else None

    def do(self, kept: Parts, answer: Answer) -> dict[str, Any]:
        """Answer all rows that are not done yet, and finish the output.

        Args:
            kept: the parts, of which some may be done.
            answer: answers the blocks of rows.

        Returns:
            The summary of all rows.
        """
        point = self.point(kept.begin(self.job, self.options.overwrite, self.find))
        layout = self.layout(rows_out.format_of(kept.output))
        in_blocks = blocks(self.source.rows(self.wanted), self.options.part_rows)
        before = self._pass_over(in_blocks, kept)
        num_layers = self.classifier.num_layers
        # It sees the rows that this process answers, not those of a part that was done before.
        monitor = Monitor(num_layers)
        monitor.expect("", self.classifier.calibration_exits(point))
        began, now = time.monotonic(), summary(_sums(kept), num_layers, drift=monitor.worst)
        try:
            with long_job.Progress(self.source.size, self.source.position()) as progress:
                for each in answer(self.classifier, point, self.columns, self._noted(in_blocks)):
                    note = self.pending.popleft()
                    position = note.pop("position")
                    note |= {"bad": len(each.bad), "layers": each.layers}
                    bad = "".join(map(rows_out.json_line, each.bad))
                    kept.add(layout.part(each.rows), bad.encode(), note)
                    sums = _sums(kept)
                    rate = (sums["rows"] - before) / (time.monotonic() - began)
                    monitor.update("", each.cells)
                    now = summary(sums, num_layers, rate, monitor.worst)
                    progress.show(position, summary_line(now))
        except KeyboardInterrupt:
            print(f"\nStopped at {summary_line(now)}; {long_job.GOES_ON}", file=sys.stderr)
            sys.exit(130)
        kept.finish(self.job, layout.join, now)
        return now

    def find(self) -> dict[str, Any]:
        """Return the rule and the thresholds for the target, in plain values.

        They are kept with the parts: a target that needs measuring gives others every time.
        """
        point = self.classifier.calibrate(**target_of(self.options))
        return {"rule": point.rule.name, **point.rule.fit, "thresholds": point.thresholds}

    def point(self, values: Mapping[str, Any]) -> "CalibratedPoint":
        """Return the rule and the thresholds that `find` gave in plain values."""
        from deebert.exits import rules
        from deebert.exits.calibration import CalibratedPoint

        rule = rules.named(values["rule"], self.classifier.task.num_labels)
        rule = rule.fitted(values["temperatures"], values.get("prior"))
        return CalibratedPoint(rule, values["thresholds"], self.job["target"])

    def layout(self, kind: str) -> rows_out.Layout:
        """Return the layout of the output in a format."""
        labels, of_input = self.classifier.labels, self.source.types
        own = own_columns(labels, self.columns.probabilities)
        kept = out_names(self.columns.kept or (), own)
        types = {out: of_input[name] for name, out in kept.items() if name in of_input}
        if kind == "parquet":
            import pyarrow as pa

            types |= dict.fromkeys(own, pa.float32())
            types |= {"row": pa.int64(), "exit_layer": pa.int32()}
            types["label"] = pa.float32() if labels is None else pa.string()
        return rows_out.Layout(kind, ("row", *kept.values(), *own[1:]), types)

    def _pass_over(self, blocks: Iterator[list[Row]], kept: Parts) -> int:
        """Read the blocks that are done, to check that their rows are still the same.

        This takes a hundredth of the time that answering them took.

        Returns:
            The number of rows in these blocks.

        Raises:
            UserError: the rows have changed.
        """
        for part in kept.done:
            if _digest(next(blocks, [])) != part["digest"]:
                raise UserError(
                    f"input={self.options.input} has changed: {kept.folder} holds answers to other "
                    "rows; begin anew (overwrite=true)"
                )
        before = _sums(kept)["rows"]
        if before:
            print(f"{before:,} rows were done before; going on from there", file=sys.stderr)
        return before

    def _noted(self, blocks: Iterator[list[Row]]) -> Iterator[list[Row]]:
        """Yield the blocks, and add a note on each to `pending`."""
        known = self.known
        for rows in blocks:
            note = {"rows": len(rows), "digest": _digest(rows), "more": num_cut_rows(rows, known)}
            self.pending.append(note | {"position": self.source.position()})
            yield rows


def _sums(kept: Parts) -> dict[str, int]:
    """Add the counts of all parts."""
    return {name: sum(part[name] for part in kept.done) for name in COUNTED}


def _hash(content: bytes | Mapping[str, Any]) -> str:
    """Return a hash of bytes or of plain values."""
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def chosen_columns(
    options: PredictOptions,
    source: Source,
    of_task: Sequence[str],
    free: bool,
    *,
    is_regression: bool = False,
) -> Columns:
    """Choose the columns that are read and written.

    Args:
        options: the options of the command.
        source: the input.
        of_task: the names that the columns of the texts had in training.
        free: whether every row of the output may have columns of its own.
        is_regression: whether the answers are numbers.

    Raises:
        UserError: a column does not exist or holds no texts, or the number of columns is wrong.
    """
    if options.probabilities and is_regression:
        raise UserError("probabilities=true: a regression has none; leave it out")
    where = f"input={options.input}"
    names, names_of_texts = set(source.names), set(source.texts)  # there may be 100,000
    has = f"it has: {', '.join(source.names[:20]) or 'none'}{', ...' * (len(source.names) > 20)}"
    texts = list(of_task)
    if options.columns is not None:
        texts = _listed(options.columns)
        if len(texts) != len(of_task):
            raise UserError(
                f"columns=[{', '.join(texts)}] are {len(texts)}, and the model reads "
                f"{len(of_task)} (in training {', '.join(of_task)})"
            )
    # Every column of CSV is a text, also a header that is none.
    elif (
        texts[0] not in names
        and len(of_task) == len(source.texts) == 1
        and (source.free or source.types)
    ):
        texts = list(source.texts)
    for name in texts:
        if name not in names:
            raise UserError(
                f"{where}: it has no column {name!r}; {has}{separator_hint(source.names)}; say "
                "which hold the texts (columns=[...])"
            )
        if name not in names_of_texts:
            raise UserError(
                f"{where}: its column {name!r} holds no texts; those that do: "
                f"{', '.join(source.texts[:20]) or 'none'} (columns=[...])"
            )
    if options.keep == "all":
        kept = None if free and source.free else source.names
    else:
        kept = () if options.keep in ("none", None) else tuple(_listed(options.keep))
    for name in kept or ():
        if name not in names:
            raise UserError(f"{where}: it has no column {name!r}; {has} (keep=[...])")
    return Columns(tuple(texts), kept, options.probabilities)


def _listed(given: Any) -> list[str]:
    return [str(each) for each in (given if isinstance(given, list) else [given])]
