"""The statistics of one PPO step, under the names that dashboards of the classic trainers know."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_ppo.ppo.tensors import masked_var

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


@torch.no_grad()
def batch_statistics(
    experience: Experience, scores: Tensor, raw_scores: Tensor, controller_kl: float
) -> dict[str, float]:
    """Statistics of the whole batch, of all processes, as floats.

    ``objective/kl`` is the mean over responses of Σ(logp - ref_logp), in nats, whatever the penalty;
    ``objective/kl_controller`` is what the adaptive coefficient reads. ``objective/entropy`` is the mean of -Σ logp, an
    estimate of a response's entropy; ``ppo/policy/entropy`` is the exact one per token. ``scores`` are after scaling
    and clipping, ``raw_scores`` as given.
    """
    mask, rollout = experience.mask, experience.rollout
    tokens = float(mask.sum())
    lengths = torch.tensor([float(len(response)) for response in rollout.responses])
    queries = torch.tensor([float(len(query)) for query in rollout.queries])
    stats = {
        "objective/kl": float((experience.logprobs - experience.ref_logprobs).sum(1).mean()),
        "objective/kl_controller": controller_kl,
        "objective/entropy": float(-experience.logprobs.sum(1).mean()),
        "ppo/mean_scores": float(scores.mean()),
        "ppo/std_scores": _std(scores),
        "env/reward_mean": float(raw_scores.mean()),
        "env/reward_std": _std(raw_scores),
        "tokens/queries_len_mean": float(queries.mean()),
        "tokens/queries_len_std": _std(queries),
        "tokens/responses_len_mean": float(lengths.mean()),
        "tokens/responses_len_std": _std(lengths),
        "tokens/responses": float(lengths.sum()),
        "ppo/mean_non_score_reward": float((experience.rewards - experience.earned).sum()) / max(tokens, 1.0),
    }
    return stats | {"ppo/val/var_explained": _explained(experience)}


def _std(values: Tensor) -> float:
    """Unbiased standard deviation; 0 for a single value."""
    return float(values.std()) if len(values) > 1 else 0.0


def _explained(experience: Experience) -> float:
    """1 - Var(return - value) / Var(return) over the batch's tokens; 0 where all returns are equal.

    1 is a perfect value function, 0 one that knows no more than a constant; a constant error costs nothing.
    """
    spread = float(masked_var(experience.returns, experience.mask))
    left = float(masked_var(experience.returns - experience.values, experience.mask))
    return 1 - left / spread if spread > 0 else 0.0
