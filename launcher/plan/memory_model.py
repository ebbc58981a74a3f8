"""Estimate the memory of a model's state per worker and strategy: parameters, gradients, optimizer state, buffers.

Buffers are those that a strategy keeps for the whole training. Activations and FSDP's gathered blocks are temporary,
depend on batch and model, and are not included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LAYOUTS", "MemoryEstimate", "ModelSize", "estimate_memory", "format_memory_lines", "make_memory_document"]


@dataclass(frozen=True)
class ShardingLayout:
    """What a strategy shards over the workers, and what it allocates in addition.

    `copy`: the optimizer steps on a second copy of the parameters. `buffers`: number of buffers as large as all
    parameters.
    """

    parameters: bool = False
    gradients: bool = False
    optimizer: bool = False
    copy: bool = False
    buffers: int = 0


#: As measured with DeepSpeed 0.19: stage 1 shards the gradients too, stages 1 to 3 allocate a gradient bucket, and
#: stage 3 also keeps a buffer of gathered parameters.
LAYOUTS: Mapping[str, ShardingLayout] = {
    "ddp": ShardingLayout(),
    "fsdp": ShardingLayout(parameters=True, gradients=True, optimizer=True),
    "zero0": ShardingLayout(),
    "zero1": ShardingLayout(gradients=True, optimizer=True, copy=True, buffers=1),
    "zero2": ShardingLayout(gradients=True, optimizer=True, copy=True, buffers=1),
    "zero3": ShardingLayout(parameters=True, gradients=True, optimizer=True, copy=True, buffers=2),
}
#: Largest number of elements in a DeepSpeed bucket, by default.
MAX_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class ModelSize:
    """The size of a model: trainable and frozen elements, bytes per element, optimizer state per trainable element."""

    trainable: int
    frozen: int
    element_bytes: int
    slots: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of state on one worker."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def estimate_memory(weights: ModelSize, layout: str, world_size: int) -> MemoryEstimate:
    """Estimate memory by ZeRO's formulas (Rajbhandari 2020, arXiv 1910.02054, section 5).

    Parameters and gradients have the same number of bytes per element. DeepSpeed's stages 1 to 3 step on a copy of
    each worker's part of the parameters, whatever their precision.
    """
    sharding = LAYOUTS[layout]

    def count_bytes(elements: int, sharded: bool) -> int:
        return weights.element_bytes * (math.ceil(elements / world_size) if sharded else elements)

    parameters = count_bytes(weights.trainable + weights.frozen, sharding.parameters)
    return MemoryEstimate(
        parameters=parameters + (count_bytes(weights.trainable, True) if sharding.copy else 0),
        gradients=count_bytes(weights.trainable, sharding.gradients),
        optimizer=count_bytes(weights.trainable * weights.slots, sharding.optimizer),
        buffers=sharding.buffers * count_bytes(min(weights.trainable, MAX_BUCKET_ELEMENTS), False)
        if world_size > 1
        else 0,
    )


def make_memory_document(weights: ModelSize, world_sizes: Sequence[int]) -> dict[str, Any]:
    """Bytes per worker for each strategy and world size, as a JSON document."""
    return {
        "trainable": weights.trainable,
        "frozen": weights.frozen,
        "optimizer_slots": weights.slots,
        "strategies": {
            layout: [{"world": size, **_make_bytes_row(estimate_memory(weights, layout, size))} for size in world_sizes]
            for layout in LAYOUTS
        },
    }


def _make_bytes_row(estimate: MemoryEstimate) -> dict[str, int]:
    return {
        "parameters_bytes": estimate.parameters,
        "gradients_bytes": estimate.gradients,
        "optimizer_bytes": estimate.optimizer,
        "buffers_bytes": estimate.buffers,
        "total_bytes": estimate.total,
    }


def format_memory_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The totals as a text table of at most 80 columns."""
    strategies = document["strategies"]
    yield f"Memory per worker for {document['trainable'] + document['frozen']:,} parameters, their gradients and"
    yield "the optimizer's state; activations are not included"
    yield f"{'world':>7}" + "".join(f"{layout:>12}" for layout in strategies)
    for row in zip(*strategies.values(), strict=True):
        yield f"{row[0]['world']:>7}" + "".join(f"{_format_size(cell['total_bytes']):>12}" for cell in row)


def _format_size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
