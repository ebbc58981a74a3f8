"""SVG charts: axis ticks, downsampling, and tooltips."""

from __future__ import annotations

import re
from typing import Any

import pytest

from launcher.analysis.svg_charts import ChartAxis, Series, downsample, render_line_chart


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (ChartAxis(0, 100), [0, 20, 40, 60, 80, 100]),
        (ChartAxis(0.3, 0.9), [0.4, 0.6, 0.8]),
        (ChartAxis(0.01, 3, log=True), [0.01, 0.03, 0.1, 0.3, 1, 3]),
        (ChartAxis(1e-6, 1, log=True), [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
    ],
)
def test_axis_ticks_are_round_numbers(axis: ChartAxis, ticks: list[float]) -> None:
    assert axis.make_ticks() == pytest.approx(ticks)


def test_outlier_does_not_flatten_the_chart() -> None:
    """The first update takes a hundred times as long: it is clipped in the plot, and the tooltip shows its value."""
    points = tuple((float(x), 1000.0 if x == 0 else 10.0 + x % 3) for x in range(100))
    drawn = render_line_chart([Series("ms", 0, points)], 100, "ms", zero=True)
    heights = [
        float(pair.split(",")[1]) for pair in re.findall(r'polyline class="line s0" points="(.*?)"', drawn)[0].split()
    ]
    assert max(heights[1:]) - min(heights[1:]) > 10
    assert "ms 1,000" in drawn


def test_downsampling_keeps_mean_and_spread() -> None:
    points: list[tuple[float, Any]] = [(float(x), float(x % 2)) for x in range(1000)]
    means, band = downsample(points, 100)
    assert len(means) == 100
    assert {y for _, y in means} == {0.5}
    assert {(low, high) for _, low, high in band} == {(0.0, 1.0)}
    assert downsample(points[:50], 100) == (points[:50], [])


def parse_tooltips(chart: str) -> dict[float, str]:
    """Return the tooltip texts by samples."""
    strips = re.findall(r"<title>([\d,.]+) samples: ([^<]*)</title>", chart)
    return {float(samples.replace(",", "")): text for samples, text in strips}


def test_tooltips_list_only_series_with_data() -> None:
    """A run that ended early, with a validation every fourth update."""
    long = Series("long", 0, tuple((x, 1.0) for x in range(100, 1700, 100)))
    short = Series("short", 1, tuple((x, 2.0) for x in range(100, 700, 100)))
    sparse = Series("val/loss", 2, ((400, 3.0), (800, 4.0), (1200, 5.0)))
    once = Series("once", 3, ((1000, 6.0),))
    tooltips = parse_tooltips(render_line_chart([long, short, sparse, once], 1600, "speed"))
    assert tooltips[100] == "long 1 · short 2"
    assert tooltips[600] == "long 1 · short 2 · val/loss 3"
    assert tooltips[700] == "long 1 · val/loss 4"
    assert tooltips[1000] == "long 1 · val/loss 4 · once 6"
    assert tooltips[1600] == "long 1"
