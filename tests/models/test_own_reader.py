"""A reader of the user's: one class in a module of their own, used by every command and from Python."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import flops
import pytest
import torch
from conftest import TINY, mrpc_rows, results
from helpers.services import served
from helpers.trainings import plain

from deebert import EarlyExitClassifier, Engine
from deebert.errors import UserError
from deebert.exits import rules
from deebert.export import onnx_folder
from deebert.export.onnx_folder import ExportOptions
from deebert.export.onnx_runner import Runner
from deebert.models import ramp_readers
from deebert.models.early_exit import EarlyExitModel
from deebert.models.ramps import RampKind
from deebert.options import import_modules, parse
from deebert.predict.command import predict
from deebert.predict.work import PredictOptions

Run = Callable[..., str]
PAIRS = [(row["sentence1"], row["sentence2"]) for row in mrpc_rows("validation", 40)]
OWN = '''
import numpy as np
import torch

from deebert.models.ramp_readers import Reader, reader, real_node


@reader("largest")
class Largest(Reader):
    """The largest value of each number over the tokens."""

    def read(self, states, ramp):
        after_BSH = states.after_BTH
        if states.mask_BS is not None:
            after_BSH = after_BSH.masked_fill(~states.mask_BS.bool()[..., None], -torch.inf)
        return after_BSH.amax(1)

    def onnx(self, graph, before, after, ramp):
        padding = graph.op("Sub", real_node(graph), graph.constant(np.array(1, np.float32)))
        padding = graph.op("Mul", padding, graph.constant(np.array(1e30, np.float32)))
        return graph.op("ReduceMax", graph.op("Add", after, padding), graph.integer([1]), keepdims=0)
'''


def forget(name: str) -> None:
    """As if this process had never imported the module."""
    ramp_readers.READERS.pop("largest", None)
    sys.modules.pop(name, None)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the module `my_readers`, where commands are started."""
    (tmp_path / "my_readers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    forget("my_readers")


@pytest.mark.slow
def test_one_class_is_enough(own: Path, run: Run, fails: Run, glue: Path) -> None:
    modules, stage1, stage2 = "modules=[my_readers]", own / "stage1", own / "stage2"
    short = ("stages.1.epochs=1", "stages.2.epochs=1", "stages.1.lr=1e-3", "stages.2.lr=1e-2")
    run("train.py", "task=mrpc", *TINY, f"data.root={glue}", *short, "stages.2.standardize=true", modules, "ramp.reads=largest", f"hydra.run.dir={stage1}")  # fmt: skip
    run("train.py", "stage=2", f"ckpt={stage1}", "logger=csv", modules, f"hydra.run.dir={stage2}")
    assert results(stage2)["ramp"] == plain("ramp", "first") | {"reads": "largest"}
    content = torch.load(stage2 / "checkpoints" / "last.ckpt", weights_only=True)
    assert "my_readers" not in repr(content["hyper_parameters"]), "a checkpoint names no module"

    # Each command needs the module again, and says so in one line.
    forget("my_readers")
    evaluated = [f"ckpt={stage2}", "target_saving=0.3", "logger=csv"]
    line = fails("evaluate.py", *evaluated, f"hydra.run.dir={own / 'refused'}")
    assert "ramp.reads 'largest' is unknown; choose one of: first, mean, pair, first_and_mean, attention (ramp.reads=...)" in line  # fmt: skip
    assert line.endswith("name the module that defines it: modules=[MODULE]")
    run("evaluate.py", *evaluated, modules, f"hydra.run.dir={own / 'evaluated'}")
    assert results(own / "evaluated")["calibration"]["measured"]["expected_saving"] > 0

    forget("my_readers")
    with pytest.raises(UserError, match="'largest' is unknown"):
        EarlyExitClassifier.from_pretrained(stage2)
    import_modules(["my_readers"])
    classifier = EarlyExitClassifier.from_pretrained(stage2)
    assert classifier.model.ramp_kind == RampKind("largest")
    expected = classifier.predict(PAIRS, target_saving=0.3)
    assert len(set(expected.exit_layers)) > 1
    del type(ramp_readers.READERS["largest"]).onnx
    with pytest.raises(UserError, match="no ONNX graph, as its class has no method `onnx`"):
        Engine(classifier.model, rules.default(2), 0.0, runtime="onnx")

    forget("my_readers")
    output = own / "out.csv"
    table = own / "in.jsonl"
    table.write_text("".join(json.dumps({"sentence1": a, "sentence2": b}) + "\n" for a, b in PAIRS))
    command = [f"model={stage2}", f"input={table}", f"output={output}", "target_saving=0.3"]
    predict(parse(PredictOptions, [*command, modules, "runtime=onnx"]))
    with output.open(newline="") as stream:
        answers = list(csv.DictReader(stream))
    assert [row["label"] for row in answers] == expected.labels
    assert [int(row["exit_layer"]) for row in answers] == expected.exit_layers

    forget("my_readers")
    folder = own / "exported"
    onnx_folder.run(parse(ExportOptions, [f"model={stage2}", f"output={folder}", modules]))
    runner = Runner(folder, threads=1).predict(PAIRS, target_saving=0.3)
    assert [answer["exit_layer"] for answer in runner] == expected.exit_layers
    assert [answer["label"] for answer in runner] == expected.labels

    with served(stage2, own, modules, "target_saving=0.3") as service:
        reply = service.predict(texts=PAIRS[:8])["answers"]
    assert [answer["exit_layer"] for answer in reply] == expected.exit_layers[:8]
    assert [answer["label"] for answer in reply] == expected.labels[:8]


def test_its_facts_have_defaults_that_are_always_right(own: Path) -> None:
    import_modules("my_readers")
    reader = RampKind("largest").reader
    assert (reader.name, reader.num_parts, reader.reads_tokens) == ("largest", 1, True)
    assert not any([reader.needs_second_text, reader.takes_pooler, reader.has_weights])
    sizes = flops.Sizes(24, 56, 4, 3, RampKind("largest"))
    assert flops.ramp(sizes, 16, 1) == flops.ramp(sizes, 16, 4) == 2 * 24 * 24 + 2 * 24 * 3


def test_its_weights_are_part_of_the_ramp(own: Path) -> None:
    import_modules("my_readers")

    class Scaled(type(ramp_readers.READERS["largest"])):
        def weights(self, hidden_size: int) -> dict[str, torch.nn.Module]:
            return {"gain": torch.nn.Linear(hidden_size, hidden_size)}

        def read(self, states: ramp_readers.LayerStates, ramp: torch.nn.Module) -> torch.Tensor:
            return ramp.gain(super().read(states, ramp))

    ramp_readers.reader("scaled")(Scaled)
    try:
        assert RampKind("scaled").reader.has_weights
        model = EarlyExitModel(plain("backbone", "tiny")["config"], 2, {"reads": "scaled"})
        names = [name for name in model.state_dict() if ".gain." in name]
        assert names == [f"ramps.{k}.gain.{part}" for k in (0, 1) for part in ("weight", "bias")]
        assert model.ramps[0].gain.bias.abs().sum() == 0, "initialized as the ramp's linear maps"
    finally:
        del ramp_readers.READERS["scaled"]


def test_no_name_has_two_readers(own: Path) -> None:
    import_modules("my_readers")
    largest = type(ramp_readers.READERS["largest"])
    assert ramp_readers.reader("largest")(largest) is largest, (
        "the same class again, as in a notebook"
    )
    with pytest.raises(UserError) as refused:
        ramp_readers.reader("mean")(largest)
    assert str(refused.value) == (
        "the ramp reader 'mean' is deebert.models.ramp_readers.Mean already; give my_readers.Largest "
        "another name"
    )


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["not_there"], "modules: not_there cannot be imported: ModuleNotFoundError: No module named 'not_there' (modules=[...])"),
        ("broken", "modules: broken cannot be imported: ZeroDivisionError: division by zero (modules=[...])"),
        (["taken"], "modules: taken cannot be imported: the ramp reader 'mean' is deebert.models.ramp_readers.Mean already; give taken.Mine another name (modules=[...])"),
        (3, "modules=3 must be a list of Python modules: modules=[my_readers]"),
        ([3], "modules=[3] must be a list of Python modules: modules=[my_readers]"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_imported(modules: object, message: str, own: Path) -> None:
    (own / "broken.py").write_text("1 / 0\n")
    (own / "taken.py").write_text(
        "from deebert.models.ramp_readers import Reader, reader\n@reader('mean')\nclass Mine(Reader): pass\n"
    )
    with pytest.raises(UserError) as refused:
        import_modules(modules)
    assert str(refused.value) == message
