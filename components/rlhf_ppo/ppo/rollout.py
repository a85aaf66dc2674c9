"""What one batch of responses is judged by: log-probabilities of policy and reference, values, KL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_ppo.ppo.advantages import full_kl
from rlhf_ppo.ppo.llama import Llama, written_out
from rlhf_ppo.ppo.models import PolicyWithValueHead, decoder_start, device_of, evaluating, response_logits
from rlhf_ppo.ppo.packing import packs
from rlhf_ppo.ppo.sequences import Padding, Sequences
from rlhf_ppo.ppo.tensors import logprob_and_entropy, softmax_of, tempered, token_logprobs

SCORING_TOKENS = 1024
"""Padded tokens in one forward pass without gradients: bounds the memory of its logits."""
SCORING_TOKENS_ON_CUDA = 4096
"""The same on an NVIDIA GPU, which would wait for the host with fewer, and reads logits a part at a time."""

LOGITS = 3 << 20
"""Logits that are computed at once, on a CPU: more than fit its cache are slower, and so is fresh memory."""


@dataclass(frozen=True)
class Rollout:
    """Queries, responses, and what the policy that sampled them said per response token; 1-D rows on the host.

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


def batches_by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
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
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    padding: Padding | None,
    model: nn.Module,
    packed: bool,
) -> Iterator[tuple[list[int], Sequences]]:
    """Row numbers in batches, with what ``model`` reads of them, ``packed`` or not, on its device.

    With static shapes all batches have as many rows; the first row fills the last batch up, and counts once.
    """
    lengths = [len(query) + len(response) for query, response in zip(queries, responses, strict=True)]
    size, device = 1, device_of(model)
    tokens = SCORING_TOKENS_ON_CUDA if device.type == "cuda" else SCORING_TOKENS
    if padding is not None:
        lengths = [padding.total] * len(lengths)
        size = min(max(tokens // padding.total, 1), len(lengths))
    start = decoder_start(model)
    for rows in batches_by_length(lengths, tokens):
        whole = rows + rows[:1] * (size - len(rows))
        of_batch = [queries[row] for row in whole], [responses[row] for row in whole]
        sequences = Sequences.of(*of_batch, padding, start, packed)
        yield rows, sequences.to(device)


class _Rows:
    """What a batch's response tokens gave, (n,), as 1-D rows on the host, each as long as its response."""

    def __init__(self, responses: Sequence[Tensor], padding: Padding | None) -> None:
        self.sizes = [len(response) for response in responses]
        self.padding = padding
        self.found = [torch.empty(0)] * len(responses)

    def place(self, rows: list[int], flat: Tensor) -> None:
        sizes = [self.sizes[row] for row in rows]
        parts = flat.cpu().split(sizes if self.padding is None else self.padding.response)
        for row, part, size in zip(rows, parts, sizes, strict=False):
            self.found[row] = part[:size]


class Scorer(nn.Module):
    """The log-probabilities of response tokens: tensors in, a tensor out, so that a device may keep its graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        index: Tensor,
        tokens: Tensor,
        temperature: float,
        encoder_mask: Tensor | None = None,
        decoder_ids: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities (n,) of ``tokens``; the tensors are those of ``Sequences``, of fixed shapes."""
        sequences = Sequences(input_ids, index, tokens, encoder_mask, decoder_ids, static=True)
        return token_logprobs(response_logits(self.model, sequences)[0] / temperature, tokens)


@torch.no_grad()
def response_logprobs(
    model: nn.Module,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    padding: Padding | None = None,
    scorer: nn.Module | None = None,
) -> list[Tensor]:
    """Log-probability of every response token under ``model``, one 1-D row per response; dropout is off.

    With ``padding``, ``scorer`` is the model's ``Scorer`` as a device wants it called.
    """
    found = _Rows(responses, padding)
    written = written_out(model) if padding is None and packs(model) else None
    with evaluating(model):
        for rows, sequences in _batches(queries, responses, padding, model, packs(model)):
            if written is not None:
                logprobs = torch.cat([token_logprobs(*part) for part in _by_parts(written, sequences, temperature)])
            elif scorer is not None:
                logprobs = scorer(
                    sequences.input_ids,
                    sequences.index,
                    sequences.tokens,
                    temperature,
                    sequences.encoder_mask,
                    sequences.decoder_ids,
                )
            else:
                logits, _ = response_logits(model, sequences)
                logprobs = token_logprobs(tempered(logits, temperature), sequences.tokens)
            # A captured graph writes its next answer to the same place.
            found.place(rows, logprobs.clone())
    return found.found


def _by_parts(written: Llama, sequences: Sequences, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (n, vocabulary) and tokens (n,) of some of the places that predict one at a time."""
    assert sequences.layout is not None
    hidden, _ = written.read(sequences.input_ids[0], sequences.layout, sequences.index)
    size = max(LOGITS // len(written.head), 1)
    for states, tokens in zip(hidden.split(size), sequences.tokens.split(size), strict=True):
        yield written.logits(states, temperature), tokens


@torch.no_grad()
def score_with_policy(
    policy: PolicyWithValueHead,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    padding: Padding | None = None,
) -> Rollout:
    """The rollout of responses that were sampled elsewhere."""
    logprobs, values = _Rows(responses, padding), _Rows(responses, padding)
    with evaluating(policy):
        for rows, sequences in _batches(queries, responses, padding, policy.pretrained_model, policy.packs):
            logp, value, _ = policy(sequences, temperature)
            logprobs.place(rows, logp)
            values.place(rows, value)
    return Rollout(list(queries), list(responses), logprobs.found, values.found)


@torch.no_grad()
def critic_values(
    policy: PolicyWithValueHead, queries: Sequence[Tensor], responses: Sequence[Tensor], padding: Padding | None = None
) -> list[Tensor]:
    """The separate critic's value before every response token, one 1-D row per response."""
    found = _Rows(responses, padding)
    with evaluating(policy):
        for rows, sequences in _batches(queries, responses, padding, policy.pretrained_model, policy.packs):
            found.place(rows, policy.critic_values(sequences))
    return found.found


@torch.no_grad()
def response_entropies(
    model: nn.Module,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    padding: Padding | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probability and entropy (nats) at every response token under ``model``; 1-D rows."""
    logprobs, entropies = _Rows(responses, padding), _Rows(responses, padding)
    written = written_out(model) if padding is None and packs(model) else None
    with evaluating(model):
        for rows, sequences in _batches(queries, responses, padding, model, packs(model)):
            if written is not None:
                parts = _by_parts(written, sequences, temperature)
                each = [softmax_of(logits, tokens)[:2] for logits, tokens in parts]
                logp, entropy = (torch.cat(some) for some in zip(*each, strict=True))
            else:
                logits, _ = response_logits(model, sequences)
                logp, entropy = logprob_and_entropy(tempered(logits, temperature), sequences.tokens)
            logprobs.place(rows, logp)
            entropies.place(rows, entropy)
    return logprobs.found, entropies.found


@torch.no_grad()
def response_full_kl(
    policy: nn.Module,
    reference: Callable[[], AbstractContextManager[nn.Module]],
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    padding: Padding | None = None,
) -> list[Tensor]:
    """KL(policy || reference) over the vocabulary at every response token; only one batch's logits are ever held.

    ``reference`` opens a context that gives the reference model (which may be the policy without its adapters).
    """
    found = _Rows(responses, padding)
    with reference() as model:
        packed = packs(policy) and packs(model)
    with evaluating(policy):
        for rows, sequences in _batches(queries, responses, padding, policy, packed):
            logits, _ = response_logits(policy, sequences)
            with reference() as model:
                ref_logits, _ = response_logits(model, sequences)
            found.place(rows, full_kl(tempered(logits, temperature), tempered(ref_logits, temperature)))
    return found.found
