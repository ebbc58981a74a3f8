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

from launcher.charts import BINS, COLOURS, Mark, Series, binned, legend, line_chart, safe, stack_chart
from launcher.errors import RequestError
from launcher.explain import explained, profile
from launcher.history import History, Row, folders, history
from launcher.redact import redact
from launcher.report_style import STYLE
from launcher.sinks.text import clock, count, figure, rate, took
from launcher.stages import STAGES

__all__ = ["Story", "page", "place", "stories"]

TITLES = ("oom", "alarm", "preempt", "resize", "resume", "target", "done", "error")
STAGE_BINS = 120
SPEED_BINS = 48  # fewer bins than other curves: the throughput of single updates is noisy
DIFFERENCES = 5


@dataclass(frozen=True)
class Story:
    """A run's data for the report. `settings` is its run.yaml, flattened to dotted keys."""

    history: History
    events: tuple[Mapping[str, Any], ...]
    done: Mapping[str, Any]
    settings: Mapping[str, str]

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.history.rows

    @property
    def name(self) -> str:
        return redact(self.history.name)

    @property
    def samples(self) -> float:
        return self.rows[-1]["samples"]

    @cached_property
    def told(self) -> Mapping[str, Any]:
        """The JSON document of `explain`; empty without stage times."""
        try:
            return explained(profile(self.history))
        except RequestError:
            return {}

    def curve(self, key: str) -> list[tuple[float, float]]:
        return [(row["samples"], row[key]) for row in self.rows if key in row]

    def metrics(self, prefix: str) -> list[str]:
        return sorted({key for row in self.rows for key in row if key.startswith(prefix)})


def stories(words: Sequence[str]) -> Iterator[Story]:
    """Load the runs named on the command line; a folder of runs stands for all runs in it.

    Raises:
        RequestError: a name does not match any run.
    """
    for word in words:
        for folder in folders(word):
            yield Story(history(str(folder)), tuple(_events(folder)), _done(folder), _settings(folder))


def place(words: Sequence[str]) -> Path:
    """Default path of the page: in the run directory, or in the common parent directory of several runs."""
    found = [folder for word in words for folder in folders(word)]
    if len(found) == 1:
        return found[0] / "report.html"
    parents = {folder.parent for folder in found}
    if len(parents) > 1:
        raise RequestError(f"report: {len(found)} runs are in different folders: add -o FILE.html")
    return parents.pop() / "report.html"


