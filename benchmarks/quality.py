"""Ways to train the ramps, against each other and against models without early exit, on GLUE.

    python benchmarks/quality.py --root DIR [--tasks mrpc rte ...] [--recipes two_stage joint ...]
        [--seeds 1 2 3] [--out runs/quality] [--report-only]

A recipe is a chain of commands, each of which goes on from the run of the one before; a cell is a
recipe on a task with a seed. Recipes that begin alike share these runs. A finished cell is kept in
quality.json and not made again unless its commands or rows change, so this can be stopped at any
time. A cell that fails is told at the end, and tried again at the next start.
Knows nothing of how to train; what is measured comes from the records that the runs leave.
"""

import argparse
import contextlib
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import quality_report
import torch
from omegaconf import OmegaConf
from quality_report import GRID, TARGETS

from deebert.data import loading
from deebert.data.tasks import Task
from deebert.disk import whole_files
from deebert.errors import UserError
from deebert.exits import calibration, curves, rules
from deebert.exits.calibration import Infeasible
from deebert.exits.records import Record
from deebert.exits.target import Target
from deebert.hub import record_files
from deebert.reporting import report

HERE = Path(__file__).parent
PYTHON = [sys.executable]
if shutil.which("setpriv"):  # a training that outlives a killed benchmark would slow the next one
    PYTHON = ["setpriv", "--pdeathsig", "KILL", *PYTHON]


class Size(NamedTuple):
    """What two CPU cores can do: epochs of both stages, and most rows to train on."""

    epochs: int
    ramp_epochs: int
    rows: int | None = None


TASKS = {
    "mrpc": Size(3, 10),
    "rte": Size(4, 10),
    "cola": Size(3, 5),
    "sst2": Size(1, 3, 20_000),
    "mnli": Size(1, 5, 10_000),
    "qqp": Size(1, 5, 10_000),
    "stsb": Size(2, 10),  # a regression: no entropy to leave by, so not among those compared
}
VALIDATION_ROWS = 2000  # at most
STAGE1 = (
    "train.py stage=1 backbone=minilm stages.1.batch_size=16 stages.1.lr=8e-5 stages.1.warmup=0.1 "
    "data.calibration_size=0"
)
STAGE2 = "train.py stage=2 ckpt={last} stages.2.batch_size=16 stages.2.lr=1e-3"
CACHED = f"{STAGE2} stages.2.epochs={{epochs}} stages.2.standardize=true"
# Of every training: one look at the validation rows, at the end, and one checkpoint.
TRAINING = "++trainer.check_val_every_n_epoch=${trainer.max_epochs} ~callbacks.last"
OBJECTIVES = (
    "joint", "weighted", "alternating", "mixed", "distill", "exit_weighted", "equilibrium",
    "detached",
)  # fmt: skip
CUT = "backbone.layers=[{}]"
FIRST = {depth: CUT.format(",".join(map(str, range(1, depth + 1)))) for depth in range(1, 6)}
SPREAD = {2: "3,6", 3: "2,4,6", 4: "1,3,4,6"}  # every other one, as the two papers
DROPPING, PRUNED = f"{STAGE1} stages.1.layer_drop=0.2", "evaluate.py ckpt={last} layers"
STUDENT = f"{STAGE1} teacher={{last}}"

