"""SIGTERM, or the end of its time, while a model is trained: the step ends where nothing is lost."""

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
    """Inside the block SIGTERM, and that ``seconds`` are over (0 is no limit), is remembered; ``check`` then raises
    Interrupted, on all processes at once, and ``reason`` says why.

    Inside ``interruptible`` a process that is alone is interrupted at once: what is begun there can be begun again.
    """

    def __init__(self, accelerator: Any, seconds: int = 0) -> None:
        self.accelerator, self.seconds = accelerator, seconds
        self.taken: set[int] = set()
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGALRM] if self.seconds else [signal.SIGTERM]
            self._before = {number: signal.signal(number, self._take) for number in numbers}
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, before in self._before.items():
            signal.signal(number, before)

    @property
    def reason(self) -> str:
        """What ended training."""
        if signal.SIGALRM in self.taken and signal.SIGTERM not in self.taken:
            return f"node_timeout_seconds={self.seconds}"
        return "SIGTERM"

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.taken.add(number)
        if self._at_once:
            self._at_once = False
            raise Interrupted

    def check(self) -> None:
        """Raise Interrupted if any process is to stop. With several processes all must call it together."""
        agreed = set(self.taken)
        if self.accelerator.num_processes > 1:
            known = (signal.SIGTERM, signal.SIGALRM)
            flags = torch.tensor([float(number in agreed) for number in known], device=self.accelerator.device)
            told = self.accelerator.reduce(flags, reduction="sum").tolist()
            # What comes while the others are asked is nothing that they know of: it counts at the next check.
            agreed = {number for number, count in zip(known, told, strict=True) if count}
            self.taken |= agreed
        if agreed:
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
