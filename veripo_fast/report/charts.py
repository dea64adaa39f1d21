"""Inline SVG for the report: line charts over steps and interval charts over stages.

Every chart is 360 units wide, about what a column and a phone screen hold, so that text keeps its size. Colours come
from the style sheet by class. Raw values stay visible under the smoothed line; a value that is not finite breaks the
line and leaves a cross on the axis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from markupsafe import Markup, escape

from veripo_fast.report.axes import tick_labels, ticks, y_range
from veripo_fast.text import number

WIDTH, HEIGHT = 360, 192
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 18, 22
BAND_GAP = 8
MAX_POINTS = 500
"""Points drawn per line; a longer series keeps the lowest and highest value of each bucket, so no spike is lost."""
SMOOTH_FROM = 12
"""Fewer points than this are drawn raw only."""


@dataclass(frozen=True)
class Band:
    """The steps of one stage on a chart."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class IntervalMark:
    """A score with its 95 % interval."""

    value: float
    low: float | None
    high: float | None


@dataclass
class Chart:
    """A chart with its heading."""

    title: str
    note: str
    svg: Markup
    last: str = ""


def smooth(values: Sequence[float | None], window: int) -> list[float | None]:
    """Centred mean over `window` (odd) points, narrower at the ends; gaps stay gaps."""
    sums = list(accumulate((v or 0.0 for v in values), initial=0.0))
    counts = list(accumulate((v is not None for v in values), initial=0))
    result: list[float | None] = []
    for index, value in enumerate(values):
        reach = max(min(window // 2, index, len(values) - 1 - index), window // 8)
        left, right = max(0, index - reach), min(len(values), index + reach + 1)
        result.append(None if value is None else (sums[right] - sums[left]) / (counts[right] - counts[left]))
    return result


def smooth_window(count: int) -> int:
    """Odd window of about a tenth of the points, at least 5; 0 when there are too few to smooth."""
    return 0 if count < SMOOTH_FROM else max(5, count // 10 | 1)


def line_chart(title: str, bands: Sequence[Band], fixed: tuple[float, float] | None) -> Markup:
    """One metric over the steps of its stages, each stage in a band of its own."""
    known = [v for band in bands for v in band.values if v is not None]
    if not known:
        return Markup("")
    low, high = y_range(known, fixed)
    window = smooth_window(max(len(band.steps) for band in bands))
    spans = _spans([len(band.steps) for band in bands])
    parts = [_band_frame(band, left, right) for band, (left, right) in zip(bands, spans, strict=True)]
    parts.append(_y_axis(low, high))
    points: list[list[object]] = []
    for band, (left, right) in zip(bands, spans, strict=True):
        xs = _positions(band.steps, left, right)
        parts.append(_lines(xs, band.values, smooth(band.values, window) if window else None, low, high))
        keep = _decimate(band.values)
        points += [[band.steps[i], round(xs[i], 1), _round_y(band.values[i], low, high), _compact(band.values[i])]
                   for i in keep]
    parts.append(f'<text class="tick" x="{LEFT - 6}" y="{HEIGHT - 6}" text-anchor="end">step</text>'
                 f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>'
                 '<circle class="dot" r="3" cx="-9" cy="-9"/>')
    return _svg(_describe(title, bands, known), "".join(parts), "line", points)


def interval_chart(title: str, labels: Sequence[str], series: dict[str, list[IntervalMark | None]],
                   fixed: tuple[float, float] | None, percent: bool) -> Markup:
    """Scores after each stage, one line per series, whiskers for the intervals; the first series is labelled."""
    ends = [v for line in series.values() for p in line if p for v in (p.value, p.low, p.high) if v is not None]
    if not ends:
        return Markup("")
    low, high = y_range(ends, fixed)
    slots = _slots(len(labels))
    show = math.ceil(len(labels) / 6)
    parts = [_y_axis(low, high, percent)]
    parts += [f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(label)}</text>'
              for i, (x, label) in enumerate(zip(slots, labels, strict=True)) if i % show == 0]
    for index, (name, line) in enumerate(series.items()):
        shift = (index - (len(series) - 1) / 2) * 9
        xs = [x + shift for x in slots]
        parts.append(_interval_line(name, index, xs, line, low, high, percent, labelled=len(labels) <= 6))
    said = "; ".join(f"{name}: " + ", ".join(f"{label} {_score(p.value, percent)}" for label, p in
                                             zip(labels, line, strict=True) if p) for name, line in series.items())
    return _svg(f"{title}. {said}", "".join(parts), "interval", [])


def _score(value: float, percent: bool) -> str:
    return f"{value * 100:.1f}" if percent else number(value)


def _svg(label: str, body: str, kind: str, points: list[list[object]]) -> Markup:
    data = f' data-points="{escape(json.dumps(points, separators=(",", ":")))}"' if points else ""
    return Markup(f'<svg class="plot {kind}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
                  f'aria-label="{escape(label)}"{data}>{body}</svg>')


def _describe(title: str, bands: Sequence[Band], known: Sequence[float]) -> str:
    steps = [step for band in bands for step in band.steps]
    return (f"{title}, steps {steps[0]} to {steps[-1]}: first {number(known[0])}, last {number(known[-1])}, "
            f"lowest {number(min(known))}, highest {number(max(known))}")


def _y(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)


def _round_y(value: float | None, low: float, high: float) -> float | None:
    return None if value is None else round(_y(value, low, high), 1)


def _compact(value: float | None) -> str:
    return "not finite" if value is None else number(value)


def _y_axis(low: float, high: float, percent: bool = False) -> str:
    lines, marks = [], ticks(low, high, 4)
    labels = [f"{mark * 100:.0f} %" for mark in marks] if percent else tick_labels(marks)
    for mark, label in zip(marks, labels, strict=True):
        y = _y(mark, low, high)
        base = " base" if abs(mark) < 1e-12 else ""
        lines.append(f'<line class="grid{base}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    return "".join(lines)


def _spans(counts: Sequence[int]) -> list[tuple[float, float]]:
    """Left and right edge of each band; width in proportion to its steps, but never unreadably thin."""
    room = WIDTH - LEFT - RIGHT - BAND_GAP * (len(counts) - 1)
    weights = [max(count, 0.12 * sum(counts)) for count in counts]
    spans, left = [], float(LEFT)
    for weight in weights:
        width = room * weight / sum(weights)
        spans.append((left, left + width))
        left += width + BAND_GAP
    return spans


def _positions(steps: Sequence[int], left: float, right: float) -> list[float]:
    first, last = steps[0], steps[-1]
    if first == last:
        return [(left + right) / 2] * len(steps)
    inset = min(5.0, (right - left) * 0.1)
    return [left + inset + (right - left - 2 * inset) * (step - first) / (last - first) for step in steps]


def _band_frame(band: Band, left: float, right: float) -> str:
    """The stage's background, its name, and ticks at its first and last step (and between, where there is room)."""
    width = right - left
    name = band.name if len(band.name) * 6 <= width else band.name[: max(1, int(width / 6) - 1)] + "…"
    text = (f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            f'<text class="stage" x="{left:.1f}" y="{TOP - 6}">{escape(name)}</text>')
    xs = dict(zip(band.steps, _positions(band.steps, left, right), strict=True))
    marks = _step_marks(band.steps, width)
    for place, step in enumerate(marks):
        anchor = "end" if place == len(marks) - 1 else "middle" if place else "start"
        text += f'<text class="tick" x="{xs[step]:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:,}</text>'
    return text


def _step_marks(steps: Sequence[int], width: float) -> list[int]:
    label = len(f"{steps[-1]:,}") * 6 + 6
    if len(steps) == 1 or width < 2 * label:
        return [steps[-1]]
    first, last = steps[0], steps[-1]
    apart = 1.5 * label * (last - first) / width  # the outer labels stand inside the band, the inner ones are centred
    inner = [int(mark) for mark in ticks(first, last, int(width / (label + 12))) if mark == int(mark)]
    return [first, *(mark for mark in inner if mark in set(steps) and first + apart < mark < last - apart), last]


def _lines(xs: Sequence[float], values: Sequence[float | None], smoothed: Sequence[float | None] | None,
           low: float, high: float) -> str:
    keep = _decimate(values)
    ys = [None if v is None else _y(v, low, high) for v in values]
    style = "main" if not smoothed else "raw dense" if len(keep) > 200 else "raw"
    text = f'<path class="{style}" d="{_path([xs[i] for i in keep], [ys[i] for i in keep])}"/>'
    if smoothed:
        every = max(1, len(xs) // MAX_POINTS)
        curve = [None if v is None else _y(v, low, high) for v in smoothed[::every]]
        text += f'<path class="main" d="{_path(xs[::every], curve)}"/>'
    if len([v for v in values if v is not None]) <= SMOOTH_FROM:
        text += "".join(f'<circle class="mark" r="2" cx="{x:.1f}" cy="{y:.1f}"/>'
                        for x, y in zip(xs, ys, strict=True) if y is not None)
    return text + "".join(f'<text class="broken" x="{x:.1f}" y="{HEIGHT - BOTTOM - 2}" text-anchor="middle">×</text>'
                          for x, y in zip(xs, ys, strict=True) if y is None)


def _decimate(values: Sequence[float | None]) -> list[int]:
    """Indices to draw: all, or the lowest and highest of each bucket."""
    if len(values) <= MAX_POINTS:
        return list(range(len(values)))
    edges = [len(values) * i // (MAX_POINTS // 2) for i in range(MAX_POINTS // 2 + 1)]
    kept: set[int] = {0, len(values) - 1}
    for start, stop in pairwise(edges):
        bucket = [(v, i) for i in range(start, stop) if (v := values[i]) is not None]
        kept |= {min(bucket)[1], max(bucket)[1]} if bucket else {start}
    return sorted(kept)


def _path(xs: Sequence[float], ys: Sequence[float | None]) -> str:
    text, pen_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            text.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = y is not None
    return "".join(text)


def _slots(count: int) -> list[float]:
    room = (WIDTH - LEFT - RIGHT) / count
    return [LEFT + room * (i + 0.5) for i in range(count)]


def _interval_line(name: str, index: int, xs: Sequence[float], line: Sequence[IntervalMark | None], low: float,
                   high: float, percent: bool, labelled: bool) -> str:
    ys = [None if p is None else _y(p.value, low, high) for p in line]
    text = f'<path class="link s{index}" d="{_path(xs, ys)}"/>'
    for x, y, point in zip(xs, ys, line, strict=True):
        if point is None or y is None:
            continue
        top = _y(point.high, low, high) if point.high is not None else y
        foot = _y(point.low, low, high) if point.low is not None else y
        text += (f'<g class="s{index}"><title>{escape(name)} {_score(point.value, percent)}</title>'
                 f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{foot:.1f}"/>'
                 f'<circle class="point" r="2.8" cx="{x:.1f}" cy="{y:.1f}"/></g>')
        if index == 0 and labelled:
            above = top - 6 if top - 6 > TOP - 8 else foot + 13
            text += (f'<text class="value" x="{x:.1f}" y="{above:.1f}" text-anchor="middle">'
                     f'{_score(point.value, percent)}</text>')
    return text
