"""Every configuration composes, and every choice is used by somebody."""

import inspect
from functools import cache

import pytest
from helpers.configs import choices, composed
from omegaconf import OmegaConf

from deebert.exits import rules
from deebert.models.ramps import PAPER, RampKind, make
from deebert.training import objectives
from deebert.training.objectives import OBJECTIVES


@pytest.mark.parametrize("task", choices("task"))
@pytest.mark.parametrize("stage", [1, 2])
def test_every_task_and_stage(task: str, stage: int) -> None:
    cfg = OmegaConf.to_container(composed(f"task={task}", f"stage={stage}"), resolve=True)
    assert cfg["trainer"]["max_epochs"] == cfg["stages"][str(stage)]["epochs"] == (3, 10)[stage - 1]
    assert cfg["task"]["name"] == task


@pytest.mark.parametrize("backbone", choices("backbone"))
def test_every_backbone(backbone: str) -> None:
    cfg = composed("task=sst2", f"backbone={backbone}")
    assert cfg.backbone.name == backbone
    assert ("path" in cfg.backbone) != ("config" in cfg.backbone)


@pytest.mark.parametrize("name", choices("objective"))
def test_every_objective(name: str) -> None:
    """It builds in its stages, and its options and their defaults are those of the code."""
    values = OmegaConf.to_container(composed(f"objective={name}").objective)
    if name == "paper":
        assert values == {"name": None}
        return
    assert values["name"] == name
    defaults = inspect.signature(OBJECTIVES[name]).parameters
    assert values == {"name": name} | {key: known.default for key, known in defaults.items()}
    for stage in OBJECTIVES[name]().stages:
        assert objectives.build(values, stage).name == name


def test_every_rule_has_a_file() -> None:
    assert set(choices("exit")) == set(rules.RULES)


@pytest.mark.parametrize("name", choices("exit"))
def test_every_rule(name: str) -> None:
    """Its options and their defaults are those of the code."""
    values = OmegaConf.to_container(composed(f"exit={name}", name="evaluate").exit)
    rule = rules.named(name, 1 if name == "change" else 3)
    expected = {"name": name} | rule.options | ({"prior": None} if rule.relative else {})
    assert values == expected


@cache
def ramp(name: str) -> dict:
    return OmegaConf.to_container(composed(f"ramp={name}").ramp)


@pytest.mark.parametrize("name", choices("ramp"))
def test_every_ramp(name: str) -> None:
    """It builds, says all that there is to say, and is no other one's double."""
    values = ramp(name)
    kind = RampKind.from_config(values)
    assert list(values) == list(RampKind.__dataclass_fields__)
    others = [ramp(other) for other in choices("ramp")]
    assert others.count(values) == 1
    assert (kind == PAPER) == (name == "first")
    ramps = make(8, 2, 0.1, 3, kind)
    assert [ramp.kind for ramp in ramps] == [kind, kind, PAPER]


def test_the_choices_that_the_project_promises() -> None:
    assert choices("task") == sorted(
        ["sst2", "mrpc", "qnli", "rte", "qqp", "mnli", "cola", "stsb", "wnli", "ax", "demo"]
    )
    promised = "bert-base bert-large roberta-base roberta-large distilbert minilm mpnet-base tiny"
    assert choices("backbone") == sorted(promised.split())
    assert choices("objective") == sorted([*OBJECTIVES, "paper"])
    promised = "first mean pair first_and_mean attention shared cascade"
    assert set(choices("ramp")) >= set(promised.split())
    assert choices("experiment") == ["debug", "deebert_paper", "demo", "optuna"]


@pytest.mark.parametrize(("backbone", "epochs"), [("bert-base", 3), ("bert-large", 3), ("roberta-base", 10), ("roberta-large", 10)])  # fmt: skip
def test_the_paper_s_values(backbone: str, epochs: int) -> None:
    cfg = composed("experiment=deebert_paper", "task=mrpc", f"backbone={backbone}")
    for stage in ("1", "2"):
        recipe = OmegaConf.to_container(cfg.stages[stage], resolve=True)
        expected = {"epochs": epochs, "batch_size": 8, "lr": 2e-5, "weight_decay": 0.0, "warmup": 0.0}  # fmt: skip
        assert {key: recipe[key] for key in expected} == expected
    assert cfg.ramp == composed("ramp=first").ramp
    assert cfg.stages["2"].cache is False
    assert cfg.stages["2"].standardize is False
    assert (cfg.seed, cfg.data.max_length, cfg.trainer.gradient_clip_val) == (42, 128, 1.0)
    assert cfg.callbacks.best.monitor is None, "no selection: the last weights are kept"


def test_an_experiment_overrides_the_defaults() -> None:
    cfg = composed("experiment=demo")
    assert (cfg.task.name, cfg.backbone.name) == ("demo", "minilm")
    assert cfg.stages["1"].lr == 8e-5
    assert cfg.objective.name is None, "the paper's, in either stage"
    assert composed("experiment=demo", "stages.1.lr=7").stages["1"].lr == 7


@pytest.mark.parametrize("backbone", choices("backbone"))
def test_the_default_recipe(backbone: str) -> None:
    """Only the learning rate of stage 1 depends on the backbone."""
    cfg = OmegaConf.to_container(composed("task=mrpc", f"backbone={backbone}"), resolve=True)
    rates = {"minilm": 8e-5, "distilbert": 5e-5, "bert-large": 2e-5, "roberta-base": 2e-5, "roberta-large": 1e-5}  # fmt: skip
    assert cfg["ramp"]["reads"] == "pair"
    assert cfg["stages"]["1"] == {
        "epochs": 3, "batch_size": 16, "lr": rates.get(backbone, 3e-5), "weight_decay": 0.0,
        "warmup": 0.1, "layer_drop": 0.0,
    }  # fmt: skip
    assert cfg["stages"]["2"] == {
        "epochs": 10, "batch_size": 16, "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.0,
        "cache": True, "standardize": None,
    }  # fmt: skip


def test_recipes_are_reached_from_the_command_line() -> None:
    assert composed("stage=2", "stages.2.lr=5").stages["2"].lr == 5
    assert composed(name="evaluate").ckpt is None
