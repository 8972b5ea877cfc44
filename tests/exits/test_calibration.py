import dataclasses
import math
from functools import cache

import pytest
import torch
from test_curves import task

from deebert.errors import UserError
from deebert.evaluation.evaluate_records import EvaluationConfig, evaluate_records
from deebert.exits import curves, fitting, rules
from deebert.exits.calibration import (
    FOLDS,
    calibration,
    choose,
    folds,
    losses,
)
from deebert.exits.calibration import _cross_fitted as cross_fitted
from deebert.exits.curves import OperatingPoint
from deebert.exits.records import Record, unlike
from deebert.exits.rules import exit_layer
from deebert.exits.target import Target

RULE = rules.default(2)


def simulated(num_rows: int, seed: int = 0, layers: int = 5, split: str = "validation") -> Record:
    """Rows of any difficulty, ramps that get better with depth and are not always right."""
    random = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(0, 2, (num_rows,), generator=random)
    ease_N1 = 3 * torch.rand(num_rows, 1, generator=random)
    noise_NL = torch.randn(num_rows, layers, generator=random) * torch.linspace(2.5, 0.8, layers)
    gap_NL = 1.5 * (ease_N1 + noise_NL) + 0.3
    sign_N1 = 2.0 * labels_N[:, None] - 1
    logits_NLC = torch.stack([-gap_NL * sign_N1 / 2, gap_NL * sign_N1 / 2], -1)
    length_N = torch.randint(5, 60, (num_rows,), generator=random)
    return Record(split, logits_NLC, labels_N, torch.arange(num_rows), length_N)


@pytest.mark.parametrize("saving", [0.2, 0.4, 0.6])
def test_a_saving_chosen_on_held_out_rows_holds_on_others(saving: float) -> None:
    held_out, reported = simulated(2000, 1, split="calibration"), simulated(3000, 2)
    calibrated = calibration(held_out, [reported], task("sst2"), RULE, Target(target_saving=saving))
    assert calibrated.expected.expected_saving == pytest.approx(saving, abs=0.0015)
    assert calibrated.expected.expected_saving >= saving - 1e-9
    assert calibrated.measured.expected_saving == pytest.approx(saving, abs=0.02)
    for name, value in (("interval", "expected_saving"), ("score_interval", "score")):
        low, high = getattr(calibrated.expected, name)
        assert low < getattr(calibrated.expected, value) < high < low + 0.05
    assert calibrated.calibration_split == "calibration"
    assert calibrated.num_calibration == 2000
    # The reported rows' own numbers, at the threshold that is printed.
    layers = exit_layer(rules.entropy(reported.logits_NLC), calibrated.thresholds)
    assert calibrated.measured.exit_counts == layers.bincount(minlength=6)[1:].tolist()


@pytest.mark.slow
def test_the_interval_covers_the_saving_of_unseen_rows() -> None:
    inside = 0
    for seed in range(200):
        held_out, reported = simulated(300, 2 * seed), simulated(200, 2 * seed + 1)
        calibrated = calibration(
            held_out, [reported], task("sst2"), RULE, Target(target_saving=0.4)
        )
        low, high = calibrated.expected.interval
        inside += low <= calibrated.measured.expected_saving <= high
    assert inside >= 180


TRUTH = simulated(200_000, seed=99)
GRID = RULE.grid()


@cache
def true_risks(loss: str) -> torch.Tensor:
    return losses(TRUTH, task("sst2"), RULE, GRID, loss).double().mean(0)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "limit", "num_rows"), [("excess", 0.01, 500), ("disagreement", 0.03, 500)])  # fmt: skip
def test_a_promise_is_broken_in_delta_of_the_draws_at_most(
    loss: str, limit: float, num_rows: int
) -> None:
    """200 calibration samples of a population whose risk is known at every threshold."""
    risk_T = true_risks(loss)
    assert risk_T.max() > 2 * limit, "the promise can be broken"
    random = torch.Generator().manual_seed(0)
    target = Target(max_drop=limit, confidence=0.9, loss=loss)
    broken, saved = 0, []
    for _ in range(200):
        rows = torch.randint(0, len(TRUTH), (num_rows,), generator=random)
        threshold = choose(TRUTH.rows(rows), task("sst2"), RULE, target).thresholds
        risk = risk_T[GRID.index(threshold)].item() if threshold else 0.0
        broken += risk > limit
        saved.append(threshold)
    assert broken <= 0.1 * 200 + 2 * (0.1 * 0.9 * 200) ** 0.5
    assert max(saved) > 0


