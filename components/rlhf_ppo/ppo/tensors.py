"""Masked arithmetic and log-probabilities. A mask is true where the token counts.

Masked-out entries never enter a result, not even as inf or nan: they are replaced, not multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

AT_ONCE = 1 << 17
"""Logits that a CPU reads at once."""

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all training processes."""


def pad_rows(rows: Sequence[Tensor], value: float = 0, length: int | None = None) -> Tensor:
    """Stack 1-D ``rows`` into (batch, longest row, or ``length``), padded on the right with ``value``."""
    stacked = pad_sequence(list(rows), batch_first=True, padding_value=value)
    return stacked if length is None else pad(stacked, (0, length - stacked.shape[1]), value=value)


def length_mask(lengths: Sequence[int], device: torch.device | None = None, width: int | None = None) -> Tensor:
    """(batch, longest) booleans, true in the first ``lengths[i]`` places of row i."""
    columns = torch.arange(max(lengths) if width is None else width, device=device)
    return columns < torch.tensor(lengths, device=device)[:, None]


def runs(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """``lengths[i]`` numbers that count up from ``starts[i]``, for all i."""
    counts = torch.tensor(lengths)
    ends = counts.cumsum(0)
    return torch.arange(int(ends[-1])) + (torch.tensor(starts) - ends + counts).repeat_interleave(counts)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``values`` where ``mask`` is true."""
    return torch.where(mask, values, 0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is true; 0 where nothing is."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of ``values`` where ``mask`` is true; 0 for fewer than two values.

    TRL's is nan for one value.
    """
    squares = masked_sum((values - masked_mean(values, mask)) ** 2, mask)
    return squares / (mask.sum() - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, center: bool = True) -> Tensor:
    """Scale ``values`` to variance 1, and with ``center`` to mean 0, over the masked entries.

    Masked-out entries come back as 0, so that padding can't leak into what follows (TRL's leak).
    """
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    scaled = (values - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, scaled if center else scaled + mean, 0)


def softmax_of(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of ``tokens`` (n,), entropies in nats (n,) and probabilities, of ``logits`` (n, vocabulary).

    Each sum over the vocabulary is one of torch's that loses little: in fp32 log_softmax and einsum are off by ten
    times as much. A CPU takes as many rows at a time as stay in its cache.
    """
    rows = max(AT_ONCE // logits.shape[-1], 1)
    if logits.device.type != "cpu" or len(logits) <= rows:
        return _softmax_of(logits, tokens)
    whole = torch.empty_like(logits)
    parts = zip(logits.split(rows), tokens.split(rows), whole.split(rows), strict=True)
    found = [_softmax_of(*part)[:2] for part in parts]
    logprobs, entropies = (torch.cat(of_rows) for of_rows in zip(*found, strict=True))
    return logprobs, entropies, whole


def _softmax_of(logits: Tensor, tokens: Tensor, into: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``softmax_of``, all at once; probabilities go ``into`` that."""
    shifted = logits - logits.amax(-1, keepdim=True)
    probs = torch.exp(shifted, out=into)
    sums = probs.sum(-1, keepdim=True)
    logsumexp = sums.log().squeeze(-1)
    logprobs = shifted.gather(-1, tokens[:, None]).squeeze(-1) - logsumexp
    probs.div_(sums)
    # entropy = logsumexp - E[logits]; entries of -inf have probability 0 and count nothing
    shifted.clamp_(min=torch.finfo(shifted.dtype).min)
    return logprobs, logsumexp - torch.linalg.vecdot(probs, shifted), probs


def logits_gradient(gradient: Tensor, probs: Tensor, tokens: Tensor) -> Tensor:
    """That of the logits (n, vocabulary) from that of the log-probabilities (n,); ``probs`` is written to."""
    return probs.mul_(-gradient[:, None]).scatter_add_(-1, tokens[:, None], gradient[:, None])


class _LogprobAndEntropy(torch.autograd.Function):
    """One buffer of the size of the logits, from which value, entropy and gradient all come."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy, probs = softmax_of(logits, tokens)
        ctx.save_for_backward(probs, tokens)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        probs, tokens = ctx.saved_tensors
        return logits_gradient(gradient, probs, tokens), None


def logprob_and_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each of ``tokens`` (n,), differentiable, and entropy in nats, not; both (n,) in fp32.

    ``logits`` is (n, vocabulary). The backward pass may run once.
    """
    logprobs, entropy = _LogprobAndEntropy.apply(logits.float(), tokens)
    return logprobs, entropy


@torch.no_grad()
def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each of ``tokens`` (n,) under ``logits`` (n, vocabulary), in fp32."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)
