"""Matrix products on a CPU, in fp32, by the library and in the layout that are fast on the processor.

States are (tokens, n), and a weight is (n, k) as in torch.nn.Linear. There are four kinds of processors: those without
AVX-512, Intel's with it, and AMD's with it, where MKL does without and oneDNN does not. Of these, Zen 4 computes 256
bits at a time: MKL then has nine tenths of oneDNN's pace, and half of it where 512 are computed at a time.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, pad


def _processor() -> tuple[bool, int]:
    """Whether it is Intel's, and its family."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True, 0
    family = re.search(r"cpu family\s*: (\d+)", told)
    return "GenuineIntel" in told, int(family[1]) if family else 0


INTEL, FAMILY = _processor()
ZEN5 = 26
"""The family of AMD's processors that compute 512 bits at a time."""
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether the processor has it: MKL and oneDNN have other kernels then, which want other shapes."""
BY_ONEDNN = AVX512 and not INTEL and torch.backends.mkldnn.is_available()
"""Whether products are oneDNN's: where MKL does without AVX-512."""
LEAST_BY_ONEDNN = 0 if FAMILY >= ZEN5 else 1 << 16
"""Weights of a layer from which they are: what a call of oneDNN takes longer has to be gained."""
GRADIENTS_BY_ONEDNN = FAMILY >= ZEN5
"""Whether those of weights are, too: they need a copy that MKL does without."""
BY_TOKEN = AVX512
"""Whether states of any width lie in memory token by token: MKL's gradients of states are faster so, with AVX-512."""
NARROW = 256
"""The width up to which states lie token by token on any processor: they are the faster product so."""

CLEARS = INTEL
"""Whether MKL clears a large result as fast as torch does, before it adds to it: its code for AMD's does not."""
BLOCK = 32, 96 if AVX512 else 768
"""Rows of a weight that are multiplied at a time: the fewest, and the most."""
MANY = 16
"""Fewer tokens times a weight take MKL as long as that many, but for a single one."""
COLUMNS = 32
"""Tokens up to which, by MKL from ``MANY`` on, a large weight times them is the faster product however they lie."""
COLUMNS_OF_LARGER = 96 if FAMILY >= ZEN5 else COLUMNS
"""The same for weights of ``LARGER``."""
EVEN = {4: 16, 16: 128, 32: sys.maxsize}
"""Of what rows are a multiple for oneDNN, and up to how many."""
BY_BLOCKS = 15 if AVX512 else 128
"""States up to which a product for each block is at least as fast as oneDNN's."""
LEAST_WEIGHTS = 1 << 16
"""Weights of a layer from which a product for each of several blocks is worth the calls."""
LARGER = 1 << 18
"""Weights of a layer from which more tokens are worth being columns."""
LAID_ANEW = 1 << 21
"""Numbers of a product up to which they are also where it has to be laid token by token; a head may have more."""
LEAST_OF_HEAD = 1 << 20
"""Weights of a head from which oneDNN is."""


# 1. By one library


