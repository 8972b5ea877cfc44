"""Read files of torch.save and of safetensors that somebody else may have written.

Nothing in such a file is executed. No size that a file claims is allocated before the file is known
to be that large. This module does not know what the tensors are for.
"""

import hashlib
import io
import os
import pickle
import pickletools
import re
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deebert.errors import UserError
from deebert.untrusted.plain_files import DEPTH

PICKLE_BYTES = 2**26  # in a checkpoint without its tensors; they include the tokenizer
# Bytes for each number, by torch's type of storage.
STORAGES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1,
    "BoolStorage": 1,
}  # fmt: skip
# The names that a pickle of tensors and plain values may hold. torch alone would also accept types
# that reserve as much memory as the file claims.
GLOBALS = re.compile(
    rf"collections OrderedDict|torch ({'|'.join(STORAGES)})|torch\._utils _rebuild_tensor(_v2)?|"
    r"torch\._utils _rebuild_parameter|torch\.nn\.parameter Parameter"
)
VALUES = 2**20  # in a file; each tensor counts as one
MOST_SHARED = 4  # bytes of all tensors for each byte of the file; ramps may share a pooler
MOST_MEMOS = 2**24  # values that a pickle stores for later reference
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of weights
COUNT_BYTES = 8  # bytes that hold the count, before the numbers of each storage
ZIP = b"PK\x03\x04"
# The end of a zip archive: its last record, and the part that torch.save puts before it (a record
# with the same values in 64 bits, and the place of that record).
END, END_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q20s")


def torch_file(file: Path, only: Collection[str] = ()) -> dict[Any, Any]:
    """Read a mapping of tensors and plain values that `torch.save` wrote.

    Args:
        file: the file.
        only: the keys to read; empty for all. The tensors of other keys take no memory.

    Returns:
        The mapping, with its tensors on the CPU.

    Raises:
        UserError: the file is damaged, or holds anything else.
    """
    if not file.is_file():
        raise UserError(f"{file.name} is no regular file")
    try:
        with open(file, "rb") as stream:
            is_zip = stream.read(len(ZIP)) == ZIP
            if is_zip:
                _check_zip(file)
            else:  # a file from before torch 1.6
                _check_legacy(stream, file.stat().st_size)
        # A file of torch 1.6 or later is mapped, so that a tensor cannot be larger than the file.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        if not isinstance(content, dict):
            raise UserError(f"{file.name} holds no mapping")
        wanted = {key: value for key, value in dict.items(content) if not only or key in only}
        return _OwnedCopies(file, is_zip)(wanted)
    except UserError:
        raise
    except Exception as error:  # unpickling a hostile file raises many types
        raise UserError(
            f"{file.name} is damaged, or holds more than tensors and plain values "
            f"({type(error).__name__}); nothing in it was executed"
        ) from error


def _check_zip(file: Path) -> None:
    """Check that a file is an archive as torch.save writes it.

    Raises:
        UserError: bytes were changed, the archive is packed in another way, or its pickle names
            more than tensors and plain values.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > file.stat().st_size or any(
            part.compress_type != zipfile.ZIP_STORED for part in parts
        ):
            raise UserError(f"{file.name} is packed in another way than torch.save packs")
        _check_end(archive, file)
        if (damaged := archive.testzip()) is not None:
            raise UserError(f"{file.name} is damaged: its part {damaged!a} has another checksum")
        # torch's reader ignores the difference between upper and lower case.
        pickles = [part for part in parts if part.filename.lower().endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES:
            raise UserError(f"{file.name} holds other things than one mapping and its tensors")
        _check_pickle(io.BytesIO(archive.read(pickles[0])), file.name)


def _check_end(archive: zipfile.ZipFile, file: Path) -> None:
    """Check that torch's reader finds the same list of parts as Python's reader.

    The other checks use Python's reader. It computes the place of the list from the list's size, to
    allow for a file that was put before the archive. torch takes the place that the end of the file
    states.

    Raises:
        UserError: the list is not where the end of the file states, or a comment follows it.
    """
    with open(file, "rb") as stream:
        stream.seek(-END.size, os.SEEK_END)
        mark, *_, size, offset, comment = END.unpack(stream.read())
        stream.seek(-END.size - END_64.size, os.SEEK_END)
        mark_64, *_, size_64, offset_64, _ = END_64.unpack(stream.read(END_64.size))
    if mark_64 == b"PK\x06\x06":
        same = offset in (offset_64, 2**32 - 1) and size in (size_64, 2**32 - 1)
        offset, ends = offset_64, offset_64 + size_64 + END_64.size + END.size
    else:
        same, ends = True, offset + size + END.size
    whole = mark == b"PK\x05\x06" and comment == 0 and ends == file.stat().st_size
    if not (same and whole and archive.start_dir == offset):
        raise UserError(f"{file.name} is packed in another way than torch.save packs")


def _check_legacy(stream: BinaryIO, size: int) -> None:
    """Check a file from before torch 1.6: five pickles in a row, and then the numbers.

    torch would reserve the memory that the pickles claim. Memory that the numbers do not fill would
    keep its old content.

    Args:
        stream: the open file.
        size: bytes of the file.

    Raises:
        UserError: a pickle names more than tensors and plain values, or claims other numbers than
            follow.
    """
    what = Path(stream.name).name
    if tarfile.is_tarfile(stream.name):  # from before torch 0.1.10; torch would unpack it
        raise UserError(f"{what} is a tar archive, no file of torch.save")
    stream.seek(0)
    for _ in range(5):
        _check_pickle(stream, what)
    stream.seek(0)
    readers = [_StorageSizes(stream) for _ in range(5)]
    *_, listed = [reader.load() for reader in readers]
    claimed = readers[3].claimed
    if not isinstance(listed, list) or sorted(listed) != sorted(claimed):
        raise UserError(f"{what} lists other tensors than it holds")
    if stream.tell() + sum(COUNT_BYTES + each for each in claimed.values()) > size:
        raise UserError(f"{what} claims more numbers than it has bytes for")


class _StorageSizes(pickle.Unpickler):
    """A reader of checked pickles that makes no tensors, and collects the storages that they claim.

    Attributes:
        claimed: bytes by key of the storage.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self.claimed: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return STORAGES.get(name, lambda *_: None)

    def persistent_load(self, pid: Any) -> None:
        if pid[0] == "storage":
            _, item_bytes, key, _, count, *_ = pid
            claimed = self.claimed.setdefault(key, item_bytes * count)
            if claimed != item_bytes * count or count < 0:
                raise UserError("a storage is claimed in two sizes")


