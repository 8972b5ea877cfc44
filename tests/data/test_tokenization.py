"""Texts become the tokens that the library makes of them, at any length."""

from pathlib import Path

import pytest
from helpers.random_models import byte_level

from deebert import EarlyExitClassifier
from deebert.data import tokenization

ODD = [("", "x"), ("naïve café 北京 \U0001f600", "don't"), ("[SEP] <s>", " \t\n")]


@pytest.fixture(scope="module")
def word_pieces(stage2: Path):
    return EarlyExitClassifier.from_pretrained(stage2).tokenizer


@pytest.mark.parametrize("max_length", [8, 9, 64])
@pytest.mark.parametrize("kind", ["word pieces", "byte level, cut at the left"])
def test_pairs_cut_by_hand_are_the_library_s(
    kind: str, max_length: int, word_pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = word_pieces if kind == "word pieces" else byte_level()
    lengths = [("a " * i, "b " * j) for i in range(10) for j in range(10)]
    columns = list(zip(*ODD, *lengths, ("a " * 90, "the " * 70), strict=True))
    expected = tokenization.encode(tokenizer, columns, max_length)
    monkeypatch.setattr(tokenization, "LONG", -1)
    assert tokenization.encode(tokenizer, columns, max_length) == expected
    assert max(map(len, expected["input_ids"])) == max_length


def test_a_pair_of_long_texts(word_pieces) -> None:
    """The library itself would take minutes and tens of gigabytes; rows beside it stay."""
    long, short = ("word " * 40_000, "x " * 30_000), ("word " * 40, "x " * 30)
    tokens = tokenization.encode(word_pieces, list(zip(long, short, ("a", "b"), strict=True)), 64)
    for values in tokens.values():
        assert values[0] == values[1]
    assert tokens["input_ids"][2] == word_pieces("a", "b")["input_ids"]


@pytest.mark.parametrize("num_texts", [1, 2])
@pytest.mark.parametrize("kind", ["word pieces", "byte level, cut at the left"])
def test_tokens_without_a_limit_are_cut_as_the_library_cuts(
    kind: str, num_texts: int, word_pieces
) -> None:
    tokenizer = word_pieces if kind == "word pieces" else byte_level()
    pairs = [("a " * i, "b " * j) for i in range(10) for j in range(10)] + [
        ("a " * 90, "the b " * 70)
    ]
    columns = list(zip(*pairs, strict=True))[:num_texts]
    whole = tokenizer(*map(list, columns))
    names = [name for name in tokenization.TOKENS if name in whole]
    rows = [
        dict(zip(names, row, strict=True)) for row in zip(*(whole[n] for n in names), strict=True)
    ]
    for max_length in (8, 9, 64):
        expected = tokenization.encode(tokenizer, columns, max_length)
        cut = tokenization.cut(tokenizer, rows, max_length, num_texts)
        for name in names:
            assert [row[name] for row in cut] == expected[name]
