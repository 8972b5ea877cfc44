"""Targets and promises on real records: does the saving hold, is the promise kept, what pays?

    python benchmarks/calibration.py RUN [RUN ...] [--draws 1000]

RUN is a folder with records/ in it, left by `python evaluate.py ckpt=...` (also with split=test).
All is arithmetic on these records, some minutes. Writes benchmarks/calibration.json and .md.
"""

import argparse
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deebert.data.tasks import Task
from deebert.evaluation.analysis import analysis
from deebert.exits import calibration, curves, per_ramp_thresholds, risk_control, target
from deebert.exits import rules as exits
from deebert.exits.curves import OperatingPoint
from deebert.exits.records import Record, unlike
from deebert.exits.rules import Rule
from deebert.exits.target import Target
from deebert.hub import record_files
from deebert.reporting import report
from deebert.reporting.blocks import plain

HERE = Path(__file__).parent
SAVINGS = (0.2, 0.3, 0.4, 0.5)
DROPS = (0.01, 0.02, 0.05)
DELTAS = (0.05, 0.1)


def pools(folders: list[Path]) -> Iterable[tuple[str, Task, Record, dict[str, Any]]]:
    """Rows of each task that are alike, labelled and unlabelled ones apart."""
    for folder in folders:
        pools_of = [
            record_files.load(file) for file in sorted((folder / "records").glob("*.safetensors"))
        ]
        reported = next(record for record, _ in pools_of if record.split != "calibration")
        rows = [record for record, _ in pools_of if not unlike(record, reported)]
        run = pools_of[0][1].config
        task, config = run.task, run.plain()
        recipe = {key: config[key] for key in ("seed", "stages", "data")}
        recipe["data"] = {key: v for key, v in config["data"].items() if key != "root"}
        if not task.is_regression:
            yield "+".join(r.split for r in rows), task, join(rows), recipe


