"""Kinds of ramp: what each reads, how its parts are tied together, and what becomes of it in files."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, results
from helpers.random_models import byte_level
from helpers.trainings import QUIET, SaveAndStop, a_batch, build, fit, plain, source
from safetensors.torch import load_file
from torch import Tensor

from deebert.data.tokenization import encode
from deebert.errors import UserError
from deebert.hub import checkpoints
from deebert.models import backbones, ramps
from deebert.models.early_exit import EarlyExitModel
from deebert.models.ramp_readers import READERS
from deebert.models.ramps import PAPER, Ramp, RampKind
from deebert.training.feature_cache import FeatureCache

pytestmark = pytest.mark.filterwarnings(*QUIET)

Run = Callable[..., str]
KINDS = ("first", "mean", "pair", "first_and_mean", "attention", "shared", "cascade")
BEFORE = torch.tensor([[[1.0, 2.0], [3.0, 8.0], [9.0, 9.0]], [[0.0, 3.0], [3.0, 3.0], [6.0, 0.0]]])
AFTER = torch.tensor([[[5.0, 1.0], [1.0, 3.0], [7.0, 7.0]], [[2.0, 0.0], [4.0, 1.0], [0.0, 5.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def model_of(kind: str, num_labels: int = 3, **more: object) -> EarlyExitModel:
    """In eval mode; random weights large enough for inputs to differ."""
    torch.manual_seed(0)
    spec = plain("backbone", "tiny")
    spec["config"]["initializer_range"] = 0.3
    model = EarlyExitModel.from_backbone(spec, num_labels, plain("ramp", kind) | more).eval()
    for parameter in model.ramps.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def assert_equal_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("mask", [MASK, MASK.bool()], ids=["int", "bool"])
@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ("first", [[5, 1], [2, 0]]),
        ("mean", [[(5 + 1) / 2, (1 + 3) / 2], [(2 + 4 + 0) / 3, (0 + 1 + 5) / 3]]),
        ("first_and_mean", [[5, 1, (1 + 3) / 2, (2 + 8) / 2], [2, 0, (0 + 3 + 6) / 3, (3 + 3 + 0) / 3]]),
    ],
)  # fmt: skip
def test_what_is_read(reads: str, expected: list, mask: Tensor) -> None:
    ramp = Ramp(2, 2, 0.0, RampKind(reads))
    assert ramp.num_features == len(expected[0])
    torch.testing.assert_close(ramp.read(BEFORE, AFTER, mask), torch.tensor(expected).float())
    if not ramp.kind.reads_tokens:  # the first token is enough: the engine has no other by then
        assert torch.equal(ramp.read(BEFORE, AFTER[:, :1], mask), torch.tensor(expected).float())


SECOND = torch.tensor([1, 2])  # texts of 1 + 1 tokens, and of 2 + 1


@pytest.mark.parametrize("mask", [MASK, MASK.bool()], ids=["int", "bool"])
def test_two_texts_are_compared(mask: Tensor) -> None:
    ramp = Ramp(2, 2, 0.0, RampKind("pair"))
    first, second = [[5, 1], [(2 + 4) / 2, (0 + 1) / 2]], [[1, 3], [0, 5]]
    expected = [
        [(u + v) / 2 for u, v in zip(*pair, strict=True)]
        + [u - v for u, v in zip(*pair, strict=True)]
        + [abs(u - v) for u, v in zip(*pair, strict=True)]
        for pair in zip(first, second, strict=True)
    ]
    actual = ramp.read(BEFORE, AFTER, mask, SECOND)
    assert ramp.num_features == 6
    torch.testing.assert_close(actual, torch.tensor(expected))
    whole = ramp.read(BEFORE[1:], AFTER[1:], None, SECOND[1:])
    torch.testing.assert_close(whole, actual[1:])


@pytest.mark.parametrize("ends", [MASK.sum(1), torch.tensor([3, 3])], ids=["closed", "open"])
def test_a_text_alone_is_its_own_pair(ends: Tensor) -> None:
    actual = Ramp(2, 2, 0.0, RampKind("pair")).read(BEFORE, AFTER, MASK, ends)
    mean = Ramp(2, 2, 0.0, RampKind("mean")).read(BEFORE, AFTER, MASK)
    assert torch.equal(actual, torch.cat([mean, torch.zeros(2, 4)], -1))


def test_the_second_text_begins_behind_the_first_separator() -> None:
    ids = torch.tensor(
        [[2, 9, 3, 8, 3, 0], [2, 9, 9, 3, 0, 0], [7, 7, 7, 7, 7, 7], [3, 3, 3, 0, 0, 0]]
    )
    assert ramps.second_text(ids, 3).tolist() == [3, 4, 6, 1]


TEXTS = {
    "pair": ("a b", "c d e"),
    "alone": ("a b", None),
    "empty": ("a b", ""),
    "cut": ("a" * 40, "b c"),
}


@pytest.mark.parametrize("kind", ["word pieces", "byte level"])
@pytest.mark.parametrize("texts", TEXTS)
def test_the_tokenizer_s_layout(kind: str, texts: str) -> None:
    """[CLS] a [SEP] b [SEP], and <s> a </s></s> b </s>."""
    tokenizer = (
        byte_level() if kind == "byte level" else backbones.tokenizer(plain("backbone", "tiny"))
    )
    first, second = TEXTS[texts]
    columns = [[first]] if second is None else [[first], [second]]
    ids = encode(tokenizer, columns, 16)["input_ids"][0]
    actual = int(ramps.second_text(torch.tensor([ids]), tokenizer.sep_token_id))
    assert ids[actual - 1] == tokenizer.sep_token_id
    whole = tokenizer(*(column[0] for column in columns), truncation="longest_first", max_length=16)
    assert actual == 2 + sum(part == 0 for part in whole.sequence_ids())
    assert (actual == len(ids)) == (second is None)


@torch.no_grad()
def test_attention_weighs_the_real_tokens() -> None:
    ramp = Ramp(2, 2, 0.0, RampKind("attention"))
    ramp.attention.weight.copy_(torch.tensor([[0.5, -1.0]]))
    ramp.attention.bias.fill_(0.25)
    expected = []
    for row, mask in zip(AFTER.tolist(), MASK.tolist(), strict=True):
        real = [token for token, is_real in zip(row, mask, strict=True) if is_real]
        weights = [math.exp(0.5 * x - y + 0.25) for x, y in real]
        pairs = list(zip(weights, real, strict=True))
        expected += [sum(w * token[i] for w, token in pairs) / sum(weights) for i in (0, 1)]
    assert ramp.read(BEFORE, AFTER, MASK).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_model_gives_each_ramp_its_layer(kind: str) -> None:
    model = model_of(kind)
    inputs = a_batch()
    inputs["input_ids"][:, 2] = 3  # the separator
    hidden, context = model.backbone.embed(**inputs)
    previous, expected, second = None, [], torch.full([len(inputs["input_ids"])], 3)
    for index, ramp in enumerate(model.all_ramps):
        before, hidden = hidden, model.backbone.run_layer(index, hidden, context)
        previous = ramp(ramp.read(before, hidden, inputs["attention_mask"], second), previous)
        expected.append(previous)
    torch.testing.assert_close(model(**inputs), torch.stack(expected, 1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_does_not_matter(kind: str) -> None:
    model, inputs = model_of(kind), a_batch()
    inputs["input_ids"][:, 2] = 3  # the separator
    together = model(**inputs)
    assert together.std(0).min() > 1e-3, "rows differ"
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = model(**{name: values[row : row + 1, :length] for name, values in inputs.items()})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_ramp_is_the_paper_s(kind: str) -> None:
    model = model_of(kind)
    last = model.all_ramps[-1]
    assert (last.kind, last.num_features, last.classifier.in_features) == (PAPER, 32, 32)
    assert {name for name, _ in last.named_parameters()} == {
        "pooler.weight", "pooler.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip
    kinds = [ramp.kind for ramp in model.all_ramps[:-1]]
    assert kinds == [RampKind.from_config(plain("ramp", kind))] * 2
    assert model.ramp_kind == kinds[0]


def test_a_shared_pooler_is_one_parameter(glue: Path) -> None:
    module, _ = build("stage 1", glue, objective="joint", ramp="shared")
    first, second, last = module.model.all_ramps
    assert first.pooler is second.pooler
    assert last.pooler is not first.pooler
    assert first.classifier is not second.classifier
    optimized = [parameter for group in module.parameter_groups() for parameter in group["params"]]
    assert len({id(parameter) for parameter in optimized}) == len(optimized)
    separate, _ = build("stage 1", glue, objective="joint", ramp="first")
    saved = sum(p.numel() for p in separate.parameters()) - sum(p.numel() for p in optimized)
    assert saved == 32 * 32 + 32


@torch.no_grad()
@pytest.mark.parametrize("num_labels", [1, 4])
def test_what_a_ramp_sees_of_the_one_before(num_labels: int) -> None:
    """Equal probabilities at the first ramp; of a regression the value, 0 at the first."""
    model = model_of("cascade", num_labels)
    first, second, _ = model.all_ramps
    states = torch.randn(5, 3 * 32)
    logits = model.ramp_logits(states)
    seen = torch.full((5, num_labels), 1 / num_labels if num_labels > 1 else 0.0)
    for index, ramp in enumerate((first, second)):
        pooled = torch.tanh(ramp.pooler(states[:, 32 * index : 32 * index + 32]))
        weight = ramp.classifier.weight
        expected = pooled @ weight[:, :32].T + seen @ weight[:, 32:].T + ramp.classifier.bias
        torch.testing.assert_close(logits[:, index], expected)
        seen = logits[:, 0].softmax(-1) if num_labels > 1 else logits[:, 0]


def test_no_gradient_reaches_the_ramp_before() -> None:
    model = model_of("cascade")
    states = torch.randn(5, 3 * 32, requires_grad=True)
    model.ramp_logits(states)[:, 1].square().sum().backward()
    reached = {name for name, p in model.ramps.named_parameters() if p.grad is not None and p.grad.any()}  # fmt: skip
    assert reached == {f"1.{part}.{kind}" for part in ("pooler", "classifier") for kind in ("weight", "bias")}  # fmt: skip
    assert [bool(part.any()) for part in states.grad.split(32, -1)] == [False, True, False]


def test_a_learned_exit_score_is_one_head_on_what_each_ramp_pools() -> None:
    """It learns from the ramp, and the ramp nothing from it."""
    model = model_of("first", predicts="wrong")
    head = model.all_ramps[0].exit_head
    assert model.all_ramps[1].exit_head is head
    states = torch.randn(5, 3 * 32, requires_grad=True)
    _, actual = model.logits_and_scores(states)
    for index, ramp in enumerate(model.all_ramps[:-1]):
        pooled = torch.tanh(ramp.pooler(states[:, 32 * index : 32 * index + 32]))
        expected = 1 / (1 + torch.exp(-(pooled @ head.weight[0] + head.bias)))
        torch.testing.assert_close(actual[:, index], expected)
    assert actual[:, 2].tolist() == [0] * 5, "the final classifier is always sure"
    actual.sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"ramps.0.exit_head.weight", "ramps.0.exit_head.bias"}
    assert states.grad is None


def test_standardized_both_parts_have_variance_1() -> None:
    torch.manual_seed(0)
    features = torch.cat([1 + 1e-3 * torch.randn(500, 4), 5 * torch.randn(500, 4) - 2], -1)
    ramp = Ramp(4, 2, 0.0, RampKind("first_and_mean"))
    ramp.standardize(features)
    read = (features - ramp.shift) * ramp.scale
    assert read.mean(0).abs().max() < 1e-3
    for part in read.chunk(2, -1):
        assert part.var(0, correction=0).mean().item() == pytest.approx(1, abs=1e-3)
    assert ramp.scale.unique().tolist() == pytest.approx([1 / 5, 1e3], rel=0.1), "one for each part"


@pytest.mark.parametrize(
    ("kind", "width"), [("first_and_mean", 64), ("mean", 32), ("pair", 96), ("cascade", 32)]
)
def test_the_cache_holds_what_each_ramp_reads(
    kind: str, width: int, glue: Path, tmp_path: Path
) -> None:
    module, data = build("stage 2 cached", glue, ramp=kind)
    frozen = FeatureCache(data, module.model, tmp_path, standardize=[0, 1])
    frozen.setup("fit")
    states_NR = frozen._cache["train"].states_NR
    assert states_NR.shape == (96, 2 * width + 32)
    for index, ramp in enumerate(module.model.all_ramps[:-1]):
        read = (states_NR[:, index * width : (index + 1) * width] - ramp.shift) * ramp.scale
        for part in read.chunk(width // 32, -1):
            assert part.var(0, correction=0).mean().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_files_give_back_the_trained_model(kind: str, glue: Path, tmp_path: Path) -> None:
    """Of both stages: the second goes on with the ramps of the first."""
    before = None
    for stage, objective in (("stage 1", "joint"), ("stage 2 cached", "ramps")):
        module, data = build(stage, glue, objective=objective, ramp=kind, batch_size=32, lr=1e-2)
        assert module.is_cached == (stage != "stage 1" and kind != "attention")
        if before is not None:
            module.model.load_state_dict(before)
        fit(module, source(module, data, tmp_path), tmp_path, SaveAndStop(tmp_path / "x.ckpt"))
        model = module.model.eval()
        expected = model(**a_batch())
        again = checkpoints.read(tmp_path / "x.ckpt", "ckpt").model()
        model.save_pretrained(tmp_path / stage)
        saved = EarlyExitModel.from_pretrained(tmp_path / stage).eval()
        for copy in (again, saved):
            assert copy.ramp_kind == model.ramp_kind
            assert_equal_weights(copy.state_dict(), model.state_dict())
            assert torch.equal(copy(**a_batch()), expected)
            if kind == "shared":
                assert copy.all_ramps[0].pooler is copy.all_ramps[1].pooler
        before = again.state_dict()


def test_new_ramps_are_saved_as_what_they_are(tmp_path: Path) -> None:
    """Of the same shapes as the old ones, they would load without a word and read other things."""
    model = model_of("first")
    model.new_ramps(RampKind("mean"))
    model.eval().save_pretrained(tmp_path, config=None)  # as push_to_hub says it
    again = EarlyExitModel.from_pretrained(tmp_path).eval()
    assert again.ramp_kind == RampKind("mean")
    assert torch.equal(again(**a_batch()), model(**a_batch()))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"reads": "last"}, "ramp.reads 'last' is unknown; choose one of: first, mean, pair, first_and_mean, attention (ramp.reads=...)"),
        ({"reads": None}, "ramp.reads None is unknown"),
        ({"shared_pooler": "yes"}, "ramp.shared_pooler=yes must be true or false"),
        ({"sees_previous": 1}, "ramp.sees_previous=1 must be true or false"),
        ({"depth": 2}, "ramp setting 'depth' is unknown; choose one of: reads, shared_pooler, sees_previous"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(values: dict, says: str) -> None:
    with pytest.raises(UserError) as refused:
        RampKind.from_config(values)
    assert str(refused.value).startswith(says)


def test_tokens_are_needed_by_the_kinds_that_read_them_all() -> None:
    assert {reads: RampKind(reads).reads_tokens for reads in READERS} == {
        "first": False, "mean": True, "pair": True, "first_and_mean": False, "attention": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def joint(glue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stage-1 run with trained ramps on means goes; `trained` fills it."""
    return tmp_path_factory.mktemp("runs") / "joint"


