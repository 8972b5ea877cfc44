"""What people would take instead of early exit: fewer layers, LayerDrop, a student."""

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, results
from helpers.tiny_models import VARIANTS, batch, tiny
from helpers.trainings import build
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from deebert.errors import UserError
from deebert.hub import checkpoints
from deebert.models import backbones
from deebert.models.architectures import ARCHITECTURES
from deebert.models.early_exit import EarlyExitModel
from deebert.training.objectives import OBJECTIVES

Run = Callable[..., str]
# So that a training step can be computed by hand.
NO_DROPOUT = [f"+backbone.config.{name}=0.0" for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")]  # fmt: skip
# Leaves first.ckpt after the first epoch, to resume from.
FIRST = "+callbacks.first={_target_:lightning.pytorch.callbacks.ModelCheckpoint,filename:first,monitor:val/threshold_0/expected_saving}"  # fmt: skip


def overrides_of(glue: Path, folder: Path, *more: str) -> list[str]:
    return ["task=mrpc", *TINY, f"data.root={glue}", "stages.1.lr=1e-3", f"hydra.run.dir={folder}", *more]  # fmt: skip


def model_of(folder: Path) -> EarlyExitModel:
    return checkpoints.read(folder / "checkpoints" / "last.ckpt", "ckpt").model()


def record(folder: Path) -> torch.Tensor:
    return load_file(folder / "records" / "validation.safetensors")["logits_NLC"]


def last_states(model: EarlyExitModel) -> torch.Tensor:
    ids, mask, types = batch()
    hidden, context = model.backbone.embed(ids, mask, types)
    for index in range(len(model.ramps)):
        hidden = model.backbone.run_layer(index, hidden, context)
    return hidden


@pytest.mark.parametrize(("model_type", "more"), VARIANTS)
@torch.no_grad()
def test_a_cut_backbone_is_the_library_s_own_model_with_fewer_layers(
    model_type: str, more: dict, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    values = backbones.random_config(
        tiny(model_type, num_hidden_layers=4, initializer_range=0.3, **more)
    )
    config = AutoConfig.for_model(**values)
    whole = AutoModel.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    layers = [1, 3]
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[0], types[2]]
    config.num_hidden_layers = 2
    small = AutoModel.from_config(config).eval()
    path = ARCHITECTURES[model_type].layers
    weights = {}
    for name, value in whole.state_dict().items():
        if name.startswith(f"{path}."):
            number, _, rest = name.removeprefix(f"{path}.").partition(".")
            if int(number) + 1 not in layers:
                continue
            name = f"{path}.{layers.index(int(number) + 1)}.{rest}"
        weights[name] = value
    small.load_state_dict(weights)
    spec = {"name": "x", "path": str(tmp_path), "layers": layers}
    model = EarlyExitModel.from_backbone(spec, 2).eval()
    assert len(model.ramps) == 2
    ids, mask, types = batch()
    typed = {"token_type_ids": types} if model_type in ("bert", "electra", "deberta-v2") else {}
    expected = small(ids, attention_mask=mask, **typed).last_hidden_state
    torch.testing.assert_close(last_states(model), expected, atol=1e-5, rtol=0)
    logits = model(ids, mask, types)
    torch.testing.assert_close(logits[:, -1], model.ramps[-1](expected[:, 0]), atol=1e-5, rtol=0)
    again = EarlyExitModel(model.config, 2).eval()  # as a checkpoint rebuilds it
    aside = ("_name_or_path", "dtype", "architectures", "intermediate_size")  # as in test_backbones
    ours, theirs = ({k: v for k, v in m.config.items() if k not in aside} for m in (again, model))
    assert ours == theirs
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids, mask, types), logits)


def test_a_layer_unlike_the_others_cannot_go() -> None:
    with pytest.raises(UserError, match=r"backbone.layers=\[2, 3\]: layer 1 of a modernbert is"):
        EarlyExitModel.from_backbone(tiny("modernbert") | {"layers": [2, 3]}, 2)


