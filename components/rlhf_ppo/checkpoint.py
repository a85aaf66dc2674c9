"""Checkpoints on disk: whole or absent, checked when read, without pickle.

A checkpoint is a directory: ``tensors.safetensors``, ``state.json`` for everything else, and ``manifest.json`` with the
digests of both. It is written under another name and renamed, beside training in a thread of its own. What is spread
over processes stands in ``part-N.safetensors``: each writes its own to ``NAME.parts``, and the first collects them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_ppo.artifacts import digest_of, sha256
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.ppo.sharding import local
from rlhf_ppo.tensor_files import TYPES, LateCopy, digest, write_tensors

FORMAT = 2
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
STATE = "state.json"
PATIENCE = 1800.0
"""Seconds for which the first process waits for another's part."""
Tree = dict[str, Any]
"""Nested dicts and lists of tensors, numbers, texts, booleans and None."""


class DamagedCheckpoint(Exception):
    """A checkpoint that is torn or altered; says which file and how."""


class CheckpointStore:
    """The checkpoints of one training in ``directory``, of which the latest ``keep`` are kept.

    ``identity`` is everything that decides the training's result; a checkpoint of another is refused. ``parts`` is the
    number of processes that tensors are spread over, 0 where none are; this one is ``process``.
    """

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], keep: int, process: int = 0, parts: int = 0
    ) -> None:
        self.directory, self.identity, self.keep = directory, dict(identity), keep
        self.process, self.parts = process, parts
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[bool] | None = None
        # What is being written: of the whole tensors, and of this process' parts of those that are spread.
        self._tensors = self._own = LateCopy({}, {})
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"checkpoint_dir: {directory} can't be made ({error}): name a directory that user {os.getuid()} or "
                f"group {os.getgid()} may write to, or let them write to this one"
            ) from error
        for left_over in (*directory.glob("*.unfinished"), *directory.glob("*.parts")):
            shutil.rmtree(left_over, ignore_errors=True)

    # Writing

    def save(self, name: str, state: Tree, *, wait: bool = False) -> bool:
        """Write ``state`` as ``name``; names sort by age. Returns whether it is, or will be, written.

        Without ``wait`` it is written while training goes on, from the memory that the state lies in: call
        ``before_change`` before that changes. Nothing is written while an earlier one still is. A failure is told, and
        raised only with ``wait``. Processes other than the first write their part.
        """
        if self.busy and not wait:
            emit("checkpoint_left_out", name=name, reason="the one before is still being written")
            return False
        if self._writing is not None:
            futures.wait([self._writing])
        tree, tensors, own = _flattened(state)
        self._tensors, self._own = LateCopy(tensors, self._tensors.memory), LateCopy(own, self._own.memory)
        if self.process == 0:
            self._writing = self._writer.submit(self._write, name, tree, wait)
        else:
            self._writing = self._writer.submit(self._write_part, name, wait)
        return self._writing.result() if wait else True

    def before_change(self) -> None:
        """Call this before the state changes that is being written: what has not been read of it is copied."""
        if self.busy:
            self._tensors.copy_rest()
            self._own.copy_rest()

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._writing is not None and not self._writing.done()

    def finish_writing(self) -> None:
        """Wait for what is being written."""
        if self._writing is not None:
            self._writing.result()

    def _write(self, name: str, tree: Any, strict: bool) -> bool:
        state = {"format": FORMAT, "identity": self.identity, "versions": _versions(), "state": tree}

        def fill(directory: Path) -> dict[str, str]:
            digests = {TENSORS: write_tensors(self._tensors, directory / TENSORS)}
            (directory / STATE).write_text(json.dumps(state), encoding="utf-8")
            if self.parts:
                digests[_part(0)] = write_tensors(self._own, directory / _part(0))
                self._collect(name, directory)
            return digests

        try:
            self._seal(name, fill)
        except OSError as error:
            return self._failed(name, error, strict)
        emit("checkpoint_written", name=name, directory=str(self.directory))
        self._prune()
        return True

    def _failed(self, name: str, error: OSError, strict: bool) -> bool:
        emit("checkpoint_failed", name=name, directory=str(self.directory), reason=str(error))
        if strict:
            raise error
        return False

    def _write_part(self, name: str, strict: bool) -> bool:
        """Write what this process has of the tensors, for the first one to collect."""
        place = self.directory / f"{name}.parts"
        part = place / _part(self.process)
        try:
            place.mkdir(exist_ok=True)
            write_tensors(self._own, part.with_suffix(".unfinished"))
            os.replace(part.with_suffix(".unfinished"), part)
        except OSError as error:
            part.with_suffix(".failed").touch()
            return self._failed(name, error, strict)
        return True

    def _collect(self, name: str, directory: Path) -> None:
        """Move the other processes' parts to ``directory``. Raises OSError where one doesn't come."""
        place, end = self.directory / f"{name}.parts", time.monotonic() + PATIENCE
        for process in range(1, self.parts):
            part = place / _part(process)
            while not part.exists():
                if part.with_suffix(".failed").exists() or time.monotonic() > end:
                    raise OSError(f"process {process} could not write its part")
                time.sleep(0.05)
            os.replace(part, directory / part.name)
        shutil.rmtree(place, ignore_errors=True)

    def _seal(self, name: str, fill: Callable[[Path], Mapping[str, str] | None]) -> None:
        """Make the directory ``name`` of what ``fill`` writes, whole and on the disk.

        ``fill`` may return digests that it knows by a file's name; other files are read for theirs.
        """
        unfinished = self.directory / f"{name}.{os.getpid()}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            known = fill(unfinished) or {}
            files = {file.relative_to(unfinished).as_posix(): file for file in unfinished.rglob("*") if file.is_file()}
            digests = {file: known.get(file) or digest(path) for file, path in sorted(files.items())}
            manifest = unfinished / MANIFEST
            manifest.write_text(json.dumps({"files": digests, "digest": digest_of(digests)}), encoding="utf-8")
            for path in (*files.values(), manifest, unfinished):
                _to_disk(path)
            target = self.directory / name
            if target.exists():
                shutil.rmtree(target)
            os.replace(unfinished, target)
            _to_disk(self.directory)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _prune(self) -> None:
        """Leave the latest checkpoints, and the best policies that they or the training know of."""
        names = self._names()
        for name in names[: -self.keep]:
            shutil.rmtree(self.directory / name, ignore_errors=True)
        oldest = names[-self.keep :][0]
        best = sorted(path.name for path in self.directory.glob("best-*") if path.suffix != ".unfinished")
        # What was the best when the oldest checkpoint was written is still wanted: training may restart there. A step's
        # policy is compared between the step's beginning, which ends in -000000, and its first optimizer step.
        before = [name for name in best if f"{name.removeprefix('best-')}-000000" < oldest.removeprefix("step-")]
        for name in before[:-1]:
            shutil.rmtree(self.directory / name, ignore_errors=True)

    def keep_best(self, step: int, fill: Callable[[Path], None]) -> None:
        """Keep what ``fill`` writes as the best policy, that of the PPO step ``step``."""
        self._seal(_best(step), fill)

    # Reading

    def latest(self) -> str | None:
        """The name of the latest whole checkpoint; a damaged one is told and passed over.

        Raises InputError where it is of another training, with the differences.
        """
        for name in reversed(self._names()):
            try:
                state = self._checked(name)
            except DamagedCheckpoint as error:
                emit("checkpoint_damaged", name=name, directory=str(self.directory), reason=str(error))
                continue
            self._compare(name, state)
            return name
        return None

    def read(self, name: str) -> Tree:
        """The state that was saved as ``name``, with its tensors on the CPU; of what is spread, this process' part."""
        from safetensors.torch import load_file

        document = json.loads((self.directory / name / STATE).read_text(encoding="utf-8"))
        tensors = load_file(str(self.directory / name / TENSORS))
        if self.parts:
            tensors |= load_file(str(self.directory / name / _part(self.process)))
        found: Tree = _unflattened(document["state"], tensors)
        return found

    def best(self, step: int) -> Path:
        """The directory of the best policy. Raises DamagedCheckpoint where it is not whole."""
        check_sealed(self.directory / _best(step))
        return self.directory / _best(step)

    def remove(self) -> None:
        """Delete everything: the training is done and its outputs are kept elsewhere."""
        self.finish_writing()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("step-*") if path.suffix != ".unfinished")

    def _checked(self, name: str) -> dict[str, Any]:
        check_sealed(self.directory / name)
        found: dict[str, Any] = json.loads((self.directory / name / STATE).read_text(encoding="utf-8"))
        return found

    def _compare(self, name: str, document: dict[str, Any]) -> None:
        where = f"the checkpoint {self.directory / name}"
        if document.get("format") != FORMAT:
            raise InputError(
                f"{where} has the format {document.get('format')}, and this version reads {FORMAT}: finish it with the "
                f"version that wrote it ({document.get('versions')}), or set another checkpoint_name"
            )
        theirs: dict[str, Any] = document["identity"]
        names = sorted(n for n in {*theirs, *self.identity} if theirs.get(n) != self.identity.get(n))
        if names:
            differences = "; ".join(f"{n} is {theirs.get(n)!r} there and {self.identity.get(n)!r} here" for n in names)
            raise InputError(
                f"{where} is of another training: {differences}. Set another checkpoint_name, give the same settings, "
                "or delete that folder"
            )
        if document["versions"] != _versions():
            emit("checkpoint_versions", name=name, written_by=document["versions"], read_by=_versions())


