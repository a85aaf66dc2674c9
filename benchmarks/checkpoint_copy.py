"""How long training waits for a checkpoint, with fresh memory and with that of the one before.

    python benchmarks/checkpoint_copy.py [--gigabytes 1.6] [--rounds 3] [--directory DIRECTORY]

The state has the size of SmolLM2-135M in fp32 with Adam's moments, unless another is asked for. Each round is a process
of its own, for memory that was given back is not fresh.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

PART = 1 << 20


def measure(numbers: int, where: Path | None) -> tuple[float, float, float]:
    """Seconds that the first and the second checkpoint keep training waiting, and in which the second is written."""
    import torch

    from rlhf_ppo.checkpoint import CheckpointStore

    state = {f"weight{number}": torch.randn(PART) for number in range(numbers // PART)}
    waits = []
    with tempfile.TemporaryDirectory(dir=where) as directory:
        store = CheckpointStore(Path(directory), {}, 1)
        for number in range(2):
            started = time.perf_counter()
            store.save(f"step-{number:08}-000000", state)
            waits.append(time.perf_counter() - started)
            store.finish_writing()
    return waits[0], waits[1], time.perf_counter() - started - waits[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where checkpoints are written, else a temporary one")
    given = parser.parse_args()
    rounds = []
    for _ in range(given.rounds):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rounds.append(pool.apply(measure, (round(given.gigabytes * 1e9 / 4), given.directory)))
    fresh, kept, written = (statistics.median(found) for found in zip(*rounds, strict=True))
    print(f"training waits {fresh:.2f} s with fresh memory, {kept:.2f} s with that of the one before")
    print(f"ratio {fresh / kept:.1f}")
    print(f"a thread beside it writes for {written:.1f} s")


if __name__ == "__main__":
    main()
