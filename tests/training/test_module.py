"""What each stage trains, in which mode, on which gradients."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.tiny_models import VARIANTS, tiny
from helpers.trainings import QUIET, SaveAndStop, a_batch, build, fit, plain, source
from lightning.pytorch.plugins import MixedPrecision

from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import UNLABELLED
from deebert.errors import UserError
from deebert.hub.run_config import RunConfig
from deebert.models.early_exit import EarlyExitModel
from deebert.training.feature_cache import FeatureCache
from deebert.training.module import EarlyExitModule
from deebert.training.objectives import PAPER

KINDS = ("stage 1", "stage 2 cached", "stage 2 faithful")
JOINT = (
    "joint", "weighted", "distill", "exit_weighted", "equilibrium", "detached", "alternating",
    "mixed",
)  # fmt: skip


pytestmark = pytest.mark.filterwarnings(*QUIET)


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        *((kind, PAPER[int(kind[6])]) for kind in KINDS),
        *(("stage 1", objective) for objective in JOINT),
        *((kind, name) for kind in KINDS[1:] for name in ("distill", "exit_weighted")),
    ],
)
def test_what_trains_and_in_which_mode(
    kind: str, objective: str, glue: Path, tmp_path: Path
) -> None:
    module, data = build(kind, glue, objective=objective, batch_size=32)  # 3 steps an epoch
    before = {name: value.clone() for name, value in module.model.named_parameters()}
    # The second epoch comes after a validation, which puts everything in eval mode for a while.
    spy = fit(module, source(module, data, tmp_path), tmp_path)
    changed = {
        name
        for name, value in module.model.named_parameters()
        if not torch.equal(value, before[name])
    }

    ramps = {name for name in before if name.startswith("ramps.")}
    last = {name for name in ramps if name.startswith("ramps.2.")}
    backbone = set(before) - ramps
    top = {name for name in backbone if ".layer.2." in name}
    final = backbone | last  # what the final classifier's loss moves
    trained = ramps - last
    if kind == "stage 1":
        trained = final if objective == "final" else set(before)
    # Unused word pieces have no gradient, but the table as a whole does.
    assert changed == trained
    if "faithful" not in kind:
        assert {n for n, p in module.model.named_parameters() if p.requires_grad} == trained
    alone = {"final": range(6), "alternating": (0, 2, 4), "mixed": (0, 1, 2)}.get(objective, ())
    assert len(spy.steps) == 6
    for step, gradients in enumerate(spy.steps):
        expected = final if step in alone else trained
        assert gradients <= expected | (backbone - top if "faithful" in kind else set())
        never = expected - gradients
        assert all(name.endswith(("key.bias", "LayerNorm.bias")) for name in never), (step, never)

    dropout = {name: mode for name, mode in spy.modes.items() if name.endswith("dropout")}
    assert dropout
    for name, training in dropout.items():
        if name.startswith("ramps.2."):
            assert training == (kind == "stage 1"), name
        elif name.startswith("ramps."):
            assert training, name
        else:
            assert training == (kind != "stage 2 cached"), name


def faithful_norms(glue: Path, path: Path, steps: int, **options: Any) -> list[tuple[float, ...]]:
    """The norms that the gradients of each step are left with: of all, the backbone's, the ramps'."""
    module, data = build("stage 2 faithful", glue)
    norms = []

    class Norms(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, module: EarlyExitModule, *_: object
        ) -> None:
            parts = [[p.grad for p in part.parameters() if p.grad is not None] for part in (module, module.model.backbone, module.model.ramps)]  # fmt: skip
            norms.append(
                tuple(torch.stack([g.norm() for g in part]).norm().item() for part in parts)
            )

    trainer = L.Trainer(
        default_root_dir=path, logger=False, enable_checkpointing=False, callbacks=[Norms()],
        enable_progress_bar=False, enable_model_summary=False, max_steps=steps, limit_val_batches=0,
        gradient_clip_val=1e-3, accelerator="cpu", use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return norms


def test_faithful_stage_2_clips_the_norm_of_everything(glue: Path, tmp_path: Path) -> None:
    """In the original the frozen backbone's gradients count in the clipped norm, and are those of
    the last step alone."""
    clipped, backbone, _ = zip(*faithful_norms(glue, tmp_path, 5), strict=True)
    assert clipped == pytest.approx([1e-3] * 5, rel=1e-3)
    assert all(0 < norm < 1e-3 for norm in backbone), "gradients flow into the frozen backbone"
    # Had they piled up over the steps, almost all of the norm would be the backbone's by now.
    assert max(backbone) < 3 * min(backbone)


def test_in_float16_only_what_is_optimized_counts(glue: Path, tmp_path: Path) -> None:
    """The scaler's factor is still in the backbone's gradients, which would leave ramps nothing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    half = MixedPrecision("16-mixed", "cpu", scaler)
    [(_, backbone, ramps)] = faithful_norms(glue, tmp_path, 1, plugins=[half])
    assert backbone > 1, "1024 times as large"
    assert ramps == pytest.approx(1e-3, rel=1e-2)


