"""Stands in for CUDA graphs on a CPU: what a function computes is recorded, and repeated on the same memory.

As strict as the real ones: recording changes nothing, repeating calls nothing of Python's but torch's operations, with
the numbers that the host gave them then; and where the host asks for a value, that is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique", "masked_select", "lift_fresh", "bincount")
"""Operations that make the host wait for the device, or whose result's size it must be told; or that take its data."""


class _Forbidding(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indexed = name in ("index", "index_put_") and any(t.dtype == torch.bool for t in tree_leaves(args[1]))
        if indexed or name.startswith(WAITS):
            raise RuntimeError(f"called a synchronizing operation: {name}")
        return func(*args, **(kwargs or {}))


class _Recording(_Forbidding):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.own: set[int] = set()
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        for tensor in given:
            self._keep(tensor)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.own.add(tensor.untyped_storage().data_ptr())
        self.operations.append((func, args, kwargs, result))
        return result

    def _keep(self, tensor: Tensor) -> None:
        """What stood there, for recording must change nothing."""
        place = tensor.untyped_storage().data_ptr()
        if place not in self.own:
            self.own.add(place)
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before.append((whole, whole.clone()))


def _repeat(operations: list[tuple[Any, Any, Any, Any]]) -> None:
    for func, args, kwargs, result in operations:
        again = func(*args, **kwargs)
        places = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
            # A view, or what was changed in place, lies where it lay.
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in places:
                tensor.copy_(new)


@dataclass
class Graphs:
    """Counts of what was recorded and repeated."""

    recorded: int = 0
    repeated: int = 0

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """As a device's: call ``step`` once, and give what repeats it."""
        with _Forbidding():
            step()
        with patch("torch.cuda.is_current_stream_capturing", lambda: True), _Recording() as recording:
            step()
        with torch.no_grad():
            for place, before in recording.before:
                place.copy_(before)
        self.recorded += 1

        def repeat() -> None:
            # What was recorded is what autocast made of it.
            with torch.autocast("cpu", enabled=False):
                _repeat(recording.operations)
            self.repeated += 1

        return repeat
