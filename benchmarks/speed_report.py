"""speed.json -> speed.md and speed.png, and which of the issue's bars are reached.

All that is printed is computed here from the seconds of the turns. Knows nothing of models.
"""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from drawing import METRICS, TASKS, panels, save

PLAIN = "Hugging Face full depth"
ONE_POINT = "<= 1 point below"
POINT = 0.01 + 1e-9
Row = dict[str, Any]
# Part of speed.json, whether its rows are of batches, and the words for it.
KINDS = (("batched", True, "in batches"), ("single", False, "one at a time"))
SHOWN = {  # systems of the picture
    "cd": "deebert",
    "b": "Hugging Face, full depth",
    "a": "the original protocol of DeeBERT",
    "e": "the first layers only, then their ramp",
}

SYSTEMS = """\
- (a) the original's protocol: batch 1, padded to 128 tokens, every ramp evaluated, the host decides
  after each layer, at the thresholds of (d);
- (b) the library's forward pass with an attention mask and the final classifier;
- (c) the engine at threshold 0; (d) the engine at thresholds chosen for a saving of layers **on the
  same rows**: speed is measured here, nothing is promised. "<= 1 point below": the largest saving
  (by all ramps in this precision) with a score at most a point below full depth's;
- (e) the library's first k layers, and ramp k answers.

Batched: all rows at once, sorted by length, batches of as many tokens as the engine takes, unless
said otherwise. One at a time: unpadded, but for (a). *time saving* is against (b) of the same kind
in the same precision; *ratio* = time saving / layer saving. Savings and
ratios are medians over the turns of one run in which the systems take turns. *equal*: exits and
predictions equal to the record of all ramps in float32, on all rows. Bars B and C are held against
the fastest (b), too, where batches of another size are faster for it."""


def per_input(row: Row) -> np.ndarray:
    """Seconds an input, of each turn."""
    return np.array(row["turn_seconds"]) / row["num_rows"]


def times_faster(row: Row, other: Row) -> float:
    return median((per_input(other) / per_input(row)).tolist())


def time_saving(row: Row, other: Row) -> float:
    return 1 - median((per_input(row) / per_input(other)).tolist())


def select(part: dict[str, Any] | None, **values: Any) -> list[Row]:
    """The rows of a part that have these values."""
    rows = part["rows"] if part else []
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def reference(part: dict[str, Any], row: Row) -> Row:
    """(b) of the same kind, and of the same precision where the library has it."""
    kind = {"letter": "b", "name": PLAIN, "batched": row["batched"]}
    same = select(part, **kind, precision=row["precision"])
    # In the part of single inputs only the engine runs in batches, beside (a): no (b) for those.
    return (same or select(part, **kind, precision="float32") or [row])[0]


def ratio(row: Row, other: Row) -> float | None:
    """Time saving / layer saving, where nothing but the exits differs."""
    if row["layer_saving"] < 1e-9 or other is row or other["precision"] != row["precision"]:
        return None
    return time_saving(row, other) / row["layer_saving"]


