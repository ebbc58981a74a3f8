"""Compare the batch policies for one request, for display only; training is not affected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher.errors import RequestError
from launcher.rules import far_of, rule_of
from launcher.settings import BatchSettings, Run
from launcher.study import Sizes, Study, policy_of, study

__all__ = ["compared"]

Kind = Literal["scale", "hold", "bounded"]
KINDS: tuple[Kind, ...] = ("scale", "hold", "bounded")


@dataclass(frozen=True)
class Reading:
    """The request under one policy. `derived` names the numbers missing in the request and where they come from.

    It is empty for the policy that the request selects.
    """

    run: Run
    derived: str = ""


def compared(run: Run, sizes: Sizes, worlds: Sequence[int]) -> dict[str, Any]:
    """For each policy: whether it was `asked` for, the numbers `derived` for it, and `plans`, one row per world size.

    A row's `changes` are relative to the previous feasible row. A policy that cannot be met anywhere has the reason
    in each row. The request itself must be valid: it was checked before.
    """
    return {kind: _compared(read(run, sizes, kind), sizes, worlds) for kind in KINDS}


def _compared(reading: Reading, sizes: Sizes, worlds: Sequence[int]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    before: dict[str, Any] | None = None
    for world in worlds:
        row = _row(reading.run, sizes, world)
        if row["feasible"]:
            row["changes"] = [] if before is None else changes(before, row)
            before = row
        rows.append(row)
    return {"asked": not reading.derived, "derived": reading.derived, "plans": rows}


def read(run: Run, sizes: Sizes, kind: Kind) -> Reading:
    """The request under another policy: per_device is kept, missing numbers are derived from lr.base_batch."""
    if kind == policy_of(run):
        return Reading(run)
    asked, base = run.batch, run.lr.base_batch or 1
    batch = BatchSettings(policy=kind, per_device=asked.per_device, ramp=asked.ramp)
    if kind == "hold":
        return _reading(run, replace(batch, global_batch=base), f"batch.global={base} (lr.base_batch)")
    batch = replace(batch, accumulation=asked.accumulation)
    if kind == "scale":
        steps = "" if asked.accumulation == "auto" else f" x batch.accumulation={asked.accumulation}"
        return _reading(run, batch, f"workers x batch.per_device={asked.per_device}{steps}")
    high, why = _most(run, sizes, base)
    derived = f"batch.min_global={base} (lr.base_batch), batch.max_global={high} ({why})"
    return _reading(run, replace(batch, min_global=base, max_global=high), derived)


def _most(run: Run, sizes: Sizes, base: int) -> tuple[int, str]:
    """The largest batch for which lr.rule is valid, limited by the training set, and how it was derived."""
    far = far_of(run, rule_of(run))
    if far is not None and far * base < sizes.train:
        return far * base, f"{far} x lr.base_batch"
    return sizes.train, "training set size"


def _reading(run: Run, batch: BatchSettings, derived: str) -> Reading:
    return Reading(replace(run, batch=batch), derived)


def _row(run: Run, sizes: Sizes, world: int) -> dict[str, Any]:
    try:
        planned = study(run, sizes, world)
    except RequestError as error:  # also errors at every world size: the request was not written for this policy
        return {"world": world, "feasible": False, "why": str(error)}
    return {"world": world, "feasible": True, **_facts(planned)}


def _facts(planned: Study) -> dict[str, Any]:
    plan = planned.plan
    scale = planned.schedule.target(plan.global_batch)
    return {
        "global": plan.global_batch,
        "share_min": min(plan.shares),
        "share_max": max(plan.shares),
        "accumulation": plan.accumulation,
        "lr": planned.schedule.base * scale,
        "lr_scale": scale,
    }


def changes(before: dict[str, Any], row: dict[str, Any]) -> list[str]:
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
