"""Files of tensors that somebody else wrote: torch reads what was checked, and no more than that."""

import io
import pickle
import pickletools
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.hostile_runs import Reserve, saved

from deebert import EarlyExitClassifier
from deebert.errors import UserError
from deebert.hub import locate
from deebert.untrusted import tensor_files


def test_torch_reads_no_other_archive_than_the_one_that_is_checked(tmp_path: Path) -> None:
    """Two readers of one file may see two archives in it."""
    torch.save({"x": torch.ones(3)}, tmp_path / "good")
    torch.save({"x": Reserve()}, tmp_path / "bad")
    good, bad = (tmp_path / "good").read_bytes(), (tmp_path / "bad").read_bytes()
    renamed, packed = io.BytesIO(), io.BytesIO()
    for stream, name, kind in (
        (renamed, "DATA.PKL", 0),
        (packed, "data.pkl", zipfile.ZIP_DEFLATED),
    ):
        with zipfile.ZipFile(tmp_path / "bad") as old, zipfile.ZipFile(stream, "w", kind) as new:
            for part in old.infolist():
                new.writestr(part.filename.replace("data.pkl", name), old.read(part))
    with tarfile.open(tmp_path / "tar", "w") as old_kind:
        old_kind.add(tmp_path / "bad", "pickle")
    cases = {
        "behind another": (bad + good, "is packed in another way"),
        "with a comment": (good + b"x", "is packed in another way"),
        "two ends": (bad[:-22] + good, "is packed in another way"),
        "another case": (renamed.getvalue(), "it names '__builtin__ bytearray'"),
        "deflated": (packed.getvalue(), "is packed in another way"),
        "tar": ((tmp_path / "tar").read_bytes(), "is a tar archive"),
    }
    file = tmp_path / "x.ckpt"
    for name, (content, says) in cases.items():
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            tensor_files.torch_file(file)
        assert says in str(error.value), name
    file.write_bytes(good)
    assert tensor_files.torch_file(file)["x"].tolist() == [1, 1, 1]


def test_tensors_are_no_larger_than_their_file(tmp_path: Path) -> None:
    numbers, file = torch.arange(1000.0), tmp_path / "x.pt"
    cases = {
        "many names": ([numbers] * 500, "the same numbers under too many names"),
        "repeated": ([numbers[:1].expand(10**9)], "larger than its numbers"),
        "views": ([numbers.reshape(10, 100).t()] * 3, "more views of its numbers than numbers"),
    }
    for tensors, says in cases.values():
        torch.save({str(i): tensor for i, tensor in enumerate(tensors)}, file)
        with pytest.raises(UserError, match=says):
            tensor_files.torch_file(file)
    shared = {"a": numbers, "b": numbers[5:], "c": numbers.reshape(10, 100).t()}
    torch.save(shared, file)
    loaded = tensor_files.torch_file(file)
    assert all(torch.equal(loaded[name], value) for name, value in shared.items())
    assert loaded["a"].data_ptr() + 20 == loaded["b"].data_ptr(), "what is shared stays shared"
    assert loaded["c"].is_contiguous()
    torch.save(shared, file, _use_new_zipfile_serialization=False)
    assert torch.equal(tensor_files.torch_file(file)["c"], shared["c"])
    assert set(tensor_files.torch_file(file, only=["a"])) == {"a"}


def test_flipped_bytes_are_noticed(copy: Path, stage2: Path, tmp_path: Path) -> None:
    file = copy / "checkpoints" / "last.ckpt"
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:  # in the middle of the numbers of each part
        places = [p.header_offset + 200 + p.file_size // 2 for p in archive.infolist() if p.file_size > 500]  # fmt: skip
    assert len(places) > 50
    for place in places[::7]:
        spoiled = bytearray(content)
        spoiled[place] ^= 1
        file.write_bytes(spoiled)
        with pytest.raises(UserError, match="is damaged"):
            locate.checkpoint(file, "ckpt")
    folder = saved(stage2, tmp_path / "saved")
    for name in ("model.safetensors", "records/validation.safetensors"):
        written = (folder / name).read_bytes()
        flipped = bytearray(written)
        flipped[-100] ^= 1
        (folder / name).write_bytes(flipped)
        with pytest.raises(UserError, match="damaged"):
            EarlyExitClassifier.from_pretrained(folder)
        (folder / name).write_bytes(written)


def test_old_files_of_torch_fill_what_they_claim(tmp_path: Path) -> None:
    """torch would leave as it is what a file reserves and does not fill: bytes of this process."""
    file = tmp_path / "x.bin"
    torch.save(
        {"a": torch.ones(1000), "b": torch.zeros(3)}, file, _use_new_zipfile_serialization=False
    )
    content, stream = file.read_bytes(), io.BytesIO(file.read_bytes())
    ends = []
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    assert tensor_files.torch_file(file)["a"].sum() == 1000
    nothing = content[: ends[3]] + pickle.dumps([], protocol=2) + content[ends[4] :]
    cases = {
        "unlisted": (nothing, "lists other tensors than it holds"),
        "cut": (content[:-100], "claims more numbers than it has bytes for"),
        "huge": (content.replace(b"M\xe8\x03", b"J\x00\xca\x9a\x3b"[:3]), ""),
    }
    for name, (spoiled, says) in cases.items():
        file.write_bytes(spoiled)
        with pytest.raises(UserError) as error:
            tensor_files.torch_file(file)
        assert says in str(error.value), name
