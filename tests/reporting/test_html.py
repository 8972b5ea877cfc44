"""report.html in a real browser: it shows the very numbers, loads nothing, obeys no text."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluations import HOSTILE, LAYERS, LENGTH_BINS, bare_results, full_results
from helpers.timed import timed

from deebert.reporting.report import html_report

pytestmark = pytest.mark.slow

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        reason = "needs chromium and playwright (apt install chromium; pip install playwright)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """`show(results, **window)`: the open page; at the end it must have done nothing wrong."""
    contexts, problems, requests = [], [], []
    file = tmp_path / "report.html"

    def open_report(results: dict[str, Any], **window: Any) -> Any:
        file.write_text(html_report(results), encoding="utf-8")
        context = browser.new_context(**({"viewport": {"width": 1400, "height": 900}} | window))
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield open_report
    for context in contexts:
        context.close()
    assert problems == []
    assert set(requests) == {file.as_uri()}


def text(tab: Any, selector: str) -> str:
    return tab.locator(selector).inner_text().replace("\N{NO-BREAK SPACE}", " ")


def expect(locator: Any) -> Any:
    """Playwright's own, which waits; wait_for_function needs an eval that the page forbids."""
    from playwright.sync_api import expect

    return expect(locator)


def slide(tab: Any, value: int) -> None:
    """Set the slider as a script does."""
    tab.eval_on_selector(
        "#saving", "(e, value) => { e.value = value; e.dispatchEvent(new Event('input')); }", value
    )


def check_shown(tab: Any, part: dict[str, Any], wanted: int) -> None:
    """The page shows the first point that saves what is wanted, for the target the target's own."""
    expected = next(p for p in part["trade_off"] if 100 * p["expected_saving"] >= wanted)
    if wanted == 40:
        check_target(tab, part)
        return
    assert tab.locator("#saving").input_value() == str(wanted)
    assert text(tab, "#target-saving") == f"{wanted} %"
    assert text(tab, "#score") == f"{expected['score']:.3f}"
    low, high = expected["score_interval"]
    assert f"{low:.3f} to {high:.3f}" in text(tab, "#interval")
    assert f"{part['exits'][-1]['score']:.3f}" in text(tab, "#drop") or wanted == 0
    assert float(text(tab, "#threshold")) == pytest.approx(expected["threshold"], rel=1e-3)
    assert text(tab, "#actual") == f"{100 * expected['expected_saving']:.1f} %"
    assert text(tab, "#speed-up") == f"{expected['speed_up']:.2f}\N{MULTIPLICATION SIGN}"
    assert text(tab, "#command") == (
        f"deebert evaluate ckpt=runs/2025-01-02/13-14-15 target_saving={wanted / 100:.2f}"
    )
    bars = tab.locator("#histogram rect")
    counts = bars.evaluate_all("bars => bars.map(bar => Number(bar.dataset.count))")
    assert counts == expected["exit_counts"]
    heights = bars.evaluate_all("bars => bars.map(bar => bar.height.baseVal.value)")
    assert heights == pytest.approx([count / max(counts) * max(heights) for count in counts])
    for name, layer in expected["mean_exit_layer"].items():
        assert f"{name}\n{layer:.2f}" in text(tab, "#group-bars")
    for (low, high), layer in zip(LENGTH_BINS, expected["mean_exit_layer_by_length"], strict=True):
        shown = "\N{EN DASH}" if layer is None else f"{layer:.2f}"
        assert f"{low} to {high} tokens\n{shown}" in text(tab, "#length-bars")


