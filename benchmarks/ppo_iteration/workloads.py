"""The workloads, and how a worker talks to the benchmark; both environments read this: torch and nothing more."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if os.environ.get("BENCH_CLOCK") == "cpu":
    # Both trainers look at their clocks through the module.
    time.time = time.perf_counter = time.process_time

LEARNING_RATE, INIT_KL_COEF, SEED = 1e-6, 0.2, 0
"""So slow that no minibatch departs too far to be learned from: TRL would compute its gradient, ours would not."""
CHECKED_RATE = 1e-4
"""Of plain gradient descent, in the step that both are compared by."""


@dataclass(frozen=True)
class Workload:
    """One PPO step: lengths are spread evenly between their ends, in tokens; "tiny" has 1 million parameters."""

    model: str
    batch_size: int
    prompts: tuple[int, int]
    responses: tuple[int, int]
    mini_batch_size: int
    ppo_epochs: int
    pairs: int = 3
    """How many the benchmark measures."""

    def lengths(self) -> list[tuple[int, int]]:
        """The lengths of prompt and response of each row, in an order that has nothing to do with them."""
        generator = random.Random(SEED)
        columns = []
        for low, high in (self.prompts, self.responses):
            column = [low + round(row * (high - low) / (self.batch_size - 1)) for row in range(self.batch_size)]
            generator.shuffle(column)
            columns.append(column)
        return list(zip(*columns, strict=True))

    def queries(self, vocabulary: int) -> list[Tensor]:
        """Random prompts; token ids below 10 and the last one, which ends a response, are left out."""
        generator = random.Random(SEED + 1)
        return [
            torch.tensor([generator.randrange(10, vocabulary - 1) for _ in range(length)])
            for length, _ in self.lengths()
        ]

    def scores(self) -> list[Tensor]:
        """What the responses earn."""
        generator = random.Random(SEED + 2)
        return [torch.tensor(generator.gauss(0, 1)) for _ in range(self.batch_size)]

    def orders(self, number: int) -> list[list[int]]:
        """The order of the rows in each pass of the iteration ``number``."""
        generator = torch.Generator().manual_seed(number)
        return [torch.randperm(self.batch_size, generator=generator).tolist() for _ in range(self.ppo_epochs)]


WORKLOADS = {
    "W1": Workload("smollm2", 16, (4, 16), (16, 16), 4, 2, 7),
    "W2": Workload("smollm2", 16, (8, 64), (8, 48), 4, 4),
    "W3": Workload("tiny", 64, (4, 16), (24, 24), 16, 4, 9),
    # As many tokens as W2 in rows that are all alike: what raggedness costs.
    "W2 even": Workload("smollm2", 16, (36, 36), (28, 28), 4, 4),
}


def peak_mb() -> float:
    """The most memory that this process had; getrusage counts what it was forked from as well."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def serve(commands: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer the benchmark's commands, a line of JSON each, until there are no more."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        found = commands[asked["command"]](asked)
        found["peak_mb"] = peak_mb()
        print(json.dumps(found), file=answers, flush=True)


def arguments() -> tuple[Workload, Path, Path]:
    """The workload, the model's directory and one for what is exchanged, from the command line."""
    return WORKLOADS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
