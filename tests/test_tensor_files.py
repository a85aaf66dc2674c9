"""Files of tensors: safetensors reads them, they leave no trace in memory, and a late copy is of the right moment."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ppo import tensor_files
from rlhf_ppo.tensor_files import BLOCK, SMALL, TYPES, LateCopy, digest, write_tensors

PAGE = 4096


def written(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What safetensors finds in the file, once its digest was checked."""
    found = write_tensors(LateCopy(tensors, {}), path)
    assert found == digest(path) == f"xxh3_128:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"
    return load_file(path)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether the tensors are the same, bit by bit."""

    def parts(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist()

    return one.keys() == other.keys() and all(parts(one[name]) == parts(other[name]) for name in one)


def every_type() -> dict[str, Tensor]:
    """Three tensors of every type, of odd sizes, empty and of no dimension; any bits, also those of NaN."""
    made = {}
    for kind in TYPES:
        for shape in ((3, 7), (0, 2), ()):
            count = int(np.prod(shape))
            bits = torch.randint(0, 2 if kind == torch.bool else 256, (count * kind.itemsize,), dtype=torch.uint8)
            made[f"{kind}{shape}"] = bits.view(kind).reshape(shape)
    return made


def test_safetensors_reads_every_type_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = every_type()
    assert same(written(tensors, tmp_path / "ours"), tensors)
    # What it writes says the same of each.
    save_file(tensors, tmp_path / "theirs")
    said = []
    for name in ("ours", "theirs"):
        with safetensors.safe_open(tmp_path / name, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in tensors}
            said.append({key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()})
    assert said[0] == said[1]


def test_every_tensor_is_aligned_to_its_own_width(tmp_path: Path) -> None:
    """As the format asks, for programs that use the file's bytes where they lie."""
    tensors = every_type()
    write_tensors(LateCopy(tensors, {}), tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    places = {name: data + entry["data_offsets"][0] for name, entry in json.loads(content[8:data]).items()}
    assert data % 8 == 0 and places.keys() == tensors.keys()
    assert [name for name, place in places.items() if place % tensors[name].itemsize] == []


def test_names_and_no_tensors_at_all(tmp_path: Path) -> None:
    tensors = {'/policy/"quoted"\\': torch.ones(2), "/größe/\n": torch.zeros(3), "": torch.ones(1)}
    assert same(written(tensors, tmp_path / "names"), tensors)
    assert written({}, tmp_path / "none") == {}


def refuse_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *given: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *given)

    monkeypatch.setattr(os, "open", refusing)


def refuse_at_the_second_write(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    write, calls = os.write, [0]

    def refusing(file: int, data: Any) -> int:
        calls[0] += 1
        if calls[0] > 1 and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, data)

    monkeypatch.setattr(os, "write", refusing)


def write_less(monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: max(1, len(data) * 2 // 3)]))


@pytest.mark.parametrize("system", [None, refuse_at_open, refuse_at_the_second_write, write_less])
def test_sizes_about_a_block_on_every_kind_of_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: Any
) -> None:
    """File systems that can't write past the page cache (tmpfs, FUSE, NFS in parts) say so sooner or later."""
    monkeypatch.setattr(tensor_files, "BLOCK", 2 * PAGE)
    monkeypatch.setattr(tensor_files, "SMALL", 0)
    if system is not None:
        system(monkeypatch)
    chance = random.Random(0)
    sizes = [2 * PAGE * blocks + more for blocks in (0, 1, 2) for more in (-8, -1, 0, 1, 8)]
    # The header takes a part of the first block, too.
    sizes += [2 * PAGE - 8 - chance.randrange(200) for _ in range(20)] + [2 * PAGE - 8 - n for n in range(70, 100)]
    for size in sizes:
        tensors = {"a": torch.randint(0, 256, (max(size, 0),), dtype=torch.uint8), "b": torch.ones(3)}
        assert same(written(tensors, tmp_path / "file"), tensors)


def in_page_cache(path: Path) -> bool:
    """Whether the system has the file's beginning in memory."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(file, [bytearray(64)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def test_a_file_leaves_nothing_in_the_page_cache(tmp_path: Path) -> None:
    tensors = {"weights": torch.ones(BLOCK // 2)}
    save_file(tensors, tmp_path / "theirs")
    try:
        os.close(os.open(tmp_path / "theirs", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no way past the page cache")
    if not in_page_cache(tmp_path / "theirs"):
        pytest.skip("this file system does not tell")
    write_tensors(LateCopy(tensors, {}), tmp_path / "ours")
    assert not in_page_cache(tmp_path / "ours")


def test_large_tensors_are_read_where_they_lie_and_others_copied_at_once(tmp_path: Path) -> None:
    numbers = SMALL // 4
    tensors = {"large": torch.ones(numbers), "small": torch.ones(numbers - 1), "turned": torch.ones(numbers, 2).t()}
    late = LateCopy(tensors, {})
    assert sorted(late.memory) == ["small", "turned"]
    for tensor in tensors.values():
        tensor += 1
    write_tensors(late, tmp_path / "file")
    assert {name: float(tensor.max()) for name, tensor in load_file(tmp_path / "file").items()} == {
        "large": 2.0, "small": 1.0, "turned": 1.0,
    }  # fmt: skip
    # All of them were read: there is nothing to copy.
    late.copy_rest()
    assert sorted(late.memory) == ["small", "turned"]


@pytest.mark.parametrize("blocks", range(9))
def test_what_changes_in_the_middle_of_writing_was_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """Written are two tensors of three and a half blocks; they change before the block of that number is read."""
    monkeypatch.setattr(tensor_files, "BLOCK", PAGE)
    monkeypatch.setattr(tensor_files, "SMALL", 0)
    tensors = {name: torch.randint(0, 256, (PAGE * 7 // 2,), dtype=torch.uint8) for name in ("a", "b")}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    late, reads = LateCopy(tensors, {}), [0]
    read = late.read

    def disturbed(name: str, place: int, into: np.ndarray) -> None:
        if reads[0] == blocks:
            late.copy_rest()
            for tensor in tensors.values():
                tensor.zero_()
        reads[0] += 1
        read(name, place, into)

    monkeypatch.setattr(late, "read", disturbed)
    write_tensors(late, tmp_path / "file")
    assert same(load_file(tmp_path / "file"), before) and reads[0] >= 8
    # Of what was read whole before, no copy was made.
    assert sorted(late.memory) == ([] if blocks >= reads[0] else ["b"] if blocks > 3 else ["a", "b"])


def test_the_memory_of_a_copy_is_taken_again_where_it_fits() -> None:
    numbers = torch.ones(SMALL)
    first = LateCopy({"a": numbers, "b": numbers}, {})
    first.copy_rest()
    second = LateCopy({"a": numbers + 1, "b": numbers[:-1]}, first.memory)
    second.copy_rest()
    places = [{name: tensor.data_ptr() for name, tensor in late.memory.items()} for late in (first, second)]
    assert places[0]["a"] == places[1]["a"] and places[0]["b"] != places[1]["b"]
    assert float(second.tensors["a"][0]) == 2.0
    third = LateCopy({"a": numbers.int()}, second.memory)
    third.copy_rest()
    assert third.tensors["a"].dtype == torch.int32 and third.memory.keys() == {"a"}
