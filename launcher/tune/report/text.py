"""Terminal output of `tune` in 80 columns: a table, a small chart and a sentence of advice."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.analysis.advice import STAGE_DESCRIPTIONS
from launcher.system.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_plural,
    format_rate,
)
from launcher.tune.report.document import find_recommended_point
from launcher.tune.report.progress import find_better_size

__all__ = ["describe_slow_operators", "describe_splits", "format_split_name", "format_tune_text"]

TEXT_WIDTH = 80
CHART_BAR_WIDTH = 46
MAX_EQUAL_DIFFERENCE = 0.01  # relative difference in memory below which it counts as equal
POINTS_HEADER = f"{'per_device':>10} {'samples/s':>10} {'+-':>6} {'ms/update':>10} {'epoch':>8} {'memory':>8}  label"
SPLITS_HEADER = f"{'one batch as':>12} {'samples/s':>10} {'+-':>6} {'sync ms':>10} {'memory':>8}"


def format_tune_text(document: Mapping[str, Any]) -> str:
    """The complete text."""
    points = document["points"]
    lines = [_format_headline(document), "", POINTS_HEADER, *(_format_point_row(point) for point in points), ""]
    lines += _format_chart(document)
    lines += _format_stage_shares(document)
    lines += _describe_synthetic(document["synthetic"])
    lines += _describe_goodput(document)
    lines += _format_splits(document)
    sentences = [
        document["why"],
        describe_slow_operators(document["operators"]),
        *(f"note: {note}" for note in document["notes"]),
    ]
    lines += [line for sentence in sentences if sentence for line in _wrap_sentence(sentence)]
    return "\n".join(lines) + "\n"


def describe_splits(document: Mapping[str, Any]) -> str:
    """A sentence on the same batch at different accumulation; empty if not measured."""
    splits = document["splits"]
    timed = [split for split in splits if split["samples_per_s"]]
    if not timed:
        return ""
    best = max(timed, key=lambda split: float(split["samples_per_s"]))
    workers = "" if document["world"] == 1 else f"{document['world']} x "
    whole = f"one batch of {workers}{format_count(best['per_device'] * best['accumulation'])}"
    others = [_compare_splits(split, best) for split in splits if split is not best]
    names = ", ".join(format_split_name(split) for split in splits)
    return f"{whole} split as {names}: {', '.join([f'{format_split_name(best)} is the fastest', *others])}"


def format_split_name(split: Mapping[str, Any]) -> str:
    """per_device x accumulation of a split, e.g. 64 x 1."""
    return f"{format_count(split['per_device'])} x {split['accumulation']}"


def _compare_splits(split: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    if split["samples_per_s"] is None:
        return f"{format_split_name(split)} runs out of memory"
    more = split["memory_bytes"] / best["memory_bytes"] - 1
    word = "more" if more > 0 else "less"
    memory = "the same memory" if abs(more) < MAX_EQUAL_DIFFERENCE else f"{100 * abs(more):.0f} % {word} memory"
    longer = best["samples_per_s"] / split["samples_per_s"]
    if best["low"] <= split["high"]:
        time = "the same time within measurement error"
    else:
        time = f"{100 * (longer - 1):.0f} % more time" if longer < 2 else f"{_format_ratio(longer)} times the time"
    return f"{format_split_name(split)} takes {memory} and {time}"


def describe_slow_operators(operators: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the operators that make a larger size slower; empty if none were document."""
    if not operators:
        return ""
    first = operators[0]
    sizes = f"at {first['per_device_after']} compared with {first['per_device_before']}"
    where = f"{STAGE_DESCRIPTIONS[first['stage']]} {sizes}"
    return f"in {where}, {', '.join(_describe_operator(operator) for operator in operators)}"


def _describe_operator(operator: Mapping[str, Any]) -> str:
    before, after = operator["ms_per_sample_before"], operator["ms_per_sample_after"]
    if not before:
        return f"{operator['name']} is new at {format_number(1e3 * after)} us per sample"
    return f"{operator['name']} takes {_format_ratio(after / before)} times as long per sample"