@pytest.fixture
def trained(joint: Path, run: Run, glue: Path) -> Path:
    if not joint.exists():
        run(
            "train.py", "task=mrpc", *TINY, f"data.root={glue}", "objective=joint", "ramp=mean", "seed=5",
            "stages.1.epochs=1", "stages.1.lr=1e-3", "stages.2.epochs=1", f"hydra.run.dir={joint}",
        )  # fmt: skip
    return joint


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def config_of(folder: Path) -> dict:
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content["hyper_parameters"]["config"]


def logits(folder: Path) -> Tensor:
    return load_file(folder / "records" / "validation.safetensors")["logits_NLC"]


@pytest.mark.slow
@pytest.mark.parametrize("ramp", [None, "mean", "pair", "first_and_mean", "cascade", "attention"])
def test_stage_2_keeps_the_trained_ramps_or_makes_others(
    ramp: str | None, run: Run, trained: Path, tmp_path: Path
) -> None:
    """With next to no learning rate, ramps end as they begin."""
    overrides = [f"ramp={ramp}"] if ramp else []
    run("train.py", "stage=2", f"ckpt={trained}", "objective=distill", "stages.2.lr=1e-12", *overrides, "logger=csv", f"hydra.run.dir={tmp_path}")  # fmt: skip
    config, before, after = config_of(tmp_path), weights(trained), weights(tmp_path)
    assert config["ramp"] == plain("ramp", ramp or "mean")
    assert config["objective"] == {"name": "distill", "temperature": 1.0, "label_weight": 0.0}
    final = [name for name in before if not name.startswith(("model.ramps.0.", "model.ramps.1."))]
    assert all(torch.equal(before[name], after[name]) for name in final)
    torch.testing.assert_close(logits(tmp_path)[:, -1], logits(trained)[:, -1], atol=1e-5, rtol=0)
    assert results(tmp_path)["exits"][-1]["score"] == results(trained)["exits"][-1]["score"]
    # Poolers are compared where they have the same shape.
    kept = [
        torch.allclose(before[name], after[name], atol=1e-6)
        for k in (0, 1)
        if before[name := f"model.ramps.{k}.pooler.weight"].shape == after[name].shape
    ]
    assert kept == {None: [True] * 2, "mean": [True] * 2, "pair": [], "first_and_mean": []}.get(ramp, [False] * 2)  # fmt: skip
    if ramp in (None, "mean"):
        torch.testing.assert_close(logits(tmp_path), logits(trained), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_an_old_checkpoint_learns_its_separator(run: Run, trained: Path, tmp_path: Path) -> None:
    file = trained / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    del content["hyper_parameters"]["architecture"]["sep_token_id"]
    torch.save(content, old := tmp_path / "old.ckpt")
    run("train.py", "stage=2", f"ckpt={old}", "ramp=pair", "logger=csv", f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    made = checkpoints.read(tmp_path / "run" / "checkpoints" / "last.ckpt", "ckpt").model()
    assert (made.ramp_kind.reads, made.backbone.separator) == ("pair", 3)


@pytest.mark.slow
def test_of_one_text_a_pair_is_its_mean(run: Run, tmp_path: Path) -> None:
    part, rest = tmp_path / "part", tmp_path / "rest"
    run("train.py", "task=demo", *TINY, "objective=joint", "task.columns=[review]", "stages.1.epochs=2",
        "+trainer.max_steps=1", "stages.1.batch_size=32", "data.limit_train=64", f"hydra.run.dir={part}")  # fmt: skip
    assert config_of(part)["ramp"]["reads"] == "mean"
    # Whose task is known from the run alone.
    run("train.py", f"resume={part}", "+trainer.max_steps=-1", "logger=csv", f"hydra.run.dir={rest}")  # fmt: skip
    assert results(rest)["ramp"]["reads"] == "mean"
    assert results(rest)["epoch"] == 2


@pytest.mark.slow
def test_resume_goes_on_with_objective_and_ramp(
    run: Run, fails: Run, trained: Path, glue: Path, tmp_path: Path
) -> None:
    """What an interrupted run was told is neither forgotten nor contradicted."""
    part, rest = tmp_path / "part", tmp_path / "rest"
    run(
        "train.py", "task=mrpc", *TINY, f"data.root={glue}", "objective=mixed", "objective.final_share=0.25",
        "ramp=shared", "stages.1.epochs=2", "stages.1.batch_size=8", "+trainer.max_steps=11", f"hydra.run.dir={part}",
    )  # fmt: skip
    for other, says in (
        (["objective=joint"], "objective=joint contradicts"),
        (["objective=mixed", "objective.final_share=0.5"], "objective.final_share=0.5 contradicts"),
        (["ramp=mean"], "contradicts"),
        (["ramp.reads=mean"], "ramp.reads=mean contradicts"),
    ):
        assert says in fails("train.py", f"resume={part}", *other, f"hydra.run.dir={tmp_path / 'x'}")  # fmt: skip
    run("train.py", f"resume={part}", "+trainer.max_steps=-1", "logger=csv", f"hydra.run.dir={rest}")  # fmt: skip
    assert config_of(rest)["objective"] == {"name": "mixed", "final_share": 0.25}
    assert config_of(rest)["ramp"] == plain("ramp", "shared")
    assert results(rest)["objective"] == "mixed"
    assert results(rest)["ramp"] == plain("ramp", "shared")
    assert results(rest)["epoch"] == 2
