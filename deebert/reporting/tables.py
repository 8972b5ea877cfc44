"""Turn results.json into the tables and notes of a report, as text for the terminal and Markdown.

The module rounds numbers and puts them into words. It draws nothing, reads no file, and does not
know models or data.
"""

from collections.abc import Callable, Iterable

from deebert.models.trained_ramps import trains_ramps
from deebert.reporting.class_tables import class_notes
from deebert.reporting.results import Calibration, Results, TimedCase
from deebert.reporting.split_results import Measured, Point, SplitResults, Thresholds
from deebert.reporting.useless import warning

Table = tuple[str, list[str], list[list[str]]]  # title, column names, rows
PERCENTILES = ("p50", "p95", "p99")
SHORT_CURVE = 10  # thresholds; a curve of more is shown by saving


def tables(results: Results) -> Iterable[Table]:
    """Yield the title, column names and rows of the tables on scores, savings and latency."""
    metric = results.metric
    for part in results.splits:
        where = f"{results.task}, {part.split} ({part.num_rows} rows)"
        others = [name for name in part.exits[0].scores if name != metric]
        yield (
            f"Score of every ramp: {where}",
            ["layer", metric, *others, "cost ratio"],
            [
                [
                    str(ramp.layer),
                    *(_number(ramp.scores.get(name)) for name in (metric, *others)),
                    _number(ramp.cost_ratio),
                ]
                for ramp in part.exits
            ],
        )
        if not trains_ramps(results.objective):
            continue  # early exit has no meaning without trained ramps
        points = points_by_saving(part)
        yield _savings(metric, others, points, where)
        if points[0].mean_exit_layer:
            yield _groups(points, where)
    if results.calibration:
        yield _calibration(results, results.calibration)
    if results.timing:
        yield from _latency(results, results.timing)


def _savings(metric: str, others: list[str], points: list[Point], where: str) -> Table:
    """Return the table of scores and exits by saving."""
    return (
        f"Score against saving: {where}",
        ["saving", metric, *others, "speed-up", "threshold", "exits by layer (%)"],
        [
            [
                f"{point.expected_saving:.1%}",
                *(_number(point.scores.get(name)) for name in (metric, *others)),
                f"{point.speed_up:.2f}x",
                _short(point.threshold),
                _exits(point.exit_counts),
            ]
            for point in points
        ],
    )


def _groups(points: list[Point], where: str) -> Table:
    """Return the table of the mean exit layer of each group, by saving."""
    return (
        f"Mean exit layer of each group, by saving: {where}",
        ["group", *(f"{point.expected_saving:.0%}" for point in points)],
        [
            [group, *(f"{(point.mean_exit_layer or {})[group]:.2f}" for point in points)]
            for group in points[0].mean_exit_layer or {}
        ],
    )


def points_by_saving(part: SplitResults) -> list[Point]:
    """Return the points of a split that a table shows: at most one for 0, 10, 20 ... % saving.

    A short curve is shown whole, because the user asked for its thresholds or they are by saving.
    """
    if len(part.curve) <= SHORT_CURVE:
        return part.curve
    points = sorted(part.trade_off or part.curve, key=lambda point: point.expected_saving)
    reached = (
        next((point for point in points if point.expected_saving >= step / 10 - 1e-9), None)
        for step in range(10)
    )
    chosen = {point.expected_saving: point for point in reached if point is not None}
    return list(chosen.values())


def _exits(counts: list[int]) -> str:
    """Return the share of the rows that leave at each layer, in whole %."""
    return " ".join(f"{100 * count / max(1, sum(counts)):.0f}" for count in counts)


def _calibration(results: Results, calibration: Calibration) -> Table:
    """Return the table of a target: what is expected, and what unseen rows showed."""
    target = ", ".join(
        f"{name}={'null' if value is None else value}" for name, value in calibration.target.items()
    )
    parts = {
        "rows chosen on": calibration.expected,
        results.headline.split: calibration.measured,
        **(calibration.measured_elsewhere or {}),
    }
    rows: dict[str, Callable[[Measured], str]] = {
        "saving": lambda part: f"{part.expected_saving:.1%}" + _interval(part.interval, "{:.1%}"),
        results.metric: lambda part: _number(part.score) + _interval(part.score_interval, "{:.3f}"),
        f"{results.metric} at full depth": lambda part: _number(part.full_depth_score),
        "excess error": lambda part: _number(part.excess),
        "disagreement": lambda part: _number(part.disagreement),
        "exits by layer (%)": lambda part: _exits(part.exit_counts),
    }
    return (
        f"Target: {target}; exit={calibration.rule} "
        f"threshold={_threshold(calibration.thresholds)}, "
        f"chosen on {calibration.calibration_split} ({calibration.num_calibration} rows)",
        ["", *parts],
        [[name, *map(cell, parts.values())] for name, cell in rows.items()],
    )


