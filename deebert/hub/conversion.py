"""Published classifiers -> checkpoints of this program: the DeeBERT authors' own
(`ji-xin/bert_base-MRPC-two_stage`), and fine-tuned ones of transformers whose head is made like our
final classifier: linear, tanh, linear, on the first token.

Knows what their weights and labels are called. How a folder is read without trusting it: `foreign`.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deebert.data.tasks import Task
from deebert.errors import UserError, first_line, unknown
from deebert.hub import checkpoints, transformers_folder
from deebert.hub.checkpoints import Checkpoint
from deebert.models import ramps
from deebert.models.architectures import architecture, longest_input, settings
from deebert.models.early_exit import EarlyExitModel

log = logging.getLogger(__name__)

TASKS = Path(__file__).parent.parent / "conf" / "task"  # in a checkout; no part of the package
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
# How the authors' code numbers MNLI's labels, which their checkpoints do not say; those of
# their other tasks are in the order of the data (castorini/DeeBERT: examples/run_highway_glue.py,
# transformers/data/processors/glue.py).
MNLI = {
    "bert": ("contradiction", "entailment", "neutral"),
    "roberta": ("contradiction", "neutral", "entailment"),
}
# What a config.json may say where it speaks of these: with anything else, the same weights compute
# something that this program does not.
ONLY = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "problem_type": ("single_label_classification", "regression"),
}
DATA: dict[str, Any] = {
    "root": None, "max_length": 128, "limit_train": None, "unlabelled": [],
    "eval_batch_size": 64, "num_workers": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Head:
    """Where a published classifier keeps what we call its final classifier.

    Attributes:
        encoder: what the names of the encoder's weights begin with.
        pooler, classifier: its two linear layers.
        between: the values of config.json -> what is computed between the two.
    """

    encoder: str
    pooler: str
    classifier: str
    between: Callable[[Mapping[str, Any]], object] = lambda values: "tanh"


_ROBERTA = Head("roberta", "classifier.dense", "classifier.out_proj")
HEADS = {
    "bert": Head("bert", "bert.pooler.dense", "classifier"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": Head("mpnet", "classifier.dense", "classifier.out_proj"),
    "electra": Head("electra", "classifier.dense", "classifier.out_proj", lambda values: "GELU"),
    "distilbert": Head("distilbert", "pre_classifier", "classifier", lambda values: "ReLU"),
    "modernbert": Head("model", "head.dense", "classifier", lambda values: "GELU and LayerNorm"),
    "deberta-v2": Head(
        "deberta",
        "pooler.dense",
        "classifier",
        lambda values: values.get("pooler_hidden_act", "gelu"),
    ),
}
# The authors': RoBERTa's too has the encoder's pooler and one linear layer.
DEEBERT = {kind: Head(kind, f"{kind}.pooler.dense", "classifier") for kind in ("bert", "roberta")}


def our_name(name: str, head: Head, last: int) -> str | None:
    """The published name of a weight -> ours; None: it takes no part in what is computed.

    The authors' ramp on the last layer, number `last` from 0, is one of those: nothing has trained
    it, and the final classifier answers there.
    """
    for theirs, ours in ((head.pooler, "pooler"), (head.classifier, "classifier")):
        if name.startswith(f"{theirs}."):
            return f"ramps.{last}.{ours}{name.removeprefix(theirs)}"
    inner = name.removeprefix(f"{head.encoder}.")
    if ramp := re.fullmatch(r"encoder\.highway\.(\d+)\.(pooler|classifier)(\.dense)?(\..+)", inner):
        number, part, _, rest = ramp.groups()
        return None if number == str(last) else f"ramps.{number}.{part}{rest}"
    if inner.startswith("pooler.") or name.startswith(("cls.", "lm_head.")):
        return None  # of the pretraining
    inner = inner.replace("LayerNorm.gamma", "LayerNorm.weight")  # of before 2019
    return f"backbone.encoder.{inner.replace('LayerNorm.beta', 'LayerNorm.bias')}"


def task_values(name: str) -> dict[str, Any]:
    """What `conf/task/NAME.yaml` says, where this is a checkout.

    Raises:
        UserError: it is not there.
    """
    there = sorted(file.stem for file in TASKS.glob("*.yaml"))
    if not there:
        raise UserError(
            f"task={name}: conf/task/ is no part of the installed package; give from_pretrained "
            'what its file holds: task={"name": ..., "columns": [...], "labels": [...], '
            '"metrics": [...]}'
        )
    if name not in there:
        raise unknown("task", name, there, "task")
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(OmegaConf.load(TASKS / f"{name}.yaml"))
    return dict(values)


def read(folder: Path, flag: str, source: str, said: Mapping[str, Any]) -> Checkpoint:
    """Read a published classifier: the authors' as of stage 2, a plain one as of stage 1.

    Args:
        source: how the user named the folder.
        said: what it does not say itself: `task` (plain values, or None), `data`, `stages`, `seed`,
            as a run's configuration has them. Ramps that stage 2 is to train start from the final
            classifier's pooler, and random classifiers that depend on the seed.

    Raises:
        UserError: something is missing, damaged or hostile, or it cannot be an early-exit model.
    """
    try:
        return _read(folder, source, said)
    except UserError as error:
        raise UserError(f"{flag}={source}: {error}") from error


def _read(folder: Path, source: str, said: Mapping[str, Any]) -> Checkpoint:
    values, weights = transformers_folder.values(folder), transformers_folder.weights(folder)
    guessed = [kind for kind in DEEBERT if any(name.startswith(f"{kind}.") for name in weights)]
    kind = values.get("model_type") or (guessed[0] if guessed else None)  # older ones do not say
    if not isinstance(kind, str):
        raise UserError("its config.json says no model_type")
    architecture(kind)  # refuses one that is not supported
    for name, fits in ONLY.items():
        if values.get(name) is not None and values[name] not in fits:
            raise UserError(f"its config.json says {name}={values[name]!r}, not {fits[0]!r}")
    of_authors = any(".encoder.highway." in name for name in weights)
    head = (DEEBERT if of_authors else HEADS).get(kind)
    if head is None:
        raise UserError(f"it has ramps on a {kind}; the authors' are on: {', '.join(DEEBERT)}")
    if (between := head.between(values)) != "tanh":
        raise UserError(
            f"a {kind} classifier computes {between} where a final classifier here has tanh, so it "
            "would not answer the same; train one on its encoder: python train.py stage=1 "
            f"backbone.path={source}"
        )
    num_layers = _num_layers(values, weights)
    named = {our_name(name, head, num_layers - 1): value for name, value in weights.items()}
    ours = {name: value for name, value in named.items() if name is not None}
    task = _task(values, said)
    num_labels = _num_labels(ours.get(f"ramps.{num_layers - 1}.classifier.weight"), task, source)
    shape = settings({**values, "model_type": kind})
    seed = said.get("seed", 42)
    ours = _complete(ours, shape, num_labels, num_layers, None if of_authors else seed)
    if order := _order(values, MNLI[kind] if of_authors else None, Task.from_config(task)):
        for name in [name for name in ours if re.match(r"ramps\.\d+\.classifier\.", name)]:
            ours[name] = ours[name][order]
    data = DATA | {"max_length": min(128, longest_input(shape))} | dict(said.get("data", {}))
    config = {
        "task": task,
        "backbone": {
            "name": Path(source).name or folder.resolve().name,
            "path": checkpoints.lasting(source),
            "layers": None,
            "epochs": 10 if kind == "roberta" else 3,  # as conf/backbone/ has it
        },
        "ramp": asdict(ramps.PAPER),
        # It may have seen all training rows: none are left to choose thresholds on.
        "data": data | {"calibration_size": 0, "calibration_rows": None},
        "stage": 2 if of_authors else 1,
        "stages": {"1": {}, "2": {"cache": False}} | dict(said.get("stages", {})),
        "objective": {"name": "ramps" if of_authors else "final"},
        "seed": seed,
        "thresholds": None,
        "teacher": None,
    }
    files = transformers_folder.tokenizer_files(folder, shape)
    return Checkpoint(folder, config, shape, files, ours, epochs_done=0)


def _num_layers(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> int:
    numbers = {int(n) for key in weights for n in re.findall(r"\.encoder\.layer\.(\d{1,4})\.", key)}
    told = values.get("num_hidden_layers")
    if not numbers or told != len(numbers):
        raise UserError(
            f"its config.json says num_hidden_layers={told}, and its weights are of {len(numbers)}"
        )
    return len(numbers)


def _num_labels(classifier: Tensor | None, values: Mapping[str, Any], source: str) -> int:
    if classifier is None:
        raise UserError(
            "it holds no trained classifier; train one on its encoder: python train.py stage=1 "
            f"backbone.path={source}"
        )
    task, found = Task.from_config(values), classifier.shape[0] if classifier.ndim else 0
    if found != task.num_labels:
        named = ", ".join(task.labels) if task.labels else "a regression"
        raise UserError(
            f"it has {found} labels, and task {task.name} has {task.num_labels} ({named}); give "
            "the task it was trained for (task=...)"
        )
    return task.num_labels


def _complete(
    ours: dict[str, Tensor], shape: dict[str, Any], num_labels: int, num_layers: int, seed: Any
) -> dict[str, Tensor]:
    """All weights of the model, each of them of the right shape.

    Args:
        seed: of the ramps that stage 2 is to train and that are not there; None: all must be.
    """
    try:
        expected, _ = EarlyExitModel.shapes(shape, num_labels)
    except Exception as error:
        raise UserError(f"its configuration is of no model ({first_line(error)})") from error
    for name, value in ours.items():
        if name not in expected:
            raise UserError(f"its weights hold {name}, which is no part of this model")
        if tuple(value.shape) != expected[name]:
            raise UserError(f"its weight {name} is {tuple(value.shape)}, not {expected[name]}")
    last = f"ramps.{num_layers - 1}."

    def is_made(name: str) -> bool:
        untrained = seed is not None and name.startswith("ramps.") and not name.startswith(last)
        return untrained or name.endswith((".shift", ".scale"))

    if missing := sorted(name for name in expected if name not in ours and not is_made(name)):
        raise UserError(f"its weights lack {missing[0]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**32 if isinstance(seed, int) else 0)
        made = ramps.make(shape["hidden_size"], num_labels, 0.0, num_layers, ramps.PAPER)
    fresh = {}
    for name, value in made.state_dict().items():
        _, _, part = name.partition(".")
        untrained = seed is not None and not f"ramps.{name}".startswith(last)
        if untrained and part.startswith("pooler."):
            # Stage 1's ramps start from the pretrained pooler; this is the nearest to it.
            value = ours.get(last + part, value).clone()
        if untrained or part in ("shift", "scale"):
            fresh[f"ramps.{name}"] = value
    return fresh | ours


def _task(values: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The task it was trained for, as the user says or as it says itself (`finetuning_task`)."""
    given, told = said.get("task"), values.get("finetuning_task")
    name = str(told).lower().replace("-", "").removesuffix("mm")  # sst-2, mnli-mm
    if given is None:
        if name not in GLUE:
            raise UserError("it does not say what it was trained for: give task=mrpc, or another")
        return task_values(name)
    if given.get("checkpoint_task"):  # AX is scored with a model of MNLI
        given = task_values(given["checkpoint_task"])
    if name in GLUE and given.get("name") in GLUE and given["name"] != name:
        raise UserError(
            f"task={given['name']} contradicts its config.json, which says finetuning_task={told}; "
            "leave task= out, or give another checkpoint"
        )
    return dict(given)


