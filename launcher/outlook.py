"""`launcher plan batch=goodput`: the batch the policy would choose at each world size, with the predicted goodput."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.batch import PlanError
from launcher.goodput import Chooser, Goodput, Known
from launcher.observed import Noise
from launcher.planning import plan_row, worlds_text, wrapped
from launcher.scaling import REACH
from launcher.sinks.text import rate, took
from launcher.study import Sizes, Study, study
from launcher.throughput import Estimate

__all__ = ["measured_text", "outlook", "outlook_text"]

PAYS = 0.9  # share of the highest goodput; the same share as for the knee of samples/s


def outlook(chooser: Chooser, sizes: Sizes, noise: Noise | None, measured: str) -> dict[str, Any]:
    """The JSON document: one row per world size, and `pays_to`, the world size beyond which more workers gain little.

    Times are for as much progress as train.duration makes at lr.base_batch. `measured` describes the measurements that
    the predictions are based on. Without a noise scale the base batch is used, whose efficiency is 1 at any noise.
    """
    reach = REACH * max(world for world, _ in chooser.profile.worlds)
    worlds = chooser.run.plan.worlds or range(1, reach + 1)
    rows = [_row(chooser, sizes, world, noise) for world in worlds]
    goodputs = {row["world"]: row["goodput"] for row in rows if row["feasible"] and row["goodput"]}
    pays_to = min((world for world, one in goodputs.items() if one >= PAYS * max(goodputs.values())), default=None)
    return {
        "policy": "goodput",
        "data": {"train": sizes.train, "val": sizes.val},
        "lr_base": chooser.run.lr.base,
        "lr_base_batch": chooser.run.lr.base_batch,
        "noise": None if noise is None else vars(noise),
        "measured": measured,
        "reach": reach,
        "plans": rows,
        "pays_to": pays_to,
        "why": _why(goodputs, pays_to, reach),
    }


def _row(chooser: Chooser, sizes: Sizes, world: int, noise: Noise | None) -> dict[str, Any]:
    nodes = _nodes(chooser, world)
    try:
        planned = study(Goodput(chooser, world, nodes, Known(noise.scale if noise else None)).run, sizes, world)
    except PlanError as problem:
        return {"world": world, "feasible": False, "why": str(problem)}
    return {**plan_row(planned), **_figures(chooser, planned, nodes, noise)}


def _nodes(chooser: Chooser, world: int) -> int:
    """The number of nodes for this world size, with as many workers per node as measured at most."""
    filled = max(measured // nodes for measured, nodes in chooser.profile.worlds)
    spread = any(nodes > 1 for _, nodes in chooser.profile.worlds)
    return -(-world // filled) if spread else 1


def _figures(chooser: Chooser, planned: Study, nodes: int, noise: Noise | None) -> dict[str, Any]:
    plan, base = planned.plan, chooser.run.lr.base_batch or 1
    seconds = chooser.profile.model.predict(plan.per_device, plan.accumulation, plan.world, nodes)
    speed = _over(plan.global_batch, seconds)
    figures: dict[str, Any] = {"samples_per_s": speed.value, "low": speed.low, "high": speed.high}
    worth = None if noise is None else noise.efficiency(plan.global_batch, base)
    if plan.global_batch == base:
        worth = Estimate(1.0, 1.0, 1.0)  # at any noise scale
    if worth is None:
        return figures | dict.fromkeys(("efficiency", "goodput", "seconds", "device_hours"))
    goodput = Estimate(*(a * b for a, b in zip(speed, worth, strict=True)))
    left = _over(planned.duration, goodput)
    return figures | {
        "efficiency": worth.value,
        "goodput": goodput.value,
        "goodput_low": goodput.low,
        "goodput_high": goodput.high,
        "seconds": left.value,
        "seconds_low": left.low,
        "seconds_high": left.high,
        "device_hours": plan.world * left.value / 3600,
        "device_hours_low": plan.world * left.low / 3600,
        "device_hours_high": plan.world * left.high / 3600,
    }


def _over(amount: float, found: Estimate) -> Estimate:
    return Estimate(amount / found.value, amount / found.high, amount / found.low)


def _why(goodputs: Mapping[int, float], pays_to: int | None, reach: int) -> str:
    if pays_to is None:
        return "the noise scale is unknown: set plan.noise, or train for a while to measure it"
    best = max(goodputs, key=goodputs.__getitem__)
    limit = f"nothing is predicted past {reach} workers, twice the largest measured world size"
    if pays_to == max(goodputs):
        return f"every worker up to {pays_to} pays off; {limit}"
    share, workers = 100 * goodputs[pays_to] / goodputs[best], "worker" if pays_to == 1 else "workers"
    return f"more than {pays_to} {workers} do not pay off: {share:.0f} % of the goodput of {best} is reached; {limit}"


# --- terminal text ------------------------------------------------------------------------------------------------

HEAD = f"{'world':>5} {'micro':>6} {'accum':>5} {'global':>7} {'samples/s':>13} {'effic.':>6} {'goodput':>13} "
HEAD += f"{'time':>11} {'dev. h':>6}"


def outlook_text(document: Mapping[str, Any]) -> str:
    """Format the document for a terminal, at most 80 columns wide."""
    noise = document["noise"]
    known = "noise scale unknown: the base batch is used"
    if noise is not None:
        known = f"noise scale {noise['scale']:.3g} samples ({noise['source']})"
        if noise["high"] > noise["low"]:
            known += f", between {noise['low']:.3g} and {noise['high']:.3g}"
    lines = [f"batch.policy=goodput, {known}", *wrapped("", f"measured: {document['measured']}"), "", HEAD]
    lines += [line for row in document["plans"] for line in _line(row)]
    base = document["lr_base_batch"]
    explained = f"Time and device hours: for as much progress as train.duration makes at lr.base_batch={base}. "
    explained += "Each additional worker is assumed to have its own device."
    advised = document["why"][:1].upper() + document["why"][1:]
    lines += ["", *wrapped("", explained), *wrapped("", f"{advised}.")]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> Iterator[str]:
    if not row["feasible"]:
        yield from wrapped(f"{row['world']:>5} ", f"no plan: {row['why']}")
        return
    start = f"{row['world']:>5} {row['per_device']:>6,} {row['accumulation']:>5,} {row['global']:>7,} "
    speed = _spread(rate(row["samples_per_s"]), row["low"], row["samples_per_s"], row["high"])
    if row["efficiency"] is None:
        yield f"{start}{speed:>13} {'?':>6}"
        return
    worth = _spread(rate(row["goodput"]), row["goodput_low"], row["goodput"], row["goodput_high"])
    time = _spread(took(row["seconds"]), row["seconds_low"], row["seconds"], row["seconds_high"])
    percent = f"{100 * row['efficiency']:.0f} %"
    yield f"{start}{speed:>13} {percent:>6} {worth:>13} {time:>11} {row['device_hours']:>6.2g}"


def _spread(text: str, low: float, value: float, high: float) -> str:
    """Format a value with its relative half-width, e.g. 1,230 ±4%."""
    return f"{text} ±{50 * (high - low) / value:.0f}%"


def measured_text(profiles: Sequence[Any]) -> str:
    """Describe the measurements: world sizes, device and date."""
    worlds = worlds_text(sorted({one.key["world"] for one in profiles}))
    newest = max(profiles, key=lambda one: str(one.measured))
    return f"{worlds} workers on {newest.key['device']}, {newest.day}"