# {last} is the folder of the run before; `commands` adds the task, the seed and TRAINING.
RECIPES: dict[str, tuple[str, ...]] = {
    "plain": (STAGE1,),  # fine-tuning without ramps: what everything is held against
    "two_stage": (STAGE1, f"{CACHED} ramp=first"),
    "two_stage_mean": (STAGE1, f"{CACHED} ramp=mean"),
    "two_stage_pair": (STAGE1, f"{CACHED} ramp=pair"),
    "two_stage_first_and_mean": (STAGE1, f"{CACHED} ramp=first_and_mean"),
    # Cannot be cached, so each epoch runs the backbone: as many as the paper has.
    "two_stage_attention": (STAGE1, f"{STAGE2} stages.2.epochs=3 ramp=attention"),
    "two_stage_cascade": (STAGE1, f"{CACHED} ramp=cascade"),
    "two_stage_learned": (STAGE1, f"{CACHED} ramp=first ramp.predicts=wrong"),  # BERxiT
    "two_stage_mean_learned": (STAGE1, f"{CACHED} ramp=mean ramp.predicts=wrong"),
    "two_stage_distill": (STAGE1, f"{CACHED} ramp=first objective=distill"),
    "two_stage_mean_distill": (STAGE1, f"{CACHED} ramp=mean objective=distill"),
    "two_stage_pair_distill": (STAGE1, f"{CACHED} ramp=pair objective=distill"),
    "two_stage_pair_learned": (STAGE1, f"{CACHED} ramp=pair ramp.predicts=wrong"),
    "two_stage_first_and_mean_distill": (
        STAGE1,
        f"{CACHED} ramp=first_and_mean objective=distill",
    ),
    "two_stage_mean_exit_weighted": (STAGE1, f"{CACHED} ramp=mean objective=exit_weighted"),
    **{name: (f"{STAGE1} objective={name} ramp=first",) for name in OBJECTIVES},
    **{
        f"{name}_{ramp}": (f"{STAGE1} objective={name} ramp={ramp}",)
        for name in OBJECTIVES
        for ramp in ("mean", "pair", "first_and_mean")
    },
    "weighted_shared": (f"{STAGE1} objective=weighted ramp=shared",),  # PABEE
    # Ramps of a backbone that has learned to serve them, trained once more on it, frozen.
    **{
        f"{name}_{ramp}_two_stage": (
            f"{STAGE1} objective={name} ramp={ramp}",
            f"{CACHED} ramp={ramp} objective=ramps",
        )
        for name in OBJECTIVES
        for ramp in ("mean", "pair")
    },
    # Without early exit, a point each: the first layers alone, LayerDrop, a student.
    **{f"cut_{k}": (f"{STAGE1} {first}",) for k, first in FIRST.items()},
    # The first three layers with the ramp of best, fine-tuned for it alone; as three layers cost
    # half of six, for twice as long. A fourth layer stands above it, for its final classifier.
    "pair_cut_3": (
        f"{STAGE1} {FIRST[4]} ramp=pair objective=weighted objective.weights=[0,0,1,0] "
        "stages.1.epochs={twice}",
    ),
    **{f"layer_drop_{k}": (DROPPING, f"{PRUNED}=[{few}]") for k, few in SPREAD.items()},
    **{f"student_{k}": (STAGE1, f"{STUDENT} {CUT.format(few)}") for k, few in SPREAD.items()},
}
# The same runs, left by another rule; best is what the defaults and docs/ramps.md recommend.
RECIPES["best"] = RECIPES["two_stage_pair"]
RECIPES["two_stage_relative"] = RECIPES["two_stage"]
RELATIVE = {"best": ("qqp",), "two_stage_relative": tuple(TASKS)}
ANSWERS = {"pair_cut_3": 3}  # always at this ramp; the others after their last layer
# Runs that others go on from: their checkpoints (0.3 GB) stay.
BEGUN = {steps[:end] for steps in RECIPES.values() for end in range(1, len(steps))}


def commands(recipe: str, task: str, seed: int, overrides: list[str]) -> list[str]:
    """A recipe's commands for a task and seed, without the folders of data and runs."""
    lines = []
    for line in RECIPES[recipe]:
        if line.startswith(STAGE1):  # the others take these from their checkpoint
            line = line.replace("{twice}", str(2 * TASKS[task].epochs))
            epochs = "" if "epochs=" in line else f" stages.1.epochs={TASKS[task].epochs}"
            line += f" task={task} seed={seed}{epochs}"
        line = line.replace("{epochs}", str(TASKS[task].ramp_epochs))
        if line.startswith("train.py"):
            # A stage refuses the settings of the other one.
            here = [o for o in overrides if line.startswith(STAGE1) or "stages.1." not in o]
            line = " ".join([line, TRAINING, *here])
        lines.append(f"{line} logger=csv")
    return lines


