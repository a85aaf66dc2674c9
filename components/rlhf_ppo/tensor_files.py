"""Safetensors files written from where tensors lie, past the system's page cache, with their digest taken on the way.

safetensors' own writer wants everything at once, in memory that does not change, and leaves a copy in the page cache: a
state of some gigabytes then takes seconds of a core that training needs (benchmarks/checkpoint_cost.py).
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

BLOCK = 8 << 20
"""Bytes that are written at once."""
SMALL = 1 << 20
"""Bytes below which a tensor is copied at once."""
TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""What the format calls torch's types (https://huggingface.co/docs/safetensors)."""


class LateCopy:
    """Tensors as they are now, by name, for another thread to read.

    Large ones on the CPU are read where they lie; before they change ``copy_rest`` must be called. Others are copied at
    once. ``memory`` has copies made before, by name, whose memory is taken again where it fits: memory that is new to
    the process takes several times as long to fill.
    """

    def __init__(self, tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
        self.memory = {name: copy for name, copy in memory.items() if name in tensors}
        self.tensors: dict[str, Tensor] = {}
        self._unread: set[str] = set()
        self._lock = threading.Lock()
        for name, tensor in tensors.items():
            if tensor.nbytes >= SMALL and tensor.device.type == "cpu" and tensor.is_contiguous():
                self.tensors[name] = tensor
                self._unread.add(name)
            else:
                self._copy(name, tensor)

    def read(self, name: str, place: int, into: np.ndarray) -> None:
        """Fill the bytes ``into`` with those of a tensor from ``place`` on."""
        with self._lock:
            np.copyto(into, _bytes_of(self.tensors[name])[place : place + len(into)])

    def was_read(self, name: str) -> None:
        """Say that a tensor is not needed any more."""
        with self._lock:
            self._unread.discard(name)

    def copy_rest(self) -> None:
        """Copy what has not been read: after this all tensors may change."""
        with self._lock:
            for name in self._unread:
                self._copy(name, self.tensors[name])
            self._unread.clear()

    def _copy(self, name: str, tensor: Tensor) -> None:
        into = self.memory.get(name)
        if into is None or into.shape != tensor.shape or into.dtype != tensor.dtype:
            into = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.memory[name] = self.tensors[name] = into.copy_(tensor)


def write_tensors(tensors: LateCopy, path: Path) -> str:
    """Write a safetensors file to the disk; returns its digest. Raises OSError."""
    # Wide types first, as safetensors does: whatever lies behind a tensor is aligned to its own width.
    names = sorted(tensors.tensors, key=lambda name: (-tensors.tensors[name].itemsize, name))
    with _File(path) as file:
        file.write(_header({name: tensors.tensors[name] for name in names}))
        for name in names:
            place, size = 0, tensors.tensors[name].nbytes
            while place < size:
                free = file.free()[: size - place]
                tensors.read(name, place, free)
                file.add(len(free))
                place += len(free)
            tensors.was_read(name)
        return file.finish()


def digest(path: Path) -> str:
    """The digest of a file as it lies on the disk, with its kind before it.

    It tells damage, not intent: whoever may change a file may change what its digest is compared with.
    """
    found = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            found.update(block)
    return _named(found)


class _File:
    """A file that is written block by block, past the page cache where its file system lets it."""

    def __init__(self, path: Path) -> None:
        self._buffer = memoryview(_pages(BLOCK))
        self._filled = 0
        self._hash = xxhash.xxh3_128()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._direct: int = getattr(os, "O_DIRECT", 0)
        try:
            self._file = os.open(path, flags | self._direct, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = 0
            self._file = os.open(path, flags, 0o666)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def free(self) -> np.ndarray:
        """The bytes that come next, at least one."""
        return np.frombuffer(self._buffer[self._filled :], dtype=np.uint8)

    def add(self, count: int) -> None:
        """Say that the first ``count`` bytes of ``free`` are filled."""
        self._filled += count
        if self._filled == BLOCK:
            self._flush()

    def write(self, data: bytes) -> None:
        while data:
            free = self.free()[: len(data)]
            free[:] = np.frombuffer(data[: len(free)], dtype=np.uint8)
            self.add(len(free))
            data = data[len(free) :]

    def finish(self) -> str:
        """Have everything on the disk; returns the digest."""
        self._flush()
        os.fsync(self._file)
        return _named(self._hash)

    def _flush(self) -> None:
        block, self._filled = self._buffer[: self._filled], 0
        self._hash.update(block)
        while block:
            try:
                block = block[os.write(self._file, block) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                # What does not end with a sector, or a file system that has no way past its cache.
                fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~self._direct)
                self._direct = 0


def _pages(size: int) -> mmap.mmap:
    """Memory in whole pages, as what goes past the page cache has to be; in large ones, which take half of the time."""
    found = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            found.madvise(mmap.MADV_HUGEPAGE)
    return found


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    return found


def _named(found: Any) -> str:
    return f"xxh3_128:{found.hexdigest()}"
