"""Terminal output of `tune` in 80 columns: a table, a small chart and a sentence of advice."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.advice import STAGE_WORDS
from launcher.sinks.text import count, figure, plural, rate, size, took
from launcher.tune.document import recommended

__all__ = ["divided", "name_of", "slowed", "text"]

WIDTH = 80
BAR = 46
ALIKE = 0.01  # relative difference in memory below which it counts as equal
HEAD = f"{'per_device':>10} {'samples/s':>10} {'+-':>6} {'ms/update':>10} {'epoch':>8} {'memory':>8}  label"
SPLITS = f"{'one batch as':>12} {'samples/s':>10} {'+-':>6} {'sync ms':>10} {'memory':>8}"


def text(found: Mapping[str, Any]) -> str:
    """The complete text."""
    points = found["points"]
    lines = [_headline(found), "", HEAD, *(_row(point) for point in points), ""]
    lines += _chart(points, found["recommended"])
    lines += _stages(found)
    lines += _beside(found["synthetic"])
    lines += _worth(found.get("goodput"))
    lines += _splits(found)
    wrapped = [found["why"], slowed(found["operators"]), *(f"note: {note}" for note in found["notes"])]
    lines += [line for one in wrapped if one for line in _sentence(one)]
    return "\n".join(lines) + "\n"


def divided(found: Mapping[str, Any]) -> str:
    """A sentence on the same batch at different accumulation; empty if not measured."""
    splits = found["splits"]
    timed = [one for one in splits if one["samples_per_s"]]
    if not timed:
        return ""
    best = max(timed, key=lambda one: float(one["samples_per_s"]))
    workers = "" if found["world"] == 1 else f"{found['world']} x "
    whole = f"one batch of {workers}{count(best['per_device'] * best['accumulation'])}"
    others = [_against(one, best) for one in splits if one is not best]
    named = ", ".join(name_of(one) for one in splits)
    return f"{whole} split as {named}: {', '.join([f'{name_of(best)} is the fastest', *others])}"


def name_of(split: Mapping[str, Any]) -> str:
    """per_device x accumulation of a split, e.g. 64 x 1."""
    return f"{count(split['per_device'])} x {split['accumulation']}"


def _against(split: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    if split["samples_per_s"] is None:
        return f"{name_of(split)} runs out of memory"
    more = split["memory_bytes"] / best["memory_bytes"] - 1
    word = "more" if more > 0 else "less"
    memory = "the same memory" if abs(more) < ALIKE else f"{100 * abs(more):.0f} % {word} memory"
    longer = best["samples_per_s"] / split["samples_per_s"]
    if best["low"] <= split["high"]:
        time = "the same time within measurement error"
    else:
        time = f"{100 * (longer - 1):.0f} % more time" if longer < 2 else f"{_times(longer)} times the time"
    return f"{name_of(split)} takes {memory} and {time}"


def slowed(operators: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the operators that make a larger size slower; empty if none were found."""
    if not operators:
        return ""
    first = operators[0]
    sizes = f"at {first['per_device_after']} compared with {first['per_device_before']}"
    where = f"{STAGE_WORDS[first['stage']]} {sizes}"
    return f"in {where}, {', '.join(_longer(one) for one in operators)}"


def _longer(operator: Mapping[str, Any]) -> str:
    before, after = operator["ms_per_sample_before"], operator["ms_per_sample_after"]
    if not before:
        return f"{operator['name']} is new at {figure(1e3 * after)} us per sample"
    return f"{operator['name']} takes {_times(after / before)} times as long per sample"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else count(ratio)


def _sentence(text: str) -> list[str]:
    return textwrap.wrap(text[:1].upper() + text[1:] + ".", WIDTH)


def _headline(found: Mapping[str, Any]) -> str:
    steps = "" if found["accumulation"] == 1 else f", {found['accumulation']} micro-batches"
    here = f"{found['recipe']} on {plural(found['world'], 'worker')}, {found['device']}, {found['precision']}"
    return f"{here}{steps}; {took(found['spent_s'])}"


