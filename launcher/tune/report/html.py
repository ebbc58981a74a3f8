"""HTML page of `tune`: speed with its interval, stages and memory by size. No network access, no script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from launcher.analysis.html_page import escape_html, render_figure, render_page
from launcher.analysis.svg_charts import EventMarker, Series, render_legend, render_line_chart, render_stack_chart
from launcher.system.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_plural,
    format_rate,
)
from launcher.telemetry.stages import STAGES
from launcher.tune.report.text import describe_slow_operators, describe_splits, format_split_name

__all__ = ["render_tune_page"]

POINT_COLUMNS = ("per_device", "samples/s", "low", "high", "ms/update", "epoch", "memory", "label")
SPLIT_COLUMNS = ("one batch as", "samples/s", "low", "high", "sync ms", "memory")


def render_tune_page(document: Mapping[str, Any]) -> str:
    """The complete HTML document."""
    timed = [point for point in document["points"] if point["samples_per_s"]]
    charts = "".join(_render_charts(document, timed)) if timed else ""
    slow = describe_slow_operators(document["operators"])
    sentences = [*([f"{slow[:1].upper()}{slow[1:]}."] if slow else []), *document["notes"]]
    notes = "".join(f"<p>{escape_html(note)}</p>" for note in sentences)
    workers = format_plural(document["world"], "worker")
    subtitle = " · ".join((workers, document["device"], document["precision"], document["measured"]))
    sections = [
        f"<section><p>{escape_html(document['why'])}.</p>{notes}</section>",
        f'<div class="charts">{charts}</div>',
        _render_table(POINT_COLUMNS, map(_format_point_cells, document["points"])),
        *_render_splits(document),
    ]
    return render_page(f"{document['recipe']}: batch sizes", subtitle, sections)


def _render_charts(document: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    sizes = [float(point["per_device"]) for point in timed]
    marks = [] if document["recommended"] is None else [EventMarker(document["recommended"], "resize", "recommended")]
    end = max(sizes)
    series = [_make_throughput_series("samples/s", 0, timed)]
    synthetic = [point for point in document["synthetic"] if point["samples_per_s"]]
    series += [_make_throughput_series("on synthetic data", 1, synthetic)] if synthetic else []
    yield _render_chart_figure(
        "Samples/s by per_device", render_line_chart(series, end, "samples per second", marks, zero=True), series
    )
    if document.get("goodput"):
        yield _render_goodput_chart(document["goodput"], end)
    layers = [(stage, n, [point["stages"][stage] for point in timed]) for n, stage in enumerate(STAGES)]
    drawn = render_stack_chart(layers, sizes, end, "milliseconds per update by stage", marks)
    yield render_figure("Milliseconds per update", drawn, render_legend([(stage, n) for stage, n, _ in layers]))
    memory = [
        Series(
            "memory, MB",
            2,
            tuple((s, point["memory_bytes"] / 1e6) for s, point in zip(sizes, timed, strict=True)),
            dots=True,
        )
    ]
    if document["limit_bytes"] and max(point["memory_bytes"] for point in timed) > 0.1 * document["limit_bytes"]:
        limit = document["limit_bytes"] / 1e6
        memory.append(Series("limit", 3, ((0.0, limit), (end, limit))))
    yield _render_chart_figure(
        "Memory per worker, MB", render_line_chart(memory, end, "memory in megabytes", marks, zero=True), memory
    )


def _make_throughput_series(label: str, colour: int, points: Sequence[Mapping[str, Any]]) -> Series:
    middle = tuple((float(point["per_device"]), float(point["samples_per_s"])) for point in points)
    band = tuple((float(point["per_device"]), float(point["low"]), float(point["high"])) for point in points)
    return Series(label, colour, middle, band, dots=True)


def _render_goodput_chart(goodput: Mapping[str, Any], end: float) -> str:
    """Chart of goodput (samples/s times efficiency) by size, with the combined interval."""
    points = [{**point, "samples_per_s": point["goodput"]} for point in goodput["points"]]
    series = [_make_throughput_series("goodput", 4, points)]
    marks = [EventMarker(goodput["best"], "resize", "most progress")]
    title = f"Goodput at a noise scale of {goodput['noise']['scale']:.3g} samples ({goodput['noise']['source']})"
    return _render_chart_figure(
        title, render_line_chart(series, end, "progress per second, in samples", marks, zero=True), series
    )


def _render_chart_figure(title: str, drawn: str, series: Sequence[Series]) -> str:
    keys = render_legend([(line.label, line.colour) for line in series])
    return render_figure(title, drawn, keys)


def _render_splits(document: Mapping[str, Any]) -> Iterator[str]:
    """The same batch at different accumulation, if it was measured."""
    sentence = describe_splits(document)
    if sentence:
        yield "<h2>The same batch, split differently</h2>"
        yield f"<p>{escape_html(sentence[:1].upper() + sentence[1:])}.</p>"
        yield _render_table(SPLIT_COLUMNS, map(_format_split_cells, document["splits"]))


def _format_split_cells(split: Mapping[str, Any]) -> list[str]:
    if split["samples_per_s"] is None:
        return [format_split_name(split), "", "", "", "", f"out of memory ({split['where']})"]
    speeds = [format_rate(split[name]) for name in ("samples_per_s", "low", "high")]
    return [format_split_name(split), *speeds, format_number(split["sync_ms"]), format_bytes(split["memory_bytes"])]


def _render_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape_html(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape_html(cell)}</td>' for cell in cells)}</tr>" for cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _format_point_cells(point: Mapping[str, Any]) -> list[str]:
    first, last = format_count(point["per_device"]), str(point["label"])
    if point["samples_per_s"] is None:
        return [first, "", "", "", "", "", "", f"{last} ({'predicted' if point['predicted'] else point['where']})"]
    speeds = [format_rate(point[name]) for name in ("samples_per_s", "low", "high")]
    times = [format_number(point["ms_per_update"]), format_duration(point["epoch_s"])]
    return [first, *speeds, *times, format_bytes(point["memory_bytes"]), last]
