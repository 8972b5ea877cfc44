"""The test of drift on real exits: false alarms, delay after a change, and a kept saving.

    python benchmarks/drift.py --root DIR --pairs RUN:cola RUN:qqp [--streams 200] [--rows 20000]

RUN is a stage-2 run; the word after it is the task of GLUE whose texts come after a change. DIR
holds GLUE. The rows are those of the training file that neither stage trained on, and the test rows
where these are few. For each stream calibration rows are drawn from them anew, the threshold of
`target_saving=0.4` is chosen on these, and the other rows are the stream, without replacement. The
test is looked at after every batch of 32 rows. Writes drift.json, drift.md and drift.png.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from deebert.classifier import EarlyExitClassifier
from deebert.exits import curves, rules
from deebert.exits.curves import OperatingPoint
from deebert.exits.drift import BROKEN, CELLS, LEVELS, DriftTest
from deebert.exits.drift_monitor import SavingFollower
from deebert.exits.records import Record
from deebert.reporting import report

HERE = Path(__file__).parent
SAVING = 0.4
BATCH = 32
MOST = 24_000  # rows of the own domain
BEFORE, AFTER = 1000, 3000  # rows of a stream before and after a change of domain


def unseen(root: Path, classifier: EarlyExitClassifier) -> list[Any]:
    """Return the texts of rows that no stage of a run trained on."""
    config, task = classifier.saved.checkpoint.config, classifier.task
    train = pq.read_table(root / task.name / "train.parquet").to_pylist()
    import datasets

    order = datasets.Dataset.from_dict({"row": range(len(train))}).shuffle(seed=0)["row"][:]
    rows = [train[row] for row in order[config.data.limit_train or len(train) :]]
    held_out = [train[row] for row in order[len(train) - config.data.calibration_size :]]
    rows += [] if rows else held_out
    if len(rows) < 10_000:
        rows += pq.read_table(root / task.name / "test.parquet").to_pylist()
    return texts(rows[:MOST], task.columns)


def texts(rows: list[dict[str, Any]], columns: Any) -> list[Any]:
    return [tuple(row[name] for name in columns) for row in rows]


def others(root: Path, name: str) -> list[Any]:
    """Return texts of another task."""
    columns = {"cola": ["sentence"], "qqp": ["question1", "question2"]}[name]
    rows = pq.read_table(root / name / "train.parquet").slice(0, 6000).to_pylist()
    return texts(rows, columns)


def record_of(classifier: EarlyExitClassifier, given: list[Any]) -> Record:
    """Return the logits of every ramp, from the engine at full depth."""
    engine = classifier.engine.at(0.0)
    logits = engine.run(classifier.encode(given), all_ramps=True).ramps_NLC
    assert logits is not None
    index = torch.arange(len(given))
    return Record("unseen", logits, None, index, torch.ones(len(given), dtype=torch.long))


class Streams:
    """Draws calibration rows and streams from the records of a run."""

    def __init__(self, own: Record, other: Record, num_labels: int, calibration: int) -> None:
        self.own, self.other, self.calibration = own, other, calibration
        self.rule = rules.default(num_labels)
        self.num_layers = own.num_layers

    def cells(self, record: Record, rows: np.ndarray, threshold: float) -> np.ndarray:
        point = OperatingPoint(self.rule, threshold)
        return curves.exits_of(record.rows(torch.from_numpy(rows)), point)

    def draw(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        random = np.random.default_rng(seed)
        order = random.permutation(len(self.own))
        return order[: self.calibration], order[self.calibration :], random

    def threshold(self, rows: np.ndarray, saving: float) -> float:
        scores = curves.exit_scores_of(self.rule, self.own.rows(torch.from_numpy(rows)))
        return float(curves.thresholds_for(scores.score_NL, [saving])[0])

    def test(self, rows: np.ndarray, threshold: float, seed: int) -> DriftTest:
        known = self.cells(self.own, rows, threshold)
        return DriftTest(known, self.num_layers * CELLS, seed)

    def alarms(self, seed: int, num: int) -> dict[str, bool]:
        """Say which levels a stream without drift ever reaches."""
        calibration, rest, _ = self.draw(seed)
        threshold = self.threshold(calibration, SAVING)
        test = self.test(calibration, threshold, seed)
        stream = self.cells(self.own, rest[:num], threshold)
        for start in range(0, len(stream), BATCH):
            test.update(stream[start : start + BATCH])
        return {name: test.largest * level >= 1 for name, level in LEVELS.items()}

    def changed(self, seed: int) -> dict[str, Any]:
        """Change the domain, and return the texts until an alarm, and the saving."""
        calibration, rest, random = self.draw(seed)
        threshold = self.threshold(calibration, SAVING)
        test = self.test(calibration, threshold, seed)
        before = self.cells(self.own, rest[:BEFORE], threshold)
        test.update(before)
        early = test.state
        rows = random.permutation(len(self.other))[:AFTER]
        after = self.cells(self.other, rows, threshold)
        delays: dict[str, int | None] = dict.fromkeys(LEVELS)
        for start in range(0, len(after), BATCH):
            test.update(after[start : start + BATCH])
            for name, level in LEVELS.items():
                if delays[name] is None and test.largest * level >= 1:
                    delays[name] = start + BATCH
        saved = 1 - (after // CELLS + 1) / self.num_layers
        return {"before": early, "delays": delays, "saving": float(saved.mean())} | self.followed(
            calibration, rows, delays[BROKEN]
        )

    def followed(
        self, calibration: np.ndarray, rows: np.ndarray, since: int | None
    ) -> dict[str, Any]:
        """Return the saving of the rows from 500 texts after the alarm on, thresholds following."""
        if since is None:
            return {"followed": None}
        follower, saved = SavingFollower(SAVING), []
        savings = [round(SAVING - 0.25 + step / 100, 2) for step in range(51)]
        thresholds = {each: self.threshold(calibration, each) for each in savings}
        for start in range(since, len(rows), BATCH):
            some = rows[start : start + BATCH]
            layers = self.cells(self.other, some, thresholds[follower.rounded]) // CELLS + 1
            saved += (1 - layers / self.num_layers).tolist()
            follower.update(saved[-len(some) :])
        return {"followed": float(np.mean(saved[500:]))}


def measured(root: Path, pair: str, given: argparse.Namespace) -> dict[str, Any]:
    run, _, other = pair.partition(":")
    start = time.perf_counter()
    classifier = EarlyExitClassifier.from_pretrained(run)
    texts_of_own = unseen(root, classifier)
    own = record_of(classifier, texts_of_own)
    calibration = min(1000, len(own) // 4)
    labels = own.logits_NLC.shape[2]
    streams = Streams(own, record_of(classifier, others(root, other)), labels, calibration)
    num = min(given.rows, len(own) - calibration)
    print(f"{pair}: {len(own)} rows, streams of {num}", flush=True)
    alarms = [streams.alarms(seed, num) for seed in range(given.streams)]
    changes = [streams.changed(10_000 + seed) for seed in range(given.streams)]
    return {
        "task": classifier.task.name,
        "other": other,
        "calibration_rows": calibration,
        "unseen_rows": len(own),
        "stream_rows": num,
        "streams": given.streams,
        "alarms": {name: sum(each[name] for each in alarms) for name in LEVELS},
        "changes": changes,
        "minutes": (time.perf_counter() - start) / 60,
    }


def median(values: list[int | None]) -> float:
    return float(np.median([np.inf if each is None else each for each in values]))


def in_words(num: float) -> str:
    return "not noticed" if num == np.inf else f"{num:.0f}"


def write(content: dict[str, Any], command: str) -> None:
    (HERE / "drift.json").write_text(json.dumps(content, indent=1) + "\n")
    about = content["environment"]
    lines = [
        "# Drift on real exits",
        "",
        "The test says *drifting* at the level .05, and *guarantee no longer holds* at .005. It",
        "looks at a stream after every batch. A stream without drift has rows that no stage",
        "trained on, drawn without replacement. Calibration rows are drawn from them anew for each",
        "stream, and the threshold of a saving of 40 % is chosen on these. After a change the",
        "texts are those of another task. The test has the whole level; in a service the first",
        "target has half of it.",
        "",
        f"`{command}`. Each draw has a seed of its own; the models are of seed 1. "
        f"{about['cpus']} CPU cores ({about['platform']}), torch {about['versions']['torch']}.",
        "",
        "| no drift | calibration rows | streams of | *drifting* | *no longer holds* | allowed |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in content["rows"]:
        counts = [f"{row['alarms'][name]} of {row['streams']}" for name in LEVELS]
        lines.append(
            f"| {row['task']} | {row['calibration_rows']:,} | {row['stream_rows']:,} rows | "
            f"{counts[0]} | {counts[1]} | 5 % and 0.5 % of the streams, in the mean |"
        )
    lines += [
        "",
        "| change | texts until *drifting* | until *no longer holds* (medians) | 90 % within | "
        "missed | saving after it | *followed* | within 2 points |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in content["rows"]:
        delays = {name: [each["delays"][name] for each in row["changes"]] for name in LEVELS}
        late = np.quantile(
            [np.inf if n is None else n for n in delays[BROKEN]], 0.9, method="lower"
        )
        followed = [each["followed"] for each in row["changes"] if each["followed"] is not None]
        near = sum(abs(each - SAVING) <= 0.02 for each in followed)
        medians = [in_words(median(delays[name])) for name in LEVELS]
        lines.append(
            f"| {row['task']} to {row['other']} | {medians[0]} | {medians[1]} | {in_words(late)} | "
            f"{delays[BROKEN].count(None)} of {row['streams']} | "
            f"{np.mean([each['saving'] for each in row['changes']]):.1%} | "
            f"{np.mean(followed) if followed else float('nan'):.1%} | {near} of {len(followed)} |"
        )
    lines += [
        "",
        "*followed* is the saving from 500 texts after the alarm on, with `recalibrate=saving`.",
        "",
        "![texts until the alarm](drift.png)",
    ]
    (HERE / "drift.md").write_text("\n".join(lines) + "\n")
    draw(content["rows"])


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw the share of the streams whose change has been noticed, by the number of texts."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for row in rows:
        delays = sorted(each["delays"][BROKEN] or np.inf for each in row["changes"])
        shares = 100 * np.arange(1, len(delays) + 1) / len(delays)
        axis.step([0, *delays], [0, *shares], where="post", lw=2,
                  label=f"{row['task'].upper()} to {row['other'].upper()}")  # fmt: skip
    axis.axvline(500, color="0.5", ls=":", label="500 texts")
    axis.set(xlim=(0, 1500), ylim=(0, 100), xlabel="texts after the change",
             ylabel="% of streams with an alarm",
             title='How soon the test says "guarantee no longer holds"')  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(HERE / "drift.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", required=True, help="RUN:TASK")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rows", type=int, default=20_000)
    given = parser.parse_args()
    rows = [measured(given.root, pair, given) for pair in given.pairs]
    pairs = " ".join(f"RUN:{pair.partition(':')[2]}" for pair in given.pairs)
    command = f"python benchmarks/drift.py --root DIR --pairs {pairs} --streams {given.streams}"
    write({"environment": vars(report.environment()), "rows": rows}, command)


if __name__ == "__main__":
    main()