def page(runs: Sequence[Story]) -> str:
    """The complete HTML document."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = [f"<header><h1>{safe(title)}</h1>{_subtitle(runs)}</header>"]
    if len(runs) > 1:
        body += [_comparison(runs), *_overlays(runs)]
        body += [f"<details><summary>{safe(run.name)}</summary>{_one(run)}</details>" for run in runs]
    else:
        body.append(_one(runs[0]))
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _subtitle(runs: Sequence[Story]) -> str:
    if len(runs) > 1:
        return "<p>Curves over samples seen. Details of each run follow below the tables.</p>"
    start = next((event for event in runs[0].events if event.get("event") == "start"), {})
    facts = [start.get("recipe"), _plural(runs[0].rows[-1].get("world", 1), "worker"), start.get("device_name")]
    state = f"{'complete' if runs[0].done else 'not complete'} · curves over samples seen"
    return f"<p>{safe(redact(' · '.join(str(fact) for fact in [*facts, state] if fact)))}</p>"


# --- one run ------------------------------------------------------------------------------------------------------


def _one(run: Story) -> str:
    marks = list(_changes(run))
    charts = [chart for chart in _charts(run, marks) if chart]
    parts = [_tiles(run), _verdict(run), f'<div class="charts">{"".join(charts)}</div>', _happenings(run)]
    return "\n".join(part for part in parts if part)


def _tiles(run: Story) -> str:
    last = run.rows[-1]
    facts = [("samples", count(run.samples)), ("updates", count(last["update"]))]
    if "seconds" in run.done:
        facts.append(("time", took(run.done["seconds"])))
    speeds = sorted(speed for _, speed in run.curve("throughput/samples_per_s"))
    if run.told or speeds:
        facts.append(("samples/s", rate(run.told.get("samples_per_s") or speeds[len(speeds) // 2])))
    for key in ("train/loss", *run.metrics("val/")):
        curve = run.curve(key)
        if curve:
            facts.append((f"{key}, last", figure(curve[-1][1])))
    if "batch/global" in last:
        facts.append(("global batch, last", count(last["batch/global"])))
    tiles = "".join(f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>" for name, value in facts)
    return f'<dl class="tiles">{tiles}</dl>'


def _verdict(run: Story) -> str:
    told = run.told
    if not told:
        return ""
    why = f"{told['why'][:1].upper()}{told['why'][1:]}."
    advice = "".join(f"<li>{safe(line)}</li>" for line in told["advice"])
    return f'<section class="verdict"><h2>Where the time goes</h2><p>{safe(why)}</p><ul>{advice}</ul></section>'


def _charts(run: Story, marks: Sequence[Mark]) -> Iterator[str]:
    yield _losses(run, marks)
    for key in run.metrics("val/"):
        if key != "val/loss":
            yield _simple(run, key, "", marks, dots=True)
    yield _simple(run, "throughput/samples_per_s", "samples/s", marks, zero=True)
    yield _stage_stack(run, marks)
    yield _simple(run, "lr/value", "learning rate", marks, zero=True)
    yield _simple(run, "batch/global", "global batch, samples per update", marks, zero=True, steps=True)
    if run.curve("noise/scale"):
        yield _noise(run, marks)
    yield _simple(run, "memory/peak_bytes", "memory, peak bytes", marks, zero=True, steps=True)


def _figure(title: str, chart: str, keys: str = "") -> str:
    return f"<figure><figcaption>{safe(title)}</figcaption>{keys}{chart}</figure>"


def _simple(
    run: Story,
    key: str,
    title: str,
    marks: Sequence[Mark],
    *,
    zero: bool = False,
    steps: bool = False,
    dots: bool = False,
) -> str:
    curve = run.curve(key)
    if not curve:
        return ""
    bins = SPEED_BINS if key.startswith("throughput/") else BINS
    means, band = (curve, []) if steps else binned(curve, bins)
    series = Series(title or key, 0, tuple(means), tuple(band), steps, dots and len(curve) <= 60)
    return _figure(title or key, line_chart([series], run.samples, title or key, marks, zero=zero))


def _losses(run: Story, marks: Sequence[Mark]) -> str:
    series = []
    for colour, key in enumerate(("train/loss", "val/loss")):
        curve = run.curve(key)
        if curve:
            means, band = binned(curve)
            series.append(Series(key, colour, tuple(means), tuple(band), dots=colour == 1 and len(curve) <= 60))
    if not series:
        return ""
    keys = legend([(each.label, each.colour) for each in series])
    return _figure("loss", line_chart(series, run.samples, "loss", marks, log=True), keys)


def _noise(run: Story, marks: Sequence[Mark]) -> str:
    scale, _ = binned(run.curve("noise/scale"))
    bounds = [
        (row["samples"], row["noise/scale_low"], row["noise/scale_high"])
        for row in run.rows
        if "noise/scale_low" in row and "noise/scale_high" in row
    ]
    series = [Series("noise scale", 0, tuple(scale), tuple(bounds[:: max(1, len(bounds) // 160)]))]
    series.append(Series("global batch", 1, tuple(run.curve("batch/global")), steps=True))
    keys = legend([(each.label, each.colour) for each in series])
    return _figure("noise scale, samples", line_chart(series, run.samples, "noise scale", marks, log=True), keys)


def _stage_stack(run: Story, marks: Sequence[Mark]) -> str:
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
    keys = legend([(name, colour) for name, colour, _ in layers])
    title = "stages, ms per update"
    return _figure(title, stack_chart(layers, xs, run.samples, title, marks), keys)


def _changes(run: Story) -> Iterator[Mark]:
    """Mark each new generation: as a resize if the number of workers changed, else as a restart."""
    for before, after in pairwise(run.rows):
        if after.get("generation", 0) > before.get("generation", 0):
            worlds = (before.get("world", 1), after.get("world", 1))
            cost = f", after {took(after['elastic/recovery_s'])}" if "elastic/recovery_s" in after else ""
            if worlds[0] != worlds[1]:
                yield Mark(before["samples"], "resize", f"resize: {worlds[0]:.0f} to {worlds[1]:.0f} workers{cost}")
            else:
                yield Mark(before["samples"], "restart", f"restart {after['generation']:.0f}{cost}")


def _happenings(run: Story) -> str:
    """Table of the important events with the time since the start."""
    told = [event for event in run.events if event.get("event") in TITLES]
    if not told:
        return ""
    began = _time(run.events[0])
    lines = "".join(
        f"<tr><td>{clock(_time(event) - began)}</td><td>{safe(event['event'])}</td>"
        f"<td>{safe(redact(_told(event)))}</td></tr>"
        for event in told[:200]
    )
    more = f"<p>and {len(told) - 200} more in events.jsonl</p>" if len(told) > 200 else ""
    head = "<tr><th>after</th><th>event</th><th></th></tr>"
    table = f'<div class="scroll"><table class="events">{head}{lines}</table></div>'
    return f"<section><h2>Events</h2>{table}{more}</section>"


def _time(event: Mapping[str, Any]) -> float:
    time = event.get("time")
    return float(time) if isinstance(time, int | float) else 0.0


def _told(event: Mapping[str, Any]) -> str:
    """One line for an event: its `detail`, else its fields."""
    if isinstance(event.get("detail"), str):
        return str(event["detail"])
    facts = {key: value for key, value in event.items() if key not in ("time", "event")}
    return "; ".join(f"{key} {_plain(value)}" for key, value in facts.items() if value not in (None, "", [], {}))[:400]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return figure(value) if isinstance(value, float) else str(value)


# --- several runs -------------------------------------------------------------------------------------------------


def _comparison(runs: Sequence[Story]) -> str:
    """Table with one line per run: changed keys, progress, throughput, best metrics and bottleneck."""
    changed = _changed(runs)
    metrics = sorted({key for run in runs for key in run.metrics("val/")})
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
        cells = [*(run.settings.get(key, "") for key in changed), *_figures(run, metrics)]
        key = f'<span class="key k{place % COLOURS}"></span>' if place < COLOURS else ""
        tds = "".join(f"<td>{safe(redact(cell))}</td>" for cell in cells)
        lines.append(f'<tr><td>{key}</td><th scope="row">{safe(run.name)}</th>{tds}</tr>')
    head = "".join(f"<th>{safe(name)}</th>" for name in heads)
    return f'<section><div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div></section>'


def _figures(run: Story, metrics: Sequence[str]) -> Iterator[str]:
    yield count(run.samples)
    yield count(run.rows[-1]["update"])
    yield took(run.done["seconds"]) if "seconds" in run.done else "not complete"
    told = run.told
    yield rate(told["samples_per_s"]) if told else ""
    for key in metrics:
        values = [value for _, value in run.curve(key)]
        best: Callable[[list[float]], float] = min if "loss" in key else max
        yield figure(best(values)) if values else ""
    yield f"{told['bottleneck']} {100 * told['share']:.0f} %" if told else ""


def _changed(runs: Sequence[Story]) -> list[str]:
    """The first few configuration keys whose values differ between the runs."""
    told = [run.settings for run in runs if run.settings]
    keys = sorted({key for settings in told for key in settings if not key.startswith(("run.", "launch."))})
    own = [key for key in keys if len({settings.get(key) for settings in told}) > 1]
    return own[:DIFFERENCES]


def _overlays(runs: Sequence[Story]) -> Iterator[str]:
    drawn = runs[:COLOURS]
    far = max(run.samples for run in drawn)
    keys = legend([(run.name, place) for place, run in enumerate(drawn)])
    metrics = sorted({key for run in drawn for key in run.metrics("val/")})
    charts = []
    for key in ["train/loss", *metrics, "throughput/samples_per_s", "lr/value", "batch/global"]:
        bins = SPEED_BINS if key.startswith("throughput/") else BINS
        series = [
            Series(
                run.name,
                place,
                tuple(binned(run.curve(key), bins)[0]),
                dots=key in metrics and len(run.curve(key)) < 40,
            )
            for place, run in enumerate(drawn)
            if run.curve(key)
        ]
        if series:
            zero = not key.startswith(("val/", "train/"))
            charts.append(_figure(key, line_chart(series, far, key, zero=zero, log="loss" in key)))
    yield f'<section>{keys}<div class="charts">{"".join(charts)}</div></section>'
    if len(runs) > COLOURS:
        yield f"<p>Only the first {COLOURS} of {len(runs)} runs are plotted.</p>"


# --- files beside metrics.jsonl; any of them may be missing or broken --------------------------------------------


def _events(folder: Path) -> Iterator[Mapping[str, Any]]:
    for line in _text(folder / "events.jsonl").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def _done(folder: Path) -> Mapping[str, Any]:
    try:
        done = json.loads(_text(folder / "done.json"))
    except ValueError:
        return {}
    return done if isinstance(done, dict) and isinstance(done.get("seconds"), int | float) else {}


def _settings(folder: Path) -> Mapping[str, str]:
    import yaml

    try:
        read = yaml.safe_load(_text(folder / "run.yaml"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return dict(_flat(read, "", 0)) if isinstance(read, dict) else {}


def _flat(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and depth < 4:
        for key, item in list(value.items())[:200]:
            yield from _flat(item, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list):
        yield name, " ".join(str(item) for item in value[:20] if not isinstance(item, dict | list))
    elif not isinstance(value, dict):
        yield name, "null" if value is None else str(value)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _plural(number: float, thing: str) -> str:
    return f"{number:.0f} {thing}{'' if number == 1 else 's'}"
