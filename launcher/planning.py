"""The verb `plan`: the training plan at every world size, as a JSON document and as a table. Nothing is started."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from launcher.batch import PlanError
from launcher.footprint import memory_lines
from launcher.policies import compared
from launcher.settings import Run
from launcher.study import Sizes, Study, study

__all__ = ["plan_document", "plan_row", "plan_table", "worlds_text", "wrapped"]

_WORLDS = range(1, 65)
_WIDTH = 80
_SHARES_WIDTH = 24
_GLOBAL_WIDTH, _RATE_WIDTH = 8, 9


def plan_document(run: Run, sizes: Sizes, worlds: Sequence[int] | None = None) -> dict[str, Any]:
    """The plans at the world sizes `worlds` (default: plan.worlds, then 1 to 64) as a JSON document.

    `schedule` is the batch and the learning rate over time at the smallest feasible world size, which each entry
    names; warmup and decay have the same shape at all world sizes. A world size that does not fit is
    `feasible: false` with the reason in `why`. `policies` has the same world sizes under each batch policy, with
    missing numbers derived from lr.base_batch.

    Raises:
        UsageError: the request is wrong at every world size.
    """
    asked = worlds or run.plan.worlds or _WORLDS
    studies = [_studied(run, sizes, world) for world in asked]
    feasible = [each for each in studies if isinstance(each, Study)]
    return {
        "policy": feasible[0].policy if feasible else run.batch.policy,
        "data": {"train": sizes.train, "val": sizes.val},
        "lr_base": run.lr.base,
        "lr_base_batch": run.lr.base_batch,
        "lr_rule": feasible[0].rule if feasible else run.lr.rule,
        "decay": run.schedule.decay,
        "plans": [
            plan_row(each) if isinstance(each, Study) else {"world": world, "feasible": False, "why": each}
            for world, each in zip(asked, studies, strict=True)
        ],
        "schedule": _schedule(min(feasible, key=lambda each: each.world)) if feasible else [],
        "policies": compared(run, sizes, asked),
    }


def plan_table(document: Mapping[str, Any]) -> str:
    """Format `plan_document` as text of at most 80 columns."""
    lines = [
        f"{document['data']['train']:,} training samples, batch.policy={document['policy']}, "
        f"lr.rule={document['lr_rule']}",
        f"lr.base={_number(document['lr_base'])} at lr.base_batch={document['lr_base_batch']}",
        "",
        _columns("world", "shares", "micro", "accum", "global", "rate", "updates/ep"),
        *_plan_lines(document["plans"]),
        *_schedule_lines(document),
        *_advice_lines(document["plans"]),
        *(["", *memory_lines(document["memory"])] if "memory" in document else []),
        *_policy_lines(document["policies"]),
    ]
    return "\n".join(lines) + "\n"


def _studied(run: Run, sizes: Sizes, world: int) -> Study | str:
    try:
        return study(run, sizes, world)
    except PlanError as error:
        return str(error)


def plan_row(planned: Study) -> dict[str, Any]:
    plan = planned.plan
    scale = planned.schedule.target(plan.global_batch)
    return {
        "world": planned.world,
        "feasible": True,
        "global": plan.global_batch,
        "shares": list(plan.shares),
        "per_device": plan.per_device,
        "accumulation": plan.accumulation,
        "lr": planned.schedule.base * scale,
        "lr_scale": scale,
        "warmup_samples": planned.warmup,
        "updates_per_epoch": planned.sizes.train / plan.global_batch,
        "advice": list(planned.advice),
    }


def _schedule(planned: Study) -> list[dict[str, Any]]:
    end = planned.duration
    points = [("start", 0), ("after warmup", planned.warmup), ("25 %", end // 4), ("50 %", end // 2)]
    points += [("75 %", end * 3 // 4), ("100 %", end)]
    return [_point(planned, at, samples) for at, samples in sorted(points, key=lambda point: point[1])]


def _point(planned: Study, at: str, samples: int) -> dict[str, Any]:
    batch = planned.batch_at(samples)
    lr = planned.schedule.lr(samples, batch)
    scale = planned.schedule.scale(samples, batch)
    return {"at": at, "samples": samples, "world": planned.world, "global": batch, "lr": lr, "lr_scale": scale}


def _plan_lines(plans: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line per feasible world size; consecutive ones that are infeasible for the same reason share a line."""
    for _, rows in groupby(plans, key=_kind):
        group = list(rows)
        if group[0]["feasible"]:
            yield from map(_plan_line, group)
        else:
            yield from wrapped(f"{worlds_text([row['world'] for row in group]):>7}  ", f"no plan: {group[0]['why']}")


def _kind(row: Mapping[str, Any]) -> str:
    return "" if row["feasible"] else re.sub(r"\d+", "#", str(row["why"]))