def join(parts: list[Record]) -> Record:
    def all_of(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    labels = None if any(p.labels_N is None for p in parts) else all_of("labels_N")
    num_rows = sum(map(len, parts))
    return Record("pool", all_of("logits_NLC"), labels, torch.arange(num_rows), all_of("length_N"))


def halves(record: Record, draw: int) -> tuple[Record, Record]:
    order = torch.randperm(len(record), generator=torch.Generator().manual_seed(draw))
    return record.rows(order[: len(record) // 2]), record.rows(order[len(record) // 2 :])


def savings(task: Task, pool: Record, rule: Rule, draws: int) -> list[dict[str, Any]]:
    """Bar B: thresholds for a saving chosen on one half, measured on the other."""
    rows = []
    for saving in SAVINGS:
        errors, inside, widths = [], 0, []
        for draw in range(draws):
            seen, new = halves(pool, draw)
            operating_point = calibration.choose(seen, task, rule, Target(target_saving=saving))
            layer_N, _ = operating_point(seen, task)
            deviation = (layer_N.double() / pool.num_layers).std(correction=0).item()
            expected = 1 - layer_N.double().mean().item() / pool.num_layers
            low, high = risk_control.mean_interval(expected, deviation, len(seen), len(new))
            layer_N, _ = operating_point(new, task)
            measured = 1 - layer_N.double().mean().item() / pool.num_layers
            errors.append(measured - saving)
            inside += low <= measured <= high
            widths.append((high - low) / 2)
        rows.append(
            {
                "saving": saving,
                "mean_error": float(np.mean(errors)),
                "mean_absolute_error": float(np.mean(np.abs(errors))),
                "inside": inside / draws,
                "half_width": float(np.mean(widths)),
                "rows": len(pool) // 2,
            }
        )
    return rows


def promises(task: Task, pool: Record, rule: Rule, draws: int) -> list[dict[str, Any]]:
    """Bar C: how often a promise is broken, and what it saves, beside others on the same draws.

    Two truths: the whole pool, calibration rows drawn from it with replacement (what the promise
    is about); and the other half of a random split, whose own small number of rows adds noise.
    """
    grid = rule.grid()
    exit_scores = curves.exit_scores_of(rule, pool)
    layer_NT = torch.stack([exits.exit_layer(exit_scores.score_NL, t) for t in grid], 1)
    saving_NT = 1 - layer_NT.double().numpy() / pool.num_layers
    rows = []
    for loss in target.LOSSES if pool.labels_N is not None else ("disagreement",):
        loss_NT = calibration.losses(pool, task, rule, grid, loss).numpy().astype(float)
        for limit in DROPS:
            for delta in DELTAS:
                ways = certified_by(loss, limit, delta)
                size = len(pool) // 2
                if limit < risk_control.smallest_limit(size, delta):
                    continue
                kept: dict[str, list[list[float]]] = {name: [] for name in ways}
                random = np.random.default_rng(0)
                for _ in range(draws):
                    again = random.integers(0, len(pool), size)  # from the pool, with replacement
                    order = random.permutation(len(pool))
                    seen, new = order[:size], order[size:]
                    for name, certify in ways.items():
                        t = certify(loss_NT[again])
                        s = certify(loss_NT[seen])
                        kept[name].append(
                            [
                                t > 0 and loss_NT[:, t - 1].mean() > limit,
                                s > 0 and loss_NT[new, s - 1].mean() > limit,
                                saving_NT[new, s - 1].mean() if s else 0.0,
                            ]
                        )
                for name, kept_pools in kept.items():
                    broken, broken_half, saved = np.mean(kept_pools, 0)
                    rows.append(
                        {
                            "loss": loss,
                            "limit": limit,
                            "delta": delta,
                            "way": name,
                            "rows": size,
                            "broken": float(broken),
                            "broken_on_the_other_half": float(broken_half),
                            "saving": float(saved),
                        }
                    )
    return rows


def certified_by(loss: str, limit: float, delta: float) -> dict[str, Callable[[np.ndarray], int]]:
    """Ways to certify: losses (N, T) -> how many thresholds."""

    def ours(loss_NT: np.ndarray) -> int:
        gains = (loss_NT < 0).sum(0) if loss == "excess" else None
        return risk_control.learn_then_test((loss_NT > 0).sum(0), gains, len(loss_NT), limit, delta)

    def clopper_pearson(loss_NT: np.ndarray) -> int:
        return risk_control.learn_then_test((loss_NT > 0).sum(0), None, len(loss_NT), limit, delta)

    def mapie(loss_NT: np.ndarray) -> int:
        from mapie.risk_control.fwer_control import control_fwer
        from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

        p_values = compute_hoeffding_bentkus_p_value(
            (loss_NT > 0).mean(0), len(loss_NT), limit, binary=True
        ).ravel()
        return len(control_fwer(p_values, delta, "fixed_sequence"))

    def average(loss_NT: np.ndarray) -> int:
        largest = np.maximum.accumulate(loss_NT.clip(0), 1).sum(0)
        return risk_control.conformal_risk(largest, len(loss_NT), limit)

    return {
        "ours": ours,
        "Clopper-Pearson on losses": clopper_pearson,
        "MAPIE": mapie,
        "on average (CRC)": average,
    }


def simulated(draws: int) -> list[dict[str, Any]]:
    """Bar C once more, where the truth is known: a million rows of known ramps."""
    rows = []
    random = np.random.default_rng(0)
    # Chances of a loss and of a gain at 60 thresholds, the risk passing the limit on the way.
    for limit, balance in ((0.01, 0.0), (0.01, 0.8), (0.02, 0.5), (0.02, 0.95), (0.05, 0.8)):
        for size in (400, 1000, 2000):
            risk_T = np.linspace(0, 3 * limit, 60)[1:]
            gain_T = balance * risk_T / (1 - balance)
            for delta in DELTAS:
                broken, last = 0, []
                for _ in range(draws):
                    # One uniform a row: the losses of a row never fall along the thresholds.
                    uniform = random.random(size)
                    losses = (uniform[:, None] < risk_T + gain_T).sum(0)
                    gains = (uniform[:, None] > 1 - gain_T).sum(0)
                    t = risk_control.learn_then_test(losses, gains, size, limit, delta)
                    broken += t > 0 and risk_T[t - 1] > limit
                    last.append(risk_T[t - 1] if t else 0.0)
                rows.append(
                    {
                        "limit": limit,
                        "gains_per_loss": balance,
                        "rows": size,
                        "delta": delta,
                        "broken": broken / draws,
                        "mean_risk": float(np.mean(last)),
                    }
                )
    return rows


def selections(task: Task, pool: Record, rule: Rule, draws: int) -> list[dict[str, Any]]:
    """Bar D: other ways than one global threshold, at equal score on unseen rows.

    All ways choose on one half for a wished saving and are measured on the other. The mean global
    curve over the draws is read at each way's mean score, and at its mean saving.
    """

    def temperature(seen: Record, saving: float) -> OperatingPoint:
        target = Target(target_saving=saving, temperature=True)
        return calibration.choose(seen, task, rule, target)

    def ramps(seen: Record, saving: float) -> OperatingPoint:
        return calibration.choose(seen, task, rule, Target(target_saving=saving, per_ramp=True))

    def always(seen: Record, saving: float) -> OperatingPoint:
        score, right = parts(seen)
        points = per_ramp_thresholds._best(score, right, saving)
        return OperatingPoint(
            rule, ramps(seen, saving).thresholds if points is None else points.tolist()
        )

    def dropped(seen: Record, saving: float) -> OperatingPoint:
        """One threshold, without the ramps whose removal helps most, one after the other."""
        score, right = parts(seen)
        kept = score.copy()
        best, most = None, -1.0
        for _ in range(pool.num_layers - 1):
            tried = []
            for ramp in range(pool.num_layers - 1):
                if not np.isfinite(kept[:, ramp]).any():
                    continue
                without = kept.copy()
                without[:, ramp] = np.inf
                tried.append((worth(without, right, saving), ramp))
            now = worth(kept, right, saving)
            if now[0] > most:
                most, best = now[0], now[1]
            if not tried or max(tried)[0][0] <= most:
                break
            kept[:, max(tried)[1]] = np.inf
        assert best is not None
        return OperatingPoint(rule, best)

    def worth(score: np.ndarray, right: np.ndarray, saving: float) -> tuple[float, list[float]]:
        level = curves.thresholds_for(torch.tensor(score), [saving])[0]
        limits = [
            level if np.isfinite(score[:, i]).any() else 0.0 for i in range(score.shape[1] - 1)
        ]
        layer = exits.exit_layer(torch.tensor(score), limits).numpy() - 1
        if 1 - (layer + 1).mean() / score.shape[1] < saving - 0.005:
            return -1.0, limits
        return float(right[np.arange(len(right)), layer].mean()), limits

    def parts(seen: Record) -> tuple[np.ndarray, np.ndarray]:
        exit_scores = curves.exit_scores_of(rule, seen)
        assert seen.labels_N is not None
        right = task.predict(exit_scores.answer_NLC) == seen.labels_N[:, None]
        return exit_scores.score_NL.float().numpy(), right.double().numpy()

    ways = {
        "per_ramp=true": ramps,
        "per ramp, without cross-validation": always,
        "temperature=true": temperature,
        "one threshold, fewer ramps": dropped,
    }
    savings = np.linspace(0, 1 - 1 / pool.num_layers, 51)
    curve: list[list[tuple[float, float]]] = []
    points: dict[tuple[str, float], list[tuple[float, float, bool]]] = {}
    for draw in range(draws):
        seen, new = halves(pool, draw)
        score_NL = curves.exit_scores_of(rule, seen).score_NL
        levels = curves.thresholds_for(score_NL, savings.tolist())
        curve.append([measure(OperatingPoint(rule, level), new, task) for level in levels])
        for name, way in ways.items():
            for saving in SAVINGS:
                operating_point = way(seen, saving)
                used = (
                    isinstance(operating_point.thresholds, list) or operating_point.rule is not rule
                )
                points.setdefault((name, saving), []).append(
                    (*measure(operating_point, new, task), used)
                )
    mean = np.mean(curve, 0)  # (points, [saving, accuracy])
    rows = []
    for (name, saving), values in points.items():
        saved, accuracy, used = np.mean(values, 0)
        at_saving = float(np.interp(saved, mean[:, 0], mean[:, 1]))
        reached = mean[mean[:, 1] >= accuracy, 0]
        at_score = float(reached.max()) if len(reached) else 0.0
        rows.append(
            {
                "way": name,
                "target": saving,
                "saving": float(saved),
                "accuracy": float(accuracy),
                "used": float(used),
                "accuracy_against_global_at_equal_saving": float(accuracy) - at_saving,
                "saving_against_global_at_equal_accuracy": float(saved) - at_score,
                "standard_error": float(np.std([v[1] for v in values])) / draws**0.5,
            }
        )
    return rows


def measure(operating_point: OperatingPoint, record: Record, task: Task) -> tuple[float, float]:
    layer_N, predictions_N = operating_point(record, task)
    saving = 1 - layer_N.double().mean().item() / record.num_layers
    assert record.labels_N is not None
    return saving, (predictions_N == record.labels_N).double().mean().item()


def ensembles(task: Task, pool: Record) -> list[dict[str, Any]]:
    """Bar F: each ramp alone, the mean of the ramps so far, their vote; and as exit rules."""
    measures = analysis(pool, task)
    table: list[dict[str, Any]] = plain(measures.ensemble)
    for row, ramp in zip(table, measures.error_correlation or [], strict=True):
        row["error_correlation_with_last"] = ramp[-1]
    return table


def rules(task: Task, pool: Record, draws: int) -> list[dict[str, Any]]:
    """Every exit rule at the same wished savings: score on the half that was not chosen on."""
    rows = []
    for name, function in (
        ("entropy", exits.entropy),
        ("probability", exits.probability),
        ("margin", exits.margin),
        ("patience", exits.patience),
        ("confident_patience", exits.confident_patience),
        ("ensemble", exits.ensemble),
        ("vote", exits.vote),
    ):
        rule = Rule(name, function, task.num_labels)
        for saving in SAVINGS:
            values = []
            for draw in range(draws):
                seen, new = halves(pool, draw)
                operating_point = calibration.choose(seen, task, rule, Target(target_saving=saving))
                values.append(measure(operating_point, new, task))
            saved, accuracy = np.mean(values, 0)
            rows.append({"rule": name, "target": saving, "saving": saved, "accuracy": accuracy})
    return rows


def cost() -> list[dict[str, Any]]:
    """Bar E: seconds and memory for any target on 40,000 rows x 12 ramps x 3 labels."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (40_000,), generator=random)
    noise = 1.5 * torch.randn(40_000, 12, 3, generator=random)
    depth = torch.linspace(0.5, 3, 12)[:, None] * torch.rand(40_000, 1, 1, generator=random)
    logits = noise + 1.5 * depth * torch.nn.functional.one_hot(labels, 3)[:, None]
    record = Record("pool", logits, labels, torch.arange(40_000), torch.ones(40_000))
    task = Task("x", ("text",), ("a", "b", "c"), ("accuracy",))
    targets = {
        "target_saving=0.4": Target(target_saving=0.4),
        "target_saving=0.4 per_ramp=true": Target(target_saving=0.4, per_ramp=True),
        "target_saving=0.4 temperature=true": Target(target_saving=0.4, temperature=True),
        "max_drop=0.01": Target(max_drop=0.01),
        "max_drop=0.01 loss=disagreement": Target(max_drop=0.01, loss="disagreement"),
        "max_drop=0.01 confidence=null": Target(max_drop=0.01, confidence=None),
    }
    rows = []
    for name, wanted in targets.items():
        start = time.perf_counter()
        calibration.choose(record, task, exits.default(3), wanted)
        rows.append({"target": name, "seconds": time.perf_counter() - start})
    return rows


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def table(rows: list[dict[str, Any]]) -> list[str]:
    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    columns = list(rows[0])
    return [
        f"| {' | '.join(column.replace('_', ' ') for column in columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(cell(row[column]) for column in columns)} |" for row in rows),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders with records/ in them")
    parser.add_argument("--draws", type=int, default=1000)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    risk_control.p_value = functools.cache(
        risk_control.p_value
    )  # the same few counts come again and again
    content: dict[str, Any] = {"environment": vars(report.environment()), "draws": given.draws}
    content["cost"] = cost()  # first, so that the peak is its own
    content["cost_peak_mib"] = peak_mib()
    print(json.dumps(content["cost"], indent=1), content["cost_peak_mib"], flush=True)
    content["simulated"] = simulated(given.draws)
    tasks: dict[str, dict[str, Any]] = {}
    for splits, task, pool, config in pools(given.runs):
        print(task.name, splits, len(pool), flush=True)
        rule = exits.default(task.num_labels)
        entry = tasks.setdefault(f"{task.name}, {splits}", {"rows": len(pool), "config": config})
        entry["savings"] = savings(task, pool, rule, 200)
        entry["promises"] = promises(task, pool, rule, given.draws)
        if pool.labels_N is not None:
            entry["selections"] = selections(task, pool, rule, 100)
            entry["ensembles"] = ensembles(task, pool)
            entry["rules"] = rules(task, pool, 50)
    content["tasks"] = tasks
    (HERE / "calibration.json").write_text(json.dumps(content, indent=1) + "\n")
    (HERE / "calibration.md").write_text("\n".join(markdown(content)))


def markdown(content: dict[str, Any]) -> list[str]:
    machine = content["environment"]
    lines = [
        "# Targets and promises on real records",
        "",
        f"Command: `python benchmarks/calibration.py RUN ...`, {machine['threads']} threads of "
        f"{machine['cpus']} CPU cores. A RUN is what `evaluate.py ckpt=...` leaves; how each model "
        "was trained stands in calibration.json. Rows are split at random, half to choose "
        "thresholds on, half to measure; `rows` is the number in one half.",
        "",
        "## Cost: 40,000 rows x 12 ramps x 3 labels",
        "",
        *table(content["cost"]),
        "Peak memory of the process, torch and record included: "
        f"{content['cost_peak_mib']:.0f} MiB.",
        "",
        "## A promise where the truth is known (simulated)",
        "",
        "`broken`: share of draws in which the true risk of the chosen threshold is above the "
        "limit; it may be delta at most.",
        "",
        *table(content["simulated"]),
    ]
    headings = {
        "savings": "Saving asked for, and saving measured (200 splits)",
        "promises": f"Promises ({content['draws']} draws). `broken`: the risk on the whole pool is "
        "above the limit, calibration rows drawn from the pool with replacement; `broken on the "
        "other half`: the risk measured on the other half of a random split is, noise included",
        "selections": "Other ways than one global threshold, against the best global threshold "
        "(100 splits). `used`: share of the splits where the way differs from one threshold",
        "ensembles": "Ensembles: each ramp alone, the mean of the ramps so far, their vote",
        "rules": "Exit rules (50 splits)",
    }
    for name, entry in content["tasks"].items():
        lines += [f"# {name}: {entry['rows']} rows", ""]
        for key, heading in headings.items():
            if entry.get(key):
                lines += [f"## {heading}", "", *table(entry[key])]
    return lines


if __name__ == "__main__":
    main()