def test_weight_decay_spares_biases_and_layer_norms(glue: Path) -> None:
    module, _ = build("stage 1", glue, weight_decay=0.1)
    names = {id(p): n for n, p in module.named_parameters()}
    groups = module.parameter_groups()
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    spared = {
        names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]
    }
    assert decayed
    assert not decayed & spared
    assert all(name.endswith("bias") or "LayerNorm" in name for name in spared)
    assert not any(name.endswith("bias") or "LayerNorm" in name for name in decayed)
    assert decayed | spared == {n for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("model_type", "more"), VARIANTS)
def test_no_norm_is_decayed_whatever_its_name(model_type: str, more: dict) -> None:
    torch.manual_seed(0)
    model = EarlyExitModel.from_backbone(tiny(model_type, **more), 2)
    config = {
        "task": plain("task", "mrpc"), "backbone": tiny(model_type), "data": {}, "stage": 1, "seed": 1,
        "stages": {"1": {"lr": 0.1, "weight_decay": 0.1}}, "objective": {"name": "joint"},
    }  # fmt: skip
    module = EarlyExitModule(model, RunConfig.from_checked(config), {})
    decay, spared = (
        {id(parameter) for parameter in group["params"]} for group in module.parameter_groups()
    )
    for name, part in model.named_modules():
        for kind, parameter in part.named_parameters(recurse=False):
            is_spared = isinstance(part, torch.nn.LayerNorm) or kind.endswith("bias")
            assert id(parameter) in (spared if is_spared else decay), f"{name}.{kind}"


