"""Pictures of the report as inline SVG: the tuning curve, one client's bars, and a histogram over many clients.

Colours are CSS variables, so a picture follows the page's light or dark theme. Sizes are CSS pixels and pictures are
never stretched much: text keeps its size on a phone because there a narrower picture is shown, not a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

# Width of the pictures that stand side by side in a grid; the page of a phone of 390 px has room for one.
SMALL = 320


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Best score so far: ``score`` in [0, 1] after ``fm_calls``, on ``n_texts``; ``kind`` is "heat" or "sets"."""

    fm_calls: int
    score: float
    n_texts: int
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """An arm's ``value`` in [0, 1], with its interval where one is drawn."""

    arm: str
    name: str
    value: float
    low: float = 0.0
    high: float = 1.0


def _tag(name: str, body: object = "", **attributes: object) -> Markup:
    """One element. Everything that is not `Markup` is escaped; floats are rounded so that pages stay small."""
    pairs = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else v)
        for key, v in attributes.items()
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(pairs), body)


def _text(x: float, y: float, body: object, anchor: str = "start", **attributes: object) -> Markup:
    return _tag("text", body, x=float(x), y=float(y), text_anchor=anchor, **attributes)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return _tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def _svg(parts: Sequence[Markup], width: int, height: float, label: str, class_: str) -> Markup:
    size = f"0 0 {width} {height:.0f}"
    return _tag(
        "svg", Markup("").join(parts), viewBox=size, width=width, role="img", aria_label=label, class_=f"chart {class_}"
    )