def _row(point: Mapping[str, Any]) -> str:
    if point["samples_per_s"] is None:
        why = "predicted, not run" if point["predicted"] else f"in {point['where']}"
        return f"{count(point['per_device']):>10} {'':>10} {'':>6} {'':>10} {'':>8} {'':>8}  oom ({why})"
    return (
        f"{count(point['per_device']):>10} {rate(point['samples_per_s']):>10} {_spread(point):>6} "
        f"{figure(point['ms_per_update']):>10} {took(point['epoch_s']):>8} {size(point['memory_bytes']):>8}  "
        f"{point['label']}"
    )


def _spread(point: Mapping[str, Any]) -> str:
    """Half the width of the interval; if it is wide, the interval is far from symmetric, as it is one of logarithms."""
    share = (point["high"] - point["low"]) / 2 / point["samples_per_s"]
    return f"{100 * share:.0f} %" if share < 1 else ">100 %"


def _chart(points: Sequence[Mapping[str, Any]], recommended: int | None) -> Iterator[str]:
    timed = [point for point in points if point["samples_per_s"]]
    if timed:
        yield from _bars(timed, recommended, "recommended")
        yield ""


def _bars(points: Sequence[Mapping[str, Any]], marked: int | None, mark: str) -> Iterator[str]:
    """One bar per size; the part between low and high is drawn light."""
    full = max(point["high"] for point in points)
    for point in points:
        solid = round(BAR * point["low"] / full)
        light = round(BAR * point["high"] / full) - solid
        said = f"  {mark}" if point["per_device"] == marked else ""
        yield f"{count(point['per_device']):>10} {'█' * solid}{'─' * light}{said}"


def _stages(found: Mapping[str, Any]) -> Iterator[str]:
    """Shares of the stages in an update at the recommended size."""
    point = recommended(found)
    if point is None or not point["stages"]:
        return
    whole = sum(point["stages"].values()) or 1.0
    parts = sorted(point["stages"].items(), key=lambda item: -item[1])
    told = ", ".join(f"{stage} {100 * ms / whole:.0f} %" for stage, ms in parts if ms >= 0.01 * whole)
    yield from textwrap.wrap(f"Time per update at {point['per_device']}: {told}.", WIDTH)


def _beside(synthetic: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    told = [f"{one['per_device']}: {rate(one['samples_per_s'])}" for one in synthetic if one["samples_per_s"]]
    if told:
        yield from textwrap.wrap(f"On synthetic data, samples/s at {', '.join(told)}.", WIDTH)


def _splits(found: Mapping[str, Any]) -> Iterator[str]:
    """The same batch at different accumulation: one row per split, and a sentence."""
    said = divided(found)
    if not said:
        return
    yield ""
    yield SPLITS
    for one in found["splits"]:
        if one["samples_per_s"] is None:
            yield f"{name_of(one):>12}  out of memory (in {one['where']})"
            continue
        yield (
            f"{name_of(one):>12} {rate(one['samples_per_s']):>10} {_spread(one):>6} "
            f"{figure(one['sync_ms']):>10} {size(one['memory_bytes']):>8}"
        )
    yield from _sentence(said)
    yield ""


def _worth(goodput: Mapping[str, Any] | None) -> Iterator[str]:
    """Goodput (progress per second) of the sizes, if the noise scale is known."""
    if goodput is None:
        return
    noise, best = goodput["noise"], goodput["best"]
    point = next(one for one in goodput["points"] if one["per_device"] == best)
    known = f"at a noise scale of {noise['scale']:.3g} samples ({noise['source']})"
    yield ""
    yield from textwrap.wrap(f"Goodput (samples/s x efficiency) {known}:", WIDTH)
    yield from _bars(goodput["points"], best, "most progress")
    speed = f"equivalent to {rate(point['goodput'])} samples/s at lr.base_batch={goodput['base_batch']}"
    share = f"with a batch of {count(point['global'])} at {100 * point['efficiency']:.0f} % efficiency"
    yield from textwrap.wrap(f"{best} makes the most progress: {speed}, {share}.", WIDTH)
