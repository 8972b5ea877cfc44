"""Choose the safe content of a tokenizer's files that somebody else may have written.

The library would read any file that a setting names, and would build parts that turn a short text
into a text of any length. This module does not know what a tokenizer does with texts, and imports
nothing heavy.
"""

import json
import struct
from base64 import b64decode
from collections.abc import Iterator, Mapping
from typing import Any

from deebert.errors import UserError
from deebert.untrusted import plain_files

# The files that a tokenizer is read from: plain names, in one folder.
FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model",
    "spm.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
CLASSES = (
    "Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert", "MPNet", "Deberta",
    "DebertaV2", "GPT2", "Albert", "Herbert",
)  # fmt: skip
GENERAL = ("PreTrainedTokenizerFast", "TokenizersBackend")  # these take tokenizer.json literally
# The settings that say how texts are read. Others may be paths of files.
SETTINGS = (
    "tokenizer_class", "do_lower_case", "strip_accents", "tokenize_chinese_chars",
    "do_basic_tokenize", "clean_up_tokenization_spaces", "model_max_length", "max_len",
    "padding_side", "truncation_side", "added_tokens_decoder", "additional_special_tokens",
    "extra_special_tokens", "add_prefix_space", "trim_offsets", "split_special_tokens",
    "model_input_names", "add_bos_token", "add_eos_token", "split_by_punct", "errors", "backend",
    "is_local", "keep_accents", "legacy", "vocab_type", "lowercase",
)  # fmt: skip
PARTS = (
    # models
    "WordPiece", "BPE", "Unigram", "WordLevel",
    # normalizers
    "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip", "StripAccents",
    "Replace", "Prepend", "Precompiled", "Sequence",
    # parts that cut texts into words
    "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "ByteLevel", "Metaspace", "Digits",
    "Punctuation", "Split", "CharDelimiterSplit", "UnicodeScripts",
    # parts that put special tokens around texts, and parts that join tokens again
    "BertProcessing", "RobertaProcessing", "TemplateProcessing", "CTC", "ByteFallback", "Fuse",
    "BPEDecoder",
)  # fmt: skip
GROWING = ("NFKC", "NFKD", "Precompiled", "Nmt")  # parts that may make several characters of one
SPACE = "\u2581"  # the character that SentencePiece puts in the place of a space
MOST_PARTS = 16
LONGEST_INSERT = 4  # characters that a part may insert at once
MOST_INSERTS = 4  # parts that may insert more than one character
MOST_SPECIAL = 16  # special tokens around texts


def harmless(files: Mapping[str, str | bytes]) -> dict[str, bytes]:
    """Return the files, reduced to the content that is safe to load.

    Args:
        files: texts or bytes, by file name.

    Raises:
        UserError: a file is damaged, or holds something that is no part of a tokenizer.
    """
    safe = {}
    for name, content in files.items():
        given = content if isinstance(content, bytes) else content.encode()
        if name == "tokenizer_config.json":
            given = json.dumps(_settings(_parsed(given, name))).encode()
        elif name == "special_tokens_map.json":
            given = json.dumps(_special(_parsed(given, name))).encode()
        elif name == "tokenizer.json":
            _check_parts(_parsed(given, name))
        safe[name] = given
    return safe


def _parsed(content: bytes, name: str) -> dict[str, Any]:
    try:
        return plain_files.json_mapping(content.decode(), name, plain_files.TOKENIZER_BYTES)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no text in UTF-8") from error


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accepted settings of a tokenizer_config.json.

    Raises:
        UserError: the class of the tokenizer is not supported.
    """
    kept = {name: value for name, value in values.items() if name in SETTINGS}
    kind = kept.get("tokenizer_class")
    base = str(kind).removesuffix("Fast").removesuffix("Tokenizer")
    if kind is not None and base not in CLASSES and kind not in GENERAL:
        listed = ", ".join(f"{name}Tokenizer" for name in CLASSES)
        raise UserError(f"tokenizer_class={kind!r} is not supported; supported: {listed}")
    return kept | _special(values)


def _special(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that name special tokens."""
    return {
        name: value
        for name, value in values.items()
        if name.endswith("_token") or name == "additional_special_tokens"
    }


def _check_parts(values: Mapping[str, Any]) -> None:
    """Check the parts of a tokenizer.json.

    Raises:
        UserError: a part is unknown, or could make a short text very long.
    """
    blocks = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    parts = [part for block in blocks for part in _parts(values.get(block))]
    model = values.get("model")
    kinds = [part.get("type") for part in parts]
    kinds += [model["type"]] if isinstance(model, dict) and "type" in model else []
    if strange := [kind for kind in kinds if kind not in PARTS]:
        raise UserError(f"tokenizer.json: a part of type {strange[0]!r} is not supported")
    if len(parts) > MOST_PARTS:
        raise UserError(f"tokenizer.json has {len(parts)} parts, more than {MOST_PARTS}")
    inserts = [str(part.get("content", part.get("prepend", ""))) for part in parts]
    if max(map(len, inserts), default=0) > LONGEST_INSERT:
        raise UserError(f"tokenizer.json puts in more than {LONGEST_INSERT} characters at once")
    there = [insert for insert in inserts if insert]
    if sum(len(insert) > 1 for insert in there) > MOST_INSERTS or len(there) > 2 * MOST_INSERTS:
        raise UserError("tokenizer.json puts in characters too many times")
    # One Arabic sign can become 18 letters. Real tokenizers take characters apart once at most.
    growing = sum(kind in GROWING for kind in kinds)
    if growing > 1 or not all(insert.replace(SPACE, "").isascii() for insert in there):
        raise UserError("tokenizer.json takes characters apart more than once")
    for part in parts:
        if part.get("type") == "TemplateProcessing":
            _check_template(part)
        elif part.get("type") == "Precompiled":
            _check_trie(part.get("precompiled_charsmap"))


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a part and all parts inside it."""
    if isinstance(value, dict):
        yield value
        for name in ("normalizers", "pretokenizers", "processors", "decoders"):
            inner = value.get(name)
            for each in inner if isinstance(inner, list) else ():
                yield from _parts(each)


def _check_template(part: Mapping[str, Any]) -> None:
    """Check that a template uses each text once, and puts few special tokens around them.

    Raises:
        UserError: it does not.
    """
    for kind, texts in (("single", ["A"]), ("pair", ["A", "B"])):
        items = part.get(kind)
        listed = (
            [each for each in items if isinstance(each, dict)] if isinstance(items, list) else ()
        )
        sequences = [each["Sequence"] for each in listed if "Sequence" in each]
        there = [each.get("id") if isinstance(each, dict) else None for each in sequences]
        if sorted(map(str, there)) != texts or len(listed) > MOST_SPECIAL:
            raise UserError(f"tokenizer.json: its template of a {kind} has not each text once")
    tokens = part.get("special_tokens") or {}
    for token in tokens.values() if isinstance(tokens, dict) else ():
        ids = token.get("ids") if isinstance(token, dict) else None
        if not isinstance(ids, list) or len(ids) > MOST_SPECIAL:
            raise UserError("tokenizer.json: a special token of its template stands for many")


def _check_trie(given: Any) -> None:
    """Check a precompiled map. The library reserves as many bytes as its first four bytes state.

    Raises:
        UserError: the map is smaller than it states, or is damaged.
    """
    try:
        content = b64decode(given or "")
        [size] = struct.unpack_from("<I", content)
    except (ValueError, TypeError, struct.error):
        size, content = 1, b"x"
    if size % 4 or size + 4 > len(content):
        raise UserError("tokenizer.json: its precompiled map of characters is damaged")
