"""One run of `python -m deebert.predict`: what is asked for, and how it is done.

Reads a block of rows, has it answered and keeps the answers as a part, block after block; a run
that was killed goes on after its last part. Knows neither formats nor models: `rows_in` reads,
`answers` answers, `rows_out` writes, and `parts` knows what lies on the disk meanwhile.
"""

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deebert.errors import UserError
from deebert.options import ModelOptions, TargetOptions, engine_of, option, target_of
from deebert.predict import disk, parts, rows_in, rows_out
from deebert.predict.answers import Answered, Columns, answered, out_names, own_columns
from deebert.predict.parts import Parts
from deebert.predict.progress import Progress
from deebert.predict.rows import Row, Source

if TYPE_CHECKING:  # torch takes seconds, and --help and most mistakes need none of it
    from deebert.classifier import CalibratedPoint, EarlyExitClassifier

COUNTED = ("rows", "bad", "layers", "more")  # of a part
VERSION = 1  # of what is written; parts of another one are not gone on with


@dataclass
class PredictOptions(TargetOptions, ModelOptions):
    """What is read, what is written, and how."""

    input: str = option("???", "a .csv, .tsv, .jsonl or .parquet file, - for stdin; or a folder")
    output: str = option("???", "a .csv, .jsonl or .parquet file; with engine=ray a folder")
    format: str | None = option(None, "of stdin, or of a file of another ending: csv, tsv, jsonl")
    columns: Any = option(None, "which hold the texts: [a,b]; if not said, those of the task")
    keep: Any = option("all", "columns of the input to write again: all, none or [a,b]")
    probabilities: bool = option(False, "write those of all classes")
    part_rows: int = option(8192, "rows that are answered and kept at a time")
    overwrite: bool = option(False, "begin anew, and replace an output that is there")
    engine: str = option("local", "local, or ray for many processes or machines")
    workers: int = option(2, "of engine=ray: processes that hold the model")
    threads: int | None = option(None, "of engine=ray: of each worker; null: a share of the cores")
    parts: str | None = option(None, "of engine=ray: csv, jsonl or parquet; null: as the input is")


# Blocks of rows -> what became of them, in their order; it may take some blocks ahead.
Answer = Callable[
    ["EarlyExitClassifier", "CalibratedPoint", Columns, Iterator[list[Row]]], Iterator[Answered]
]


def locally(
    classifier: "EarlyExitClassifier",
    asked: "CalibratedPoint",
    columns: Columns,
    blocks: Iterator[list[Row]],
) -> Iterator[Answered]:
    """Block after block, in this process."""
    for rows in blocks:
        yield answered(classifier, asked, rows, columns)


def run(options: PredictOptions, answer: Answer) -> None:
    """Read, have it answered, and write.

    Args:
        answer: answers the blocks of rows, as `locally` does.
    """
    output = Path(options.output)
    kind = rows_out.format_of(output)
    if options.part_rows < 1:
        raise UserError(f"part_rows={options.part_rows} must be 1 or more")
    from_file = options.input != rows_in.STDIN and Path(options.input).exists()
    if from_file and output.exists() and output.samefile(options.input):
        raise UserError(f"output={output} is the input; name another file")
    parts.check(output, options.overwrite)
    with rows_in.opened(options.input, options.format) as source:
        from deebert.classifier import EarlyExitClassifier

        classifier = EarlyExitClassifier.from_pretrained(
            options.model, task=options.task, **engine_of(options)
        )
        columns = chosen_columns(options, source, classifier.task.columns, rows_out.is_free(kind))
        work = Work(options, source, classifier, columns)
        with Parts(output) as kept:
            done = kept.ended(work.job) or work.do(kept, answer)
    errors = f"; the bad ones: {parts.errors_of(output)}" if done["bad"] else ""
    print(f"{about(done)}: {output}{errors}")


