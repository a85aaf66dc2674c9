"""The losses of one minibatch, and the figures that tell how the update goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ppo.ppo.tensors import Reduce, masked_mean, masked_var


@dataclass(frozen=True)
class MinibatchLoss:
    """The loss to minimise, whether to skip it, and its statistics (0-d tensors by dashboard name)."""

    total: Tensor
    skip: Tensor
    stats: dict[str, Tensor]


def ppo_loss(
    *,
    logprobs: Tensor,
    values: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
    ratio_threshold: float,
    reduce: Reduce | None = None,
) -> MinibatchLoss:
    """Clipped policy loss plus ``vf_coef`` times the clipped value loss; all arrays (batch, response).

    Schulman et al. 2017, equation 7, as in OpenAI's lm-human-preferences: means are over the masked tokens of the
    minibatch (of all processes). ``skip`` is true where the mean ratio exceeds ``ratio_threshold`` or is not finite.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = torch.exp(log_ratio)
    clipped_ratio = ratio.clamp(1 - cliprange, 1 + cliprange)
    policy_losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    clipped_values = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    errors, clipped_errors = (values - returns) ** 2, (clipped_values - returns) ** 2
    value_losses = torch.maximum(errors, clipped_errors)

    def mean(quantity: Tensor) -> Tensor:
        return masked_mean(quantity, mask, reduce)

    # The count is global and the sum local: DDP's average of gradients then is the mean over all processes' tokens.
    count = mask.sum() if reduce is None else reduce(mask.sum())
    scale = 1.0 if reduce is None else _processes(mask, reduce)
    policy_loss = torch.where(mask, policy_losses, 0).sum() / count.clamp(min=1) * scale
    value_loss = 0.5 * torch.where(mask, value_losses, 0).sum() / count.clamp(min=1) * scale
    with torch.no_grad():
        mean_ratio = mean(ratio)
        stats = {
            "ppo/loss/policy": mean(policy_losses),
            "ppo/loss/value": 0.5 * mean(value_losses),
            "ppo/policy/entropy": mean(entropy),
            "ppo/policy/approxkl": 0.5 * mean(log_ratio**2),
            "ppo/policy/policykl": mean(-log_ratio),
            "ppo/policy/kl3": mean(ratio - 1 - log_ratio),
            "ppo/policy/clipfrac": mean((-advantages * clipped_ratio > -advantages * ratio).float()),
            "ppo/policy/advantages_mean": mean(advantages),
            "ppo/policy/ratio_mean": mean_ratio,
            "ppo/val/vpred": mean(values),
            "ppo/val/error": mean(errors),
            "ppo/val/clipfrac": mean((clipped_errors > errors).float()),
            "ppo/val/mean": mean(old_values),
            "ppo/val/var": masked_var(old_values, mask, reduce),
            "ppo/returns/mean": mean(returns),
            "ppo/returns/var": masked_var(returns, mask, reduce),
        }
        stats["ppo/loss/total"] = stats["ppo/loss/policy"] + vf_coef * stats["ppo/loss/value"]
        skip = ~(mean_ratio <= ratio_threshold) | ~torch.isfinite(stats["ppo/loss/total"])
    return MinibatchLoss(policy_loss + vf_coef * value_loss, skip, stats)


def _processes(mask: Tensor, reduce: Reduce) -> Tensor:
    return reduce(torch.ones((), device=mask.device))
