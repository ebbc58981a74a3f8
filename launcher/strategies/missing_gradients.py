"""Which parameters have a gradient, and the errors where one is missing that the ranks would sum.

A step on gradients that were not summed trains each rank by itself, so it is refused before it is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from launcher.errors import TrainingFailed

__all__ = [
    "FIND_UNUSED",
    "GradientUse",
    "describe_parameters",
    "find_unreduced",
    "make_unreduced_error",
    "translate_reducer_error",
]

NAMES_SHOWN = 6
FIND_UNUSED = "strategy.find_unused_parameters=true"
#: Errors of DDP's reducer in a backward pass that uses a parameter more, or less, often than it expects.
REDUCER_ERRORS = ("Expected to mark a variable ready only once", "Your training graph has changed")


def describe_parameters(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def make_unreduced_error(names: Sequence[str], rank: int, fix: str = FIND_UNUSED) -> TrainingFailed:
    """The error for parameters that this rank's loss did not use where the gradients are summed over the ranks."""
    which = describe_parameters(names) or "some of the parameters"
    return TrainingFailed(
        f"the gradient of {which} was not summed over the ranks, because loss() on rank {rank} did not use all "
        f"parameters in this update as it did before or as other ranks do. No step was taken: type {fix}, or freeze in "
        "model() what is never trained"
    )


def find_unreduced(ddp: DistributedDataParallel, names: Sequence[str]) -> list[str]:
    """The parameters, of those that DDP reduces (`names`, in their order), that it still waits for after a backward.

    torch tells them only in the error with which it refuses another forward pass.
    """
    try:
        ddp.reducer._rebuild_buckets()
    except RuntimeError as problem:
        found = re.search(r"indices which did not receive grad for rank \d+: ([\d ]+)", str(problem))
        return [names[int(index)] for index in found[1].split()] if found else []
    return []


def translate_reducer_error(error: RuntimeError, *, static_graph: bool) -> TrainingFailed | None:
    """The final error, with its fix, for an error that DDP raises in a backward pass; None for any other."""
    if not any(sign in str(error) for sign in REDUCER_ERRORS):
        return None
    if static_graph:
        return TrainingFailed(
            "strategy.static_graph=true: the graph of the loss differs from that of the first update. No step was "
            "taken: type strategy.static_graph=false"
        )
    return TrainingFailed(
        "DDP cannot count the uses of a parameter that several backward passes of one loss use, as with reentrant "
        "checkpoints. No step was taken: type strategy.static_graph=true, or checkpoint with use_reentrant=False"
    )


class GradientUse:
    """Follows which parameters get a gradient in each update, for strategies that do not report that themselves.

    The ranks agree once, in the first update, on the parameters that none of them uses. From then on each rank only
    compares its own updates with that; with `may_vary` they agree in every update.
    """

    def __init__(self, names: Iterable[str], device: torch.device, *, may_vary: bool = False, fix: str = FIND_UNUSED):
        self._names = tuple(names)
        self._device = device
        self._may_vary = may_vary
        self._fix = fix
        self._seen: set[str] = set()
        self._counts = True  # whether the current micro-batch does
        self._unused: frozenset[str] | None = None

    def register(self, name: str, parameter: torch.Tensor) -> None:
        """Follow a parameter: the tensor whose gradient backward computes."""
        parameter.register_hook(partial(self._on_gradient, name))

    def _on_gradient(self, name: str, gradient: Any) -> None:
        if gradient is not None and self._counts:
            self._seen.add(name)

    def begin_micro_batch(self, *, counts: bool) -> None:
        """`counts`: it is not padding, which uses no parameter."""
        self._counts = counts

    def ignore_micro_batch(self) -> None:
        """Leave out the current micro-batch: its loss counts nothing, and all parameters get zeros from it."""
        self._counts = False

    def end_update(self) -> frozenset[str]:
        """Return the parameters that no rank used in this update. Collective in the first update, or with `may_vary`.

        Raises:
            TrainingFailed: this rank used others than before or, in the first update, than other ranks.
        """
        seen, self._seen = self._seen, set()
        if self._unused is None or self._may_vary:
            return self._compare_ranks(seen)
        missing = frozenset(self._names) - seen
        if seen and missing != self._unused:
            changed = missing ^ self._unused
            raise make_unreduced_error([n for n in self._names if n in changed], dist.get_rank(), self._fix)
        return self._unused

    def _compare_ranks(self, seen: set[str]) -> frozenset[str]:
        """The parameters that no rank used; none if nothing counted. Ranks on which nothing counted have no say."""
        used = torch.tensor([*(name in seen for name in self._names), bool(seen)], device=self._device).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(used)
        *counts, ranks = used.tolist()
        partly = [name for name, count in zip(self._names, counts, strict=True) if 0 < count < ranks]
        if partly and not self._may_vary:
            raise make_unreduced_error(partly, dist.get_rank(), self._fix)
        if not ranks:
            return frozenset()
        self._unused = frozenset(name for name, count in zip(self._names, counts, strict=True) if not count)
        return self._unused