@pytest.mark.slow
def test_a_cut_backbone_goes_through_both_stages(run: Run, glue: Path, tmp_path: Path) -> None:
    printed = run("train.py", *overrides_of(glue, tmp_path / "cut", "backbone.layers=[1,3]", "stages.1.epochs=1"))  # fmt: skip
    assert "mrpc, tiny (layers 1, 3), stage 1, seed 42" in printed
    run("train.py", "stage=2", f"ckpt={tmp_path / 'cut'}", "logger=csv", "stages.2.epochs=1", f"hydra.run.dir={tmp_path / 'ramps'}")  # fmt: skip
    for name in ("cut", "ramps"):
        result = results(tmp_path / name)
        assert (result["layers"], result["num_layers"]) == ([1, 3], 2)
        assert len(model_of(tmp_path / name).ramps) == 2


@pytest.mark.slow
@pytest.mark.pictures
def test_one_layer_is_trained_and_evaluated(run: Run, glue: Path, tmp_path: Path) -> None:
    run(
        "train.py",
        *overrides_of(glue, tmp_path / "one", "backbone.layers=[1]", "stages.1.epochs=1"),
    )
    run("evaluate.py", f"ckpt={tmp_path / 'one'}", "logger=csv", "analysis=true", f"hydra.run.dir={tmp_path / 'again'}")  # fmt: skip
    run("evaluate.py", f"record={tmp_path / 'one'}", f"hydra.run.dir={tmp_path / 'record'}")  # fmt: skip
    trained, again = results(tmp_path / "one"), results(tmp_path / "again")
    assert [ramp["layer"] for ramp in trained["exits"]] == [1]
    assert trained["curve"][-1]["expected_saving"] == 0, "nothing can leave"
    assert again["exits"] == trained["exits"] == results(tmp_path / "record")["exits"]
    assert again["curve"] == trained["curve"]
    for name in ("results.md", "report.html", "curve.png"):
        assert (tmp_path / "one" / name).stat().st_size > 500


@pytest.mark.slow
def test_a_run_is_pruned_whatever_its_ramps_learned_from(
    run: Run, stage2: Path, glue: Path, tmp_path: Path
) -> None:
    """A loss over the ramps before the last, or with a weight for each of them, is of training."""
    weighted = ["objective=weighted", "objective.weights=[1,2,0]", "stages.1.epochs=1"]
    run("train.py", *overrides_of(glue, tmp_path / "weighted", *weighted))
    for name, ckpt in (("of stage 2", stage2), ("weighted", tmp_path / "weighted")):
        for layers in ("[1]", "[1,3]"):
            folder = tmp_path / f"{name} {layers}"
            run("evaluate.py", f"ckpt={ckpt}", f"layers={layers}", "logger=csv", f"hydra.run.dir='{folder}'")  # fmt: skip
            assert results(folder)["num_layers"] == layers.count(",") + 1


@torch.no_grad()
def test_skipped_layers_are_as_if_they_were_cut(glue: Path) -> None:
    """Ramps of skipped layers read what the layer before has handed on."""
    model = EarlyExitModel.from_backbone(tiny("bert", initializer_range=0.3), 2).eval()
    logits = model.ramp_logits(model.states(*batch(), skipped=[1]))
    ramp_2 = model.ramps[1]
    model.keep_layers([1, 3], "layers")
    cut = model(*batch())
    assert torch.equal(logits[:, [0, 2]], cut)
    hidden, context = model.backbone.embed(*batch())
    assert torch.equal(logits[:, 1], ramp_2(model.backbone.run_layer(0, hidden, context)[:, 0]))


