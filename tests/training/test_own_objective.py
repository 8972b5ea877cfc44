"""An objective of the user's: one class in a module of their own, used by training and evaluation."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY, mrpc_rows, results

from deebert import EarlyExitClassifier
from deebert.errors import UserError
from deebert.models import trained_ramps
from deebert.options import import_modules
from deebert.training import objectives

Run = Callable[..., str]
PAIRS = [(row["sentence1"], row["sentence2"]) for row in mrpc_rows("validation", 8)]
OWN = '''
from dataclasses import dataclass

from torch.nn import functional as F

from deebert.errors import UserError
from deebert.training.objectives import Objective, objective


@objective("smoothed")
@dataclass(frozen=True)
class Smoothed(Objective):
    """The sum of the losses of every ramp, with smoothed labels."""

    needs_classes = True

    smoothing: float = 0.1

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise UserError(f"objective.smoothing={self.smoothing} must be in [0, 1)")

    def loss(self, logits_BLC, labels_B):
        return sum(
            F.cross_entropy(logits_BC.float(), labels_B, label_smoothing=self.smoothing)
            for logits_BC in logits_BLC.unbind(1)
        )


@objective("last_only", final_alone=True)
class LastOnly(Objective):
    def loss(self, logits_BLC, labels_B):
        return F.cross_entropy(logits_BLC[:, -1].float(), labels_B)
'''


def forget() -> None:
    """As if this process had never imported the module."""
    for name in ("smoothed", "last_only"):
        objectives.OBJECTIVES.pop(name, None)
    trained_ramps.FINAL_ALONE[:] = ["final", "student"]
    sys.modules.pop("my_objectives", None)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the module `my_objectives` and of its configuration."""
    (tmp_path / "my_objectives.py").write_text(OWN)
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "smoothed.yaml").write_text("name: smoothed\nsmoothing: 0.2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    forget()


@pytest.mark.slow
def test_one_class_is_enough(own: Path, run: Run, fails: Run, glue: Path) -> None:
    modules, folder = "modules=[my_objectives]", own / "run"
    short = ("stages.1.epochs=1", "stages.1.lr=1e-3")
    command = ["--config-dir", str(own), "task=mrpc", *TINY, f"data.root={glue}", *short]
    line = fails("train.py", *command, "objective=smoothed", f"hydra.run.dir={own / 'unknown'}")
    assert line.startswith("Error: objective 'smoothed' is unknown; choose one of: final, joint, ")
    assert line.endswith("name the module that defines it: modules=[MODULE]")
    line = fails("train.py", *command, "objective=smoothed", "objective.smoothing=2", modules, f"hydra.run.dir={own / 'refused'}")  # fmt: skip
    assert line == "Error: objective.smoothing=2 must be in [0, 1)"
    run("train.py", *command, "objective=smoothed", modules, f"hydra.run.dir={folder}")
    assert results(folder)["objective"] == "smoothed"
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    config = content["hyper_parameters"]["config"]
    assert config["objective"] == {"name": "smoothed", "smoothing": 0.2}
    assert "modules" not in config

    forget()
    evaluated = [f"ckpt={folder}", "target_saving=0.3", "logger=csv"]
    line = fails("evaluate.py", *evaluated, f"hydra.run.dir={own / 'without'}")
    assert "objective 'smoothed' is unknown" in line
    run("evaluate.py", *evaluated, modules, f"hydra.run.dir={own / 'evaluated'}")
    assert results(own / "evaluated")["calibration"]["measured"]["expected_saving"] > 0

    forget()  # an answer needs no objective
    predictions = EarlyExitClassifier.from_pretrained(folder).predict(PAIRS, target_saving=0.3)
    assert len(predictions.labels) == len(PAIRS)


def test_an_objective_may_train_the_final_classifier_alone(own: Path) -> None:
    import_modules("my_objectives")
    assert not objectives.build({"name": "last_only"}, 1).trains_ramps
    assert not trained_ramps.trains_ramps("last_only")
    assert objectives.build({"name": "smoothed"}, 1).trains_ramps


def test_no_name_has_two_objectives(own: Path) -> None:
    import_modules("my_objectives")
    smoothed = objectives.OBJECTIVES["smoothed"]
    assert objectives.objective("smoothed")(smoothed) is smoothed
    with pytest.raises(UserError, match="the objective 'joint' is"):
        objectives.objective("joint")(smoothed)