def check_sealed(directory: Path) -> None:
    """Raise DamagedCheckpoint unless ``directory`` holds exactly what its manifest says."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        digests: dict[str, str] = manifest["files"]
        if manifest["digest"] != digest_of(digests) or not isinstance(digests, dict):
            raise DamagedCheckpoint(f"{MANIFEST} was altered")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} can't be read ({error})") from error
    for name, expected in digests.items():
        path = directory / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        # Digests without a kind are of before there were several: SHA-256.
        if expected != (digest(path) if ":" in expected else sha256(path)):
            raise DamagedCheckpoint(f"{name} was altered or cut short")


def _part(process: int) -> str:
    return f"part-{process:05d}.safetensors"


def _best(step: int) -> str:
    return f"best-{step:08d}"


def _to_disk(path: Path) -> None:
    """Have the system write what it holds back of a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    import transformers

    from rlhf_ppo import __version__

    return {"rlhf_ppo": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _flattened(tree: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """``tree`` as JSON, and its tensors by their path in it: whole ones, and what is here of spread ones."""
    tensors: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}

    def flatten(value: Any, path: str) -> Any:
        if isinstance(value, Tensor) and value.dtype in TYPES:
            into = parts if isinstance(value, DTensor) else tensors
            into[path] = local(value.detach())
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"dict": [[key, flatten(inner, f"{path}/{key}")] for key, inner in value.items()]}
        if isinstance(value, (list, tuple)):
            return {
                type(value).__name__: [flatten(inner, f"{path}/{number}") for number, inner in enumerate(value)],
            }
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{path}: {type(value).__name__} can't be kept in a checkpoint")

    return flatten(tree, ""), tensors, parts


def _unflattened(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: _unflattened(item, tensors) for key, item in inner}
    items = [_unflattened(item, tensors) for item in inner]
    return tuple(items) if kind == "tuple" else items