def test_linear_warm_up_and_decay_to_zero(glue: Path, tmp_path: Path) -> None:
    module, data = build("stage 1", glue, warmup=0.25)
    rates = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = L.Trainer(
        default_root_dir=tmp_path, logger=False, enable_checkpointing=False, callbacks=[Rates()],
        enable_progress_bar=False, enable_model_summary=False, max_epochs=2, limit_val_batches=0,
        accelerator="cpu", use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert len(rates) == 24  # 2 epochs of 96 rows by 8
    expected = [1e-3 * min(step / 6, (24 - step) / 18) for step in range(24)]
    assert rates == pytest.approx(expected)


def test_cached_states_are_the_model_s(glue: Path, tmp_path: Path) -> None:
    module, data = build("stage 2 cached", glue)
    frozen = FeatureCache(data, module.model, tmp_path, standardize=[])
    frozen.setup("fit")
    assert list(tmp_path.iterdir()) == [], "the mapped file is gone with the process"
    tokens = {i: row for b in data.loader("train") for i, row in zip(b["index"].tolist(), zip(b["input_ids"], b["attention_mask"], b["token_type_ids"], b["labels"], strict=True), strict=True)}  # fmt: skip
    seen = 0
    for batch in frozen.train_dataloader():
        for state_R, index, label in zip(batch["states"], batch["index"].tolist(), batch["labels"], strict=True):  # fmt: skip
            ids, mask, types, expected_label = tokens[index]
            expected = module.model.states(ids[None], mask[None], types[None])[0]
            torch.testing.assert_close(state_R, expected, atol=1e-5, rtol=0)
            assert label == expected_label
            seen += 1
    assert seen == 96


def test_cached_training_equals_faithful_training_without_dropout(
    glue: Path, tmp_path: Path
) -> None:
    """Same ramps after an epoch in one batch: there only dropout and clipping set the two apart."""
    weights = []
    for kind in KINDS[1:]:
        module, data = build(kind, glue)
        data.batch_size = 96
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        for layer in module.model.backbone.layers:
            layer.attention.self.dropout.p = 0.0
        fit(module, source(module, data, tmp_path), tmp_path, max_epochs=5, gradient_clip_val=None)
        weights.append({n: p.detach().clone() for n, p in module.model.ramps.named_parameters()})
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_standardized_ramps_read_states_of_mean_0_and_variance_1(
    glue: Path, tmp_path: Path
) -> None:
    module, data = build("stage 2 cached", glue)
    frozen = FeatureCache(data, module.model, tmp_path, standardize=[0, 1])
    frozen.setup("fit")
    ramps, states_NR = module.model.ramps, frozen._cache["train"].states_NR
    assert states_NR.shape == (96, 3 * 32)
    for ramp, states_NH in zip(ramps[:-1], states_NR.split(32, -1)[:-1], strict=True):
        read = (states_NH - ramp.shift) * ramp.scale
        assert read.mean(0).abs().max() < 1e-3
        assert read.var(0, correction=0).mean().item() == pytest.approx(1, abs=1e-3)
        # Folded into the pooler it is the paper's ramp.
        folded = torch.nn.functional.linear(
            states_NH,
            ramp.pooler.weight * ramp.scale,
            ramp.pooler.bias - ramp.pooler.weight @ (ramp.shift * ramp.scale),
        )
        torch.testing.assert_close(folded, ramp.pooler(read), atol=1e-3, rtol=1e-3)
    assert ramps[-1].scale == 1
    assert ramps[-1].shift.abs().sum() == 0


# Share of ramp k's gradient in what reaches the embeddings, layer 1, 2, 3, by hand for L = 3: its
# own factor times the onward ones on the way down.
SHARES = {
    "equilibrium": [(1 / 3, 1 / 3, 0, 0), (2 / 3 / 2, 2 / 3 / 2, 1 / 2, 0), (2 / 3 / 2, 2 / 3 / 2, 1 / 2, 1)],
    "detached": [(1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)],
}  # fmt: skip


def gradients(loss: torch.Tensor, model: EarlyExitModel) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(
        loss, list(model.parameters()), retain_graph=True, allow_unused=True
    )
    named = zip(model.named_parameters(), grads, strict=True)
    return {n: torch.zeros_like(p) if grad is None else grad for (n, p), grad in named}


def layer_of(name: str) -> int:
    """0 for the embeddings."""
    return int(name.split(".layer.")[1].split(".")[0]) + 1 if ".layer." in name else 0


@pytest.mark.parametrize("objective", SHARES)
@pytest.mark.parametrize("ramp", ["first", "mean", "pair", "first_and_mean", "attention"])
def test_gradients_flow_as_worked_out_by_hand(objective: str, ramp: str, glue: Path) -> None:
    module, _ = build("stage 1", glue, objective=objective, ramp=ramp)
    model, labels = module.model.eval(), torch.tensor([0, 1, 1, 0])
    for each in model.all_ramps:  # large enough for every ramp's gradient to count
        torch.nn.init.normal_(each.pooler.weight, std=0.3)
        torch.nn.init.normal_(each.classifier.weight, std=0.5)
    logits = model(**a_batch())
    flowing = model.ramp_logits(module.states(a_batch()))
    assert torch.equal(flowing, logits), "forward it changes nothing"
    cross_entropy = torch.nn.functional.cross_entropy
    singles = [gradients(cross_entropy(logits[:, k], labels), model) for k in range(3)]
    grads = gradients(module.objective.loss(flowing, labels), model)
    counted = 0
    for name, gradient in grads.items():
        if name.startswith("ramps."):  # a ramp's own parameters know of no flow
            expected = singles[int(name.split(".")[1])][name]
        else:
            shares = [SHARES[objective][k][layer_of(name)] for k in range(3)]
            expected = sum(s * single[name] for s, single in zip(shares, singles, strict=True))
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-3, msg=name)
        counted += int(gradient.abs().max() > 1e-4)
    assert counted > 30, "gradients are large enough to tell"


