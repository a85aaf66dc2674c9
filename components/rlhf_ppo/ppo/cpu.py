"""What makes a CPU fast: matrix products by oneDNN, no gradient rows that are zero, and memory that is kept.

The numbers stay those of torch's own operations but for rounding.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.ppo.products import by_onednn, weight_gradient

LEAST_WEIGHTS = 1 << 16
"""Weights of a layer from which oneDNN is worth the call."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of mallopt(3)."""
KEPT = 32 << 20
"""Bytes of the largest tensor whose memory is kept: the most that glibc takes."""


def keep_memory() -> None:
    """Let this process keep the memory that tensors give back, on Linux with glibc.

    By default many tensors are taken from the kernel and given back to it, and the kernel clears each page anew: a
    tenth of an update's time. Those larger than ``KEPT`` still are, so that no holes of their size are left.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(_MMAP_THRESHOLD, KEPT)
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
            # What one thread gives back, another one may take.
            libc.mallopt(_ARENA_MAX, 1)


def fuse(model: nn.Module, *, alone: bool) -> None:
    """Let the linear layers of ``model`` compute with oneDNN where they are large and fp32.

    With ``alone`` (one process: nobody waits for the gradient of a weight) embeddings that are the head, too, add the
    few rows of their gradient to the head's.
    """
    if not torch.backends.mkldnn.is_available():
        return
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    for module in linear:
        if module.weight.numel() >= LEAST_WEIGHTS:
            module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
    tied = {id(module.weight) for module in linear} if alone else set()
    for embedding in model.modules():
        if type(embedding) is nn.Embedding and id(embedding.weight) in tied:
            embedding.forward = MethodType(_lookup, embedding)  # type: ignore[method-assign]


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """Lay the weights of ``model``'s linear layers out anew, inside, for sampling with ``rows`` tokens at a time.

    That takes the memory of the weights once more, which gradients have at other times.
    """
    found = [module for module in model.modules() if getattr(module.forward, "__func__", None) is _linear]
    try:
        for module in found:
            weight: Any = module.weight
            module._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        yield
    finally:
        for module in found:
            module.__dict__.pop("_packed", None)


def _linear(module: nn.Linear, states: Tensor) -> Tensor:
    plain = states.dtype == module.weight.dtype == torch.float32 and states.device.type == "cpu"
    if not plain or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(states, module.weight, module.bias)
    if torch.is_grad_enabled():
        found: Tensor = _Linear.apply(states, module.weight, module.bias)
        return found
    return by_onednn(states, module.__dict__.get("_packed", module.weight), module.bias)


class _Linear(torch.autograd.Function):
    """A linear layer; its gradient to the weights is MKL's where that is the faster one."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return by_onednn(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weight = ctx.saved_tensors
        of_states, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            by_onednn(gradient, weight.t()) if of_states else None,
            weight_gradient(rows, states.flatten(0, -2)) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _lookup(module: nn.Embedding, ids: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or not module.weight.requires_grad or module.weight.device.type != "cpu":
        return nn.functional.embedding(ids, module.weight, module.padding_idx)
    found: Tensor = _Lookup.apply(module.weight, ids, module.padding_idx)
    return found


class _Lookup(torch.autograd.Function):
    """Rows of a tied embedding. torch would make a gradient of all rows, nearly all zero, and add it to the head's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.weight, ctx.ids, ctx.padding = weight, ids, padding
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        weight, ids, rows = ctx.weight, ctx.ids.flatten(), gradient.flatten(0, -2)
        if ctx.padding is not None:
            rows = torch.where((ids == ctx.padding)[:, None], 0, rows)

        def add() -> None:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.index_add_(0, ids, rows)

        # The head's gradient is there when the whole backward pass has ended.
        torch.autograd.Variable._execution_engine.queue_callback(add)
        return None, None, None
