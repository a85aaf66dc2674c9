"""From scores to rewards per token, advantages and returns.

All arrays are (batch, response): entry t concerns response token t; a value is that of the state before the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.ppo.tensors import Reduce, whiten


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """KL penalty per token from log-probabilities (any shape), for the kinds kl, abs and mse (½ d²).

    ``full`` needs both distributions: see ``full_kl``. Follows TRL 0.11.4, ``PPOTrainer._kl_penalty``.
    """
    difference = logprobs - ref_logprobs
    if kind == "kl":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "mse":
        return 0.5 * difference**2
    raise ValueError(f"kl_penalty={kind!r}: give kl, abs or mse, or use full_kl")


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) over the vocabulary, (n, vocabulary) to (n,), in nats."""
    logp, ref_logp = torch.log_softmax(logits.float(), -1), torch.log_softmax(ref_logits.float(), -1)
    return torch.where(logp.isinf(), 0, logp.exp() * (logp - ref_logp)).sum(-1)


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef · penalty on every response token, plus the score (batch,) on the last one.

    A response without tokens earns nothing, and does not fail.
    """
    rewards = torch.where(mask, -kl_coef * penalties, 0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(1)
    return rewards + torch.where(mask & (positions == last[:, None]), scores[:, None].to(rewards.dtype), 0)


def advantages_and_returns(
    values: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    whiten_rewards: bool = False,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, whitened over the masked tokens of all processes; and the returns.

    δ_t = r_t + γ V_{t+1} - V_t and A_t = δ_t + γλ A_{t+1} (Schulman et al. 2016, equations 11 and 16), taken over the
    masked tokens only: a gap in the mask is no time step. Returns are A + V before whitening.
    """
    if whiten_rewards:
        rewards = whiten(rewards, mask, center=False, reduce=reduce)
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(next_advantage)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        here = delta + gamma * lam * next_advantage
        next_advantage = torch.where(mask[:, t], here, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], here, 0)
    returns = torch.where(mask, advantages + values, 0)
    return whiten(advantages, mask, reduce=reduce), returns
