"""Group inputs of similar length into batches under a token budget, and pad each batch.

An input is a mapping of lists of token ids. The module does not know tokenizers or models.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def by_length(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Group the row numbers of inputs of similar length, shortest first.

    Args:
        lengths: the number of tokens of each input.
        token_budget: the largest number of tokens in a batch, with padding. An input that is longer
            makes a batch of its own.

    Yields:
        The row numbers of one batch.
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
    """Pad inputs to the length of the longest one.

    Args:
        inputs: for each input, lists of whole numbers: `input_ids` and perhaps `token_type_ids`.
        pad_token_id: the id that fills up `input_ids`.

    Returns:
        `input_ids`, `attention_mask` and, if an input has them, `token_type_ids`: (B, S) each.
    """
    lengths = np.array([len(tokens["input_ids"]) for tokens in inputs])
    size = (len(inputs), int(lengths.max()))
    arrays = {"input_ids": np.full(size, pad_token_id)}
    if any("token_type_ids" in tokens for tokens in inputs):
        arrays["token_type_ids"] = np.zeros(size, dtype=np.int64)
    for name, array in arrays.items():
        for row, tokens in zip(array, inputs, strict=True):
            values = tokens.get(name, ())
            row[: len(values)] = values
    arrays["attention_mask"] = (np.arange(size[1]) < lengths[:, None]).astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
