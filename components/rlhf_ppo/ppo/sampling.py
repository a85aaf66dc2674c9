"""How a token is sampled: the numbers that are drawn, and the token that each one names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. A response ends with the first end token, which belongs to it."""

    max_new_tokens: int
    temperature: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = True

    @classmethod
    def for_model(cls, model: Any, max_new_tokens: int, temperature: float = 1.0) -> Sampling:
        """Sampling that ends where the model's generation config says that a text ends."""
        config = model.generation_config
        eos = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
        eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        return cls(max_new_tokens, temperature, eos_ids, config.pad_token_id or 0)


def draw(rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (rows, tokens) in fp64, one for each token that may be sampled.

    Drawn on the CPU and all at once, so that a response depends neither on the batch nor on the device or process in
    which it is sampled.
    """
    return torch.rand(rows, tokens, generator=generator, dtype=torch.float64)


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The next token (batch,) and its log-probability under the tempered policy, from logits (batch, vocabulary).

    ``uniform`` (batch,) in 0 .. 1 says where in the cumulative distribution the token lies.
    """
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp_()
    logsumexp = weights.sum(-1, keepdim=True).log_().add_(largest)
    if not sampling.do_sample:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        if sampling.top_k > 0 or sampling.top_p < 1.0:
            weights = (_restricted(logits, sampling) - largest).exp_()
        tokens = _where_cumulative(weights, uniform)
    return tokens.squeeze(1), (logits.gather(-1, tokens) - logsumexp).squeeze(1)


def _where_cumulative(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first place (batch, 1) up to which the sum of ``weights`` (batch, n) exceeds its share ``uniform`` (batch,).

    Block by block, for a sum of all places in fp64 costs more than all else here.
    """
    rows, places = weights.shape
    size = _block(places)
    missing = -places % size
    blocks = (pad(weights, (0, missing)) if missing else weights).view(rows, -1, size)
    ends = blocks.sum(-1).to(uniform.dtype).cumsum(-1)
    threshold = uniform[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, threshold, right=True).clamp(max=ends.shape[1] - 1)
    before = pad(ends, (1, 0)).gather(1, block)
    here = blocks.gather(1, block[..., None].expand(-1, -1, size)).squeeze(1)
    within = before + here.cumsum(-1, dtype=uniform.dtype)
    # The two sums of a block round differently: beyond the last place that adds something is none.
    last = torch.searchsorted(within, within[:, -1:].contiguous())
    found = block * size + torch.minimum(torch.searchsorted(within, threshold, right=True), last)
    return found.clamp(max=places - 1)  # where weights are NaN, no sum exceeds anything


@cache
def _block(places: int) -> int:
    """Places that are summed one by one, in a token's block: the least divisor from the root on, if not far from it."""
    root = math.isqrt(places)
    return next((size for size in range(max(root, 1), 4 * root) if places % size == 0), 512)


def _restricted(logits: Tensor, sampling: Sampling) -> Tensor:
    """``logits`` with -inf for what top_k and top_p leave out."""
    if sampling.top_k > 0:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        left_out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(left_out, -torch.inf)
    return logits
