"""Write the blocks of results.json as plain values, and read them again.

A block is a dataclass. A field without a default is a key that every file has. A field whose
default is None is a key that a file may lack. The module does not know which blocks there are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

Block = TypeVar("Block")


def plain(value: Any) -> Any:
    """Return a block of results.json as plain values, without the keys that the block lacks."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return plain_fields(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def plain_fields(block: Any) -> dict[str, Any]:
    """Return the fields of a block as plain values, in their order."""
    values = [(field, getattr(block, field.name)) for field in fields(block)]
    return {
        field.name: plain(value)
        for field, value in values
        if value is not None or field.default is MISSING
    }


def read_block(kind: Callable[..., Block], values: Mapping[str, Any], **read: Any) -> Block:
    """Return a block from its plain values, without the keys that its class does not know.

    Args:
        kind: the class of the block.
        values: the values of the block.
        **read: the values that are blocks themselves, and those that older files lack.
    """
    given = {**values, **read}
    names = {
        field.name: field.name in given or field.default is MISSING
        for field in fields(kind)  # type: ignore[arg-type]
    }
    return kind(**{name: given[name] for name, needed in names.items() if needed})


def read_blocks(
    kind: Callable[..., Block], listed: Iterable[Mapping[str, Any]] | None
) -> list[Block]:
    """Return the blocks of a list, or an empty list for None."""
    return [read_block(kind, values) for values in listed or ()]
