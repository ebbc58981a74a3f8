"""The `report` command: one self-contained HTML page about one or several runs, without network or scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from launcher.analysis.advice import STAGE_DESCRIPTIONS
from launcher.analysis.html_comparison import render_best_points, render_comparison_table, render_overlay_charts
from launcher.analysis.html_page import escape_html, render_figure, render_page
from launcher.analysis.run_report import RunReport
from launcher.analysis.svg_charts import (
    EventMarker,
    Series,
    choose_bin_count,
    downsample,
    render_legend,
    render_line_chart,
    render_stack_chart,
)
from launcher.system.formatting import (
    format_clock,
    format_count,
    format_duration,
    format_number,
    format_percentage,
    format_plural,
    format_rate,
)
from launcher.system.redaction import mask_secrets
from launcher.telemetry.stages import STAGES

__all__ = ["render_report"]

EVENT_TITLES = ("oom", "alarm", "preempt", "resize", "resume", "target", "done", "error")
STAGE_BINS = 120
MAX_SHOWN_EVENTS = 200


def render_report(runs: Sequence[RunReport]) -> str:
    """The complete HTML document."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    if len(runs) == 1:
        return render_page(title, _format_subtitle(runs[0]), [_render_run(runs[0])])
    details = [f"<details><summary>{escape_html(run.name)}</summary>{_render_run(run)}</details>" for run in runs]
    subtitle = "Curves over samples seen. Details of each run follow below the tables."
    sections = [render_best_points(runs), render_comparison_table(runs), *render_overlay_charts(runs), *details]
    return render_page(title, subtitle, sections)


def _format_subtitle(run: RunReport) -> str:
    start = next((event for event in run.events if event.get("event") == "start"), {})
    workers = format_plural(int(run.rows[-1].get("world", 1)), "worker")
    state = f"{'complete' if run.done else 'not complete'} · curves over samples seen"
    facts = [start.get("recipe"), workers, start.get("device_name"), state]
    return mask_secrets(" · ".join(str(fact) for fact in facts if fact))


# --- one run ------------------------------------------------------------------------------------------------------


def _render_run(run: RunReport) -> str:
    marks = list(_iter_generation_markers(run))
    charts = [chart for chart in _render_charts(run, marks) if chart]
    parts = [
        _render_tiles(run),
        _render_verdict(run),
        f'<div class="charts">{"".join(charts)}</div>',
        _render_event_table(run),
    ]
    return "\n".join(part for part in parts if part)


