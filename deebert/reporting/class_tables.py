"""Turn the scores of each class into tables and a note, for the terminal and Markdown.

The module rounds numbers. It draws nothing, and does not know records or models.
"""

from collections.abc import Iterator

from deebert.reporting.class_results import ClassScore, ClassScores
from deebert.reporting.results import Results
from deebert.reporting.split_results import SplitResults

Table = tuple[str, list[str], list[list[str]]]  # title, column names, rows
MOST_IN_MARKDOWN = 20  # labels, up to which results.md has the confusion matrix
MOST_ON_SCREEN = 10  # labels, up to which the terminal has it
MOST_ROWS = 20  # labels in a table of the terminal
WIDEST = 80  # columns of the terminal that a matrix may take
LONGEST = 30  # characters of a label on the terminal


def class_tables(results: Results, *, terminal: bool = False) -> Iterator[Table]:
    """Yield the table of the classes and the confusion matrix of each split with labels.

    Args:
        results: the results.
        terminal: true for what fits a terminal: the first split, without a matrix that is too
            wide, and of very many labels only those with the lowest F1.
    """
    for part in results.splits[:1] if terminal else results.splits:
        if part.classes is None:
            continue
        point = part.classes.operating_point
        depth = "full depth" if point is None else "the operating point"
        where = f"at {depth}: {results.task}, {part.split}"
        yield _scores(part, where, terminal)
        shown = part.classes.shown.confusion
        labels = [_short(label) if terminal else label for label in part.classes.labels]
        # There is no matrix of very many labels.
        rows = [[label, *map(str, row)] for label, row in zip(labels, shown, strict=False)]
        matrix = (f"Confusion {where} (row: label, column: answer)", ["", *labels], rows)
        if rows and _fits(matrix, terminal):
            yield matrix


def _scores(part: SplitResults, where: str, terminal: bool) -> Table:
    """Return the table of the classes of a split."""
    assert part.classes is not None
    full = part.classes.full_depth.per_class
    chosen = list(zip(full, part.classes.shown.per_class, strict=True))
    title = f"Classes {where}"
    if terminal and len(chosen) > MOST_ROWS:
        title += f", the {MOST_ROWS} of {len(chosen)} labels with the lowest F1"
        chosen = sorted(chosen, key=lambda pair: pair[1].f1)[:MOST_ROWS]
    has_point = part.classes.operating_point is not None

    def row(at_full_depth: ClassScore, score: ClassScore) -> list[str]:
        label = _short(score.label) if terminal else score.label
        if not has_point:
            return [label, str(score.rows), f"{score.f1:.4f}"]
        layer = "-" if score.mean_exit_layer is None else f"{score.mean_exit_layer:.2f}"
        return [label, str(score.rows), f"{at_full_depth.f1:.4f}", f"{score.f1:.4f}", layer]

    early = ["F1 at full depth", "F1", "mean exit layer"] if has_point else ["F1"]
    return title, ["label", "rows", *early], [row(*pair) for pair in chosen]


def _fits(matrix: Table, terminal: bool) -> bool:
    """Say whether a confusion matrix is small enough to be read."""
    _, names, rows = matrix
    if not terminal:
        return len(rows) <= MOST_IN_MARKDOWN
    # A frame takes three characters for each column, and one more.
    width = 1 + sum(3 + max(map(len, cells)) for cells in zip(names, *rows, strict=True))
    return len(rows) <= MOST_ON_SCREEN and width <= WIDEST


def _short(label: str) -> str:
    """Return a label on one line, without control characters, that is not too long."""
    line = " ".join(label.split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def class_notes(results: Results) -> Iterator[str]:
    """Yield a sentence with the scores over all classes of each split with labels."""
    for part in results.splits:
        if part.classes is not None:
            full, point = part.classes.full_depth, part.classes.operating_point
            early = f"; at the operating point {_summary(point)}" if point else ""
            yield f"{part.split}, classes at full depth: {_summary(full)}{early}."


def _summary(scores: ClassScores) -> str:
    return (
        f"macro F1 {scores.f1_macro:.4f}, weighted F1 {scores.f1_weighted:.4f}, "
        f"Matthews {scores.matthews:.4f}"
    )
