"""Masked arithmetic and log-probabilities. A mask is true where the token counts.

Masked-out entries never enter a result, not even as inf or nan: they are replaced, not multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Logits that a device reads at once: those that stay in a CPU's cache, or that take a GPU 128 MB. Others read all."""
HALVES = torch.bfloat16, torch.float16

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
    # Many small operations: numpy's calls are short.
    counts = numpy.array(lengths, dtype=numpy.int64)
    ends = counts.cumsum()
    first = numpy.array(starts, dtype=numpy.int64) - ends + counts
    return torch.from_numpy(numpy.arange(counts.sum()) + first.repeat(counts))


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


class Softmax(NamedTuple):
    """Probabilities (n, vocabulary) as ``weights``, and the ``sums`` (n,) that they are to be divided by."""

    weights: Tensor
    sums: Tensor


def softmax_of(logits: Tensor, tokens: Tensor, *, spare: bool = False) -> tuple[Tensor, Tensor, Softmax]:
    """Log-probabilities of ``tokens`` (n,), entropies in nats (n,) and the softmax, of ``logits`` (n, vocabulary).

    Each sum over the vocabulary is one of torch's that loses little: in fp32 log_softmax and einsum are off by ten
    times as much. Of logits in bf16 or fp16 only some at a time (``AT_ONCE``) are ever in fp32; the softmax then has
    their precision, and all else is fp32. ``spare`` logits become the softmax.
    """
    rows = _rows_at_once(logits)
    chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
    weights = logits if spare else torch.empty_like(logits)
    if logits.shape[0] <= rows:
        largest, sums, products = _read(logits, weights)
    else:
        parts = [_read(*part) for part in zip(logits.split(rows), weights.split(rows), strict=True)]
        largest, sums, products = (torch.cat(of_rows) for of_rows in zip(*parts, strict=True))
    logsumexp = sums.log()
    # entropy = logsumexp - E[logits]
    return chosen - largest - logsumexp, logsumexp - products / sums, Softmax(weights, sums)


def _read(logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the largest, the sum of exp(logit - largest), which is written to ``weights``, and of its products.

    Those are products of weight and logit - largest; entries of -inf count nothing.
    """
    half = logits.dtype in HALVES
    wide = logits.float() if half else logits
    largest = wide.amax(-1)
    shifted = wide - largest[:, None]
    exact = torch.exp(shifted) if half else torch.exp(shifted, out=weights)
    if half:
        weights.copy_(exact)
    # -inf times a weight of 0 is nan.
    return largest, exact.sum(-1), shifted.mul_(exact).nansum(-1)


def _rows_at_once(logits: Tensor) -> int:
    """How many rows of ``logits`` (n, vocabulary) its device reads at once."""
    return max(AT_ONCE.get(logits.device.type, logits.numel()) // logits.shape[-1], 1)


def logits_gradient(gradient: Tensor, softmax: Softmax, tokens: Tensor) -> Tensor:
    """That of the logits (n, vocabulary) from that of the log-probabilities (n,); the weights are written to."""
    weights, sums = softmax
    if weights.dtype not in HALVES:
        return weights.mul_((gradient / sums).neg_()[:, None]).scatter_add_(-1, tokens[:, None], gradient[:, None])
    rows = _rows_at_once(weights)
    parts = (given.split(rows) for given in (weights, sums, gradient, tokens))
    for weights_here, sums_here, gradient_here, tokens_here in zip(*parts, strict=True):
        wide = Softmax(weights_here.float(), sums_here)
        weights_here.copy_(logits_gradient(gradient_here, wide, tokens_here))
    return weights


class _LogprobAndEntropy(torch.autograd.Function):
    """One buffer of the size of the logits, in their precision, from which value, entropy and gradient all come."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy, softmax = softmax_of(logits, tokens)
        ctx.save_for_backward(*softmax, tokens)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        *softmax, tokens = ctx.saved_tensors
        return logits_gradient(gradient, Softmax(*softmax), tokens), None


def logprob_and_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each of ``tokens`` (n,), differentiable, and entropy in nats, not; both (n,) in fp32.

    ``logits`` is (n, vocabulary). The backward pass may run once.
    """
    logprobs, entropy = _LogprobAndEntropy.apply(logits if logits.dtype in HALVES else logits.float(), tokens)
    return logprobs, entropy


@torch.no_grad()
def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each of ``tokens`` (n,) under ``logits`` (n, vocabulary), in fp32.

    Off the CPU, and of logits in bf16 or fp16, only some at a time (``AT_ONCE``) are in fp32.
    """
    whole = logits.device.type == "cpu" and logits.dtype not in HALVES
    rows = logits.shape[0] if whole else _rows_at_once(logits)
    if logits.shape[0] <= rows:
        logits = logits.float()
        return logits.gather(-1, tokens[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)
    return torch.cat([token_logprobs(*part) for part in zip(logits.split(rows), tokens.split(rows), strict=True)])


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """``logits`` over ``temperature``; the same tensor for 1, for a copy of them is large."""
    return logits if temperature == 1.0 else logits / temperature