def test_distillation_moves_the_backbone_but_not_the_teacher(glue: Path) -> None:
    """Without labels, in stage 1: neither the final classifier nor the layer below it alone."""
    module, _ = build("stage 1", glue, objective="distill")
    logits = module.model.eval()(**a_batch())
    grads = gradients(module.objective.loss(logits, torch.full((4,), UNLABELLED)), module.model)
    moved = {name for name, gradient in grads.items() if gradient.abs().sum() > 0}
    still = {name for name in grads if name.startswith("ramps.2.") or ".layer.2." in name}
    assert not moved & still
    assert all(name.endswith("key.bias") for name in set(grads) - still - moved)


@pytest.mark.parametrize(("objective", "alone"), [("alternating", (0, 2, 4)), ("mixed", (0, 1, 2))])
def test_ramps_rest_while_the_final_classifier_learns_alone(
    objective: str, alone: tuple[int, ...], glue: Path, tmp_path: Path
) -> None:
    """Neither weight decay nor Adam's moments move them, nor does Adam take the time for gradients
    of 0: the steps after it would be several times as long as the learning rate says."""
    module, data = build("stage 1", glue, objective=objective, batch_size=32, weight_decay=0.5)
    weight = module.model.ramps[0].classifier.weight
    moved: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            self.before = weight.detach().clone()

        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            moved.append((weight - self.before).abs().max().item())
            if len(moved) == 6:
                self.steps = trainer.optimizers[0].state[weight]["step"].item()

    watch = Watch()
    fit(module, data, tmp_path, watch)
    assert [step for step in range(6) if moved[step] == 0] == list(alone)
    assert watch.steps == 3


@pytest.mark.parametrize(("objective", "turns"), [("alternating", (1, 0, 1)), ("mixed", (1, 1, 1))])
def test_a_resumed_run_goes_on_with_the_turns_of_the_unbroken_one(
    objective: str, turns: tuple[int, ...], glue: Path, tmp_path: Path
) -> None:
    """3 steps an epoch: counted from its start, the second epoch's turns would be others."""

    def started() -> tuple[EarlyExitModule, TextDataModule]:
        return build("stage 1", glue, objective=objective, batch_size=32)

    part, data = started()
    assert len(fit(part, data, tmp_path, SaveAndStop(tmp_path / "x.ckpt")).steps) == 3
    rest, data = started()
    spy = fit(rest, data, tmp_path, ckpt_path=tmp_path / "x.ckpt")
    ramps_trained = ["ramps.0.classifier.weight" in gradients for gradients in spy.steps]
    assert ramps_trained == [bool(turn) for turn in turns]
    unbroken, data = started()
    assert len(fit(unbroken, data, tmp_path).steps) == 6
    for name, value in rest.state_dict().items():
        assert torch.equal(value, unbroken.state_dict()[name]), name


@pytest.mark.parametrize(
    ("kind", "objective", "says"),
    [
        ("stage 1", "ramps", "objective=ramps is for stage=2; in stage=1 choose one of: final, "),
        ("stage 2 cached", "joint", "objective=joint is for stage=1; in stage=2 choose one of: ramps, "),
    ],
)  # fmt: skip
def test_an_objective_of_the_other_stage_is_refused(
    kind: str, objective: str, says: str, glue: Path
) -> None:
    with pytest.raises(UserError, match=says):
        build(kind, glue, objective=objective)
