"""The whole of PPO: draw prompts, sample responses, score them, update; until ``steps`` samples are used."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.randomness import random_state, set_random_state
from rlhf_ppo.ppo.rewards import Reward, score, totals
from rlhf_ppo.ppo.rollout import Rollout
from rlhf_ppo.ppo.trainer import PPOTrainer


class Interrupted(BaseException):
    """Ends ``train`` where ``trainer.state_dict`` may be taken; not an Exception, so that no reward swallows it."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as token ids (length,)."""

    text: str
    input_ids: torch.Tensor


@dataclass(frozen=True)
class StepReport:
    """What one PPO step gave: its number from 0, its statistics, and this process' prompts, responses and scores."""

    step: int
    stats: dict[str, Any]
    prompts: list[str]
    responses: list[str]
    scores: list[float]


def check_prompts(prompts: int, batch_size: int, processes: int) -> None:
    """Raises InputError where there are fewer ``prompts`` than a batch of all processes takes."""
    if prompts < batch_size * processes:
        raise InputError(
            f"batch_size={batch_size} on {processes} processes needs {batch_size * processes} prompts, but there are "
            f"{prompts}: give more prompts or a smaller batch_size"
        )


def train(
    trainer: PPOTrainer,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    on_step: Callable[[StepReport], None] | None = None,
    before_step: Callable[[int], None] | None = None,
    before_update: Callable[[int, float], None] | None = None,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    rollout_batch_size: int = 64,
) -> dict[str, Any]:
    """Run config.total_ppo_epochs PPO steps, from where the trainer's state is; returns the statistics of the last.

    Every pass over ``prompts`` has a new order; what is left of a pass, less than a batch, is not used.
    ``before_step`` gets the number of the step about to begin. ``before_update`` gets the step's number and mean raw
    score while the policy is still the one that was scored. What comes before the update runs inside ``interruptible``:
    where that raises Interrupted, everything is put back to the step's beginning.
    Raises InputError where there are fewer prompts than batch_size, or the reward returns something else than scores.
    """
    config = trainer.config
    check_prompts(len(prompts), config.batch_size, config.world_size or 1)
    stats: dict[str, Any] = {}
    for step in range(trainer.steps_done, config.total_ppo_epochs):
        batch = [prompts[row] for row in batch_rows(trainer, len(prompts), step)]
        texts = [prompt.text for prompt in batch]
        if trainer.current is None:
            if before_step is not None:
                before_step(step)
            with _beginning_again(trainer):
                with interruptible():
                    started = time.perf_counter()
                    rollout = trainer.rollout([prompt.input_ids for prompt in batch], batch_size=rollout_batch_size)
                    sampled = time.perf_counter()
                    responses, ids = _decoded(trainer, rollout), [row.tolist() for row in rollout.responses]
                    scores = score(reward, texts, responses, ids)
                    scored = time.perf_counter()
                earned, parts = _of_all(trainer, totals(scores), getattr(reward, "parts", {}))
                if before_update is not None:
                    before_update(step, sum(earned) / len(earned))
                extra = {f"env/reward/{name}": value for name, value in parts.items()}
                extra |= {"time/ppo/rollout": sampled - started, "time/ppo/evaluate": scored - sampled}
                with interruptible():
                    trainer.begin_update(rollout, scores, extra)
        # One that was taken up from a checkpoint inside its update was sampled and scored before.
        stats = trainer.finish_update()
        stats["tokens/per_second"] = stats["tokens/responses"] / stats["time/ppo/total"]
        trainer.log_stats(stats)
        if on_step is not None:
            on_step(_report(trainer, step, stats, texts))
    return stats


class _beginning_again:
    """Puts random streams and moments back where the block is left by Interrupted."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self.sampling, self.elsewhere = self.trainer.sampling_generator.get_state(), random_state(self.trainer.on)
        self.moments = copy.copy(self.trainer.moments)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Interrupted):
            self.trainer.sampling_generator.set_state(self.sampling)
            set_random_state(self.elsewhere, self.trainer.on)
            self.trainer.moments, self.trainer.current = self.moments, None


def _decoded(trainer: PPOTrainer, rollout: Rollout) -> list[str]:
    return [trainer.tokenizer.decode(ids, skip_special_tokens=True) for ids in rollout.responses]


def _of_all(trainer: PPOTrainer, scores: list[float], parts: dict[str, float]) -> tuple[list[float], dict[str, float]]:
    """The scores of all processes, and the means over processes of the reward's parts."""
    if trainer.accelerator.num_processes == 1:
        return scores, parts
    gathered = gather_object([(scores, parts)])
    means = {name: sum(other[name] for _, other in gathered) / len(gathered) for name in parts}
    return [value for other, _ in gathered for value in other], means


def _report(trainer: PPOTrainer, step: int, stats: dict[str, Any], texts: list[str]) -> StepReport:
    """This process' part of the batch that was updated last."""
    update = trainer.last_update
    assert update is not None
    size = trainer.config.batch_size
    here = slice(size * trainer.accelerator.process_index, size * (trainer.accelerator.process_index + 1))
    responses = _decoded(trainer, update.experience.rollout)[here]
    return StepReport(step, stats, texts, responses, update.raw_scores[here].tolist())


def batch_rows(trainer: PPOTrainer, prompts: int, step: int) -> list[int]:
    """The rows of this process' batch in the PPO step ``step``: a function of the seed, so that it needs no state."""
    size, world = trainer.config.batch_size, trainer.accelerator.num_processes
    passed, position = divmod(step, prompts // (size * world))
    generator = torch.Generator().manual_seed(trainer.config.seed)
    for _ in range(passed + 1):
        order = torch.randperm(prompts, generator=generator)
    begin = size * (world * position + trainer.accelerator.process_index)
    return order[begin : begin + size].tolist()