@cache
def subset(name: str, root: str, out: Path) -> tuple[Path, dict[str, Any], float | None]:
    """The rows of a task that are used: their folder, how many they are and their digest, and the
    score on those of (the first) validation if all get the same answer, the one that scores best.
    """
    values: Any = OmegaConf.to_object(
        OmegaConf.load(HERE.parent / "conf" / "task" / f"{name}.yaml")
    )
    task = Task.from_config(values)
    frames: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    floor = None
    for split in filter(None, (task.train, *task.validation)):
        if split != task.train and not loading.exists(task, split, root):
            continue  # not all have MNLI's second one
        data = loading.load(task, split, root)
        most = TASKS[name].rows if split == task.train else VALIDATION_ROWS
        chosen = sorted(np.random.default_rng(0).permutation(len(data))[:most].tolist())
        names = {"label": task.label} | dict(zip(("text_a", "text_b"), task.columns, strict=False))
        frames[split] = data.select(chosen).to_pandas().rename(columns=names)
        rows[split] = len(chosen)
        if split == task.validation[0] and not task.is_regression:
            labels = torch.tensor(data.select(chosen)["label"][:])
            same = [torch.full_like(labels, answer) for answer in range(task.num_labels)]
            floor = max(task.score(answers, labels) for answers in same)
    digest = _digest("".join(frame.to_csv() for frame in frames.values()))
    folder = out / "data" / f"{name}-{digest}"
    if not folder.exists():
        part = folder.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        for split, frame in frames.items():
            frame.to_parquet(part / f"{split}.parquet")
        part.rename(folder)
    return folder, rows | {"digest": digest}, floor


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Runs:
    """Run folders by the commands that made them. A folder gets its name when it is complete."""

    def __init__(self, out: Path, again: bool) -> None:
        self.out, self.again = out, again
        self.made: dict[Path, str] = {}  # at this start, and why it failed ("": it did not)

    def folder(self, lines: list[str], name: str, data: Path, weights: bool) -> Path:
        """The run folder of the last of these commands, made if it (or its weights) is not there.

        Raises:
            UserError: this command or one before it failed, with its last line.
        """
        folder = self.out / f"{name}-{_digest('|'.join([data.name, *lines]))}"
        if self.made.get(folder):
            raise UserError(self.made[folder])
        there = (folder / "checkpoints" if weights else folder).exists()
        if there and (folder in self.made or not self.again):
            return folder
        line = lines[-1]
        if "{last}" in line:
            line = line.replace("{last}", str(self.folder(lines[:-1], name, data, True)))
        part, log = folder.with_suffix(".part"), folder.with_suffix(".log")
        shutil.rmtree(part, ignore_errors=True)
        command = [*line.split(), f"data.root={data}", f"hydra.run.dir={part}"]
        print(f"  {shlex.join(command)}", flush=True)
        with log.open("w") as to:
            code = subprocess.run(
                [*PYTHON, *command], cwd=HERE.parent, stdout=to, stderr=to
            ).returncode
        if code:
            log_lines = [
                f"exit code {code}",
                *log.read_text().splitlines(),
            ]  # Hydra indents details
            errors = [t for t in log_lines if t and t[0] != " " and "HYDRA_FULL" not in t]
            self.made[folder] = errors[-1].removeprefix("Error: ")
            raise UserError(self.made[folder])
        if not weights:
            shutil.rmtree(part / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        self.made[part.rename(folder)] = ""
        return folder


def trade_off(
    record: Record, task: Task, reads_tokens: bool, exit: str | None = None
) -> dict[str, Any]:
    """Score against saving, with thresholds chosen on other rows: by the exit rule of this name, or
    the learned exit score where the ramps have one, or the default rule.

    Returns:
        `rule`: its name; `ramps`: metrics of each; `targets`: by target saving, the saving and
        metrics found with cross-fitted thresholds; `curve`: scores at the savings of GRID, on
        straight lines between such points, full depth and the first ramp for all; `area`: the mean
        of these lines; `half_the_work`: saving and metrics where half of the operations of full
        depth are saved (`work`), empty where they cannot be.
    """
    ramps, most = curves.ramp_table(record, task), 1 - 1 / record.num_layers
    points, targets = {0.0: ramps[-1].score, most: ramps[0].score}, {}
    learned = record.learned_score_NL is not None
    exit = exit or ("learned" if learned else None)
    rule = rules.named(exit, task.num_labels) if exit else rules.default(task.num_labels)
    for saving in [saving for saving in GRID[1:] if saving < most]:
        target = Target(target_saving=saving)
        try:
            seen = calibration.calibration(None, [record], task, rule, target).measured
        except Infeasible:  # a rule that must see two ramps before it lets go
            break
        points[seen.expected_saving] = seen.score
        if saving in TARGETS:
            targets[str(saving)] = {"saving": seen.expected_saving, **seen.scores}
    savings, scores = zip(*sorted(points.items()), strict=True)
    curve = np.interp(np.array(GRID), savings, scores)
    area = ((curve[1:] + curve[:-1]) / 2).mean().item()
    measures = {"rule": rule.name, "targets": targets, "curve": curve.tolist(), "area": area}
    measures["half_the_work"] = {}
    target = Target(target_speedup=2.0, costs=work(record.num_layers, reads_tokens))
    with contextlib.suppress(Infeasible):
        seen = calibration.calibration(None, [record], task, rule, target).measured
        measures["half_the_work"] = {"saving": seen.expected_saving, **seen.scores}
    return {"ramps": [ramp.scores for ramp in ramps], **measures}


def work(num_layers: int, reads_tokens: bool) -> tuple[float, ...]:
    """What leaving at each layer costs, as a share of full depth.

    About k - 5/6 layers where the ramp reads the first token, which can be computed alone, before
    the others are asked for; k where it reads them all (`flops.first_token_first`). The final
    classifier reads the first token: full depth is L - 5/6.
    """
    layers = [k if reads_tokens else k - 5 / 6 for k in range(1, num_layers)]
    return tuple(each / (num_layers - 5 / 6) for each in [*layers, num_layers - 5 / 6])


def cell(runs: Runs, settings: dict[str, Any], name: str, data: Path) -> dict[str, Any]:
    """Make the runs of a cell; what the last one's record says, and the seconds of each."""
    recipe, lines = settings["recipe"], settings["commands"]
    folder, seconds = runs.folder(lines, name, data, RECIPES[recipe] in BEGUN), []
    for end in range(1, len(lines) + 1):
        log = runs.folder(lines[:end], name, data, end < len(lines)) / "train.log"
        matches = re.findall(r"trained in ([\d.]+) s", log.read_text() if log.exists() else "")
        seconds.append(float(matches[-1]) if matches else 0.0)
    results = json.loads((folder / "results.json").read_text())
    depth = ANSWERS.get(recipe, results["num_layers"])
    measures = {"metric": results["metric"], "num_layers": depth, "seconds": seconds}
    measures["full"] = results["exits"][depth - 1]["scores"]
    if recipe in ANSWERS:
        return measures | {"operations": depth}  # its ramp reads all tokens
    if "trade_off" not in results:  # its ramps are not trained
        return measures
    record, header = record_files.load(folder / "records" / f"{results['split']}.safetensors")
    config = header.config
    reads_tokens = config.ramp_kind.reads_tokens
    return measures | trade_off(record, config.task, reads_tokens, settings.get("rule"))


def save(content: dict[str, Any], file: Path) -> None:
    """A line a cell."""
    rounded = json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 5))
    kinds = []
    for kind, entries in rounded.items():
        lines = [f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries)]
        kinds.append(f'"{kind}": {{\n' + ",\n".join(lines) + "\n}")
    whole_files.replace(file, "{" + ",\n".join(kinds) + "}\n")


