"""What makes a CPU fast: matrix products by oneDNN, no gradient rows that are zero, and memory that is kept.

The numbers stay those of torch's own operations but for rounding.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether the processor has it: MKL and oneDNN have other kernels then, which want other shapes."""
BLOCK = 32, 96 if AVX512 else 768
"""Rows of a weight that are multiplied at a time: the fewest, and the most."""
MANY = 16
"""Fewer tokens times a weight take MKL as long as that many, but for a single one."""
COLUMNS = 32
"""Tokens up to which, from ``MANY`` on, a large weight times them is the faster product whichever way they lie."""
BY_BLOCKS = 15 if AVX512 else 128
"""States up to which a product for each block is at least as fast as oneDNN's."""
LEAST_WEIGHTS = 1 << 16
"""Weights of a layer from which oneDNN, or a product for each of several blocks, is worth the call."""
LEAST_OF_HEAD = 1 << 20
"""Weights of a head from which oneDNN is."""
BY_TOKEN = AVX512
"""Whether states (tokens, n) of any width lie in memory token by token: MKL's gradients of states are faster so."""
NARROW = 256
"""The width up to which states lie token by token on any processor: they are the faster product so."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
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
    return _product(states, module.__dict__.get("_packed", module.weight), module.bias)


def _product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``states`` (..., k) times the transpose of ``weight`` (n, k), plus ``bias``."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return found


def product_of_few(states: Tensor, weight: Tensor) -> Tensor:
    """``states`` (n, k) times the transpose of ``weight`` (m, k), for small n: one product for each block of weights.

    Each core then has blocks that stay in its cache. Where there are several, a row rounds the same way however many
    others come with it: fewer than four would be summed in another order.
    """
    blocks, missing = _blocks(len(weight), torch.get_num_threads(), BLOCK), max(4 - len(states), 0)
    filled = pad(states, (0, 0, 0, missing)) if missing else states
    found = torch.bmm(filled.expand(blocks, -1, -1), weight.unflatten(0, (blocks, -1)).mT)
    return found[:, : len(states)].transpose(0, 1).flatten(1)


@cache
def _blocks(rows: int, threads: int, sizes: tuple[int, int]) -> int:
    """In how many equal blocks: two for each thread or more, of as many rows as ``sizes`` allow."""
    least = max(2 * threads, -(-rows // sizes[1]))
    return next((blocks for blocks in range(least, rows // sizes[0] + 1) if rows % blocks == 0), 2 - rows % 2)


def are_few(weight: Tensor, tokens: int) -> bool:
    """Whether so few tokens are worth a product for each block of ``weight``."""
    return 1 < tokens < MANY and weight.numel() >= LEAST_WEIGHTS


def laid(states: Tensor) -> Tensor:
    """``states`` (tokens, n), which lie token by token, as this processor wants them."""
    return states if _by_token(states.shape[1]) else states.t().contiguous().t()


def _by_token(width: int) -> bool:
    """Whether states (tokens, ``width``) lie token by token."""
    return BY_TOKEN or width <= NARROW


def rows_of(states: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` of ``states`` (tokens, n), laid as they are."""
    return states.index_select(0, index) if states.is_contiguous() else states.t().index_select(1, index).t()


def times_by_token(states: Tensor, weight: Tensor) -> Tensor:
    """``states`` (tokens, k) times the transpose of ``weight`` (n, k), token by token: (tokens, n)."""
    if are_few(weight, states.shape[0]):
        return product_of_few(states, weight)
    if _are_columns(weight, states.shape[0]):
        return (weight @ states.t()).t().contiguous()
    return nn.functional.linear(states, weight)


def times(states: Tensor, weight: Tensor) -> Tensor:
    """``states`` (tokens, k) times the transpose of ``weight`` (n, k), laid as this processor wants it."""
    if are_few(weight, states.shape[0]):
        return product_of_few(states, weight)
    if _by_token(weight.shape[0]) and not _are_columns(weight, states.shape[0]):
        return nn.functional.linear(states, weight)
    return (weight @ states.t()).t()


def plus_times(others: Tensor, states: Tensor, weight: Tensor) -> Tensor:
    """``others`` (tokens, n), written to, plus ``states`` (tokens, k) times the transpose of ``weight`` (n, k)."""
    if are_few(weight, states.shape[0]):
        return others.add_(product_of_few(states, weight))
    if _are_columns(weight, states.shape[0]):
        return others.add_((weight @ states.t()).t())
    if _by_token(weight.shape[0]):
        return others.addmm_(states, weight.t())
    others.t().addmm_(weight, states.t())
    return others


def _are_columns(weight: Tensor, tokens: int) -> bool:
    """Whether so few tokens are columns for a large weight also where states lie token by token."""
    return BY_TOKEN and MANY <= tokens <= COLUMNS and weight.numel() >= LEAST_WEIGHTS


def back_times(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient`` (tokens, n) times ``weight`` (n, k), laid as this processor wants it."""
    return gradient @ weight if _by_token(weight.shape[1]) else (weight.t() @ gradient.t()).t()


def product_of(states: Tensor, weight: Tensor) -> Tensor:
    """``states`` (n, k) times the transpose of ``weight`` (m, k), a head's, by oneDNN where that is worth the call."""
    if weight.numel() >= LEAST_WEIGHTS and 1 < states.shape[0] <= BY_BLOCKS:
        return product_of_few(states, weight)
    if weight.numel() < LEAST_OF_HEAD or not torch.backends.mkldnn.is_available():
        return nn.functional.linear(states, weight)
    return _product(states, weight)


class _Linear(torch.autograd.Function):
    """A linear layer; its gradient to the weights is MKL's, which is the faster one there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _product(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weight = ctx.saved_tensors
        of_states, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient, weight.t()) if of_states else None,
            rows.t() @ states.flatten(0, -2) if of_weight else None,
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