@torch.no_grad()
def test_layer_drop_skips_layers_in_training_only(glue: Path) -> None:
    module, data = build("stage 1", glue, layer_drop=1.0)
    tokens = next(iter(data.loader("train")))
    module.eval()
    everything = module.states(tokens)
    inputs = (tokens["input_ids"], tokens["attention_mask"], tokens["token_type_ids"])
    assert torch.equal(everything, module.model.states(*inputs))
    embedded = module.model.backbone.embeddings(*inputs)[:, 0]
    module.training = True  # without dropout inside
    assert torch.equal(module.states(tokens), embedded.repeat(1, 3))
    module.layer_drop = 0.2
    torch.manual_seed(0)
    drawn = torch.tensor([sum(index in module._dropped() for _ in range(2000)) for index in (0, 2)])
    assert ((drawn / 2000 - 0.2).abs() < 0.03).all()


@pytest.mark.slow
def test_layer_drop_resumes_and_is_pruned(run: Run, glue: Path, tmp_path: Path) -> None:
    recipe = ("stages.1.layer_drop=0.5", "stages.1.epochs=2")
    run("train.py", *overrides_of(glue, tmp_path / "unbroken", *recipe, FIRST))
    run("train.py", f"resume={tmp_path / 'unbroken' / 'checkpoints' / 'first.ckpt'}", FIRST, "logger=csv", f"hydra.run.dir={tmp_path / 'rest'}")  # fmt: skip
    rest, model = model_of(tmp_path / "rest"), model_of(tmp_path / "unbroken")
    for name, value in model.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name

    run("evaluate.py", f"ckpt={tmp_path / 'unbroken'}", "layers=[1,3]", "logger=csv", "threshold=0", "timing=all", "repeats=1", f"hydra.run.dir={tmp_path / 'pruned'}")  # fmt: skip
    result = results(tmp_path / "pruned")
    assert (result["layers"], result["num_layers"]) == ([1, 3], 2)
    [timed] = result["timing"]  # a baseline is held against early exit on the clock
    assert (timed["exit_counts"], timed["score"]) == ([0, 40], result["exits"][-1]["score"])
    model.keep_layers([1, 3], "layers")
    _, data = build("stage 1", glue)
    [rows] = list(data.loader("validation"))
    with torch.no_grad():
        logits = model(rows["input_ids"], rows["attention_mask"], rows["token_type_ids"])
    expected = torch.empty_like(logits)
    expected[rows["index"]] = logits
    torch.testing.assert_close(record(tmp_path / "pruned"), expected, atol=1e-5, rtol=0)


def test_a_pruned_model_keeps_the_ramps_of_its_layers(
    run: Run, stage2: Path, tmp_path: Path
) -> None:
    run("evaluate.py", f"ckpt={stage2}", "layers=[2,3]", "logger=csv", "target_saving=0.3", f"hydra.run.dir={tmp_path / 'two'}")  # fmt: skip
    whole, pruned = model_of(stage2), model_of(stage2)
    pruned.keep_layers([2, 3], "layers")
    for ours, theirs in zip(pruned.all_ramps, whole.all_ramps[1:], strict=True):
        assert torch.equal(ours.classifier.weight, theirs.classifier.weight)
    whole.keep_layers([1, 2], "layers")
    assert torch.equal(whole.ramps[1].pooler.weight, pruned.ramps[1].pooler.weight), "the last one"
    result = results(tmp_path / "two")
    assert result["calibration"]["target"]["target_saving"] == 0.3
    assert len(result["curve"][0]["exit_counts"]) == 2


