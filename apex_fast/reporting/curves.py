"""Curves as SVG text: no script, no font, no other file, sharp at every size."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

COLOURS = ("#1b4f8a", "#b0421c", "#3c7d3f", "#7a4b94", "#8a6d1b")
WIDTH, HEIGHT = 520, 250
Place = Callable[[float], float]
"""From a step or a value to pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 26, 22, 34
POINTS = 400
"""Points of a curve that are drawn; longer ones are taken together, so that a run of a week makes no larger page."""


@dataclass(frozen=True)
class Curve:
    """``points`` are (step, value); ``dots`` marks them, for values that are few; ``exact`` ones are not smoothed."""

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Chart:
    """One diagram over the steps.

    Attributes:
        title: what it shows, with its unit.
        curves: those without a point are left out.
        log: logarithmic; values that are not above 0 are left out.
        band: where healthy values lie, drawn behind the curves.
        from_zero: the axis begins at 0.
    """

    title: str
    curves: Sequence[Curve]
    log: bool = False
    band: tuple[float, float] | None = None
    from_zero: bool = False


def draw(
    chart: Chart, *, last: float, phases: Sequence[tuple[int, str]] = (), marks: Sequence[tuple[float, str]] = ()
) -> str:
    """``chart`` as one <svg> element; "" without a single point.

    Args:
        last: the step at the right end.
        phases: (step, name), drawn as fields of different shades.
        marks: (step, what happened), drawn as lines across.
    """
    curves = [
        replace(c, points=[(s, v) for s, v in c.points if math.isfinite(v) and (v > 0 or not chart.log)])
        for c in chart.curves
    ]
    curves = [c for c in curves if c.points]
    if not curves:
        return ""
    last = max([last, *(s for c in curves for s, _ in c.points)])
    low, high = _range([v for c in curves for v in _spread([v for _, v in c.points])], chart)
    scale = math.log10 if chart.log else float
    bottom, top = scale(low), scale(high)

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * step / max(last, 1)

    def y(value: float) -> float:
        share = (scale(value) - bottom) / max(top - bottom, 1e-12)
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * min(max(share, 0.0), 1.0)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(chart.title, quote=True)}">',
        f"<title>{html.escape(chart.title)}</title>",
        *_phases(phases, last, x),
    ]
    if chart.band is not None:
        upper, lower = y(min(chart.band[1], high)), y(max(chart.band[0], low))
        parts.append(
            f'<rect class="band" x="{_LEFT}" y="{upper:.1f}" width="{WIDTH - _LEFT - _RIGHT}" '
            f'height="{max(lower - upper, 0):.1f}"/>'
        )
    for value in _ticks(low, high, chart.log):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    for step in _ticks(0, last, False):
        parts.append(
            f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">'
            f"{_number(step)}</text>"
        )
    parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    for step, what in marks:
        parts.append(
            f'<line class="alarm" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}">'
            f"<title>{html.escape(f'step {step:g}: {what}')}</title></line>"
        )
    for curve, colour in zip(curves, COLOURS, strict=False):
        parts += _curve(curve, colour, x, y)
    parts.append(_legend([c.label for c in curves]))
    return "".join([*parts, "</svg>"])


def _curve(curve: Curve, colour: str, x: Place, y: Place) -> list[str]:
    points = thin(curve.points)

    def path(values: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in values)

    parts = []
    if curve.dots or len(points) < 3:
        parts = [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for s, v in points]
        smooth = points
    elif curve.exact:
        smooth = points
    else:
        parts.append(f'<polyline points="{path(points)}" stroke="{colour}" stroke-width="0.8" opacity="0.3"/>')
        smooth = smoothed(points)
    parts.append(f'<polyline points="{path(smooth)}" stroke="{colour}" stroke-width="1.8"/>')
    return parts


def _phases(phases: Sequence[tuple[int, str]], last: float, x: Place) -> list[str]:
    parts = []
    for i, (first, name) in enumerate(phases):
        end = phases[i + 1][0] if i + 1 < len(phases) else last
        left, right = x(first), x(end)
        parts.append(
            f'<rect class="phase{min(i, 2)}" x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0):.1f}" '
            f'height="{HEIGHT - _TOP - _BOTTOM}"><title>{html.escape(name)}</title></rect>'
        )
    return parts


def _legend(labels: Sequence[str]) -> str:
    parts, left = [], float(_LEFT)
    for label, colour in zip(labels, COLOURS, strict=False):
        parts.append(
            f'<rect x="{left:.0f}" y="6" width="14" height="3" fill="{colour}"/>'
            f'<text class="label" x="{left + 18:.0f}" y="11">{html.escape(label)}</text>'
        )
        left += 34 + 6.2 * len(label)
    return "".join(parts)


# ---- numbers


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them: means of as many neighbours as that takes, the last point kept."""
    group = math.ceil(len(points) / POINTS)
    if group <= 1:
        return list(points)
    found = []
    for first in range(0, len(points), group):
        part = points[first : first + group]
        found.append((sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)))
    return [*found[:-1], points[-1]]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a fortieth of the points to either side."""
    width = max(1, len(points) // 40)
    found = []
    for i, (step, _) in enumerate(points):
        part = points[max(i - width, 0) : i + width + 1]
        found.append((step, sum(v for _, v in part) / len(part)))
    return found


def _spread(values: Sequence[float]) -> Sequence[float]:
    """The values but for the highest hundredth: one spike of a gradient must not flatten the rest."""
    if len(values) < 100:
        return values
    return sorted(values)[: len(values) - len(values) // 100]


def _range(values: Sequence[float], chart: Chart) -> tuple[float, float]:
    low, high = min(values), max(values)
    if chart.log:
        return low / 1.15, high * 1.15
    if chart.from_zero:
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if chart.from_zero and low == 0 else low - margin), high + margin


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if not log:
        rough = (high - low) / 5
        if rough <= 0:
            return [low]
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= rough * 0.999)
        first = math.ceil(low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
    decades = math.log10(high / low)
    factors = (1,) if decades > 3 else (1, 3) if decades > 1.6 else (1, 2, 5)
    start, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, round(decades / 6))
    found = [f * 10.0**d for d in range(start, end + 1, every) for f in factors]
    return [v for v in found if low <= v <= high]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) >= 1000 else f"{value:.3g}"
