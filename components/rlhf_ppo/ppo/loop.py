"""The whole of PPO: draw prompts, sample responses, score them, update; until ``steps`` samples are used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.rewards import Reward, score
from rlhf_ppo.ppo.trainer import PPOTrainer


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as token ids (length,)."""

    text: str
    input_ids: torch.Tensor


@dataclass(frozen=True)
class StepReport:
    """What one PPO step gave: its number from 0, its statistics, and its prompts, responses and scores."""

    step: int
    stats: dict[str, Any]
    prompts: list[str]
    responses: list[str]
    scores: list[float]


def train(
    trainer: PPOTrainer,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    on_step: Callable[[StepReport], None] | None = None,
    before_update: Callable[[int, float], None] | None = None,
    rollout_batch_size: int = 64,
) -> dict[str, Any]:
    """Run config.total_ppo_epochs PPO steps; returns the statistics of the last.

    Every pass over ``prompts`` has a new order; what is left of a pass, less than a batch, is not used.
    ``before_update`` gets the step's number and mean raw score while the policy is still the one that was scored.
    Raises InputError where there are fewer prompts than batch_size, or the reward returns something else than scores.
    """
    config = trainer.config
    assert config.world_size is not None
    needed = config.batch_size * config.world_size
    if len(prompts) < needed:
        raise InputError(
            f"batch_size={config.batch_size} on {config.world_size} processes needs {needed} prompts, "
            f"but there are {len(prompts)}: give more prompts or a smaller batch_size"
        )
    stats: dict[str, Any] = {}
    batches = _batches(trainer, len(prompts))
    for step in range(trainer.steps_done, config.total_ppo_epochs):
        started = time.perf_counter()
        batch = [prompts[row] for row in next(batches)]
        rollout = trainer.rollout([prompt.input_ids for prompt in batch], batch_size=rollout_batch_size)
        sampled = time.perf_counter()
        texts = [prompt.text for prompt in batch]
        responses = [trainer.tokenizer.decode(ids, skip_special_tokens=True) for ids in rollout.responses]
        scores = score(reward, texts, responses)
        scored = time.perf_counter()
        if before_update is not None:
            before_update(step, sum(scores) / len(scores))
        stats = trainer.update(rollout, scores)
        ended = time.perf_counter()
        stats |= {
            "time/ppo/rollout": sampled - started,
            "time/ppo/evaluate": scored - sampled,
            "time/ppo/total": ended - started,
            "tokens/per_second": stats["tokens/responses"] / (ended - started),
        }
        trainer.log_stats(stats)
        if on_step is not None:
            on_step(StepReport(step, stats, texts, responses, scores))
    return stats


def _batches(trainer: PPOTrainer, prompts: int) -> Iterator[list[int]]:
    """Row numbers of this process' batches, pass after pass."""
    size, world = trainer.config.batch_size, trainer.accelerator.num_processes
    generator = torch.Generator().manual_seed(trainer.config.seed)
    while True:
        order = torch.randperm(prompts, generator=generator).tolist()
        for start in range(0, prompts - size * world + 1, size * world):
            begin = start + size * trainer.accelerator.process_index
            yield order[begin : begin + size]
