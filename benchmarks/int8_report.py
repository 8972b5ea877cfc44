"""int8.json -> int8.md and a picture for each task. All that is printed is computed from the turns.

The rival of a table is the fastest int8 engine at full depth. Ratios are medians over the turns,
and means over the seeds.
"""

from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from drawing import METRICS, TASKS, panels, save

Row = dict[str, Any]
KINDS = {"batched": "in batches", "single": "one at a time"}
HEAD = """\
# int8 against the engines that a user could install instead

Each table is of one processor. *ms* is the time an input: the median over the turns of one run in
which all systems take turns, the mean over seeds. *time saving* is 1 - time / time of the rival,
the fastest int8 engine at full depth. Thresholds of deebert are chosen on the other half of the
rows, from the record of the same precision; "one point" is the largest saving there with a score at
most a point below full depth in float32. "half depth" is a plainly fine-tuned model of half of the
layers. *equal* is the share of exits and of answers that equal the record of all ramps, in batches
and one at a time. Each other engine runs with the batches that are fastest for it, of 1,024 to
8,192 tokens. deebert (onnx) runs int8 in ONNX Runtime."""
SHOWN = {  # systems of the picture: at most six
    ("deebert (onnx)", "int8"): "deebert, int8",
    ("deebert (torch)", "float32"): "deebert, float32",
    ("ONNX Runtime", "int8"): "ONNX Runtime, int8",
    ("OpenVINO", "int8"): "OpenVINO, int8",
    ("CTranslate2", "int8"): "CTranslate2, int8",
    ("half", "int8"): "fastest int8, half the layers",
}


def ms(row: Row, kind: str) -> float:
    return median(row[f"{kind}_ms"])


def rival(entry: Row, kind: str, half: bool = False) -> Row | None:
    """Return the fastest int8 engine at full depth, or at half depth."""
    rows = [
        row
        for row in entry["rows"]
        if row["point"] is None
        and row["precision"] == "int8"
        and row["name"].endswith("half depth") == half
    ]
    return min(rows, key=lambda row: ms(row, kind), default=None)


def time_saving(row: Row, other: Row, kind: str) -> float:
    return 1 - median((np.array(row[f"{kind}_ms"]) / np.array(other[f"{kind}_ms"])).tolist())


def table(entries: list[Row], kind: str) -> list[str]:
    """Return the table of one task and processor; entries are its seeds."""
    columns = ["system", "precision", "exits for", entries[0]["metric"], "ms", "layer saving"]
    columns += ["time saving", "time / layer saving", "equal or batches"]
    lines = [columns, ["---", "---", "---", *["---:"] * 5, "---"]]
    for keys in dict.fromkeys(_key(row) for entry in entries for row in entry["rows"]):
        same = [(e, row) for e in entries for row in e["rows"] if _key(row) == keys]
        savings = [time_saving(row, other, kind) for e, row in same if (other := rival(e, kind))]
        layers = fmean(row["layer_saving"] for _, row in same)
        saving = fmean(savings) if savings else None
        name, precision, point = keys
        lines.append(
            [
                name,
                precision,
                point or "",
                f"{fmean(row['score'] for _, row in same):.4f}",
                f"{fmean(ms(row, kind) for _, row in same):.2f}",
                f"{layers:.1%}",
                "" if saving is None else f"{saving:.1%}",
                "" if saving is None or layers < 0.05 else f"{saving / layers:.2f}",
                "; ".join(dict.fromkeys(row["detail"] for _, row in same)),
            ]
        )
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _key(row: Row) -> tuple[str, str, str | None]:
    return row["name"], row["precision"], row["point"]


