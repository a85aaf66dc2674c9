"""The statistics of one PPO step, under the names that dashboards of the classic trainers know."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_ppo.ppo.tensors import Reduce, masked_mean, masked_sum

if TYPE_CHECKING:
    from rlhf_ppo.ppo.trainer import Experience


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.times: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Book the time since the last lap under ``name``."""
        now = time.perf_counter()
        self.times[name] = now - self.last
        self.last = now

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.started


def mean_over_minibatches(minibatches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The mean of each statistic over the minibatches, read from the device at once."""
    names = list(minibatches[0])
    table = torch.stack([torch.stack([stats[name].float() for name in names]) for stats in minibatches])
    return dict(zip(names, table.mean(0).tolist(), strict=True))


@torch.no_grad()
def batch_statistics(
    experience: Experience, scores: Tensor, raw_scores: Tensor, reduce: Reduce | None
) -> dict[str, Any]:
    """Statistics of the whole batch, of all processes, as floats.

    ``objective/kl`` is the mean over responses of Σ(logp - ref_logp), in nats; ``objective/entropy`` that of -Σ logp,
    an estimate of the response's entropy. ``scores`` are after scaling and clipping, ``raw_scores`` as given.
    """
    mask = experience.mask
    rows = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    lengths = mask.sum(1).float()
    queries = torch.tensor([float(len(query)) for query in experience.rollout.queries], device=scores.device)
    error = masked_mean((experience.values - experience.returns) ** 2, mask, reduce)
    return_mean = masked_mean(experience.returns, mask, reduce)
    return_var = masked_mean((experience.returns - return_mean) ** 2, mask, reduce)
    per_row = {
        "objective/kl": (experience.logprobs - experience.ref_logprobs).sum(1),
        "objective/entropy": -experience.logprobs.sum(1),
        "ppo/mean_scores": scores,
        "env/reward_mean": raw_scores,
        "tokens/queries_len_mean": queries,
        "tokens/responses_len_mean": lengths,
    }
    stats = {name: float(masked_mean(values, rows, reduce)) for name, values in per_row.items()}
    for name, values in (
        ("ppo/std_scores", scores),
        ("env/reward_std", raw_scores),
        ("tokens/queries_len_std", queries),
        ("tokens/responses_len_std", lengths),
    ):
        stats[name] = float(_std(values, rows, reduce))
    no_score = experience.rewards.sum() - _scores_given(scores, mask)
    tokens = mask.sum() if reduce is None else reduce(mask.sum())
    stats["ppo/mean_non_score_reward"] = float((no_score if reduce is None else reduce(no_score)) / tokens.clamp(min=1))
    stats["ppo/val/var_explained"] = float(1 - error / return_var.clamp(min=1e-12))
    stats["tokens/responses"] = float(tokens)
    return stats


def _scores_given(scores: Tensor, mask: Tensor) -> Tensor:
    return masked_sum(scores, mask.any(1))


def _std(values: Tensor, rows: Tensor, reduce: Reduce | None) -> Tensor:
    mean = masked_mean(values, rows, reduce)
    return masked_mean((values - mean) ** 2, rows, reduce).sqrt()
