"""Texts -> token ids, the same way in training, evaluation and use; and a tokenizer as plain text.
Knows nothing of models.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deebert.errors import UserError, first_line
from deebert.untrusted import tokenizer_files
from deebert.untrusted.tokenizer_files import FILES

TOKENS = ("input_ids", "token_type_ids")  # what an encoder may be given beside the mask
LONG = 8  # characters a token of max_length: pairs of more are cut by hand
SIZES = {"input_ids": "vocab_size", "token_type_ids": "type_vocab_size"}
TRIED = ("x", "a fine film", "caf\u00e9 \u5317\u4eac \U0001f600")
AT_ONCE = 250_000  # characters: a tokenizer holds 100 bytes and more a token, also of what it cuts


def portions(rows: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Rows of texts, some at a time: not more than a tokenizer should hold."""
    chosen: list[tuple[str, ...]] = []
    size = 0
    for row in rows:
        chosen.append(row)
        size += sum(map(len, row))
        if size >= AT_ONCE:
            yield chosen
            chosen, size = [], 0
    if chosen:
        yield chosen


def encode(
    tokenizer: PreTrainedTokenizerBase, columns: Sequence[Sequence[str]], max_length: int
) -> dict[str, Any]:
    """Lists of whole numbers by name, unpadded.

    Args:
        columns: the texts of one or two columns; of a pair the longer text is cut first.
        max_length: tokens, at most.
    """
    given = [list(column) for column in columns]
    long: dict[int, tuple[str, str]] = {}
    if len(given) == 2:
        for i, (first, second) in enumerate(zip(*given, strict=True)):
            if len(first) + len(second) > LONG * max_length:
                long[i] = first, second
                given[0][i] = given[1][i] = ""
    with _in_one_line("the tokenizer fails on these texts"):
        found = dict(tokenizer(*given, truncation="longest_first", max_length=max_length))
        if long:
            by_hand = _long_pairs(tokenizer, list(long.values()), max_length)
            for i, pair in zip(long, by_hand, strict=True):
                for name, values in found.items():
                    values[i] = pair.get(name, [1] * len(pair["input_ids"]))  # the mask
    return found


def _long_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], max_length: int
) -> Iterator[dict[str, list[int]]]:
    """What the library would make of pairs.

    Its own cutting keeps every combination of what it cuts off the two texts: seven gigabytes for
    16,000 words each.
    """
    columns = [
        tokenizer(list(column), add_special_tokens=False, verbose=False)["input_ids"]
        for column in zip(*pairs, strict=True)
    ]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    small = tokenizer("a", "a", return_token_type_ids=True)
    parts = small.sequence_ids(0)
    # What stands around and between the texts; a text of several tokens stands there once.
    layout = [
        (token, kind, part)
        for i, (token, kind, part) in enumerate(
            zip(small["input_ids"], small["token_type_ids"], parts, strict=True)
        )
        if part is None or i == 0 or part != parts[i - 1]
    ]
    for pair in zip(*columns, strict=True):
        stay = longest_first(len(pair[0]), len(pair[1]), room)
        texts = [
            ids[len(ids) - most :] if tokenizer.truncation_side == "left" else ids[:most]
            for ids, most in zip(pair, stay, strict=True)
        ]
        found: dict[str, list[int]] = {name: [] for name in TOKENS}
        for token, kind, part in layout:
            ids = [token] if part is None else texts[part]
            found["input_ids"] += ids
            found["token_type_ids"] += [kind] * len(ids)
        yield found


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts stay, as the library `tokenizers` has it."""
    if first + second <= room:
        return first, second
    if first > second:
        return longest_first(second, first, room)[::-1]
    if 2 * first <= room:
        return first, room - first
    return room // 2, room - room // 2


def files_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A tokenizer as plain text by file name, to be kept in a checkpoint."""
    # The last call's truncation and padding would be saved too, and change the text.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text("utf-8") for path in sorted(Path(folder).iterdir())}


def known_files(files: Mapping[str, Any]) -> dict[str, str]:
    """Return the files that a tokenizer is made of; others are not taken.

    Raises:
        UserError: one holds no text.
    """
    found = {name: files[name] for name in FILES if name in files}
    for name, content in found.items():
        if not isinstance(content, str):
            raise UserError(f"its {name} is no text")
    return found


def from_files(files: Mapping[str, str | bytes]) -> PreTrainedTokenizerBase:
    """The tokenizer that `files_of` wrote down, or that lies in somebody's folder.

    Raises:
        UserError: these files make no tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder, _in_one_line("the tokenizer cannot be loaded"):
        for name, content in tokenizer_files.harmless(files).items():
            (Path(folder) / name).write_bytes(content)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check(tokenizer: PreTrainedTokenizerBase, architecture: Mapping[str, Any]) -> None:
    """Check that a model of this shape takes all that the tokenizer makes.

    Raises:
        UserError: it has ids that the model has not, or cannot be used.
    """
    with _in_one_line("the tokenizer cannot be used"):
        # What stands around texts need be no part of the vocabulary.
        made = [encode(tokenizer, [[text]] * n, 16) for text in TRIED for n in (1, 2)]
        largest = {
            name: max(each for ids in made for each in ids.get(name, [[0]])[0]) for name in SIZES
        }
        largest["input_ids"] = max(largest["input_ids"], *tokenizer.get_vocab().values())
    for name, most in largest.items():
        size = architecture.get(SIZES[name])
        if size and most >= size:  # 0 types of DeBERTa: it does not look at them
            raise UserError(f"its tokenizer has {name} up to {most}, and its model {size} of them")


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Somebody's tokenizer fails in many ways; a panic in Rust is no `Exception` in Python."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {first_line(error)}") from error
