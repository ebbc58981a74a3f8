"""The errors for parameters that have no gradient where a strategy reduces one from every rank.

A step on such gradients would train each rank by itself, so it is refused before it is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch.nn.parallel import DistributedDataParallel

from launcher.errors import TrainingFailed

__all__ = ["describe_parameters", "find_unreduced", "make_unreduced_error", "translate_reducer_error"]

NAMES_SHOWN = 6
#: Errors of DDP's reducer in a backward pass that a graph without a fixed number of uses causes.
REDUCER_ERRORS = ("Expected to mark a variable ready only once", "Your training graph has changed")


def describe_parameters(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


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


def make_unreduced_error(names: Sequence[str], rank: int, *, static_graph: bool) -> TrainingFailed:
    """The error for parameters that had no gradient in the backward pass that reduces."""
    which = describe_parameters(names) or "some parameters"
    fix = (
        "strategy.static_graph=true needs the same parameters in every update: type strategy.static_graph=false "
        "strategy.find_unused_parameters=true"
        if static_graph
        else "type strategy.find_unused_parameters=true if loss() leaves parameters out"
    )
    return TrainingFailed(
        f"no gradient of {which} was summed over the ranks, since loss() on rank {rank} did not use it in the last "
        f"micro-batch of an update; no step was taken: {fix}, or freeze in model() what is never trained"
    )


def translate_reducer_error(error: RuntimeError, *, static_graph: bool) -> TrainingFailed | None:
    """The final error, with its fix, for an error that DDP raises in a backward pass; None for any other."""
    if not any(sign in str(error) for sign in REDUCER_ERRORS):
        return None
    if static_graph:
        return TrainingFailed(
            "strategy.static_graph=true: the graph of the loss differs from that of the first update; no step was "
            "taken: type strategy.static_graph=false"
        )
    return TrainingFailed(
        "DDP cannot count the uses of a parameter that several backward passes of one loss use, as with reentrant "
        "checkpoints; no step was taken: type strategy.static_graph=true, or checkpoint with use_reentrant=False"
    )
