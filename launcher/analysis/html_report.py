"""The `report` command: one self-contained HTML page about one or several runs, without network or scripts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from launcher.analysis.explain import explain_run
from launcher.analysis.html_style import STYLESHEET
from launcher.analysis.run_profile import compute_profile
from launcher.analysis.svg_charts import (
    COLOUR_COUNT,
    MAX_BINS,
    EventMarker,
    Series,
    downsample,
    escape_html,
    render_legend,
    render_line_chart,
    render_stack_chart,
)
from launcher.errors import UsageError
from launcher.run_dir.metrics_reader import MetricValues, RunMetrics, find_runs, read_run_metrics
from launcher.system.formatting import format_clock, format_count, format_duration, format_number, format_rate
from launcher.system.redaction import mask_secrets
from launcher.telemetry.stages import STAGES

__all__ = ["RunReport", "default_output_path", "load_reports", "render_report"]

EVENT_TITLES = ("oom", "alarm", "preempt", "resize", "resume", "target", "done", "error")
STAGE_BINS = 120
SPEED_BINS = 48  # fewer bins than other curves: the throughput of single updates is noisy
MAX_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class RunReport:
    """A run's data for the report. `settings` is its run.yaml, flattened to dotted keys."""

    history: RunMetrics
    events: tuple[Mapping[str, Any], ...]
    done: Mapping[str, Any]
    settings: Mapping[str, str]

    @property
    def rows(self) -> tuple[MetricValues, ...]:
        return self.history.rows

    @property
    def name(self) -> str:
        return mask_secrets(self.history.name)

    @property
    def samples(self) -> float:
        return self.rows[-1]["samples"]

    @cached_property
    def explanation(self) -> Mapping[str, Any]:
        """The JSON document of `explain`; empty without stage times."""
        try:
            return explain_run(compute_profile(self.history))
        except UsageError:
            return {}

    def get_curve(self, key: str) -> list[tuple[float, float]]:
        return [(row["samples"], row[key]) for row in self.rows if key in row]

    def list_metrics(self, prefix: str) -> list[str]:
        return sorted({key for row in self.rows for key in row if key.startswith(prefix)})


def load_reports(words: Sequence[str]) -> Iterator[RunReport]:
    """Load the runs named on the command line; a folder of runs stands for all runs in it.

    Raises:
        RequestError: a name does not match any run.
    """
    for word in words:
        for folder in find_runs(word):
            yield RunReport(
                read_run_metrics(str(folder)),
                tuple(_read_events(folder)),
                _read_done_file(folder),
                _read_settings(folder),
            )


def default_output_path(words: Sequence[str]) -> Path:
    """Default path of the page: in the run directory, or in the common parent directory of several runs."""
    found = [folder for word in words for folder in find_runs(word)]
    if len(found) == 1:
        return found[0] / "report.html"
    parents = {folder.parent for folder in found}
    if len(parents) > 1:
        raise UsageError(f"report: {len(found)} runs are in different folders: add -o FILE.html")
    return parents.pop() / "report.html"


