"""Causal attention of packed sequences on a CPU and its gradient, written out. Sequences are padded for this alone.

Heads are (columns, queries + keys + values, size): the tokens of all sequences, and columns more of which nothing comes
and which get no gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor

from rlhf_ppo.ppo.packing import Layout

SHORT = 128
"""Tokens of a sequence up to which three plain products are faster than torch's kernel, which is made for long ones.

They keep what each query has for each key, which is little next to the rest for so few.
"""
ALIKE = 0.8
"""The part of a group's longest sequence that each of its others has at least, unless one more group costs more."""
EIGHT = 8
"""The length of a group is a multiple of that, as vectors are: a product of 39 by 39 takes longer than of 40 by 40."""
WORTH = 1 << 15
"""Scores that have to be saved by one more group: it costs about ten operations more."""

HEADS, FOUND = "heads", "found"
"""What stands group by group: queries, keys and values, and what queries found."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Attention:
    """The attention of ``queries`` heads to ``keys`` heads, for each group of sequences of about the same length.

    The heads of all groups are brought together, and what they found is brought back, in one go.
    """

    def __init__(self, layout: Layout, columns: int, queries: int, keys: int, scale: float) -> None:
        self.columns, self.queries, self.heads = columns, queries, queries + 2 * keys
        self.groups: list[Products | Flash] = []
        self.sizes: list[int] = []
        lengths = layout.lengths
        # Of each sequence: how far its heads are apart, and where its first queries, keys, values and finds are
        spans, places = [0] * len(lengths), [[0] * len(lengths) for _ in range(4)]
        ends = {HEADS: 0, FOUND: 0}
        for sequences in alike(lengths, queries):
            longest = -(-lengths[sequences[0]] // EIGHT) * EIGHT
            shape = len(sequences), longest, queries, keys, scale
            self.groups.append(Products(*shape) if longest <= SHORT else Flash(*shape))
            for kind, (of, count) in enumerate(((HEADS, queries), (HEADS, keys), (HEADS, keys), (FOUND, queries))):
                for number, sequence in enumerate(sequences):
                    spans[sequence], places[kind][sequence] = longest, ends[of] + number * count * longest
                ends[of] += len(sequences) * count * longest
                if of == HEADS:
                    self.sizes.append(len(sequences) * count * longest)
        # The same of each token, (tokens, 1), by numpy, whose calls are short
        positions = layout.positions[0].numpy()
        span = numpy.repeat(spans, lengths)[:, None]
        query, key, value, found = (numpy.repeat(places, lengths, 1) + positions)[..., None]
        of_queries, of_keys = span * numpy.arange(queries), span * numpy.arange(keys)
        together = numpy.concatenate([query + of_queries, key + of_keys, value + of_keys], 1).ravel()
        found_together = (found + of_queries).ravel()
        self.together = torch.from_numpy(together)
        # What columns more find is what the first token does: nobody asks.
        self.found_together = torch.from_numpy(numpy.pad(found_together, (0, columns * queries - len(found_together))))
        # What padding finds is not read, and nobody learns from it: it has the gradient of a column more, or none.
        more = columns > len(positions)
        self.apart = _back(together, ends[HEADS])
        self.found_apart = _back(found_together, ends[FOUND], len(found_together) if more else 0)
        self.real: Tensor | None = None
        if len(self.found_apart) > len(found_together) and not more:
            real = numpy.zeros((ends[FOUND], 1), dtype=numpy.float32)
            real[found_together] = 1
            self.real = torch.from_numpy(real)

    def __call__(self, heads: Tensor) -> tuple[Tensor, Any]:
        """What the queries found, (columns, queries * size), and what ``gradient`` needs."""
        size = heads.shape[-1]
        parts = self._of_groups(heads.view(-1, size).index_select(0, self.apart))
        found = heads.new_empty(self.found_apart.shape[0], size)
        each = zip(self.groups, parts, self._split(found), strict=True)
        saw = [group.attend(query, key, value, into) for group, (query, key, value), into in each]
        return found.index_select(0, self.found_together).view(self.columns, -1), saw

    def gradient(self, saw: Any, attended: Tensor, gradient: Tensor) -> Tensor:
        """That of the heads from that of ``attended``."""
        size = gradient.shape[1] // self.queries
        of_found = gradient.view(-1, size).index_select(0, self.found_apart)
        if self.real is not None:
            of_found.mul_(self.real)
        found = [None] * len(self.groups)
        if any(isinstance(group, Flash) for group in self.groups):
            found = self._split(attended.view(-1, size).index_select(0, self.found_apart))
        of_heads = gradient.new_empty(self.apart.shape[0], size)
        for group, *of, parts in zip(
            self.groups, saw, found, self._split(of_found), self._of_groups(of_heads), strict=True
        ):
            group.gradient(*of, *parts)
        whole, known = gradient.new_empty(self.columns * self.heads, size), self.together.shape[0]
        torch.index_select(of_heads, 0, self.together, out=whole[:known])
        whole[known:] = 0
        return whole.view(self.columns, self.heads, size)

    def _split(self, found: Tensor) -> Any:
        """The queries' rows of each group."""
        return found.split_with_sizes(self.sizes[::3])

    def _of_groups(self, heads: Tensor) -> Any:
        """The rows of each group's queries, keys and values."""
        parts = heads.split_with_sizes(self.sizes)
        return [parts[first : first + 3] for first in range(0, len(parts), 3)]


