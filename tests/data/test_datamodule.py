import json
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, mrpc_rows, write_rows
from omegaconf import OmegaConf

from deebert.data import tokenization
from deebert.data.datamodule import LengthBatches, TextDataModule
from deebert.data.tasks import Task
from deebert.errors import UserError
from deebert.hub.run_config import RunConfig
from deebert.models import backbones
from deebert.runs import build

CONF = ROOT / "conf"


def module(name: str, root: Path | None, **changes: object) -> TextDataModule:
    values = OmegaConf.to_container(OmegaConf.load(CONF / "task" / f"{name}.yaml"))
    spec = OmegaConf.to_container(OmegaConf.load(CONF / "backbone" / "tiny.yaml"))
    options = {
        "root": str(root) if root else None, "max_length": 64, "limit_train": None, "calibration_size": None, "batch_size": 8,
        "eval_batch_size": 16, "num_workers": 0, "seed": 1,
    }  # fmt: skip
    return TextDataModule(
        Task.from_config(values), backbones.tokenizer(spec), **(options | changes)
    )


def sampler(**changes: object) -> LengthBatches:
    torch.manual_seed(0)
    options = {"lengths": torch.randint(3, 60, (1003,)).tolist(), "batch_size": 8, "shuffle": True, "seed": 5}  # fmt: skip
    return LengthBatches(**(options | changes))


def test_held_out_rows_are_known_by_their_words(glue: Path, tmp_path: Path) -> None:
    data = module("mrpc", glue, calibration_size=20)
    values = OmegaConf.to_container(OmegaConf.load(CONF / "task" / "mrpc.yaml"))
    new = RunConfig.from_checked(
        {
            "task": values, "backbone": {}, "data": {}, "stage": 1, "seed": 1, "stages": {"1": {}},
            "objective": {"name": "final"},
        }
    )  # fmt: skip
    run = build.with_held_out(new, data)
    other = module("mrpc", glue, calibration_size=20, max_length=10)
    assert build.with_held_out(run, other) == run
    older = new.changed(data={"calibration_rows": data.fingerprint("calibration")})  # of tokens
    assert build.with_held_out(older, data).data == run.data
    expected = {"calibration_size": 20, "calibration_rows": run.data.calibration_rows}
    assert run.plain()["data"] == expected
    assert new.plain()["data"] == {}
    rows = mrpc_rows("train", 96)
    spaced = [row | {"sentence1": f" {row['sentence1']} "} for row in rows]
    write_rows(tmp_path / "mrpc", "train", spaced)
    build.with_held_out(run, module("mrpc", tmp_path, calibration_size=20))
    write_rows(tmp_path / "mrpc", "train", [row | {"label": 1 - row["label"]} for row in rows])
    with pytest.raises(UserError, match="the training rows have changed"):
        build.with_held_out(run, module("mrpc", tmp_path, calibration_size=20))


def test_every_row_once_an_epoch_in_batches_of_similar_length() -> None:
    batches = list(sampler())
    assert sorted(row for batch in batches for row in batch) == list(range(1003))
    assert len(batches) == len(sampler()) == 126
    lengths = sampler().lengths
    spread = sum((lengths[batch].max() - lengths[batch].min()).item() for batch in batches) / 126
    assert spread < 5, "unsorted batches of 8 spread over about 44"
    assert [len(batch) for batch in batches].count(8) == 125


def test_order_depends_on_seed_and_epoch_only() -> None:
    first = list(sampler())
    again = sampler()
    assert list(again) == first
    again.set_epoch(1)
    assert list(again) != first
    assert list(sampler(seed=6)) != first
    lengths = [sampler().lengths[batch].float().mean().item() for batch in first]
    assert lengths != sorted(lengths), "batches come in random order"


def test_evaluation_is_sorted_by_length() -> None:
    batches = list(sampler(shuffle=False))
    lengths = sampler().lengths[[row for batch in batches for row in batch]]
    assert (lengths.diff() >= 0).all()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_all_rows_and_take_equally_many_steps(shuffle: bool, world: int) -> None:
    parts = [list(sampler(shuffle=shuffle, rank=r, world_size=world)) for r in range(world)]
    assert len({len(part) for part in parts}) == 1
    rows = [row for part in parts for batch in part for row in batch]
    assert set(rows) == set(range(1003))
    assert len(rows) - 1003 < world * 8


def test_a_batch(glue: Path) -> None:
    data = module("mrpc", glue)
    batch = next(iter(data.val_dataloader()[0]))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "index", "length"}  # fmt: skip
    assert batch["input_ids"].shape == (16, batch["length"].max()), "padded to its own longest"
    assert torch.equal(batch["attention_mask"].sum(1), batch["length"])
    assert batch["labels"].dtype == torch.long
    rows = [i for b in data.val_dataloader()[0] for i in b["index"].tolist()]
    assert sorted(rows) == list(range(40))


def test_padded_at_the_right_whatever_the_tokenizer_says(glue: Path) -> None:
    """A ramp reads the first token, and the engine pads at the right."""
    expected, data = module("mrpc", glue), module("mrpc", glue)
    settings = {"padding_side": "left", "truncation_side": "left"}
    files = tokenization.files_of(data.tokenizer)
    config = json.loads(files["tokenizer_config.json"]) | settings
    files["tokenizer_config.json"] = json.dumps(config)
    # Twice: from a backbone's folder, and from the checkpoint that was trained with it.
    data.tokenizer = tokenization.from_files(tokenization.files_of(tokenization.from_files(files)))
    assert data.tokenizer.padding_side == data.tokenizer.truncation_side == "left"
    for batch, same in zip(data.val_dataloader()[0], expected.val_dataloader()[0], strict=True):
        assert (batch["input_ids"][:, 0] == data.tokenizer.cls_token_id).all()
        assert (batch["attention_mask"].diff(dim=1) <= 0).all()
        assert torch.equal(batch["attention_mask"], same["attention_mask"])
        for row, length in zip(batch["input_ids"], batch["length"], strict=True):
            assert (row[length:] == data.tokenizer.pad_token_id).all()
    shorter = module("mrpc", glue, max_length=12)
    shorter.tokenizer = data.tokenizer
    ends = [text[-1] for text in shorter.rows("validation")["text_b"][:]]
    cut = shorter.tokens("validation")["input_ids"][:]
    assert [data.tokenizer.decode(ids[-2]).strip("#") for ids in cut] == ends, "cut at the left"


def test_group_and_regression_labels(tmp_path: Path) -> None:
    from conftest import write_rows

    batch = next(iter(module("demo", None).val_dataloader()[0]))
    assert set(batch["group"].tolist()) <= {1, 2, 3}
    rows = [{"sentence1": "a", "sentence2": "b", "label": v} for v in (0.0, 2.5)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "stsb", split, rows)
    batch = next(iter(module("stsb", tmp_path).train_dataloader()))
    assert batch["labels"].dtype == torch.float32
    assert sorted(batch["labels"].tolist()) == [0.0, 2.5]


def test_tokenized_once_and_cached(glue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = module("mrpc", glue).tokens("train")
    data = module("mrpc", glue)
    cached = Path(data.tokens("train").cache_files[0]["filename"])
    written = cached.stat().st_mtime_ns
    again = module("mrpc", glue).tokens("train")
    assert again["input_ids"][:] == first["input_ids"][:]
    assert cached.stat().st_mtime_ns == written
    assert cached.is_relative_to(datasets.config.HF_DATASETS_CACHE)
    shorter = module("mrpc", glue, max_length=20).tokens("train")
    assert shorter.cache_files[0]["filename"] != str(cached)
    assert max(shorter["length"][:]) == 20


def test_limit_train_takes_the_same_rows_for_every_seed(glue: Path) -> None:
    rows = [
        module("mrpc", glue, limit_train=10, seed=s).tokens("train")["index"][:] for s in (1, 2)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 10
    assert rows[0] != list(range(10))
    assert len(module("mrpc", glue, limit_train=10).tokens("validation")) == 40
    assert len(module("mrpc", glue, limit_train=10**9).tokens("train")) == 96


def test_one_of_mnli_s_validation_splits_may_be_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from conftest import write_rows

    rows = [{"premise": "a", "hypothesis": "b", "label": i} for i in range(3)]
    for split in ("train", "validation_matched"):
        write_rows(tmp_path / "mnli", split, rows)
    assert module("mnli", tmp_path).eval_splits == ("validation_matched",)
    assert "'validation_mismatched' is not there" in caplog.text
    write_rows(tmp_path / "mnli", "validation_mismatched", rows)
    assert len(module("mnli", tmp_path).val_dataloader()) == 2


def test_ax_cannot_be_trained() -> None:
    with pytest.raises(UserError, match="no training split; score it with a checkpoint of mnli"):
        module("ax", None).train_dataloader()
