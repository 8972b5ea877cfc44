"""Texts -> token ids, the same way in training, evaluation and use. Knows nothing of models."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

TOKENS = ("input_ids", "token_type_ids")  # what an encoder may be given beside the mask
LONG = 64  # characters a token of max_length: pairs of more are cut by hand


def encode(
    tokenizer: PreTrainedTokenizerBase, columns: Sequence[Sequence[str]], max_length: int
) -> dict[str, Any]:
    """Lists of whole numbers by name, unpadded.

    Args:
        columns: the texts of one or two columns; of a pair the longer text is cut first.
        max_length: tokens, at most.
    """
    rows = list(zip(*columns, strict=True))
    long = [
        i for i, row in enumerate(rows) if len(row) > 1 and sum(map(len, row)) > LONG * max_length
    ]
    given = [list(column) for column in columns]
    for row in long:
        for column in given:
            column[row] = ""
    found = dict(tokenizer(*given, truncation="longest_first", max_length=max_length))
    for row in long:
        first, second = rows[row]
        by_name = _long_pair(tokenizer, first, second, max_length)
        for name, values in found.items():
            values[row] = by_name.get(name, [1] * len(by_name["input_ids"]))  # the mask
    return found


def _long_pair(
    tokenizer: PreTrainedTokenizerBase, first: str, second: str, max_length: int
) -> dict[str, list[int]]:
    """What the library would make of a pair.

    Its own cutting keeps every combination of what it cuts off the two texts: seven gigabytes for
    16,000 words each.
    """
    texts = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in (first, second)
    ]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    stay = longest_first(len(texts[0]), len(texts[1]), room)
    texts = [
        ids[len(ids) - most :] if tokenizer.truncation_side == "left" else ids[:most]
        for ids, most in zip(texts, stay, strict=True)
    ]
    small = tokenizer("a", "a", return_token_type_ids=True)
    parts = small.sequence_ids(0)
    found: dict[str, list[int]] = {name: [] for name in TOKENS}
    for i, (token, kind, part) in enumerate(
        zip(small["input_ids"], small["token_type_ids"], parts, strict=True)
    ):
        if part is not None and i > 0 and part == parts[i - 1]:
            continue  # "a" may be several tokens; its text stands there once
        ids = [token] if part is None else texts[part]
        found["input_ids"] += ids
        found["token_type_ids"] += [kind] * len(ids)
    return found


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts stay, as the library `tokenizers` has it."""
    if first + second <= room:
        return first, second
    if first > second:
        return longest_first(second, first, room)[::-1]
    if 2 * first <= room:
        return first, room - first
    return room // 2, room - room // 2