def check_target(tab: Any, part: dict[str, Any]) -> None:
    """The headline, the table and the slider give one answer: the point that was measured."""
    other = part["split"] != "validation_matched"
    score, saving = ("0.801", "37.7 %") if other else ("0.839", "39.2 %")
    key = text(tab, "#key")
    shown = text(tab, "#score")
    interval = text(tab, "#interval").removesuffix(" (95 % interval)")
    assert (shown, text(tab, "#actual")) == (score, saving)
    assert f"Measured: f1 {score} (95 % interval {interval}) at {saving} saving" in key
    rows = tab.locator("#target-table td:nth-child(3)").all_inner_texts()
    assert rows[0].replace("\N{NO-BREAK SPACE}", " ").startswith(f"{saving}\n37.0 % to 43.0 %")
    assert rows[1] == f"{score}\n{interval}"
    low, high = map(float, interval.split(" to "))
    near = min(
        part["trade_off"], key=lambda p: abs(p["expected_saving"] - float(saving[:-2]) / 100)
    )
    assert low < float(score) < high
    width = near["score_interval"][1] - near["score_interval"][0]
    assert high - low == pytest.approx(width, abs=1.1e-3)
    assert text(tab, "#threshold") == "0.31, 0.29, 0.25, 0.2, 0.11"


def test_the_slider_shows_the_numbers_of_its_point(show: Open) -> None:
    results = full_results()
    tab = show(results)
    check_shown(tab, results, 40)  # the target of the run
    tab.focus("#saving")
    tab.keyboard.press("ArrowRight")
    check_shown(tab, results, 41)
    tab.keyboard.press("Home")
    check_shown(tab, results, 0)
    tab.keyboard.press("End")
    last = math.floor(100 * results["trade_off"][-1]["expected_saving"])
    check_shown(tab, results, last)
    for wanted in (7, 23, 55):
        slide(tab, wanted)
        check_shown(tab, results, wanted)
    assert "55 % saving" in tab.locator("#saving").get_attribute("aria-valuetext")


def test_the_marker_walks_along_the_curve(show: Open) -> None:
    tab = show(full_results())
    places = []
    for wanted in (0, 20, 60):
        slide(tab, wanted)
        places.append(tab.locator("#marker circle").bounding_box())
    assert places[0]["x"] < places[1]["x"] < places[2]["x"]
    assert places[2]["y"] > places[1]["y"]
    tab.locator("#curve svg").scroll_into_view_if_needed()
    box = tab.locator("#curve .hit").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    assert "threshold" in text(tab, "#tip")
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + 30)
    assert float(tab.locator("#saving").input_value()) == pytest.approx(45, abs=2)  # axis to 90 %
    tab.focus("#curve rect[tabindex] >> nth=2")
    assert "every input at layer 3" in text(tab, "#tip")


def test_heading_target_and_tables_state_the_results(show: Open) -> None:
    results = full_results()
    tab = show(results)
    assert text(tab, "#key").startswith(
        "The threshold was chosen to save 40 % of the layers; the score is not guaranteed. "
        "Measured: f1 0.839 (95 % interval "
    )
    assert text(tab, "#key").endswith(" on validation_matched; full depth has 0.858.")
    assert text(tab, "h1") == "mrpc, bert-tiny-of-six-layers"
    for fact in ("stage 2", "seed 42", "split validation_matched", "rows 4,080"):
        assert fact in text(tab, "#facts")
    target = text(tab, "#target")
    for words in ("500 rows of train_held_out", "0.31, 0.29, 0.25, 0.2, 0.11", "40.0 %", "0.019"):
        assert words in target
    assert "0.846" not in target, "what was expected is no second answer"
    assert "not seconds" in text(tab, "#trade")
    assert tab.locator("#multiples figure").count() == LAYERS
    assert "AUROC \N{EN DASH}" in text(tab, "#multiples")
    assert "6.3 %" in text(tab, "#tiles")
    assert tab.locator("#correlation-table td").count() == LAYERS**2
    assert tab.locator("#ramp-table tbody tr").count() == LAYERS
    assert not tab.locator("#number-table").is_visible()
    tab.click("#numbers summary")
    assert tab.locator("#number-table tbody tr").count() == len(results["curve"])
    assert "torch\n2.7.0+cpu" in text(tab, "#environment")