def _steps(low: float, high: float, about: int) -> list[float]:
    """Round numbers within [low, high], roughly ``about`` of them."""
    size = max(high - low, 1e-9) / about
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= size * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _apart(places: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """``places`` (ascending), moved as little as a simple sweep does so that neighbours are ``gap`` apart."""
    out: list[float] = []
    for place in places:
        out.append(max(place, out[-1] + gap if out else top))
    limit = bottom
    for i in reversed(range(len(out))):
        out[i] = min(out[i], limit)
        limit = out[i] - gap
    return out


def curve(points: Sequence[Point], levels: Sequence[Mark], max_calls: int, quantity: str, *, wide: bool) -> Markup:
    """Best training score (``quantity``) against FM calls, with held-out scores of arms as horizontal lines."""
    width, height = (900, 400) if wide else (SMALL + 6, 380)
    left, right, top, bottom = 46, width - (190 if wide else 136), 34, height - 46
    scores = [p.score for p in points] + [level.value for level in levels]
    margin = max(0.01, 0.08 * (max(scores) - min(scores)))
    low, high = max(0.0, min(scores) - margin), min(1.0, max(scores) + margin)
    most = max(max_calls, *(p.fm_calls for p in points))

    def x(calls: float) -> float:
        return left + (right - left) * calls / most

    def y(score: float) -> float:
        return bottom - (bottom - top) * (score - low) / (high - low)

    parts = [_text(0, 14, f"Score: {quantity} (1 is best)", class_="axis")]
    for step in _steps(low, high, 6):
        parts += [_line(left, y(step), right, y(step), "grid"), _text(left - 6, y(step) + 4, f"{step:.3g}", "end")]
    for step in _steps(0, most, 6 if wide else 3):
        parts += [
            _line(x(step), bottom, x(step), bottom + 5, "tick"),
            _text(x(step), bottom + 19, f"{step:,.0f}", "middle"),
        ]
    parts += [
        _line(left, bottom, right, bottom, "tick"),
        _text((left + right) / 2, height - 6, "FM calls spent on tuning", "middle", class_="axis"),
    ]
    by_height = sorted(levels, key=lambda level: -level.value)
    for level, place in zip(by_height, _apart([y(v.value) for v in by_height], 16, top, bottom), strict=True):
        here = y(level.value)
        parts += [
            _line(left, here, right, here, f"level arm-{level.arm}"),
            _line(right, here, right + 10, place, f"leader arm-{level.arm}"),
            _text(
                right + 13,
                place + 4,
                f"{level.value:.3f} {level.name}" if wide else level.name,
                class_=f"name arm-{level.arm}",
            ),
        ]
    path = " ".join(f"{x(p.fm_calls):.1f},{y(p.score):.1f}" for p in points)
    parts.append(_tag("polyline", points=path, class_="curve"))
    labelled = 0
    for p in points:
        px, py = x(p.fm_calls), y(p.score)
        note = _tag("title", f"{p.score:.3f} after {p.fm_calls:,} FM calls, on {p.n_texts} training texts")
        if p.kind == "sets":
            parts.append(_tag("rect", note, x=px - 5, y=py - 5, width=10, height=10, class_="sets"))
        else:
            parts.append(_tag("circle", note, cx=px, cy=py, r=5, class_="heat"))
        if p.n_texts != labelled:
            labelled = p.n_texts
            # At the right edge the label would run into the names of the horizontal lines.
            anchor = "end" if px > right - 40 else "middle"
            # Below the point, or above it where a horizontal line would run through the label.
            is_crossed = any(4 < y(level.value) - py < 26 for level in levels)
            place = py - 12 if is_crossed else py + 21
            parts.append(_text(px, place, f"{p.n_texts} texts" if wide else p.n_texts, anchor, class_="halo"))
    label = (
        f"Tuning curve: best training score from {points[0].score:.3f} after {points[0].fm_calls:,} FM calls to "
        f"{points[-1].score:.3f} after {points[-1].fm_calls:,}. Held-out scores: "
        + ", ".join(f"{v.name} {v.value:.3f}" for v in by_height)
    )
    return _svg(parts, width, height, label, "wide" if wide else "narrow")


def bars(title: str, rows: Sequence[Mark], quantity: str) -> Markup:
    """Horizontal bars from 0 to 100% with whiskers for 95% intervals, one a row, labelled with name and value."""
    left, right, row = 130, SMALL - 52, 24
    end = 6 + row * len(rows)

    def x(value: float) -> float:
        return left + (right - left) * min(1.0, max(0.0, value))

    parts = [_line(x(v), 2, x(v), end, "grid") for v in (0.25, 0.5, 0.75, 1)]
    for i, bar in enumerate(rows):
        middle = 6 + row * i + row / 2 - 2
        parts += [
            _text(left - 8, middle + 4, bar.name, "end"),
            _tag("rect", x=left, y=middle - 8, width=x(bar.value) - left, height=16, rx=2, class_=f"bar arm-{bar.arm}"),
            _line(x(bar.low), middle, x(bar.high), middle, "whisker"),
            _line(x(bar.low), middle - 4, x(bar.low), middle + 4, "whisker"),
            _line(x(bar.high), middle - 4, x(bar.high), middle + 4, "whisker"),
            _text(right + 8, middle + 4, f"{bar.value:.1%}", class_="value"),
        ]
    parts.append(_line(left, 2, left, end, "tick"))
    parts += [_text(x(v), end + 15, f"{v:.0%}", "middle") for v in (0, 0.5, 1)]
    parts.append(_text((left + right) / 2, end + 34, quantity, "middle", class_="axis"))
    said = "; ".join(f"{b.name} {b.value:.1%}, 95% interval {b.low:.1%} to {b.high:.1%}" for b in rows)
    return _svg(parts, SMALL, end + 40, f"{title}: {said}", "small")


def histogram(title: str, arm: str, values: Sequence[float], quantity: str) -> Markup:
    """How many clients have which value in [0, 1], in twenty bins, with the median marked."""
    left, right, top, bottom = 40, SMALL - 22, 24, 150
    counts = [0] * 20
    for value in values:
        counts[min(19, max(0, int(value * 20)))] += 1
    most = max(counts)
    ordered = sorted(values)
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    def x(value: float) -> float:
        return left + (right - left) * value

    parts = [_text(0, 12, "Number of clients", class_="axis")]
    for step in (s for s in _steps(0, most, 3) if s == int(s)):
        y = bottom - (bottom - top) * step / most
        parts += [_line(left, y, right, y, "grid"), _text(left - 6, y + 4, int(step), "end")]
    for i, count in enumerate(counts):
        tall = (bottom - top) * count / most
        size = {"x": x(i / 20) + 1, "y": bottom - tall, "width": (right - left) / 20 - 2, "height": tall}
        parts.append(_tag("rect", class_=f"bar arm-{arm}", **size))
    parts += [
        _line(left, bottom, right, bottom, "tick"),
        _line(x(median), top - 6, x(median), bottom, "whisker"),
        _text(x(median), top - 9, f"median {median:.1%}", "end" if median > 0.5 else "start", class_="value"),
    ]
    parts += [_text(x(v), bottom + 17, f"{v:.0%}", "middle") for v in (0, 0.25, 0.5, 0.75, 1)]
    parts.append(_text((left + right) / 2, bottom + 36, quantity, "middle", class_="axis"))
    label = f"{title}: {len(values)} clients from {ordered[0]:.1%} to {ordered[-1]:.1%}, median {median:.1%}"
    return _svg(parts, SMALL, bottom + 42, label, "small")
