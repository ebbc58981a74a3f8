"""What `tune` found, for a person at a terminal: a table, a small chart, and a sentence of advice in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.sinks.text import count, figure, rate, size, took

__all__ = ["text"]

WIDTH = 80
BAR = 46
HEAD = f"{'per_device':>10} {'samples/s':>10} {'+-':>6} {'ms/update':>10} {'epoch':>8} {'memory':>8}  label"


def text(found: Mapping[str, Any]) -> str:
    """The whole of it."""
    points = found["points"]
    lines = [_headline(found), "", HEAD, *(_row(point) for point in points), ""]
    lines += _chart(points, found["recommended"])
    lines += _stages(found)
    lines += _beside(found["synthetic"])
    lines += _worth(found.get("goodput"))
    wrapped = [found["why"], *(f"note: {note}" for note in found["notes"])]
    lines += [line for one in wrapped for line in textwrap.wrap(one[:1].upper() + one[1:] + ".", WIDTH)]
    return "\n".join(lines) + "\n"


def _headline(found: Mapping[str, Any]) -> str:
    workers = "1 worker" if found["world"] == 1 else f"{found['world']} workers"
    steps = "" if found["accumulation"] == 1 else f", {found['accumulation']} micro-batches"
    return f"{found['recipe']} on {workers}, {found['device']}, {found['precision']}{steps}; {took(found['spent_s'])}"


def _row(point: Mapping[str, Any]) -> str:
    if point["samples_per_s"] is None:
        why = "foreseen, not run" if point["predicted"] else f"in {point['where']}"
        return f"{count(point['per_device']):>10} {'':>10} {'':>6} {'':>10} {'':>8} {'':>8}  oom ({why})"
    spread = (point["high"] - point["low"]) / 2 / point["samples_per_s"]
    return (
        f"{count(point['per_device']):>10} {rate(point['samples_per_s']):>10} {f'{100 * spread:.0f} %':>6} "
        f"{figure(point['ms_per_update']):>10} {took(point['epoch_s']):>8} {size(point['memory_bytes']):>8}  "
        f"{point['label']}"
    )


def _chart(points: Sequence[Mapping[str, Any]], recommended: int | None) -> Iterator[str]:
    timed = [point for point in points if point["samples_per_s"]]
    if timed:
        yield from _bars(timed, recommended, "recommended")
        yield ""


def _bars(points: Sequence[Mapping[str, Any]], marked: int | None, mark: str) -> Iterator[str]:
    """A bar for each size; the part between low and high is drawn light."""
    full = max(point["high"] for point in points)
    for point in points:
        solid = round(BAR * point["low"] / full)
        light = round(BAR * point["high"] / full) - solid
        said = f"  {mark}" if point["per_device"] == marked else ""
        yield f"{count(point['per_device']):>10} {'█' * solid}{'─' * light}{said}"


def _stages(found: Mapping[str, Any]) -> Iterator[str]:
    """Where the time of the recommended size goes."""
    point = next((one for one in found["points"] if one["per_device"] == found["recommended"]), None)
    if point is None or not point["stages"]:
        return
    whole = sum(point["stages"].values()) or 1.0
    parts = sorted(point["stages"].items(), key=lambda item: -item[1])
    told = ", ".join(f"{stage} {100 * ms / whole:.0f} %" for stage, ms in parts if ms >= 0.01 * whole)
    yield from textwrap.wrap(f"An update at {point['per_device']}: {told}.", WIDTH)


def _beside(synthetic: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    told = [f"{one['per_device']}: {rate(one['samples_per_s'])}" for one in synthetic if one["samples_per_s"]]
    if told:
        yield from textwrap.wrap(f"On synthetic data, samples/s at {', '.join(told)}.", WIDTH)


def _worth(goodput: Mapping[str, Any] | None) -> Iterator[str]:
    """The same sizes by progress per second, where the noise scale is known."""
    if goodput is None:
        return
    noise, best = goodput["noise"], goodput["best"]
    point = next(one for one in goodput["points"] if one["per_device"] == best)
    known = f"at a noise scale of {noise['scale']:.3g} samples ({noise['source']})"
    yield ""
    yield from textwrap.wrap(f"Goodput, samples/s x efficiency, {known}:", WIDTH)
    yield from _bars(goodput["points"], best, "most progress")
    speed = f"{rate(point['goodput'])} samples/s of lr.base_batch={goodput['base_batch']}"
    share = f"a batch of {count(point['global'])} at {100 * point['efficiency']:.0f} % efficiency"
    yield from textwrap.wrap(f"{best} makes the most progress: {speed}, {share}.", WIDTH)