def test_the_other_split_is_one_click_away(show: Open) -> None:
    results = full_results()
    tab = show(results)
    slide(tab, 30)
    tab.select_option("#split", "validation_mismatched")
    check_shown(tab, results["other_splits"][0], 30)  # the target stays
    assert "split validation_mismatched" in text(tab, "#facts")
    assert "full depth has 0.821" in text(tab, "#key")
    assert "Measured on validation_mismatched." in text(tab, "#target")
    slide(tab, 40)
    check_target(tab, results["other_splits"][0])
    slide(tab, 30)
    tab.select_option("#split", "validation_matched")
    check_shown(tab, results, 30)


@pytest.mark.parametrize("clipboard", [True, False])
def test_the_command_can_be_copied(show: Open, clipboard: bool) -> None:
    tab = show(full_results(), permissions=["clipboard-write"] if clipboard else [])
    if not clipboard:
        tab.evaluate("void (navigator.clipboard.writeText = () => Promise.reject())")
    slide(tab, 25)
    tab.click("#copy")
    expect(tab.locator("#copy")).to_have_text("Copied")
    tab.evaluate("document.body.append(document.createElement('textarea'))")
    tab.focus("textarea")
    tab.keyboard.press("Control+V")
    command = "deebert evaluate ckpt=runs/2025-01-02/13-14-15 target_saving=0.25"
    assert tab.locator("textarea").input_value().strip() == command


def test_the_command_names_the_rule_and_quotes_the_run(show: Open) -> None:
    tab = show(full_results() | {"ckpt": "my runs/it's=1"})
    rule = {"exit": {"name": "margin"}}
    assert text(show(full_results() | rule), "#command").endswith(" exit=margin target_saving=0.40")
    fit = {"prior": [0.25, 0.75], "temperatures": [2, 0.5, 1]}
    given = full_results() | {"exit": {"name": "relative_entropy", **fit}}
    assert text(show(given), "#command").endswith(
        " exit=relative_entropy 'exit.prior=[0.25,0.75]' 'temperature=[2,0.5,1]' target_saving=0.40"
    )
    assert text(tab, "#command").startswith(
        """deebert evaluate 'ckpt="my runs/it'\\''s=1"' target_saving="""
    )


def test_what_was_timed_is_a_table_and_a_mark_each(show: Open) -> None:
    results = full_results()
    assert not show(results).locator("#latency").is_visible()
    folds = [0.31, 0.2, 0.25, 0.3, 0.28]
    calibration = results["calibration"]
    calibration |= {"target": {"target_speedup": 1.5}, "fold_thresholds": folds}
    calibration["expected"]["time_speed_up"] = 1.57
    results["timing"] = [
        timed(folds, 0.41, counts=(2000, 2080)),
        timed(folds, -0.035, 0.83, batch_size=1, counts=(400, 600)),
    ]
    tab = show(results)
    assert text(tab, "#latency-table tbody tr >> nth=0") == (
        "float32\tall\t4,080\tcross-fitted\t0.8391\t0.8584\t32.8 %\t41.0 %\t1.69\N{MULTIPLICATION SIGN}"
        "\t0.289\t0.490\t120.50\t130.25\t131.13\t99.00 %"
    )
    assert "\t1\t1,000\tcross-fitted\t0.8300\t" in text(tab, "#latency-table tbody tr >> nth=1")
    lead = text(tab, "#latency-text")
    assert "medians of 3 turns, threads: 1, device: cpu" in lead
    assert "without any exit: 1.25\N{MULTIPLICATION SIGN} (float32, all), 1.25" in lead
    assert "chosen to be 1.50\N{MULTIPLICATION SIGN} as fast as full depth" in text(tab, "#key")
    assert text(tab, "#command").endswith(" target_speedup=1.5")
    row = tab.locator("#target-table tbody tr:last-child > *").all_inner_texts()
    assert row == ["speed-up (time)", "1.50\xd7", "1.69\xd7, 0.97\xd7", "1.00\xd7"]
    first, second = (tab.locator(f"#curve .timed >> nth={i}").bounding_box() for i in (0, 1))
    full = tab.locator("#curve line.full").bounding_box()
    assert full["x"] < second["x"] < first["x"], "left of the axis' 0, but in the picture"
    tab.focus("#curve .timed >> nth=0")
    assert "inputs a request: all\ntime saving 41.0 %\nf1 0.839\nthreshold cross-fitted" in text(tab, "#tip")  # fmt: skip
    assert "time saving" in text(tab, "#legend")
    tab.select_option("#split", "validation_mismatched")  # not timed
    assert not tab.locator("#latency").is_visible()
    assert tab.locator("#curve .timed").count() == 0


