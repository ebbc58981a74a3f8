"""Compare the batch policies for one request, for display only; training is not affected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher.config.schema import BatchConfig, RunConfig
from launcher.errors import UsageError
from launcher.plan.lr_scaling import max_batch_ratio, resolve_lr_rule
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan, resolve_batch_policy

__all__ = ["compare_policies"]

PolicyKind = Literal["scale", "hold", "bounded"]
POLICY_KINDS: tuple[PolicyKind, ...] = ("scale", "hold", "bounded")


@dataclass(frozen=True)
class PolicyView:
    """The request under one policy. `derived` names the numbers missing in the request and where they come from.

    It is empty for the policy that the request selects.
    """

    config: RunConfig
    derived: str = ""


def compare_policies(config: RunConfig, sizes: DatasetSizes, worlds: Sequence[int]) -> dict[str, Any]:
    """For each policy: whether it was `asked` for, the numbers `derived` for it, and `plans`, one row per world size.

    A row's `changes` are relative to the previous feasible row. A policy that cannot be met anywhere has the reason
    in each row. The request itself must be valid: it was checked before.
    """
    return {
        kind: _compare_world_sizes(config_under_policy(config, sizes, kind), sizes, worlds) for kind in POLICY_KINDS
    }


def _compare_world_sizes(reading: PolicyView, sizes: DatasetSizes, worlds: Sequence[int]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    before: dict[str, Any] | None = None
    for world in worlds:
        row = _make_row(reading.config, sizes, world)
        if row["feasible"]:
            row["changes"] = [] if before is None else describe_changes(before, row)
            before = row
        rows.append(row)
    return {"asked": not reading.derived, "derived": reading.derived, "plans": rows}


def config_under_policy(config: RunConfig, sizes: DatasetSizes, kind: PolicyKind) -> PolicyView:
    """The request under another policy: per_device is kept, missing numbers are derived from lr.base_batch."""
    if kind == resolve_batch_policy(config):
        return PolicyView(config)
    asked, base = config.batch, config.lr.base_batch or 1
    batch = BatchConfig(policy=kind, per_device=asked.per_device, ramp=asked.ramp)
    if kind == "hold":
        return _make_policy_view(config, replace(batch, global_batch=base), f"batch.global={base} (lr.base_batch)")
    batch = replace(batch, accumulation=asked.accumulation)
    if kind == "scale":
        steps = "" if asked.accumulation == "auto" else f" x batch.accumulation={asked.accumulation}"
        return _make_policy_view(config, batch, f"workers x batch.per_device={asked.per_device}{steps}")
    high, why = _find_max_batch(config, sizes, base)
    derived = f"batch.min_global={base} (lr.base_batch), batch.max_global={high} ({why})"
    return _make_policy_view(config, replace(batch, min_global=base, max_global=high), derived)


def _find_max_batch(config: RunConfig, sizes: DatasetSizes, base: int) -> tuple[int, str]:
    """The largest batch for which lr.rule is valid, limited by the training set, and how it was derived."""
    far = max_batch_ratio(config, resolve_lr_rule(config))
    if far is not None and far * base < sizes.train:
        return far * base, f"{far} x lr.base_batch"
    return sizes.train, "training set size"


def _make_policy_view(config: RunConfig, batch: BatchConfig, derived: str) -> PolicyView:
    return PolicyView(replace(config, batch=batch), derived)


def _make_row(config: RunConfig, sizes: DatasetSizes, world: int) -> dict[str, Any]:
    try:
        planned = make_training_plan(config, sizes, world)
    except UsageError as error:  # also errors at every world size: the request was not written for this policy
        return {"world": world, "feasible": False, "why": str(error)}
    return {"world": world, "feasible": True, **_describe_plan(planned)}


def _describe_plan(planned: TrainingPlan) -> dict[str, Any]:
    plan = planned.plan
    scale = planned.schedule.target_scale(plan.global_batch)
    return {
        "global": plan.global_batch,
        "share_min": min(plan.shares),
        "share_max": max(plan.shares),
        "accumulation": plan.accumulation,
        "lr": planned.schedule.base * scale,
        "lr_scale": scale,
    }


def describe_changes(before: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The changes from the previous world size: batch x2, rate x2, accumulation 2 -> 1, shares uneven."""
    found = [
        f"{name} x{row[key] / before[key]:.3g}"
        for name, key in (("batch", "global"), ("rate", "lr"))
        if row[key] != before[key]
    ]
    if row["accumulation"] != before["accumulation"]:
        found.append(f"accumulation {before['accumulation']} -> {row['accumulation']}")
    even, was_even = (one["share_min"] == one["share_max"] for one in (row, before))
    if even != was_even:
        found.append("shares even" if even else "shares uneven")
    return found
