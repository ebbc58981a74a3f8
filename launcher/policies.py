"""One request read under each batch policy, to compare what each would do. Nothing of it changes what a run does."""

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
    """The request under one policy. `derived` names the numbers that it does not hold itself, and where they are from.

    It is empty for the policy that the request asks for.
    """

    run: Run
    derived: str = ""


def compared(run: Run, sizes: Sizes, worlds: Sequence[int]) -> dict[str, Any]:
    """By policy: whether it is the one `asked` for, the numbers `derived` for it, and `plans`, a row per world size.

    A row's `changes` are those from the feasible one before it. A policy that cannot be met anywhere has the reason
    in each row. The request itself must be right: it was studied before.
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
    """The request under another policy: per_device stays, what is missing follows from lr.base_batch."""
    if kind == policy_of(run):
        return Reading(run)
    asked, base = run.batch, run.lr.base_batch or 1
    batch = BatchSettings(policy=kind, per_device=asked.per_device, ramp=asked.ramp)
    if kind == "hold":
        return _reading(run, replace(batch, global_batch=base), f"batch.global={base}, lr.base_batch")
    batch = replace(batch, accumulation=asked.accumulation)
    if kind == "scale":
        steps = "" if asked.accumulation == "auto" else f" x batch.accumulation={asked.accumulation}"
        return _reading(run, batch, f"workers x batch.per_device={asked.per_device}{steps}")
    high, why = _most(run, sizes, base)
    derived = f"batch.min_global={base}, lr.base_batch, and batch.max_global={high}, {why}"
    return _reading(run, replace(batch, min_global=base, max_global=high), derived)


def _most(run: Run, sizes: Sizes, base: int) -> tuple[int, str]:
    """The largest batch for which lr.rule is good, or that there is."""
    far = far_of(run, rule_of(run))
    if far is not None and far * base < sizes.train:
        return far * base, f"{far} times that"
    return sizes.train, "the training set"


def _reading(run: Run, batch: BatchSettings, derived: str) -> Reading:
    return Reading(replace(run, batch=batch), derived)


def _row(run: Run, sizes: Sizes, world: int) -> dict[str, Any]:
    try:
        planned = study(run, sizes, world)
    except RequestError as error:  # wrong at every world size, too: the request was not made for this policy
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
    """What is other than at the world size before: batch x2, rate x2, accumulation 2 -> 1, shares uneven."""
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
