"""Answers for the rows of a file: `python -m deebert.predict model=RUN input=FILE output=FILE ...`

Reads a block of rows, answers it and keeps the answers as a part, block after block; a run that was
killed goes on after its last part. `rows_in` knows how rows are read, `rows_out` how they are
written and `parts` what lies on the disk meanwhile.
"""

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deebert import commands, parts, rows_in, rows_out
from deebert.commands import ModelOptions, WishOptions, option
from deebert.errors import UserError, unknown
from deebert.parts import Parts
from deebert.progress import Progress
from deebert.rows_in import Row, Source

if TYPE_CHECKING:  # torch takes seconds; --help and most mistakes need none of it
    from deebert.classifier import Asked, EarlyExitClassifier

ENGINES = ("local", "ray")
LONGEST_TEXT = 1_000_000  # characters: a tokenizer needs 100 bytes and more for each token
TOKENIZED_AT_ONCE = 1_000_000  # characters
VERSION = 1  # of what is written; parts of another one are not gone on with


@dataclass
class PredictOptions(WishOptions, ModelOptions):
    """What is read, what is written, and how."""

    input: str = option("???", "a .csv, .tsv, .jsonl or .parquet file, or - for stdin")
    output: str = option("???", "a .csv, .jsonl or .parquet file")
    format: str | None = option(None, "of stdin, or of a file of another ending: csv, tsv, jsonl")
    columns: Any = option(None, "which hold the texts: [a,b]; if not said, those of the task")
    keep: Any = option("all", "columns of the input to write again: all, none or [a,b]")
    probabilities: bool = option(False, "write those of all classes")
    part_rows: int = option(8192, "rows that are answered and kept at a time")
    overwrite: bool = option(False, "begin anew, and replace an output that is there")
    engine: str = option("local", "local, or ray for many processes or machines")


@dataclass(frozen=True)
class Columns:
    """What is taken from a row, and what is written of it.

    Attributes:
        texts: where its text is, or its two texts.
        kept: what is written again; None for all that the row has.
        probabilities: write those of all classes?
    """

    texts: tuple[str, ...]
    kept: tuple[str, ...] | None
    probabilities: bool


@dataclass(frozen=True)
class Answered:
    """What became of some rows, in their order.

    Attributes:
        rows: as they are written: `row` (its number), what is kept of it, `label`, `probability`
            (of that label; not for a regression), `probability_CLASS` where asked for, and
            `exit_layer`. A kept column that is called like one of these becomes `input_NAME`.
        bad: `row`, `line` and `reason` of those that could not be answered.
        layers: sum of the exit layers.
    """

    rows: list[dict[str, Any]]
    bad: list[dict[str, Any]]
    layers: int


# Blocks of rows -> what became of them, in the same order; it may read some blocks ahead.
Answer = Callable[
    ["EarlyExitClassifier", "Asked", Columns, Iterator[list[Row]]], Iterator[Answered]
]


def answered(
    classifier: "EarlyExitClassifier", asked: "Asked", rows: Sequence[Row], columns: Columns
) -> Answered:
    """Answer rows; the same rows are answered the same wherever this runs."""
    faults = [_fault(row, columns.texts) for row in rows]
    good = [row for row, fault in zip(rows, faults, strict=True) if not fault]
    bad = {row.number: (row, fault) for row, fault in zip(rows, faults, strict=True) if fault}
    found: list[dict[str, Any]] = []
    layers = 0
    if good:
        texts = [tuple(row.values[name] for name in columns.texts) for row in good]
        predictions = classifier.answer(_encoded(classifier, texts), asked)
        values, finite = _values(predictions, columns.probabilities)
        own = own_columns(classifier.labels, columns.probabilities)
        for row, told, is_finite in zip(good, values, finite, strict=True):
            if not is_finite:
                reason = "the model's answer is NaN or infinite (are its weights?)"
                bad[row.number] = row, reason
                continue
            kept = [*row.values] if columns.kept is None else columns.kept
            names = out_names(kept, own)
            again = {out: row.values.get(name) for name, out in names.items()}
            found.append({"row": row.number, **again, **told})
            layers += told["exit_layer"]
    reported = [
        {"row": number, **({} if row.line is None else {"line": row.line}), "reason": reason}
        for number, (row, reason) in sorted(bad.items())
    ]
    return Answered(found, reported, layers)


