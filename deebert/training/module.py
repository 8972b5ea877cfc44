"""The LightningModule: which parameters each stage trains, on which loss, with which optimizer.

Stage 1 fine-tunes the backbone, the final classifier and, if the objective asks for it, the other
ramps; stage 2 freezes the first two and trains the other ramps (paper, section 3.2). Knows nothing
of exits, thresholds or files.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import get_linear_schedule_with_warmup

from deebert.errors import UserError
from deebert.models.early_exit import INPUTS, EarlyExitModel
from deebert.training import checkpoint_io, objectives

LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")  # of Lightning's Trainer


class EarlyExitModule(L.LightningModule):
    """Trains an `EarlyExitModel` in one of the two stages.

    Args:
        model: what to train.
        config: the run's configuration as plain values; `stage`, `seed`, `stages` and `objective`
            are read here, the rest makes the checkpoint self-describing.
        tokenizer: the tokenizer's files as text, for the checkpoint.
        teacher: the model that a student learns from; frozen, and no part of the checkpoint.

    Raises:
        UserError: the objective is unknown, or not for this stage.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        config: Mapping[str, Any],
        tokenizer: Mapping[str, str],
        teacher: EarlyExitModel | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {"config": dict(config), "architecture": model.config, "tokenizer": dict(tokenizer)},
            logger=False,
        )
        self.model = model
        self.stage = config["stage"]
        self.seed = config["seed"]
        self.recipe = config["stages"][str(self.stage)]
        self.objective = objectives.build(config["objective"], self.stage)
        flow = self.objective.flow
        self.flow = flow(len(model.ramps)) if flow else None
        self.trains_ramps = self.objective.trains_ramps
        self.layer_drop = self.recipe.get("layer_drop", 0.0)  # stage 1's alone
        # In a tuple, or torch would take its weights for this module's.
        self._teacher: tuple[EarlyExitModel, ...] = (teacher,) if teacher else ()
        self.is_restored = False  # has all been taken from the checkpoint that is gone on with?
        self._freeze()

    @property
    def is_frozen(self) -> bool:
        """Is the backbone left alone, in eval mode and without gradients?"""
        return self.stage == 2 and self.recipe["cache"]

    @property
    def is_cached(self) -> bool:
        """Does this stage train on frozen states that are computed once?

        Not where ramps learn what they read: there is no state yet to be kept.
        """
        return self.is_frozen and self.model.ramp_kind.reads != "attention"

    def _freeze(self) -> None:
        """Say which parameters get gradients.

        Stage 2 without the cache is the original to the letter: gradients flow into the backbone
        and count in the clipped norm, but no optimizer moves it.
        """
        model = self.model
        model.requires_grad_(False)
        if self.stage == 1:
            model.backbone.requires_grad_(True)
            model.ramps[-1].requires_grad_(True)
            model.ramps[:-1].requires_grad_(self.trains_ramps)
            return
        model.ramps[:-1].requires_grad_(True)
        if not self.is_frozen:
            model.backbone.requires_grad_(True)
            model.backbone.layers[-1].requires_grad_(False)  # no trained ramp is above it

    def _set_modes(self) -> None:
        """Dropout is on in what is trained, and in stage 2's backbone only without the cache.

        Lightning leaves modules as it finds them, and from_pretrained leaves them in eval mode
        (Lightning #20105), so this is said outright.
        """
        self.train()
        if self.is_frozen:
            self.model.backbone.eval()
        if self.stage == 2:
            self.model.ramps[-1].eval()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Here and not where files are read: every strategy and plugin comes by.
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        loops = {name: getattr(self.trainer, name).state_dict() for name in LOOPS}
        with self._of_checkpoint():
            checkpoint_io.clean(checkpoint, Path(str(self.trainer.ckpt_path)).parent, loops)
            for state in checkpoint["callbacks"].values():
                if state.get("best_model_path") and state.get("best_model_score") is not None:
                    checkpoint_io.check_best(state, self.state_dict())

    def on_train_start(self) -> None:
        with self._of_checkpoint():
            for optimizer in self.trainer.optimizers:
                checkpoint_io.check_optimizer(optimizer)
        self.is_restored = True

    @contextmanager
    def _of_checkpoint(self) -> Iterator[None]:
        """Say of an error which checkpoint it is of."""
        try:
            yield
        except UserError as error:
            raise UserError(
                f"resume={self.trainer.ckpt_path}: the run cannot be gone on with from this "
                f"checkpoint ({error})"
            ) from error

    def on_fit_start(self) -> None:
        steps = int(self.trainer.estimated_stepping_batches)
        if self.trains_ramps and all(self.objective.alone(step, steps) for step in range(steps)):
            raise UserError(
                f"objective={self.objective.name}: none of the {steps} steps trains the ramps; "
                f"train for longer (stages.{self.stage}.epochs), or choose another objective"
            )
        self._set_modes()
        for teacher in self._teacher:
            teacher.eval().to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout depends on (seed, epoch, process) only, so a resumed run repeats the unbroken one.
        # Not at the epoch's start: a loader that begins to iterate draws from the generator too.
        if batch_idx == 0:
            torch.manual_seed((self.seed * 100_003 + self.current_epoch) * 1009 + self.global_rank)

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the ramps read, from a batch of tokens or of frozen states: -> (B, R)."""
        if "states" in batch:
            return batch["states"]
        return self.model.states(**_tokens(batch), flow=self.flow, skipped=self._dropped())

    def _dropped(self) -> list[int]:
        """LayerDrop (Fan et al., ICLR 2020): the layers, from 0, that this batch goes past.

        The ramp of such a layer is trained nevertheless, where the objective trains ramps: on what
        the layer before it has handed on.
        """
        if not self.layer_drop or not self.training:
            return []
        dropped_L = torch.rand(len(self.model.ramps)) < self.layer_drop
        return dropped_L.nonzero().flatten().tolist()

    def _taught(self, batch: Mapping[str, Tensor], logits_BLC: Tensor) -> Tensor | float:
        """What a student's loss has beside the labels'."""
        if self.objective.taught is None:
            return 0.0
        [teacher] = self._teacher
        with torch.no_grad():
            teacher_BC = teacher(**_tokens(batch))[:, -1]
        return self.objective.taught(logits_BLC, teacher_BC)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        labels_B = batch["labels"]
        states_BR = self.states(batch)
        logits_BLC, learned_score_BL = self.model.logits_and_scores(states_BR)
        if self.stage == 2:  # the final classifier has learned: nothing goes back from it
            logits_BLC = torch.cat([logits_BLC[:, :-1], logits_BLC[:, -1:].detach()], 1)
        loss_of = objectives.final if self._final_alone else self.objective.loss
        loss = loss_of(logits_BLC, labels_B) + self._taught(batch, logits_BLC)
        predicts = self.model.ramp_kind.predicts
        if predicts is not None and learned_score_BL is not None and self.trains_ramps:
            exit_loss = objectives.exit_loss(learned_score_BL, logits_BLC, labels_B, predicts)
            # Not left out: with several processes all parameters must be in every step's loss.
            loss = loss + (0 if self._final_alone else 1) * exit_loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels_B))
        return loss

    @property
    def _final_alone(self) -> bool:
        """Is it the final classifier's turn?"""
        num_steps = int(self.trainer.estimated_stepping_batches)
        return self.objective.alone(self.global_step, num_steps)

    def on_after_backward(self) -> None:
        # Gradients of 0 would still move the ramps (momentum), or hurry them later (AdamW counts
        # its steps).
        if self._final_alone:
            for parameter in self.model.ramps[:-1].parameters():
                parameter.grad = None

    def validation_step(
        self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """What a record is made of: logits (B, L, C), learned exit scores (B, L) where there are
        some, labels, index, length, group."""
        logits_BLC, learned_score_BL = self.model.logits_and_scores(self.states(batch))
        facts = ("labels", "index", "length", "group")
        found = {"logits": logits_BLC} | (
            {} if learned_score_BL is None else {"learned_score": learned_score_BL}
        )
        return found | {name: batch[name] for name in facts if name in batch}

    test_step = validation_step

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer moves; biases and LayerNorms are not decayed."""
        trained = self.model.ramps if self.stage == 2 else self.model
        decay: list[Tensor] = []
        no_decay: list[Tensor] = []
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                spared = name.endswith("bias") or "norm" in name.lower()  # ModernBERT: attn_norm
                (no_decay if spared else decay).append(parameter)
        return [
            {"params": decay, "weight_decay": self.recipe["weight_decay"]},
            {"params": no_decay, "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and linear decay to 0."""
        # Lightning unscales float16 gradients before they are clipped only if nothing is fused.
        fused = not str(self.trainer.precision).startswith("16")
        optimizer = AdamW(self.parameter_groups(), lr=self.recipe["lr"], fused=fused)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = int(self.recipe["warmup"] * steps)
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the norm over everything that has a gradient, as the original does; in float16, as
        it does there, over what is optimized, whose gradients alone the scaler looks after."""
        if str(gradient_clip_algorithm or "norm") not in ("norm", "GradClipAlgorithmType.NORM"):
            raise UserError(
                f"trainer.gradient_clip_algorithm={gradient_clip_algorithm}: only 'norm' is known"
            )
        clipped = list(self.parameters())
        if getattr(self.trainer.precision_plugin, "scaler", None):
            clipped = [each for group in optimizer.param_groups for each in group["params"]]
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(clipped, gradient_clip_val)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.zero_grad()  # also what gets gradients without being optimized


def _tokens(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in INPUTS if name in batch}
