import math

import pytest
import torch

from deebert.errors import UserError
from deebert.exits import fitting, rules
from deebert.exits.rules import ExitScores, Rule, entropy, exit_layer


def test_entropy_in_nats() -> None:
    assert entropy(torch.zeros(2)).item() == pytest.approx(math.log(2))
    assert entropy(torch.zeros(5, 3)).tolist() == pytest.approx([math.log(3)] * 5)
    p = torch.tensor([0.7, 0.2, 0.1])
    assert entropy(p.log()).item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)


@pytest.mark.parametrize("gap", [20.0, 200.0, 2e4])
def test_the_most_certain_rows_have_entropy_0_not_nan(gap: float) -> None:
    """The original's -sum p log p is NaN from a gap of 104, so such rows never left."""
    logits = torch.tensor([gap, 0.0])
    assert 0 <= entropy(logits).item() < 1e-6
    assert 0 <= entropy(logits.half()).item() < 1e-6
    assert exit_layer(entropy(logits.expand(1, 3, 2)), 0.001).tolist() == [1]


def test_leaves_at_the_first_ramp_strictly_under_its_threshold() -> None:
    scores = torch.tensor([[0.3, 0.1, 0.0], [0.5, 0.5, 0.0], [0.2, 0.6, 0.6], [0.1, 0.0, 0.9]])
    assert exit_layer(scores, 0.3).tolist() == [2, 3, 1, 1]
    assert exit_layer(scores, 0.2).tolist() == [2, 3, 3, 1]
    assert exit_layer(scores, 0.0).tolist() == [3, 3, 3, 3]


def test_a_threshold_per_ramp() -> None:
    scores = torch.tensor([[0.3, 0.1, 0.0], [0.3, 0.3, 0.0]])
    assert exit_layer(scores, torch.tensor([0.0, 0.2])).tolist() == [2, 3]
    with pytest.raises(RuntimeError):
        exit_layer(scores, torch.tensor([0.1, 0.1, 0.1]))


def test_nan_goes_to_full_depth() -> None:
    assert exit_layer(torch.tensor([[math.nan, math.nan, 0.1]]), 9.0).tolist() == [3]


def logits_of(*rows: list[int], classes: int = 3, strength: float = 4.0) -> torch.Tensor:
    """Each ramp of each row predicts the given class."""
    return strength * torch.nn.functional.one_hot(torch.tensor(rows), classes).float()


def test_probability_and_margin_by_hand() -> None:
    p = torch.tensor([0.7, 0.2, 0.1])
    assert rules.probability(p.log()).item() == pytest.approx(0.3)
    assert rules.margin(p.log()).item() == pytest.approx(0.5)
    sure = torch.tensor([20.0, 0.0, 0.0])
    assert 0 < rules.probability(sure).item() < 1e-8, "1 - p in float32 would be 0"


def test_relative_entropy_by_hand() -> None:
    prior = [0.8, 0.2]
    p = torch.tensor([[0.5, 0.5], [0.8, 0.2], [1 - 1e-9, 1e-9], [1e-9, 1 - 1e-9]])
    known = [
        0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), 0, -math.log(0.8), -math.log(0.2)
    ]  # fmt: skip
    expected = [math.log(5) - each for each in known]
    assert rules.relative_entropy(p.log(), prior).tolist() == pytest.approx(expected, abs=1e-6)
    assert rules.relative_entropy(p.log(), [8, 2]).tolist() == pytest.approx(expected, abs=1e-6)
    random = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0))
    for logits in (random, 20 * random):
        assert torch.equal(rules.relative_entropy(logits, [1 / 3] * 3), entropy(logits))
    rule = rules.named("relative_entropy", 2)
    fitted = rule.fitted(prior=prior)
    assert (rule.needs_prior, fitted.needs_prior) == (True, False)
    assert fitted.fit == {"temperatures": None, "prior": prior}
    assert fitted(p.log()[:, None]).score_NL[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert fitted.grid()[-1] > math.log(5), "all leave"
    with pytest.raises(
        UserError, match="exit=relative_entropy needs a prior, which target_saving="
    ):
        rule(p.log()[:, None])


def test_relative_entropy_of_sure_rows_keeps_its_digits() -> None:
    """ln(1 / min q) less the divergence would be 0 for all of them, or below."""
    gap = torch.tensor([16.0, 20.0, 24.0])
    actual = rules.relative_entropy(torch.stack([-gap / 2, gap / 2], -1), [0.7, 0.3])
    share = [1 / (1 + math.exp(each)) for each in gap.tolist()]  # of the frequent class
    expected = [
        -p * math.log(p) - (1 - p) * math.log1p(-p) + p * math.log(0.7 / 0.3) for p in share
    ]
    assert actual.tolist() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("prior", [[1.0], [0.5, 0.5, 0.0], [0.5, -0.1, 0.6], [], 0.5, "half", [math.inf, 1, 1], ["a", 1, 1]])  # fmt: skip
def test_a_prior_has_a_share_of_each_class(prior: object) -> None:
    with pytest.raises(UserError, match=r"exit.prior=.*must be 3 shares above 0"):
        rules.named("relative_entropy", 3).fitted(prior=prior)
    with pytest.raises(UserError, match="exit=entropy has no prior"):
        rules.named("entropy", 3).fitted(prior=[0.2, 0.3, 0.5])


def test_patience_counts_agreements_in_a_row() -> None:
    """PABEE with patience p is the threshold 1/p, against its counter written out."""
    random = torch.Generator().manual_seed(0)
    labels_NL = torch.randint(0, 2, (300, 7), generator=random)
    score_NL = rules.patience(torch.nn.functional.one_hot(labels_NL, 2).float())
    for p in (1, 2, 3, 6):
        expected = []
        for labels in labels_NL.tolist():
            counter, layer = 0, 7
            for i in range(1, 7):
                counter = counter + 1 if labels[i] == labels[i - 1] else 0
                if counter == p:
                    layer = i + 1
                    break
            expected.append(layer)
        assert exit_layer(score_NL, 1 / p).tolist() == expected, p
    assert exit_layer(score_NL, 1.01).tolist() == [1] * 300


def test_confident_patience_wants_sure_ramps_that_agree() -> None:
    logits = logits_of([0, 1, 1, 1], [2, 2, 2, 2])
    logits[1, 1] /= 100  # an unsure ramp
    score = rules.confident_patience(logits, patience=2)
    assert exit_layer(score, 0.5).tolist() == [3, 4]
    assert torch.equal(rules.confident_patience(logits, patience=1), entropy(logits))


def test_change_of_a_regression() -> None:
    values = torch.tensor([[0.0, 2.0, 2.3, 2.4], [1.0, 1.1, 3.0, 3.05]])[..., None]
    assert exit_layer(rules.change(values), 0.35).tolist() == [3, 2]
    assert exit_layer(rules.change(values, patience=2), 0.35).tolist() == [4, 4]


def test_ensemble_answers_with_the_mean_of_the_ramps_so_far() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 5, 3)
    exit_scores = rules.ensemble(logits)
    mean = logits[:, :3].softmax(-1).mean(1)
    assert torch.allclose(exit_scores.answer_NLC[:, 2].softmax(-1), mean, atol=1e-6)
    assert torch.allclose(exit_scores.score_NL[:, 2], -(mean * mean.log()).sum(-1), atol=1e-5)
    assert torch.allclose(exit_scores.score_NL[:, 0], entropy(logits[:, 0]), atol=1e-5)


