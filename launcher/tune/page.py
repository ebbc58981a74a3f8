"""HTML page of `tune`: speed with its interval, stages and memory by size. No network access, no script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from launcher.charts import Mark, Series, legend, line_chart, safe, stack_chart
from launcher.report_style import STYLE
from launcher.sinks.text import count, figure, plural, rate, size, took
from launcher.stages import STAGES
from launcher.tune.words import divided, name_of, slowed

__all__ = ["page"]

COLUMNS = ("per_device", "samples/s", "low", "high", "ms/update", "epoch", "memory", "label")
SPLITS = ("one batch as", "samples/s", "low", "high", "sync ms", "memory")


def page(found: Mapping[str, Any]) -> str:
    """The complete HTML document."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"{found['recipe']}: batch sizes"
    timed = [point for point in found["points"] if point["samples_per_s"]]
    charts = "".join(_charts(found, timed)) if timed else ""
    slow = slowed(found["operators"])
    said = [*([f"{slow[:1].upper()}{slow[1:]}."] if slow else []), *found["notes"]]
    notes = "".join(f"<p>{safe(note)}</p>" for note in said)
    workers = plural(found["world"], "worker")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{safe(title)}</h1><p>{safe(workers)} · {safe(found['device'])} · {safe(found['precision'])} · "
        f"{safe(found['measured'])}</p></header>\n<section><p>{safe(found['why'])}.</p>{notes}</section>\n"
        f'<div class="charts">{charts}</div>\n{_table(COLUMNS, map(_cells, found["points"]))}\n'
        f"{_splits(found)}</main>\n</body>\n</html>\n"
    )


def _charts(found: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    sizes = [float(point["per_device"]) for point in timed]
    marks = [] if found["recommended"] is None else [Mark(found["recommended"], "resize", "recommended")]
    end = max(sizes)
    series = [_speed("samples/s", 0, timed)]
    beside = [one for one in found["synthetic"] if one["samples_per_s"]]
    series += [_speed("on synthetic data", 1, beside)] if beside else []
    yield _figure("Samples/s by per_device", line_chart(series, end, "samples per second", marks, zero=True), series)
    if found.get("goodput"):
        yield _goodput(found["goodput"], end)
    layers = [(stage, n, [point["stages"][stage] for point in timed]) for n, stage in enumerate(STAGES)]
    drawn = stack_chart(layers, sizes, end, "milliseconds per update by stage", marks)
    yield f"<figure><figcaption>Milliseconds per update</figcaption>{drawn}{legend([(a, n) for a, n, _ in layers])}"
    yield "</figure>"
    memory = [
        Series(
            "memory, MB",
            2,
            tuple((s, point["memory_bytes"] / 1e6) for s, point in zip(sizes, timed, strict=True)),
            dots=True,
        )
    ]
    if found["limit_bytes"] and max(point["memory_bytes"] for point in timed) > 0.1 * found["limit_bytes"]:
        limit = found["limit_bytes"] / 1e6
        memory.append(Series("limit", 3, ((0.0, limit), (end, limit))))
    yield _figure("Memory per worker, MB", line_chart(memory, end, "memory in megabytes", marks, zero=True), memory)


def _speed(label: str, colour: int, points: Sequence[Mapping[str, Any]]) -> Series:
    middle = tuple((float(point["per_device"]), float(point["samples_per_s"])) for point in points)
    band = tuple((float(point["per_device"]), float(point["low"]), float(point["high"])) for point in points)
    return Series(label, colour, middle, band, dots=True)


def _goodput(goodput: Mapping[str, Any], end: float) -> str:
    """Chart of goodput (samples/s times efficiency) by size, with the combined interval."""
    points = [{**point, "samples_per_s": point["goodput"]} for point in goodput["points"]]
    series = [_speed("goodput", 4, points)]
    marks = [Mark(goodput["best"], "resize", "most progress")]
    title = f"Goodput at a noise scale of {goodput['noise']['scale']:.3g} samples ({goodput['noise']['source']})"
    return _figure(title, line_chart(series, end, "progress per second, in samples", marks, zero=True), series)


def _figure(title: str, drawn: str, series: Sequence[Series]) -> str:
    keys = legend([(one.label, one.colour) for one in series])
    return f"<figure><figcaption>{safe(title)}</figcaption>{drawn}{keys}</figure>"


def _splits(found: Mapping[str, Any]) -> str:
    """Section on the same batch at different accumulation; empty if not measured."""
    said = divided(found)
    if not said:
        return ""
    heading = f"<h2>The same batch, split differently</h2>\n<p>{safe(said[:1].upper() + said[1:])}.</p>\n"
    return f"{heading}{_table(SPLITS, map(_split, found['splits']))}\n"


def _split(one: Mapping[str, Any]) -> list[str]:
    if one["samples_per_s"] is None:
        return [name_of(one), "", "", "", "", f"out of memory ({one['where']})"]
    speeds = [rate(one[name]) for name in ("samples_per_s", "low", "high")]
    return [name_of(one), *speeds, figure(one["sync_ms"]), size(one["memory_bytes"])]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{safe(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{safe(cell)}</td>' for cell in cells)}</tr>" for cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cells(point: Mapping[str, Any]) -> list[str]:
    first, last = count(point["per_device"]), str(point["label"])
    if point["samples_per_s"] is None:
        return [first, "", "", "", "", "", "", f"{last} ({'predicted' if point['predicted'] else point['where']})"]
    speeds = [rate(point[name]) for name in ("samples_per_s", "low", "high")]
    times = [figure(point["ms_per_update"]), took(point["epoch_s"])]
    return [first, *speeds, *times, size(point["memory_bytes"]), last]
