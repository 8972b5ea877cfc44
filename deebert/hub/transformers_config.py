"""Describe a model in the words of Hugging Face's config.json.

The hub, AutoConfig and other tools read these keys. This program reads none of them back.
"""

from typing import Any

from deebert.data.tasks import Task
from deebert.models.early_exit import EarlyExitModel

MODEL_TYPE = "deebert"
ARCHITECTURE = "EarlyExitForSequenceClassification"  # in deebert.transformers
KEYS = (
    "architectures", "id2label", "label2id", "problem_type", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "vocab_size", "max_position_embeddings", "pad_token_id",
)  # fmt: skip


def describe(task: Task, model: EarlyExitModel) -> dict[str, Any]:
    """Return the keys and values that transformers looks for in config.json.

    Args:
        task: the task, whose labels are named.
        model: the model, whose sizes are named.
    """
    labels = task.labels or ("LABEL_0",)  # transformers' name of the value of a regression
    backbone = model.backbone
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "regression" if task.is_regression else "single_label_classification",
        "hidden_size": backbone.hidden_size,
        "num_hidden_layers": len(backbone.layers),
        "num_attention_heads": backbone.num_heads,
        "vocab_size": model.config.get("vocab_size"),
        "max_position_embeddings": model.config.get("max_position_embeddings"),
        "pad_token_id": backbone.pad_token_id,
    }
