"""Sampling responses, with the log-probabilities and values that the policy had while it sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from rlhf_ppo.ppo.cpu import prepacked
from rlhf_ppo.ppo.llama import written_out
from rlhf_ppo.ppo.models import ValueHead, evaluating
from rlhf_ppo.ppo.replay import Capture, ReplayedDecoding, replays
from rlhf_ppo.ppo.responses import Decoding, FixedDecoding, Generated, WrittenDecoding
from rlhf_ppo.ppo.sampling import Sampling
from rlhf_ppo.ppo.sequences import Padding

PREPACKED_FROM = 8
"""The tokens from which it pays, on a CPU, to lay the weights out for sampling."""


@torch.no_grad()
def sample(
    model: nn.Module,
    queries: Sequence[Tensor],
    sampling: Sampling,
    uniform: Tensor,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    value_head: ValueHead | None = None,
    padding: Padding | None = None,
    mark_step: Callable[[], None] = lambda: None,
    agreed: Callable[[Tensor], bool] = bool,
    capture: Capture | None = None,
) -> Generated:
    """Sample one response to each of the 1-D ``queries``, in the order given, with the numbers that ``draw`` gave.

    Log-probabilities are those of the tempered policy, before top_k and top_p. Dropout is off. ``progress`` is told how
    many responses are done. With ``padding`` every batch has the same shapes, and ends early where ``agreed`` says
    so, given whether all responses have ended. ``mark_step`` is called after every token. With ``capture`` tokens are
    repetitions of one where the model allows that; the numbers are the same.
    """
    done = Generated()
    size = min(batch_size, len(queries))
    written = written_out(model) if padding is None else None
    packed = written is None and sampling.max_new_tokens >= PREPACKED_FROM
    replayed = capture is not None and replays(model, sampling, capture)

    def batch(part: list[Tensor], numbers: Tensor) -> Decoding:
        given = model, part, sampling, numbers, value_head
        if written is not None:
            return WrittenDecoding(*given, written=written)
        if capture is not None and replayed:
            found = ReplayedDecoding(*given, padding=padding, capture=capture)
            if not found.slides:
                return found
        return Decoding(*given) if padding is None else FixedDecoding(*given, padding, agreed)

    with evaluating(model), prepacked(model, size) if packed else nullcontext():
        for start in range(0, len(queries), batch_size):
            chunk = slice(start, start + batch_size)
            part, numbers = list(queries[chunk]), uniform[chunk]
            count = len(part)
            if padding is not None:
                # The first row fills the last batch up, and counts once.
                missing = size - count
                part, numbers = part + part[:1] * missing, torch.cat([numbers, numbers[:1].expand(missing, -1)])
            found = batch(part, numbers).run(mark_step)
            done.responses += found.responses[:count]
            done.logprobs += found.logprobs[:count]
            done.values += found.values[:count]
            if progress is not None:
                progress(len(done.responses))
    return done
