"""Convert published classifiers into checkpoints of this program.

Two kinds are converted: the checkpoints of the DeeBERT authors (`ji-xin/bert_base-MRPC-two_stage`),
and fine-tuned classifiers of Transformers whose head computes the same as the final classifier here
(linear, tanh, linear, on the first token). This module knows the names of their weights and labels.
It does not know how a folder is read safely: `transformers_folder` does.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deebert.data import labels
from deebert.data.tasks import Task
from deebert.errors import UserError, first_line, unknown
from deebert.hub import checkpoints, transformers_folder
from deebert.hub.checkpoints import Checkpoint
from deebert.hub.run_config import RunConfig, RunDefaults
from deebert.models import ramps
from deebert.models.architectures import architecture, longest_input, settings
from deebert.models.early_exit import EarlyExitModel
from deebert.options import job_command

log = logging.getLogger(__name__)

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
# The order of MNLI's labels in the authors' code. Their checkpoints do not state it. The labels of
# their other tasks have the order of the data (castorini/DeeBERT: examples/run_highway_glue.py,
# transformers/data/processors/glue.py).
MNLI = {
    "bert": ("contradiction", "entailment", "neutral"),
    "roberta": ("contradiction", "neutral", "entailment"),
}
# The values that config.json may have for these keys. With another value, the same weights compute
# something that this program does not compute.
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
    """The place of the final classifier among the weights of a published classifier.

    Attributes:
        encoder: prefix of the names of the encoder's weights.
        pooler: prefix of the first linear layer's weights.
        classifier: prefix of the second linear layer's weights.
        between: returns the name of the function that is computed between the two layers, given the
            values of config.json.
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
# The authors' models. Their RoBERTa has the encoder's pooler and one linear layer, too.
DEEBERT = {kind: Head(kind, f"{kind}.pooler.dense", "classifier") for kind in ("bert", "roberta")}


def our_name(name: str, head: Head, last: int) -> str | None:
    """Translate the published name of a weight into the name that it has here.

    The authors' ramp on the last layer is left out: it was never trained, and the final classifier
    answers there.

    Args:
        name: the published name.
        head: the place of the final classifier.
        last: 0-based number of the last layer.

    Returns:
        The name here; None if the weight takes no part in the computation.
    """
    for theirs, ours in ((head.pooler, "pooler"), (head.classifier, "classifier")):
        if name.startswith(f"{theirs}."):
            return f"ramps.{last}.{ours}{name.removeprefix(theirs)}"
    inner = name.removeprefix(f"{head.encoder}.")
    if ramp := re.fullmatch(r"encoder\.highway\.(\d+)\.(pooler|classifier)(\.dense)?(\..+)", inner):
        number, part, _, rest = ramp.groups()
        return None if number == str(last) else f"ramps.{number}.{part}{rest}"
    if inner.startswith("pooler.") or name.startswith(("cls.", "lm_head.")):
        return None  # used by the pretraining only
    inner = inner.replace("LayerNorm.gamma", "LayerNorm.weight")  # names from before 2019
    return f"backbone.encoder.{inner.replace('LayerNorm.beta', 'LayerNorm.bias')}"


def task_values(name: str) -> dict[str, Any]:
    """Read the values of `conf/task/NAME.yaml`.

    Raises:
        UserError: there is no such file.
    """
    # Imported here, because a saved folder is used without OmegaConf.
    from omegaconf import OmegaConf

    from deebert.options import conf_folder

    folder = conf_folder() / "task"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in names:
        raise unknown("task", name, names, "task")
    values: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    return dict(values)


def read(folder: Path, flag: str, source: str, defaults: RunDefaults) -> Checkpoint:
    """Read a published classifier.

    A model of the DeeBERT authors becomes a checkpoint of stage 2. A plain classifier becomes one
    of stage 1. Its ramps, which stage 2 will train, get the final classifier's pooler and random
    linear layers, which depend on the seed.

    Args:
        folder: where the files lie.
        flag: the flag that the user named it with, for error messages.
        source: how the user named the folder.
        defaults: the part of a run's configuration that the folder does not state.

    Raises:
        UserError: something is missing, damaged or hostile, or no early-exit model has this shape.
    """
    try:
        return _read(folder, source, defaults)
    except UserError as error:
        raise UserError(f"{flag}={source}: {error}") from error


