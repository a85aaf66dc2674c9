"""One batch of responses on its way, token by token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from rlhf_ppo.ppo.decoding import Decoder
from rlhf_ppo.ppo.llama import Llama
from rlhf_ppo.ppo.models import ValueHead, accepts, decoder_output, decoder_start, device_of, head_input
from rlhf_ppo.ppo.sampling import Sampling, choose
from rlhf_ppo.ppo.sequences import Padding, check_lengths
from rlhf_ppo.ppo.tensors import length_mask, pad_rows

ASKED_EVERY = 8
"""With fixed shapes: the tokens after which the host asks whether all responses have ended."""


@dataclass
class Generated:
    """Responses and, per response token, log-probability and (with a value head) value; 1-D rows on the host."""

    responses: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class Decoding:
    """One batch on its way: rows that have ended leave it."""

    def __init__(
        self,
        model: nn.Module,
        queries: list[Tensor],
        sampling: Sampling,
        uniform: Tensor,
        value_head: ValueHead | None,
        padding: Padding | None = None,
    ) -> None:
        self.model, self.sampling, self.value_head = model, sampling, value_head
        device = device_of(model)
        # Gaudi has no fp64: what is drawn moves there as fp32.
        self.uniform = uniform.to(device, torch.float32 if device.type == "hpu" else torch.float64)
        self.rows = torch.arange(len(queries), device=device)
        # Which of them have not ended, and how many
        self.active, self.remaining = torch.ones_like(self.rows, dtype=torch.bool), len(queries)
        self.cache: Any = None
        self.first = True
        self.extra: dict[str, Tensor] = {}
        self.encoded: Tensor | None = None
        self.mask: Tensor | None = None
        self._read(queries, padding, device)
        shape = (len(queries), sampling.max_new_tokens)
        self.tokens = torch.full(shape, sampling.pad_token_id, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.lengths = torch.full((len(queries),), sampling.max_new_tokens, device=device)

    def _read(self, queries: list[Tensor], padding: Padding | None, device: torch.device) -> None:
        """Lay the queries out as the first input; those of an encoder-decoder go through the encoder, once."""
        lengths = [len(query) for query in queries]
        start = decoder_start(self.model)
        width = padding.query if padding else max(lengths)
        if padding is not None:
            check_lengths(lengths, [], padding)
        self.positions = torch.tensor(lengths, device=device) - 1
        if start is None:
            # Left padding: the last column of every row is the newest token.
            flipped = [query.flip(0) for query in queries]
            self.input_ids = pad_rows(flipped, self.sampling.pad_token_id, width).flip(1).to(device)
            if min(lengths) < width:
                self.mask = length_mask(lengths, device, width).flip(1).long()
            return
        padded = pad_rows(queries, self.sampling.pad_token_id, width).to(device)
        self.mask = length_mask(lengths, device, width).long()
        self.encoded = self.model.get_encoder()(input_ids=padded, attention_mask=self.mask)[0]  # type: ignore[operator]
        self.input_ids = torch.full((len(queries), 1), start, device=device)

    def run(self, mark_step: Callable[[], None]) -> Generated:
        """Sample all tokens; ``mark_step`` is called after each."""
        ends = torch.tensor(self.sampling.eos_token_ids, device=self.rows.device)
        for step in range(self.sampling.max_new_tokens):
            # All of them are a part of a table, others are looked up.
            rows = self.rows if self.rows.shape[0] < self.lengths.shape[0] else slice(None)
            logits, hidden = self._forward()
            tokens, logprobs = choose(logits, self.sampling, self.uniform[rows, step])
            self.tokens[rows, step] = tokens
            self.logprobs[rows, step] = logprobs
            if self.value_head is not None:
                self.values[rows, step] = self.value_head(hidden)
            ended = torch.isin(tokens, ends)
            mark_step()
            if bool(ended.any()):
                self.lengths[self.rows[ended]] = self.lengths[self.rows[ended]].clamp(max=step + 1)
                self.active = self.lengths[self.rows] == self.sampling.max_new_tokens
                self.remaining = int(self.active.sum())
            if self.remaining == 0:
                break
            self._advance(tokens)
        return self._generated()

    def _generated(self) -> Generated:
        lengths = self.lengths.tolist()

        def rows(table: Tensor) -> list[Tensor]:
            return [row[:length].clone() for row, length in zip(table.cpu(), lengths, strict=True)]

        return Generated(rows(self.tokens), rows(self.logprobs), rows(self.values) if self.value_head else [])

    def _forward(self) -> tuple[Tensor, Tensor]:
        """Logits (batch, vocabulary) in fp32 and last hidden states (batch, hidden) for the next token."""
        with ExitStack() as stack:
            chosen = stack.enter_context(head_input(self.model, lambda hidden: hidden[:, -1]))
            if self.encoded is None:
                output = self.model(**self._decoder_only_arguments(), **self.extra)
                hidden = chosen[0]
            else:
                caught = stack.enter_context(decoder_output(self.model))
                output = self.model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=self.encoded),
                    attention_mask=self.mask,
                    decoder_input_ids=self.input_ids,
                    past_key_values=self.cache,
                    use_cache=True,
                    **self.extra,
                )
                hidden = caught[0][:, -1]
        self.cache, self.first = output.past_key_values, False
        return output.logits[0].float(), hidden

    def _decoder_only_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"input_ids": self.input_ids, "past_key_values": self.cache, "use_cache": True}
        if self.mask is not None:
            arguments["attention_mask"] = self.mask
            if accepts(self.model, "position_ids"):
                arguments["position_ids"] = self._first_positions() if self.first else self.positions[:, None]
        return arguments

    def _first_positions(self) -> Tensor:
        assert self.mask is not None
        return (self.mask[:, : self.input_ids.shape[1]].cumsum(1) - 1).clamp(min=0)

    def _advance(self, tokens: Tensor) -> None:
        """Make ``tokens`` the next input, without the rows that have ended."""
        self.positions = self.positions + 1
        # Leaving costs a copy of the cache, so rows leave in groups; until then they go on unread.
        if self.remaining <= 0.75 * self.rows.shape[0] and hasattr(self.cache, "batch_select_indices"):
            keep = self.active.nonzero().squeeze(1)
            self.cache.batch_select_indices(keep)
            self.rows, self.positions, tokens = self.rows[keep], self.positions[keep], tokens[keep]
            self.active = self.active[keep]
            self.mask = None if self.mask is None else self.mask[keep]
            self.encoded = None if self.encoded is None else self.encoded[keep]
        if self.mask is not None and self.encoded is None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.input_ids = tokens[:, None]


class WrittenDecoding(Decoding):
    """One batch of a model that is written out."""

    def __init__(self, *given: Any, written: Llama) -> None:
        self.written = written
        super().__init__(*given)

    def _read(self, queries: list[Tensor], padding: Padding | None, device: torch.device) -> None:
        self.cache = Decoder(self.written, queries, self.sampling.max_new_tokens)
        self.positions = self.cache.seen

    def _forward(self) -> tuple[Tensor, Tensor]:
        hidden = self.cache.start() if self.first else self.cache.next(self.input_ids[:, 0])
        self.first = False
        return self.written.logits(hidden), hidden


class _FixedCache(StaticCache):
    """Room for all tokens; keys have the precision of values.

    Under autocast a projection's result has fewer bits, and keys that are turned after it are fp32 again, which
    attention casts anyway, all of them for each token.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Put them in, and give what is there."""
        found: tuple[Tensor, Tensor] = super().update(key_states.to(value_states.dtype), value_states, *more, **named)
        return found


class FixedDecoding(Decoding):
    """One batch whose shapes never change: the cache has room for all tokens, and rows that have ended stay.

    From the second token on all that a token changes is changed in place.
    """

    def __init__(
        self,
        model: nn.Module,
        queries: list[Tensor],
        sampling: Sampling,
        uniform: Tensor,
        value_head: ValueHead | None,
        padding: Padding,
        agreed: Callable[[Tensor], bool] = bool,
    ) -> None:
        super().__init__(model, queries, sampling, uniform, value_head, padding)
        self.agreed = agreed
        device, rows, new = self.rows.device, len(queries), sampling.max_new_tokens
        self.room = new if self.encoded is not None else padding.query + new
        kept: Any = _FixedCache(
            config=model.config,  # type: ignore[arg-type]
            max_cache_len=self.room,
            max_batch_size=rows,
            device=device,
            dtype=model.dtype,
        )
        width = self.input_ids.shape[1]
        # transformers 4 would look for the first place of the cache that is zero.
        self.places = torch.arange(width, device=device)
        self._say_where()
        self.newest = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.place = torch.full((1,), width - 1, device=device)
        self.number = torch.zeros(1, dtype=torch.long, device=device)
        self.ends = torch.tensor(sampling.eos_token_ids, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.lengths.zero_()
        if self.encoded is not None:
            self.cache = EncoderDecoderCache(kept, DynamicCache())
            return
        self.cache = kept
        assert self.mask is not None
        self.mask = torch.cat([self.mask, self.mask.new_ones(rows, new)], 1)

    def _say_where(self) -> None:
        if accepts(self.model, "cache_position"):
            self.extra = {"cache_position": self.places}

    def run(self, mark_step: Callable[[], None]) -> Generated:
        """Sample all tokens; ``mark_step`` is called after each."""
        for number in range(self.sampling.max_new_tokens):
            self._next(number)
            mark_step()
            # To ask costs a wait for the device.
            if number % ASKED_EVERY == ASKED_EVERY - 1 and self.agreed(self.ended.all()):
                break
        return self._generated()

    def _next(self, number: int) -> None:
        """Sample token ``number``."""
        self._token()

    def _token(self) -> None:
        logits, hidden = self._forward()
        tokens, logprobs = choose(logits, self.sampling, self.uniform.index_select(1, self.number).squeeze(1))
        self.tokens.index_copy_(1, self.number, tokens[:, None])
        self.logprobs.index_copy_(1, self.number, logprobs[:, None])
        if self.value_head is not None:
            self.values.index_copy_(1, self.number, self.value_head(hidden)[:, None])
        self.lengths.add_(~self.ended)
        self.ended.logical_or_((tokens[:, None] == self.ends).any(1))
        self.newest.copy_(tokens[:, None])
        for counter in (self.positions, self.place, self.number):
            counter.add_(1)
        self.input_ids, self.places = self.newest, self.place
        self._say_where()