def load(file: Path) -> dict[str, Any]:
    """Commands and machines; the last line of cells that failed; those that are finished; the score
    of a constant answer, by task."""
    content = json.loads(file.read_text()) if file.exists() else {}
    return {kind: content.get(kind, {}) for kind in ("starts", "failed", "cells", "floors")}


def run_all(given: argparse.Namespace, file: Path) -> list[str]:
    """Make all cells that are asked for and not there; returns those that failed."""
    out, failed = given.out.absolute(), []
    out.mkdir(parents=True, exist_ok=True)
    runs = Runs(out, given.again)
    start = {"command": given.command, "environment": vars(report.environment())}
    number = _digest(json.dumps(start))
    recipes = dict.fromkeys(["plain", *given.recipes])  # all is told in % of plain
    for seed, task, recipe in product(given.seeds, given.tasks, recipes):
        new: dict[str, Any] = {"task": task, "recipe": recipe, "seed": seed}
        key, kind, floor = f"{task} {recipe} {seed}", "cells", None
        needs_classes = recipe in RELATIVE or "exit_weighted" in recipe
        if task == "stsb" and needs_classes:
            continue
        there = load(file)["cells"].get(key, {})
        try:
            data, rows, floor = subset(task, str(Path(given.root).absolute()), out)
            lines = commands(recipe, task, seed, given.overrides)
            new |= {"commands": lines, "rows": rows}
            if recipe in RELATIVE:
                new["rule"] = "relative_entropy" if task in RELATIVE[recipe] else "entropy"
            whole = "area" not in there or there.keys() >= {"rule", "half_the_work"}
            if not given.again and whole and new.items() <= there.items():
                continue
            print(key, flush=True)
            made = new | cell(runs, new, f"{task}-{seed}", data)
        except (UserError, OSError, ValueError, LookupError) as error:
            made, kind = new | {"error": str(error)}, "failed"
            failed.append(f"failed: {key}: {error}")
            print(f"  failed: {error}", flush=True)
        content = load(file)  # again: another process may have written to it meanwhile
        content["failed"].pop(key, None)
        if not new.items() <= there.items():  # what is there is of other rows or commands
            content["cells"].pop(key, None)
        content[kind][key] = made | {"start": number}
        content["starts"][number] = start
        content["floors"] |= {} if floor is None else {task: floor}
        save(content, file)
    return failed


