"""How much of training's time a checkpoint takes, written by CheckpointStore and as libraries offer it.

    python benchmarks/checkpoint_cost.py [--gigabytes 1.6] [--rounds 3] [--unchanged 2] [--directory DIRECTORY]

Training is matrix products here, on all cores. "Plainly" is: a copy of the state at once, then safetensors' save_file,
a SHA-256 of the file and fsync in a thread. The state has the size of SmolLM2-135M in fp32 with Adam's moments, unless
another is asked for; it changes after as many seconds as --unchanged says: the demo's rollouts take 2 or more. Each
round is a process of its own, for memory that was given back is not fresh.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PART = 1 << 20
CHECKPOINTS = 2
SIDES = ("plainly", "CheckpointStore")


class Plain:
    """What is saved by the libraries' own means, in a thread."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._thread = directory, ThreadPoolExecutor(1)
        self._writing: Any = None

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Copy, and begin to write."""
        copies = {key: tensor.clone() for key, tensor in state.items()}
        self._writing = self._thread.submit(self._write, self.directory / name, copies)

    @property
    def busy(self) -> bool:
        """Whether it is being written."""
        return not self._writing.done()

    def before_change(self) -> None:
        """Nothing is left to copy."""

    def _write(self, path: Path, copies: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        save_file(copies, path)
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
            os.fsync(file.fileno())


def measure(side: str, numbers: int, unchanged: float, where: Path | None) -> list[tuple[float, float]]:
    """Of each checkpoint: the seconds that products lost by it, and those until it was written."""
    import torch

    from rlhf_ppo.checkpoint import CheckpointStore

    state = {f"weight{number}": torch.ones(PART) for number in range(numbers // PART)}
    one, other = torch.randn(512, 576), torch.randn(576, 1536)

    def products(going_on: Callable[[float], bool]) -> tuple[int, float]:
        """How many were made, and in how many seconds."""
        count, started = 0, time.perf_counter()
        while going_on(time.perf_counter() - started):
            one @ other
            count += 1
        return count, time.perf_counter() - started

    def alone() -> float:
        count, seconds = products(lambda passed: passed < 3)
        return seconds / count

    found = []
    with tempfile.TemporaryDirectory(dir=where) as directory:
        store: Any = Plain(Path(directory)) if side == "plainly" else CheckpointStore(Path(directory), {}, CHECKPOINTS)
        alone()
        for number in range(CHECKPOINTS):
            before, started = alone(), time.perf_counter()
            store.save(f"step-{number:08}-000000", state)
            count, _ = products(lambda passed: passed < unchanged)
            store.before_change()
            more, _ = products(lambda _: store.busy)
            took = time.perf_counter() - started
            found.append((took - (count + more) * (before + alone()) / 2, took))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unchanged", type=float, default=2.0, help="seconds until the state changes")
    parser.add_argument("--directory", type=Path, help="where checkpoints are written, else a temporary one")
    given = parser.parse_args()
    rounds: dict[str, list[list[tuple[float, float]]]] = {side: [] for side in SIDES}
    for _ in range(given.rounds):
        for side in SIDES:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                arguments = (side, round(given.gigabytes * 1e9 / 4), given.unchanged, given.directory)
                rounds[side].append(pool.apply(measure, arguments))
    lost = {}
    for side in SIDES:
        for number, name in enumerate(("first", "second")):
            losses = [found[number][0] for found in rounds[side]]
            lost[side, name] = statistics.median(losses)
            took = max(found[number][1] for found in rounds[side])
            print(
                f"{side}: the {name} checkpoint takes {lost[side, name]:.2f} s of training "
                f"({min(losses):.2f} to {max(losses):.2f}), written after at most {took:.1f} s"
            )
    for name in ("first", "second"):
        print(f"ratio for the {name}: {lost['plainly', name] / lost['CheckpointStore', name]:.1f}")


if __name__ == "__main__":
    main()