def _check_pickle(stream: BinaryIO, what: str) -> None:
    """Check the next pickle of a stream. Afterwards the stream stands behind it.

    Raises:
        UserError: the pickle names more than tensors and plain values, or is too large.
    """
    for code, value, _ in pickletools.genops(stream):
        named = code.name in ("GLOBAL", "INST") and not GLOBALS.fullmatch(str(value))
        if named or code.name == "STACK_GLOBAL":
            raise UserError(
                f"{what} holds more than tensors and plain values (it names {value!a}); nothing in "
                "it was executed"
            )
        memo = int(value or 0) if code.name.endswith("BINPUT") else 0
        if memo > MOST_MEMOS or stream.tell() > PICKLE_BYTES:
            raise UserError(f"{what} holds too much beside its tensors")


class _OwnedCopies:
    """A function that replaces the tensors of a mapped file by copies in memory of their own.

    Without the copies, the values would change with the file, or be lost with it.
    """

    def __init__(self, file: Path, is_mapped: bool) -> None:
        self.name, self.is_mapped = file.name, is_mapped
        self.bytes_left = file.stat().st_size
        self.values_left = VALUES
        self.copies_left = self.bytes_left
        # A reader spends time and memory on each tensor, even where tensors share their numbers.
        self.shared_left = MOST_SHARED * self.bytes_left + 2**20
        self.storages: dict[tuple[int, int], torch.UntypedStorage] = {}

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self.values_left -= 1
        if depth > DEPTH or self.values_left < 0:
            raise UserError(f"{self.name} holds too many values, or values too deep inside others")
        if isinstance(value, Tensor):
            return self._tensor(value.detach())
        if isinstance(value, list):
            return [self(each, depth + 1) for each in value]
        if isinstance(value, tuple):
            return tuple(self(each, depth + 1) for each in value)
        if isinstance(value, dict):
            items = dict.items(value)  # a pickle may have replaced the attribute `items`
            return {self(key, depth + 1): self(each, depth + 1) for key, each in items}
        return value

    def _tensor(self, given: Tensor) -> Tensor:
        if given.layout != torch.strided or given.is_quantized or given.device.type != "cpu":
            raise UserError(f"{self.name} holds a tensor that is no plain array of numbers")
        storage, size = given.untyped_storage(), given.numel() * given.element_size()
        if size > storage.nbytes():  # one number that is repeated
            raise UserError(f"{self.name} holds a tensor that is larger than its numbers")
        self.shared_left -= size
        if self.shared_left < 0:
            raise UserError(f"{self.name} holds the same numbers under too many names")
        if not given.is_contiguous():  # kernels that expect a row would read past its end
            self.copies_left -= size
            if self.copies_left < 0:
                raise UserError(f"{self.name} holds more views of its numbers than numbers")
            return given.contiguous()
        if not self.is_mapped:
            return given
        place = storage.data_ptr(), storage.nbytes()
        if place not in self.storages:
            self.bytes_left -= storage.nbytes()
            if self.bytes_left < 0:  # overlapping storages
                raise UserError(f"{self.name} holds more numbers than it has bytes for")
            self.storages[place] = storage.clone()
        shape, strides = given.size(), given.stride()
        empty = torch.empty(0, dtype=given.dtype)
        return empty.set_(self.storages[place], given.storage_offset(), shape, strides)


def safetensors_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Returns:
        The tensors by name; and the metadata.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(file, "pt") as stream:
            # The tensors are copied, because the library maps the file.
            tensors = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118
            return tensors, stream.metadata() or {}
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{file.name} cannot be read as safetensors ({type(error).__name__})"
        ) from error


def check_weights(weights: Any) -> None:
    """Check that a value is a mapping of weights by name.

    Raises:
        UserError: it is not, or one of the weights is no array of real numbers.
    """
    if not isinstance(weights, dict) or not weights:
        raise UserError("it holds no weights")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError("it holds something else than weights by name")
        if value.dtype not in DTYPES or value.layout != torch.strided:
            raise UserError(f"its weight {name!a} is no array of real numbers")


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Check that all weights are finite.

    Raises:
        UserError: a weight holds an infinite number or NaN.
    """
    for name, value in weights.items():
        # `aminmax` is several times faster than `isfinite` on all numbers, and passes NaN on.
        if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
            raise UserError(
                f"its weight {name!a} holds numbers that are not finite: training diverged; "
                "lower stages.1.lr or stages.2.lr"
            )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash the names, shapes, types and values of tensors.

    Two models are the same if their hashes are.
    """
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
