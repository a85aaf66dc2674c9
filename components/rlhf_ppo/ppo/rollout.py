"""What one batch of responses is judged by: log-probabilities of policy and reference, values, KL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_ppo.ppo.advantages import full_kl
from rlhf_ppo.ppo.models import PolicyWithValueHead, Sequences, decoder_start, evaluating, response_logits
from rlhf_ppo.ppo.tensors import logprob_and_entropy, token_logprobs

SCORING_TOKENS = 1024
"""Padded tokens in one forward pass without gradients: bounds the memory of its logits."""


@dataclass(frozen=True)
class Rollout:
    """Queries, responses, and what the policy that sampled them said per response token; lists of 1-D rows.

    ``masks`` has a row of booleans per response where only some of its tokens are the policy's own (a conversation of
    several turns); None where all are.
    """

    queries: list[Tensor]
    responses: list[Tensor]
    logprobs: list[Tensor]
    values: list[Tensor]
    masks: list[Tensor] | None = None

    def ended(self, eos_token_ids: Sequence[int]) -> list[bool]:
        """Whether each response ends with an end token."""
        return [len(response) > 0 and int(response[-1]) in eos_token_ids for response in self.responses]


def batches_by_length(lengths: Sequence[int], tokens: int = SCORING_TOKENS) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, each of at most ``tokens`` padded tokens (or one row)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _batches(
    queries: Sequence[Tensor], responses: Sequence[Tensor], length: int | None, start: int | None
) -> Iterator[tuple[list[int], list[int], Sequences]]:
    lengths = [length or len(query) + len(response) for query, response in zip(queries, responses, strict=True)]
    for rows in batches_by_length(lengths):
        sequences = Sequences.of([queries[row] for row in rows], [responses[row] for row in rows], length, start)
        yield rows, [len(responses[row]) for row in rows], sequences


def _place(into: list[Tensor], rows: list[int], sizes: list[int], values: Tensor) -> None:
    for row, part in zip(rows, values.split(sizes), strict=True):
        into[row] = part


@torch.no_grad()
def response_logprobs(
    model: nn.Module,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    length: int | None = None,
) -> list[Tensor]:
    """Log-probability of every response token under ``model``, one 1-D row per response; dropout is off."""
    found = [torch.empty(0)] * len(queries)
    with evaluating(model):
        for rows, sizes, sequences in _batches(queries, responses, length, decoder_start(model)):
            logits, _ = response_logits(model, sequences)
            _place(found, rows, sizes, token_logprobs(logits / temperature, sequences.tokens))
    return found


@torch.no_grad()
def score_with_policy(
    policy: PolicyWithValueHead,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    length: int | None = None,
) -> Rollout:
    """The rollout of responses that were sampled elsewhere."""
    logprobs, values = [torch.empty(0)] * len(queries), [torch.empty(0)] * len(queries)
    with evaluating(policy):
        for rows, sizes, sequences in _batches(queries, responses, length, policy.decoder_start):
            logp, value, _ = policy(sequences, temperature)
            _place(logprobs, rows, sizes, logp)
            _place(values, rows, sizes, value)
    return Rollout(list(queries), list(responses), logprobs, values)


@torch.no_grad()
def critic_values(
    policy: PolicyWithValueHead, queries: Sequence[Tensor], responses: Sequence[Tensor], length: int | None = None
) -> list[Tensor]:
    """The separate critic's value before every response token, one 1-D row per response."""
    found = [torch.empty(0)] * len(queries)
    with evaluating(policy):
        for rows, sizes, sequences in _batches(queries, responses, length, policy.decoder_start):
            _place(found, rows, sizes, policy.critic_values(sequences))
    return found


@torch.no_grad()
def response_entropies(
    model: nn.Module, queries: Sequence[Tensor], responses: Sequence[Tensor], *, temperature: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probability and entropy (nats) at every response token under ``model``; 1-D rows."""
    logprobs, entropies = [torch.empty(0)] * len(queries), [torch.empty(0)] * len(queries)
    with evaluating(model):
        for rows, sizes, sequences in _batches(queries, responses, None, decoder_start(model)):
            logits, _ = response_logits(model, sequences)
            logp, entropy = logprob_and_entropy(logits / temperature, sequences.tokens)
            _place(logprobs, rows, sizes, logp)
            _place(entropies, rows, sizes, entropy)
    return logprobs, entropies


@torch.no_grad()
def response_full_kl(
    policy: nn.Module,
    reference: Callable[[], AbstractContextManager[nn.Module]],
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    length: int | None = None,
) -> list[Tensor]:
    """KL(policy || reference) over the vocabulary at every response token; only one batch's logits are ever held.

    ``reference`` opens a context that gives the reference model (which may be the policy without its adapters).
    """
    found = [torch.empty(0)] * len(queries)
    with evaluating(policy):
        for rows, sizes, sequences in _batches(queries, responses, length, decoder_start(policy)):
            logits, _ = response_logits(policy, sequences)
            with reference() as model:
                ref_logits, _ = response_logits(model, sequences)
            _place(found, rows, sizes, full_kl(logits / temperature, ref_logits / temperature))
    return found