def locally(
    classifier: "EarlyExitClassifier", asked: "Asked", columns: Columns, blocks: Iterator[list[Row]]
) -> Iterator[Answered]:
    """Block after block, in this process."""
    for rows in blocks:
        yield answered(classifier, asked, rows, columns)


def own_columns(labels: Sequence[str] | None, probabilities: bool) -> tuple[str, ...]:
    """The columns of the output beside those that are kept, in their order."""
    if labels is None:
        return "row", "label", "exit_layer"
    more = [f"probability_{label}" for label in labels] if probabilities else []
    return "row", "label", "probability", *more, "exit_layer"


def out_names(kept: Iterable[str], own: Sequence[str]) -> dict[str, str]:
    """What columns that are kept are called in the output."""
    names = dict.fromkeys(kept)
    found = {}
    for name in names:
        out = name
        while out in own or (out != name and out in names):
            out = f"input_{out}"
        found[name] = out
    return found


def predict(options: PredictOptions) -> None:
    """The command.

    Raises:
        UserError: something that was asked for is not there, or cannot be done.
    """
    if options.engine not in ENGINES:
        raise unknown("engine", options.engine, ENGINES, "engine")
    if options.engine == "ray":
        from deebert import on_ray

        on_ray.predict(options)
    else:
        run(options, locally)


def run(options: PredictOptions, answer: Answer) -> None:
    """Read, have it answered, and write.

    Args:
        answer: who answers the blocks of rows; `locally`, or somebody who calls `answered`.
    """
    output = Path(options.output)
    kind = rows_out.format_of(output)
    if options.part_rows < 1:
        raise UserError(f"part_rows={options.part_rows} must be 1 or more")
    if options.input != rows_in.STDIN and output.exists() and output.samefile(options.input):
        raise UserError(f"output={output} is the input; name another file")
    parts.check(output, options.overwrite)
    with rows_in.opened(options.input, options.format) as source:
        from deebert.classifier import EarlyExitClassifier

        classifier = EarlyExitClassifier.from_pretrained(
            options.model, task=options.task, precision=options.precision,
            runtime=options.runtime, device=options.device,
        )  # fmt: skip
        columns = _columns(options, source, classifier.task.columns, free=kind == "jsonl")
        work = Work(options, source, classifier, columns, _layout(kind, source, classifier, columns))
        with Parts(output) as kept:
            told = kept.ended(work.job) or work.do(kept, answer)
    print(_summary(told, output), file=sys.stderr)


