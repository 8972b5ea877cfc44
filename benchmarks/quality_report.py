"""quality.json -> quality.md and quality.png: which recipe is better, where, and how sure that is.

All that is printed is computed here from the cells. Knows nothing of models or records.
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from drawing import METRICS, TASKS, panels, save

from deebert.data.metrics import REGRESSION

GRID = [step / 50 for step in range(41)]  # savings from 0 to 0.8
TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
REFERENCE = "two_stage"
RECOMMENDED = "best"
FEW = 3  # seeds; with fewer, a row is a screening
ALL_AT_ONE = ("ramp",)
SHOWN = {  # systems of the picture, at most six: their recipes (the first that was run), and mark
    "deebert, recommended ramps": (("best", "two_stage_pair"), ""),
    "deebert, the paper's ramps": (("two_stage",), ""),
    "recommended ramps, all inputs at one ramp": (ALL_AT_ONE, "."),
    "fine-tuned, all layers, no ramps": (("plain",), "o"),
    "fine-tuned, first layers only": (("cut",), "x"),
    "distilled into fewer layers": (("student",), "s"),
}
TOKEN = 5 / 6  # of the last layer is spared where only its first token is read (docs/clock.md)
Cell = dict[str, Any]
Value = Callable[[Cell], float | None]

READING = """\
Scores are the task's headline metric on validation rows. *area*: the mean score over savings from 0
to 80 % of the layers, on straight lines between points 2 % apart. There, and in the columns
*at ...*, thresholds were chosen for that saving on other rows than those they are scored on (cross-
fitted in 5 folds): of the entropy; in *relative*, and in *best* on qqp (F1 of the rarer class), of
the entropy relative to a prior that those rows choose; in recipes with *learned* of the learned
exit score, elsewhere in stsb of the change from ramp to ramp (which lets nothing go at ramp 1;
beyond that the curve is a line to it).
*half the work*: where half of the operations of full depth are saved: a ramp on the first token
costs k - 5/6 layers, one that reads all tokens k (docs/clock.md). *%*: of the score of plain
fine-tuning, without ramps, of the same task and seed. *area - two_stage*: paired by seed, and how
many seeds are better. ±: sample standard deviation over seeds. **screening**: fewer than 3 seeds,
so that a difference may be chance. *seconds*: of training, all runs of the recipe, on a machine
that may have done more."""
BASELINES = """\
Without early exit, a point each; beside it *best* at the same saving and with the same seeds (where
that was not run the recipe that scores best there; chosen by looking, which flatters it a bit):"""

RIVALS = f"""\
What does the same for every input, beside *{RECOMMENDED}* of the tasks and seeds that both were run
on; a task's score is the mean over its seeds. *ramp k*: the same ramps, but all leave at the k-th:
the difference is early exit's own. *pair_cut*: the first layers with such a ramp, fine-tuned for it
alone. *cut*, *layer_drop*, *student*: models of fewer layers; as in plain fine-tuning, what answers
reads the first token, so of their last layer 5/6 are not computed. *{RECOMMENDED}* stands here
twice: where its mean exit layer is their number of layers, and where it computes no more layers
than they do, *operations* being what that is of full depth. *constant*: the same answer to all, the
one that scores best."""


class Fixed(NamedTuple):
    """What does the same for every input, with one seed: its score, its layers, and as how many it
    computes."""

    score: float
    layers: int
    computed: float


class TaskCells:
    """The cells of a task, by recipe and seed; `floor` is what a constant answer scores."""

    def __init__(self, name: str, cells: list[Cell], floor: float | None) -> None:
        self.name, self.floor = name, floor
        self.of: dict[str, dict[int, Cell]] = {}
        for cell in cells:
            if cell["task"] == name:
                self.of.setdefault(cell["recipe"], {})[cell["seed"]] = cell
        self.plain = self.of.get("plain", {})
        self.metric = next((cell["metric"] for cell in cells if cell["task"] == name), "")
        kinds = {recipe: "area" in next(iter(of.values())) for recipe, of in self.of.items()}
        exits = [recipe for recipe in kinds if kinds[recipe]]
        self.exits = sorted(exits, key=lambda recipe: -mean(self.values(recipe, area)))
        self.points = sorted(recipe for recipe in kinds if not kinds[recipe])

    def values(self, recipe: str, value: Value) -> list[float]:
        numbers = [value(cell) for cell in self.of[recipe].values()]
        return [each for each in numbers if each is not None]

    def share(self, part: float | None, seed: int) -> float | None:
        """In % of plain fine-tuning with the same seed, where that is there and not 0."""
        full = score(self.plain[seed]) if seed in self.plain else 0
        return None if part is None or full == 0 else 100 * part / full

    def relative(self, recipe: str, value: Value) -> list[float]:
        """The same of all seeds."""
        return self.values(recipe, lambda cell: self.share(value(cell), cell["seed"]))

    def differences(self, recipe: str) -> list[float]:
        """Area less the reference's, of the seeds that both have."""
        theirs = {} if recipe == REFERENCE else self.of.get(REFERENCE, {})
        mine = self.of[recipe]
        return [mine[seed]["area"] - theirs[seed]["area"] for seed in mine if seed in theirs]

    def saving(self, recipe: str) -> float:
        """Of a baseline that has fewer layers than plain fine-tuning."""
        [mine, full] = (next(iter(cells.values())) for cells in (self.of[recipe], self.plain))
        return 1 - mine["num_layers"] / full["num_layers"]

    def fixed(self) -> dict[str, dict[int, Fixed]]:
        """The baselines, and the recommended recipe if all leave at the same ramp, by seed."""
        points: dict[str, dict[int, Fixed]] = {}
        for recipe in [recipe for recipe in self.points if recipe != "plain"]:
            for seed, cell in self.of[recipe].items():
                layers = cell["num_layers"]
                computed = cell.get("operations", layers - TOKEN)
                points.setdefault(recipe, {})[seed] = Fixed(score(cell), layers, computed)
        for seed, cell in self.of.get(RECOMMENDED, {}).items():
            for k, ramp in enumerate(cell["ramps"][1:-1], 2):  # at the first, early exit is it
                its = Fixed(ramp[cell["metric"]], k, k)
                points.setdefault(f"ramp {k}", {})[seed] = its
        return points

    def against(self, rival: str) -> list[tuple[float, float, float]]:
        """A rival, and the recommended recipe at its saving and at its operations (NaN: it needs
        more), of each seed that both have: in % of plain fine-tuning."""
        mine, theirs = self.of.get(RECOMMENDED, {}), self.fixed().get(rival, {})
        differences = []
        for seed in mine.keys() & theirs.keys():
            its, cell = theirs[seed], mine[seed]
            # An input that leaves at layer k computes k at most: the ramps may read all tokens.
            savings = [1 - layers / cell["num_layers"] for layers in (its.layers, its.computed)]
            best = [at(cell, saving) for saving in savings]
            if its.computed < 1:
                best[1] = math.nan
            shares = [self.share(each, seed) for each in (its.score, *best)]
            if None not in shares:
                differences.append(tuple(shares))
        return differences

    def floor_share(self) -> float | None:
        """What a constant answer scores, in % of plain fine-tuning."""
        shares = [self.share(self.floor, seed) for seed in self.plain]
        known = [share for share in shares if share is not None]
        return mean(known) if known else None

    def best_at(self, saving: float, seeds: set[int]) -> tuple[float, str]:
        """The mean score at a saving of the recommended recipe, or where that lacks these seeds the
        highest of all recipes that have them, and whose it is."""
        scores = {
            recipe: mean(at(self.of[recipe][seed], saving) for seed in seeds)
            for recipe in self.exits
            if seeds <= self.of[recipe].keys()
        }
        if RECOMMENDED in scores:
            return scores[RECOMMENDED], RECOMMENDED
        return max(((value, recipe) for recipe, value in scores.items()), default=(math.nan, "-"))