@dataclass
class Work:
    """What one run of the command does."""

    options: PredictOptions
    source: Source
    classifier: "EarlyExitClassifier"
    columns: Columns
    pending: deque[dict[str, Any]] = field(default_factory=deque)

    @property
    def job(self) -> dict[str, Any]:
        """What parts must have in common; not the time of the input, whose rows are compared."""
        options, saved, stdin = self.options, self.classifier.saved, rows_in.STDIN
        return {
            "version": VERSION,
            "input": stdin if options.input == stdin else str(Path(options.input).resolve()),
            "size": self.source.size,
            "format": rows_in.format_of(options.input, options.format),
            "columns": self.columns.texts,
            "keep": self.columns.kept,
            "probabilities": options.probabilities,
            "part_rows": options.part_rows,
            "model": saved.checkpoint.fingerprint,
            **engine_of(options),
            "target": target_of(options) or dict(saved.target),
        }

    @property
    def wanted(self) -> frozenset[str]:
        """The columns that are read."""
        again = self.source.names if self.columns.kept is None else self.columns.kept
        return frozenset((*self.columns.texts, *again))

    @property
    def known(self) -> frozenset[str] | None:
        """The columns that can be kept, where rows may have more, which are left out."""
        cut = self.options.keep == "all" and self.columns.kept is not None and self.source.free
        return frozenset(self.source.names) if cut else None

    def do(self, kept: Parts, answer: Answer) -> dict[str, Any]:
        """Go on after the parts that are there, to the end; what there is to say of it."""
        asked = self.asked(kept.begin(self.job, self.options.overwrite, self.find))
        layout = self.layout(rows_out.format_of(kept.output))
        blocks = rows_in.blocks(self.source.rows(self.wanted), self.options.part_rows)
        before = self._pass_over(blocks, kept)
        num_layers = self.classifier.num_layers
        began, now = time.monotonic(), told(_counted(kept), num_layers)
        try:
            with Progress(self.source.size, self.source.position()) as progress:
                for each in answer(self.classifier, asked, self.columns, self._noted(blocks)):
                    noted = self.pending.popleft()
                    position = noted.pop("position")
                    noted |= {"bad": len(each.bad), "layers": each.layers}
                    bad = "".join(map(rows_out.json_line, each.bad))
                    kept.add(layout.part(each.rows), bad.encode(), noted)
                    sums = _counted(kept)
                    rate = (sums["rows"] - before) / (time.monotonic() - began)
                    now = told(sums, num_layers, rate)
                    progress.show(position, about(now))
        except KeyboardInterrupt:
            print(f"\nStopped at {about(now)}; {disk.GOES_ON}", file=sys.stderr)
            sys.exit(130)
        kept.finish(self.job, layout.join, now)
        return now

    def find(self) -> dict[str, Any]:
        """The rule and thresholds: a target met by measuring is never met twice the same."""
        asked = self.classifier.calibrate(**target_of(self.options))
        return {"rule": asked.rule.name, **asked.rule.fit, "thresholds": asked.thresholds}

    def asked(self, found: Mapping[str, Any]) -> "CalibratedPoint":
        """What was found at the first start, as the classifier takes it."""
        from deebert.classifier import CalibratedPoint
        from deebert.exits import rules

        rule = rules.named(found["rule"], self.classifier.task.num_labels)
        rule = rule.fitted(found["temperatures"], found.get("prior"))
        return CalibratedPoint(rule, found["thresholds"], self.job["target"])

    def layout(self, kind: str) -> rows_out.Layout:
        """What is written in a format."""
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
        """Read what is done: a hundredth of the work, and it shows whether the rows are the same.

        Returns:
            How many rows there were.
        """
        for part in kept.done:
            if _digest(next(blocks, [])) != part["digest"]:
                raise UserError(
                    f"input={self.options.input} has changed: {kept.folder} holds answers to other "
                    "rows; begin anew (overwrite=true)"
                )
        before = _counted(kept)["rows"]
        if before:
            print(f"{before:,} rows were done before; going on from there", file=sys.stderr)
        return before

    def _noted(self, blocks: Iterator[list[Row]]) -> Iterator[list[Row]]:
        """The blocks, with what is to be known of each when its answers come."""
        known = self.known
        for rows in blocks:
            noted = {"rows": len(rows), "digest": _digest(rows), "more": more(rows, known)}
            self.pending.append(noted | {"position": self.source.position()})
            yield rows


def more(rows: Sequence[Row], known: frozenset[str] | None) -> int:
    """How many of the rows have columns that are left out."""
    return 0 if known is None else sum(not known.issuperset(row.values) for row in rows)


def _counted(kept: Parts) -> dict[str, int]:
    return {name: sum(part[name] for part in kept.done) for name in COUNTED}


def told(counted: Mapping[str, int], num_layers: int, rate: float | None = None) -> dict[str, Any]:
    """What there is to say of rows.

    Args:
        counted: COUNTED, and more.
        rate: rows a second.
    """
    good = counted["rows"] - counted["bad"]
    saving = 1 - counted["layers"] / (good * num_layers) if good else None
    return {**counted, "saving": saving, "rate": rate}


def chosen_columns(
    options: PredictOptions, source: Source, of_task: Sequence[str], free: bool
) -> Columns:
    """Which columns are read and written.

    Args:
        of_task: what they were called in training.
        free: may every row of the output have columns of its own?

    Raises:
        UserError: a column is not there, or holds no texts, or they are not as many as needed.
    """
    where = f"input={options.input}"
    has = f"it has: {', '.join(source.names[:20]) or 'none'}{', ...' * (len(source.names) > 20)}"
    texts = list(of_task)
    if options.columns is not None:
        texts = _listed(options.columns)
        if len(texts) != len(of_task):
            raise UserError(
                f"columns=[{', '.join(texts)}] are {len(texts)}, and the model reads "
                f"{len(of_task)} (in training {', '.join(of_task)})"
            )
    elif texts[0] not in source.names and len(of_task) == len(source.texts) == 1:
        texts = list(source.texts)
    for name in texts:
        if name not in source.names:
            raise UserError(
                f"{where}: it has no column {name!r}; {has}; say which hold the texts "
                "(columns=[...])"
            )
        if name not in source.texts:
            raise UserError(
                f"{where}: its column {name!r} holds no texts; those that do: "
                f"{', '.join(source.texts) or 'none'} (columns=[...])"
            )
    if options.keep == "all":
        kept = None if free and source.free else source.names
    else:
        kept = () if options.keep in ("none", None) else tuple(_listed(options.keep))
    for name in kept or ():
        if name not in source.names:
            raise UserError(f"{where}: it has no column {name!r}; {has} (keep=[...])")
    return Columns(tuple(texts), kept, options.probabilities)


def _listed(given: Any) -> list[str]:
    return [str(each) for each in (given if isinstance(given, list) else [given])]


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def about(told: Mapping[str, Any]) -> str:
    """A line of what `told` gives."""
    found = f"{told['rows']:,} rows"
    if told["bad"]:
        found += f", {told['bad']:,} of them bad"
    if told["more"]:
        found += f", {told['more']:,} with columns that the first ones lack (not kept)"
    if told["rate"]:
        found += f", {told['rate']:,.0f} rows/s"
    if told["saving"] is not None:
        found += f", {told['saving']:.1%} of the layers saved"
    return found
