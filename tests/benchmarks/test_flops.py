"""The closed formula against torch's own counter, on tiny random encoders with eager attention."""

from collections.abc import Callable

import flops
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from deebert.models.early_exit import EarlyExitModel
from deebert.models.ramp_readers import READERS
from deebert.models.ramps import RampKind

BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
}
DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": 50,
    "dim": 24,
    "hidden_dim": 56,
    "n_layers": 4,
    "n_heads": 3,
}
SIZES = flops.Sizes(hidden_size=24, intermediate_size=56, num_layers=4, num_labels=3)
BASE = flops.Sizes(hidden_size=768, intermediate_size=3072, num_layers=12, num_labels=2)


def counted(work: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def tokens(num_rows: int, num_tokens: int, num_padding: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.ones(num_rows, num_tokens, dtype=torch.long)
    mask[:, num_tokens - num_padding :] = 0
    return {"input_ids": torch.randint(5, 50, (num_rows, num_tokens)), "attention_mask": mask}


@pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=["bert", "distilbert"])
def test_sizes_from_a_configuration(config):
    assert flops.sizes_of(config, num_labels=3) == SIZES
    model = EarlyExitModel({**config, "attn_implementation": "eager"}, 3)
    assert flops.sizes_of(model.config, num_labels=3) == SIZES


@pytest.mark.parametrize(("num_tokens", "num_padding"), [(1, 0), (11, 0), (16, 5)])
def test_full_depth_equals_the_counted_classifier(num_tokens, num_padding):
    config = BertConfig(**BERT, num_labels=3, attn_implementation="eager")
    model = BertForSequenceClassification(config).eval()
    expected = counted(lambda: model(**tokens(1, num_tokens, num_padding)))
    assert flops.plain(SIZES, num_tokens, exit_layer=4, evaluated_ramps=()) == expected


@pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=["bert", "distilbert"])
@pytest.mark.parametrize("exit_layer", [1, 2, 4])
@pytest.mark.parametrize("evaluated_ramps", [(), (1, 2), range(1, 5)], ids=str)
def test_layers_and_ramps_equal_the_counted_ones(config, exit_layer, evaluated_ramps):
    model = EarlyExitModel(config, 3).eval()
    model.backbone.encoder.set_attn_implementation("eager")  # the counter knows no other

    def run() -> None:
        hidden_BSH, mask = model.backbone.embed(**tokens(1, 16, 5))
        for number in range(1, exit_layer + 1):
            hidden_BSH = model.backbone.layers[number - 1](hidden_BSH, mask)
            if number in evaluated_ramps or number == exit_layer:
                model.ramps[number - 1](hidden_BSH[:, 0])

    assert flops.plain(SIZES, 16, exit_layer, evaluated_ramps) == counted(run)


@pytest.mark.parametrize("reads", READERS)
@pytest.mark.parametrize("sees_previous", [False, True])
def test_every_kind_of_ramp_equals_the_counted_one(reads, sees_previous):
    kind = RampKind(reads=reads, sees_previous=sees_previous)
    sizes = SIZES._replace(ramp=kind)
    model = EarlyExitModel(BERT, 3, vars(kind)).eval()
    hidden_BSH, mask_BS = torch.randn(1, 16, 24), torch.ones(1, 16, dtype=torch.long)

    def run() -> None:
        for each in model.all_ramps:
            each(each.read(hidden_BSH, hidden_BSH, mask_BS, torch.tensor([9])), torch.zeros(1, 3))

    assert flops.ramps(sizes, 16, 4, range(1, 5)) == counted(run)
    deep = flops.plain(sizes, 16, 2, (1, 2))
    waits = flops.first_token_first(sizes, 16, 2, (1, 2)) < deep
    assert waits == (reads in ("first", "first_and_mean"))