def _apart(word: str) -> list[str]:
    """An option and its value, also where they are written as one word."""
    return word.split("=", 1) if word.startswith(("--root=", "--out=", "--results=")) else [word]


def public_command(arguments: list[str]) -> str:
    """The command for anyone to repeat: without the folders of this machine."""
    words = iter([part for word in arguments for part in _apart(word)])
    kept = ["python", "benchmarks/quality.py"]
    for word in words:
        if word in ("--root", "--out", "--results"):
            next(words, None)
            kept += ["--root", "DIR"] if word == "--root" else []
        else:
            kept.append(word)
    return shlex.join(kept)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder with the GLUE files (data.root)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "quality", help="runs")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of quality.json")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--overrides", nargs="*", default=[], help="for every train.py")
    parser.add_argument("--again", action="store_true", help="make finished cells again, too")
    parser.add_argument("--report-only", action="store_true", help="only write the report again")
    given = parser.parse_args(arguments)
    if not given.root and not given.report_only:
        parser.error("--root=DIR is missing: the folder with the GLUE files")
    if given.overrides and given.results == HERE:
        parser.error("--overrides makes other cells than those of the table: say --results=DIR")
    given.command = public_command(sys.argv[1:] if arguments is None else arguments)
    file, failed = given.results / "quality.json", []
    try:
        if not given.report_only:
            failed = run_all(given, file)
    except KeyboardInterrupt:
        failed = ["stopped: the same command goes on from here"]
    quality_report.write(load(file), given.results)
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