def score(cell: Cell) -> float:
    return cell["full"][cell["metric"]]


def area(cell: Cell) -> float:
    return cell["area"]


def seconds(cell: Cell) -> float:
    return sum(cell["seconds"])


def score_at(saving: float) -> Value:
    return lambda cell: cell["targets"].get(str(saving), {}).get(cell["metric"])


def half_the_work(cell: Cell) -> float | None:
    return cell.get("half_the_work", {}).get(cell["metric"])


def at(cell: Cell, saving: float) -> float:
    """The score at a saving, on the curve; it ends where all leave at the first ramp."""
    most, inside = 1 - 1 / cell["num_layers"], [s for s in GRID if s < 1 - 1 / cell["num_layers"]]
    scores = [*cell["curve"][: len(inside)], cell["ramps"][0][cell["metric"]]]
    return float(np.interp(saving, [*inside, most], scores))


def spread(values: list[float], form: str = ".3f") -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def seeds(number: int) -> str:
    return str(number) if number >= FEW else f"{number}, screening"


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def exit_table(task: TaskCells) -> list[str]:
    columns = ["recipe", "seeds", "full depth", "%", "area", "%", f"area - {REFERENCE}"]
    rows = []
    for recipe in task.exits:
        differences = task.differences(recipe)
        wins = sum(value > 0 for value in differences)
        difference = f"{spread(differences, '+.3f')} ({wins} of {len(differences)})"
        row = [recipe, seeds(len(task.of[recipe]))]
        for value in (score, area):
            row += [spread(task.values(recipe, value)), spread(task.relative(recipe, value), ".1f")]
        row.append(difference if differences else "-")
        row += [spread(task.relative(recipe, score_at(target)), ".1f") for target in TARGETS]
        row.append(spread(task.relative(recipe, half_the_work), ".1f"))
        rows.append([*row, spread(task.values(recipe, seconds), ".0f")])
    columns += [*(f"at {target:.0%}, %" for target in TARGETS), "half the work, %", "seconds"]
    return markdown(columns, rows)


