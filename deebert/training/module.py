"""The LightningModule: which parameters each stage trains, with which loss and optimizer.

Stage 1 fine-tunes the backbone, the final classifier and, if the objective trains them, the other
ramps. Stage 2 freezes the backbone and the final classifier, and trains the other ramps (paper,
section 3.2). This module does not know exit rules, thresholds or data sets.

Shapes: B batch, L layers (= ramps), C labels, R features that all ramps read together.
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
from deebert.hub.run_config import RunConfig
from deebert.models.early_exit import INPUTS, EarlyExitModel
from deebert.training import checkpoint_io, losses, objectives

LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")  # attributes of the Trainer


class EarlyExitModule(L.LightningModule):
    """The LightningModule that trains an `EarlyExitModel` in one of the two stages.

    Args:
        model: the model to train.
        config: the run's configuration. The checkpoint holds its plain values.
        tokenizer: the text of the tokenizer's files by file name, for the checkpoint.
        teacher: the model that a student learns from. It is frozen, and no part of the checkpoint.

    Raises:
        UserError: the objective is unknown, or not for this stage.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        config: RunConfig,
        tokenizer: Mapping[str, str],
        teacher: EarlyExitModel | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {"config": config.plain(), "architecture": model.config, "tokenizer": dict(tokenizer)},
            logger=False,
        )
        self.model = model
        self.config = config
        self.stage = config.stage
        self.recipe = config.recipe
        self.objective = objectives.build(config.objective.plain(), self.stage)
        self.flow = self.objective.flow(len(model.ramps))
        self.trains_ramps = self.objective.trains_ramps
        self.layer_drop = self.recipe.layer_drop
        # The tuple keeps torch from registering the teacher's weights as part of this module.
        self._teacher: tuple[EarlyExitModel, ...] = (teacher,) if teacher else ()
        self.is_restored = False  # True once the state of a resumed run is completely restored
        self._freeze()

    @property
    def is_frozen(self) -> bool:
        """Whether the backbone is in eval mode and gets no gradients."""
        return self.stage == 2 and self.recipe.cache

    @property
    def is_cached(self) -> bool:
        """Whether this stage trains on frozen states that are computed once.

        Ramps whose reader has weights cannot use the cache: what they read changes in training.
        """
        return self.is_frozen and not self.model.ramp_kind.reader.has_weights

    def _freeze(self) -> None:
        """Set which parameters get gradients.

        Stage 2 without the cache follows the paper's code exactly. Gradients flow into the backbone
        and count in the clipped norm, but the optimizer does not change the backbone.
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
            model.backbone.layers[-1].requires_grad_(False)  # no trained ramp reads this layer

    def _set_modes(self) -> None:
        """Turn dropout on in the trained parts, and off in the frozen ones.

        Without the cache, dropout is also on in stage 2's backbone. Lightning does not change the
        mode of modules, and from_pretrained leaves them in eval mode (Lightning #20105).
        """
        self.train()
        if self.is_frozen:
            self.model.backbone.eval()
        if self.stage == 2:
            self.model.ramps[-1].eval()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove everything from the checkpoint that a resumed run may not restore.

        This hook is called with every strategy and plugin. The reading of files is not.

        Raises:
            UserError: the training state is damaged.
        """
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        loops = {name: getattr(self.trainer, name).state_dict() for name in LOOPS}
        with self._naming_checkpoint():
            checkpoint_io.clean(checkpoint, Path(str(self.trainer.ckpt_path)).parent, loops)
            for state in checkpoint["callbacks"].values():
                if state.get("best_model_path") and state.get("best_model_score") is not None:
                    checkpoint_io.check_best(state, self.state_dict())

    def on_train_start(self) -> None:
        """Check the restored state of the optimizers.

        Raises:
            UserError: a value has a wrong type or shape.
        """
        with self._naming_checkpoint():
            for optimizer in self.trainer.optimizers:
                checkpoint_io.check_optimizer(optimizer)
        self.is_restored = True

    @contextmanager
    def _naming_checkpoint(self) -> Iterator[None]:
        """Add to an error which checkpoint it comes from."""
        try:
            yield
        except UserError as error:
            raise UserError(
                f"resume={self.trainer.ckpt_path}: the run cannot be gone on with from this "
                f"checkpoint ({error})"
            ) from error

    def on_fit_start(self) -> None:
        """Set the modules' modes, and move the teacher to the device.

        Raises:
            UserError: no step of this training would train the ramps.
        """
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
        """Seed the generator in the first batch of each epoch.

        Dropout then depends only on seed, epoch and process. A resumed run therefore gives the same
        weights as a run without interruption.
        """
        # The epoch's start is too early: a loader that starts to iterate draws random numbers, too.
        if batch_idx == 0:
            seed = self.config.seed * 100_003 + self.current_epoch
            torch.manual_seed(seed * 1009 + self.global_rank)

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the states that the ramps read, from a batch of tokens or of frozen states.

        Returns:
            (B, R) features.
        """
        if "states" in batch:
            return batch["states"]
        return self.model.states(**_tokens(batch), flow=self.flow, skipped=self._dropped())

    def _dropped(self) -> list[int]:
        """Draw the layers, from 0, that this batch skips (LayerDrop, Fan et al., ICLR 2020).

        The ramp of a skipped layer is trained on the output of the layer before it, if the
        objective trains ramps.
        """
        if not self.layer_drop or not self.training:
            return []
        dropped_L = torch.rand(len(self.model.ramps)) < self.layer_drop
        return dropped_L.nonzero().flatten().tolist()

    def _teacher_loss(self, batch: Mapping[str, Tensor], logits_BLC: Tensor) -> Tensor | float:
        """Return the part of a student's loss that comes from its teacher."""
        if not self.objective.needs_teacher:
            return 0.0
        [teacher] = self._teacher
        with torch.no_grad():
            teacher_BC = teacher(**_tokens(batch))[:, -1]
        return self.objective.taught(logits_BLC, teacher_BC)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        labels_B = batch["labels"]
        states_BR = self.states(batch)
        logits_BLC, learned_score_BL = self.model.logits_and_scores(states_BR)
        if self.stage == 2:  # the final classifier is trained already, and gets no gradients
            logits_BLC = torch.cat([logits_BLC[:, :-1], logits_BLC[:, -1:].detach()], 1)
        loss_function = losses.final if self._final_alone else self.objective.loss
        loss = loss_function(logits_BLC, labels_B) + self._teacher_loss(batch, logits_BLC)
        predicts = self.model.ramp_kind.predicts
        if predicts is not None and learned_score_BL is not None and self.trains_ramps:
            exit_loss = losses.exit_loss(learned_score_BL, logits_BLC, labels_B, predicts)
            # With several processes, all parameters must be part of each step's loss. A factor of 0
            # keeps them there.
            loss = loss + (0 if self._final_alone else 1) * exit_loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels_B))
        return loss

    @property
    def _final_alone(self) -> bool:
        """Whether this step trains on the loss of the final classifier alone."""
        num_steps = int(self.trainer.estimated_stepping_batches)
        return self.objective.alone(self.global_step, num_steps)

    def on_after_backward(self) -> None:
        """Remove the ramps' gradients in a step that trains the final classifier alone."""
        # With gradients of 0, the ramps would still move, because of momentum. AdamW would also
        # count the step, which makes later steps larger.
        if self._final_alone:
            for parameter in self.model.ramps[:-1].parameters():
                parameter.grad = None

    def validation_step(
        self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Return the parts of a record for one batch.

        Returns:
            `logits` (B, L, C), `learned_score` (B, L) if the ramps have a learned exit score, and
            the columns `labels`, `index`, `length` and `group` (B,), where the batch has them.
        """
        logits_BLC, learned_score_BL = self.model.logits_and_scores(self.states(batch))
        outputs = {"logits": logits_BLC}
        if learned_score_BL is not None:
            outputs["learned_score"] = learned_score_BL
        columns = ("labels", "index", "length", "group")
        return outputs | {name: batch[name] for name in columns if name in batch}

    test_step = validation_step

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups; biases and LayerNorms have no weight decay."""
        trained = self.model.ramps if self.stage == 2 else self.model
        decay: list[Tensor] = []
        no_decay: list[Tensor] = []
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                # "norm" also covers other names than LayerNorm, such as ModernBERT's attn_norm.
                is_spared = name.endswith("bias") or "norm" in name.lower()
                (no_decay if is_spared else decay).append(parameter)
        return [
            {"params": decay, "weight_decay": self.recipe.weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> Any:
        """Return AdamW, with linear warm-up and linear decay to 0."""
        # Lightning unscales float16 gradients before clipping only if the optimizer is not fused.
        fused = not str(self.trainer.precision).startswith("16")
        optimizer = AdamW(self.parameter_groups(), lr=self.recipe.lr, fused=fused)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = int(self.recipe.warmup * steps)
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the norm of the gradients, as the paper's code does.

        The norm counts every parameter that has a gradient. In float16 it counts only the optimized
        parameters, because the gradient scaler unscales only their gradients.

        Raises:
            UserError: another algorithm than the norm is given.
        """
        if str(gradient_clip_algorithm or "norm") not in ("norm", "GradClipAlgorithmType.NORM"):
            raise UserError(
                f"trainer.gradient_clip_algorithm={gradient_clip_algorithm}: only 'norm' is known"
            )
        clipped = list(self.parameters())
        if getattr(self.trainer.precision_plugin, "scaler", None):
            clipped = [
                parameter for group in optimizer.param_groups for parameter in group["params"]
            ]
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(clipped, gradient_clip_val)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Remove all gradients, also those of parameters that are not optimized."""
        self.zero_grad()


def _tokens(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns of a batch that are inputs of the model."""
    return {name: batch[name] for name in INPUTS if name in batch}
