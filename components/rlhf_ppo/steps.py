"""What all steps have in common: they say when they start, when they end, and how they failed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit


@contextmanager
def running_step(step: str) -> Iterator[None]:
    """Report the start and the end of ``step``; an exception is reported in plain words and raised again."""
    started = time.monotonic()
    emit("step_started", step=step)
    try:
        yield
    except BaseException as error:
        emit(
            "step_failed",
            step=step,
            input_error=isinstance(error, InputError),
            message=str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}",
            seconds=time.monotonic() - started,
        )
        raise
    emit("step_finished", step=step, seconds=time.monotonic() - started)
