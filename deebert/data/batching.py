"""Inputs of any length -> batches of similar length under a token budget, padded to their longest.

Knows nothing of models.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def by_length(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Numbers of inputs of similar length, shortest first.

    Args:
        lengths: in tokens.
        token_budget: of a batch, padding included; a longer input is a batch of its own.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(inputs: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, where the inputs have them, `token_type_ids`: (B, S).

    Args:
        inputs: lists of whole numbers under the same names.
    """
    lengths = np.array([len(given["input_ids"]) for given in inputs])
    size = (len(inputs), int(lengths.max()))
    arrays = {"input_ids": np.full(size, pad_token_id)}
    if any("token_type_ids" in given for given in inputs):
        arrays["token_type_ids"] = np.zeros(size, dtype=np.int64)
    for name, array in arrays.items():
        for row, given in zip(array, inputs, strict=True):
            values = given.get(name, ())
            row[: len(values)] = values
    arrays["attention_mask"] = (np.arange(size[1]) < lengths[:, None]).astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
