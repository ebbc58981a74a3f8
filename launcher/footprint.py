"""What a model's state takes on each worker under each strategy: parameters, gradients, optimizer state, and the
buffers that a strategy keeps as long as training lasts.

Activations and FSDP's gathered blocks come and go on top; they depend on batch and model, and are not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LAYOUTS", "Footprint", "Weights", "footprint", "memory_document", "memory_lines"]


@dataclass(frozen=True)
class Layout:
    """What is divided among the workers, whether a second copy of the parameters is stepped on, and how many buffers
    as long as all parameters there are."""

    parameters: bool = False
    gradients: bool = False
    optimizer: bool = False
    copy: bool = False
    buffers: int = 0


#: As measured with DeepSpeed 0.19: stage 1 divides the gradients too, from then on there is a bucket for them, and
#: stage 3 keeps gathered parameters.
LAYOUTS: Mapping[str, Layout] = {
    "ddp": Layout(),
    "fsdp": Layout(parameters=True, gradients=True, optimizer=True),
    "zero0": Layout(),
    "zero1": Layout(gradients=True, optimizer=True, copy=True, buffers=1),
    "zero2": Layout(gradients=True, optimizer=True, copy=True, buffers=1),
    "zero3": Layout(parameters=True, gradients=True, optimizer=True, copy=True, buffers=2),
}
#: Elements that a bucket of DeepSpeed's has at most, by default.
LONGEST = 500_000_000


@dataclass(frozen=True)
class Weights:
    """A model as the optimizer sees it: elements that are trained, elements that are frozen, bytes of an element, and
    elements of optimizer state for each that is trained."""

    trainable: int
    frozen: int
    element_bytes: int
    slots: int


@dataclass(frozen=True)
class Footprint:
    """Bytes on one worker."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def footprint(weights: Weights, layout: str, world: int) -> Footprint:
    """ZeRO's formulas (Rajbhandari 2020, arXiv 1910.02054, section 5) for parameters that are as wide as the gradients.

    DeepSpeed's stages 1 to 3 step on a copy of each worker's part of the parameters, whatever their precision.
    """
    lies = LAYOUTS[layout]

    def held(elements: int, divided: bool) -> int:
        return weights.element_bytes * (math.ceil(elements / world) if divided else elements)

    own = held(weights.trainable + weights.frozen, lies.parameters)
    return Footprint(
        parameters=own + (held(weights.trainable, True) if lies.copy else 0),
        gradients=held(weights.trainable, lies.gradients),
        optimizer=held(weights.trainable * weights.slots, lies.optimizer),
        buffers=lies.buffers * held(min(weights.trainable, LONGEST), False) if world > 1 else 0,
    )


def memory_document(weights: Weights, worlds: Sequence[int]) -> dict[str, Any]:
    """Bytes per worker, for each strategy and world size."""
    return {
        "trainable": weights.trainable,
        "frozen": weights.frozen,
        "optimizer_slots": weights.slots,
        "strategies": {
            layout: [{"world": world, **_bytes(footprint(weights, layout, world))} for world in worlds]
            for layout in LAYOUTS
        },
    }


def _bytes(found: Footprint) -> dict[str, int]:
    return {
        "parameters_bytes": found.parameters,
        "gradients_bytes": found.gradients,
        "optimizer_bytes": found.optimizer,
        "buffers_bytes": found.buffers,
        "total_bytes": found.total,
    }


def memory_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The totals for a person, at most 80 columns."""
    strategies = document["strategies"]
    yield f"Memory per worker for {document['trainable'] + document['frozen']:,} parameters, their gradients and"
    yield "the optimizer's state; activations come on top"
    yield f"{'world':>7}" + "".join(f"{layout:>12}" for layout in strategies)
    for row in zip(*strategies.values(), strict=True):
        yield f"{row[0]['world']:>7}" + "".join(f"{_human(one['total_bytes']):>12}" for one in row)


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
