"""What the recommended batch means for progress: samples/s alone say nothing of how much an update learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.system.formatting import format_count, format_number

__all__ = ["describe_progress", "find_better_size"]

#: With fewer updates per epoch, or a batch of more times lr.base_batch, the effect on progress is told.
MIN_UPDATES_PER_EPOCH = 10
MAX_BASE_BATCHES = 4


def find_better_size(document: Mapping[str, Any], goodput: Mapping[str, Any] | None) -> int | None:
    """The size that makes more progress per second than the recommended one, beyond measurement error; else None."""
    if goodput is None:
        return None
    by_size = {point["per_device"]: point for point in goodput["points"]}
    recommended, best = by_size.get(document["recommended"]), by_size[goodput["best"]]
    if recommended is None or best is recommended or best["low"] <= recommended["high"]:
        return None
    return int(best["per_device"])


def describe_progress(
    document: Mapping[str, Any], goodput: Mapping[str, Any] | None, base_batch: int | None
) -> Iterator[str]:
    """Say which size makes the most progress, or, if the noise scale is unknown, what a large batch does to it."""
    if goodput is not None:
        yield from _describe_better_size(document, goodput)
        return
    batch = document["recommended"] * document["world"] * document["accumulation"]
    updates = document["train_samples"] / batch
    is_far = base_batch is not None and batch > MAX_BASE_BATCHES * base_batch
    if updates >= MIN_UPDATES_PER_EPOCH and not is_far:
        return
    instead = "" if base_batch is None else _describe_base(document["train_samples"], batch, base_batch)
    yield (
        f"an update is then {format_count(batch)} of the {format_count(document['train_samples'])} training samples, "
        f"{format_number(updates)} updates per epoch{instead}: so large a batch usually learns less per sample; "
        f"compare the time to a target with launcher -m, or name a run that measured the noise scale, plan.noise=RUN"
    )


def _describe_base(train_samples: int, batch: int, base_batch: int) -> str:
    return (
        f" instead of {format_number(train_samples / base_batch)} at lr.base_batch={base_batch}, "
        f"{format_number(batch / base_batch)} times the batch that lr.base was chosen for"
    )


def _describe_better_size(document: Mapping[str, Any], goodput: Mapping[str, Any]) -> Iterator[str]:
    better = find_better_size(document, goodput)
    if better is None:
        return
    by_size = {point["per_device"]: point for point in goodput["points"]}
    ratio = by_size[better]["goodput"] / by_size[document["recommended"]]["goodput"]
    yield (
        f"use batch.per_device={better}, which at a noise scale of {goodput['noise']['scale']:.3g} samples makes "
        f"{ratio:.2f} times its progress per second (batch=goodput chooses so by itself)"
    )