def _plan_line(row: Mapping[str, Any]) -> str:
    return _columns(
        str(row["world"]),
        _shares(row["shares"]),
        _count(row["per_device"], 6),
        _count(row["accumulation"], 7),
        _count(row["global"], 10),
        _number(row["lr"]),
        _count(round(row["updates_per_epoch"], 1), 12),
    )


def _schedule_lines(document: Mapping[str, Any]) -> Iterator[str]:
    points = document["schedule"]
    if not points:
        return
    title = f"schedule={document['decay']} at world {points[0]['world']}"
    yield ""
    yield f"{title:<33}{'samples':>20}{'global':>10}{'rate':>11}"
    for point in points:
        counts = f"{_count(point['samples'], 20)}{_count(point['global'], 10)}"
        yield f"{'  ' + point['at']:<33}{counts}{_number(point['lr']):>11}"


def _advice_lines(plans: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    worlds: dict[str, list[int]] = {}
    for row in plans:
        for line in row.get("advice", ()):
            worlds.setdefault(line, []).append(row["world"])
    for line, where in worlds.items():
        yield ""
        yield from wrapped("", f"Advice at world size {worlds_text(where)}: {line}")


def _policy_lines(policies: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One line per world size: batch and learning rate under every policy, and the changes under the selected one."""
    asked = next(kind for kind, found in policies.items() if found["asked"])
    rows = list(zip(*(found["plans"] for found in policies.values()), strict=True))
    first = max(5, *(len(str(row[0]["world"])) for row in rows))
    width = first + len(policies) * (_GLOBAL_WIDTH + _RATE_WIDTH) + 1
    yield ""
    heads = "".join(f"{kind:>{_GLOBAL_WIDTH}}{'rate':>{_RATE_WIDTH}}" for kind in policies)
    yield f"{'world':>{first}}{heads} changes under {asked}"
    for row in rows:
        figures = "".join(map(_figures, row))
        what = next(one for kind, one in zip(policies, row, strict=True) if kind == asked).get("changes", ())
        yield from wrapped(f"{row[0]['world']:>{first}}{figures}".ljust(width), ", ".join(what))
    said = {row.get("why") for row in policies[asked]["plans"]}
    for kind, found in policies.items():
        yield from _reading_lines(kind, found, said)


def _figures(row: Mapping[str, Any]) -> str:
    if not row["feasible"]:
        return f"{'-':>{_GLOBAL_WIDTH}}{'-':>{_RATE_WIDTH}}"
    return f"{_count(row['global'], _GLOBAL_WIDTH)}{row['lr']:>{_RATE_WIDTH}.3g}"


def _reading_lines(kind: str, found: Mapping[str, Any], said: Collection[str | None]) -> Iterator[str]:
    """The numbers derived for a policy that was not selected, and why it has no plan; reasons in `said` are skipped."""
    if found["asked"]:
        return
    yield from wrapped("  ", f"{kind}: {found['derived']}")
    refused = (row for row in found["plans"] if not row["feasible"] and row["why"] not in said)
    for _, group in groupby(refused, key=_kind):
        rows = list(group)
        where = worlds_text([row["world"] for row in rows])
        yield from wrapped("    ", f"no plan at world size {where}: {rows[0]['why']}")


def _columns(world: str, shares: str, micro: str, accum: str, size: str, rate: str, updates: str) -> str:
    return f"{world:>7}  {shares:<{_SHARES_WIDTH}}{micro:>6}{accum:>7}{size:>10}{rate:>11}{updates:>12}"


def _shares(shares: Iterable[int]) -> str:
    """Format shares with equal neighbours grouped: 86, 85x2."""
    counted = [(share, len(list(same))) for share, same in groupby(shares)]
    text = ", ".join(f"{share}x{count}" if count > 1 else f"{share}" for share, count in counted)
    return text if len(text) <= _SHARES_WIDTH else textwrap.shorten(text, _SHARES_WIDTH, placeholder=" ...")


def worlds_text(worlds: Sequence[int]) -> str:
    """Format world sizes with consecutive ones grouped: 1-4, 8."""
    texts = []
    for _, numbered in groupby(enumerate(worlds), key=lambda pair: pair[1] - pair[0]):
        group = [world for _, world in numbered]
        texts.append(f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}")
    return ", ".join(texts)


def wrapped(head: str, text: str) -> list[str]:
    if not text:
        return [head.rstrip()]
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def _count(value: float, width: int) -> str:
    """Format `value` with commas, or with fewer digits if it would not fit into the column."""
    text = f"{value:,}"
    return f"{text if len(text) < width else f'{value:.{max(1, width - 7)}g}':>{width}}"


def _number(value: float) -> str:
    return f"{value:.4g}"
