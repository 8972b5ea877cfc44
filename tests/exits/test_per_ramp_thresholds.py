import numpy as np
import torch
from test_calibration import simulated, task

from deebert.exits import curves, per_ramp_thresholds, rules
from deebert.exits.calibration import choose
from deebert.exits.records import Record
from deebert.exits.rules import exit_layer
from deebert.exits.target import Target

RULE = rules.default(2)


def overconfident(num_rows: int, seed: int = 0) -> Record:
    """Ramp 1 is as sure as ramp 3 and right half of the time; one threshold must take both."""
    record = simulated(num_rows, seed)
    random = torch.Generator().manual_seed(seed + 1)
    sign = 2.0 * (torch.rand(num_rows, generator=random) < 0.5) - 1
    sure = 4 + 2 * torch.rand(num_rows, generator=random)
    record.logits_NLC[:, 0, 0], record.logits_NLC[:, 0, 1] = -sign * sure / 2, sign * sure / 2
    return record


def right(record: Record, thresholds: float | list[float]) -> tuple[float, float]:
    layer_N = exit_layer(rules.entropy(record.logits_NLC), thresholds)
    answers = record.logits_NLC.argmax(-1).gather(1, layer_N[:, None] - 1).squeeze(1)
    return (
        answers == record.labels_N
    ).double().mean().item(), 1 - layer_N.double().mean().item() / 5


def test_a_ramp_that_does_not_pay_is_dropped() -> None:
    seen, new = overconfident(2000), overconfident(4000, 7)
    operating_point = choose(seen, task("sst2"), RULE, Target(target_saving=0.3, per_ramp=True))
    assert isinstance(operating_point.thresholds, list)
    assert operating_point.thresholds[0] == 0, "as sure as others, and no better than a coin"
    [one] = curves.thresholds_for(rules.entropy(seen.logits_NLC), [0.3])
    score, saving = right(new, operating_point.thresholds)
    assert saving > 0.28
    assert score > right(new, one)[0] + 0.08
    assert right(seen, operating_point.thresholds)[1] >= 0.3


def test_where_one_threshold_is_as_good_it_is_kept() -> None:
    """Ramps that are all as right as they are sure: nothing to gain, much to overfit."""
    kept = 0
    for seed in range(10):
        operating_point = choose(simulated(300, seed), task("sst2"), RULE, Target(target_saving=0.4, per_ramp=True))  # fmt: skip
        kept += not isinstance(operating_point.thresholds, list)
    assert kept >= 5


def test_ramps_without_an_opinion_are_no_exits() -> None:
    """Scores of inf (patience not reached yet) are never under a threshold."""
    record = overconfident(1500)
    rule = rules.Rule("confident_patience", rules.confident_patience, 2)
    exit_scores = curves.exit_scores_of(rule, record)
    right_NL = exit_scores.answer_NLC.argmax(-1) == record.labels_N[:, None]
    for saving in (0.2, 0.4, 0.5):
        actual = per_ramp_thresholds.search(exit_scores.score_NL, right_NL, saving)
        if actual is not None:
            saved = 1 - exit_layer(exit_scores.score_NL, actual).double().mean().item() / 5
            assert saved >= saving


def test_rows_of_equal_scores_leave_together() -> None:
    """A rule with steps: the best place within a step is none that a threshold can have."""
    score = np.array([[0.1, 0.0]] * 4 + [[0.2, 0.0]] * 4, np.float32)
    worth = np.array([[1, 0]] * 2 + [[0, 1]] * 4 + [[1, 0]] * 2, float)
    order = [np.arange(8)]  # the first two gain, the next four lose, the last two gain
    start = np.zeros(1, np.float32)
    assert per_ramp_thresholds._ascend(score, worth, 0.0, order, start).tolist() == [0.0]
    left = per_ramp_thresholds._ascend(score, worth[[0, 1, 6, 2, 3, 4, 5, 7]], 0.0, order, start)
    assert 0.1 < left[0] <= 0.2, "all of the first step, none of the second"


def test_a_threshold_is_above_its_row_in_float32() -> None:
    ordered = torch.tensor([0.3, 0.3]).numpy()
    ordered[1] = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0)).item()
    limit = torch.tensor(per_ramp_thresholds._above(ordered, 0))
    assert ordered[0] < limit <= ordered[1]
