"""The losses of one minibatch, and the figures that tell how the update goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ppo.ppo.tensors import Reduce


@dataclass(frozen=True)
class MinibatchLoss:
    """The loss's gradients (batch, response), whether to skip it, and its statistics (0-d tensors by dashboard name).

    ``of_logprobs`` and ``of_values`` are the gradients of ``ppo/loss/total``; zeros with ``skip``.
    """

    of_logprobs: Tensor
    of_values: Tensor
    skip: Tensor
    stats: dict[str, Tensor]


@torch.no_grad()
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
    minibatch. ``skip`` is true where the mean ratio exceeds ``ratio_threshold`` or is not finite, and where no token is
    trained: Adam's momentum would move the weights all the same. With ``reduce`` the
    minibatch is spread over processes: statistics and ``skip`` are the same on all of them, and each has its part of
    the gradients.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = torch.exp(log_ratio)
    clipped_ratio = ratio.clamp(1 - cliprange, 1 + cliprange)
    losses, clipped_losses = -advantages * ratio, -advantages * clipped_ratio
    clipped_values = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    distance = values - returns
    errors, clipped_errors = distance**2, (clipped_values - returns) ** 2
    # What is clipped is constant.
    clipped, value_clipped = clipped_losses > losses, clipped_errors > errors

    tokens = mask.sum() if reduce is None else reduce(mask.sum())
    means = _means(
        {
            "ppo/loss/policy": torch.maximum(losses, clipped_losses),
            "ppo/loss/value": 0.5 * torch.maximum(errors, clipped_errors),
            "ppo/policy/entropy": entropy,
            "ppo/policy/approxkl": 0.5 * log_ratio**2,
            "ppo/policy/policykl": -log_ratio,
            "ppo/policy/kl3": ratio - 1 - log_ratio,
            "ppo/policy/clipfrac": clipped.float(),
            "ppo/policy/advantages_mean": advantages,
            "ppo/policy/ratio_mean": ratio,
            "ppo/val/vpred": values,
            "ppo/val/error": errors,
            "ppo/val/clipfrac": value_clipped.float(),
            "ppo/val/mean": old_values,
            "ppo/returns/mean": returns,
        },
        mask,
        tokens,
        reduce,
    )
    squares = {
        "ppo/val/var": (old_values - means["ppo/val/mean"]) ** 2,
        "ppo/returns/var": (returns - means["ppo/returns/mean"]) ** 2,
    }
    stats = means | _means(squares, mask, tokens - 1, reduce)
    stats["ppo/loss/total"] = stats["ppo/loss/policy"] + vf_coef * stats["ppo/loss/value"]
    skip = (stats["ppo/policy/ratio_mean"] > ratio_threshold) | ~torch.isfinite(stats["ppo/loss/total"]) | (tokens == 0)
    # An infinite ratio has infinite gradients: they are replaced, not multiplied by zero.
    left_out, count = skip | ~mask, tokens.clamp(min=1)
    of_logprobs = torch.where(left_out | clipped, 0, losses) / count
    of_values = torch.where(left_out | value_clipped, 0, distance) * (vf_coef / count)
    return MinibatchLoss(of_logprobs, of_values, skip, stats)


def _means(quantities: dict[str, Tensor], mask: Tensor, count: Tensor, reduce: Reduce | None) -> dict[str, Tensor]:
    """Sums over the masked tokens of all processes, divided by ``count`` (at least 1), in one exchange."""
    sums = torch.where(mask, torch.stack([*quantities.values()]), 0).sum((1, 2))
    if reduce is not None:
        sums = reduce(sums)
    return dict(zip(quantities, (sums / count.clamp(min=1)).unbind(), strict=True))