class Products:
    """Scores, their softmax, and values: each one product for all sequences and heads of a group."""

    def __init__(self, sequences: int, longest: int, queries: int, keys: int, scale: float) -> None:
        # Heads that share keys stand below each other.
        self.shape = (sequences * keys, queries // keys * longest)
        self.mask = _causal(longest, queries // keys)
        self.scale = scale

    def attend(self, query: Tensor, key: Tensor, value: Tensor, found: Tensor) -> Any:
        """Write what rows (sequences * heads * longest, size) of queries find; returns what ``gradient`` needs."""
        query, key, value = (part.view(self.shape[0], -1, part.shape[1]) for part in (query, key, value))
        probs = torch.baddbmm(self.mask, query, key.mT, alpha=self.scale).softmax(-1)
        torch.bmm(probs, value, out=found.view_as(query))
        return query, key, value, probs

    def gradient(
        self, saw: Any, found: None, of_found: Tensor, of_query: Tensor, of_key: Tensor, of_value: Tensor
    ) -> None:
        """Write the gradients of queries, keys and values."""
        query, key, value, probs = saw
        of_found = of_found.view_as(query)
        of_scores = torch._softmax_backward_data(of_found.bmm(value.mT), probs, -1, probs.dtype)
        of_query, of_key = of_query.view_as(query), of_key.view_as(key)
        torch.baddbmm(of_query, of_scores, key, beta=0, alpha=self.scale, out=of_query)
        torch.baddbmm(of_key, of_scores.mT, query, beta=0, alpha=self.scale, out=of_key)
        torch.bmm(probs.mT, of_found, out=of_value.view_as(value))


@lru_cache(maxsize=16)
def _causal(longest: int, queries: int) -> Tensor:
    """What is added to scores (queries * longest, longest), those of ``queries`` heads below each other."""
    return torch.full((longest, longest), -torch.inf).triu(1).repeat(queries, 1)


class Flash:
    """torch's kernel: no scores are kept."""

    def __init__(self, sequences: int, longest: int, queries: int, keys: int, scale: float) -> None:
        self.sequences, self.longest, self.scale = sequences, longest, scale

    def attend(self, query: Tensor, key: Tensor, value: Tensor, found: Tensor) -> Any:
        """Write what rows (sequences * heads * longest, size) of queries find; returns what ``gradient`` needs."""
        parts = [self._whole(part) for part in (query, key, value)]
        attended, sums = _flash(*parts, 0.0, True, scale=self.scale)
        self._whole(found).copy_(attended)
        return parts, sums

    def gradient(
        self, saw: Any, found: Tensor, of_found: Tensor, of_query: Tensor, of_key: Tensor, of_value: Tensor
    ) -> None:
        """Write the gradients of queries, keys and values."""
        parts, sums = saw
        of_parts = _flash_gradient(self._whole(of_found), *parts, self._whole(found), sums, 0.0, True, scale=self.scale)
        for into, part in zip((of_query, of_key, of_value), of_parts, strict=True):
            self._whole(into).copy_(part)

    def _whole(self, rows: Tensor) -> Tensor:
        return rows.view(self.sequences, -1, self.longest, rows.shape[1])


def alike(lengths: list[int], heads: int) -> list[list[int]]:
    """Numbers of sequences in groups, so that there is little padding; the longest first."""
    groups: list[list[int]] = []
    numbers = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    for done, number in enumerate(numbers):
        longest, length = lengths[groups[-1][0]] if groups else 0, lengths[number]
        saved = (len(numbers) - done) * (longest**2 - length**2) * heads
        if not groups or (length < ALIKE * longest and saved >= WORTH):
            groups.append([])
        groups[-1].append(number)
    return groups


def _back(places: Any, count: int, padding: int = 0) -> Tensor:
    """(count,): which of ``places``, an array, is each; ``padding`` where none is."""
    found = numpy.full(count, padding)
    found[places] = numpy.arange(len(places))
    return torch.from_numpy(found)
