"""The part of the report that compares several runs: the best points, a table and curves drawn over each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launcher.analysis.best_points import describe_best_points, name_ranked_points
from launcher.analysis.html_page import escape_html, render_figure
from launcher.analysis.point_metrics import is_lower_better
from launcher.analysis.run_report import RunReport
from launcher.analysis.svg_charts import (
    COLOUR_COUNT,
    Series,
    choose_bin_count,
    downsample,
    render_legend,
    render_line_chart,
)
from launcher.system.formatting import format_count, format_duration, format_number, format_rate
from launcher.system.redaction import mask_secrets

__all__ = ["render_best_points", "render_comparison_table", "render_overlay_charts"]

MAX_SHOWN_DIFFERENCES = 5


def render_best_points(runs: Sequence[RunReport]) -> str:
    """Name the fastest and the most accurate finished run, as the table at the end of a sweep does."""
    changed = _find_changed_keys(runs)
    swept = [{key: run.settings[key] for key in changed if key in run.settings} for run in runs]
    points = name_ranked_points(swept, [run.name for run in runs], [run.point_metrics for run in runs])
    lines = "".join(f"<p>{escape_html(mask_secrets(line))}</p>" for line in describe_best_points(points))
    return f'<section class="best"><h2>Best points</h2>{lines}</section>' if lines else ""


def render_comparison_table(runs: Sequence[RunReport]) -> str:
    """Table with one line per run: changed keys, progress, throughput, best metrics and bottleneck."""
    changed = _find_changed_keys(runs)[:MAX_SHOWN_DIFFERENCES]
    metrics = sorted({key for run in runs for key in run.list_metrics("val/")})
    has_target = any(run.point_metrics.has_target for run in runs)
    heads = [
        "",
        "run",
        *changed,
        "samples",
        "updates",
        "time",
        *(["time to target"] if has_target else []),
        "samples/s",
        *(f"best {key}" for key in metrics),
        "limit",
    ]
    lines = []
    for colour, run in enumerate(runs):
        cells = [*(run.settings.get(key, "") for key in changed), *_iter_comparison_cells(run, metrics, has_target)]
        key = f'<span class="key k{colour % COLOUR_COUNT}"></span>' if colour < COLOUR_COUNT else ""
        tds = "".join(f"<td>{escape_html(mask_secrets(cell))}</td>" for cell in cells)
        lines.append(f'<tr><td>{key}</td><th scope="row">{escape_html(run.name)}</th>{tds}</tr>')
    head = "".join(f"<th>{escape_html(name)}</th>" for name in heads)
    return f'<section><div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div></section>'


def _iter_comparison_cells(run: RunReport, metrics: Sequence[str], has_target: bool) -> Iterator[str]:
    yield format_count(run.samples)
    yield format_count(run.rows[-1]["update"])
    yield format_duration(run.done["seconds"]) if "seconds" in run.done else "not complete"
    if has_target:
        reached = run.point_metrics.target_s
        yield "not reached" if reached is None else format_duration(reached)
    explanation = run.explanation
    yield format_rate(explanation["samples_per_s"]) if explanation else ""
    for key in metrics:
        values = [value for _, value in run.get_curve(key)]
        yield format_number(min(values) if is_lower_better(key) else max(values)) if values else ""
    yield f"{explanation['bottleneck']} {100 * explanation['share']:.0f} %" if explanation else ""


def _find_changed_keys(runs: Sequence[RunReport]) -> list[str]:
    """The configuration keys whose values differ between the runs."""
    all_settings = [run.settings for run in runs if run.settings]
    keys = sorted({key for settings in all_settings for key in settings if not key.startswith(("run.", "launch."))})
    return [key for key in keys if len({settings.get(key) for settings in all_settings}) > 1]


def render_overlay_charts(runs: Sequence[RunReport]) -> Iterator[str]:
    shown = runs[:COLOUR_COUNT]
    x_high = max(run.samples for run in shown)
    keys = render_legend([(run.name, colour) for colour, run in enumerate(shown)])
    metrics = sorted({key for run in shown for key in run.list_metrics("val/")})
    charts = []
    for key in ["train/loss", *metrics, "throughput/samples_per_s", "lr/value", "batch/global"]:
        series = [
            Series(
                run.name,
                colour,
                tuple(downsample(run.get_curve(key), choose_bin_count(key))[0]),
                dots=key in metrics and len(run.get_curve(key)) < 40,
            )
            for colour, run in enumerate(shown)
            if run.get_curve(key)
        ]
        if series:
            zero = not key.startswith(("val/", "train/"))
            charts.append(render_figure(key, render_line_chart(series, x_high, key, zero=zero, log="loss" in key)))
    yield f'<section>{keys}<div class="charts">{"".join(charts)}</div></section>'
    if len(runs) > COLOUR_COUNT:
        yield f"<p>Only the first {COLOUR_COUNT} of {len(runs)} runs are plotted.</p>"