def _latency(results: Results, timing: list[TimedCase]) -> Iterable[Table]:
    """Yield the tables of the times that the engine and full depth took."""
    metric = results.metric
    where = f"{results.task}, {results.headline.split} ({results.headline.num_rows} rows)"
    names = ["precision", "inputs a request", "threshold"]
    cases = [
        (
            case,
            [_precision(case), _request(case), _timed_threshold(case, results.calibration)],
        )
        for case in timing
    ]
    yield (
        f"Latency: {where}",
        [
            *names,
            metric,
            f"full depth {metric}",
            "saving (layers)",
            "time saving",
            "speed-up (time)",
        ],
        [
            [
                *name,
                _number(case.score),
                _number(case.score_full_depth),
                f"{case.expected_saving:.1%}",
                f"{case.time_saving:.1%}",
                f"{case.time_speed_up:.2f}x",
            ]
            for case, name in cases
        ],
    )
    yield (
        f"Milliseconds: {where}",
        [
            *names,
            "ms an input",
            "full depth ms an input",
            *(f"{name} ms" for name in PERCENTILES),
            "exits equal to the record",
        ],
        [
            [
                *name,
                f"{1e3 * case.seconds / case.num_rows:.3f}",
                f"{1e3 * case.seconds_full_depth / case.num_rows:.3f}",
                *(f"{case.latency_ms[percentile]:.2f}" for percentile in PERCENTILES),
                f"{case.equal_exits:.2%}",
            ]
            for case, name in cases
        ],
    )


def _timed_threshold(case: TimedCase, calibration: Calibration | None) -> str:
    """Return the thresholds of a timed case as text.

    Cross-fitted thresholds are a list that has, for each fold, one threshold or a list of them.
    """
    if calibration and case.threshold == calibration.fold_thresholds:
        return "cross-fitted"
    return _threshold(case.threshold)  # type: ignore[arg-type]  # not of several folds


def _request(case: TimedCase) -> str:
    return "all" if case.batch_size is None else str(case.batch_size)


def more_tables(results: Results) -> Iterable[Table]:
    """Yield the table on ramps and layers of each split, from the analysis in the results."""
    metric = results.metric
    for part in results.splits:
        analysis, where = part.analysis, f"{results.task}, {part.split}"
        layers = analysis.layers or []
        correlation_with_last = [row[-1] for row in analysis.error_correlation or []]
        columns: dict[str, list[float | None]] = {
            "agrees with last": [ramp.agreement for ramp in analysis.ramps],
            "AUROC": [ramp.auroc for ramp in analysis.ramps],
            "ECE": [ramp.ece for ramp in analysis.ramps],
            "errors' correlation with last": correlation_with_last,
            f"{metric} of mean of ramps": [row.mean for row in analysis.ensemble or []],
            f"{metric} of vote": [row.vote for row in analysis.ensemble or []],
            "block influence": [layer.block_influence for layer in layers],
            "CKA with last": [layer.cka_with_last for layer in layers],
            f"{metric} without layer": [layer.score_without for layer in layers],
        }
        present = [name for name, values in columns.items() if any(v is not None for v in values)]
        yield (
            f"Ramps and layers: {where}",
            ["layer", *present],
            [
                [str(i + 1), *(_number(columns[name][i]) for name in present)]
                for i in range(part.num_layers)
            ],
        )


def notes(results: Results) -> list[str]:
    """Return what a reader of the tables must know, as sentences."""
    lines = [line] if (line := warning(results)) else []
    if not trains_ramps(results.objective):
        lines.append("Only the last ramp is trained so far; exits are worth a look after stage 2.")
    if results.exit_name == "change":
        lines.append("A regression has no entropy: it leaves when its value stops changing.")
    if results.headline.exits[0].score is None:
        lines.append("This split has no labels: saving only, no scores.")
    for part in results.splits:
        if oracle := part.analysis.oracle:
            lines.append(
                f"{part.split}: {part.analysis.overthinking_rate:.1%} of the rows are "
                "right at some ramp and wrong at full depth; a rule that knew which is right would "
                f"score {oracle.score:.4f} at {oracle.expected_saving:.1%} saving (a bound: "
                "it profits from lucky guesses)."
            )
    lines += class_notes(results)
    if results.calibration:
        lines += _calibration_notes(results.calibration, results.metric)
    if results.timing:
        lines += _latency_notes(results, results.timing)
    return lines