def test_timing_without_labels_has_no_scores(show: Open) -> None:
    tab = show(bare_results() | {"timing": [timed([0.1, 0.2], score=None, precision="int8")]})
    assert "int8\tall\t10\t0.1, 0.2\t\N{EN DASH}\t" in text(tab, "#latency-table")
    assert "own speed-up" not in text(tab, "#latency-text")


def test_dark_and_light(show: Open) -> None:
    paper = {
        scheme: show(full_results(), color_scheme=scheme).evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        for scheme in ("light", "dark")
    }
    assert paper == {"light": "rgb(246, 246, 243)", "dark": "rgb(18, 21, 25)"}


def test_the_headline_states_the_guarantee(show: Open) -> None:
    results = full_results()
    drop = {"max_drop": 0.01, "confidence": 0.95, "loss": "excess"}
    cases: list[tuple[dict[str, Any], Any, str, str]] = [
        (drop, 0.1, "With 95 % confidence, leaving early costs at most 1 point of accuracy on rows like the calibration rows. Measured: f1 0.839", "max_drop=0.01 confidence=0.95"),
        (drop | {"confidence": None}, 0.1, "On average, leaving early costs at most 1 point of", "confidence=null"),
        (drop | {"loss": "disagreement", "max_drop": 0.02}, 0.1, "leaving early changes at most 2.0 % of the answers on", "loss=disagreement"),
        (drop, 0, "No threshold can give the guarantee that was asked for, so every input runs to full depth. Measured: f1 0.858", "max_drop=0.01 confidence=0.95"),
    ]  # fmt: skip
    for target, thresholds, words, command in cases:
        results["calibration"] |= {"target": target, "thresholds": thresholds}
        results["calibration"]["measured"] |= {"excess": 0.0042, "disagreement": 0.0173}
        tab = show(results)
        assert words in text(tab, "#key")
        assert command in text(tab, "#command")
        assert text(tab, "#actual") == ("0.0 %" if thresholds == 0 else "39.2 %")
        lost = {"excess": "0.004", "disagreement": "0.017"}[target["loss"]]
        lost = "0.000" if thresholds == 0 else lost
        assert f"at most {target['max_drop']:.3f}\t{lost}\t0.000" in text(tab, "#target-table")
        # At another place of the slider the command asks for that saving.
        slide(tab, 12)
        assert text(tab, "#command").endswith(" target_saving=0.12")