def render_report(runs: Sequence[RunReport]) -> str:
    """The complete HTML document."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = [f"<header><h1>{escape_html(title)}</h1>{_format_subtitle(runs)}</header>"]
    if len(runs) > 1:
        body += [_render_comparison_table(runs), *_render_overlay_charts(runs)]
        body += [f"<details><summary>{escape_html(run.name)}</summary>{_render_run(run)}</details>" for run in runs]
    else:
        body.append(_render_run(runs[0]))
    digest = base64.b64encode(hashlib.sha256(STYLESHEET.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape_html(title)}</title>\n<style>{STYLESHEET}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _format_subtitle(runs: Sequence[RunReport]) -> str:
    if len(runs) > 1:
        return "<p>Curves over samples seen. Details of each run follow below the tables.</p>"
    start = next((event for event in runs[0].events if event.get("event") == "start"), {})
    facts = [start.get("recipe"), _format_plural(runs[0].rows[-1].get("world", 1), "worker"), start.get("device_name")]
    state = f"{'complete' if runs[0].done else 'not complete'} · curves over samples seen"
    return f"<p>{escape_html(mask_secrets(' · '.join(str(fact) for fact in [*facts, state] if fact)))}</p>"


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
    told = run.explanation
    if not told:
        return ""
    why = f"{told['why'][:1].upper()}{told['why'][1:]}."
    advice = "".join(f"<li>{escape_html(line)}</li>" for line in told["advice"])
    return f'<section class="verdict"><h2>Where the time goes</h2><p>{escape_html(why)}</p><ul>{advice}</ul></section>'


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


def _render_figure(title: str, chart: str, keys: str = "") -> str:
    return f"<figure><figcaption>{escape_html(title)}</figcaption>{keys}{chart}</figure>"


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
    bins = SPEED_BINS if key.startswith("throughput/") else MAX_BINS
    means, band = (curve, []) if steps else downsample(curve, bins)
    series = Series(title or key, 0, tuple(means), tuple(band), steps, dots and len(curve) <= 60)
    return _render_figure(title or key, render_line_chart([series], run.samples, title or key, marks, zero=zero))


def _render_loss_chart(run: RunReport, marks: Sequence[EventMarker]) -> str:
    series = []
    for colour, key in enumerate(("train/loss", "val/loss")):
        curve = run.get_curve(key)
        if curve:
            means, band = downsample(curve)
            series.append(Series(key, colour, tuple(means), tuple(band), dots=colour == 1 and len(curve) <= 60))
    if not series:
        return ""
    keys = render_legend([(each.label, each.colour) for each in series])
    return _render_figure("loss", render_line_chart(series, run.samples, "loss", marks, log=True), keys)


def _render_noise_chart(run: RunReport, marks: Sequence[EventMarker]) -> str:
    scale, _ = downsample(run.get_curve("noise/scale"))
    bounds = [
        (row["samples"], row["noise/scale_low"], row["noise/scale_high"])
        for row in run.rows
        if "noise/scale_low" in row and "noise/scale_high" in row
    ]
    series = [Series("noise scale", 0, tuple(scale), tuple(bounds[:: max(1, len(bounds) // 160)]))]
    series.append(Series("global batch", 1, tuple(run.get_curve("batch/global")), steps=True))
    keys = render_legend([(each.label, each.colour) for each in series])
    return _render_figure(
        "noise scale, samples", render_line_chart(series, run.samples, "noise scale", marks, log=True), keys
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
    return _render_figure(title, render_stack_chart(layers, xs, run.samples, title, marks), keys)


def _iter_generation_markers(run: RunReport) -> Iterator[EventMarker]:
    """Mark each new generation: as a resize if the number of workers changed, else as a restart."""
    for before, after in pairwise(run.rows):
        if after.get("generation", 0) > before.get("generation", 0):
            worlds = (before.get("world", 1), after.get("world", 1))
            cost = f", after {format_duration(after['elastic/recovery_s'])}" if "elastic/recovery_s" in after else ""
            if worlds[0] != worlds[1]:
                yield EventMarker(
                    before["samples"], "resize", f"resize: {worlds[0]:.0f} to {worlds[1]:.0f} workers{cost}"
                )
            else:
                yield EventMarker(before["samples"], "restart", f"restart {after['generation']:.0f}{cost}")


def _render_event_table(run: RunReport) -> str:
    """Table of the important events with the time since the start."""
    told = [event for event in run.events if event.get("event") in EVENT_TITLES]
    if not told:
        return ""
    began = _read_event_time(run.events[0])
    lines = "".join(
        f"<tr><td>{format_clock(_read_event_time(event) - began)}</td><td>{escape_html(event['event'])}</td>"
        f"<td>{escape_html(mask_secrets(_describe_event(event)))}</td></tr>"
        for event in told[:200]
    )
    more = f"<p>and {len(told) - 200} more in events.jsonl</p>" if len(told) > 200 else ""
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


# --- several runs -------------------------------------------------------------------------------------------------


def _render_comparison_table(runs: Sequence[RunReport]) -> str:
    """Table with one line per run: changed keys, progress, throughput, best metrics and bottleneck."""
    changed = _find_changed_keys(runs)
    metrics = sorted({key for run in runs for key in run.list_metrics("val/")})
    heads = [
        "",
        "run",
        *changed,
        "samples",
        "updates",
        "time",
        "samples/s",
        *(f"best {key}" for key in metrics),
        "limit",
    ]
    lines = []
    for place, run in enumerate(runs):
        cells = [*(run.settings.get(key, "") for key in changed), *_iter_comparison_cells(run, metrics)]
        key = f'<span class="key k{place % COLOUR_COUNT}"></span>' if place < COLOUR_COUNT else ""
        tds = "".join(f"<td>{escape_html(mask_secrets(cell))}</td>" for cell in cells)
        lines.append(f'<tr><td>{key}</td><th scope="row">{escape_html(run.name)}</th>{tds}</tr>')
    head = "".join(f"<th>{escape_html(name)}</th>" for name in heads)
    return f'<section><div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div></section>'


def _iter_comparison_cells(run: RunReport, metrics: Sequence[str]) -> Iterator[str]:
    yield format_count(run.samples)
    yield format_count(run.rows[-1]["update"])
    yield format_duration(run.done["seconds"]) if "seconds" in run.done else "not complete"
    told = run.explanation
    yield format_rate(told["samples_per_s"]) if told else ""
    for key in metrics:
        values = [value for _, value in run.get_curve(key)]
        best: Callable[[list[float]], float] = min if "loss" in key else max
        yield format_number(best(values)) if values else ""
    yield f"{told['bottleneck']} {100 * told['share']:.0f} %" if told else ""


def _find_changed_keys(runs: Sequence[RunReport]) -> list[str]:
    """The first few configuration keys whose values differ between the runs."""
    told = [run.settings for run in runs if run.settings]
    keys = sorted({key for settings in told for key in settings if not key.startswith(("run.", "launch."))})
    own = [key for key in keys if len({settings.get(key) for settings in told}) > 1]
    return own[:MAX_SHOWN_DIFFERENCES]


def _render_overlay_charts(runs: Sequence[RunReport]) -> Iterator[str]:
    drawn = runs[:COLOUR_COUNT]
    far = max(run.samples for run in drawn)
    keys = render_legend([(run.name, place) for place, run in enumerate(drawn)])
    metrics = sorted({key for run in drawn for key in run.list_metrics("val/")})
    charts = []
    for key in ["train/loss", *metrics, "throughput/samples_per_s", "lr/value", "batch/global"]:
        bins = SPEED_BINS if key.startswith("throughput/") else MAX_BINS
        series = [
            Series(
                run.name,
                place,
                tuple(downsample(run.get_curve(key), bins)[0]),
                dots=key in metrics and len(run.get_curve(key)) < 40,
            )
            for place, run in enumerate(drawn)
            if run.get_curve(key)
        ]
        if series:
            zero = not key.startswith(("val/", "train/"))
            charts.append(_render_figure(key, render_line_chart(series, far, key, zero=zero, log="loss" in key)))
    yield f'<section>{keys}<div class="charts">{"".join(charts)}</div></section>'
    if len(runs) > COLOUR_COUNT:
        yield f"<p>Only the first {COLOUR_COUNT} of {len(runs)} runs are plotted.</p>"


# --- files beside metrics.jsonl; any of them may be missing or broken --------------------------------------------


def _read_events(folder: Path) -> Iterator[Mapping[str, Any]]:
    for line in _read_text_or_empty(folder / "events.jsonl").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def _read_done_file(folder: Path) -> Mapping[str, Any]:
    try:
        done = json.loads(_read_text_or_empty(folder / "done.json"))
    except ValueError:
        return {}
    return done if isinstance(done, dict) and isinstance(done.get("seconds"), int | float) else {}


def _read_settings(folder: Path) -> Mapping[str, str]:
    import yaml

    try:
        read = yaml.safe_load(_read_text_or_empty(folder / "run.yaml"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return dict(_flatten_settings(read, "", 0)) if isinstance(read, dict) else {}


def _flatten_settings(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and depth < 4:
        for key, item in list(value.items())[:200]:
            yield from _flatten_settings(item, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list):
        yield name, " ".join(str(item) for item in value[:20] if not isinstance(item, dict | list))
    elif not isinstance(value, dict):
        yield name, "null" if value is None else str(value)


def _read_text_or_empty(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _format_plural(number: float, thing: str) -> str:
    return f"{number:.0f} {thing}{'' if number == 1 else 's'}"
