"""Configurations as Hydra composes them from conf/."""

from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

CONF = ROOT / "conf"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))
