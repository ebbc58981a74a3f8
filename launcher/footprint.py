"""What a model's state takes on each worker under each strategy: parameters, gradients, optimizer state.

Activations, gathered blocks and communication buffers come on top; they depend on the batch and are measured, not
predicted here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LAYOUTS", "Footprint", "Weights", "footprint", "memory_document", "memory_lines"]

#: What is divided among the workers, and whether there is a second copy of the parameters to step on.
LAYOUTS: Mapping[str, tuple[bool, bool, bool, bool]] = {
    # strategy: parameters, gradients, optimizer state, copy
    "ddp": (False, False, False, False),
    "fsdp": (True, True, True, False),
    "zero0": (False, False, False, False),
    "zero1": (False, False, True, True),
    "zero2": (False, True, True, True),
    "zero3": (True, True, True, True),
}


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

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def footprint(weights: Weights, layout: str, world: int) -> Footprint:
    """ZeRO's formulas (Rajbhandari 2020, arXiv 1910.02054, section 5) for parameters that are as wide as the gradients.

    DeepSpeed's stages 1 to 3 step on a copy of each worker's part of the parameters, whatever their precision.
    """
    parameters, gradients, optimizer, copy = LAYOUTS[layout]

    def held(elements: int, divided: bool) -> int:
        return weights.element_bytes * (math.ceil(elements / world) if divided else elements)

    own = held(weights.trainable + weights.frozen, parameters)
    return Footprint(
        parameters=own + (held(weights.trainable, True) if copy else 0),
        gradients=held(weights.trainable, gradients),
        optimizer=held(weights.trainable * weights.slots, optimizer),
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
        "total_bytes": found.total,
    }


def memory_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The totals for a person, at most 80 columns."""
    strategies = document["strategies"]
    yield f"Memory per worker for {document['trainable'] + document['frozen']:,} parameters, their gradients and"
    yield "the optimizer's state; activations and buffers come on top"
    yield f"{'world':>7}" + "".join(f"{layout:>12}" for layout in strategies)
    for row in zip(*strategies.values(), strict=True):
        yield f"{row[0]['world']:>7}" + "".join(f"{_human(one['total_bytes']):>12}" for one in row)


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
