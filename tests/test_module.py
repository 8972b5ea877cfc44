"""What each stage trains, in which mode, on which gradients."""

from pathlib import Path

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from deebert import backbones
from deebert.data import TextDataModule
from deebert.errors import UserError
from deebert.frozen import FrozenStates
from deebert.model import EarlyExitModel
from deebert.module import EarlyExitModule
from deebert.tasks import Task

CONF = Path(__file__).parent.parent / "conf"
KINDS = ("stage 1", "stage 2 cached", "stage 2 faithful")


def plain(group: str, name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))


def build(kind: str, glue: Path, **recipe: object) -> tuple[EarlyExitModule, TextDataModule]:
    torch.manual_seed(0)
    stage = int(kind[6])
    stages = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml"))["stages"]
    stages[str(stage)] |= {"lr": 1e-3, "epochs": 2, **recipe}
    stages["2"]["cache"] = "faithful" not in kind
    config = {"stage": stage, "stages": stages, "seed": 3, "task": plain("task", "mrpc")}
    spec = plain("backbone", "tiny")
    tokenizer = backbones.tokenizer(spec)
    data = TextDataModule(
        Task.from_config(config["task"]), tokenizer, root=str(glue), max_length=64, limit_train=None, calibration_size=None,
        batch_size=8, eval_batch_size=64, num_workers=0, seed=3,
    )  # fmt: skip
    model = EarlyExitModel.from_backbone(spec, 2)
    return EarlyExitModule(model, config, backbones.tokenizer_files(tokenizer)), data


class Spy(L.Callback):
    """Notes modes and gradients of a step."""

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: EarlyExitModule, *_: object
    ) -> None:
        self.modes = {name: part.training for name, part in module.model.named_modules()}
        self.gradients = {
            name
            for name, parameter in module.model.named_parameters()
            if parameter.grad is not None and parameter.grad.abs().sum() > 0
        }


def fit(module: EarlyExitModule, data: L.LightningDataModule, path: Path, **options: object) -> Spy:
    spy = Spy()
    trainer = L.Trainer(
        default_root_dir=path, logger=False, enable_checkpointing=False, callbacks=[spy],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, barebones=False,
        accelerator="cpu", use_distributed_sampler=False,
        **({"max_epochs": 2, "limit_val_batches": 1, "gradient_clip_val": 1.0} | options),
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return spy


def source(module: EarlyExitModule, data: TextDataModule, path: Path, *, standardize: bool = False):
    if module.is_cached:
        return FrozenStates(data, module.model, path, standardize=standardize)
    return data


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:", "ignore:.*smaller than the logging interval:",
    "ignore:Found .* module\\(s\\) in eval mode",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_and_in_which_mode(kind: str, glue: Path, tmp_path: Path) -> None:
    module, data = build(kind, glue)
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
    trained = backbone | last if kind == "stage 1" else ramps - last
    # Unused word pieces have no gradient, but the table as a whole does.
    assert changed == trained
    assert spy.gradients <= trained | (backbone - top if "faithful" in kind else set())
    never = {name for name in trained | spy.gradients if name not in spy.gradients}
    assert all(name.endswith(("key.bias", "LayerNorm.bias")) for name in never), never

    dropout = {name: mode for name, mode in spy.modes.items() if name.endswith("dropout")}
    assert dropout
    for name, training in dropout.items():
        if name.startswith("ramps.2."):
            assert training == (kind == "stage 1"), name
        elif name.startswith("ramps."):
            assert training, name
        else:
            assert training == (kind != "stage 2 cached"), name


def test_faithful_stage_2_clips_the_norm_of_everything(glue: Path, tmp_path: Path) -> None:
    """In the original the frozen backbone's gradients count in the clipped norm, and are those of
    the last step alone."""
    module, data = build("stage 2 faithful", glue)
    clipped, backbone = [], []

    class Norms(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, module: EarlyExitModule, *_: object
        ) -> None:
            parts = [[p.grad for p in part.parameters() if p.grad is not None] for part in (module, module.model.backbone)]  # fmt: skip
            norms = [torch.stack([grad.norm() for grad in part]).norm().item() for part in parts]
            clipped.append(norms[0])
            backbone.append(norms[1])

    trainer = L.Trainer(
        default_root_dir=tmp_path, logger=False, enable_checkpointing=False, callbacks=[Norms()],
        enable_progress_bar=False, enable_model_summary=False, max_steps=5, limit_val_batches=0,
        gradient_clip_val=1e-3, accelerator="cpu", use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert clipped == pytest.approx([1e-3] * 5, rel=1e-3)
    assert all(0 < norm < 1e-3 for norm in backbone), "gradients flow into the frozen backbone"
    # Had they piled up over the steps, almost all of the norm would be the backbone's by now.
    assert max(backbone) < 3 * min(backbone)


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
    frozen = FrozenStates(data, module.model, tmp_path, standardize=False)
    frozen.setup("fit")
    assert list(tmp_path.iterdir()) == [], "the mapped file is gone with the process"
    tokens = {i: row for b in data.loader("train") for i, row in zip(b["index"].tolist(), zip(b["input_ids"], b["attention_mask"], b["token_type_ids"], b["labels"], strict=True), strict=True)}  # fmt: skip
    seen = 0
    for batch in frozen.train_dataloader():
        for state_LH, index, label in zip(batch["states"], batch["index"].tolist(), batch["labels"], strict=True):  # fmt: skip
            ids, mask, types, expected_label = tokens[index]
            expected = module.model.states(ids[None], mask[None], types[None])[0]
            torch.testing.assert_close(state_LH, expected, atol=1e-5, rtol=0)
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
    frozen = FrozenStates(data, module.model, tmp_path, standardize=True)
    frozen.setup("fit")
    ramps, states = module.model.ramps, frozen._cache["train"].states_NLH
    for ramp, states_NH in zip(ramps[:-1], states.unbind(1)[:-1], strict=True):
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


def test_an_unknown_objective_names_the_known(glue: Path) -> None:
    with pytest.raises(UserError, match=r"'sum' is unknown; choose one of: final, ramps"):
        build("stage 1", glue, objective="sum")
