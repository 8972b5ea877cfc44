"""Tokenizers that somebody else wrote: they read no file, and make no millions of tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile_runs import Content, saved, say

from deebert import EarlyExitClassifier
from deebert.errors import UserError


def test_a_tokenizer_s_settings_name_no_file(stage2: Path, tmp_path: Path) -> None:
    """`vocab` may be a path to the library `tokenizers`."""
    secret, folder = tmp_path / "secret.txt", saved(stage2, tmp_path / "saved")
    secret.write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\nswordfish\n")
    more = {"vocab": str(secret), "merges": str(secret), "tokenizer_class": "BertTokenizer"}
    say(folder, "tokenizer_config.json", lambda values: values.update(more))
    (folder / "special_tokens_map.json").write_text(json.dumps({"vocab": str(secret)}))
    say(folder, "deebert.json", lambda about: about["tokenizer"].append("special_tokens_map.json"))
    classifier = EarlyExitClassifier.from_pretrained(folder)
    assert "swordfish" not in classifier.tokenizer.get_vocab()
    classifier.save_pretrained(tmp_path / "copy")
    assert not [f for f in (tmp_path / "copy").rglob("*") if f.is_file() and b"swordfish" in f.read_bytes()]  # fmt: skip


def parts(**values: Any) -> Callable[[Content], object]:
    return lambda tokenizer: tokenizer.update(values)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (parts(normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "i"}, "content": "ii"}] * 26}), "parts, more than 16"),
        (parts(normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "i"}, "content": "ii"}] * 9}), "puts in characters too many times"),
        (parts(normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "\ufdfa"}, {"type": "NFKD"}]}), "takes characters apart more than once"),
        (parts(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFKC"}]}), "takes characters apart more than once"),
        (parts(normalizer={"type": "Prepend", "prepend": "x" * 10**6}), "puts in more than 4 characters at once"),
        (parts(post_processor={"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}] * 40, "special_tokens": {}}), "its template of a pair has not each text once"),
        (parts(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////////////////////w=="}), "its precompiled map of characters is damaged"),
        (parts(pre_tokenizer={"type": "FixedLength", "length": 0}), "a part of type 'FixedLength' is not supported"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_makes_much_of_little_is_refused(
    stage2: Path, tmp_path: Path, what: Callable[[Content], object], says: str
) -> None:
    folder = saved(stage2, tmp_path / "saved")
    say(folder, "tokenizer.json", what)
    with pytest.raises(UserError, match=says):
        EarlyExitClassifier.from_pretrained(folder)


def test_a_panic_in_rust_is_one_line(stage2: Path, tmp_path: Path) -> None:
    folder = saved(stage2, tmp_path / "saved")
    merges = {"type": "BPE", "continuing_subword_prefix": "####", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}  # fmt: skip
    say(folder, "tokenizer.json", lambda tokenizer: tokenizer.update(model=merges))
    say(folder, "tokenizer_config.json", lambda v: v.update(tokenizer_class="TokenizersBackend"))
    with pytest.raises(UserError, match="the tokenizer cannot be"):
        EarlyExitClassifier.from_pretrained(folder)
