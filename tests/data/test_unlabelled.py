"""Rows without labels: what they add to training, and what they leave alone."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, results, write_rows
from helpers.trainings import build, fit
from torch import Tensor

from deebert.data import demo
from deebert.data.datamodule import TextDataModule
from deebert.data.tasks import HELD_OUT, UNLABELLED
from deebert.errors import UserError
from deebert.hub import checkpoints
from deebert.training import objectives
from deebert.training.feature_cache import FeatureCache
from deebert.training.losses import exit_loss

Run = Callable[..., str]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:", "ignore:.*smaller than the logging interval:",
    "ignore:Found .* module\\(s\\) in eval mode",
)  # fmt: skip


def with_unlabelled(data: TextDataModule, *unlabelled: str, held_out: int = 0) -> TextDataModule:
    """The same data with other rows hidden or held out."""
    return TextDataModule(
        data.task, data.tokenizer, root=data.root, max_length=64, limit_train=None, calibration_size=held_out,
        unlabelled=unlabelled, batch_size=8, eval_batch_size=64, num_workers=0, seed=3,
    )  # fmt: skip


def ramps_after(glue: Path, path: Path, label_weight: float, *unlabelled: str) -> dict[str, Tensor]:
    """Stage 2 in one batch of all rows, without dropout, from states that differ from row to row."""
    module, data = build("stage 2 cached", glue, lr=1e-2)
    values = {"name": "distill", "temperature": 1.0, "label_weight": label_weight}
    module.objective = objectives.build(values, 2)
    for weight in module.model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    data = with_unlabelled(data, *unlabelled)
    data.batch_size = 200
    fit(module, FeatureCache(data, module.model, path, standardize=[]), path, gradient_clip_val=None)  # fmt: skip
    return module.model.ramps.state_dict()


def test_their_labels_are_hidden_and_nothing_else_changes(glue: Path) -> None:
    _, data = build("stage 1", glue)
    plain, more = with_unlabelled(data, held_out=20), with_unlabelled(data, "test", held_out=20)
    for split in ("train", "validation", HELD_OUT, "test"):
        assert more.fingerprint(split) == plain.fingerprint(split)
    labels = torch.cat([batch["labels"] for batch in more.train_dataloader()])
    assert labels.dtype == torch.long
    assert len(labels) == 76 + 16
    assert (labels == UNLABELLED).sum() == 16
    ids = more.tokens("train+test")["input_ids"][:]
    assert ids == [*plain.tokens("train")["input_ids"][:], *plain.tokens("test")["input_ids"][:]]
    assert more.calibration_size == 20


@pytest.mark.parametrize("split", ["train", "validation", HELD_OUT])
def test_rows_that_have_another_use_are_refused(glue: Path, split: str) -> None:
    _, data = build("stage 1", glue)
    with pytest.raises(UserError, match=rf"data.unlabelled=\[{split}\]: .* choose from: test, or"):
        with_unlabelled(data, split).prepare_data()


def test_frozen_states_include_them(glue: Path, tmp_path: Path) -> None:
    module, data = build("stage 2 cached", glue)
    data = with_unlabelled(data, "test")
    frozen = FeatureCache(data, module.model, tmp_path, standardize=[0, 1])
    frozen.setup("fit")
    batches = list(frozen.train_dataloader())
    assert sum(len(batch["labels"]) for batch in batches) == 112
    assert sum((batch["labels"] == UNLABELLED).sum() for batch in batches) == 16
    features = module.model.features(torch.cat([batch["states"] for batch in batches]))[0]
    assert torch.allclose(module.model.ramps[0].shift, features.mean(0), atol=1e-5)


def test_they_teach_by_the_final_classifier_alone(glue: Path, tmp_path: Path) -> None:
    """What comes of the labels stays as it is without them."""

    def furthest(label_weight: float) -> float:
        a = ramps_after(glue, tmp_path, label_weight)
        b = ramps_after(glue, tmp_path, label_weight, "test")
        return max((a[name] - b[name]).abs().max().item() for name in a)

    assert furthest(label_weight=1) < 1e-5
    assert furthest(label_weight=0) > 1e-3


@pytest.mark.slow
def test_stage_2_asks_for_them_anew_and_evaluation_warns(
    run: Run, glue: Path, tmp_path: Path
) -> None:
    first = tmp_path / "stage1"
    run("train.py", "task=mrpc", *TINY, f"data.root={glue}", "objective=distill", "data.unlabelled=[test]", "stages.1.epochs=1", f"hydra.run.dir={first}")  # fmt: skip
    run("train.py", "stage=2", f"ckpt={first}", "logger=csv", "stages.2.epochs=1", f"hydra.run.dir={tmp_path / 'stage2'}")  # fmt: skip
    assert results(tmp_path / "stage2")["objective"] == "ramps"
    printed = run("evaluate.py", f"ckpt={first}", "split=test", "logger=csv", f"hydra.run.dir={tmp_path / 'test'}")  # fmt: skip
    assert "split=test: the model was trained on these rows" in printed


@pytest.mark.slow
def test_a_regression_hides_values_as_nan(run: Run, tmp_path: Path) -> None:
    for split, number in (("train", 24), ("validation", 8), ("test", 8)):
        rows = [{"sentence1": row["product"], "sentence2": row["review"], "label": row["label"] + i / 9} for i, row in enumerate(demo.rows(split)[:number])]  # fmt: skip
        write_rows(tmp_path / "stsb", split, rows)
    learner = ("objective=distill", "objective.label_weight=0.5")
    for name, more in (("distill", learner), ("student", (f"teacher={tmp_path / 'distill'}", "backbone.layers=[1,2]"))):  # fmt: skip
        run("train.py", *(("task=stsb", *TINY) if name == "distill" else ("logger=csv",)), *more, f"data.root={tmp_path}", "data.unlabelled=[test]", "stages.1.epochs=1", f"hydra.run.dir={tmp_path / name}")  # fmt: skip
        trained = checkpoints.read(tmp_path / name / "checkpoints" / "last.ckpt", "ckpt").weights
        assert all(value.isfinite().all() for value in trained.values())


def test_a_learned_score_does_not_learn_from_them() -> None:
    logits = torch.tensor([[[2.0, 0.0], [2.0, 0.0]], [[2.0, 0.0], [2.0, 0.0]]])
    learned_score = torch.tensor([[0.25, 0.0], [0.75, 0.0]])
    labels = torch.tensor([0, UNLABELLED])
    assert exit_loss(learned_score, logits, labels, "wrong").item() == pytest.approx(0.25**2)
    both = (0.25**2 + 0.75**2) / 2
    assert exit_loss(learned_score, logits, labels, "disagrees").item() == pytest.approx(both)
    values = torch.tensor([[[1.0], [1.0]], [[1.0], [1.0]]])
    learned_score.requires_grad_()
    loss = exit_loss(learned_score, values, torch.tensor([1.0, math.nan]), "wrong")
    loss.backward()
    assert loss.item() == pytest.approx(0.25**2)
    assert learned_score.grad.tolist() == [[0.5, 0.0], [0.0, 0.0]]
