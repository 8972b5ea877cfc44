"""The tables of the classes, in results.md and on a terminal of 80 columns."""

from pathlib import Path
from typing import Any

import pytest
from helpers import results as by_hand

from deebert.reporting import report
from deebert.reporting.class_tables import class_tables
from deebert.reporting.results import Results


def scores(labels: list[str], layer: float | None = None) -> dict[str, Any]:
    """Label i has 10 * (i + 1) rows, all of them right, and an F1 that grows with i."""
    number = len(labels)
    confusion = [[10 * (i + 1) * (i == j) for j in range(number)] for i in range(number)]
    block = by_hand.class_scores(confusion, layer, 0.75)
    for i, (row, label) in enumerate(zip(block["per_class"], labels, strict=True)):
        row |= {"label": label, "f1": 0.9 - i / 100 if layer else 0.95}
    return block


def results(labels: list[str], *, early: bool = True) -> Results:
    classes = {"labels": labels, "full_depth": scores(labels)}
    if early:
        classes["operating_point"] = scores(labels, 1.5)
    other = by_hand.split("other", curve=[by_hand.point(0.1, 0.8, 0.3)], classes=classes)
    curve = [by_hand.point(0.1, 0.8, 0.3)]
    return Results.from_json(by_hand.run(curve=curve, classes=classes, other_splits=[other]))


def named(number: int) -> list[str]:
    return [f"l{i}" for i in range(number)]


def test_the_table_of_the_classes() -> None:
    markdown = report.markdown(results(["good", "a | b"]))
    assert (
        """## Classes at the operating point: mrpc, validation

| label | rows | F1 at full depth | F1 | mean exit layer |
|---:|---:|---:|---:|---:|
| good | 10 | 0.9500 | 0.9000 | 1.50 |
| a \\| b | 20 | 0.9500 | 0.8900 | 1.50 |

## Confusion at the operating point: mrpc, validation (row: label, column: answer)

|  | good | a \\| b |
|---:|---:|---:|
| good | 10 | 0 |
| a \\| b | 0 | 20 |
"""
        in markdown
    )
    assert "## Classes at the operating point: mrpc, other\n" in markdown
    summary = "macro F1 0.7500, weighted F1 0.7600, Matthews 0.6500"
    assert f"validation, classes at full depth: {summary}; at the operating point {summary}." in markdown  # fmt: skip
    markdown = report.markdown(results(["x", "y"], early=False))
    assert "## Classes at full depth: mrpc, validation\n\n| label | rows | F1 |\n" in markdown
    assert "| y | 20 | 0.9500 |" in markdown
    assert "operating point" not in markdown
    assert report.markdown(Results.from_json(by_hand.run(curve=[by_hand.point(0.1, 0.8, 0.3)]))).count("##") == 3, "an older file"  # fmt: skip


def test_what_is_shown_of_how_many_labels() -> None:
    """(labels, rows on the terminal, has a matrix on the terminal, in results.md)."""
    wide = [f"{name:x<10}" for name in named(6)]
    for labels, rows, on_screen, in_file in (
        (named(2), 2, True, True), (named(10), 10, True, True), (wide, 6, False, True),
        (named(11), 11, False, True), (named(20), 20, False, True), (named(25), 20, False, False),
    ):  # fmt: skip
        on_terminal = list(class_tables(results(labels), terminal=True))
        assert len(on_terminal[0][2]) == rows, labels
        assert len(on_terminal) == 1 + on_screen, labels
        whole = list(class_tables(results(labels)))
        assert [len(table[2]) for table in whole] == [len(labels)] * len(whole)
        assert len(whole) == 2 * (1 + in_file), "two splits"
    title, _, rows_of_25 = next(iter(class_tables(results(named(25)), terminal=True)))
    assert title.endswith("validation, the 20 of 25 labels with the lowest F1")
    assert [row[0] for row in rows_of_25[:2]] == ["l24", "l23"]


def test_labels_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label is text only: no markup, no control character; and tables are whole at 80 columns."""
    monkeypatch.setattr(report.os, "isatty", lambda _: True)
    monkeypatch.setenv("COLUMNS", "80")
    report.show(results(["[red]b[/]", "two\nlines \x1b[31m", "x" * 60]), Path("RUN"))
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    for cell in ("[red]b[/]│", "two lines ?[31m│", f"│{'x' * 27}...│"):
        assert cell in printed, printed
    tables = [line for line in printed.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, tables)) <= 80
    assert "0.8900" in printed
