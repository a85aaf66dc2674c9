"""Sampling responses, with the log-probabilities and values that the policy had while it sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from rlhf_ppo.ppo.cpu import prepacked
from rlhf_ppo.ppo.decoding import Decoder
from rlhf_ppo.ppo.llama import Llama, written_out
from rlhf_ppo.ppo.models import (
    ValueHead,
    accepts,
    decoder_output,
    decoder_start,
    device_of,
    evaluating,
    head_input,
)
from rlhf_ppo.ppo.sequences import Padding, check_lengths
from rlhf_ppo.ppo.tensors import length_mask, pad_rows

ASKED_EVERY = 8
"""With fixed shapes: the tokens after which the host asks whether all responses have ended."""

PREPACKED_FROM = 8
"""The tokens from which it pays, on a CPU, to lay the weights out for sampling."""


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


@dataclass
class Generated:
    """Responses and, per response token, log-probability and (with a value head) value; 1-D rows on the host."""

    responses: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def draw(rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (rows, tokens) in fp64, one for each token that may be sampled.

    Drawn on the CPU and all at once, so that a response depends neither on the batch nor on the device or process in
    which it is sampled.
    """
    return torch.rand(rows, tokens, generator=generator, dtype=torch.float64)


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
) -> Generated:
    """Sample one response to each of the 1-D ``queries``, in the order given, with the numbers that ``draw`` gave.

    Log-probabilities are those of the tempered policy, before top_k and top_p. Dropout is off. ``progress`` is told how
    many responses are done. With ``padding`` every batch has the same shapes, and ends early where ``agreed`` says
    so, given whether all responses have ended. ``mark_step`` is called after every token.
    """
    done = Generated()
    size = min(batch_size, len(queries))
    written = written_out(model) if padding is None else None
    packed = written is None and sampling.max_new_tokens >= PREPACKED_FROM
    with evaluating(model), prepacked(model, size) if packed else nullcontext():
        for start in range(0, len(queries), batch_size):
            chunk = slice(start, start + batch_size)
            part, here = list(queries[chunk]), uniform[chunk]
            if written is not None:
                found = _WrittenDecoding(model, part, sampling, here, value_head, written=written).run(mark_step)
            elif padding is None:
                found = _Decoding(model, part, sampling, here, value_head).run(mark_step)
            else:
                # The first row fills the last batch up, and counts once.
                missing = size - len(part)
                whole, numbers = part + part[:1] * missing, torch.cat([here, here[:1].expand(missing, -1)])
                found = _FixedDecoding(model, whole, sampling, numbers, value_head, padding, agreed).run(mark_step)
            done.responses += found.responses[: len(part)]
            done.logprobs += found.logprobs[: len(part)]
            done.values += found.values[: len(part)]
            if progress is not None:
                progress(len(done.responses))
    return done


class _Decoding:
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
        ends = torch.tensor(self.sampling.eos_token_ids, device=self.rows.device)
        for step in range(self.sampling.max_new_tokens):
            # All of them are a part of a table, others are looked up.
            rows = self.rows if self.rows.shape[0] < self.lengths.shape[0] else slice(None)
            logits, hidden = self._forward()
            tokens, logprobs = _choose(logits, self.sampling, self.uniform[rows, step])
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


class _WrittenDecoding(_Decoding):
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


class _FixedDecoding(_Decoding):
    """One batch whose shapes never change: the cache has room for all tokens, and rows that have ended stay."""

    def __init__(
        self,
        model: nn.Module,
        queries: list[Tensor],
        sampling: Sampling,
        uniform: Tensor,
        value_head: ValueHead | None,
        padding: Padding,
        agreed: Callable[[Tensor], bool],
    ) -> None:
        super().__init__(model, queries, sampling, uniform, value_head, padding)
        self.agreed = agreed
        device, rows, new = self.rows.device, len(queries), sampling.max_new_tokens
        room = new if self.encoded is not None else padding.query + new
        kept: Any = StaticCache(
            config=model.config,  # type: ignore[arg-type]
            max_cache_len=room,
            max_batch_size=rows,
            device=device,
            dtype=model.dtype,
        )
        # transformers 4 would look for the first place of the cache that is zero.
        self.places = torch.arange(self.input_ids.shape[1], device=device)
        self._say_where()
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
        sampling, device = self.sampling, self.rows.device
        ends = torch.tensor(sampling.eos_token_ids, device=device)
        ended = torch.zeros(len(self.rows), dtype=torch.bool, device=device)
        step = torch.zeros(1, dtype=torch.long, device=device)
        self.lengths.zero_()
        for number in range(sampling.max_new_tokens):
            logits, hidden = self._forward()
            tokens, logprobs = _choose(logits, sampling, self.uniform.index_select(1, step).squeeze(1))
            self.tokens.index_copy_(1, step, tokens[:, None])
            self.logprobs.index_copy_(1, step, logprobs[:, None])
            if self.value_head is not None:
                self.values.index_copy_(1, step, self.value_head(hidden)[:, None])
            self.lengths += ~ended
            ended = ended | torch.isin(tokens, ends)
            self.input_ids, self.positions, step = tokens[:, None], self.positions + 1, step + 1
            self.places = self.places[-1:] + 1
            self._say_where()
            mark_step()
            # To ask costs a wait for the device.
            if number % ASKED_EVERY == ASKED_EVERY - 1 and self.agreed(ended.all()):
                break
        return self._generated()


def _choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
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
