"""Text of the console summary at the start of a run and at changes of its plan. Nothing here prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.system.formatting import (
    format_count,
    format_number,
    format_plural,
    format_shares,
    strip_control_characters,
)

__all__ = [
    "Facts",
    "LabelledText",
    "format_lr_scaling",
    "format_plan",
    "format_replan",
    "format_resize",
    "format_title",
    "make_plan_rows",
    "make_start_rows",
]

Facts = Mapping[str, Any]
LabelledText = tuple[str, str]


def format_title(facts: Facts) -> str:
    """Title of the run, e.g. resnet on 2 workers; restarts append · start N."""
    world, generation = facts.get("world", 1), facts.get("generation", 1)
    start = f" · start {generation}" if generation > 1 else ""
    return f"{facts.get('recipe', 'training')} on {format_plural(world, 'worker')}{start}"


def make_start_rows(facts: Facts) -> list[LabelledText]:
    """Rows that describe data, model, device, length and optimizer. Rows without a value are omitted."""
    pairs = (
        ("data", _describe_data(facts)),
        ("model", _describe_model(facts)),
        ("device", _describe_device(facts)),
        ("length", _describe_length(facts)),
        ("optimizer", _describe_optimizer(facts)),
        ("folder", str(facts.get("run_dir") or "")),
    )
    return [(label, text) for label, text in pairs if text]


def make_plan_rows(facts: Facts, train_samples: int | None) -> list[LabelledText]:
    """Rows of the first plan, printed below the start rows."""
    lr = f"{format_lr_scaling(facts)} · {_describe_warmup(facts, train_samples)}"
    reason = [("", str(facts["why"]))] if facts.get("why") else []
    return [("batch", format_plan(facts)), ("lr", lr), *reason]


def format_replan(facts: Facts) -> str:
    """Format a plan change, e.g. 128 -> 256 = 2 workers x 128 · lr 0.2 (x2 of 0.1 at 128) · why."""
    before = facts.get("from") or {}
    old_batch = f"{format_count(before['global'])} -> " if "global" in before else ""
    parts = [
        f"{old_batch}{format_plan(facts)}",
        f"lr {format_lr_scaling(facts)}",
        strip_control_characters(facts.get("why") or ""),
    ]
    return " · ".join(part for part in parts if part)


def format_plan(facts: Facts) -> str:
    """Format a batch plan, e.g. 256 = 3 workers x (86, 85x2) in 2 micro-batches."""
    shares = facts.get("shares") or [facts["global"]]
    workers = format_plural(facts.get("world", len(shares)), "worker")
    text = f"{format_count(facts['global'])} = {workers} x {format_shares(shares)}"
    micro_batches = facts.get("accumulation") or 1
    return f"{text} in {micro_batches} micro-batches" if micro_batches > 1 else text


def format_lr_scaling(facts: Facts) -> str:
    """Format the learning rate, e.g. 0.1 (x0.5 of 0.2 at 64): value, scale, base and base batch."""
    scale = facts.get("lr_scale") or 1.0
    base = facts.get("lr_base") or facts["lr"] / scale
    at = f" at {format_count(facts['lr_base_batch'])}" if facts.get("lr_base_batch") else ""
    return f"{format_number(facts['lr'])} (x{format_number(scale)} of {format_number(base)}{at})"


def format_resize(facts: Facts) -> str:
    """Format a resize, e.g. 3 -> 2 workers · batch 256 -> 256 · lr 0.1 -> 0.1."""
    before, after = facts.get("from") or {}, facts.get("to") or {}
    parts = [f"{before.get('world', '?')} -> {format_plural(after.get('world', '?'), 'worker')}"]
    for name, key in (("batch", "global"), ("lr", "lr")):
        if key in before and key in after:
            parts.append(f"{name} {format_number(before[key])} -> {format_number(after[key])}")
    return " · ".join(parts)


def _describe_data(facts: Facts) -> str:
    data = facts.get("data") or {}
    parts = [f"{format_plural(data['train'], 'sample')} to train on"] if data.get("train") else []
    return ", ".join([*parts, *([f"{data['val']:,} to validate"] if data.get("val") else [])])


def _describe_model(facts: Facts) -> str:
    parameters, trainable = facts.get("parameters"), facts.get("trainable")
    parts = [f"{parameters:,} parameters"] if parameters else []
    if parameters and trainable not in (None, parameters):
        parts.append(f"{trainable:,} of them trained")
    if frozen := facts.get("in_eval_mode"):
        others = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        parts.append(f"{strip_control_characters(frozen[0])}{others} in eval mode")
    return " · ".join([*parts, *(str(facts[key]) for key in ("precision", "strategy") if facts.get(key))])


def _describe_device(facts: Facts) -> str:
    nodes, threads = facts.get("nodes") or 1, facts.get("threads")
    parts = [str(facts[key]) for key in ("device", "device_name", "backend") if facts.get(key)]
    parts += [f"{nodes} nodes"] if nodes > 1 else []
    parts += [f"{format_plural(threads, 'thread')} per worker"] if threads else []
    return " · ".join(parts)


def _describe_length(facts: Facts) -> str:
    if not facts.get("duration_samples"):
        return ""
    text = format_plural(facts["duration_samples"], "sample")
    text += f" = {format_plural(facts['updates'], 'update')}" if facts.get("updates") else ""
    per_epoch = facts.get("updates_per_epoch")
    return f"{text}, {per_epoch:,.4g} per epoch" if per_epoch else text


def _describe_optimizer(facts: Facts) -> str:
    decay = facts.get("decay")
    parts = [str(facts["optimizer"])] if facts.get("optimizer") else []
    return " · ".join([*parts, *([f"{decay} LR" if decay == "constant" else f"{decay} decay"] if decay else [])])


def _describe_warmup(facts: Facts, train_samples: int | None) -> str:
    samples = facts.get("warmup_samples") or 0
    if not samples:
        return "no warmup"
    if not train_samples:
        return f"warmup {format_count(samples)} samples"
    epochs = f"{samples / train_samples:.3g}"
    return f"warmup {format_count(samples)} samples ({epochs} epoch{'' if epochs == '1' else 's'})"