def test_vote_leaves_with_more_than_p_votes_for_their_class() -> None:
    logits = logits_of([0, 1, 1, 0, 1], [2, 2, 2, 0, 0])
    exit_scores = rules.vote(logits)
    layers = exit_layer(exit_scores.score_NL, 1 / 2)  # 3 votes
    assert layers.tolist() == [5, 3]
    assert exit_scores.answer_NLC[1, 4].argmax() == 2, "3 votes against 2"
    assert exit_scores.answer_NLC[0, 3].argmax() == 0, "2 against 2, and as sure: the first class"
    logits[0, 1:3] *= 2
    assert rules.vote(logits).answer_NLC[0, 3].argmax() == 1, "2 against 2: the surer votes"


def test_temperatures_are_those_of_least_cross_entropy() -> None:
    torch.manual_seed(0)
    true = torch.tensor([0.5, 1.0, 3.0])
    logits_NC = 2 * torch.randn(20_000, 4)
    labels = torch.distributions.Categorical(logits=logits_NC).sample()
    logits_NLC = logits_NC[:, None] * true[:, None]  # over- and underconfident ramps
    rule = fitting.tempered(Rule("entropy", entropy, 4), logits_NLC, labels)
    assert rule.temperatures is not None
    assert torch.allclose(rule.temperatures, true, rtol=0.05)
    for layer, best in enumerate(rule.temperatures.tolist()):
        least, *others = (
            torch.nn.functional.cross_entropy(logits_NLC[:, layer] / (best * factor), labels)
            for factor in (1, 1.003, 1 / 1.003)
        )
        assert least < min(others), "to a part in a thousand"
    again = entropy(logits_NLC / rule.temperatures[:, None])
    assert torch.equal(rule(logits_NLC).score_NL, again)


def test_a_rule_of_one_s_own() -> None:
    own = Rule("own", lambda logits: 1 / logits.abs().amax(-1), 2)
    assert own(torch.full((4, 3, 2), 5.0)).score_NL.tolist() == [[pytest.approx(0.2)] * 3] * 4
    answering = Rule("own", lambda logits: ExitScores(entropy(logits), -logits), 2)
    assert (answering(torch.ones(1, 2, 2)).answer_NLC == -1).all()
    with pytest.raises(UserError, match=r"exit=own: its function must give .* = \(4, 3\)"):
        Rule("own", lambda logits: logits, 2)(torch.zeros(4, 3, 2))


def test_rules_that_do_not_fit_the_task() -> None:
    with pytest.raises(UserError, match=r"exit=entropy needs classes.*use exit=change"):
        Rule("entropy", entropy, 1)
    with pytest.raises(UserError, match="exit=change is for a regression"):
        Rule("change", rules.change, 3, regression=True)
    assert rules.default(1).name == "change"
    assert rules.default(3).name == "entropy"


def test_the_grid_of_a_promise_depends_on_no_data() -> None:
    grid = Rule("entropy", entropy, 3).grid()
    assert grid == sorted(grid)
    assert grid[0] < 2e-4
    assert math.log(3) < grid[-1] < 1.2
    assert 1 < Rule("margin", rules.margin, 2).grid()[-1] < 1.1