def ramp_table(task: TaskCells) -> list[str]:
    """What every ramp scores if all leave there."""
    depths = range(1, max(len(cell["ramps"]) for cell in task.of[task.exits[0]].values()) + 1)
    rows = []
    for recipe in task.exits:
        scores = [
            [ramp[cell["metric"]] for ramp in cell["ramps"]] for cell in task.of[recipe].values()
        ]
        rows.append([recipe, *(f"{mean(seen):.3f}" for seen in zip(*scores, strict=True))])
    return markdown(["recipe, all leave at", *(f"ramp {k}" for k in depths)], rows)


def point_table(task: TaskCells) -> list[str]:
    columns = ["baseline", "seeds", "saving", "score", "%", "seconds"]
    rows = []
    for recipe in task.points:
        saving, mine = task.saving(recipe), task.values(recipe, score)
        best, whose = task.best_at(saving, set(task.of[recipe]))
        relative = spread(task.relative(recipe, score), ".1f")
        took = spread(task.values(recipe, seconds), ".0f")
        row = [recipe, seeds(len(mine)), f"{saving:.1%}", spread(mine), relative, took]
        exit_scores = {1: "yes", 0: "equal", -1: "**no**"}.get(np.sign(best - mean(mine)), "-")
        rows.append([*row, whose, f"{best:.3f}", exit_scores])
    return markdown([*columns, "early exit", "its score", "is it better?"], rows)