def _order(
    values: Mapping[str, Any], authors: Sequence[str] | None, task: Task
) -> list[int] | None:
    """For each of the task's labels, its number in the checkpoint; None: the same.

    Names in config.json say so; LABEL_0, LABEL_1, ... say nothing, and are taken in the task's
    order.
    """
    if task.labels is None:
        return None
    alike = len(set(map(_plain, task.labels))) < len(task.labels)
    plain = str.strip if alike else _plain
    wanted = [plain(label) for label in task.labels]
    said = values.get("id2label")
    said = said if isinstance(said, dict) else {}
    names = [str(said.get(str(i), f"LABEL_{i}")) for i in range(len(wanted))]
    theirs = [plain(name) for name in names]
    if set(theirs) == set(wanted):
        return [theirs.index(label) for label in wanted]
    if any(name.lower() not in (f"label_{i}", str(i)) for i, name in enumerate(names)):
        raise UserError(
            f"its labels are {', '.join(names)}, and those of task {task.name} are "
            f"{', '.join(task.labels)}: give the task the checkpoint's names, in the order of the "
            f"data's ids (task.labels=[{','.join(names)}], if it is theirs)"
        )
    if authors and set(authors) == set(wanted):
        return [authors.index(label) for label in wanted]
    if len(wanted) > 2:
        listed = ", ".join(task.labels)
        log.warning(
            "the checkpoint does not name its labels: taken to be %s, in this order", listed
        )
    return None


def _plain(label: str) -> str:
    return re.sub(r"[\s_-]+", "_", label.strip().casefold())
