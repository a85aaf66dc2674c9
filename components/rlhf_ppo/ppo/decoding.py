"""Sampling from a model whose layers are written out: rows on their way, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf_ppo.ppo.attention import turn
from rlhf_ppo.ppo.llama import Llama, filled, normed_by, turns_at
from rlhf_ppo.ppo.packing import Layout
from rlhf_ppo.ppo.products import AVX512, BY_ONEDNN, even, fill, laid, stay_few
from rlhf_ppo.ppo.tensors import runs

BY_PRODUCTS = not AVX512 or BY_ONEDNN
"""Whether a token attends by two products, the faster way. With Intel's AVX-512 MKL rounds a row by their number."""


class Decoder:
    """Keys and values of what rows have read, with room for what will come.

    Shorter queries stand to the right: the newest token of every row has the same column. A query that several rows
    have is read once.
    """

    @torch.inference_mode()
    def __init__(self, model: Llama, queries: list[Tensor], room: int) -> None:
        self.model = model
        lengths = torch.tensor([len(query) for query in queries])
        self.column = int(lengths.max())
        # What is read, each query once, and which of it is each row's
        read: dict[tuple[int, ...], int] = {}
        which = [read.setdefault(tuple(query.tolist()), len(read)) for query in queries]
        self.layout = Layout.of([len(query) for query in read])
        self.seen, self.ids = lengths, torch.tensor([token for query in read for token in query])
        # Where each row's tokens stand there, and the last of them
        starts = torch.tensor(self.layout.starts)[which]
        self.sources, self.ends = runs(starts.tolist(), lengths.tolist()), starts + lengths - 1
        missing, columns, keys = self.column - lengths, self.column + room, model.keys
        # (rows, 1, columns): what is added to scores
        hidden = torch.arange(columns) < missing[:, None, None]
        self.mask = model.head.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        # The places of keys, and then of values, of each token and head
        rows = torch.arange(len(queries)).repeat_interleave(lengths)
        positions = self.layout.positions[0][self.sources]
        firsts = (rows * keys * columns + missing[rows] + positions)[:, None, None]
        kinds = torch.arange(2)[:, None] * len(queries) * keys * columns
        self.places = (firsts + kinds + torch.arange(keys) * columns).flatten()
        # Keys and values
        self.memory = [model.head.new_zeros(2, len(queries), keys, columns, model.size) for _ in model.layers]
        self.turns = model.turns(self.column + room)

    @torch.inference_mode()
    def start(self) -> Tensor:
        """Last hidden states (rows, hidden) at the ends of the queries."""
        model, turns = self.model, turns_at(self.turns, self.layout.positions[0], filled(len(self.ids)))
        states, packed = model.embedded(self.ids), model.attention(self.layout, turned=True)
        for layer, memory in zip(model.layers, self.memory, strict=True):

            def attend(heads: Tensor, memory: Tensor = memory) -> tuple[Tensor, Any]:
                turn(heads[:, : model.queries + model.keys], turns)
                read = heads[:, model.queries :].index_select(0, self.sources).view(-1, model.size)
                memory.view(-1, model.size).index_copy_(0, self.places, read)
                return packed(heads)

            states, _ = model.through(layer, states, attend, self.ends if layer is model.layers[-1] else None)
        return normed_by(model.norm, states).states

    @torch.inference_mode()
    def next(self, tokens: Tensor) -> Tensor:
        """Last hidden states (rows, hidden) after ``tokens`` (rows,)."""
        model, rows, here = self.model, tokens.shape[0], self.column
        # Few rows stay as few, each in one piece.
        few = all(stay_few(weight, rows) for weight in model.layers[0].weights)
        count = even(rows) if few or rows == 1 else filled(rows)
        states = model.embeddings.index_select(0, fill(tokens, count))
        states = states if few else laid(states)
        turns = turns_at(self.turns, self.seen, count)
        self.seen, self.column = self.seen + 1, self.column + 1
        mask = self.mask[..., : self.column].repeat_interleave(model.keys, 0)
        for layer, memory in zip(model.layers, self.memory, strict=True):

            def attend(heads: Tensor, memory: Tensor = memory) -> tuple[Tensor, None]:
                turn(heads[:, : model.queries + model.keys], turns)
                memory[:, :, :, here] = heads[:rows, model.queries :].unflatten(1, (2, -1)).transpose(0, 1)
                # Heads that share keys are queries of one: nothing is copied for each.
                asked = heads[:rows, : model.queries].reshape(rows * model.keys, -1, model.size)
                keys, values = memory.flatten(1, 2)[:, :, : self.column]
                found = attend_to(asked, keys, values, mask, model.scale)
                return fill(found.view(rows, -1), count), None

            states, _ = model.through(layer, states, attend)
        return normed_by(model.norm, states[:rows]).states

    @torch.inference_mode()
    def batch_select_indices(self, rows: Tensor) -> None:
        """Go on with ``rows`` alone."""
        self.memory = [memory.index_select(1, rows) for memory in self.memory]
        self.seen, self.mask = self.seen[rows], self.mask[rows]


def attend_to(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """What ``queries`` (n, m, size) find in ``values`` by ``keys``, (n, columns, size); ``mask`` is (n, 1, columns)."""
    if BY_PRODUCTS:
        return torch.baddbmm(mask, queries, keys.mT, alpha=scale).softmax(-1).bmm(values)
    return scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None], mask[:, None], scale=scale)