@dataclass
class Work:
    """What one run of the command does."""

    options: PredictOptions
    source: Source
    classifier: "EarlyExitClassifier"
    columns: Columns
    layout: rows_out.Layout
    pending: deque[dict[str, Any]] = field(default_factory=deque)

    @property
    def job(self) -> dict[str, Any]:
        """What parts must have in common; not the time of the input, whose rows are compared."""
        options, saved = self.options, self.classifier.saved
        given = options.input
        if given != rows_in.STDIN:
            given = str(Path(given).resolve())
        return {
            "version": VERSION,
            "input": given,
            "size": self.source.size,
            "format": rows_in.format_of(options.input, options.format),
            "columns": self.columns.texts,
            "keep": self.columns.kept,
            "probabilities": self.columns.probabilities,
            "part_rows": options.part_rows,
            "model": saved.checkpoint.fingerprint,
            "precision": options.precision,
            "runtime": options.runtime,
            "device": options.device,
            "wish": commands.wish_of(options) or dict(saved.wish or {}),
        }

    def do(self, kept: Parts, answer: Answer) -> dict[str, Any]:
        """Go on after the parts that are there, to the end; what there is to say of it."""
        found = kept.begin(self.job, self.options.overwrite, self._find)
        asked = self._asked(found)
        wanted = (*self.columns.texts, *(self.columns.kept or self.source.names))
        blocks = rows_in.blocks(self.source.rows(wanted), self.options.part_rows)
        self._pass_over(blocks, kept)
        began, before = time.monotonic(), sum(about["rows"] for about in kept.done)
        if before:
            print(f"{before:,} rows were done before; going on", file=sys.stderr)
        told = self._told(kept)
        try:
            with Progress(self.source.size, self.source.position()) as progress:
                answers = answer(self.classifier, asked, self.columns, self._noted(blocks))
                for each in answers:
                    bad = "".join(rows_out.json_line(row) for row in each.bad).encode()
                    about = self.pending.popleft()
                    position = about.pop("position")
                    about |= {"bad": len(each.bad), "layers": each.layers}
                    kept.add(self.layout.part(each.rows), bad, about)
                    told = self._told(kept)
                    rate = (told["rows"] - before) / (time.monotonic() - began)
                    told["rate"] = rate
                    progress.show(position, _about(told))
        except KeyboardInterrupt:
            done = sum(about["rows"] for about in kept.done)
            print(f"\nStopped; {done:,} rows are done. The same command goes on.", file=sys.stderr)
            sys.exit(130)
        kept.finish(self.job, self.layout.join, told)
        return told

    def _find(self) -> dict[str, Any]:
        """Thresholds for the wish; kept, as a wish may be granted by measuring."""
        asked = self.classifier.ask(**commands.wish_of(self.options))
        temperatures = asked.rule.temperatures
        return {
            "rule": asked.rule.name,
            "temperatures": None if temperatures is None else temperatures.tolist(),
            "thresholds": asked.thresholds,
        }

    def _asked(self, found: Mapping[str, Any]) -> "Asked":
        import torch

        from deebert import exits
        from deebert.classifier import Asked

        rule = exits.named(found["rule"], self.classifier.task.num_labels)
        if found["temperatures"] is not None:
            rule = replace(rule, temperatures=torch.tensor(found["temperatures"]))
        return Asked(rule, found["thresholds"], self.job["wish"])

    def _pass_over(self, blocks: Iterator[list[Row]], kept: Parts) -> None:
        """Read what is done; a hundredth of the work, and a look at whether it is the same."""
        for about in kept.done:
            rows = next(blocks, [])
            if _digest(rows) != about["digest"]:
                raise UserError(
                    f"input={self.options.input} has changed: {kept.folder} holds answers to other "
                    "rows; begin anew (overwrite=true)"
                )

    def _noted(self, blocks: Iterator[list[Row]]) -> Iterator[list[Row]]:
        """The blocks, with what is to be known of each when its answers come."""
        for rows in blocks:
            position = self.source.position()
            self.pending.append(
                {"rows": len(rows), "digest": _digest(rows), "position": position}
            )
            yield rows

    def _told(self, kept: Parts) -> dict[str, Any]:
        rows, bad, layers = (
            sum(about[name] for about in kept.done) for name in ("rows", "bad", "layers")
        )
        saving = 1 - layers / ((rows - bad) * self.classifier.num_layers) if rows > bad else None
        return {"rows": rows, "bad": bad, "saving": saving, "rate": None}


def _columns(
    options: PredictOptions, source: Source, of_task: Sequence[str], free: bool
) -> Columns:
    """Raises:
    UserError: a column is not there, or holds no texts, or they are not as many as needed.
    """
    has = ", ".join(source.names[:20]) + (", ..." if len(source.names) > 20 else "")
    has = f"it has: {has or 'none'}"
    if options.columns is not None:
        texts = _listed(options.columns)
        if len(texts) != len(of_task):
            raise UserError(
                f"columns={texts} are {len(texts)}; the model reads {len(of_task)}, as "
                f"{', '.join(of_task)} in training"
            )
    elif set(of_task) <= set(source.names):
        texts = list(of_task)
    elif len(of_task) == len(source.texts) == 1:
        texts = list(source.texts)
    else:
        texts = list(of_task)
    for name in texts:
        if name not in source.names:
            raise UserError(
                f"input={options.input}: it has no column {name!r}; {has}; say which hold the "
                "texts (columns=[...])"
            )
        if name not in source.texts:
            raise UserError(
                f"input={options.input}: its column {name!r} holds no texts; those that do: "
                f"{', '.join(source.texts) or 'none'} (columns=[...])"
            )
    if options.keep == "all":
        kept = None if free and source.free else source.names
    else:
        kept = () if options.keep in ("none", None) else tuple(_listed(options.keep))
    for name in kept or ():
        if name not in source.names:
            raise UserError(f"input={options.input}: it has no column {name!r}; {has} (keep=[...])")
    return Columns(tuple(texts), kept, options.probabilities)


