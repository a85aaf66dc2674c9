"""Causal attention of packed sequences on a CPU and its gradient, written out. Sequences are padded for this alone.

Heads are (columns, queries + keys + values, size): the tokens of all sequences, and columns more of which nothing comes
and which get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.ppo.packing import Layout

SHORT = 48
"""Tokens of a sequence up to which three plain products are faster than torch's kernel, which is made for long ones."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention_of(layout: Layout, columns: int, queries: int, keys: int, scale: float) -> Flash | Products:
    """The attention of ``queries`` heads to ``keys`` heads that is the faster one for the sequences of ``layout``."""
    kind = Products if max(layout.lengths) <= SHORT else Flash
    return kind(layout, columns, queries, keys, scale)


class Flash:
    """torch's kernel: no scores are kept."""

    def __init__(self, layout: Layout, columns: int, queries: int, keys: int, scale: float) -> None:
        self.layout, self.columns, self.scale = layout, columns, scale
        self.queries, self.split = queries, (queries, keys, keys)

    def __call__(self, heads: Tensor) -> tuple[Tensor, Any]:
        """What the queries found, (columns, queries * size), and what ``gradient`` needs."""
        parts = self._apart(heads).transpose(1, 2).split(self.split, 1)
        found, sums = _flash(*parts, 0.0, True, scale=self.scale)
        return self._together(found).flatten(1), (parts, sums)

    def gradient(self, seen: Any, attended: Tensor, gradient: Tensor) -> Tensor:
        """That of the heads from that of ``attended``. No token attends to padding, whose own gradient is zero."""
        parts, sums = seen
        tokens, found = len(self.layout.kept), self._apart(attended.unflatten(1, (self.queries, -1)))
        of_found = gradient.new_zeros(len(self.layout.padded), gradient.shape[1])
        of_found.index_copy_(0, self.layout.kept, gradient[:tokens])
        of_parts = _flash_gradient(
            of_found.view_as(found).transpose(1, 2), *parts, found.transpose(1, 2), sums, 0.0, True, scale=self.scale
        )
        return self._together(torch.cat(of_parts, 1))

    def _apart(self, rows: Tensor) -> Tensor:
        """(sequences, longest, n, size) of rows (columns, n, size)."""
        whole = rows.index_select(0, self.layout.padded)
        return whole.unflatten(0, (len(self.layout.lengths), -1))

    def _together(self, whole: Tensor) -> Tensor:
        """The other way round, of (sequences, n, longest, size)."""
        rows = whole.transpose(1, 2).flatten(0, 1)
        return _chosen(rows, self.layout.kept, rows.new_empty(self.columns, *rows.shape[1:]))


class Products:
    """Scores, their softmax, and values: each one product for all sequences and heads."""

    def __init__(self, layout: Layout, columns: int, queries: int, keys: int, scale: float) -> None:
        self.columns, self.heads, self.keys, self.scale = columns, queries + 2 * keys, keys, scale
        sequences, longest = len(layout.lengths), max(layout.lengths)
        # Heads that share keys stand below each other.
        self.shape = (sequences * keys, queries // keys * longest)
        causal = torch.full((longest, longest), -torch.inf).triu(1)
        self.mask = causal.repeat(queries // keys, 1)
        # Where the queries' rows of each sequence lie among those of the heads, the keys' and the values'; and back.
        self.sizes = [sequences * n * longest for n in (queries, keys, keys)]
        self.apart = torch.cat([_places(layout, self.heads, *part) for part in _split(queries, keys)])
        self.found_apart = _places(layout, queries, 0, queries)
        self.found_together = _way_back(layout, [queries])
        self.together = _way_back(layout, [queries, keys, keys])
        # Padding finds nothing, and nobody learns from it.
        self.real: Tensor | None = None
        if layout.ragged:
            real = torch.zeros(len(layout.padded)).index_fill_(0, layout.kept, 1.0).view(sequences, 1, 1, longest)
            self.real = real.expand(-1, keys, queries // keys, -1).reshape(*self.shape, 1)

    def __call__(self, heads: Tensor) -> tuple[Tensor, Any]:
        """What the queries found, (columns, queries * size), and what ``gradient`` needs."""
        size = heads.shape[-1]
        parts = heads.view(-1, size).index_select(0, self.apart).split(self.sizes)
        query, key, value = (part.view(self.shape[0], -1, size) for part in parts)
        probs = torch.baddbmm(self.mask, query, key.mT, alpha=self.scale).softmax(-1)
        if self.real is not None:
            probs.mul_(self.real)
        found = torch.bmm(probs, value).view(-1, size)
        attended = _chosen(
            found, self.found_together, found.new_empty(self.columns * (self.heads - 2 * self.keys), size)
        )
        return attended.view(self.columns, -1), (query, key, value, probs)

    def gradient(self, seen: Any, attended: Tensor, gradient: Tensor) -> Tensor:
        """That of the heads from that of ``attended``."""
        query, key, value, probs = seen
        size = query.shape[-1]
        of_found = gradient.view(-1, size).index_select(0, self.found_apart).view_as(query)
        of_scores = torch._softmax_backward_data(of_found.bmm(value.mT), probs, -1, probs.dtype).mul_(self.scale)
        found = gradient.new_empty(sum(self.sizes), size)
        of_query, of_key, of_value = found.split(self.sizes)
        torch.bmm(of_scores, key, out=of_query.view_as(query))
        torch.bmm(of_scores.mT, query, out=of_key.view_as(key))
        torch.bmm(probs.mT, of_found, out=of_value.view_as(value))
        heads = _chosen(found, self.together, found.new_empty(self.columns * self.heads, size))
        return heads.view(self.columns, self.heads, size)


def _chosen(rows: Tensor, places: Tensor, into: Tensor) -> Tensor:
    """``into``, that begins with those of ``rows`` that ``places`` names and ends with zeros."""
    torch.index_select(rows, 0, places, out=into[: len(places)])
    into[len(places) :] = 0
    return into


def _split(queries: int, keys: int) -> list[tuple[int, int]]:
    """First head and number of heads of queries, keys and values."""
    return [(0, queries), (queries, keys), (queries + keys, keys)]


def _places(layout: Layout, heads: int, first: int, count: int) -> Tensor:
    """(sequences * count * longest,): where heads ``first`` and on lie among (tokens * heads) rows."""
    padded = layout.padded.view(len(layout.lengths), 1, -1)
    return (padded * heads + first + torch.arange(count)[:, None]).flatten()


def _way_back(layout: Layout, counts: list[int]) -> Tensor:
    """(tokens * heads,): where the heads of each token lie in parts of (sequences, count, longest) rows."""
    longest, parts, first = max(layout.lengths), [], 0
    sequence, position = layout.kept // longest, layout.kept % longest
    for count in counts:
        parts.append(first + (sequence[:, None] * count + torch.arange(count)) * longest + position[:, None])
        first += len(layout.lengths) * count * longest
    return torch.cat(parts, 1).flatten()