@pytest.mark.slow
def test_a_promise_on_average_holds_on_average() -> None:
    risk_T = true_risks("disagreement")
    random = torch.Generator().manual_seed(0)
    target = Target(max_drop=0.03, confidence=None, loss="disagreement")
    risks = []
    for _ in range(200):
        rows = torch.randint(0, len(TRUTH), (300,), generator=random)
        threshold = choose(TRUTH.rows(rows), task("sst2"), RULE, target).thresholds
        risks.append(risk_T[GRID.index(threshold)].item() if threshold else 0.0)
    assert sum(risks) / 200 <= 0.032, "0.03, and three standard errors of this mean"
    assert sum(risks) / 200 > 0.01, "and is not given away"


def test_gains_are_set_against_losses() -> None:
    """Early ramps that are right where full depth is wrong: no drop, though answers differ."""
    record = simulated(3000)
    targets = [Target(max_drop=0.02, loss=loss) for loss in ("excess", "disagreement")]
    excess, disagreement = (
        choose(record, task("sst2"), RULE, target).thresholds for target in targets
    )
    assert excess > disagreement > 0


def test_losses_by_hand() -> None:
    # Ramp 1, ramp 2, full depth; labels all 1. Sure where the gap is 8.
    gaps = torch.tensor([[8.0, 8, 8], [-8, 8, 8], [8, -8, -8], [-8, -8, -8], [0.1, -8, 8]])
    record = Record("validation", torch.stack([-gaps / 2, gaps / 2], -1), torch.ones(5, dtype=torch.long), torch.arange(5), torch.ones(5))  # fmt: skip
    losses_NT = losses(record, task("sst2"), RULE, [0.0, 0.1], "excess")
    assert losses_NT.tolist() == [[0, 0], [0, 1], [0, -1], [0, 0], [0, 1]]
    losses_NT = losses(record, task("sst2"), RULE, [0.0, 0.1], "disagreement")
    assert losses_NT.tolist() == [[0, 0], [0, 1], [0, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize("target", [Target(target_saving=0.4), Target(max_drop=0.05), Target(target_saving=0.4, temperature=True)])  # fmt: skip
def test_no_row_has_a_part_in_the_thresholds_it_is_measured_with(target: Target) -> None:
    record = simulated(500)
    before, _, _ = cross_fitted(record, task("sst2"), RULE, target)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    fold = order[1::FOLDS]
    # Other labels, and other logits behind the first ramp, for one fold alone.
    changed = dataclasses.replace(record, labels_N=record.labels_N.clone(), logits_NLC=record.logits_NLC.clone())  # fmt: skip
    changed.labels_N[fold] = 1 - changed.labels_N[fold]
    changed.logits_NLC[fold, 2:] = 0
    after, _, _ = cross_fitted(changed, task("sst2"), RULE, target)
    early = before[fold] <= 2
    assert early.any()
    assert torch.equal(before[fold][early], after[fold][early]), "same thresholds for that fold"
    rest = torch.ones(500, dtype=torch.bool)
    rest[fold] = False
    assert not torch.equal(before[rest], after[rest]), "other thresholds for the other folds"


def test_cross_fitting_reports_every_row_once() -> None:
    record = simulated(503)
    calibrated = calibration(None, [record], task("sst2"), RULE, Target(target_saving=0.4))
    assert sum(calibrated.measured.exit_counts) == 503
    assert calibrated.calibration_split == "validation, cross-fitted in 5 folds"
    assert calibrated.measured.expected_saving == pytest.approx(0.4, abs=0.02)


def unbalanced(num_rows: int, seed: int) -> Record:
    """Of class 1 are three in ten; each ramp says what Bayes would, the early ones know little."""
    random = torch.Generator().manual_seed(seed)
    labels_N = (torch.rand(num_rows, generator=random) < 0.3).long()
    mean_L = torch.linspace(0.3, 1.0, 5)
    seen_NL = (2.0 * labels_N - 1)[:, None] * mean_L + torch.randn(num_rows, 5, generator=random)
    gap_NL = 2 * mean_L * seen_NL - math.log(7 / 3)
    logits_NLC = torch.stack([-gap_NL / 2, gap_NL / 2], -1)
    every = torch.arange(num_rows)
    return Record("validation", logits_NLC, labels_N, every, every + 1)


def test_the_prior_is_what_serves_the_metric() -> None:
    seen, unseen, target = unbalanced(4000, 1), unbalanced(20_000, 2), Target(target_saving=0.5)
    rule = rules.named("relative_entropy", 2)
    scores = {}
    for name, prior in (("mrpc", [0.7, 0.3]), ("sst2", [0.5, 0.5])):
        operating_point = choose(seen, task(name), rule, target)
        assert operating_point.rule.prior == pytest.approx(prior, abs=0.02), name
        calibrated = calibration(seen, [unseen], task(name), rule, target)
        assert calibrated.prior == operating_point.rule.prior
        scores[name] = calibrated.measured.score
        assert calibrated.measured.expected_saving == pytest.approx(0.5, abs=0.02)
    by_entropy = calibration(seen, [unseen], task("mrpc"), RULE, target).measured.score
    assert scores["mrpc"] > by_entropy + 0.04
    accuracy = calibration(seen, [unseen], task("sst2"), RULE, target).measured.score
    assert scores["sst2"] == pytest.approx(accuracy, abs=1e-9), "a uniform prior is entropy"


def test_folds_are_measured_with_what_the_other_rows_chose() -> None:
    record, target = unbalanced(2000, 1), Target(target_saving=0.5)
    rule, mrpc = rules.named("relative_entropy", 2), task("mrpc")
    calibrated = calibration(None, [record], mrpc, rule, target)
    fold_N = folds(len(record))
    predictions_N = torch.empty_like(record.labels_N)
    for fold, (threshold, fit) in enumerate(
        zip(calibrated.fold_thresholds, calibrated.fold_fits, strict=True)
    ):
        assert fit["prior"] == choose(record.rows(fold_N != fold), mrpc, rule, target).rule.prior
        operating_point = OperatingPoint(rule.fitted(**fit), threshold)
        predictions_N[fold_N == fold] = operating_point(record.rows(fold_N == fold), mrpc)[1]
    assert mrpc.score(predictions_N, record.labels_N) == calibrated.measured.score


def test_a_fold_of_too_few_rows_runs_to_full_depth_without_a_prior() -> None:
    record, rule = unbalanced(22, 1), rules.named("relative_entropy", 2)
    calibrated = calibration(None, [record], task("mrpc"), rule, Target(target_saving=0.4))
    assert calibrated.folds_at_full_depth == 5
    assert (calibrated.fold_thresholds, calibrated.fold_fits) == ([0.0] * 5, [None] * 5)
    assert calibrated.measured.expected_saving == 0


def test_a_prior_is_chosen_for_savings_on_labelled_rows() -> None:
    record, rule = unbalanced(2000, 1), rules.named("relative_entropy", 2)
    with pytest.raises(UserError, match="exit=relative_entropy needs a prior"):
        choose(record, task("mrpc"), rule, Target(max_drop=0.05))
    given = rule.fitted(prior=[0.7, 0.3])
    assert choose(record, task("mrpc"), given, Target(max_drop=0.05)).rule.prior == [0.7, 0.3]
    unlabelled = dataclasses.replace(record, labels_N=None)
    with pytest.raises(
        UserError, match=r"exit=relative_entropy without exit.prior=\[...\] needs labels"
    ):
        choose(unlabelled, task("mrpc"), rule, Target(target_saving=0.4))
    choose(unlabelled, task("mrpc"), given, Target(target_saving=0.4))


def test_with_temperatures_the_prior_is_chosen_for_the_tempered() -> None:
    rule, target = rules.named("relative_entropy", 2), Target(target_saving=0.4, temperature=True)
    operating_point = choose(unbalanced(2000, 1), task("mrpc"), rule, target)
    assert operating_point.rule.prior is not None
    assert operating_point.rule.temperatures is not None
    again = rule.fitted(**operating_point.rule.fit)
    logits = unbalanced(100, 3).logits_NLC
    assert torch.equal(again(logits).score_NL, operating_point.rule(logits).score_NL)


@pytest.mark.parametrize("name", ["vote", "ensemble", "patience", "entropy"])
@pytest.mark.parametrize("temperature", [False, True])
def test_full_depth_is_the_final_classifier_for_every_rule(name: str, temperature: bool) -> None:
    """A promise against another full depth than the one that is run would be void."""
    rule = rules.Rule(name, getattr(rules, name), 2)
    record = simulated(2000)
    if temperature:
        rule = fitting.tempered(rule, record.logits_NLC, record.labels_N)
    assert (losses(record, task("sst2"), rule, [0.0], "disagreement") == 0).all()
    target = Target(max_drop=0.05, loss="disagreement", temperature=temperature)
    operating_point = choose(record, task("sst2"), rule, target)
    layer_N, predictions_N = operating_point(TRUTH, task("sst2"))
    full_N = TRUTH.logits_NLC[:, -1].argmax(-1)
    assert (predictions_N != full_N).double().mean() < 0.06
    assert torch.equal(predictions_N[layer_N == 5], full_N[layer_N == 5])


def test_gains_do_not_balance_losses_on_average() -> None:
    """One threshold that gains in a quarter of the rows and loses a little more often: the risk
    that is bounded is a running maximum over full depth, too."""
    target = Target(max_drop=0.01, confidence=None)
    labels = torch.ones(400, dtype=torch.long)
    gap = torch.full((400, 2), 8.0)
    gap[:100, 1] = -8  # right at ramp 1, wrong at full depth
    gap[100:112, 0] = -8  # the other way round: 3 % lost
    record = Record("validation", torch.stack([-gap / 2, gap / 2], -1), labels, torch.arange(400), torch.ones(400))  # fmt: skip
    layer_N, _ = choose(record, task("sst2"), RULE, target)(record, task("sst2"))
    assert (layer_N == 2).all()


def test_a_saving_that_a_rule_cannot_reach() -> None:
    record = simulated(500)
    with pytest.raises(UserError, match=r"target_saving=0.9 is more than exit=entropy can save: 0.800"):  # fmt: skip
        choose(record, task("sst2"), RULE, Target(target_saving=0.9))
    with pytest.raises(UserError, match=r"19 calibration rows .* too few"):
        choose(record.rows(torch.arange(19)), task("sst2"), RULE, Target(target_saving=0.4))


def test_intervals_stay_where_values_can_be() -> None:
    few = simulated(20)
    calibrated = calibration(few, [simulated(30, 1)], task("sst2"), RULE, Target(target_saving=0.7))
    low, high = calibrated.expected.interval
    assert 0 <= low < high <= 0.8
    low, high = calibrated.expected.score_interval
    assert -1 <= low < high <= 1


@pytest.mark.parametrize(("name", "lowest"), [("sst2", 0), ("mrpc", 0), ("cola", -1), ("stsb", -1)])
def test_only_a_correlation_can_be_negative(name: str, lowest: int) -> None:
    assert task(name).lowest_score == lowest


def test_an_f1_of_nothing_is_not_under_it() -> None:
    few = simulated(20)
    wrong_NC = 9.0 * torch.nn.functional.one_hot(1 - few.labels_N, 2)
    few = dataclasses.replace(few, logits_NLC=wrong_NC[:, None].expand(-1, 5, -1))
    calibrated = calibration(few, [few], task("mrpc"), RULE, Target(target_saving=0.4)).expected
    low, high = calibrated.score_interval
    assert calibrated.score == 0 == low < high


def test_other_splits_are_measured_with_the_same_thresholds() -> None:
    first, second = simulated(400, 1), simulated(300, 2, split="validation_mismatched")
    calibrated = calibration(None, [first, second], task("sst2"), RULE, Target(target_saving=0.4))
    layers = exit_layer(rules.entropy(second.logits_NLC), calibrated.thresholds)
    there = calibrated.measured_elsewhere["validation_mismatched"]
    assert there.exit_counts == layers.bincount(minlength=6)[1:].tolist()


def test_a_promise_with_temperatures_is_made_by_rows_that_had_no_part_in_them() -> None:
    record = simulated(1000)
    operating_point = choose(record, task("sst2"), RULE, Target(max_drop=0.05, temperature=True))
    assert operating_point.rule.temperatures is not None
    with pytest.raises(UserError, match="by 100 calibration rows"):
        choose(record.rows(torch.arange(200)), task("sst2"), RULE, Target(max_drop=0.02, temperature=True))  # fmt: skip


def test_rows_that_are_plainly_unlike() -> None:
    record = simulated(800)
    assert unlike(record, simulated(500, 1)) is None
    longer = dataclasses.replace(simulated(500, 1), length_N=torch.randint(40, 90, (500,)))
    assert "tokens 3" in unlike(record, longer)
    surer = dataclasses.replace(simulated(500, 1), logits_NLC=3 * record.logits_NLC[:500])
    assert "largest probability" in unlike(record, surer)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"target_saving": 1.0}, r"target_saving=1.0 must be in \[0, 1\)"),
        ({"target_saving": -0.1}, "target_saving=-0.1 must be in"),
        ({"target_saving": "40%"}, "target_saving='40%' must be in"),
        ({"max_drop": 0}, r"max_drop=0 must be in \(0, 1\)"),
        ({"max_drop": -0.01}, "max_drop=-0.01 must be in"),
        ({"max_drop": 0.01, "confidence": 1.0}, "confidence=1.0 must be in"),
        ({"max_drop": 0.01, "confidence": 0}, "confidence=0 must be in"),
        ({"max_drop": 0.01, "loss": "f1"}, "choose one of: excess, disagreement"),
        ({"max_drop": 0.01, "per_ramp": True}, "leave per_ramp out"),
    ],
)
def test_a_target_that_makes_no_sense(values: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Target(**values)


def test_a_promise_that_cannot_be_made() -> None:
    few = simulated(100)
    with pytest.raises(UserError, match=r"max_drop=0.01 cannot be promised by 100 .* smallest is 0.0296"):  # fmt: skip
        choose(few, task("sst2"), RULE, Target(max_drop=0.01))
    assert choose(few, task("sst2"), RULE, Target(max_drop=0.0296)) is not None
    with pytest.raises(UserError, match=r"smallest is 0.00991 at confidence=null"):
        choose(few, task("sst2"), RULE, Target(max_drop=0.005, confidence=None))
    unlabelled = dataclasses.replace(simulated(1000), labels_N=None)
    with pytest.raises(UserError, match="max_drop with loss=excess needs labels"):
        choose(unlabelled, task("sst2"), RULE, Target(max_drop=0.05))
    assert choose(unlabelled, task("sst2"), RULE, Target(max_drop=0.05, loss="disagreement")).thresholds  # fmt: skip
    values = dataclasses.replace(simulated(1000), logits_NLC=torch.randn(1000, 5, 1), labels_N=torch.randn(1000))  # fmt: skip
    with pytest.raises(UserError, match="task stsb is a regression"):
        choose(values, task("stsb"), rules.default(1), Target(max_drop=0.05))


def test_a_regression_has_a_target_saving() -> None:
    values = torch.randn(500, 5, 1).cumsum(1)
    record = Record("validation", values, values[:, -1, 0] + torch.randn(500), torch.arange(500), torch.ones(500))  # fmt: skip
    calibrated = calibration(
        None, [record], task("stsb"), rules.default(1), Target(target_saving=0.4)
    )
    assert calibrated.measured.expected_saving == pytest.approx(0.4, abs=0.03)
    assert 0 < calibrated.measured.score < calibrated.measured.full_depth_score
    assert calibrated.measured.excess is None


def test_what_is_drawn_is_what_was_calibrated() -> None:
    record, target = unbalanced(500, 1), Target(target_saving=0.4, temperature=True)
    result = evaluate_records([record], task("sst2"), EvaluationConfig(RULE, [0.3], target))
    tempered = RULE.fitted(result.calibration.temperatures)
    assert result.splits[0].curve == curves.curve(record, task("sst2"), tempered, [0.3])
    assert result.splits[0].curve != curves.curve(record, task("sst2"), RULE, [0.3])
