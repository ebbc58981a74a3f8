"""Charts as inline SVG without scripts or styles; the page's CSS classes set the colours for light and dark mode."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from launcher.analysis.html_page import escape_html
from launcher.system.formatting import format_number

__all__ = [
    "COLOUR_COUNT",
    "ChartAxis",
    "EventMarker",
    "Series",
    "choose_bin_count",
    "downsample",
    "render_legend",
    "render_line_chart",
    "render_stack_chart",
]

COLOUR_COUNT = 8
CHART_WIDTH, HEIGHT = 640, 232
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 30
MAX_BINS = 160
SPEED_BINS = 48  # fewer bins than other curves: the throughput of single updates is noisy
MAX_TOOLTIP_STRIPS = 80
MIN_LOG_RATIO = 30.0  # max/min ratio above which a logarithmic axis is used
CLIP_QUANTILE, CLIP_ROOM = 0.98, 1.5

CurvePoints = Sequence[tuple[float, float]]


def choose_bin_count(key: str) -> int:
    """The number of points to which a metric's curve is averaged."""
    return SPEED_BINS if key.startswith("throughput/") else MAX_BINS


@dataclass(frozen=True)
class Series:
    """One line of (x, y) points, ascending by x; `band` has (x, low, high) for points that average several values."""

    label: str
    colour: int
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()
    steps: bool = False
    dots: bool = False


@dataclass(frozen=True)
class EventMarker:
    """An event at x, drawn as a vertical line; `kind` is the CSS class: restart or resize."""

    x: float
    kind: str
    label: str