def _latency_notes(results: Results, timing: list[TimedCase]) -> list[str]:
    """Return how full depth was timed and, if the target is a speed-up, which one was measured."""
    first, rows = timing[0], {case.num_rows for case in timing} - {results.headline.num_rows}
    fewer = f" Requests of a few: on {min(rows)} rows, evenly spread." if rows else ""
    # Outside of torch, full depth is the engine itself.
    own_speed_ups = {
        _case_name(case): f"{case.seconds_full_depth / case.seconds_threshold_0:.2f}x"
        for case in timing
        if case.precision != "int8" and case.runtime == "torch"
    }
    own = ""
    if own_speed_ups:
        own = f" The engine's own speed-up, without any exit: {_joined(own_speed_ups)}."
    lines = [
        "Latency: full depth is the library's own forward pass of the same weights, in the same "
        "batches. Outside of torch, full depth is the engine "
        f"without exits. All of them took turns (medians of {first.repeats} turns, threads: "
        f"{first.threads}, device: {first.device}).{fewer}{own}"
    ]
    calibration = results.calibration
    if calibration and (target := calibration.target.get("target_speedup")) is not None:
        speed_up = calibration.expected.time_speed_up
        expected = "" if speed_up is None else f"expected {speed_up:.2f}x, "
        measured = _joined({_case_name(case): f"{case.time_speed_up:.2f}x" for case in timing})
        lines.append(f"Speed-up (time): target {target:g}x, {expected}measured {measured}.")
    return lines


def _case_name(case: TimedCase) -> str:
    return f"{_precision(case)}, {_request(case)}"


def _precision(case: TimedCase) -> str:
    return case.precision if case.runtime == "torch" else f"{case.precision} ({case.runtime})"


def _joined(values: dict[str, str]) -> str:
    """Join values into one text. If there are several, each is followed by its name."""
    if len(values) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{value} ({name})" for name, value in values.items())


def _calibration_notes(calibration: Calibration, metric: str) -> list[str]:
    """Return the notes on a target: how to use the operating point, and the guarantee."""
    lines = [f"Note: {note}." for note in calibration.notes]
    overrides = []
    if calibration.prior:
        overrides.append(f"exit={calibration.rule}")
    for flag, values in (
        ("exit.prior", calibration.prior),
        ("temperature", calibration.temperatures),
    ):
        if values:
            overrides.append(f"{flag}={_threshold(values)}")
    if overrides:
        overrides.append(f"threshold={_threshold(calibration.thresholds)}")
        lines.append(f"To use it again: {' '.join(overrides)}")
    if folds := calibration.folds_at_full_depth:
        lines.append(
            f"Note: folds at full depth: {folds}. The rows of the other folds were too few to "
            "choose a threshold."
        )
    target = calibration.target
    if "max_drop" not in target:
        return [*lines, "Intervals are 95 % ones for as many new rows as were reported."]
    if calibration.thresholds == 0:
        lines.append("No threshold can give this guarantee: every row runs to full depth.")
        if calibration.measured.expected_saving:
            lines.append(
                "The measured values come from the folds whose rows allow a threshold; use full "
                "depth."
            )
        return lines
    limit = {
        "excess": "loses at most {} of accuracy against full depth",
        "disagreement": "differs from full depth on at most {} of the rows",
    }[target["loss"]].format(f"{target['max_drop']:.2%}")
    confidence = target["confidence"]
    how_sure = "on average" if confidence is None else f"with {100 * confidence:g} % confidence"
    lines.append(
        f"Guarantee: on rows like the calibration rows this threshold {limit}, {how_sure} "
        "(over the draw of the calibration rows)."
    )
    if metric != "accuracy" and target["loss"] == "excess":
        lines.append(f"The guarantee is about accuracy; {metric} is shown without a guarantee.")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _threshold(value: Thresholds) -> str:
    values = value if isinstance(value, list) else [value]
    text = ",".join(f"{number:.9g}" for number in values)
    return f"[{text}]" if isinstance(value, list) else text


def _short(value: Thresholds) -> str:
    """Return a threshold for a table, with four digits; results.json has all of them."""
    return "per ramp" if isinstance(value, list) else f"{value:.4g}"


def _interval(bounds: list[float] | None, form: str) -> str:
    return f" ({form.format(bounds[0])} to {form.format(bounds[1])})" if bounds else ""
