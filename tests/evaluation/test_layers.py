"""Layer by layer, against a direct computation on the tiny backbone."""

import copy
import json

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf

from deebert.data.tasks import Task
from deebert.evaluation.layers import layer_table, linear_cka
from deebert.models import backbones
from deebert.models.architectures import ARCHITECTURES
from deebert.models.early_exit import EarlyExitModel
from deebert.reporting.blocks import plain

SPEC = ROOT / "conf" / "backbone" / "tiny.yaml"
STSB = Task("stsb", ("text",), None, ("pearson",))  # a score without steps: equal means equal
DEMO = Task("demo", ("text",), ("bad", "good"), ("accuracy",))


def build(model_type: str = "bert", num_labels: int = 1) -> EarlyExitModel:
    torch.manual_seed(0)
    spec = OmegaConf.to_container(OmegaConf.load(SPEC))
    spec["config"] |= {"model_type": model_type, "initializer_range": 0.3}  # layers that do much
    return EarlyExitModel.from_backbone(spec, num_labels)


def batches(num_rows: int = 24, *, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    """Batches of 8, sorted by length and cut to their longest."""
    torch.manual_seed(1)
    lengths = torch.randint(3, 30, (num_rows,)).sort().values
    ids = torch.randint(5, 60, (num_rows, 30))
    mask = (torch.arange(30) < lengths[:, None]).long()
    rows = {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
    }
    rows |= {"labels": torch.rand(num_rows) * 5} if labels else {}
    rows |= {"index": torch.randperm(num_rows), "length": lengths}
    listed = []
    for first in range(0, num_rows, 8):
        batch = {name: values[first : first + 8] for name, values in rows.items()}
        longest = int(batch["length"].max())
        listed.append({n: v[:, :longest] if v.dim() == 2 else v for n, v in batch.items()})
    return listed


def one_by_one() -> list[dict[str, torch.Tensor]]:
    """The same rows without padding."""
    return [
        {
            n: v[i : i + 1, : int(batch["length"][i])] if v.dim() == 2 else v[i : i + 1]
            for n, v in batch.items()
        }
        for batch in batches()
        for i in range(len(batch["length"]))
    ]


def inputs(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_score_without_a_layer_is_that_of_a_model_that_never_had_it(model_type: str) -> None:
    model = build(model_type).eval()
    table = layer_table(model, batches(), STSB)
    labels = torch.cat([batch["labels"] for batch in batches()])

    def score(backbone: backbones.Backbone) -> float:
        values = []
        for batch in batches():
            hidden, context = backbone.embed(*inputs(batch))
            for index in range(len(backbone.layers)):
                hidden = backbone.run_layer(index, hidden, context)
            values.append(model.ramps[-1](hidden[:, 0]))
        return STSB.score(torch.cat(values).squeeze(-1), labels)

    assert table.num_rows == 24
    assert table.score == pytest.approx(score(model.backbone), abs=1e-6)
    for k, row in enumerate(table.layers):
        shorter = copy.deepcopy(model.backbone)
        del shorter.layers[k]
        assert len(shorter.layers) == 2
        assert row.layer == k + 1
        assert row.score_without == pytest.approx(score(shorter), abs=1e-6)
        assert row.score_drop == pytest.approx(table.score - row.score_without, abs=1e-12)
        assert abs(row.score_drop) > 1e-4, "these layers do something"


@torch.no_grad()
def test_block_influence_token_by_token() -> None:
    model = build().eval()
    cosines = [[], [], []]
    for row in one_by_one():
        hidden, context = model.backbone.embed(*inputs(row))
        for k in range(3):
            after = model.backbone.run_layer(k, hidden, context)
            for x, y in zip(hidden[0], after[0], strict=True):
                cosines[k].append((x @ y / (x.norm() * y.norm())).item())
            hidden = after
    table = layer_table(model, batches(), STSB)
    expected = [1 - sum(values) / len(values) for values in cosines]
    assert [row.block_influence for row in table.layers] == pytest.approx(expected, abs=1e-5)


def test_padding_does_not_matter() -> None:
    model = build()
    padded, bare = layer_table(model, batches(), STSB), layer_table(model, one_by_one(), STSB)
    assert padded.score == pytest.approx(bare.score, abs=1e-5)
    for mine, theirs in zip(padded.layers, bare.layers, strict=True):
        assert vars(mine) == pytest.approx(vars(theirs), abs=1e-4)


@torch.no_grad()
def test_cka_of_the_first_tokens() -> None:
    model = build().eval()
    table = layer_table(model, batches(), STSB)
    states = torch.cat([model.states(*inputs(batch)) for batch in batches()]).unflatten(1, (3, -1))
    n = 24

    def hsic(i: int, j: int) -> torch.Tensor:
        """Song et al. 2012, equation 5: kernels without their diagonal."""
        k, m = (states[:, x].double() @ states[:, x].double().T for x in (i, j))
        k, m = k - k.diag().diag(), m - m.diag().diag()
        between = k.sum() * m.sum() / ((n - 1) * (n - 2))
        return (k @ m).trace() + between - 2 / (n - 2) * (k @ m).sum()

    for i in range(3):
        for j in range(3):
            expected = hsic(i, j) / (hsic(i, i) * hsic(j, j)).sqrt()
            assert table.cka[i][j] == pytest.approx(expected.item(), abs=1e-4)
        assert table.cka[i][i] == pytest.approx(1)
        assert table.layers[i].cka_with_last == table.cka[i][2]


def test_cka_knows_no_rotation_scale_or_shift() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 16) @ torch.randn(16, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    faint = 1 + 1e-3 * x  # as early layers' first tokens
    cka = linear_cka(torch.stack([x, 7 * x @ rotation + 3, faint, torch.randn(200, 16)], 1))
    torch.testing.assert_close(
        cka[:3, :3], torch.ones(3, 3, dtype=torch.float64), atol=1e-4, rtol=0
    )
    assert abs(cka[0, 3]) < 0.1, "unrelated"
    torch.testing.assert_close(cka, cka.T)


def test_cka_of_noise_is_zero_with_fewer_rows_than_features() -> None:
    torch.manual_seed(0)
    cka = linear_cka(torch.randn(100, 3, 300))
    assert cka.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert cka.triu(1).abs().max() < 0.05


def test_constant_states_have_no_cka() -> None:
    states = torch.randn(9, 2, 4)
    states[:, 0] = 0.1
    assert linear_cka(states).isnan().tolist() == [[True, True], [True, False]]


def test_max_rows_are_spread_over_the_lengths() -> None:
    model = build()
    everything = batches()
    for most, expected in ((24, 24), (100, 24), (12, 12), (11, 8), (5, 5), (2, 2), (1, 1)):
        assert layer_table(model, iter(everything), STSB, max_rows=most).num_rows == expected
    chosen = [{name: values[1 if i == 1 else 0 :: 3] for name, values in batch.items()}
              for i, batch in enumerate(everything)]  # fmt: skip
    chosen[2] = {name: values[2::3] for name, values in everything[2].items()}
    picked = layer_table(model, everything, STSB, max_rows=8)
    assert picked == layer_table(model, chosen, STSB), "rows 0, 3, 6, 9, ..., not the 8 shortest"


def test_without_labels_there_are_no_scores() -> None:
    table = layer_table(build(), batches(labels=False), STSB)
    assert table.score is None
    assert {(row.score_without, row.score_drop) for row in table.layers} == {(None, None)}
    assert all(row.block_influence > 0 for row in table.layers)


def test_plain_values_and_an_untouched_model() -> None:
    model = build(num_labels=2)
    model.train()
    model.backbone.eval()  # as stage 2 has it
    before = {name: part.training for name, part in model.named_modules()}
    rows = [batch | {"labels": (batch["labels"] > 2).long()} for batch in batches()]
    first = layer_table(model, rows, DEMO)
    assert first == layer_table(model, rows, DEMO), "no dropout"
    assert before == {name: part.training for name, part in model.named_modules()}
    assert all(parameter.grad is None for parameter in model.parameters())
    json.dumps(plain(first), allow_nan=False)
    assert 0 <= first.score <= 1


def test_one_row_is_enough_for_everything_but_cka() -> None:
    table = layer_table(build(), batches(1), STSB)
    assert table.cka == [[None] * 3] * 3
    assert table.layers[0].block_influence > 0
