"""Turn texts into token ids, and a tokenizer into plain text and back.

Training, evaluation and prediction turn texts into the same ids. A tokenizer may come from somebody
else's folder, so each failure of it becomes one line. The module does not know models.
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

TOKENS = ("input_ids", "token_type_ids")  # the inputs of an encoder, apart from the mask
LONG = 8  # a pair with more than LONG * max_length characters is cut by `_long_pairs`
SIZES = {"input_ids": "vocab_size", "token_type_ids": "type_vocab_size"}
TRIED = ("x", "a fine film", "caf\u00e9 \u5317\u4eac \U0001f600")
AT_ONCE = 250_000  # characters; a tokenizer needs over 100 bytes for a token, even if it is cut off


def portions(rows: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Group rows of texts into portions that a tokenizer can hold in memory at once."""
    portion: list[tuple[str, ...]] = []
    size = 0
    for row in rows:
        portion.append(row)
        size += sum(map(len, row))
        if size >= AT_ONCE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def encode(
    tokenizer: PreTrainedTokenizerBase, columns: Sequence[Sequence[str]], max_length: int
) -> dict[str, Any]:
    """Turn texts into token ids, without padding.

    Args:
        tokenizer: the tokenizer of the model.
        columns: the texts of one or two columns. The longer text of a pair is cut first.
        max_length: the largest number of tokens of an input.

    Returns:
        `input_ids` and what else the tokenizer makes: for each input, a list of whole numbers.

    Raises:
        UserError: the tokenizer fails on these texts.
    """
    texts = [list(column) for column in columns]
    long: dict[int, tuple[str, str]] = {}
    if len(texts) == 2:
        for i, (first, second) in enumerate(zip(*texts, strict=True)):
            if len(first) + len(second) > LONG * max_length:
                long[i] = first, second
                texts[0][i] = texts[1][i] = ""
    with _in_one_line("the tokenizer fails on these texts"):
        encoded = dict(tokenizer(*texts, truncation="longest_first", max_length=max_length))
        if long:
            long_pairs = _long_pairs(tokenizer, list(long.values()), max_length)
            for i, pair in zip(long, long_pairs, strict=True):
                for name, values in encoded.items():
                    # The one name that a pair lacks is the attention mask.
                    values[i] = pair.get(name, [1] * len(pair["input_ids"]))
    return encoded


def _long_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], max_length: int
) -> Iterator[dict[str, list[int]]]:
    """Encode pairs of long texts as the library would.

    When the library cuts a pair, it keeps every combination of the parts that it cuts off: seven
    gigabytes for two texts of 16,000 words.
    """
    columns = [
        tokenizer(list(column), add_special_tokens=False, verbose=False)["input_ids"]
        for column in zip(*pairs, strict=True)
    ]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    small = tokenizer("a", "a", return_token_type_ids=True)
    parts = small.sequence_ids(0)
    # The special tokens around and between the texts, and one entry for each text.
    layout = [
        (token, token_type, part)
        for i, (token, token_type, part) in enumerate(
            zip(small["input_ids"], small["token_type_ids"], parts, strict=True)
        )
        if part is None or i == 0 or part != parts[i - 1]
    ]
    for pair in zip(*columns, strict=True):
        kept = longest_first(len(pair[0]), len(pair[1]), room)
        texts = [
            ids[len(ids) - count :] if tokenizer.truncation_side == "left" else ids[:count]
            for ids, count in zip(pair, kept, strict=True)
        ]
        encoded: dict[str, list[int]] = {name: [] for name in TOKENS}
        for token, token_type, part in layout:
            ids = [token] if part is None else texts[part]
            encoded["input_ids"] += ids
            encoded["token_type_ids"] += [token_type] * len(ids)
        yield encoded


def cut(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[dict[str, list[int]]],
    max_length: int,
    num_texts: int,
) -> list[dict[str, list[int]]]:
    """Cut inputs that another caller has tokenized without a limit, as `encode` would have.

    Args:
        tokenizer: the tokenizer that they come from.
        inputs: tokens of each input, unpadded, by name.
        max_length: the largest number of tokens of an input.
        num_texts: 2 if each input is a pair of texts. The longer text is cut first.
    """
    if all(len(each["input_ids"]) <= max_length for each in inputs):
        return list(inputs)
    small = tokenizer(*["a"] * num_texts)
    ids, parts = small["input_ids"], small.sequence_ids(0)
    start, end = parts.index(0), parts[::-1].index(num_texts - 1)
    between = [token for token, part in zip(ids, parts, strict=True) if part is None]
    between = between[start : len(between) - end]
    return [
        each if len(each["input_ids"]) <= max_length else
        _cut(each, start, end, between, max_length, tokenizer.truncation_side == "left")
        for each in inputs
    ]  # fmt: skip