def bars(entries: list[Row]) -> list[str]:
    """Return what the engine in int8 reaches against the rivals, for one task and processor."""
    lines = [["", *KINDS.values()], ["---", "---:", "---:"]]
    points = ("no exit", "30%", "40%", "50%", "one point")
    for point in points:
        cells = []
        for kind in KINDS:
            times, savings, names = [], [], set()
            for entry in entries:
                row, other = _ours(entry, point, kind), rival(entry, kind)
                if row is None or other is None:
                    continue
                saving = time_saving(row, other, kind)
                times.append(1 / (1 - saving))
                names.add(row["name"])
                if row["layer_saving"] > 0.05:
                    savings.append(saving / row["layer_saving"])
            if not times:
                cells.append("not measured")
                continue
            ratio = f", time / layer saving {fmean(savings):.2f}" if savings else ""
            cells.append(
                f"{', '.join(sorted(names))}: {fmean(times):.2f} times as fast as the rival{ratio}"
            )
        lines.append([point, *cells])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _ours(entry: Row, point: str, kind: str) -> Row | None:
    """Return the fastest of the engine's runtimes in int8 at a point."""
    rows = [
        row
        for row in entry["rows"]
        if row["name"].startswith("deebert")
        and row["precision"] == "int8"
        and row["point"] == point
    ]
    return min(rows, key=lambda row: ms(row, kind), default=None)


def write(content: list[Row], folder: Path) -> None:
    """Write int8.md and the pictures."""
    lines = [HEAD]
    content = sorted(content, key=_group)
    for (features, task, ramp), group in groupby(content, key=_group):
        entries = [*group]
        has_vnni = {"avx512_vnni", "avx_vnni"} & {*features.split()}
        kind = "with VNNI" if has_vnni else "without VNNI"
        where = entries[0]["environment"]
        name = f"int8-{task}-{ramp}-{'vnni' if has_vnni else 'avx2'}.png"
        seeds = ", ".join(str(entry["seed"]) for entry in entries)
        names = {_best_name(entry, kind_) for entry in entries for kind_ in KINDS}
        lines += [
            "",
            f"## {task}, ramps on {ramp}, a processor {kind}",
            "",
            f"{entries[0]['num_rows']} rows, seeds {seeds}, {entries[0]['threads']} threads of "
            f"{where['cpus']} cores ({where['device']}; {features}), torch "
            f"{where['versions']['torch']}, commit {(where['git_commit'] or 'unknown')[:7]}; "
            f"full depth in float32: {fmean(e['full_score'] for e in entries):.4f}. The rival: "
            f"{', '.join(sorted(names))}.",
            "",
            *(f"`{entry['command']}` ({entry['minutes']:.1f} minutes)  " for entry in entries),
            "",
            *bars(entries),
            "",
            f"![score against milliseconds an input]({name})",
        ]
        for kind_, title in KINDS.items():
            lines += ["", f"### {task}, {title}", "", *table(entries, kind_)]
        picture(entries, folder / name)
    whole = "\n".join(lines) + "\n"
    (folder / "int8.md").write_text(whole)


def _best_name(entry: Row, kind: str) -> str:
    row = rival(entry, kind)
    return f"{row['name']} {KINDS[kind]}" if row else "none"


def _group(entry: Row) -> tuple[str, str, str]:
    return " ".join(entry["features"]), entry["task"], entry["ramp"]


def picture(entries: list[Row], file: Path) -> None:
    """Draw score against milliseconds, in batches and one at a time, of the first seed."""
    entry = entries[0]
    figure, axes = panels(2, 2, 4.4, sharey=True)
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        half = rival(entry, kind, half=True)
        for number, ((name, precision), label) in enumerate(SHOWN.items()):
            rows = [r for r in entry["rows"] if (r["name"], r["precision"]) == (name, precision)]
            rows = [half] if name == "half" and half else rows
            points = sorted((ms(row, kind), row["score"]) for row in rows)
            if points:
                axis.plot(
                    *zip(*points, strict=True), color=f"C{number}", marker="os^Dv*"[number],
                    markersize=9, linestyle="-" if len(points) > 1 else "", label=label,
                )  # fmt: skip
        axis.set(xlabel="milliseconds an input", title=title)
        axis.set_xlim(left=0)
    task, metric = entry["task"], entry["metric"]
    axes[0].set_ylabel(METRICS.get(metric, metric))
    figure.suptitle(
        f"{TASKS.get(task, task)}: further left is faster, further up is better.\n"
        "A line of deebert goes from no exit (right) to more and more early exits (left).",
        fontsize=11,
    )
    save(figure, axes, file)