@dataclass(frozen=True)
class ChartAxis:
    """Range of an axis; `log` if it is logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def from_values(cls, values: Sequence[float], *, zero: bool = False, log: bool = False) -> ChartAxis:
        """Make an axis that covers the values. `zero`: start at 0; `log`: allow a logarithmic axis for wide ranges."""
        low, high = min(values), max(values)
        if log and low > 0 and high > MIN_LOG_RATIO * low:
            return cls(low, high, log=True)
        low = min(0.0, low) if zero else low
        room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        return cls(low if zero and low == 0 else low - room, high + room)

    def fraction(self, value: float) -> float:
        """Position on the axis from 0 (low end) to 1 (high end); values outside are clamped."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        return min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5

    def make_ticks(self, about: int = 5) -> list[float]:
        """Round numbers; on a logarithmic axis powers of ten, with 2 and 5 or 3 times them for short ranges."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            spans = math.log10(self.high / self.low)
            digits = (1, 2, 5) if spans < 1.5 else (1, 3) if spans < 3 else (1,)
            ticks = [digit * 10.0**decade for decade in decades for digit in digits]
            return [value for value in ticks if self.low <= value <= self.high]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / about))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= about)
        first = math.ceil(self.low / step - 1e-9)
        return [count * step for count in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class PlotArea:
    """Maps values to pixel coordinates."""

    x: ChartAxis
    y: ChartAxis

    def format_point(self, x: float, y: float) -> str:
        return f"{self.x_pixel(x):.1f},{self.y_pixel(y):.1f}"

    def x_pixel(self, x: float) -> float:
        return LEFT + self.x.fraction(x) * (CHART_WIDTH - LEFT - RIGHT)

    def y_pixel(self, y: float) -> float:
        return HEIGHT - BOTTOM - self.y.fraction(y) * (HEIGHT - TOP - BOTTOM)


def downsample(
    points: CurvePoints, bins: int = MAX_BINS
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """Average neighbouring points into at most `bins` bins; returns the means and (x, min, max) of each bin.

    With at most `bins` points they are returned as they are, with an empty band.
    """
    size = max(1, -(-len(points) // bins))
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    band = [
        (x, min(y for _, y in group), max(y for _, y in group)) for (x, _), group in zip(means, groups, strict=True)
    ]
    return means, band if size > 1 else []


def render_line_chart(
    series: Sequence[Series],
    x_high: float,
    label: str,
    marks: Sequence[EventMarker] = (),
    *,
    zero: bool = False,
    log: bool = False,
) -> str:
    """Line chart over samples. Outliers are clipped at the upper edge; the tooltip shows their value."""
    values = [y for line in series for _, y in line.points] + [y for line in series for _, *ys in line.band for y in ys]
    frame = PlotArea(ChartAxis(0.0, x_high or 1.0), ChartAxis.from_values(_clip_outliers(values), zero=zero, log=log))
    parts = [*_render_grid(frame), *_render_markers(frame, marks)]
    for line in series:
        parts += _render_line(frame, line)
    return _render_svg(label, [*parts, *_render_tooltip_strips(frame, [(line.label, line.points) for line in series])])


def render_stack_chart(
    layers: Sequence[tuple[str, int, Sequence[float]]],
    xs: Sequence[float],
    x_high: float,
    label: str,
    marks: Sequence[EventMarker] = (),
) -> str:
    """Stacked area chart; each layer is (label, colour, one value per x)."""
    totals = [sum(column) for column in zip(*(values for _, _, values in layers), strict=True)]
    frame = PlotArea(ChartAxis(0.0, x_high or 1.0), ChartAxis.from_values([0.0, *_clip_outliers(totals)], zero=True))
    parts = list(_render_grid(frame))
    base = [0.0] * len(xs)
    for _, colour, values in layers:
        top = [low + value for low, value in zip(base, values, strict=True)]
        outline = [*zip(xs, top, strict=True), *reversed(list(zip(xs, base, strict=True)))]
        parts.append(
            f'<polygon class="layer f{colour}" points="{" ".join(frame.format_point(x, y) for x, y in outline)}"/>'
        )
        base = top
    curves = [(name, list(zip(xs, values, strict=True))) for name, _, values in layers]
    return _render_svg(label, [*parts, *_render_markers(frame, marks), *_render_tooltip_strips(frame, curves)])


def render_legend(entries: Sequence[tuple[str, int]]) -> str:
    items = "".join(f'<li><span class="key k{colour}"></span>{escape_html(label)}</li>' for label, colour in entries)
    return f'<ul class="legend">{items}</ul>'


def _clip_outliers(values: Sequence[float]) -> list[float]:
    """Clip outliers that would flatten the chart: the first update can take a hundred times as long as the rest."""
    ordered = sorted(values)
    limit = ordered[int(CLIP_QUANTILE * (len(ordered) - 1))] * CLIP_ROOM
    return [min(value, limit) for value in ordered] if limit > 0 and len(ordered) > 10 else ordered


def _render_svg(label: str, parts: Sequence[str]) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {CHART_WIDTH} {HEIGHT}" role="img" aria-label="{escape_html(label)}">{inside}</svg>'


def _render_grid(frame: PlotArea) -> Iterator[str]:
    for value in frame.y.make_ticks():
        y = frame.y_pixel(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{CHART_WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{_format_tick(value)}</text>'
    for value in frame.x.make_ticks(6):
        yield f'<text class="tick mid" x="{frame.x_pixel(value):.1f}" y="{HEIGHT - 8}">{_format_tick(value)}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{CHART_WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'


def _format_tick(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * 10 or (abs(value) >= unit and value % unit == 0):
            return f"{value / unit:.4g}{name}"
    return format_number(value) if value else "0"


def _render_markers(frame: PlotArea, marks: Sequence[EventMarker]) -> Iterator[str]:
    for mark in marks:
        x = frame.x_pixel(mark.x)
        yield (
            f'<g class="mark {escape_html(mark.kind)}">'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<path d="M{x - 4:.1f} {TOP}h8l-4 7z"/><title>{escape_html(mark.label)}</title></g>'
        )


def _render_line(frame: PlotArea, series: Series) -> Iterator[str]:
    if series.band:
        upper = [frame.format_point(x, high) for x, _, high in series.band]
        lower = [frame.format_point(x, low) for x, low, _ in reversed(series.band)]
        yield f'<polygon class="band f{series.colour}" points="{" ".join(upper + lower)}"/>'
    points = list(_iter_step_corners(series.points)) if series.steps else list(series.points)
    if len(points) > 1:
        pixels = " ".join(frame.format_point(x, y) for x, y in points)
        yield f'<polyline class="line s{series.colour}" points="{pixels}"/>'
    if series.dots or len(points) == 1:
        for x, y in points:
            centre = f'cx="{frame.x_pixel(x):.1f}" cy="{frame.y_pixel(y):.1f}"'
            yield f'<circle class="dot f{series.colour}" {centre} r="3"/>'


def _iter_step_corners(points: CurvePoints) -> Iterator[tuple[float, float]]:
    """CurvePoints of a step line: each value holds until the next one, with corners only where it changes."""
    previous: float | None = None
    for index, (x, y) in enumerate(points):
        if previous is not None and y != previous:
            yield x, previous
        if y != previous or index == len(points) - 1:
            yield x, y
        previous = y


def _render_tooltip_strips(frame: PlotArea, curves: Sequence[tuple[str, CurvePoints]]) -> Iterator[str]:
    """Invisible columns with tooltips for the values under the pointer."""
    xs = sorted({x for _, points in curves for x, _ in points})
    xs = xs[:: max(1, -(-len(xs) // MAX_TOOLTIP_STRIPS))]
    step = max((right - left for left, right in pairwise(xs)), default=0.0)
    for index, x in enumerate(xs):
        start = frame.x_pixel(x if index == 0 else (xs[index - 1] + x) / 2)
        end = frame.x_pixel(x if index == len(xs) - 1 else (x + xs[index + 1]) / 2)
        covering = [(label, points) for label, points in curves if _is_within_curve(points, x, step)]
        values = " · ".join(f"{label} {format_number(_find_nearest_value(points, x))}" for label, points in covering)
        yield (
            f'<rect class="strip" x="{start:.1f}" y="{TOP}" width="{max(1.0, end - start):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape_html(f"{x:,.0f} samples: {values}")}</title></rect>'
        )


def _is_within_curve(points: CurvePoints, x: float, step: float) -> bool:
    """Whether x is within the curve's range, extended by half a step on both sides."""
    if not points:
        return False
    (begin, _), (end, _) = points[0], points[-1]
    first, last = (points[1][0] - begin, end - points[-2][0]) if len(points) > 1 else (step, step)
    return begin - first / 2 <= x <= end + last / 2


def _find_nearest_value(points: CurvePoints, x: float) -> float:
    """The value of the point nearest to x."""
    index = bisect_left(points, (x, -math.inf))
    return min(points[max(0, index - 1) : index + 1], key=lambda point: abs(point[0] - x))[1]
