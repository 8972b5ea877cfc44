"""Faithful to the digit: the values that the original DeeBERT code computed."""

import pytest
import torch
from helpers.golden_models import NAMES, load, renamed_key

from deebert.exits.rules import entropy, exit_layer
from deebert.training import losses

# Samples and thresholds at which the original answers with its untrained last ramp.
SLIPS = {"bert-2labels": 0, "bert-3labels": 32, "roberta-2labels": 58, "roberta-3labels": 45}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> tuple:
    model, tensors, facts = load(request.param)
    logits = model(*(tensors[name] for name in INPUTS))
    return model, tensors, facts, logits


def test_logits_and_entropies(golden: tuple) -> None:
    _, tensors, _, logits = golden
    expected = torch.cat([tensors["ramp_logits"][:, :-1], tensors["final_logits"][:, None]], 1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    expected = torch.cat([tensors["ramp_entropy"][:, :-1], tensors["final_entropy"][:, None]], 1)
    torch.testing.assert_close(entropy(logits), expected, atol=1e-5, rtol=0)


def test_losses_of_both_stages(golden: tuple) -> None:
    _, tensors, facts, logits = golden
    labels = tensors["labels"]
    assert losses.final(logits, labels).item() == pytest.approx(facts["stage1_loss"], abs=1e-5)
    assert losses.ramps(logits, labels).item() == pytest.approx(facts["stage2_loss"], abs=1e-5)


def test_stage_2_gradients(golden: tuple) -> None:
    model, tensors, facts, logits = golden
    losses.ramps(logits, tensors["labels"]).backward()
    parameters = dict(model.named_parameters())
    kind, last = facts["model"]["kind"], facts["model"]["num_hidden_layers"] - 1
    compared = 0
    for key, norm in facts["stage2_ramp_grad_norm"].items():
        ours = parameters[renamed_key(key, kind, last)]
        assert ours.grad.norm().item() == pytest.approx(norm, abs=1e-4), key
        compared += 1
    assert compared == 4 * last
    assert all(parameter.grad.norm() == 0 for parameter in model.ramps[-1].parameters())


def test_exit_layers_predictions_and_cost(golden: tuple, request: pytest.FixtureRequest) -> None:
    """Equal but where the original's untrained last ramp answers for the final classifier."""
    _, tensors, facts, logits = golden
    scores = entropy(logits)
    slips = 0
    for key, layers in facts["exit_layer"].items():
        ours = exit_layer(scores, float(key))
        assert ours.tolist() == layers, key
        ratio = ours.float().mean().item() / logits.shape[1]
        assert ratio == pytest.approx(facts["cost_ratio"][key], abs=1e-6)
        predictions = logits.argmax(-1).gather(1, ours[:, None] - 1).squeeze(1)
        slip = (ours == logits.shape[1]) & (tensors["ramp_entropy"][:, -1] < float(key))
        theirs = torch.tensor(facts["prediction"][key])
        assert torch.equal(predictions[~slip], theirs[~slip])
        assert torch.equal(predictions[slip], tensors["final_logits"].argmax(-1)[slip])
        slips += int(slip.sum())
    assert slips == SLIPS[request.node.callspec.params["golden"]]