def _read(folder: Path, source: str, defaults: RunDefaults) -> Checkpoint:
    values, weights = transformers_folder.values(folder), transformers_folder.weights(folder)
    guessed = [kind for kind in DEEBERT if any(name.startswith(f"{kind}.") for name in weights)]
    # Older files do not state the type.
    kind = values.get("model_type") or (guessed[0] if guessed else None)
    if not isinstance(kind, str):
        raise UserError("its config.json says no model_type")
    architecture(kind)  # raises if the type is not supported
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
            "would not answer the same; train one on its encoder: "
            f"{job_command('train')} stage=1 backbone.path={source}"
        )
    num_layers = _num_layers(values, weights)
    named = {our_name(name, head, num_layers - 1): value for name, value in weights.items()}
    ours = {name: value for name, value in named.items() if name is not None}
    task_block = _task_block(values, defaults.task)
    task = Task.from_config(task_block)
    num_labels = _num_labels(ours.get(f"ramps.{num_layers - 1}.classifier.weight"), task, source)
    shape = settings({**values, "model_type": kind})
    seed = defaults.seed
    ours = _complete(ours, shape, num_labels, num_layers, None if of_authors else seed)
    if order := _order(values, MNLI[kind] if of_authors else None, task):
        for name in [name for name in ours if re.match(r"ramps\.\d+\.classifier\.", name)]:
            ours[name] = ours[name][order]
    data = DATA | {"max_length": min(128, longest_input(shape))} | dict(defaults.data)
    config = {
        "task": task_block,
        "backbone": {
            "name": Path(source).name or folder.resolve().name,
            "path": checkpoints.lasting(source),
            "layers": None,
            "epochs": 10 if kind == "roberta" else 3,  # as in conf/backbone/
        },
        "ramp": asdict(ramps.PAPER),
        # The model may have seen all training rows, so none are left as calibration rows.
        "data": data | {"calibration_size": 0, "calibration_rows": None},
        "stage": 2 if of_authors else 1,
        "stages": {"1": {}, "2": {"cache": False}} | dict(defaults.stages),
        "objective": {"name": "ramps" if of_authors else "final"},
        "seed": seed,
        "thresholds": None,
        "teacher": None,
    }
    files = transformers_folder.tokenizer_files(folder, shape)
    run_config = RunConfig.from_checked(config)
    return Checkpoint(folder, run_config, shape, files, ours, epochs_done=0)


def _num_layers(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> int:
    """Return the number of layers.

    Raises:
        UserError: config.json and the weights disagree on it.
    """
    numbers = {int(n) for key in weights for n in re.findall(r"\.encoder\.layer\.(\d{1,4})\.", key)}
    stated = values.get("num_hidden_layers")
    if not numbers or stated != len(numbers):
        raise UserError(
            f"its config.json says num_hidden_layers={stated}, and its weights are of "
            f"{len(numbers)}"
        )
    return len(numbers)


def _num_labels(classifier: Tensor | None, task: Task, source: str) -> int:
    """Return the number of labels.

    Args:
        classifier: weight of the last linear layer; None if there is none.
        task: the task.
        source: how the user named the folder.

    Raises:
        UserError: there is no classifier, or the task has another number of labels.
    """
    if classifier is None:
        raise UserError(
            f"it holds no trained classifier; train one on its encoder: {job_command('train')} "
            f"stage=1 backbone.path={source}"
        )
    num_rows = classifier.shape[0] if classifier.ndim else 0
    if num_rows != task.num_labels:
        named = ", ".join(task.labels) if task.labels else "a regression"
        raise UserError(
            f"it has {num_rows} labels, and task {task.name} has {task.num_labels} ({named}); give "
            "the task it was trained for (task=...)"
        )
    return task.num_labels


def _complete(
    ours: dict[str, Tensor], shape: dict[str, Any], num_labels: int, num_layers: int, seed: Any
) -> dict[str, Tensor]:
    """Check the shapes of the weights, and add the weights that a published classifier lacks.

    Args:
        ours: the weights, under the names that they have here.
        shape: the backbone's shape.
        num_labels: number of outputs of each ramp.
        num_layers: number of layers, and of ramps.
        seed: seed of the ramps that stage 2 will train; None if all ramps must be there.

    Returns:
        All weights of the model.

    Raises:
        UserError: a weight is missing, unknown or of another shape, or no model has this shape.
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
            # Ramps start from the pretrained pooler in stage 1. This pooler is the nearest to it.
            value = ours.get(last + part, value).clone()
        if untrained or part in ("shift", "scale"):
            fresh[f"ramps.{name}"] = value
    return fresh | ours


def _task_block(values: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the task's values, from the user or from `finetuning_task` in config.json.

    Args:
        values: of config.json.
        given: the values of the user's task, or None.

    Raises:
        UserError: neither names a task, or they contradict each other.
    """
    stated = values.get("finetuning_task")
    name = str(stated).lower().replace("-", "").removesuffix("mm")  # sst-2, mnli-mm
    if given is None:
        if name not in GLUE:
            raise UserError(
                "it does not say what it was trained for: give task=mrpc, or another; a training "
                "takes rows of your own, too: data.file=FILE"
            )
        return task_values(name)
    if given.get("checkpoint_task"):  # a model of MNLI scores AX
        given = task_values(given["checkpoint_task"])
    if name in GLUE and given.get("name") in GLUE and given["name"] != name:
        raise UserError(
            f"task={given['name']} contradicts its config.json, which says "
            f"finetuning_task={stated}; leave task= out, or give another checkpoint"
        )
    return dict(given)


def _order(
    values: Mapping[str, Any], authors: Sequence[str] | None, task: Task
) -> list[int] | None:
    """Return the number that each label of the task has in the checkpoint.

    The names in config.json decide. Names without a meaning (LABEL_0, LABEL_1, ...) are taken in
    the order of the task's labels.

    Args:
        values: of config.json.
        authors: the order in the authors' code, if it differs from the data's; None otherwise.
        task: the task.

    Returns:
        The numbers, in the order of the task's labels; None if the checkpoint has the same order.

    Raises:
        UserError: the checkpoint has other labels than the task.
    """
    if task.labels is None:
        return None
    alike = len(set(map(labels.plain, task.labels))) < len(task.labels)
    plain = str.strip if alike else labels.plain
    wanted = [plain(label) for label in task.labels]
    names = transformers_folder.label_names(values, len(wanted))
    theirs = [plain(name) for name in names]
    if set(theirs) == set(wanted):
        return [theirs.index(label) for label in wanted]
    if transformers_folder.have_meaning(names):
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
