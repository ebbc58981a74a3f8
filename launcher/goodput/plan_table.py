"""`launcher plan batch=goodput`: the batch the policy would choose at each world size, with the predicted goodput."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.goodput.measured_noise import MeasuredNoise
from launcher.goodput.policy import BatchChooser, GoodputPolicy, NoiseKnowledge
from launcher.goodput.throughput_model import Estimate
from launcher.goodput.update_time_model import EXTRAPOLATION_FACTOR
from launcher.plan.batch import PlanError
from launcher.plan.plan_table import format_world_sizes, make_plan_row, wrap_with_indent
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan
from launcher.system.formatting import format_duration, format_rate

__all__ = ["format_measurements", "goodput_plan_document", "goodput_plan_text"]

WORTHWHILE_SHARE = 0.9  # share of the highest goodput; the same share as for the knee of samples/s


def goodput_plan_document(
    chooser: BatchChooser, sizes: DatasetSizes, noise: MeasuredNoise | None, measured: str
) -> dict[str, Any]:
    """The JSON document: one row per world size, and `pays_to`, the world size beyond which more workers gain little.

    Times are for as much progress as train.duration makes at lr.base_batch. `measured` describes the measurements that
    the predictions are based on. Without a noise scale the base batch is used, whose efficiency is 1 at any noise.
    """
    max_world = EXTRAPOLATION_FACTOR * max(world for world, _ in chooser.profile.worlds)
    world_sizes = chooser.config.plan.world_sizes or range(1, max_world + 1)
    rows = [_make_row(chooser, sizes, world, noise) for world in world_sizes]
    goodputs = {row["world"]: row["goodput"] for row in rows if row["feasible"] and row["goodput"]}
    worthwhile = [world for world, goodput in goodputs.items() if goodput >= WORTHWHILE_SHARE * max(goodputs.values())]
    pays_to = min(worthwhile, default=None)
    return {
        "policy": "goodput",
        "data": {"train": sizes.train, "val": sizes.val},
        "lr_base": chooser.config.lr.base,
        "lr_base_batch": chooser.config.lr.base_batch,
        "noise": None if noise is None else vars(noise),
        "measured": measured,
        "reach": max_world,
        "plans": rows,
        "pays_to": pays_to,
        "why": _explain_limit(goodputs, pays_to, max_world),
    }


def _make_row(chooser: BatchChooser, sizes: DatasetSizes, world: int, noise: MeasuredNoise | None) -> dict[str, Any]:
    nodes = _count_nodes(chooser, world)
    try:
        policy = GoodputPolicy(chooser, world, nodes, NoiseKnowledge(noise.scale if noise else None))
        training_plan = make_training_plan(policy.config, sizes, world)
    except PlanError as problem:
        return {"world": world, "feasible": False, "why": str(problem)}
    return {**make_plan_row(training_plan), **_compute_figures(chooser, training_plan, nodes, noise)}


def _count_nodes(chooser: BatchChooser, world: int) -> int:
    """The number of nodes for this world size, with as many workers per node as measured at most."""
    workers_per_node = max(measured // nodes for measured, nodes in chooser.profile.worlds)
    has_several_nodes = any(nodes > 1 for _, nodes in chooser.profile.worlds)
    return -(-world // workers_per_node) if has_several_nodes else 1


def _compute_figures(
    chooser: BatchChooser, training_plan: TrainingPlan, nodes: int, noise: MeasuredNoise | None
) -> dict[str, Any]:
    plan, base = training_plan.batch_plan, chooser.config.lr.base_batch or 1
    update_s = chooser.profile.model.predict(plan.per_device, plan.accumulation, plan.world, nodes)
    speed = _divide_by_estimate(plan.global_batch, update_s)
    figures: dict[str, Any] = {"samples_per_s": speed.value, "low": speed.low, "high": speed.high}
    efficiency = None if noise is None else noise.estimate_efficiency(plan.global_batch, base)
    if plan.global_batch == base:
        efficiency = Estimate(1.0, 1.0, 1.0)  # at any noise scale
    if efficiency is None:
        return figures | dict.fromkeys(("efficiency", "goodput", "seconds", "device_hours"))
    goodput = Estimate(*(a * b for a, b in zip(speed, efficiency, strict=True)))
    seconds = _divide_by_estimate(training_plan.duration, goodput)
    return figures | {
        "efficiency": efficiency.value,
        "goodput": goodput.value,
        "goodput_low": goodput.low,
        "goodput_high": goodput.high,
        "seconds": seconds.value,
        "seconds_low": seconds.low,
        "seconds_high": seconds.high,
        "device_hours": plan.world * seconds.value / 3600,
        "device_hours_low": plan.world * seconds.low / 3600,
        "device_hours_high": plan.world * seconds.high / 3600,
    }


def _divide_by_estimate(amount: float, estimate: Estimate) -> Estimate:
    return Estimate(amount / estimate.value, amount / estimate.high, amount / estimate.low)


def _explain_limit(goodputs: Mapping[int, float], pays_to: int | None, max_world: int) -> str:
    if pays_to is None:
        return "the noise scale is unknown: set plan.noise, or train for a while to measure it"
    best = max(goodputs, key=goodputs.__getitem__)
    limit = f"nothing is predicted past {max_world} workers, twice the largest measured world size"
    if pays_to == max(goodputs):
        return f"every worker up to {pays_to} pays off; {limit}"
    share, workers = 100 * goodputs[pays_to] / goodputs[best], "worker" if pays_to == 1 else "workers"
    return f"more than {pays_to} {workers} do not pay off: {share:.0f} % of the goodput of {best} is reached; {limit}"


# --- terminal text ------------------------------------------------------------------------------------------------

TABLE_HEADER = f"{'world':>5} {'micro':>6} {'accum':>5} {'global':>7} {'samples/s':>13} {'effic.':>6} {'goodput':>13} "
TABLE_HEADER += f"{'time':>11} {'dev. h':>6}"


def goodput_plan_text(document: Mapping[str, Any]) -> str:
    """Format the document for a terminal, at most 80 columns wide."""
    noise = document["noise"]
    basis = "noise scale unknown: the base batch is used"
    if noise is not None:
        basis = f"noise scale {noise['scale']:.3g} samples ({noise['source']})"
        if noise["high"] > noise["low"]:
            basis += f", between {noise['low']:.3g} and {noise['high']:.3g}"
    lines = [
        f"batch.policy=goodput, {basis}",
        *wrap_with_indent("", f"measured: {document['measured']}"),
        "",
        TABLE_HEADER,
    ]
    lines += [line for row in document["plans"] for line in _format_row(row)]
    base = document["lr_base_batch"]
    explanation = f"Time and device hours: for as much progress as train.duration makes at lr.base_batch={base}. "
    explanation += "Each additional worker is assumed to have its own device."
    advice = document["why"][:1].upper() + document["why"][1:]
    lines += ["", *wrap_with_indent("", explanation), *wrap_with_indent("", f"{advice}.")]
    return "\n".join(lines) + "\n"


def _format_row(row: Mapping[str, Any]) -> Iterator[str]:
    if not row["feasible"]:
        yield from wrap_with_indent(f"{row['world']:>5} ", f"no plan: {row['why']}")
        return
    start = f"{row['world']:>5} {row['per_device']:>6,} {row['accumulation']:>5,} {row['global']:>7,} "
    speed = _format_spread(format_rate(row["samples_per_s"]), row["low"], row["samples_per_s"], row["high"])
    if row["efficiency"] is None:
        yield f"{start}{speed:>13} {'?':>6}"
        return
    goodput = _format_spread(format_rate(row["goodput"]), row["goodput_low"], row["goodput"], row["goodput_high"])
    time = _format_spread(format_duration(row["seconds"]), row["seconds_low"], row["seconds"], row["seconds_high"])
    percent = f"{100 * row['efficiency']:.0f} %"
    yield f"{start}{speed:>13} {percent:>6} {goodput:>13} {time:>11} {row['device_hours']:>6.2g}"


def _format_spread(text: str, low: float, value: float, high: float) -> str:
    """Format a value with its relative half-width, e.g. 1,230 ±4%."""
    return f"{text} ±{50 * (high - low) / value:.0f}%"


def format_measurements(profiles: Sequence[Any]) -> str:
    """Describe the measurements: world sizes, device and date."""
    world_sizes = format_world_sizes(sorted({profile.key["world"] for profile in profiles}))
    newest = max(profiles, key=lambda profile: str(profile.measured))
    return f"{world_sizes} workers on {newest.key['device']}, {newest.formatted_time}"
