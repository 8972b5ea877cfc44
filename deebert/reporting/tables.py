"""results.json -> the tables and sentences of a report, as text: for the terminal and Markdown.

Rounds and words what was measured; draws nothing, reads no file. Knows nothing of models or data.
"""

from collections.abc import Iterable
from typing import Any

from deebert.models.trained_ramps import trains_ramps

Table = tuple[str, list[str], list[list[str]]]  # title, column names, rows
PERCENTILES = ("p50", "p95", "p99")
SECONDS = ("seconds", "seconds_full_depth")


def splits(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluation of each split: the headline one first (MNLI has two)."""
    return [results, *results.get("other_splits", [])]


def tables(results: dict[str, Any]) -> Iterable[Table]:
    """Title, column names and rows of every table of the report."""
    metric = results["metric"]
    for part in splits(results):
        where = f"{results['task']}, {part['split']} ({part['num_rows']} rows)"
        others = [name for name in part["exits"][0]["scores"] if name != metric]
        yield (
            f"Score of every ramp: {where}",
            ["layer", metric, *others, "cost ratio"],
            [
                [
                    str(ramp["layer"]),
                    *(_number(ramp["scores"].get(name)) for name in (metric, *others)),
                    _number(ramp["cost_ratio"]),
                ]
                for ramp in part["exits"]
            ],
        )
        if not trains_ramps(results["objective"]):
            continue  # exits at untrained ramps mean nothing
        groups = list(part["curve"][0].get("mean_exit_layer", {}))
        yield (
            f"Score against saving: {where}",
            ["threshold", metric, *others, "cost ratio", "saving", "speed-up"]
            + [f"mean exit, {group}" for group in groups]
            + ["exits by layer"],
            [
                [
                    _threshold(point["threshold"]),
                    *(_number(point["scores"].get(name)) for name in (metric, *others)),
                    _number(point["cost_ratio"]),
                    f"{point['expected_saving']:.1%}",
                    f"{point['speed_up']:.2f}x",
                    *(f"{point['mean_exit_layer'][group]:.2f}" for group in groups),
                    " ".join(map(str, point["exit_counts"])),
                ]
                for point in part["curve"]
            ],
        )
    if "calibration" in results:
        yield _answer(results)
    if results.get("timing"):
        yield _latency(results)


def _answer(results: dict[str, Any]) -> Table:
    """The target, what was to be expected and what unseen rows showed."""
    found, metric = results["calibration"], results["metric"]
    target = ", ".join(f"{n}={'null' if v is None else v}" for n, v in found["target"].items())
    rows = [["rows chosen on", found["expected"]], [results["split"], found["measured"]]]
    rows += list(map(list, found.get("measured_elsewhere", {}).items()))
    return (
        f"Target: {target}; exit={found['rule']} threshold={_threshold(found['thresholds'])}, "
        f"chosen on {found['calibration_split']} ({found['num_calibration']} rows)",
        ["", metric, "at full depth", "saving", "excess error", "disagreement", "exits by layer"],
        [
            [
                name,
                _number(part["score"]) + _interval(part.get("score_interval"), "{:.3f}"),
                _number(part["full_depth_score"]),
                f"{part['expected_saving']:.1%}" + _interval(part.get("interval"), "{:.1%}"),
                _number(part["excess"]),
                _number(part["disagreement"]),
                " ".join(map(str, part["exit_counts"])),
            ]
            for name, part in rows
        ],
    )


def _latency(results: dict[str, Any]) -> Table:
    """What the engine took, beside full depth."""
    metric = results["metric"]
    return (
        f"On the clock: {results['task']}, {results['split']} ({results['num_rows']} rows)",
        [
            "precision",
            "inputs a request",
            "threshold",
            metric,
            f"full depth {metric}",
            "saving (layers)",
            "time saving",
            "speed-up (clock)",
            "ms an input",
            "full depth ms an input",
            *(f"{name} ms" for name in PERCENTILES),
            "exits equal to the record",
        ],
        [
            [
                _arithmetic(case),
                _request(case),
                _timed_threshold(case["threshold"], results),
                _number(case["score"]),
                _number(case["score_full_depth"]),
                f"{case['expected_saving']:.1%}",
                f"{case['time_saving']:.1%}",
                f"{case['time_speed_up']:.2f}x",
                *(f"{1e3 * case[key] / case['num_rows']:.3f}" for key in SECONDS),
                *(f"{case['latency_ms'][name]:.2f}" for name in PERCENTILES),
                f"{case['equal_exits']:.2%}",
            ]
            for case in results["timing"]
        ],
    )


def _timed_threshold(value: Any, results: dict[str, Any]) -> str:
    """Thresholds that were cross-fitted are a list with one, or with a list, for each fold."""
    crossed = results.get("calibration", {}).get("fold_thresholds")
    return "cross-fitted" if value == crossed else _threshold(value)


def _request(case: dict[str, Any]) -> str:
    return "all" if case["batch_size"] is None else str(case["batch_size"])


def more_tables(results: dict[str, Any]) -> Iterable[Table]:
    """Why layers look redundant: what `analysis` and `layers` found."""
    metric = results["metric"]
    for part in splits(results):
        found, where = part["analysis"], f"{results['task']}, {part['split']}"
        last = [row[-1] for row in found["error_correlation"] or []]
        columns: dict[str, list[float | None]] = {
            "agrees with last": [ramp["agreement"] for ramp in found["ramps"]],
            "AUROC": [ramp["auroc"] for ramp in found["ramps"]],
            "ECE": [ramp["ece"] for ramp in found["ramps"]],
            "errors' correlation with last": last,
            f"{metric} of mean of ramps": [row["mean"] for row in found["ensemble"] or []],
            f"{metric} of vote": [row["vote"] for row in found["ensemble"] or []],
        }
        for name, key in (
            ("block influence", "block_influence"),
            ("CKA with last", "cka_with_last"),
            (f"{metric} without layer", "score_without"),
        ):
            columns[name] = [layer[key] for layer in found.get("layers", [])]
        there = [name for name, values in columns.items() if any(v is not None for v in values)]
        yield (
            f"Ramps and layers: {where}",
            ["layer", *there],
            [
                [str(i + 1), *(_number(columns[name][i]) for name in there)]
                for i in range(part["num_layers"])
            ],
        )


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know."""
    found = []
    if not trains_ramps(results["objective"]):
        found.append("Only the last ramp is trained so far; exits are worth a look after stage 2.")
    if results["exit"]["name"] == "change":
        found.append("A regression has no entropy: it leaves when its value stops changing.")
    if results["exits"][0]["score"] is None:
        found.append("This split has no labels: saving only, no scores.")
    for part in splits(results):
        if oracle := part["analysis"]["oracle"]:
            found.append(
                f"{part['split']}: {part['analysis']['overthinking_rate']:.1%} of the rows are "
                "right at some ramp and wrong at full depth; a rule that knew which is right would "
                f"score {oracle['score']:.4f} at {oracle['expected_saving']:.1%} saving (a bound: "
                "it profits from lucky guesses)."
            )
    if "calibration" in results:
        found += _promise(results["calibration"], results["metric"])
    if results.get("timing"):
        found += _about_the_clock(results)
    return found


def _about_the_clock(results: dict[str, Any]) -> list[str]:
    """What full depth is and how it was timed; what a target for a speed-up came to."""
    timing = results["timing"]
    first, rows = timing[0], {case["num_rows"] for case in timing} - {results["num_rows"]}
    fewer = f" Requests of a few: on {min(rows)} rows, evenly spread." if rows else ""
    # Full depth in int8 is the engine itself.
    bare = {
        _named(case): f"{case['seconds_full_depth'] / case['seconds_threshold_0']:.2f}x"
        for case in timing
        if case["precision"] != "int8" and case.get("runtime", "torch") == "torch"
    }
    without = f" The engine's own speed-up, without any exit: {_listed(bare)}." if bare else ""
    lines = [
        "On the clock full depth is the library's own forward pass of the same weights, in the "
        "same batches; for int8 and onnx, which the library has not, the engine without exits. "
        f"All of them took turns (medians of {first['repeats']} turns, threads: "
        f"{first['threads']}, device: {first['device']}).{fewer}{without}"
    ]
    calibration = results.get("calibration", {"target": {}})
    if (asked := calibration["target"].get("target_speedup")) is not None:
        expected = calibration["expected"].get("time_speed_up")
        measured = _listed({_named(case): f"{case['time_speed_up']:.2f}x" for case in timing})
        foreseen = "" if expected is None else f"expected {expected:.2f}x, "
        lines.append(f"Speed-up: asked for {asked:g}x, {foreseen}measured on the clock {measured}.")
    return lines


def _named(case: dict[str, Any]) -> str:
    return f"{_arithmetic(case)}, {_request(case)}"


def _arithmetic(case: dict[str, Any]) -> str:
    runtime = case.get("runtime", "torch")
    return case["precision"] if runtime == "torch" else f"{case['precision']} ({runtime})"


def _listed(values: dict[str, str]) -> str:
    """Values with what they are of, where there are several."""
    if len(values) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{value} ({name})" for name, value in values.items())


def _promise(found: dict[str, Any], metric: str) -> list[str]:
    """What may be relied on, in a sentence."""
    lines = [f"Note: {note}." for note in found["notes"]]
    with_it = []
    if found.get("prior"):  # not known to older results
        with_it.append(f"exit={found['rule']}")
    for flag, name in (("exit.prior", "prior"), ("temperature", "temperatures")):
        if found.get(name):
            with_it.append(f"{flag}=[{','.join(f'{value:.9g}' for value in found[name])}]")
    if with_it:
        with_it.append(f"threshold={_threshold(found['thresholds'])}")
        lines.append(f"To use it again: {' '.join(with_it)}")
    if idle := found.get("folds_at_full_depth"):
        lines.append(f"Note: in {idle} folds four fifths of the rows were too few: full depth.")
    target = found["target"]
    if "max_drop" not in target:
        return [*lines, "Intervals are 95 % ones for as many new rows as were reported."]
    if found["thresholds"] == 0:
        return [*lines, "No threshold can be promised that: every row runs to full depth."]
    what = {
        "excess": "loses {} of accuracy at most against full depth",
        "disagreement": "answers otherwise than full depth on {} of the rows at most",
    }[target["loss"]].format(f"{target['max_drop']:.2%}")
    confidence = target["confidence"]
    sure = "on average" if confidence is None else f"with {100 * confidence:g} % confidence"
    lines.append(
        f"Promise: on rows like the calibration rows this threshold {what}, {sure} (over the draw "
        "of the calibration rows)."
    )
    if metric != "accuracy" and target["loss"] == "excess":
        lines.append(f"It is a promise about accuracy; {metric} is shown beside it, not promised.")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _threshold(value: float | list[float]) -> str:
    listed = value if isinstance(value, list) else [value]
    text = ",".join(f"{number:.9g}" for number in listed)
    return f"[{text}]" if isinstance(value, list) else text


def _interval(bounds: list[float] | None, form: str) -> str:
    return f" ({form.format(bounds[0])} to {form.format(bounds[1])})" if bounds else ""