def _format_ratio(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else format_count(ratio)


def _wrap_sentence(text: str) -> list[str]:
    return textwrap.wrap(text[:1].upper() + text[1:] + ".", TEXT_WIDTH)


def _format_headline(document: Mapping[str, Any]) -> str:
    steps = "" if document["accumulation"] == 1 else f", {document['accumulation']} micro-batches"
    machine = f"{format_plural(document['world'], 'worker')}, {document['device']}"
    setup = f"{document['recipe']} on {machine}, {document['precision']}{steps}"
    return f"{setup}; {format_duration(document['spent_s'])}"


def _format_point_row(point: Mapping[str, Any]) -> str:
    size = f"{format_count(point['per_device']):>10}"
    if point["samples_per_s"] is None:
        reason = "predicted, not run" if point["predicted"] else f"in {point['where']}"
        return f"{size} {'':>10} {'':>6} {'':>10} {'':>8} {'':>8}  oom ({reason})"
    speed = f"{format_rate(point['samples_per_s']):>10} {_format_relative_error(point):>6}"
    times = f"{format_number(point['ms_per_update']):>10} {format_duration(point['epoch_s']):>8}"
    return f"{size} {speed} {times} {format_bytes(point['memory_bytes']):>8}  {point['label']}"


def _format_relative_error(point: Mapping[str, Any]) -> str:
    """Half the width of the interval; if it is wide, the interval is far from symmetric, as it is one of logarithms."""
    share = (point["high"] - point["low"]) / 2 / point["samples_per_s"]
    return f"{100 * share:.0f} %" if share < 1 else ">100 %"


def _format_chart(document: Mapping[str, Any]) -> Iterator[str]:
    timed = [point for point in document["points"] if point["samples_per_s"]]
    if timed:
        better = find_better_size(document, document.get("goodput"))
        yield from _format_bars(
            timed, document["recommended"], "recommended" if better is None else "knee of samples/s"
        )
        yield ""


def _format_bars(points: Sequence[Mapping[str, Any]], marked: int | None, mark: str) -> Iterator[str]:
    """One bar per size; the part between low and high is drawn light."""
    full = max(point["high"] for point in points)
    for point in points:
        solid = round(CHART_BAR_WIDTH * point["low"] / full)
        light = round(CHART_BAR_WIDTH * point["high"] / full) - solid
        suffix = f"  {mark}" if point["per_device"] == marked else ""
        yield f"{format_count(point['per_device']):>10} {'█' * solid}{'─' * light}{suffix}"


def _format_stage_shares(document: Mapping[str, Any]) -> Iterator[str]:
    """Shares of the stages in an update at the recommended size."""
    point = find_recommended_point(document)
    if point is None or not point["stages"]:
        return
    update_ms = sum(point["stages"].values()) or 1.0
    stages = sorted(point["stages"].items(), key=lambda item: -item[1])
    shares = ", ".join(f"{stage} {100 * ms / update_ms:.0f} %" for stage, ms in stages if ms >= 0.01 * update_ms)
    yield from textwrap.wrap(f"Time per update at {point['per_device']}: {shares}.", TEXT_WIDTH)


def _describe_synthetic(synthetic: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    speeds = [
        f"{point['per_device']}: {format_rate(point['samples_per_s'])}" for point in synthetic if point["samples_per_s"]
    ]
    if speeds:
        yield from textwrap.wrap(f"On synthetic data, samples/s at {', '.join(speeds)}.", TEXT_WIDTH)


def _format_splits(document: Mapping[str, Any]) -> Iterator[str]:
    """The same batch at different accumulation: one row per split, and a sentence."""
    sentence = describe_splits(document)
    if not sentence:
        return
    yield ""
    yield SPLITS_HEADER
    for split in document["splits"]:
        if split["samples_per_s"] is None:
            yield f"{format_split_name(split):>12}  out of memory (in {split['where']})"
            continue
        speed = f"{format_rate(split['samples_per_s']):>10} {_format_relative_error(split):>6}"
        memory = f"{format_bytes(split['memory_bytes']):>8}"
        yield f"{format_split_name(split):>12} {speed} {format_number(split['sync_ms']):>10} {memory}"
    yield from _wrap_sentence(sentence)
    yield ""


def _describe_goodput(document: Mapping[str, Any]) -> Iterator[str]:
    """Goodput (progress per second) of the sizes, if the noise scale is known."""
    goodput = document.get("goodput")
    if goodput is None:
        return
    noise, best = goodput["noise"], goodput["best"]
    point = next(point for point in goodput["points"] if point["per_device"] == best)
    basis = f"at a noise scale of {noise['scale']:.3g} samples ({noise['source']})"
    yield ""
    yield from textwrap.wrap(f"Goodput (samples/s x efficiency) {basis}:", TEXT_WIDTH)
    is_recommended = find_better_size(document, goodput) is not None
    yield from _format_bars(goodput["points"], best, "recommended" if is_recommended else "most progress")
    speed = f"equivalent to {format_rate(point['goodput'])} samples/s at lr.base_batch={goodput['base_batch']}"
    share = f"with a batch of {format_count(point['global'])} at {100 * point['efficiency']:.0f} % efficiency"
    yield from textwrap.wrap(f"{best} makes the most progress: {speed}, {share}.", TEXT_WIDTH)
