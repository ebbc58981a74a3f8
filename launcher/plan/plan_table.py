"""The command `plan`: the training plan at every world size, as a JSON document and as a table. Nothing is started."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from launcher.config.schema import RunConfig
from launcher.plan.batch import PlanError
from launcher.plan.compare_policies import compare_policies
from launcher.plan.divisible_batch import DivisibleBatch, find_divisible_batch, hold_divisible_batch
from launcher.plan.memory_model import format_memory_lines
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan, resolve_batch_policy

__all__ = ["format_plan_table", "format_world_sizes", "make_plan_document", "make_plan_row", "wrap_with_indent"]

_DEFAULT_WORLD_SIZES = range(1, 65)
_WIDTH = 80
_SHARES_WIDTH = 24
_GLOBAL_WIDTH, _LR_WIDTH = 8, 9


def make_plan_document(
    config: RunConfig, sizes: DatasetSizes, world_sizes: Sequence[int] | None = None
) -> dict[str, Any]:
    """The plans at the world sizes `world_sizes` (default: plan.world_sizes, then 1 to 64) as a JSON document.

    `schedule` is the batch and the learning rate over time at the smallest feasible world size, which each entry
    names; warmup and decay have the same shape at all world sizes. A world size that does not fit is
    `feasible: false` with the reason in `why`. `policies` has the same world sizes under each batch policy, with
    missing numbers derived from lr.base_batch. `divisible` is the answer to batch.global=divisible: the `global` batch
    of at most `max_global` and which `world_sizes`, out of those in `of`, divide it; the plans are for that batch.

    Raises:
        UsageError: the request is wrong at every world size.
    """
    world_sizes = world_sizes or config.plan.world_sizes or _DEFAULT_WORLD_SIZES
    divisible = None
    if config.batch.global_batch == "divisible" and resolve_batch_policy(config) == "hold":
        divisible = find_divisible_batch(config, sizes.train, world_sizes)
        config = hold_divisible_batch(config, divisible)
    plans = [_try_make_plan(config, sizes, world_size) for world_size in world_sizes]
    feasible = [plan for plan in plans if isinstance(plan, TrainingPlan)]
    return {
        "policy": feasible[0].policy if feasible else config.batch.policy,
        "data": {"train": sizes.train, "val": sizes.val},
        "lr_base": config.lr.base,
        "lr_base_batch": config.lr.base_batch,
        "lr_rule": feasible[0].rule if feasible else config.lr.rule,
        "decay": config.schedule.decay,
        "plans": [
            make_plan_row(plan) if isinstance(plan, TrainingPlan) else {"world": size, "feasible": False, "why": plan}
            for size, plan in zip(world_sizes, plans, strict=True)
        ],
        "schedule": _make_schedule_points(min(feasible, key=lambda plan: plan.world)) if feasible else [],
        "policies": compare_policies(config, sizes, world_sizes),
        **({} if divisible is None else {"divisible": _make_divisible_row(divisible)}),
    }


def _make_divisible_row(divisible: DivisibleBatch) -> dict[str, Any]:
    return {
        "global": divisible.global_batch,
        "max_global": divisible.max_global,
        "world_sizes": list(divisible.world_sizes),
        "of": list(divisible.candidates),
    }


def format_plan_table(document: Mapping[str, Any]) -> str:
    """Format the document of `make_plan_document` as text of at most 80 columns."""
    lines = [
        f"{document['data']['train']:,} training samples, batch.policy={document['policy']}, "
        f"lr.rule={document['lr_rule']}",
        f"lr.base={_format_short_number(document['lr_base'])} at lr.base_batch={document['lr_base_batch']}",
        *(_format_divisible_lines(document["divisible"]) if "divisible" in document else []),
        "",
        _format_columns("world", "shares", "micro", "accum", "global", "lr", "updates/ep"),
        *_format_plan_lines(document["plans"]),
        *_format_schedule_lines(document),
        *_format_advice_lines(document["plans"]),
        *(["", *format_memory_lines(document["memory"])] if "memory" in document else []),
        *_format_policy_lines(document["policies"]),
    ]
    return "\n".join(lines) + "\n"


def _try_make_plan(config: RunConfig, sizes: DatasetSizes, world_size: int) -> TrainingPlan | str:
    try:
        return make_training_plan(config, sizes, world_size)
    except PlanError as error:
        return str(error)


def make_plan_row(planned: TrainingPlan) -> dict[str, Any]:
    plan = planned.batch_plan
    scale = planned.schedule.target_scale(plan.global_batch)
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


def _make_schedule_points(planned: TrainingPlan) -> list[dict[str, Any]]:
    end = planned.duration
    points = [("start", 0), ("after warmup", planned.warmup), ("25 %", end // 4), ("50 %", end // 2)]
    points += [("75 %", end * 3 // 4), ("100 %", end)]
    return [_make_schedule_point(planned, at, samples) for at, samples in sorted(points, key=lambda point: point[1])]


def _make_schedule_point(planned: TrainingPlan, at: str, samples: int) -> dict[str, Any]:
    batch = planned.batch_at(samples)
    lr = planned.schedule.lr(samples, batch)
    scale = planned.schedule.scale(samples, batch)
    return {"at": at, "samples": samples, "world": planned.world, "global": batch, "lr": lr, "lr_scale": scale}


def _format_plan_lines(plans: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line per feasible world size; consecutive ones that are infeasible for the same reason share a line."""
    for _, rows in groupby(plans, key=_get_failure_kind):
        group = list(rows)
        if group[0]["feasible"]:
            yield from map(_format_plan_line, group)
        else:
            yield from wrap_with_indent(
                f"{format_world_sizes([row['world'] for row in group]):>7}  ", f"no plan: {group[0]['why']}"
            )


