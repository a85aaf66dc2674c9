"""Sequences of unequal lengths end to end in one row, so that no pass spends anything on padding.

Only attention knows where one sequence ends and the next begins: all else in a decoder-only model looks at one token
at a time. transformers lets a model's attention be another function, which is how ours gets to see the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_ppo.ppo.tensors import length_mask, runs

PACKED = "rlhf_ppo_packed"
"""The name of our attention among those of transformers."""
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""How far packed logits may be from plain ones, in standard deviations of the logits: rounding, and nothing else."""


@dataclass(frozen=True)
class Layout:
    """Where packed sequences lie: their first places, and the positions (1, tokens) of all tokens in their sequence."""

    lengths: list[int]
    starts: list[int]
    positions: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Layout:
        """The layout of sequences of these lengths, on the host."""
        return cls(list(lengths), list(accumulate(lengths, initial=0))[:-1], runs([0] * len(lengths), lengths)[None])

    @property
    def ragged(self) -> bool:
        """Whether the lengths differ."""
        return min(self.lengths) < max(self.lengths)

    @cached_property
    def padded(self) -> Tensor:
        """(sequences * longest,): the places of a right-padded batch's tokens in the row; 0 where there is padding."""
        places = torch.tensor(self.starts)[:, None] + torch.arange(max(self.lengths))
        return torch.where(length_mask(self.lengths), places, 0).flatten().to(self.positions.device)

    @cached_property
    def kept(self) -> Tensor:
        """(tokens,): the places of the row's tokens in that batch."""
        return length_mask(self.lengths).flatten().nonzero().squeeze(1).to(self.positions.device)

    def to(self, device: torch.device) -> Layout:
        """The same on ``device``."""
        return replace(self, positions=self.positions.to(device))


_current: ContextVar[Layout] = ContextVar("layout")


@contextmanager
def attending(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Let ``model`` read a row that is packed as ``layout`` says."""
    config: Any = model.config
    before, token = config._attn_implementation, _current.set(layout)
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before
        _current.reset(token)


_found: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def packs(model: nn.Module) -> bool:
    """Whether ``model`` reads packed sequences as it reads each by itself; tried once, on a few tokens.

    False where its attention is not torch's, or it mixes tokens elsewhere (states, convolutions), too.
    """
    if model not in _found:
        _found[model] = _tried(model)
    return _found[model]


@torch.no_grad()
def _tried(model: Any) -> bool:
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    embeddings = model.get_input_embeddings().weight
    layout = Layout.of([5, 1, 3]).to(embeddings.device)
    ids = torch.arange(1, 10, device=embeddings.device)[None] % len(embeddings)
    training = model.training
    model.eval()
    try:
        alone = [_said(model(input_ids=row, use_cache=False)) for row in ids.split(layout.lengths, 1)]
        with attending(model, layout):
            packed = _said(model(input_ids=ids, position_ids=layout.positions, use_cache=False))
    except (TypeError, ValueError, RuntimeError, KeyError):
        return False
    finally:
        model.train(training)
    plain = torch.cat(alone).float()
    allowed = AGREEMENT.get(packed.dtype, 0.0) * plain.std()
    return bool((packed.float() - plain).abs().max() <= allowed)


def _said(output: Any) -> Tensor:
    """The logits of a language model, or the states of one without a head, (tokens, n)."""
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found[0]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Causal attention of each packed sequence to itself; query, key and value are (1, heads, tokens, size).

    Sequences are padded for this alone. No token attends to what is padded, which stands to its right.
    """
    layout, window = _current.get(), more.get("sliding_window")
    longest, mask = max(layout.lengths), None
    query, key, value = (_apart(states, layout) for states in (query, key, value))
    if window is not None and window < longest:
        places = torch.arange(longest, device=query.device)
        distance = places[:, None] - places
        mask = ((distance >= 0) & (distance < window))[None, None]
    found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **{**more, "is_causal": mask is None})
    rows = found.flatten(0, 1)
    if layout.ragged:
        rows = _Choose.apply(rows, layout.kept, layout.padded, True)
    return rows[None], None


def _apart(states: Tensor, layout: Layout) -> Tensor:
    """(1, heads, tokens, size) as a right-padded batch (sequences, heads, longest, size)."""
    rows = states[0].transpose(0, 1)
    if layout.ragged:
        rows = _Choose.apply(rows, layout.padded, layout.kept, False)
    return rows.unflatten(0, (len(layout.lengths), -1)).transpose(1, 2)


class _Choose(torch.autograd.Function):
    """Rows by number. Going back is choosing as well, with ``inverse``: what was padded has no gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, chosen: Tensor, inverse: Tensor, shrinks: bool) -> Tensor:
        ctx.save_for_backward(chosen, inverse)
        ctx.shrinks, ctx.size = shrinks, len(rows)
        return rows.index_select(0, chosen)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        chosen, inverse = ctx.saved_tensors
        if not ctx.shrinks:
            return gradient.index_select(0, inverse), None, None, None
        whole = gradient.new_zeros((ctx.size, *gradient.shape[1:]))
        return whole.index_copy_(0, chosen, gradient), None, None, None


def _mask(*_: Any, **__: Any) -> None:
    """None is needed: the attention knows the layout."""
    return None


ALL_ATTENTION_FUNCTIONS.register(PACKED, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, _mask)
