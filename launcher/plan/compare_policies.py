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


def compare_policies(config: RunConfig, sizes: DatasetSizes, world_sizes: Sequence[int]) -> dict[str, Any]:
    """For each policy: whether it was `asked` for, the numbers `derived` for it, and `plans`, one row per world size.

    A row's `changes` are relative to the previous feasible row. A policy that cannot be met anywhere has the reason
    in each row. The request itself must be valid: it was checked before.
    """
    return {
        kind: _compare_world_sizes(config_under_policy(config, sizes, kind), sizes, world_sizes)
        for kind in POLICY_KINDS
    }


def _compare_world_sizes(view: PolicyView, sizes: DatasetSizes, world_sizes: Sequence[int]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    previous: dict[str, Any] | None = None
    for world_size in world_sizes:
        row = _make_row(view.config, sizes, world_size)
        if row["feasible"]:
            row["changes"] = [] if previous is None else describe_changes(previous, row)
            previous = row
        rows.append(row)
    return {"asked": not view.derived, "derived": view.derived, "plans": rows}


def config_under_policy(config: RunConfig, sizes: DatasetSizes, kind: PolicyKind) -> PolicyView:
    """The request under another policy: per_device is kept, missing numbers are derived from lr.base_batch."""
    if kind == resolve_batch_policy(config):
        return PolicyView(config)
    request, base = config.batch, config.lr.base_batch or 1
    batch = BatchConfig(policy=kind, per_device=request.per_device, ramp=request.ramp)
    if kind == "hold":
        return _make_policy_view(config, replace(batch, global_batch=base), f"batch.global={base} (lr.base_batch)")
    batch = replace(batch, accumulation=request.accumulation)
    if kind == "scale":
        steps = "" if request.accumulation == "auto" else f" x batch.accumulation={request.accumulation}"
        return _make_policy_view(config, batch, f"workers x batch.per_device={request.per_device}{steps}")
    high, why = _find_max_batch(config, sizes, base)
    derived = f"batch.min_global={base} (lr.base_batch), batch.max_global={high} ({why})"
    return _make_policy_view(config, replace(batch, min_global=base, max_global=high), derived)


def _find_max_batch(config: RunConfig, sizes: DatasetSizes, base: int) -> tuple[int, str]:
    """The largest batch for which lr.rule is valid, limited by the training set, and how it was derived."""
    ratio = max_batch_ratio(config, resolve_lr_rule(config))
    if ratio is not None and ratio * base < sizes.train:
        return ratio * base, f"{ratio} x lr.base_batch"
    return sizes.train, "training set size"


def _make_policy_view(config: RunConfig, batch: BatchConfig, derived: str) -> PolicyView:
    return PolicyView(replace(config, batch=batch), derived)


def _make_row(config: RunConfig, sizes: DatasetSizes, world_size: int) -> dict[str, Any]:
    try:
        planned = make_training_plan(config, sizes, world_size)
    except UsageError as error:  # also errors at every world size: the request was not written for this policy
        return {"world": world_size, "feasible": False, "why": str(error)}
    return {"world": world_size, "feasible": True, **_describe_plan(planned)}


def _describe_plan(planned: TrainingPlan) -> dict[str, Any]:
    plan = planned.batch_plan
    scale = planned.schedule.target_scale(plan.global_batch)
    return {
        "global": plan.global_batch,
        "share_min": min(plan.shares),
        "share_max": max(plan.shares),
        "accumulation": plan.accumulation,
        "lr": planned.schedule.base * scale,
        "lr_scale": scale,
    }


def describe_changes(previous: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The changes from the previous world size: batch x2, lr x2, accumulation 2 -> 1, shares uneven."""
    changes = [
        f"{name} x{row[key] / previous[key]:.3g}"
        for name, key in (("batch", "global"), ("lr", "lr"))
        if row[key] != previous[key]
    ]
    if row["accumulation"] != previous["accumulation"]:
        changes.append(f"accumulation {previous['accumulation']} -> {row['accumulation']}")
    even, was_even = (plan["share_min"] == plan["share_max"] for plan in (row, previous))
    if even != was_even:
        changes.append("shares even" if even else "shares uneven")
    return changes