@pytest.mark.parametrize("num_tokens", [1, 13])
@pytest.mark.parametrize("exit_layer", [1, 3, 4])
def test_first_token_first_equals_the_layers_written_by_hand(num_tokens, exit_layer):
    model = EarlyExitModel({**BERT, "attn_implementation": "eager"}, 3).eval()
    inputs = tokens(1, num_tokens)
    with torch.no_grad():
        states_LH = model.states(**inputs)[0].unflatten(0, (4, 24))

    def run() -> None:
        hidden_SH = model.backbone.embed(**inputs)[0][0]
        for number in range(1, exit_layer + 1):
            bert = model.backbone.layers[number - 1]
            keys_SH = apply(bert.attention.self.key, hidden_SH)
            values_SH = apply(bert.attention.self.value, hidden_SH)
            first_1H = rest_of_layer(bert, hidden_SH[:1], keys_SH, values_SH)
            torch.testing.assert_close(first_1H[0], states_LH[number - 1])  # it is that layer
            model.ramps[number - 1](first_1H)
            if number < exit_layer:  # the input goes on
                others_RH = rest_of_layer(bert, hidden_SH[1:], keys_SH, values_SH)
                hidden_SH = torch.cat([first_1H, others_RH])

    assert flops.first_token_first(SIZES, num_tokens, exit_layer, range(1, 5)) == counted(run)


def apply(module: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return linear(states, module.weight, module.bias)


def rest_of_layer(
    bert: nn.Module, hidden_QH: torch.Tensor, keys_SH: torch.Tensor, values_SH: torch.Tensor
) -> torch.Tensor:
    """A BERT layer for Q of its S tokens, given the keys and values of all: -> (Q, H)."""
    attention, num_heads = bert.attention, BERT["num_attention_heads"]
    query, key, value = (
        states.unflatten(-1, (num_heads, -1)).transpose(0, 1)  # (heads, Q or S, H / heads)
        for states in (apply(attention.self.query, hidden_QH), keys_SH, values_SH)
    )
    weights = torch.softmax(query @ key.mT / key.shape[-1] ** 0.5, -1)
    mixed_QH = (weights @ value).transpose(0, 1).flatten(1)
    hidden_QH = attention.output.LayerNorm(apply(attention.output.dense, mixed_QH) + hidden_QH)
    inner_QI = gelu(apply(bert.intermediate.dense, hidden_QH))
    return bert.output.LayerNorm(apply(bert.output.dense, inner_QI) + hidden_QH)


@pytest.mark.parametrize("num_tokens", [8, 29, 128])
def test_leaving_at_layer_k_costs_about_k_less_five_sixths(num_tokens):
    for k in range(1, 13):
        cost = flops.first_token_first(BASE, num_tokens, k, range(1, 13))
        assert cost < flops.plain(BASE, num_tokens, k, range(1, 13))
        # Beyond k - 5/6: the first token itself, and k ramps, each 1/12 of a token's layer.
        layers = cost / flops.layer(BASE, num_tokens)
        assert layers == pytest.approx(k - 5 / 6, abs=(5 / 6 + k / 12) / num_tokens + 0.01)


def test_last_layer_needs_its_first_token_only():
    one_ramp = 2 * 768 * 768 + 2 * 768 * 2
    first_only = flops.keys_values(BASE, 29) + flops.queries(BASE, 29, 1)
    cost = flops.first_token_first(BASE, 29, 12, evaluated_ramps=())
    assert cost == 11 * flops.layer(BASE, 29) + first_only + one_ramp


def test_total_adds_up_the_rows():
    exits, lengths, evaluated_ramps = torch.tensor([1, 4, 2, 1]), torch.tensor([5, 9, 5, 5]), (1, 2)
    full = 3 * flops.plain(SIZES, 5, 4, ()) + flops.plain(SIZES, 9, 4, ())
    for cost in (flops.plain, flops.first_token_first):
        rows = zip(lengths.tolist(), exits.tolist(), strict=True)
        expected = sum(cost(SIZES, num_tokens, k, evaluated_ramps) for num_tokens, k in rows)
        spent, saved = flops.total(SIZES, exits, lengths, evaluated_ramps, cost)
        assert spent == expected
        assert saved == pytest.approx(1 - expected / full)
    assert flops.total(SIZES, torch.full((4,), 4), lengths, (), flops.plain) == (full, 0.0)
