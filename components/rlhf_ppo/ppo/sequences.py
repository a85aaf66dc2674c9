"""Queries and responses as one batch of tensors: packed end to end, padded, or of fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.packing import Layout
from rlhf_ppo.ppo.tensors import length_mask, pad_rows, runs


@dataclass(frozen=True)
class Padding:
    """The fixed lengths of static shapes, in tokens: of a prompt, and of prompt and response together."""

    prompt: int
    total: int

    @property
    def response(self) -> int:
        """The fixed length of a response."""
        return self.total - self.prompt

    @property
    def query(self) -> int:
        """The width of a batch of prompts that has a mask.

        transformers goes another way where a mask hides nothing, so that one place more is always hidden.
        """
        return self.prompt + 1


@dataclass(frozen=True)
class Sequences:
    """Queries and responses as one right-padded batch, or packed.

    ``input_ids`` is (batch, length): query and response of a decoder-only model, the query alone where there is an
    encoder. ``index`` (n,) points into the flattened decoder's input at the positions that predict the n response
    tokens ``tokens`` (n,), row by row. A causal model's tokens never see what stands to their right, so that needs no
    attention mask and padding changes nothing; an encoder has ``encoder_mask`` (batch, length), and the decoder reads
    ``decoder_ids`` (batch, response): the start token and the response without its last.

    Packed sequences stand end to end in one row, (1, tokens), as ``layout`` says, for models that can read that; each
    has a response of ``lengths`` tokens.

    With static shapes (``static``) every row has as many entries in ``index`` and ``tokens``: those beyond its response
    mean nothing.
    """

    input_ids: Tensor
    index: Tensor
    tokens: Tensor
    encoder_mask: Tensor | None = None
    decoder_ids: Tensor | None = None
    static: bool = False
    layout: Layout | None = None
    lengths: list[int] | None = None

    @classmethod
    def of(
        cls,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        padding: Padding | None = None,
        decoder_start: int | None = None,
        packed: bool = False,
    ) -> Sequences:
        """Join the 1-D ``queries`` and ``responses``, which the host holds, row by row.

        They are padded to the longest, or as ``padding`` says, or else ``packed``. ``decoder_start`` is an
        encoder-decoder's start token.
        Raises InputError where a row is longer than ``padding``.
        """
        lengths, query_lengths = [len(response) for response in responses], [len(query) for query in queries]
        if padding is None:
            tokens = torch.cat(list(responses))
        else:
            check_lengths(query_lengths, lengths, padding)
            tokens, lengths = pad_rows(responses, 0, padding.response).flatten(), [padding.response] * len(responses)
        if packed and padding is None and decoder_start is None:
            # Nothing comes after a response's last token.
            read = [part for pair in zip(queries, responses, strict=True) for part in (pair[0], pair[1][:-1])]
            both = zip(query_lengths, lengths, strict=True)
            return cls._packed(
                torch.cat(read), [query + max(response - 1, 0) for query, response in both], tokens, lengths
            )
        if decoder_start is None:
            rows = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
            ids = pad_rows(rows, 0, padding.total if padding else None)
            starts = [length - 1 for length in query_lengths]
            index = _positions(starts, lengths, ids.shape[1])
            return cls(ids, index, tokens, static=padding is not None)
        shifted = [torch.cat([row.new_tensor([decoder_start]), row[:-1]]) for row in responses]
        queries_ids = pad_rows(queries, 0, padding.query if padding else None)
        decoder_ids = pad_rows(shifted, 0, padding.response if padding else None)
        return cls(
            queries_ids,
            _positions([0] * len(responses), lengths, decoder_ids.shape[1]),
            tokens,
            length_mask(query_lengths, width=queries_ids.shape[1]).long(),
            decoder_ids,
            padding is not None,
        )

    @classmethod
    def _packed(cls, ids: Tensor, read: list[int], tokens: Tensor, lengths: list[int]) -> Sequences:
        """Rows of which ``read`` tokens of ``ids`` (tokens,) are read, to predict ``lengths`` of ``tokens`` (n,)."""
        layout = Layout.of(read)
        ends = zip(layout.starts, read, lengths, strict=True)
        index = runs([start + count - length for start, count, length in ends], lengths)
        return cls(ids[None], index, tokens, layout=layout, lengths=lengths)

    def of_rows(self, rows: list[int]) -> Sequences:
        """The packed ``rows``."""
        assert self.layout is not None and self.lengths is not None
        firsts = list(accumulate(self.lengths, initial=0))
        read, lengths = [self.layout.lengths[row] for row in rows], [self.lengths[row] for row in rows]
        ids = self.input_ids[0].index_select(0, runs([self.layout.starts[row] for row in rows], read))
        return self._packed(
            ids, read, self.tokens.index_select(0, runs([firsts[row] for row in rows], lengths)), lengths
        )

    def between(self, first: int, last: int) -> Sequences:
        """The packed rows from ``first`` to before ``last``, where they lie."""
        assert self.layout is not None and self.lengths is not None
        read, lengths = self.layout.lengths[first:last], self.lengths[first:last]
        start, before = self.layout.starts[first], sum(self.lengths[:first])
        here, predicted = slice(start, start + sum(read)), slice(before, before + sum(lengths))
        starts = [place - start for place in self.layout.starts[first:last]]
        layout = Layout(read, starts, self.layout.positions[:, here])
        index = self.index[predicted] - start
        return Sequences(self.input_ids[:, here], index, self.tokens[predicted], layout=layout, lengths=lengths)

    def to(self, device: torch.device) -> Sequences:
        """The same on ``device``."""
        if device.type == "cpu":
            return self
        tables: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tables, layout=self.layout.to(device) if self.layout else None)

    def select(self, rows: Tensor) -> Sequences:
        """The rows of static shapes that ``rows`` (n,) names."""
        batch, width = (self.input_ids if self.decoder_ids is None else self.decoder_ids).shape
        moved = (torch.arange(len(rows), device=rows.device) - rows)[:, None] * width
        return Sequences(
            self.input_ids.index_select(0, rows),
            (self.index.view(batch, -1).index_select(0, rows) + moved).flatten(),
            self.tokens.view(batch, -1).index_select(0, rows).flatten(),
            None if self.encoder_mask is None else self.encoder_mask.index_select(0, rows),
            None if self.decoder_ids is None else self.decoder_ids.index_select(0, rows),
            static=True,
        )

    def arguments(self) -> dict[str, Any]:
        """What a model's forward is called with."""
        if self.decoder_ids is None:
            more: dict[str, Any] = {"past_key_values": Nothing()} if self.static else {}
            if self.layout is not None:
                more["position_ids"] = self.layout.positions
            return {"input_ids": self.input_ids, "use_cache": False, **more}
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.encoder_mask,
            "decoder_input_ids": self.decoder_ids,
            "use_cache": False,
        }

    def choose(self, hidden: Tensor) -> Tensor:
        """Of (batch, length, hidden) the n positions that predict a response token, (n, hidden)."""
        return hidden.flatten(0, 1).index_select(0, self.index)


class Nothing(Cache):
    """A cache that keeps nothing. A model that has one does not look at its positions on the host for packed texts."""

    is_compileable = False
    is_sliding = is_linear = is_dummy = [False]  # type: ignore[assignment]

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def __len__(self) -> int:
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The given keys and values."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No token was seen."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The first query is the first token."""
        return 0

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """As many keys as queries (transformers 4 gives their positions), from the first."""
        return (query if isinstance(query, int) else len(query)), 0


def check_lengths(queries: Sequence[int], responses: Sequence[int], padding: Padding) -> None:
    """Raises InputError where a prompt or a response is longer than ``padding``."""
    if max(queries) > padding.prompt:
        raise InputError(
            f"pad_max_input_len={padding.prompt} is less than a prompt of {max(queries)} tokens; none is cut"
        )
    if max(responses, default=0) > padding.response:
        raise InputError(
            f"pad_max_len={padding.total} less pad_max_input_len={padding.prompt} leaves {padding.response} tokens, "
            f"and a response has {max(responses)}; none is cut"
        )


def _positions(starts: Sequence[int], lengths: Sequence[int], width: int) -> Tensor:
    return runs([row * width + start for row, start in enumerate(starts)], lengths)
