"""From scores to rewards per token, advantages and returns.

All arrays are (batch, response): entry t concerns response token t; a value is that of the state before the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.ppo.tensors import whiten


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Estimate of the KL divergence to the reference per token, from log-probabilities (any shape).

    With d = logp - ref_logp: ``kl`` is d (the estimator k1), ``abs`` |d|, ``mse`` ½ d² (k2), and ``k3``
    exp(-d) - 1 + d, which is never negative and has the mean of k1 (Schulman 2020, "Approximating KL divergence").
    ``full``, the exact divergence, needs both distributions: see ``full_kl``.
    Follows TRL 0.11.4, ``PPOTrainer._kl_penalty``, for all but k3.
    """
    difference = logprobs - ref_logprobs
    if kind == "kl":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "mse":
        return 0.5 * difference**2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_penalty={kind!r}: give kl, abs, mse or k3, or use full_kl")


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) over the vocabulary, (n, vocabulary) to (n,), in nats."""
    logp, ref_logp = torch.log_softmax(logits.float(), -1), torch.log_softmax(ref_logits.float(), -1)
    return torch.where(logp.isinf(), 0, logp.exp() * (logp - ref_logp)).sum(-1)


def on_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (batch,) as a table (batch, response): on the last masked token of each row, where there is one."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(positions == last_tokens(mask)[:, None], scores[:, None], 0)


def last_tokens(mask: Tensor) -> Tensor:
    """The place (batch,) of the last masked token of each row of ``mask`` (batch, response); -1 where there is none."""
    return torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(1)


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (batch, response): what each token earned less ``kl_coef`` · penalty, on the masked tokens.

    ``scores`` is (batch,), one for each response, which its last token earns; or (batch, response), one per token.
    A response without tokens earns nothing, and does not fail.
    """
    earned = on_last_token(scores, mask) if scores.dim() == 1 else scores
    return torch.where(mask, earned.to(penalties.dtype) - kl_coef * penalties, 0)


def advantages_and_returns(
    values: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    whiten_rewards: bool = False,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, whitened over the masked tokens; and the returns.

    δ_t = r_t + γ V_{t+1} - V_t and A_t = δ_t + γλ A_{t+1} (Schulman et al. 2016, equations 11 and 16), taken over the
    masked tokens only: a gap in the mask is no time step. Returns are A + V before whitening.
    """
    if whiten_rewards:
        rewards = whiten(rewards, mask, center=False)
    advantages, next_advantage = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(next_advantage)
    columns = zip(*(table.unbind(1) for table in (advantages, mask, rewards, values)), strict=True)
    for advantage, counts, reward, value in reversed([*columns]):
        here = reward + gamma * next_value - value + gamma * lam * next_advantage
        next_advantage = torch.where(counts, here, next_advantage)
        next_value = torch.where(counts, value, next_value)
        advantage.copy_(here)
    advantages = torch.where(mask, advantages, 0)
    returns = torch.where(mask, advantages + values, 0)
    return whiten(advantages, mask), returns