def _listed(given: Any) -> list[str]:
    return [str(each) for each in (given if isinstance(given, list) else [given])]


def _layout(
    kind: str, source: Source, classifier: "EarlyExitClassifier", columns: Columns
) -> rows_out.Layout:
    own = own_columns(classifier.labels, columns.probabilities)
    kept = out_names(columns.kept or (), own)
    types = {out: source.types[name] for name, out in kept.items() if name in source.types}
    if kind == "parquet":
        import pyarrow as pa

        types |= {name: pa.float32() for name in own} | {"row": pa.int64(), "exit_layer": pa.int32()}
        if classifier.labels is not None:
            types["label"] = pa.string()
    return rows_out.Layout(kind, ("row", *kept.values(), *own[1:]), types)


def _fault(row: Row, names: Sequence[str]) -> str | None:
    """Why a row cannot be answered, or None."""
    if row.fault:
        return row.fault
    for name in names:
        value = row.values.get(name)
        if name not in row.values:
            return f"it has no {name!r}"
        if not isinstance(value, str):
            return f"its {name!r} is {_short(value)}, not a text"
        if not value.strip():
            return f"its {name!r} is empty"
        if "\0" in value:
            return f"its {name!r} holds a NUL character"
        if len(value) > LONGEST_TEXT:
            return f"its {name!r} has {len(value):,} characters, more than {LONGEST_TEXT:,}"
    return None


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _encoded(classifier: "EarlyExitClassifier", texts: list[tuple[str, ...]]) -> list[Any]:
    """Tokens, not of all texts at once: a tokenizer holds those beyond the limit, too."""
    found: list[Any] = []
    chosen: list[tuple[str, ...]] = []
    size = 0
    for text in texts:
        chosen.append(text)
        size += sum(map(len, text))
        if size >= TOKENIZED_AT_ONCE:
            found += classifier.encode(chosen)
            chosen, size = [], 0
    return found + classifier.encode(chosen)


def _values(predictions: Any, probabilities: bool) -> tuple[list[dict[str, Any]], list[bool]]:
    """What is written of each prediction, and whether it is finite."""
    layers, labels = predictions.exit_layers, predictions.labels
    probabilities_NC = predictions.probabilities_NC
    if probabilities_NC is None:
        import torch

        values_N = torch.tensor(labels)
        told = zip(_short_floats(values_N), layers, strict=True)
        finite = values_N.isfinite().tolist()
        return [{"label": value, "exit_layer": layer} for value, layer in told], finite
    largest = _short_floats(probabilities_NC.amax(-1))
    found = [{"label": a, "probability": b} for a, b in zip(labels, largest, strict=True)]
    if probabilities:
        for index, label in enumerate(predictions.classes):
            column = _short_floats(probabilities_NC[:, index])
            for each, value in zip(found, column, strict=True):
                each[f"probability_{label}"] = value
    for each, layer in zip(found, layers, strict=True):
        each["exit_layer"] = layer
    return found, probabilities_NC.isfinite().all(-1).tolist()


def _short_floats(values_N: Any) -> list[float]:
    """With as few digits as tell a float32 from its neighbours."""
    return [float(str(value)) for value in values_N.float().numpy()]


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _about(told: Mapping[str, Any]) -> str:
    found = f"{told['rows']:,} rows"
    if told["bad"]:
        found += f", {told['bad']:,} of them bad"
    if told["rate"]:
        found += f", {told['rate']:,.0f} rows/s"
    if told["saving"] is not None:
        found += f", {told['saving']:.1%} of the layers saved"
    return found


def _summary(told: Mapping[str, Any], output: Path) -> str:
    errors = f"; the bad ones: {parts.errors_of(output)}" if told["bad"] else ""
    return f"{_about(told)}: {output}{errors}"


if __name__ == "__main__":
    commands.main(
        PredictOptions,
        predict,
        "python -m deebert.predict",
        "python -m deebert.predict model=RUN input=reviews.csv output=out.parquet target_saving=0.4",
    )
