"""Small charts as inline SVG that take their colours from the page, so that they follow its light or dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 320, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that cover ``low`` to ``high``."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / wanted
    scale = 10 ** math.floor(math.log10(raw))
    step = next(nice * scale for nice in (1, 2, 2.5, 5, 10) if nice * scale >= raw)
    first = math.floor(low / step)
    return [round((first + i) * step, 12) for i in range(math.ceil(high / step) - first + 1)]


def line_chart(title: str, series: dict[str, Sequence[float]], unit: str = "") -> str:
    """One line for each of ``series`` over the PPO steps; values that are not finite leave a gap."""
    finite = [value for values in series.values() for value in values if math.isfinite(value)]
    if not finite:
        return ""
    rows = ticks(min(finite), max(finite))
    steps = max(len(values) for values in series.values())
    parts = [_frame(rows, [(0, "1"), (steps - 1, str(steps))] if steps > 1 else [(0, "1")], max(steps - 1, 1))]
    for number, values in enumerate(series.values()):
        parts.append(_path(values, rows, max(steps - 1, 1), number))
    return _figure(title, unit, parts, list(series) if len(series) > 1 else [])


def histogram(title: str, series: dict[str, Sequence[float]], unit: str = "", bins: int = 24) -> str:
    """The distributions of ``series`` over the same bins, as outlines that may overlap."""
    finite = [value for values in series.values() for value in values if math.isfinite(value)]
    if not finite:
        return ""
    marks = ticks(min(finite), max(finite))
    low, width = marks[0], (marks[-1] - marks[0]) / bins
    counts = []
    for values in series.values():
        filled = [0] * bins
        for value in values:
            filled[min(bins - 1, int((value - low) / width))] += 1
        counts.append(filled)
    rows = ticks(0, max(max(filled) for filled in counts))
    parts = [_frame(rows, [((mark - low) / width, f"{mark:g}") for mark in marks], bins)]
    for number, filled in enumerate(counts):
        points = " ".join(
            f"{_x(b + side, bins):.1f},{_y(c, rows):.1f}" for b, c in enumerate(filled) for side in (0, 1)
        )
        base = _y(0, rows)
        outline = f"{_x(0, bins):.1f},{base:.1f} {points} {_x(bins, bins):.1f},{base:.1f}"
        parts.append(f'<polygon class="area s{number}" points="{outline}"/>')
    return _figure(title, unit, parts, list(series))


def _x(position: float, span: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * position / span


def _y(value: float, rows: Sequence[float]) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - rows[0]) / (rows[-1] - rows[0])


def _frame(rows: Sequence[float], columns: Sequence[tuple[float, str]], span: float) -> str:
    lines = []
    for value in rows:
        y = _y(value, rows)
        kind = "grid zero" if value == 0 else "grid"
        lines.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{value:g}</text>')
    for position, label in columns:
        lines.append(f'<text class="middle" x="{_x(position, span):.1f}" y="{HEIGHT - 8}">{label}</text>')
    return "".join(lines)


def _path(values: Sequence[float], rows: Sequence[float], span: float, number: int) -> str:
    drawn, pen = [], "M"
    for step, value in enumerate(values):
        if not math.isfinite(value):
            pen = "M"
            continue
        drawn.append(f"{pen}{_x(step, span):.1f},{_y(value, rows):.1f}")
        pen = "L"
    dot = ""
    if values and math.isfinite(values[-1]):
        dot = f'<circle class="dot s{number}" cx="{_x(len(values) - 1, span):.1f}" cy="{_y(values[-1], rows):.1f}" r="3"/>'
    return f'<path class="line s{number}" d="{" ".join(drawn)}"/>{dot}'


def _figure(title: str, unit: str, parts: Sequence[str], legend: Sequence[str]) -> str:
    keys = "".join(f'<span class="key s{number}">{escape(name)}</span>' for number, name in enumerate(legend))
    return (
        f'<figure><figcaption><b>{escape(title)}</b> <span class="unit">{escape(unit)}</span>{keys}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )
