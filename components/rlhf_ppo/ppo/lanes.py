"""Threads that compute side by side, one on each core.

Two products of matrices at the same time are faster than one after the other on two cores: no core waits for the
other half, and what is bound by memory goes beside what is bound by arithmetic (docs/performance.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Job = TypeVar("Job")


def share(jobs: Iterable[Job], function: Callable[[Job], None]) -> None:
    """Call ``function`` with each of ``jobs``, without gradients, on as many threads as torch may use.

    A thread takes the next job as soon as it is free, so that the large ones should come first.
    """
    waiting, threads = deque(jobs), torch.get_num_threads()

    @torch.no_grad()
    def work() -> None:
        while True:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            function(job)

    if threads == 1:
        work()
        return
    for future in [_lanes(threads).submit(work) for _ in range(threads)]:
        future.result()


@cache
def _lanes(threads: int) -> ThreadPoolExecutor:
    found, all_here = ThreadPoolExecutor(threads, "lane", _begin), Barrier(threads)
    for future in [found.submit(all_here.wait) for _ in range(threads)]:
        future.result()
    # torch gives the number that was set last to every thread that begins.
    torch.set_num_threads(threads)
    return found


def _begin() -> None:
    # torch sets a thread's number at its first operation, unless it has been asked for it before.
    torch.get_num_threads()
    torch.set_num_threads(1)
