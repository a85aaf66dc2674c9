"""Small charts as inline SVG that take their colours from the page, so that they follow its light or dark mode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 320, 176
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 10, 26
POINTS_WITH_VALUES = 60
BINS = 24
LARGEST = 1e100  # beyond it, differences would overflow


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers, evenly spaced, that cover ``low`` to ``high``."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / wanted
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(nice * scale for nice in (1, 2, 2.5, 5, 10, 20) if nice * scale >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{mark * step:.12g}") for mark in range(first, last + 1)]


def line_chart(title: str, steps: Sequence[float], series: Mapping[str, Sequence[float]], unit: str = "") -> str:
    """One line for each of ``series`` over ``steps``; values that are not finite leave a gap.

    An empty text where nothing is finite.
    """
    series = _drawable(series)
    finite = _finite(series)
    if not finite:
        return ""
    rows = ticks(min(finite), max(finite))
    low, span = steps[0], (steps[-1] - steps[0]) or 1.0
    inner = [mark for mark in ticks(low, steps[-1]) if low < mark < steps[-1] - span / 12 and mark == round(mark)]
    marks = sorted({low, steps[-1], *(mark for mark in inner if mark > low + span / 12)})
    parts = [_frame(rows, [((mark - low) / span, f"{mark:g}") for mark in marks])]
    for number, (name, values) in enumerate(series.items()):
        points = [((step - low) / span, value) for step, value in zip(steps, values, strict=True)]
        parts.append(_line(points, rows, number))
        if len(points) <= POINTS_WITH_VALUES:
            parts.append(_values(name, steps, points, rows))
    last = {name: values[-1] for name, values in series.items() if math.isfinite(values[-1])}
    return _figure(title, unit, parts, last, keys=len(series) > 1)


def histogram(
    title: str, series: Mapping[str, Sequence[float]], unit: str = "", colours: Sequence[int] = (0, 1)
) -> str:
    """The distributions of ``series`` over the same bins, overlapping, each with a dashed line at its mean."""
    series = _drawable(series)
    finite = _finite(series)
    if not finite:
        return ""
    marks = ticks(min(finite), max(finite))
    low, width = marks[0], (marks[-1] - marks[0]) / BINS
    counts = {name: _counts(values, low, width) for name, values in series.items()}
    rows = ticks(0, max(max(filled) for filled in counts.values()))
    parts = [_frame(rows, [((mark - low) / width / BINS, f"{mark:g}") for mark in marks])]
    means = {}
    for number, (name, filled) in zip(colours, counts.items(), strict=False):
        outline = [(0.0, 0.0)]
        for place, count in enumerate(filled):
            outline += [(place / BINS, count), ((place + 1) / BINS, count)]
        points = " ".join(f"{_x(x):.1f},{_y(y, rows):.1f}" for x, y in [*outline, (1.0, 0.0)])
        parts.append(f'<polygon class="area s{number}" points="{points}"/>')
        values = [value for value in series[name] if math.isfinite(value)]
        if values:
            means[name] = sum(values) / len(values)
            x = _x((means[name] - low) / width / BINS)
            parts.append(f'<line class="mean s{number}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    return _figure(title, unit, parts, means, keys=len(series) > 1, colours=colours, prefix="mean ")


def strip(intervals: Sequence[tuple[int, Mapping[str, float]]], limit: float | None = None, label: str = "") -> str:
    """Intervals as bars above one another, each (colour, interval), and a mark at ``limit``.

    An empty text where a number is not finite.
    """
    numbers = [value for _, interval in intervals for value in interval.values()] + ([] if limit is None else [limit])
    if not all(abs(number) < LARGEST for number in numbers):
        return ""
    low, high = min(numbers), max(numbers)
    span = (high - low) or 1.0
    height = 12 * len(intervals) + (22 if limit is not None else 8)

    def place(value: float) -> float:
        return 8 + 184 * (value - low) / span

    parts = [f'<line class="grid" x1="2" x2="198" y1="{height - 3}" y2="{height - 3}"/>'] if limit is None else []
    for row, (colour, interval) in enumerate(intervals):
        y = 8 + 12 * row
        ends = f'x1="{place(interval["low"]):.1f}" x2="{place(interval["high"]):.1f}"'
        parts.append(f'<line class="bar s{colour}" {ends} y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot s{colour}" cx="{place(interval["mean"]):.1f}" cy="{y}" r="4"/>')
    if limit is not None:
        x, base = place(limit), height - 14
        anchor = "start" if x < 60 else "end" if x > 140 else "middle"
        parts.append(f'<line class="grid" x1="2" x2="198" y1="{base}" y2="{base}"/>')
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{base}"/>')
        parts.append(f'<text class="{anchor}" x="{x:.1f}" y="{height - 3}">{escape(label)} {limit:g}</text>')
    return f'<svg class="strip" viewBox="0 0 200 {height}" aria-hidden="true">{"".join(parts)}</svg>'


def _drawable(series: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: [v if abs(v) < LARGEST else math.nan for v in values] for name, values in series.items()}


def _finite(series: Mapping[str, Sequence[float]]) -> list[float]:
    return [value for values in series.values() for value in values if math.isfinite(value)]


def _counts(values: Sequence[float], low: float, width: float) -> list[int]:
    filled = [0] * BINS
    for value in values:
        if math.isfinite(value):
            filled[min(BINS - 1, int((value - low) / width))] += 1
    return filled


def _x(share: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * share


def _y(value: float, rows: Sequence[float]) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - rows[0]) / (rows[-1] - rows[0])


def _frame(rows: Sequence[float], columns: Sequence[tuple[float, str]]) -> str:
    lines = []
    for value in rows:
        y = _y(value, rows)
        kind = "grid zero" if value == 0 else "grid"
        lines.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{_short(value)}</text>')
    base = HEIGHT - BOTTOM
    for share, label in columns:
        x = _x(share)
        lines.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        lines.append(f'<text class="middle" x="{x:.1f}" y="{HEIGHT - 9}">{label}</text>')
    return "".join(lines)


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def _line(points: Sequence[tuple[float, float]], rows: Sequence[float], number: int) -> str:
    drawn, pen = [], "M"
    for share, value in points:
        if math.isfinite(value):
            drawn.append(f"{pen}{_x(share):.1f},{_y(value, rows):.1f}")
        pen = "L" if math.isfinite(value) else "M"
    line = f'<path class="line s{number}" d="{"".join(drawn)}"/>'
    share, value = points[-1]
    if not math.isfinite(value):
        return line
    return f'{line}<circle class="dot s{number}" cx="{_x(share):.1f}" cy="{_y(value, rows):.1f}" r="3"/>'


def _values(name: str, steps: Sequence[float], points: Sequence[tuple[float, float]], rows: Sequence[float]) -> str:
    return "".join(
        f'<circle class="value" cx="{_x(share):.1f}" cy="{_y(value, rows):.1f}" r="7">'
        f"<title>step {step:g}: {escape(name)} {value:.4g}</title></circle>"
        for step, (share, value) in zip(steps, points, strict=True)
        if math.isfinite(value)
    )


def _figure(
    title: str,
    unit: str,
    parts: Sequence[str],
    numbers: Mapping[str, float],
    *,
    keys: bool,
    colours: Sequence[int] = (0, 1),
    prefix: str = "",
) -> str:
    """``numbers`` stand in the caption's corner; with ``keys`` each beside its colour and name."""
    shown = "".join(
        f'<span class="{f"key s{colour}" if keys else "last"}">{escape(name) + " " if keys else prefix}'
        f"<b>{value:.{3 if abs(value) >= 0.1 else 2}g}</b></span>"
        for colour, (name, value) in zip(colours, numbers.items(), strict=False)
    )
    return (
        f'<figure><figcaption><span class="what"><b>{escape(title)}</b> <span class="unit">{escape(unit)}</span></span>'
        f'<span class="keys">{shown}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )
