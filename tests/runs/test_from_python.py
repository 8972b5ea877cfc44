"""deebert.train and deebert.evaluate run what the command line runs, with rows from memory, too."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pandas as pd
import pytest
import torch
from conftest import results
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from torch.utils.data import DataLoader

import deebert
from deebert.data import demo, memory
from deebert.errors import UserError
from deebert.options import conf_folder
from deebert.runs.from_python import _word

LABELS = ("bad", "good")
ROWS = [{"text": row["review"], "label": LABELS[row["label"]]} for row in demo.rows("train")[:120]]
SHORT: dict[str, Any] = {
    "backbone": "tiny", "logger": "csv", "data.max_length": 48, "data.calibration_size": 0,
    "stages": {1: {"epochs": 1, "lr": 1e-3}},
}  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "checkpoints" / "last.ckpt"
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return state


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> deebert.Run:
    """Stage 1 on rows from memory."""
    folder = tmp_path_factory.mktemp("python") / "one"
    return deebert.train(data=ROWS, hydra={"run": {"dir": folder}}, **SHORT)


@pytest.fixture(scope="module")
def two(one: deebert.Run) -> deebert.Run:
    folder = one.folder.parent / "two"
    return deebert.train(
        stage=2, ckpt=one, logger="csv", hydra={"run": {"dir": folder}}, **{"stages.2.epochs": 1}
    )


@pytest.mark.slow
def test_the_command_line_gives_the_same_weights_and_results(
    run: Callable[..., str], one: deebert.Run, two: deebert.Run, tmp_path: Path
) -> None:
    run("train.py", f"data.file={one.folder / 'rows' / 'rows.parquet'}", "backbone=tiny",
        "logger=csv", "data.max_length=48", "data.calibration_size=0", "stages.1.epochs=1",
        "stages.1.lr=0.001", f"hydra.run.dir={tmp_path / 'one'}")  # fmt: skip
    run("train.py", "stage=2", f"ckpt={tmp_path / 'one'}", "logger=csv", "stages.2.epochs=1",
        f"hydra.run.dir={tmp_path / 'two'}")  # fmt: skip
    for made, name in ((one, "one"), (two, "two")):
        expected = weights(tmp_path / name)
        assert weights(made.folder).keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in weights(made.folder).items())
        ours, theirs = results(made.folder), results(tmp_path / name)
        paths = {"environment", "ckpt"}
        assert {k: v for k, v in ours.items() if k not in paths} == {
            k: v for k, v in theirs.items() if k not in paths
        }
    assert (one.folder / ".hydra" / "overrides.yaml").exists()
    assert "epoch 1 of 1" in (one.folder / "train.log").read_text()


@pytest.mark.slow
def test_an_evaluation_gives_curve_results_and_classifier(two: deebert.Run, tmp_path: Path) -> None:
    done = deebert.evaluate(
        ckpt=two, target_saving=0.4, logger="csv", hydra={"run": {"dir": tmp_path / "e"}}
    )
    assert done.results.to_json() == json.loads((tmp_path / "e" / "results.json").read_text())
    assert pd.DataFrame(done.curve)["threshold"].tolist() == [p.threshold for p in done.curve]
    assert done.results.calibration is not None
    assert done.results.calibration.target["target_saving"] == 0.4
    texts = [row["text"] for row in ROWS[:8]]
    answers = done.classifier.predict(texts, target_saving=0.4)
    expected = two.classifier.predict(texts, target_saving=0.4)
    assert answers.exit_layers == expected.exit_layers
    # Other rows are all reported.
    other = deebert.evaluate(
        ckpt=two, data=ROWS[:50], logger="csv", hydra={"run": {"dir": tmp_path / "o"}}
    )
    assert other.results.headline.num_rows == 50


def test_rows_of_every_kind_become_the_same_file(tmp_path: Path) -> None:
    columns = {name: [row[name] for row in ROWS] for name in ("text", "label")}
    coded = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))}
    )
    kinds: list[Any] = [
        ROWS, columns, pd.DataFrame(ROWS), datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_dict(columns, features=coded),
    ]  # fmt: skip
    for number, rows in enumerate(kinds):
        file = memory.write(rows, tmp_path / str(number))
        read = datasets.Dataset.from_parquet(str(file))
        assert read["text"][:] == columns["text"]
        assert file.name == "rows.parquet"
        splits = {"train": rows, "validation": rows}
        folder = memory.write(splits, tmp_path / f"{number}-splits")
        assert sorted(f.name for f in folder.iterdir()) == ["train.parquet", "validation.parquet"]
    named_rows = memory.write({"rows": ROWS}, tmp_path / "named")  # a split of that name
    assert named_rows == tmp_path / "named"
    assert memory.write(ROWS, tmp_path / "all", "validation") == tmp_path / "all"
    both = datasets.DatasetDict(train=kinds[3], validation=kinds[3])
    assert len(list(memory.write(both, tmp_path / "dict").iterdir())) == 2
    bad: list[Any] = [3, "", [], [3], {"../x": ROWS}, {"text": 3}, {"a": ["a"], "b": ["x", "y"]}]
    for rows in bad:
        with pytest.raises(UserError, match=r"^data"):
            memory.write(rows, tmp_path / "bad")


def test_values_are_written_as_hydra_reads_them(tmp_path: Path) -> None:
    values: list[Any] = [
        True, None, 3, 1e-3, "true", "1.0", "null", "a b", "a=b,c", 'say "x"', "back\\slash",
        "end\\", "${seed}", [1, "a b"], "", "é",
    ]  # fmt: skip
    state = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            for value in values:
                cfg = compose("train", [f"++own={_word(value)}"])
                read = cfg._get_node("own")._value() if value == "${seed}" else cfg.own
                assert read == value, value
    finally:
        GlobalHydra.instance().hydra = state


def test_mistakes_are_one_line_and_leave_hydra_as_it_was(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tassk": "x"}, "nearest known key is task"),
        ({"task": "mrp"}, "mrpc"),
        ({"stages": {1: {"epoch": 2}}}, "stages.1.epochs"),
        ({"task": object()}, "no value of the configuration"),
        ({"data": 3}, "must be a Dataset"),
        ({"data": [{"a": 1}]}, "data.label=COLUMN"),
        ({"task": "demo", "backbone": "tiny", "trainer": {"devices": 2}}, "trainer.devices=2"),
        ({"task": "demo", "config_dir": tmp_path, "backbone": "none"}, "none"),
    ]
    before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    for number, (settings, message) in enumerate(cases):
        with pytest.raises(UserError) as error:
            deebert.train(**settings, hydra={"run": {"dir": tmp_path / str(number)}})
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    # A former key is a UserError, too, and does not end the user's program.
    with pytest.raises(UserError, match="exit_rule"):
        deebert.evaluate(
            ckpt="none", **{"exit.score": "x"}, hydra={"run": {"dir": tmp_path / "former"}}
        )
    assert (GlobalHydra.instance().hydra, HydraConfig.instance().cfg) == before


@pytest.mark.slow
def test_module_and_rows_serve_in_a_trainer_of_one_s_own(tmp_path: Path) -> None:
    module, rows = deebert.modules(data=ROWS, hydra={"run": {"dir": tmp_path / "run"}}, **SHORT)
    assert isinstance(module, deebert.EarlyExitModule)
    assert isinstance(rows, deebert.TextDataModule)
    callback = deebert.EarlyExitEvaluation(None)
    options: dict[str, Any] = {
        "max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": tmp_path, "use_distributed_sampler": False,
    }  # fmt: skip
    before = [weight.clone() for weight in module.parameters()]
    L.Trainer(callbacks=[callback], **options).fit(module, datamodule=rows)
    assert callback.results is not None
    assert callback.results.headline.num_rows == 24
    assert any(not torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
    # The module with a plain loader of the user's own.
    batches = list(rows.train_dataloader())
    plain = DataLoader(batches, batch_size=None)
    trainer = L.Trainer(**options, limit_val_batches=0)
    trainer.fit(module, plain, plain)
    assert trainer.global_step == len(batches)

    class Counts(L.LightningModule):
        """A module of the user's own, which sees the batches of the data module."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = self.validated = 0

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            self.seen += len(batch["labels"])
            return self.weight * batch["labels"].float().mean()

        def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
            self.validated += len(batch["labels"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    counts = Counts()
    L.Trainer(**options, num_sanity_val_steps=0).fit(counts, datamodule=rows)
    assert (counts.seen, counts.validated) == (96, 24)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
    cells = json.loads(file.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint('saving', answers.saving)"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "saving 0." in done.stdout
    assert (tmp_path / "curve.png").stat().st_size > 1000