def test_a_student_s_loss_on_numbers() -> None:
    """One row, two labels: the teacher is sure of label 0 by 4, the student by 1; T = 2."""
    objective = OBJECTIVES["student"](temperature=2.0, label_weight=0.3)
    logits = torch.tensor([[[9.0, -9.0], [1.0, 0.0]]])
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-0.5))
    apart = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    labels = objective.loss(logits, torch.tensor([0])).item()
    assert labels == pytest.approx(0.3 * math.log(1 + math.exp(-1)))
    taught = objective.taught(logits, torch.tensor([[4.0, 0.0]])).item()
    assert taught == pytest.approx(0.7 * 4 * apart, rel=1e-5)
    assert objective.loss(logits, torch.tensor([-100])).item() == 0
    values = torch.tensor([[[5.0], [1.0]], [[5.0], [3.0]]])  # a regression
    assert objective.taught(values, torch.tensor([[2.0], [1.0]])).item() == pytest.approx(0.7 * 2.5)
    assert objective.loss(values, torch.tensor([2.0, math.nan])).item() == pytest.approx(0.3)


@pytest.mark.slow
def test_a_student_starts_from_its_teacher_and_learns_from_it(
    run: Run, fails: Run, glue: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    run("train.py", *overrides_of(glue, teacher, *NO_DROPOUT, "stages.1.epochs=2", "seed=5"))
    student = ("backbone.layers=[1,3]", "stages.1.batch_size=96", "stages.1.lr=1e-3", "stages.1.epochs=2", "logger=csv")  # fmt: skip
    run("train.py", f"teacher={teacher}", *student, FIRST, "trainer.log_every_n_steps=1", f"hydra.run.dir={tmp_path / 'unbroken'}")  # fmt: skip

    whole, cut = model_of(teacher), model_of(teacher)
    cut.keep_layers([1, 3], "layers")
    _, data = build("stage 1", glue)
    data.batch_size = 96
    [rows] = list(data.train_dataloader())
    inputs = (rows["input_ids"], rows["attention_mask"], rows["token_type_ids"])
    with torch.no_grad():
        ours, theirs = cut(*inputs)[:, -1], whole(*inputs)[:, -1]
    label = torch.nn.functional.cross_entropy(ours, rows["labels"])
    p = (theirs / 2).softmax(-1)
    apart = 4 * (p * (p.log() - (ours / 2).log_softmax(-1))).sum(-1).mean()
    metrics = csv.DictReader(
        (tmp_path / "unbroken" / "csv" / "metrics.csv").read_text().splitlines()
    )
    first = next(float(row["train/loss"]) for row in metrics if row["train/loss"])
    assert first == pytest.approx((0.5 * label + 0.5 * apart).item(), rel=1e-4)

    run("train.py", f"resume={tmp_path / 'unbroken' / 'checkpoints' / 'first.ckpt'}", FIRST, "logger=csv", f"hydra.run.dir={tmp_path / 'rest'}")  # fmt: skip
    shutil.rmtree(teacher)  # nothing below needs it
    content = torch.load(tmp_path / "rest" / "checkpoints" / "last.ckpt", weights_only=True)
    config = content["hyper_parameters"]["config"]
    assert config["teacher"] == str(teacher)
    assert config["objective"]["name"] == "student"
    assert (config["seed"], config["backbone"]["layers"]) == (5, [1, 3])
    trained, rest = model_of(tmp_path / "unbroken"), model_of(tmp_path / "rest")
    assert content["state_dict"].keys() == {f"model.{name}" for name in trained.state_dict()}
    start = cut.state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name
    moved = {
        name for name, value in trained.named_parameters() if not torch.equal(start[name], value)
    }
    still = {name for name, _ in trained.named_parameters()} - moved
    ramp_1 = {name for name, _ in trained.named_parameters() if name.startswith("ramps.0.")}
    assert {name for name in still if not name.endswith("key.bias")} == ramp_1
    run("evaluate.py", f"ckpt={tmp_path / 'rest'}", "logger=csv", f"hydra.run.dir={tmp_path / 'again'}")  # fmt: skip
    assert results(tmp_path / "again")["exits"] == results(tmp_path / "unbroken")["exits"]
    gone = fails("train.py", f"teacher={teacher}", *student, f"hydra.run.dir={tmp_path / 'gone'}")
    assert "no such file or folder" in gone
