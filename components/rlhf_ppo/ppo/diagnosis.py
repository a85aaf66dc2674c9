"""Why the KL to the reference comes out negative, which no divergence can be, or not finite, and what to change."""

from __future__ import annotations

import math

import torch
from torch import nn

from rlhf_ppo.ppo.experience import Experience
from rlhf_ppo.ppo.rollout import response_entropies
from rlhf_ppo.ppo.sampling import Sampling
from rlhf_ppo.ppo.sequences import Padding
from rlhf_ppo.ppo.tensors import masked_mean, pad_rows

SUSPICIOUS = 3.0
"""Standard errors below zero from which a mean is no accident."""
NEGLIGIBLE = 0.05
"""Nats per response below which nothing is worth a word."""
LOOKED_AT = 64
"""Responses that are gone through once more for the diagnosis."""
PAUSE = 10
"""PPO steps from one diagnosis to the next: it costs a second pass, and a cause that stays would be told in each."""
DIFFERENT = 0.02
"""Nats by which two passes of one model may differ per token, on average."""


@torch.no_grad()
def diagnose_negative_kl(
    policy: nn.Module, experience: Experience, sampling: Sampling, padding: Padding | None = None
) -> str | None:
    """The likeliest cause of a negative ``objective/kl``, or one that is no number, with its remedy; else None.

    The estimate Σ(logp - ref_logp) is right on average only for responses that the policy itself sampled with these
    log-probabilities. For such responses the mean of -logp equals the mean entropy, and a second pass gives the same
    log-probabilities: where either fails, that is the cause.
    """
    difference = (experience.logprobs - experience.ref_logprobs).sum(1)
    mean, error = _mean_and_error(difference)
    if not math.isfinite(mean):
        return _not_finite(experience)
    if mean > -NEGLIGIBLE or mean > -SUSPICIOUS * error:
        return None
    said = f"objective/kl is {mean:.3f} ± {error:.3f}, and a divergence is never negative: "
    if not sampling.do_sample or sampling.top_k > 0 or sampling.top_p < 1:
        return said + (
            f"responses are sampled with do_sample={sampling.do_sample}, top_k={sampling.top_k}, "
            f"top_p={sampling.top_p}, but log-probabilities are those of the whole distribution: "
            "use do_sample=True, top_k=0, top_p=1"
        )
    apart, excess, noise = _second_pass(policy, experience, sampling.temperature, padding)
    if apart > DIFFERENT:
        return said + (
            f"the log-probabilities recorded while sampling differ from a second pass by {apart:.3f} nats per token: "
            "sample in the precision, with the positions and with the adapters that training uses"
        )
    if abs(excess) > SUSPICIOUS * noise:
        side = "less" if excess > 0 else "more"
        return said + (
            f"the responses are {side} likely under the policy than what it samples itself ({excess:+.2f} ± "
            f"{noise:.2f} nats per response): they come from another model, another temperature, a forced or forbidden "
            "token (a minimum length forbids the end), or beam search; sample them with this policy at "
            f"temperature {sampling.temperature:g}"
        )
    return said + (
        "the responses are the policy's own, so this is chance in a batch with few responses: raise batch_size, or let "
        "k3 (never negative) be the penalty and the controller's estimate"
    )


def _not_finite(experience: Experience) -> str:
    """Whose log-probabilities are no numbers, and why that may be."""
    known = {"policy": experience.logprobs, "reference": experience.ref_logprobs}
    rows = {name: int((~values.isfinite()).any(1).sum()) for name, values in known.items()}
    who = " and ".join(f"the {name}'s in {count} of {len(known[name])}" for name, count in rows.items() if count)
    return (
        f"objective/kl is no finite number, for log-probabilities are not finite ({who} responses): "
        "weights are NaN or infinite, or too large for the precision; look at the model's files, lower learning_rate "
        "where this began later, or use model_dtype='float32'"
    )


def _second_pass(
    policy: nn.Module, experience: Experience, temperature: float, padding: Padding | None
) -> tuple[float, float, float]:
    """How far the recorded log-probabilities are from the policy's, in nats per token; and what the responses' mean of
    -logp exceeds their entropy by, in nats per response, with its standard error.
    """
    queries, responses = experience.rollout.queries[:LOOKED_AT], experience.rollout.responses[:LOOKED_AT]
    rows = response_entropies(policy, queries, responses, temperature=temperature, padding=padding)
    mask, recorded = experience.mask[: len(responses)], experience.logprobs[: len(responses)]
    logprobs, entropies = pad_rows(rows[0], 0, mask.shape[1]), pad_rows(rows[1], 0, mask.shape[1])
    excess, noise = _mean_and_error(torch.where(mask, -logprobs - entropies, 0).sum(1))
    return float(masked_mean((recorded - logprobs).abs(), mask)), excess, noise


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), error