def by_onednn(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``states`` (..., k) times the transpose of ``weight`` (n, k), plus ``bias``.

    A row rounds the same way however many others come with it, from two on. ``weight`` or its transpose lies in one
    piece: what does not takes oneDNN's reference code, a thousand times as long.
    """
    if not states.numel():
        # oneDNN has no product of nothing.
        return linear(states, weight, bias)
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


# 2. How states lie


def laid(states: Tensor) -> Tensor:
    """``states`` (tokens, n), which lie token by token, as this processor wants them."""
    return states if _lie_by_token(states.shape[1]) else states.t().contiguous().t()


def _lie_by_token(width: int) -> bool:
    """Whether states (tokens, ``width``) lie token by token."""
    return BY_TOKEN or width <= NARROW


def rows_of(states: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` of ``states`` (tokens, n), laid as they are."""
    return states.index_select(0, index) if states.is_contiguous() else states.t().index_select(1, index).t()


def even(rows: int) -> int:
    """As how many that many rows, whose number varies, are multiplied.

    oneDNN has code of its own for each shape, half a megabyte that stays in memory for long, between what comes and
    goes there: minibatches of all lengths would make holes of hundreds of megabytes.
    """
    if not BY_ONEDNN or rows == 1:
        return rows
    size = next(size for size, most in EVEN.items() if rows <= most)
    return -(-rows // size) * size


def fill(rows: Tensor, count: int) -> Tensor:
    """``rows`` (n, ...) and zeros, (count, ...)."""
    missing = count - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def stay_few(weight: Tensor, tokens: int) -> bool:
    """Whether so few tokens (by oneDNN any) stay about as many as they are, and take less time than ``MANY``."""
    return _by_onednn(weight) or _are_few(weight, tokens)


def _by_onednn(weight: Tensor) -> bool:
    """Whether products with ``weight`` are oneDNN's."""
    return BY_ONEDNN and weight.numel() >= LEAST_BY_ONEDNN


def _are_few(weight: Tensor, tokens: int) -> bool:
    """Whether so few tokens are worth a product for each block of ``weight``."""
    return not BY_ONEDNN and 1 < tokens < MANY and weight.numel() >= LEAST_WEIGHTS


def _are_columns(weight: Tensor, tokens: int) -> bool:
    """Whether so few tokens are columns for a large weight also where states lie token by token."""
    fewest = 2 if BY_ONEDNN else MANY
    most = COLUMNS_OF_LARGER if weight.numel() >= LARGER else COLUMNS
    return BY_TOKEN and fewest <= tokens <= most and weight.numel() >= LEAST_WEIGHTS


# 3. Products of states and weights


def times_by_token(states: Tensor, weight: Tensor) -> Tensor:
    """``states`` (tokens, k) times the transpose of ``weight`` (n, k), token by token: (tokens, n)."""
    if _are_few(weight, states.shape[0]):
        return product_of_few(states, weight)
    if _are_columns(weight, states.shape[0]) and len(weight) * states.shape[0] <= LAID_ANEW:
        return _by_number(states, weight).t().contiguous()
    return _by_token(states, weight)


def times(states: Tensor, weight: Tensor) -> Tensor:
    """``states`` (tokens, k) times the transpose of ``weight`` (n, k), laid as this processor wants it."""
    if _are_few(weight, states.shape[0]):
        return product_of_few(states, weight)
    if _lie_by_token(weight.shape[0]) and not _are_columns(weight, states.shape[0]):
        return _by_token(states, weight)
    return _by_number(states, weight).t()


def plus_times(others: Tensor, states: Tensor, weight: Tensor) -> Tensor:
    """``others`` (tokens, n), used up, plus ``states`` (tokens, k) times the transpose of ``weight`` (n, k)."""
    if _are_few(weight, states.shape[0]):
        return others.add_(product_of_few(states, weight))
    if _are_columns(weight, states.shape[0]):
        return others.add_(_by_number(states, weight).t())
    if _by_onednn(weight) and states.numel():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(states, others, weight, None, "add")
        return found
    if _lie_by_token(weight.shape[0]):
        return others.addmm_(states, weight.t())
    others.t().addmm_(weight, states.t())
    return others


def _by_token(states: Tensor, weight: Tensor) -> Tensor:
    """The product of ``states`` (tokens, k) and ``weight`` (n, k) as (tokens, n)."""
    return by_onednn(states, weight) if _by_onednn(weight) else linear(states, weight)


def _by_number(states: Tensor, weight: Tensor) -> Tensor:
    """The product of ``states`` (tokens, k) and ``weight`` (n, k) as (n, tokens)."""
    return by_onednn(weight, states) if _by_onednn(weight) else weight @ states.t()


def back_times(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient`` (tokens, n) times ``weight`` (n, k), laid as this processor wants it."""
    if _by_onednn(weight) or _lie_by_token(weight.shape[1]):
        return back_times_by_token(gradient, weight)
    return (weight.t() @ gradient.t()).t()


def back_times_by_token(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient`` (tokens, n) times ``weight`` (n, k), token by token."""
    return by_onednn(gradient, weight.t()) if _by_onednn(weight) else gradient @ weight


def product_of(states: Tensor, weight: Tensor) -> Tensor:
    """``states`` (n, k) times the transpose of ``weight`` (m, k), a head's, by oneDNN where that is worth the call."""
    if _by_onednn(weight):
        return times_by_token(states, weight)
    if weight.numel() >= LEAST_WEIGHTS and 1 < states.shape[0] <= BY_BLOCKS:
        return product_of_few(states, weight)
    if weight.numel() < LEAST_OF_HEAD or not torch.backends.mkldnn.is_available():
        return _product(states, weight.t())
    return by_onednn(states, weight)


def weight_gradient(gradient: Tensor, states: Tensor, out: Tensor | None = None) -> Tensor:
    """The transpose of ``gradient`` (tokens, n) times ``states`` (tokens, k), (n, k), which is written to ``out``."""
    if not (BY_ONEDNN and GRADIENTS_BY_ONEDNN):
        return _product(gradient.t(), states, out)
    # oneDNN reads either factor's transpose, but torch lays the first one out anew for it: the smaller one then.
    tokens, (n, k) = len(gradient), (gradient.shape[1], states.shape[1])
    if tokens * n <= tokens * k + n * k:
        found = by_onednn(gradient.t(), states.contiguous().t())
    else:
        found = by_onednn(states.t(), gradient.contiguous().t()).t()
    if out is not None:
        return out.copy_(found)
    return found.contiguous()


def _product(one: Tensor, other: Tensor, out: Tensor | None = None) -> Tensor:
    """``one`` (m, k) times ``other`` (k, n), a large result, by MKL."""
    if CLEARS:
        return torch.mm(one, other, out=out)
    cleared = one.new_zeros(one.shape[0], other.shape[1]) if out is None else out.zero_()
    return cleared.addmm_(one, other)