def _cut(
    tokens: dict[str, list[int]],
    start: int,
    end: int,
    between: list[int],
    max_length: int,
    from_left: bool,
) -> dict[str, list[int]]:
    """Cut one input.

    Args:
        tokens: the tokens, by name.
        start: the number of special tokens before the first text.
        end: the number of special tokens after the last text.
        between: the special tokens between two texts; empty for one text.
        max_length: the largest number of tokens.
        from_left: whether the start of a text is cut off, and not its end.
    """
    ids = tokens["input_ids"]
    last = len(ids) - end
    gap = next(
        (i for i in range(start, last) if between and ids[i : i + len(between)] == between), last
    )
    second = min(gap + len(between), last)
    room = max_length - start - end - (second - gap)
    spans: list[int] = []
    for (first, stop), count in zip(
        ((start, gap), (second, last)),
        longest_first(gap - start, last - second, room),
        strict=True,
    ):
        spans += range(stop - count, stop) if from_left else range(first, first + count)
        spans += range(gap, second) if stop == gap else ()
    kept = [*range(start), *spans, *range(last, len(ids))]
    return {name: [values[i] for i in kept] for name, values in tokens.items()}


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of two texts are kept, as the library `tokenizers` computes it.

    Args:
        first: the number of tokens of the first text.
        second: the number of tokens of the second text.
        room: the largest sum of the two results.
    """
    if first + second <= room:
        return first, second
    if first > second:
        return longest_first(second, first, room)[::-1]
    if 2 * first <= room:
        return first, room - first
    return room // 2, room - room // 2


def files_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the files of a tokenizer as plain text by name, for a checkpoint."""
    # Otherwise the truncation and padding of the last call would be saved, and change the text.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text("utf-8") for path in sorted(Path(folder).iterdir())}


def known_files(files: Mapping[str, Any]) -> dict[str, str]:
    """Return those of the files that belong to a tokenizer.

    Args:
        files: contents by file name.

    Raises:
        UserError: the content of a file is not a text.
    """
    known = {name: files[name] for name in FILES if name in files}
    for name, content in known.items():
        if not isinstance(content, str):
            raise UserError(f"its {name} is no text")
    return known


def from_files(files: Mapping[str, str | bytes]) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        files: contents by file name, from `files_of` or from somebody else's folder.

    Raises:
        UserError: no tokenizer can be loaded from these files.
    """
    with tempfile.TemporaryDirectory() as folder, _in_one_line("the tokenizer cannot be loaded"):
        for name, content in tokenizer_files.harmless(files).items():
            (Path(folder) / name).write_bytes(content)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check(tokenizer: PreTrainedTokenizerBase, architecture: Mapping[str, Any]) -> None:
    """Check that a model has an embedding for every id of a tokenizer.

    Args:
        tokenizer: the tokenizer to check.
        architecture: the configuration of the model, with the sizes of its vocabularies.

    Raises:
        UserError: the tokenizer has an id that the model lacks, or it cannot be used.
    """
    with _in_one_line("the tokenizer cannot be used"):
        # Texts are encoded because a special token need not be in the vocabulary.
        encoded = [encode(tokenizer, [[text]] * n, 16) for text in TRIED for n in (1, 2)]
        largest = {
            name: max(each for ids in encoded for each in ids.get(name, [[0]])[0]) for name in SIZES
        }
        largest["input_ids"] = max(largest["input_ids"], *tokenizer.get_vocab().values())
    for name, most in largest.items():
        size = architecture.get(SIZES[name])
        if size and most >= size:  # DeBERTa has 0 token types and ignores them
            raise UserError(f"its tokenizer has {name} up to {most}, and its model {size} of them")


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turn each failure of a tokenizer into a `UserError` of one line that begins with `what`.

    A panic in the tokenizer's Rust code is not an `Exception` in Python.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {first_line(error)}") from error
