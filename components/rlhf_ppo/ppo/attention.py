"""Causal attention of packed sequences on a CPU and its gradient, written out. Sequences are padded for this alone.

Heads are (columns, queries + keys + values, size): the tokens of all sequences, and columns more of which nothing comes
and which get no gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor, nn

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
"""Scores that have to be saved by one more group: it costs about fifteen operations more."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Attention:
    """The attention of ``queries`` heads to ``keys`` heads, for each group of sequences of about the same length.

    The heads of all groups are brought together, and what they found is brought back, in one go. Queries and keys are
    turned by ``turns``, cosines and signed sines (positions, size) of the rotations; None where they are already.
    """

    def __init__(
        self,
        layout: Layout,
        columns: int,
        queries: int,
        keys: int,
        scale: float,
        turns: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.columns, self.queries, self.heads = columns, queries, queries + 2 * keys
        self.groups: list[Products | Flash] = []
        self.sizes: list[int] = []
        # Of each group: the first of its rows that turn, how many, the longest sequence, and what they turn by
        self.turned: list[tuple[int, int, int, tuple[Tensor, Tensor]]] = []
        # By numpy, whose calls are short
        lengths, starts = numpy.array(layout.lengths), numpy.array(layout.starts)
        tokens, apart, found_apart = int(lengths.sum()), [], []
        # What is padded is a column more, of which there may be none.
        for sequences in alike(layout.lengths, queries):
            longest = -(-layout.lengths[sequences[0]] // EIGHT) * EIGHT
            shape = len(sequences), longest, queries, keys, scale
            self.groups.append(Products(*shape) if longest <= SHORT else Flash(*shape))
            if turns is not None:
                count = len(sequences) * (queries + keys) * longest
                self.turned.append((sum(self.sizes), count, longest, (turns[0][:longest], turns[1][:longest])))
            self.sizes += [len(sequences) * count * longest for count in (queries, keys, keys)]
            positions = numpy.arange(longest)
            held = starts[sequences, None] + positions
            held[positions >= lengths[sequences, None]] = tokens
            held = held[:, None]
            rows = held * self.heads + numpy.arange(self.heads)[:, None]
            apart += [part.ravel() for part in numpy.split(rows, (queries, queries + keys), 1)]
            found_apart.append((held * queries + numpy.arange(queries)[:, None]).ravel())
        self.apart, self.together = _there_and_back(apart, tokens * self.heads, columns * self.heads)
        self.found_apart, found_together = _there_and_back(found_apart, tokens * queries, columns * queries)
        # What columns more find is what the first token does: nobody asks.
        self.found_together = nn.functional.pad(found_together, (0, (columns - tokens) * queries))
        # What padding finds is not read, and nobody learns from it: it has the gradient of a column more, or none.
        self.real: Tensor | None = None
        if columns == tokens and len(self.found_apart) > tokens * queries:
            real = torch.zeros(len(self.found_apart), 1)
            self.real = real.index_fill_(0, found_together, 1)

    def __call__(self, heads: Tensor) -> tuple[Tensor, Any]:
        """What the queries found, (columns, queries * size), and what ``gradient`` needs."""
        size = heads.shape[-1]
        rows = heads.view(-1, size).index_select(0, self.apart)
        self._turn(rows, 1)
        found = heads.new_empty(self.found_apart.shape[0], size)
        each = zip(self.groups, self._of_groups(rows), self._split(found), strict=True)
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
        self._turn(of_heads, -1)
        whole, known = gradient.new_empty(self.columns * self.heads, size), self.together.shape[0]
        torch.index_select(of_heads, 0, self.together, out=whole[:known])
        whole[known:].zero_()
        return whole.view(self.columns, self.heads, size)

    def _turn(self, rows: Tensor, direction: int) -> None:
        """Turn queries and keys of all groups, or with -1 as ``direction`` turn their gradients back."""
        for first, count, longest, turns in self.turned:
            turn(rows.narrow(0, first, count).view(-1, longest, rows.shape[1]), turns, direction)

    def _split(self, found: Tensor) -> Any:
        """The queries' rows of each group."""
        return found.split_with_sizes(self.sizes[::3]) if len(self.groups) > 1 else [found]

    def _of_groups(self, heads: Tensor) -> Any:
        """The rows of each group's queries, keys and values."""
        parts = heads.split_with_sizes(self.sizes)
        return [parts[first : first + 3] for first in range(0, len(parts), 3)]


def turn(heads: Tensor, turns: tuple[Tensor, Tensor], direction: int = 1) -> None:
    """Turn ``heads`` (..., size) by cosines and signed sines that go with them, or with -1 back."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(turns[0]).addcmul_(swapped, turns[1], value=direction)


class Products:
    """Scores, their softmax, and values: each one product for all sequences and heads of a group."""

    def __init__(self, sequences: int, longest: int, queries: int, keys: int, scale: float) -> None:
        # Heads that share keys stand below each other.
        self.shape, self.longest = (sequences * keys, queries // keys * longest), longest
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


def _there_and_back(parts: list[Any], known: int, count: int) -> tuple[Tensor, Tensor]:
    """Places that are chosen, of ``count``, and where each of the ``known`` first has gone; others are any."""
    there = numpy.concatenate(parts)
    back = numpy.empty(max(int(there.max()) + 1, known), dtype=numpy.int64)
    back[there] = numpy.arange(len(there))
    if len(back) > count:
        there[there >= count] = 0
    return torch.from_numpy(there), torch.from_numpy(back[:known])