def _render_tiles(run: RunReport) -> str:
    last = run.rows[-1]
    facts = [("samples", format_count(run.samples)), ("updates", format_count(last["update"]))]
    if "seconds" in run.done:
        facts.append(("time", format_duration(run.done["seconds"])))
    speeds = sorted(speed for _, speed in run.get_curve("throughput/samples_per_s"))
    if run.explanation or speeds:
        facts.append(("samples/s", format_rate(run.explanation.get("samples_per_s") or speeds[len(speeds) // 2])))
    for key in ("train/loss", *run.list_metrics("val/")):
        curve = run.get_curve(key)
        if curve:
            facts.append((f"{key}, last", format_number(curve[-1][1])))
    if "batch/global" in last:
        facts.append(("global batch, last", format_count(last["batch/global"])))
    tiles = "".join(f"<div><dt>{escape_html(name)}</dt><dd>{escape_html(value)}</dd></div>" for name, value in facts)
    return f'<dl class="tiles">{tiles}</dl>'


def _render_verdict(run: RunReport) -> str:
    explanation = run.explanation
    if not explanation:
        return ""
    why = f"{explanation['why'][:1].upper()}{explanation['why'][1:]}."
    advice = "".join(f"<li>{escape_html(line)}</li>" for line in explanation["advice"])
    table = _render_stage_table(explanation["stages"])
    heading = f"<h2>Where the time goes</h2><p>{escape_html(why)}</p>"
    return f'<section class="verdict">{heading}<ul>{advice}</ul>{table}</section>'


def _render_stage_table(stages: Mapping[str, Mapping[str, float]]) -> str:
    """The stages chart as a table, for readers of numbers and for screen readers."""
    lines = "".join(
        f'<tr><th scope="row">{escape_html(stage)}</th><td>{escape_html(STAGE_DESCRIPTIONS[stage])}</td>'
        f"<td>{format_number(values['ms'])} ms</td><td>{format_percentage(values['share'])}</td></tr>"
        for stage, values in stages.items()
    )
    heads = ("stage", "what it is", "time per update", "share of the time")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    caption = (
        "<caption>Time of each stage in a typical update; the first updates after each start are left out</caption>"
    )
    return f'<div class="scroll"><table class="stages">{caption}<tr>{head}</tr>{lines}</table></div>'


def _render_charts(run: RunReport, marks: Sequence[EventMarker]) -> Iterator[str]:
    yield _render_loss_chart(run, marks)
    for key in run.list_metrics("val/"):
        if key != "val/loss":
            yield _render_metric_chart(run, key, "", marks, dots=True)
    yield _render_metric_chart(run, "throughput/samples_per_s", "samples/s", marks, zero=True)
    yield _render_stage_chart(run, marks)
    yield _render_metric_chart(run, "lr/value", "learning rate", marks, zero=True)
    yield _render_metric_chart(run, "batch/global", "global batch, samples per update", marks, zero=True, steps=True)
    if run.get_curve("noise/scale"):
        yield _render_noise_chart(run, marks)
    yield _render_metric_chart(run, "memory/peak_bytes", "memory, peak bytes", marks, zero=True, steps=True)


def _render_metric_chart(
    run: RunReport,
    key: str,
    title: str,
    marks: Sequence[EventMarker],
    *,
    zero: bool = False,
    steps: bool = False,
    dots: bool = False,
) -> str:
    curve = run.get_curve(key)
    if not curve:
        return ""
    means, band = (curve, []) if steps else downsample(curve, choose_bin_count(key))
    series = Series(title or key, 0, tuple(means), tuple(band), steps, dots and len(curve) <= 60)
    return render_figure(title or key, render_line_chart([series], run.samples, title or key, marks, zero=zero))


def _render_loss_chart(run: RunReport, marks: Sequence[EventMarker]) -> str:
    series = []
    for colour, key in enumerate(("train/loss", "val/loss")):
        curve = run.get_curve(key)
        if curve:
            means, band = downsample(curve)
            series.append(Series(key, colour, tuple(means), tuple(band), dots=colour == 1 and len(curve) <= 60))
    if not series:
        return ""
    keys = render_legend([(line.label, line.colour) for line in series])
    return render_figure("loss", keys, render_line_chart(series, run.samples, "loss", marks, log=True))


def _render_noise_chart(run: RunReport, marks: Sequence[EventMarker]) -> str:
    scale, _ = downsample(run.get_curve("noise/scale"))
    bounds = [
        (row["samples"], row["noise/scale_low"], row["noise/scale_high"])
        for row in run.rows
        if "noise/scale_low" in row and "noise/scale_high" in row
    ]
    series = [Series("noise scale", 0, tuple(scale), tuple(bounds[:: max(1, len(bounds) // 160)]))]
    series.append(Series("global batch", 1, tuple(run.get_curve("batch/global")), steps=True))
    keys = render_legend([(line.label, line.colour) for line in series])
    return render_figure(
        "noise scale, samples", keys, render_line_chart(series, run.samples, "noise scale", marks, log=True)
    )


def _render_stage_chart(run: RunReport, marks: Sequence[EventMarker]) -> str:
    rows = [row for row in run.rows if any(f"stage/{stage}/ms" in row for stage in STAGES)]
    if len(rows) < 2:
        return ""
    size = -(-len(rows) // STAGE_BINS)
    bins = [rows[at : at + size] for at in range(0, len(rows), size)]
    xs = [sum(row["samples"] for row in part) / len(part) for part in bins]
    layers = []
    for colour, stage in enumerate(STAGES):
        values = [sum(row.get(f"stage/{stage}/ms", 0.0) for row in part) / len(part) for part in bins]
        if any(values):
            layers.append((stage, colour, values))
    keys = render_legend([(name, colour) for name, colour, _ in layers])
    title = "stages, ms per update"
    return render_figure(title, keys, render_stack_chart(layers, xs, run.samples, title, marks))


def _iter_generation_markers(run: RunReport) -> Iterator[EventMarker]:
    """Mark each new generation: as a resize if the number of workers changed, else as a restart."""
    for previous, row in pairwise(run.rows):
        if row.get("generation", 0) > previous.get("generation", 0):
            world_sizes = (previous.get("world", 1), row.get("world", 1))
            cost = f", after {format_duration(row['elastic/recovery_s'])}" if "elastic/recovery_s" in row else ""
            if world_sizes[0] != world_sizes[1]:
                yield EventMarker(
                    previous["samples"], "resize", f"resize: {world_sizes[0]:.0f} to {world_sizes[1]:.0f} workers{cost}"
                )
            else:
                yield EventMarker(previous["samples"], "restart", f"restart {row['generation']:.0f}{cost}")


def _render_event_table(run: RunReport) -> str:
    """Table of the important events with the time since the start."""
    events = [event for event in run.events if event.get("event") in EVENT_TITLES]
    if not events:
        return ""
    start = _read_event_time(run.events[0])
    lines = "".join(
        f"<tr><td>{format_clock(_read_event_time(event) - start)}</td><td>{escape_html(event['event'])}</td>"
        f"<td>{escape_html(mask_secrets(_describe_event(event)))}</td></tr>"
        for event in events[:MAX_SHOWN_EVENTS]
    )
    more = f"<p>and {len(events) - MAX_SHOWN_EVENTS} more in events.jsonl</p>" if len(events) > MAX_SHOWN_EVENTS else ""
    head = "<tr><th>after</th><th>event</th><th></th></tr>"
    table = f'<div class="scroll"><table class="events">{head}{lines}</table></div>'
    return f"<section><h2>Events</h2>{table}{more}</section>"


def _read_event_time(event: Mapping[str, Any]) -> float:
    time = event.get("time")
    return float(time) if isinstance(time, int | float) else 0.0


def _describe_event(event: Mapping[str, Any]) -> str:
    """One line for an event: its `detail`, else its fields."""
    if isinstance(event.get("detail"), str):
        return str(event["detail"])
    facts = {key: value for key, value in event.items() if key not in ("time", "event")}
    return "; ".join(
        f"{key} {_format_value(value)}" for key, value in facts.items() if value not in (None, "", [], {})
    )[:400]


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_format_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_format_value, value))
    return format_number(value) if isinstance(value, float) else str(value)
