"""The `explain` command: a run's bottleneck, and why one run is faster than another, from metrics.jsonl alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.analysis.advice import STAGE_DESCRIPTIONS, advise_on_run
from launcher.analysis.run_profile import RunProfile
from launcher.analysis.time_to_target import compare_time_to_target, describe_comparison
from launcher.system.formatting import (
    format_count,
    format_number,
    format_percentage,
    format_plural,
    format_rate,
    strip_control_characters,
    wrap_text,
)
from launcher.telemetry.stages import STAGES

__all__ = ["compare_runs", "explain_run", "format_explanation"]

_WIDTH = 80
_BAR_WIDTH = 20


def explain_run(run: RunProfile) -> dict[str, Any]:
    """One run as a JSON document."""
    stage = run.bottleneck
    document = {
        "bottleneck": stage,
        "share": run.share(stage),
        "why": f"{STAGE_DESCRIPTIONS[stage]} takes {format_percentage(run.share(stage))} of an update, "
        f"{format_number(run.stages[stage])} of {format_number(run.wall_ms)} ms",
        "advice": list(advise_on_run(run)),
        "stages": {
            name: {"ms": ms, "share": run.share(name), "ms_per_sample": run.per_sample_ms(name)}
            for name, ms in run.stages.items()
        },
        "run": run.name,
        "updates": run.updates,
        "left_out": run.skipped_updates,
        "world": run.world,
        "samples_per_s": run.samples_per_s,
    }
    return document if run.noise is None else {**document, "noise_dominated": run.noise > 1}


def compare_runs(a: RunProfile, b: RunProfile) -> dict[str, Any]:
    """Two runs as a JSON document: the slower run's document plus the comparison. On a tie A counts as the faster."""
    fast, slow, letter = (a, b, "A") if a.samples_per_s >= b.samples_per_s else (b, a, "B")
    ratio = fast.samples_per_s / slow.samples_per_s
    grown = {stage: slow.per_sample_ms(stage) - fast.per_sample_ms(stage) for stage in STAGES}
    grew = max(grown, key=grown.__getitem__)
    within = ratio - 1 <= (fast.spread**2 + slow.spread**2) ** 0.5
    return {
        **explain_run(slow),
        "why": _explain_difference(fast, slow, letter, ratio, grew, within),
        "faster": letter,
        "ratio": ratio,
        "grew": grew,
        "grew_ms_per_sample": grown[grew],
        "within_spread": within,
        **_compute_scaling_efficiency(a, b),
        **compare_time_to_target(a.reached, b.reached),
        "runs": {"A": explain_run(a), "B": explain_run(b)},
    }


def format_explanation(document: Mapping[str, Any]) -> str:
    """Format either document as text of at most 80 columns."""
    runs = document.get("runs", {"": document})
    lines = [line for letter, run in runs.items() for line in _format_header(letter, run)]
    lines += [
        "",
        *(_format_stage_comparison(runs["A"], runs["B"]) if "runs" in document else _format_stage_table(document)),
        "",
    ]
    lines += wrap_text(f"{document['why'][:1].upper()}{document['why'][1:]}.", _WIDTH, 0)
    if "scaling_efficiency" in document:
        efficiency = format_percentage(document["scaling_efficiency"])
        lines.append(f"Scaling efficiency: {efficiency} of the samples/s per worker is kept.")
    if "target" in document:
        lines += wrap_text(describe_comparison(document["target"]), _WIDTH, 0)
    if document["advice"]:
        lines += ["", f"Suggestions{' for ' + _get_slower_letter(document) if 'runs' in document else ''}:"]
    for line in document["advice"]:
        lines += wrap_text(f"- {line}", _WIDTH, 2)
    return "\n".join(lines) + "\n"


def _explain_difference(fast: RunProfile, slow: RunProfile, letter: str, ratio: float, grew: str, within: bool) -> str:
    if within:
        return f"A and B are equally fast: x{ratio:.2f} is within the measurement noise of their updates"
    other = "B" if letter == "A" else "A"
    fast_ms, slow_ms = fast.per_sample_ms(grew), slow.per_sample_ms(grew)
    total = slow.wall_ms / slow.samples - fast.wall_ms / fast.samples
    share = (
        f", {format_percentage((slow_ms - fast_ms) / total)} of the difference" if total >= slow_ms - fast_ms else ""
    )
    return (
        f"{letter} is x{ratio:.2f} as fast as {other}: in {other} {STAGE_DESCRIPTIONS[grew]} takes "
        f"{format_number(slow_ms * 1e3)} us per sample, in {letter} {format_number(fast_ms * 1e3)} us{share}"
    )


def _compute_scaling_efficiency(a: RunProfile, b: RunProfile) -> dict[str, float]:
    """Scaling efficiency from the smaller to the larger world size, if the global or per-worker batches are similar."""
    batches = ((a.batch, b.batch), (a.batch * b.world, b.batch * a.world))
    if a.world == b.world or not any(0.9 < batch / other < 1.1 for batch, other in batches):
        return {}
    small, large = sorted((a, b), key=lambda run: run.world)
    return {"scaling_efficiency": large.samples_per_s / large.world / (small.samples_per_s / small.world)}


def _get_slower_letter(document: Mapping[str, Any]) -> str:
    return "B" if document["faster"] == "A" else "A"


def _format_header(letter: str, run: Mapping[str, Any]) -> list[str]:
    label = f"{letter}  " if letter else ""
    workers = format_plural(run["world"], "worker")
    facts = f"{workers}, {format_rate(run['samples_per_s'])} samples/s over {format_count(run['updates'])} updates"
    left_out = f" ({format_count(run['left_out'])} warmup excluded)" if run["left_out"] else ""
    return textwrap.wrap(
        f"{label}{strip_control_characters(run['run'])}: {facts}{left_out}", _WIDTH, subsequent_indent="   "
    )


def _format_stage_table(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {'stage':<12}{'ms per update':>15}{'share':>9}"
    for stage, values in run["stages"].items():
        bar = "#" * round(_BAR_WIDTH * values["share"])
        yield f"  {stage:<12}{format_number(values['ms']):>15}{format_percentage(values['share']):>9}  {bar}".rstrip()


def _format_stage_comparison(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {'us per sample':<16}{'A':>12}{'B':>12}{'B - A':>12}"
    for stage in STAGES:
        a_us, b_us = (run["stages"][stage]["ms_per_sample"] * 1e3 for run in (a, b))
        yield f"  {stage:<16}{format_number(a_us):>12}{format_number(b_us):>12}{_format_signed(b_us - a_us):>12}"


def _format_signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{format_number(value)}"