def _format_divisible_lines(row: Mapping[str, Any]) -> list[str]:
    text = (
        f"batch.global={row['global']} is the batch of at most {row['max_global']:,} samples that most world sizes "
        f"divide, {len(row['world_sizes'])} of {len(row['of'])}: {format_world_sizes(row['world_sizes'])}"
    )
    return wrap_with_indent("", text)


def _get_failure_kind(row: Mapping[str, Any]) -> str:
    return "" if row["feasible"] else re.sub(r"\d+", "#", str(row["why"]))


def _format_plan_line(row: Mapping[str, Any]) -> str:
    return _format_columns(
        str(row["world"]),
        _group_equal_shares(row["shares"]),
        _format_count_to_width(row["per_device"], 6),
        _format_count_to_width(row["accumulation"], 7),
        _format_count_to_width(row["global"], 10),
        _format_short_number(row["lr"]),
        _format_count_to_width(round(row["updates_per_epoch"], 1), 12),
    )


def _format_schedule_lines(document: Mapping[str, Any]) -> Iterator[str]:
    points = document["schedule"]
    if not points:
        return
    title = f"schedule={document['decay']} at world size {points[0]['world']}"
    yield ""
    yield f"{title:<38}{'samples':>15}{'global':>10}{'lr':>11}"
    for point in points:
        counts = f"{_format_count_to_width(point['samples'], 15)}{_format_count_to_width(point['global'], 10)}"
        yield f"{'  ' + point['at']:<38}{counts}{_format_short_number(point['lr']):>11}"


def _format_advice_lines(plans: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    world_sizes: dict[str, list[int]] = {}
    for row in plans:
        for line in row.get("advice", ()):
            world_sizes.setdefault(line, []).append(row["world"])
    for line, concerned in world_sizes.items():
        yield ""
        yield from wrap_with_indent("", f"Advice at world size {format_world_sizes(concerned)}: {line}")


def _format_policy_lines(policies: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One line per world size: batch and learning rate under every policy, and the changes under the selected one."""
    selected = next(kind for kind, view in policies.items() if view["asked"])
    rows = list(zip(*(view["plans"] for view in policies.values()), strict=True))
    first = max(5, *(len(str(row[0]["world"])) for row in rows))
    width = first + len(policies) * (_GLOBAL_WIDTH + _LR_WIDTH) + 1
    yield ""
    heads = "".join(f"{kind:>{_GLOBAL_WIDTH}}{'lr':>{_LR_WIDTH}}" for kind in policies)
    yield f"{'world':>{first}}{heads} changes under {selected}"
    for row in rows:
        columns = "".join(map(_format_batch_and_lr, row))
        changes = row[list(policies).index(selected)].get("changes", ())
        yield from wrap_with_indent(f"{row[0]['world']:>{first}}{columns}".ljust(width), ", ".join(changes))
    shown_reasons = {row.get("why") for row in policies[selected]["plans"]}
    for kind, view in policies.items():
        yield from _format_view_lines(kind, view, shown_reasons)


def _format_batch_and_lr(row: Mapping[str, Any]) -> str:
    if not row["feasible"]:
        return f"{'-':>{_GLOBAL_WIDTH}}{'-':>{_LR_WIDTH}}"
    return f"{_format_count_to_width(row['global'], _GLOBAL_WIDTH)}{row['lr']:>{_LR_WIDTH}.3g}"


def _format_view_lines(kind: str, view: Mapping[str, Any], shown_reasons: Collection[str | None]) -> Iterator[str]:
    """The numbers derived for a policy that was not selected, and why it has no plan, unless that was shown already."""
    if view["asked"]:
        return
    yield from wrap_with_indent("  ", f"{kind}: {view['derived']}")
    refused = (row for row in view["plans"] if not row["feasible"] and row["why"] not in shown_reasons)
    for _, group in groupby(refused, key=_get_failure_kind):
        rows = list(group)
        world_sizes = format_world_sizes([row["world"] for row in rows])
        yield from wrap_with_indent("    ", f"no plan at world size {world_sizes}: {rows[0]['why']}")


def _format_columns(world: str, shares: str, micro: str, accum: str, size: str, lr: str, updates: str) -> str:
    return f"{world:>7}  {shares:<{_SHARES_WIDTH}}{micro:>6}{accum:>7}{size:>10}{lr:>11}{updates:>12}"


def _group_equal_shares(shares: Iterable[int]) -> str:
    """Format shares with equal neighbours grouped: 86, 85x2."""
    counted = [(share, len(list(same))) for share, same in groupby(shares)]
    text = ", ".join(f"{share}x{count}" if count > 1 else f"{share}" for share, count in counted)
    return text if len(text) <= _SHARES_WIDTH else textwrap.shorten(text, _SHARES_WIDTH, placeholder=" ...")


def format_world_sizes(world_sizes: Sequence[int]) -> str:
    """Format world sizes with consecutive ones grouped: 1-4, 8."""
    texts = []
    for _, numbered in groupby(enumerate(world_sizes), key=lambda pair: pair[1] - pair[0]):
        group = [size for _, size in numbered]
        texts.append(f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}")
    return ", ".join(texts)


def wrap_with_indent(head: str, text: str) -> list[str]:
    if not text:
        return [head.rstrip()]
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def _format_count_to_width(value: float, width: int) -> str:
    """Format `value` with commas, or with fewer digits if it would not fit into the column."""
    text = f"{value:,}"
    return f"{text if len(text) < width else f'{value:.{max(1, width - 7)}g}':>{width}}"


def _format_short_number(value: float) -> str:
    return f"{value:.4g}"
