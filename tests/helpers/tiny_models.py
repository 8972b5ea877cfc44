"""Tiny models of every architecture, and a padded batch for them."""

import torch
from conftest import ROOT
from omegaconf import OmegaConf

from deebert.models.architectures import ARCHITECTURES

CONF = ROOT / "conf" / "backbone"
WHOLE = ("deberta-v2", "modernbert")  # layers that cannot be run in parts
# Beside the plain configurations: what the published models of a type have switched on.
DEBERTA_V3 = {
    "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "type_vocab_size": 0,
}  # fmt: skip
VARIANTS = [
    *((name, {}) for name in ARCHITECTURES),
    ("electra", {"embedding_size": 32}),  # no projection
    ("deberta-v2", DEBERTA_V3),
    ("deberta-v2", DEBERTA_V3 | {"conv_kernel_size": 3}),  # v2-xlarge
    ("deberta-v2", {"type_vocab_size": 2}),
    ("modernbert", {"local_attention": 6}),  # layers 2 and 3 see 3 tokens to each side
]


def spec(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))


def tiny(model_type: str, **more: object) -> dict:
    values = spec("tiny")
    values["config"] |= {"model_type": model_type, **more}
    return values


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(5, 60, (4, 17))
    mask = torch.ones_like(ids)
    for row, length in enumerate((17, 9, 3, 12)):
        mask[row, length:] = 0
        ids[row, length:] = 0
    types = (torch.arange(17) > 5).long().expand(4, 17) * mask
    return ids, mask, types
