"""What the steps tell while they run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

QUIET_SECONDS = 5.0
"""Plain lines of steps that don't train come at most this often."""
BAR = "{desc}  {bar} {n_fmt}/{total_fmt}  {remaining} left  {unit}"
"""The bar takes what room is left: on 80 columns everything is seen, and the time left on fewer, too."""


TOLD = {
    "resumed": "{step:<20}goes on after {done} PPO steps, from {checkpoint}",
    "checkpoint_damaged": "checkpoint {name} is damaged and passed over: {reason}",
    "checkpoint_failed": "checkpoint {name} can't be written: {reason}",
    "warning": "{step:<20}{message}",
    "note": "{step:<20}{message}",
    "preflight": "{step:<20}{message}",
}
"""Events that are worth a line of their own."""


class Progress:
    """Shows events, and remembers what the summary needs: the last of each kind, and the steps that never ended."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.quiet = quiet
        self.last: dict[str, dict[str, Any]] = {}
        self.open_steps: list[str] = []
        self._bar: Any = None
        self._started = 0.0
        self._spoke = 0.0

    def _note(self, event: dict[str, Any]) -> bool:
        """Remember one event without a word; False for a failure that follows from an earlier one."""
        kind = event.get("kind", "")
        if kind == "step_started":
            self.open_steps.append(event["step"])
        elif kind in ("step_finished", "step_failed"):
            self.open_steps.remove(event["step"])
        if kind == "step_failed" and "step_failed" in self.last:
            return False  # the first failure is the cause
        self.last[kind] = event
        return True

    def show(self, event: dict[str, Any]) -> None:
        """Take in one event and, unless quiet, say it."""
        if not self._note(event) or self.quiet:
            return
        kind = event.get("kind", "")
        if kind == "step_started":
            self._started = self._spoke = time.monotonic()
            if self.live:
                self._say(f"{event['step']} …", end="\r")
        elif kind == "progress":
            self._advance(event)
        elif kind in TOLD:
            self.close()
            self._say(TOLD[kind].format(**event))
        elif kind == "step_finished":
            self.close()
            self._say(f"{event['step']:<20}done in {_duration(event['seconds'])}")
        elif kind == "step_failed":
            self.close()
            self._say(f"{event['step']:<20}failed after {_duration(event['seconds'])}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()
            self._bar = None

    def _advance(self, event: dict[str, Any]) -> None:
        numbers = {name: _short(value) for name, value in event.get("numbers", {}).items()}
        if self.live:
            unit = "  ".join(f"{name} {value}" for name, value in numbers.items()) or event["unit"]
            if self._bar is None:
                self._bar = tqdm(total=event["total"], desc=event["step"], unit=unit, file=self.stream, bar_format=BAR)
                # The time left is reckoned from the step's start, not from its first sign of life.
                self._bar.start_t -= time.monotonic() - self._started
            self._bar.unit = unit
            self._bar.n = event["done"]
            self._bar.refresh()
            return
        now = time.monotonic()
        if not numbers and event["done"] < event["total"] and now - self._spoke < QUIET_SECONDS:
            return
        self._spoke = now
        left = (now - self._started) / event["done"] * (event["total"] - event["done"])
        said = "".join(f"  {name} {value}" for name, value in numbers.items())
        ending = f"  {_duration(left)} left" if event["done"] < event["total"] else ""
        self._say(f"{event['step']:<20}{event['done']}/{event['total']} {event['unit']}{said}{ending}")

    def _say(self, text: str, end: str = "\n") -> None:
        # On a terminal the line may overwrite a longer one.
        print(f"{text:<60}" if self.live else text, end=end, file=self.stream, flush=True)


def _short(value: float | None) -> str:
    return "nan" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