def over_tasks(tasks: list[TaskCells]) -> list[dict[str, Any]]:
    """Each recipe over the tasks it was run on: those of most tasks first, then of most area.

    Without regressions, which leave by another rule.
    """
    tasks = [task for task in tasks if task.metric not in REGRESSION]
    rows = []
    for recipe in dict.fromkeys(recipe for task in tasks for recipe in task.exits):
        theirs = [task for task in tasks if recipe in task.exits and task.relative(recipe, area)]
        paired = [each for task in theirs if (each := task.differences(recipe))]
        halves = [each for task in theirs if (each := task.relative(recipe, score_at(0.5)))]
        if theirs:
            row: dict[str, Any] = {"recipe": recipe, "tasks": len(theirs)}
            row["seeds"] = min(len(task.of[recipe]) for task in theirs)
            row["better"] = f"{sum(mean(each) > 0 for each in paired)} of {len(paired)}"
            row["area"] = mean(mean(task.relative(recipe, area)) for task in theirs)
            rows.append(row | {"half": spread([mean(map(mean, halves))] if halves else [], ".1f")})
    return sorted(rows, key=lambda row: (-row["tasks"], -row["area"]))


def summary(tasks: list[TaskCells]) -> list[str]:
    columns = ["recipe", "tasks", "fewest seeds", f"tasks with more area than {REFERENCE}"]
    rows = []
    for row in over_tasks(tasks):
        better = "-" if row["recipe"] == REFERENCE else row["better"]
        first = [row["recipe"], str(row["tasks"]), seeds(row["seeds"])]
        rows.append([*first, better, f"{row['area']:.1f}", row["half"]])
    return markdown([*columns, "area, %, mean over tasks", "at 50%, %, mean over tasks"], rows)


def rivals(tasks: list[TaskCells]) -> list[str]:
    """What does the same for every input, against the recommended recipe."""
    columns = ["rival", "saving", "tasks", "fewest seeds", "its score, %", f"{RECOMMENDED}, %"]
    columns += ["better on", "operations", f"{RECOMMENDED} with as many, %", "better on"]
    tasks = [task for task in tasks if task.metric not in REGRESSION]
    rows = []
    for rival in sorted({rival for task in tasks for rival in task.fixed()}):
        met = [(task, pairs) for task in tasks if (pairs := task.against(rival))]
        if not met:
            continue
        its = next(iter(met[0][0].fixed()[rival].values()))
        full = next(iter(met[0][0].plain.values()))["num_layers"]
        scores, *both = zip(*(map(mean, zip(*pairs, strict=True)) for _, pairs in met), strict=True)
        sides = []
        for ours in both:
            better = sum(mine > other for mine, other in zip(ours, scores, strict=True))
            impossible = math.isnan(sum(ours))
            sides += ["-", "-"] if impossible else [f"{mean(ours):.1f}", f"{better} of {len(met)}"]
        row = [rival, f"{1 - its.layers / full:.1%}", str(len(met))]
        row += [seeds(min(len(pairs) for _, pairs in met)), f"{mean(scores):.1f}", *sides[:2]]
        rows.append([*row, f"{its.computed / (full - TOKEN):.1%}", *sides[2:]])
    if floors := [floor for task in tasks if (floor := task.floor_share()) is not None]:
        row = ["constant", "100.0%", str(len(floors)), "-", f"{mean(floors):.1f}"]
        rows.append([*row, "-", "-", "0.0%", "-", "-"])
    return markdown(columns, rows)


def strangers(task: TaskCells) -> list[str]:
    """The cells that should not stand beside the others: of other rows than plain fine-tuning's, or
    made by other commands than the same recipe's with another seed."""
    rows = next(iter(task.plain.values()))["rows"]
    lines = []
    for recipe, cells in task.of.items():
        made = [
            [line.replace(f" seed={seed} ", " ") for line in cell["commands"]]
            for seed, cell in cells.items()
        ]
        for (seed, cell), commands in zip(cells.items(), made, strict=True):
            if cell["rows"] != rows or commands != made[0]:
                lines.append(f"- **of other rows or commands** {task.name} {recipe} {seed}")
    return lines


