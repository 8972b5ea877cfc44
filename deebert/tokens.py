"""Texts -> token ids, the same way in training, evaluation and use. Knows nothing of models."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

NAMES = ("input_ids", "token_type_ids")  # what an encoder may be given beside the mask


def encode(
    tokenizer: PreTrainedTokenizerBase, columns: Sequence[Sequence[str]], max_length: int
) -> dict[str, Any]:
    """Lists of whole numbers by name, unpadded.

    Args:
        columns: the texts of one or two columns; of a pair the longer text is cut first.
        max_length: tokens, at most.
    """
    found = tokenizer(*map(list, columns), truncation="longest_first", max_length=max_length)
    return dict(found)