def test_ramps_and_classes_are_shown_where_they_are_known(show: Open) -> None:
    results = full_results()
    assert not show(results).locator("#classes").is_visible()
    results["constant_score"] = 0.7
    results["environment"]["date"] = "2025-01-02"
    results["classes"] = classes(["billing", HOSTILE, "<b>praise</b>"])
    tab = show(results, viewport={"width": 360, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert "date 2025-01-02" in text(tab, "#facts")
    assert "A constant answer scores 0.700." in text(tab, "#ramp-note")
    assert tab.locator("#ramp-table .useless").count() == 2
    widths = tab.locator("#ramp-table .cellbar i").evaluate_all("all => all.map(i => parseFloat(i.style.width))")  # fmt: skip
    assert widths[0] < 15
    assert widths[-1] == 100
    assert widths == sorted(widths)
    assert "at the operating point: macro-F1 0.700" in text(tab, "#classes-text")
    assert "At full depth: 0.800" in text(tab, "#classes-text")
    first = tab.locator("#class-table tbody tr >> nth=0").locator("th, td").all_inner_texts()
    assert [cell.strip() for cell in first] == ["billing", "10", "0.900", "0.800", "0.850", "2.50"]
    assert tab.locator("#class-table tbody th").all_inner_texts()[1:] == [HOSTILE, "<b>praise</b>"]
    cells = tab.locator("#confusion-table td").all_inner_texts()
    assert cells == ["8", "1", "1", "0", "10", "0", "2", "0", "0"]
    del results["classes"]["operating_point"]
    results["classes"]["full_depth"]["confusion"] = []  # there are too many classes
    tab = show(results)
    assert "Scores at full depth: macro-F1 0.800" in text(tab, "#classes-text")
    assert not tab.locator("#confusion").is_visible()


def classes(labels: list[str]) -> dict[str, Any]:
    """The block `classes` of three classes."""

    def scores(f1: float, layer: float) -> dict[str, Any]:
        row = {"rows": 10, "precision": 0.9, "recall": 0.8, "f1": 0.85, "mean_exit_layer": layer}
        per_class = [{"label": label, **row} for label in labels]
        per_class[2]["mean_exit_layer"] = None
        whole = {"f1_macro": f1, "f1_weighted": f1, "matthews": f1, "per_class": per_class}
        return {"confusion": [[8, 1, 1], [0, 10, 0], [2, 0, 0]], **whole}

    return {"labels": labels, "full_depth": scores(0.8, 6), "operating_point": scores(0.7, 2.5)}


def test_another_run_is_drawn_beside_this_one(show: Open, tmp_path: Path) -> None:
    tab = show(full_results())
    before = tab.locator("#curve svg").get_attribute("viewBox")
    theirs = full_results() | {"seed": 7, "task": HOSTILE}
    for name, content, says in (
        ("results.json", json.dumps(theirs), "seed 7. The two runs differ in: task."),
        ("page.html", html_report(full_results() | {"seed": 8}), "seed 8."),
        ("text.json", "[1, 2]", "text.json holds no results."),
        ("page2.html", "<script>window.hacked=3</script>", "page2.html holds no results."),
    ):
        file = tmp_path / name
        file.write_text(content, encoding="utf-8")
        tab.set_input_files("#other", file)
        expect(tab.locator("#other-note")).to_contain_text(says)
        drawn = 0 if "no results" in says else 1
        assert tab.locator("#curve .other").count() == drawn
        assert tab.locator("#other-box").is_visible() == bool(drawn)
        if drawn:
            slide(tab, 30)
            point = next(p for p in theirs["trade_off"] if p["expected_saving"] >= 0.3)
            assert text(tab, "#other-score").startswith(f"{point['score']:.3f}\n")
            assert "this run is \xb10.000" in text(tab, "#other-score")
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("#curve svg").get_attribute("viewBox") == before


def test_numbers_and_picture_are_downloaded(show: Open, tmp_path: Path) -> None:
    results = full_results()
    tab = show(results)
    files = {}
    for kind, name in {"json": "results.json", "csv": "curve.csv", "svg": "curve.svg", "png": "curve.png"}.items():  # fmt: skip
        with tab.expect_download() as started:
            tab.locator(f"#save-{kind}").press("Enter")
        assert started.value.suggested_filename == name
        started.value.save_as(tmp_path / name)
        files[kind] = (tmp_path / name).read_bytes()
    assert json.loads(files["json"]) == results
    head, *rows = files["csv"].decode().splitlines()
    assert head.startswith("expected_saving,speed_up,score,score_low,score_high,threshold,exits_")
    assert [float(row.split(",")[2]) for row in rows] == [p["score"] for p in results["trade_off"]]
    picture = files["svg"].decode()
    assert "your target" in picture
    assert "var(" not in picture
    assert "<script" not in picture
    assert files["png"].startswith(b"\x89PNG")
    assert len(files["png"]) > 10_000


@pytest.mark.parametrize("width", [360, 700, 1400])
def test_no_width_scrolls_sideways(show: Open, width: int) -> None:
    results = full_results()
    results["backbone"] = "an-organisation/with-a-very-long-backbone-name-that-nobody-would-break"
    results["examples"]["first"][1]["text"] = "w" * 300
    results["timing"] = [timed(), timed([0.31, 0.29, 0.25, 0.2, 0.11], precision="bfloat16")]
    tab = show(results, viewport={"width": width, "height": 800})
    tab.click("#numbers summary")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.set_viewport_size({"width": 360, "height": 800})
    narrow = re.compile(r"0 0 (2\d\d|3[0-5]\d) ")
    expect(tab.locator("#curve svg")).to_have_attribute("viewBox", narrow)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_texts_of_the_results_are_never_markup(show: Open) -> None:
    results = full_results()
    for name in ("task", "backbone", "objective", "split", "ckpt"):
        results[name] = HOSTILE
    results["exit"]["name"] = results["calibration"]["rule"] = HOSTILE
    results["environment"]["versions"][HOSTILE] = HOSTILE
    for row in results["trade_off"] + results["curve"]:
        row["mean_exit_layer"] = {HOSTILE: 2.0}
    for ramp in results["exits"]:
        ramp["scores"][HOSTILE] = 0.5
    results["timing"] = [timed(precision=HOSTILE, device=HOSTILE, threshold=0.1)]
    results["examples"]["last"][0] |= {"label": HOSTILE, "prediction": HOSTILE + "!"}
    assert html_report(results).count("<img") == 0
    tab = show(results)
    assert tab.locator("#first p").first.inner_text() == HOSTILE
    assert HOSTILE in tab.locator("h1").inner_text()
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img").count() == 0
    assert json.loads(tab.locator("#results").text_content()) == results


def test_results_without_any_optional_field(show: Open) -> None:
    results = bare_results()
    tab = show(results)
    assert "no labels" in text(tab, "#notes")
    assert not tab.locator("#key").is_visible()
    absent = ("target", "lengths", "ramps", "reliability", "examples", "analysis", "split", "curve")
    for section in absent:
        assert not tab.locator(f"#{section}").is_visible(), section
    slide(tab, 30)
    expected = next(p for p in results["curve"] if p["expected_saving"] >= 0.3)
    assert float(text(tab, "#threshold")) == expected["threshold"]
    assert text(tab, "#command") == "deebert evaluate ckpt=RUN target_saving=0.30"
    del results["environment"]
    results |= {"other_splits": None, "trade_off": None, "analysis": None, "calibration": None}
    assert show(results).locator("#trade").is_visible()


def test_without_a_trade_off_the_curve_itself_is_drawn(show: Open) -> None:
    results = full_results()
    for part in (results, *results["other_splits"]):
        del part["trade_off"], part["analysis"], part["length_bins"]
    results["calibration"] = {"target": {"max_drop": 0.01, "confidence": 0.95, "loss": "excess"}}
    tab = show(results)
    assert tab.locator("#curve .point").count() == len(results["curve"])
    assert tab.locator("#curve .band").count() == 0
    assert "drop in accuracy\tat most 0.010" in text(tab, "#target-table")
    assert text(tab, "#key").startswith("No target was set."), "nothing was measured for it"


@pytest.mark.parametrize(
    ("change", "note"),
    [({"objective": "final"}, "Only the last ramp"), ({"metric": "spearman"}, "a regression")],
)
def test_where_there_is_nothing_to_choose_there_is_no_slider(
    show: Open, change: dict[str, str], note: str
) -> None:
    results = full_results() | change
    del results["trade_off"], results["calibration"]
    results["curve"] = results["curve"][:1]  # full depth
    tab = show(results)
    assert note in text(tab, "#notes")
    assert not tab.locator("#trade").is_visible()
    assert tab.locator("#ramp-table tbody tr").count() == LAYERS


def test_the_report_is_one_small_file_and_refuses_nan() -> None:
    assert len(html_report(full_results()).encode()) < 200_000
    with pytest.raises(ValueError, match="JSON compliant"):
        html_report({"task": math.nan})