def conditions(start: dict[str, Any], number: int) -> str:
    where = start["environment"]
    versions, commit = where["versions"], (where["git_commit"] or "unknown")[:7]
    return (
        f"- `{start['command']}`: {number} cells; {where['threads']} threads of {where['cpus']} "
        f"CPU cores ({where['device']}), torch {versions['torch']}, transformers "
        f"{versions['transformers']}, Python {where['python']}, commit {commit}"
    )


def write(content: dict[str, Any], folder: Path) -> None:
    """quality.md and quality.png."""
    cells = sorted(content["cells"].values(), key=lambda cell: cell["seed"])
    names = sorted({cell["task"] for cell in cells if cell["recipe"] == "plain"})
    tasks = [TaskCells(name, cells, content["floors"].get(name)) for name in names]
    lines = ["# Ways to train the ramps", "", READING, "", "![score against saving](quality.png)"]
    lines += ["", "## Over tasks", "", *summary(tasks), "", RIVALS, "", *rivals(tasks)]
    for task in tasks:
        used = next(iter(task.plain.values()))["rows"]
        rows = ", ".join(f"{n} of {split}" for split, n in used.items() if split != "digest")
        lines += ["", f"## {task.name}, {task.metric}", "", f"Rows: {rows}.", ""]
        lines += exit_table(task)
        lines += ["", *ramp_table(task)] if task.exits else []
        lines += ["", BASELINES, "", *point_table(task)]
    lines += ["", "## How it was made", ""]
    for number, start in content["starts"].items():
        if made := sum(cell["start"] == number for cell in cells):
            lines.append(conditions(start, made))
    lines += ["", "The commands of each recipe, here of one task and seed:", ""]
    commands = {cell["recipe"]: cell["commands"] for cell in reversed(cells)}
    lines += [f"- {recipe}: `{'`, `'.join(commands[recipe])}`" for recipe in sorted(commands)]
    lines += [line for task in tasks for line in strangers(task)]
    lines += [f"- **failed** {key}: {cell['error']}" for key, cell in content["failed"].items()]
    (folder / "quality.md").write_text("\n".join(lines) + "\n")
    if tasks:
        picture(tasks, folder / "quality.png")


def picture(tasks: list[TaskCells], file: Path) -> None:
    """Draw score against saving: a panel for each task, a mark for each of `SHOWN`."""
    figure, axes = panels(len(tasks), 3, 2.7)
    savings = [100 * saving for saving in GRID]
    for axis, task in zip(axes, tasks, strict=True):
        for number, (label, (recipes, mark)) in enumerate(SHOWN.items()):
            look = {"color": f"C{number}", "marker": mark, "label": label}
            if recipes == ALL_AT_ONE:
                ramps = [points for name, points in task.fixed().items() if name.startswith("ramp")]
                axis.plot(*_means(task, ramps), linestyle=":", **look)
            elif curves := [recipe for recipe in recipes if recipe in task.exits]:
                curve = np.mean([cell["curve"] for cell in task.of[curves[0]].values()], 0)
                axis.plot(savings, curve, linewidth=2, **look)
            else:
                points = [r for r in task.points if r.startswith(recipes)]
                reached = [100 * task.saving(r) for r in points]
                scores = [mean(task.values(r, score)) for r in points]
                axis.plot(reached, scores, linestyle="", markersize=7, **look)
        axis.set(xlabel="saving (% of layers)", ylabel=METRICS.get(task.metric, task.metric))
        axis.set_title(TASKS.get(task.name, task.name))
        axis.set_xticks(range(0, 81, 20))
    save(figure, axes, file, columns=2)


def _means(task: TaskCells, ramps: list[dict[int, Fixed]]) -> tuple[list[float], list[float]]:
    """Return the savings in % and the mean scores where all inputs leave at the same ramp."""
    if not ramps:
        return [], []
    full = task.of[RECOMMENDED][next(iter(ramps[0]))]["num_layers"]
    savings = [100 * (1 - next(iter(points.values())).layers / full) for points in ramps]
    return savings, [mean(its.score for its in points.values()) for points in ramps]