def bars(parts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Bar, what was found, and whether it is reached, for one task."""
    batched, single, targets = (parts.get(name) for name in ("batched", "single", "targets"))
    bars_of = []
    for precision, least in (("float32", 1.20), ("bfloat16", 1.10)):
        points = {
            f"{row['point']}, {against}": value
            for row in select(batched, letter="d", batched=True, precision=precision)
            if row["point"].startswith(("30%", "40%", "50%"))
            for against, other in _full_depths(batched, row)
            if (value := ratio(row, other)) is not None
        }
        text = f"B. batched {precision}, 30 to 50 % of the layers: time / layer saving >= {least}"
        bars_of.append(_bar(text, points, _from(least)))
    for part, most, kind in ((batched, 0.97, "batched"), (single, 1.05, "one at a time")):
        shares = {
            f"{row['precision']}, {against}": 1 - time_saving(row, other)
            for row in select(part, letter="c", batched=part is batched)
            for against, other in _full_depths(part, row)
        }
        text = f"C. threshold 0, {kind}: <= {most} of the time of (b)"
        bars_of.append(_bar(text, shares, lambda value, most=most: value <= most))
    bars_of.append(
        _bar("D. one at a time: p50 saving / layer saving >= 0.9", _p50(single), _from(0.9))
    )
    for precision, least in (("float32", 8), ("bfloat16", 14)):
        times = {}
        for row in [
            row
            for letter in "cd"
            for row in select(single, letter=letter, batched=True, precision=precision)
        ]:
            for other in select(single, letter="a", threshold=row["threshold"]):
                equal = min(row["equal_predictions"], other["equal_predictions"])
                name = f"{row['point']} ({equal:.2%} equal predictions)"
                times[name] = times_faster(row, other)
        text = f"E. {precision} in batches against (a), same thresholds: >= {least} times"
        bars_of.append(_bar(text, times, _from(least)))
    speeds = {
        f"{row['target']} wished": row["speed_up"] / row["target"] - 1
        for row in select(targets)
        if "speed_up" in row
    }
    text = "H. target_speedup: the clock on unseen rows is within 7 %"
    bars_of.append(_bar(text, speeds, lambda value: abs(value) <= 0.07, form="{:+.1%}"))
    return bars_of


def _from(least: float) -> Any:
    return lambda value: value >= least


def _full_depths(part: dict[str, Any] | None, row: Row) -> list[tuple[str, Row]]:
    """(b) in the engine's batches; and the fastest (b), where that is another."""
    assert part is not None
    kind = {"letter": "b", "precision": row["precision"], "batched": row["batched"]}
    fastest = min(select(part, **kind), key=lambda other: median(other["turn_seconds"]))
    named = [("(b)", reference(part, row))]
    return named if fastest is named[0][1] else [*named, ("the fastest (b)", fastest)]


def _p50(part: dict[str, Any] | None) -> dict[str, float]:
    medians = {}
    for row in select(part, letter="d", batched=False):
        if row["layer_saving"] < 1e-9:
            continue
        assert part is not None
        saving = 1 - row["latency_ms"]["p50"] / reference(part, row)["latency_ms"]["p50"]
        medians[f"{row['precision']}, {row['point']}"] = saving / row["layer_saving"]
    return medians


def _bar(
    text: str, values: dict[str, float], good: Any, needed: Any = all, form: str = "{:.2f}"
) -> tuple[str, str, str]:
    if not values:
        return text, "not measured", "-"
    shown = "; ".join(f"{name}: {form.format(value)}" for name, value in values.items())
    return text, shown, "yes" if needed(good(value) for value in values.values()) else "**no**"


def table(part: dict[str, Any], is_batched: bool) -> list[str]:
    rows = [row for row in part["rows"] if row["batched"] == is_batched]
    latency = [] if is_batched else ["p50 ms", "p95 ms"]
    columns = ["system", "precision", "threshold for", "threshold", part["metric"], "ms an input"]
    columns += ["inputs/s", *latency, "layer saving", "time saving", "ratio"]
    lines = []
    for row in rows:
        ms, against = 1e3 * float(np.median(per_input(row))), reference(part, row)
        per_layer = ratio(row, against)
        saving = None if against is row else time_saving(row, against)
        lines.append(
            [
                f"({row['letter']}) {row['name']}",
                row["precision"],
                row["point"] or "",
                "" if row["threshold"] is None else f"{row['threshold']:.4g}",
                f"{row['score']:.4f}",
                f"{ms:.3f}",
                f"{1e3 / ms:.0f}",
                *(
                    f"{row['latency_ms'][name]:.2f}"
                    for name in (() if is_batched else ("p50", "p95"))
                ),
                f"{row['layer_saving']:.1%}",
                "" if saving is None else f"{saving:.1%}",
                "" if per_layer is None else f"{per_layer:.2f}",
                f"{row['equal_exits']:.2%}",
                f"{row['equal_predictions']:.2%}",
            ]
        )
    return markdown([*columns, "equal exits", "equal predictions"], lines)


def target_table(part: dict[str, Any]) -> list[str]:
    columns = ["target", "found", "threshold", part["metric"], "layer saving", "ms an input"]
    lines = [
        [
            f"{row['target']}",
            f"{row['speed_up']:.3f}",
            " / ".join(f"{t:.4g}" for t in row["threshold"]),
            f"{row['score']:.4f}",
            f"{row['layer_saving']:.1%}",
            f"{1e3 * float(np.median(per_input(row))):.3f}",
        ]
        if "speed_up" in row
        else [f"{row['target']}", row["why_not"], *[""] * 4]
        for row in part["rows"]
    ]
    return markdown(columns, lines)


def markdown(columns: list[str], rows: list[Any]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _conditions(part: dict[str, Any]) -> str:
    where = part["environment"]
    versions = where["versions"]
    return (
        f"`{part['command']}`: {part['repeats']} turns, {part['threads']} threads of "
        f"{where['cpus']} CPU cores ({where['device']}), batches of {part['token_budget']} tokens, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, Python "
        f"{where['python']}, commit {(where['git_commit'] or 'unknown')[:7]}; "
        f"{part['minutes']:.1f} minutes."
    )


def write(content: dict[str, Any], folder: Path) -> None:
    """speed.md and speed.png."""
    lines = ["# The engine on the clock", "", SYSTEMS, "", "![score against time](speed.png)", ""]
    lines += ["## Bars", ""]
    verdicts = [[task, *bar] for task, parts in content.items() for bar in bars(parts)]
    lines += markdown(["task", "bar", "found", "reached"], verdicts)
    titles = {
        "batched": "in batches",
        "single": "one at a time",
        "targets": '"so many times faster", on rows not chosen on',
    }
    for task, parts in content.items():
        for name, title in titles.items():
            if name not in parts:
                continue
            part = parts[name]
            lines += ["", f"## {task}, {title}", "", _conditions(part), ""]
            if name == "targets":
                lines += target_table(part)
                continue
            lines += table(part, name == "batched")
            if name == "single" and select(part, batched=True):
                lines += ["", "The engine's batches, in turns with (a) above:", ""]
                lines += table(part, True)
    (folder / "speed.md").write_text("\n".join(lines) + "\n")
    picture(content, folder / "speed.png")


def picture(content: dict[str, Any], file: Path) -> None:
    """Draw score against milliseconds an input in float32: a row of panels for each task.

    A task is drawn if the engine was measured both in batches and one input at a time.
    """
    drawn = {
        task: parts
        for task, parts in content.items()
        if all(select(parts.get(name), letter="d", batched=batched) for name, batched, _ in KINDS)
    }
    if not drawn:
        return
    figure, axes = panels(len(KINDS) * len(drawn), len(KINDS), 3, sharey="row")
    cells = [(task, parts, *kind) for task, parts in drawn.items() for kind in KINDS]
    for axis, (task, parts, name, is_batched, title) in zip(axes, cells, strict=True):
        rows = [
            row
            for row in select(parts[name], batched=is_batched, precision="float32")
            if row["letter"] != "b" or row["name"] == PLAIN
        ]
        for number, (letters, label) in enumerate(SHOWN.items()):
            same = [row for row in rows if row["letter"] in letters]
            points = sorted((1e3 * float(np.median(per_input(r))), r["score"]) for r in same)
            if points:
                axis.plot(
                    *zip(*points, strict=True), color=f"C{number}", marker="osD^"[number],
                    linestyle="-" if len(points) > 1 else "", markersize=7, label=label,
                )  # fmt: skip
        metric = parts[name]["metric"]
        axis.set(title=f"{TASKS.get(task, task)}, {title}", xlabel="milliseconds an input")
        axis.set_ylabel(METRICS.get(metric, metric) if is_batched else "")
        axis.set_xlim(left=0)
    save(figure, axes, file, columns=2)
