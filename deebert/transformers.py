"""Saved models in the classes of Hugging Face's transformers, with early exit.

    import deebert.transformers
    from transformers import pipeline
    classify = pipeline("text-classification", model="FOLDER", model_kwargs={"target_saving": 0.4})

The import registers a configuration and a model with transformers' AutoConfig and
AutoModelForSequenceClassification, so no code of a repository is needed. The engine answers; this
module only translates.
Shapes: N inputs, S tokens, C labels.
"""

from dataclasses import dataclass
from os.path import exists
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from deebert.classifier import EarlyExitClassifier
from deebert.data import tokenization
from deebert.errors import UserError
from deebert.hub import locate, saved_folder, transformers_config

# Arguments of `from_pretrained` that say how files are fetched, and those that need nothing here.
FETCH = ("revision", "token", "cache_dir", "local_files_only", "force_download")
IDLE = (
    "adapter_kwargs", "code_revision", "trust_remote_code", "use_safetensors", "subfolder",
    "low_cpu_mem_usage", "_commit_hash", "_from_auto", "_from_pipeline",
)  # fmt: skip


class EarlyExitConfig(PreTrainedConfig):
    """The labels and sizes that config.json of a saved folder tells transformers."""

    model_type = transformers_config.MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Build the configuration from the known keys of config.json alone.

        Other keys may name code or files, and somebody else may have written them.
        """
        known = {key: config_dict[key] for key in transformers_config.KEYS if key in config_dict}
        return super().from_dict(known, **options)


@dataclass
class EarlyExitOutput(SequenceClassifierOutput):
    """The answers of `EarlyExitForSequenceClassification`.

    Attributes:
        logits: (N, C) logits that the exit rule answers with.
        exit_layer: (N,) layer at which each input left, from 1.
    """

    exit_layer: Tensor | None = None


class EarlyExitForSequenceClassification(PreTrainedModel):
    """A trained early-exit model as a model of transformers, for inference.

    Args:
        config: its labels and sizes.
        classifier: the model itself.
        **target: the operating point to run at (`set_target`).

    Attributes:
        exit_counts: number of inputs that have left at each layer since the model was loaded.
    """

    config_class = EarlyExitConfig
    main_input_name = "input_ids"

    def __init__(
        self, config: PreTrainedConfig, classifier: EarlyExitClassifier, **target: Any
    ) -> None:
        super().__init__(config)
        self.classifier = classifier
        self.model = classifier.model
        self.exit_counts = [0] * classifier.num_layers
        self.set_target(**target)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Any,
        *_: Any,
        config: PreTrainedConfig | None = None,
        dtype: Any = None,
        device_map: Any = None,
        precision: str | None = None,
        runtime: str = "auto",
        device: Any = None,
        task: Any = None,
        **options: Any,
    ) -> Self:
        """Load a model.

        Args:
            pretrained_model_name_or_path: what `EarlyExitClassifier.from_pretrained` takes.
            config: not used; the folder's task and weights decide.
            dtype: as in transformers: torch.float32 or torch.bfloat16, "auto" for float32.
            device_map: as in transformers, for one device.
            precision: precision of the weights (`Engine`), in place of `dtype`.
            runtime: library that runs the layers (`Engine`).
            device: device that runs them (`Engine`).
            task: as `EarlyExitClassifier.from_pretrained` takes it.
            **options: a target (`set_target`), and arguments of transformers that say how files are
                fetched.

        Raises:
            UserError: there is no model that can be loaded, or the target cannot be met.
        """
        place = pretrained_model_name_or_path
        fetch = {name: options.pop(name) for name in FETCH if name in options}
        fetch = {name: value for name, value in fetch.items() if value is not None}
        for name in IDLE:
            options.pop(name, None)
        torch_dtype = options.pop("torch_dtype", None)
        precision = precision or _precision(torch_dtype if dtype is None else dtype)
        device = _one_device(device_map) if device is None else device
        if fetch and not exists(place):
            place = _downloaded(str(place), fetch)
        classifier = EarlyExitClassifier.from_pretrained(
            place, task=task, precision=precision, runtime=runtime, device=device
        )
        described = transformers_config.describe(classifier.task, classifier.model)
        config = EarlyExitConfig.from_dict(described, name_or_path=str(place))
        model = cls(config, classifier, **options)
        return model.eval()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the model was trained with, for `pipeline(..., tokenizer=)`."""
        return self.classifier.tokenizer

    @property
    def saving(self) -> float:
        """Share of the layers that was saved for all inputs since the model was loaded."""
        layers = sum(layer * count for layer, count in enumerate(self.exit_counts, 1))
        return 1 - layers / (max(sum(self.exit_counts), 1) * len(self.exit_counts))

    def set_target(self, **target: Any) -> None:
        """Choose the operating point.

        Args:
            **target: arguments of `EarlyExitClassifier.calibrate`: `threshold`, `target_saving`,
                `target_speedup`, `max_drop` and so on. None: the target that was saved with the
                model, or full depth.

        Raises:
            UserError: the target cannot be met.
        """
        self.point = self.classifier.calibrate(**target)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Answer tokenized inputs, each at the first ramp that is sure enough of it.

        An input that is longer than those of the training is cut as it was there.

        Args:
            input_ids: (N, S).
            attention_mask: (N, S), 1 at real tokens; None if there is no padding.
            token_type_ids: (N, S), or None.
            labels: refused; the model is trained with `deebert train`.
            return_dict: False for a tuple of the logits.

        Raises:
            UserError: there are labels.
        """
        if labels is not None:
            raise UserError(
                "labels= would train the model, which runs layers for inference only; train it "
                "with: deebert train"
            )
        real_NS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {"input_ids": input_ids, "token_type_ids": token_type_ids}
        inputs = [
            {
                name: values[row][real.bool()].tolist()
                for name, values in given.items()
                if values is not None
            }
            for row, real in enumerate(real_NS)
        ]
        tokenizer, num_texts = self.classifier.tokenizer, len(self.classifier.task.columns)
        inputs = tokenization.cut(tokenizer, inputs, self.classifier.max_length, num_texts)
        answers = self.classifier.engine.at(self.point.thresholds, self.point.rule).run(inputs)
        for layer in answers.layer_N.tolist():
            self.exit_counts[layer - 1] += 1
        logits_NC = answers.logits_NC.to(self.device)
        if return_dict is False:
            return (logits_NC,)
        return EarlyExitOutput(logits=logits_NC, exit_layer=answers.layer_N.to(self.device))

    def to(self, *args: Any, **options: Any) -> Self:  # type: ignore[override]
        """Move the model to a device.

        Raises:
            UserError: a dtype is given; the precision is chosen when the model is loaded.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
        if dtype not in (None, torch.float32):
            raise UserError(f"dtype={dtype}: load the model again with precision=bfloat16 or int8")
        if device is not None:
            self.classifier.to(device)
        return self

    def cpu(self) -> Self:
        """Move the model to the processor."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Self:  # type: ignore[override]
        """Move the model to a GPU."""
        return self.to("cuda" if device is None else torch.device("cuda", device))

    def save_pretrained(self, save_directory: Any, **target: Any) -> None:  # type: ignore[override]
        """Write a saved folder (`EarlyExitClassifier.save_pretrained`).

        Args:
            save_directory: where the files are written.
            **target: the target that the saved model uses by default.
        """
        self.classifier.save_pretrained(save_directory, **target)


def _precision(dtype: Any) -> str:
    """Return the name of a precision for a dtype of torch.

    Raises:
        UserError: the engine does not run in this precision.
    """
    name = str(dtype or "auto").removeprefix("torch.")
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"dtype={name} is not supported: float32, bfloat16, or precision=int8")
    return "float32" if name == "auto" else name


def _one_device(device_map: Any) -> Any:
    """Return the device of a device_map that names one.

    Raises:
        UserError: it names several.
    """
    if isinstance(device_map, dict):
        if len(set(device_map.values())) != 1:
            raise UserError("device_map: the model runs on one device; give device=")
        [device_map] = set(device_map.values())
    if device_map in (None, "auto"):
        return "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    return device_map


def _downloaded(repo_id: str, fetch: dict[str, Any]) -> str:
    """Fetch the files of a saved folder from the hub, at the revision that the caller names."""
    from huggingface_hub import snapshot_download

    wanted = [*locate.HUB_FILES, saved_folder.WEIGHTS]
    return str(snapshot_download(repo_id, allow_patterns=wanted, **fetch))


AutoConfig.register(transformers_config.MODEL_TYPE, EarlyExitConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    EarlyExitConfig, EarlyExitForSequenceClassification, exist_ok=True
)
