"""Short trainings of a tiny model on MRPC-like rows."""

from pathlib import Path

import lightning as L
import torch
from conftest import ROOT
from omegaconf import OmegaConf

from deebert.data import tokenization
from deebert.data.datamodule import TextDataModule
from deebert.hub.run_config import RunConfig
from deebert.models import backbones
from deebert.models.early_exit import EarlyExitModel
from deebert.training.feature_cache import FeatureCache
from deebert.training.module import EarlyExitModule
from deebert.training.objectives import PAPER

# Warnings of Lightning about trainings as short as these.
QUIET = (
    "ignore:.*does not have many workers:", "ignore:.*smaller than the logging interval:",
    "ignore:Found .* module\\(s\\) in eval mode",
)  # fmt: skip
CONF = ROOT / "conf"


def plain(group: str, name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))


def build(
    kind: str, glue: Path, *, objective: str | None = None, ramp: str = "first", batch_size: int = 8,
    **recipe: object,
) -> tuple[EarlyExitModule, TextDataModule]:  # fmt: skip
    torch.manual_seed(0)
    stage = int(kind[6])
    stages = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml"))["stages"]
    stages["1"] |= {"lr": 2e-5, "batch_size": 8, "warmup": 0.0}  # the paper's
    stages["2"] |= {"lr": 2e-5, "batch_size": 8, "epochs": 3, "standardize": False}
    stages[str(stage)] |= {"lr": 1e-3, "epochs": 2, **recipe}
    stages["2"]["cache"] = "faithful" not in kind
    config = {
        "stage": stage, "stages": stages, "seed": 3, "task": plain("task", "mrpc"), "data": {"max_length": 64},
        "objective": plain("objective", objective or PAPER[stage]), "ramp": plain("ramp", ramp),
        "backbone": plain("backbone", "tiny"),
    }  # fmt: skip
    run = RunConfig.from_checked(config)
    spec = plain("backbone", "tiny")
    tokenizer = backbones.tokenizer(spec)
    data = TextDataModule(
        run.task, tokenizer, root=str(glue), max_length=64, limit_train=None, calibration_size=None,
        batch_size=batch_size, eval_batch_size=64, num_workers=0, seed=3,
    )  # fmt: skip
    model = EarlyExitModel.from_backbone(spec, 2, run.ramp)
    return EarlyExitModule(model, run, tokenization.files_of(tokenizer)), data


class Spy(L.Callback):
    """Notes the modes of the last step, and in every step which parameters have gradients."""

    def __init__(self) -> None:
        self.steps: list[set[str]] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: EarlyExitModule, *_: object
    ) -> None:
        self.modes = {name: part.training for name, part in module.model.named_modules()}
        self.steps.append(
            {
                name
                for name, parameter in module.model.named_parameters()
                if parameter.grad is not None and parameter.grad.abs().sum() > 0
            }
        )


class SaveAndStop(L.Callback):
    """After the first epoch, as if interrupted there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True


def fit(
    module: EarlyExitModule, data: L.LightningDataModule, path: Path, *more: L.Callback,
    ckpt_path: Path | None = None, **options: object,
) -> Spy:  # fmt: skip
    spy = Spy()
    trainer = L.Trainer(
        default_root_dir=path, logger=False, enable_checkpointing=False, callbacks=[spy, *more],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, barebones=False,
        accelerator="cpu", use_distributed_sampler=False,
        **({"max_epochs": 2, "limit_val_batches": 1, "gradient_clip_val": 1.0} | options),
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return spy


def source(module: EarlyExitModule, data: TextDataModule, path: Path, *, standardize: bool = False):
    if module.is_cached:
        return FeatureCache(data, module.model, path, standardize=[0, 1] if standardize else [])
    return data


def a_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = (torch.arange(12) < torch.tensor([12, 7, 3, 9])[:, None]).long()
    return {"input_ids": torch.randint(5, 60, (4, 12)) * mask, "attention_mask": mask}
