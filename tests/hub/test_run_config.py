"""The configuration of a run is typed, and gives back the values that were written."""

import copy

import pytest
from helpers.configs import composed
from omegaconf import OmegaConf

from deebert.data.tasks import DataConfig
from deebert.errors import UserError
from deebert.hub import checkpoint_config
from deebert.hub.run_config import KEYS, Recipe, RunConfig


def values(*overrides: str) -> dict:
    cfg = composed("task=mrpc", "backbone=tiny", "objective=final", *overrides)
    return OmegaConf.to_container(cfg, resolve=True)


def in_order(plain: object) -> object:
    """Make the order of the keys part of a comparison."""
    if isinstance(plain, dict):
        return [(key, in_order(value)) for key, value in plain.items()]
    return plain


@pytest.mark.parametrize("stage", [1, 2])
def test_plain_values_come_back_in_their_order(stage: int) -> None:
    written = values(f"stage={stage}", *(["stages.2.standardize=true"] if stage == 2 else []))
    run = RunConfig.from_plain(written)
    assert in_order(run.plain()) == in_order({key: written[key] for key in KEYS})
    first, second = (
        Recipe(3, 16, 3e-5, warmup=0.1),
        Recipe(10, 16, 1e-3, cache=True, standardize=True),
    )
    assert run.recipe == (first if stage == 1 else second)
    assert run.data == DataConfig()


def test_a_change_leaves_the_original_and_the_order() -> None:
    run = RunConfig.from_plain(values())
    before = copy.deepcopy(run.plain())
    changed = run.changed(data={"calibration_size": 5}, backbone={"layers": [1, 3]})
    assert run.plain() == before
    assert (changed.data.calibration_size, changed.backbone.layers) == (5, [1, 3])
    before["data"]["calibration_size"], before["backbone"]["layers"] = 5, [1, 3]
    assert in_order(changed.plain()) == in_order(before)


def test_keys_that_came_later_have_today_s_defaults() -> None:
    """An old file names its objective in the recipe, and has neither ramp nor teacher."""
    new = values()
    old = {key: new[key] for key in ("task", "backbone", "stage", "seed")}
    old["data"] = {"root": None, "max_length": 64}
    old["stages"] = {"1": {"epochs": 2, "batch_size": 8, "lr": 1e-3, "objective": "joint"}}
    run, not_taken = checkpoint_config.accepted(old)
    assert (run.objective.name, run.ramp_kind.reads, run.teacher) == ("joint", "first", None)
    assert (run.data, run.recipe.standardize) == (DataConfig(max_length=64), False)
    assert not not_taken
    assert run.plain()["data"] == old["data"], "nothing is added to what was written"


def test_a_saved_folder_names_no_place_of_this_machine() -> None:
    written = values("data.root=/rows", "+task.root=/tasks", "+backbone.path=/weights")
    public = RunConfig.from_plain(written).public()
    assert (public.data.root, public.task.root, public.backbone.path) == (None, None, None)
    assert not {"trainer", "callbacks", "teacher"} & public.plain().keys()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.limit_train=0", "data.limit_train=0 must be a whole number of 1 or more"),
        ("stages.1.lr=0", r"stages\.1\.lr=0 must be a number between 0 and 1"),
        ("seed=-1", "seed=-1 must be a whole number from 0 to 4294967295"),
    ],
)
def test_the_values_of_a_user_are_checked(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        RunConfig.from_plain(values(override))
