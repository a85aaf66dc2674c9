"""Causal attention of packed sequences on a CPU and its gradient, written out. Sequences are padded for this alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_ppo.ppo.packing import Layout

SHORT = 48
"""Tokens of a sequence up to which three plain products are faster than torch's kernel, which is made for long ones."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class PackedAttention:
    """Attention of ``queries`` heads to ``keys`` heads in each sequence of ``layout``; rows come in ``columns``."""

    def __init__(self, queries: int, keys: int, scale: float, layout: Layout, columns: int) -> None:
        self.layout, self.queries = layout, queries
        self.tokens, self.missing = len(layout.kept), columns - len(layout.kept)
        longest = max(layout.lengths)
        kernel = Products if longest <= SHORT else Flash
        self.kernel = kernel(queries, keys, scale, longest)
        self.shape = (len(layout.lengths), longest)
        # More columns take what stands at a place of padding: its gradient is zero.
        shortest = min(range(len(layout.lengths)), key=layout.lengths.__getitem__)
        padding = shortest * longest + layout.lengths[shortest]
        self.kept = pad(layout.kept, (0, self.missing), value=padding) if layout.ragged else None

    def __call__(self, heads: Tensor) -> tuple[Tensor, Any]:
        """Of heads (columns, queries + keys + values, size), (columns, queries * size), and what ``gradient`` needs."""
        found, seen = self.kernel(self._apart(heads))
        return self._together(found).flatten(1), seen

    def gradient(self, seen: Any, attended: Tensor, gradient: Tensor) -> Tensor:
        """That of the heads from that of ``attended``. No token attends to padding, whose own gradient is zero."""
        of_attended = gradient[: self.tokens]
        if self.layout.ragged:
            of_attended = gradient.new_zeros(len(self.layout.padded), gradient.shape[1])
            of_attended.index_copy_(0, self.layout.kept, gradient[: self.tokens])
        by_head = (*self.shape, self.queries, -1)
        found = self.kernel.gradient(seen, lambda: self._apart(attended).view(by_head), of_attended.view(by_head))
        return self._together(found)

    def _apart(self, rows: Tensor) -> Tensor:
        """(sequences, longest, ...) of rows (columns, ...)."""
        whole = rows.index_select(0, self.layout.padded) if self.layout.ragged else rows[: self.tokens]
        return whole.unflatten(0, self.shape)

    def _together(self, whole: Tensor) -> Tensor:
        """The other way round."""
        rows = whole.flatten(0, 1)
        if self.kept is not None:
            return rows.index_select(0, self.kept)
        return torch.cat([rows, rows.new_zeros(self.missing, *rows.shape[1:])]) if self.missing else rows


class Flash:
    """torch's kernel: no scores are kept."""

    def __init__(self, queries: int, keys: int, scale: float, longest: int) -> None:
        self.split, self.scale = (queries, keys, keys), scale

    def __call__(self, heads: Tensor) -> tuple[Tensor, Any]:
        """Of heads (sequences, longest, queries + keys + values, size), (sequences, longest, queries, size)."""
        parts = heads.transpose(1, 2).split(self.split, 1)
        found, sums = _flash(*parts, 0.0, True, scale=self.scale)
        return found.transpose(1, 2), (parts, sums)

    def gradient(self, seen: Any, attended: Callable[[], Tensor], gradient: Tensor) -> Tensor:
        """That of the heads; ``attended`` gives what was found."""
        parts, sums = seen
        found = _flash_gradient(
            gradient.transpose(1, 2), *parts, attended().transpose(1, 2), sums, 0.0, True, scale=self.scale
        )
        return torch.cat([part.transpose(1, 2) for part in found], 2)


class Products:
    """Scores, their softmax, and values, all at once: heads that share keys stand below each other."""

    def __init__(self, queries: int, keys: int, scale: float, longest: int) -> None:
        self.keys, self.group, self.scale = keys, queries // keys, scale
        causal = torch.full((longest, longest), -torch.inf).triu(1)
        self.mask = causal.repeat(self.group, 1)

    def __call__(self, heads: Tensor) -> tuple[Tensor, Any]:
        """Of heads (sequences, longest, queries + keys + values, size), (sequences, longest, queries, size)."""
        queries = self.keys * self.group
        query, key, value = heads.split((queries, self.keys, self.keys), 2)
        query = self._stacked(query)
        key, value = (part.transpose(1, 2).flatten(0, 1).contiguous() for part in (key, value))
        probs = torch.baddbmm(self.mask, query, key.mT, alpha=self.scale).softmax(-1)
        found = torch.bmm(probs, value).unflatten(0, (-1, self.keys)).unflatten(2, (self.group, -1))
        return found.permute(0, 3, 1, 2, 4).flatten(2, 3), (query, key, value, probs)

    def gradient(self, seen: Any, attended: Callable[[], Tensor], gradient: Tensor) -> Tensor:
        """That of the heads."""
        query, key, value, probs = seen
        of_found = self._stacked(gradient)
        of_scores = torch._softmax_backward_data(of_found.bmm(value.mT), probs, -1, probs.dtype).mul_(self.scale)
        sequences, longest, queries, size = gradient.shape
        found = gradient.new_empty(sequences, longest, queries + 2 * self.keys, size)
        of_query, of_key, of_value = found.split((queries, self.keys, self.keys), 2)
        products = of_scores.bmm(key).unflatten(0, (-1, self.keys)).unflatten(2, (self.group, -1))
        of_query.unflatten(2, (self.keys, -1)).copy_(products.permute(0, 3, 1, 2, 4))
        for part, factors in ((of_key, (of_scores.mT, query)), (of_value, (probs.mT, of_found))):
            part.copy_(torch.bmm(*factors).unflatten(0, (-1, self.keys)).transpose(1, 2))
        return found

    def _stacked(self, query: Tensor) -> Tensor:
        """(sequences * keys, group * longest, size) of (sequences, longest, queries, size)."""
        by_key = query.unflatten(2, (self.keys, -1)).permute(0, 2, 3, 1, 4)
        return by_key.flatten(2, 3).flatten(0, 1).contiguous()
