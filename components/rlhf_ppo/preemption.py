"""SIGTERM while a model is trained: the step ends where nothing is lost, not where it happens to be."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch

from rlhf_ppo.ppo.loop import Interrupted


class Preemption:
    """Inside the block SIGTERM is remembered; ``check`` then raises Interrupted, on all processes at once.

    Inside ``interruptible`` a process that is alone is interrupted at once: what is begun there can be begun again.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.requested = False
        self._at_once = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._at_once:
            self._at_once = False
            raise Interrupted

    def check(self) -> None:
        """Raise Interrupted if any process was told to stop. With several processes all must call it together."""
        told = self.requested
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(told), device=self.accelerator.device)
            told = bool(self.accelerator.reduce(flag, reduction="sum") > 0)
        if told:
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that may be left at any point and begun again."""
        self._at_once = self.accelerator.num_processes == 1
        try:
            yield
        finally:
            self._at_once = False
        self.check()
