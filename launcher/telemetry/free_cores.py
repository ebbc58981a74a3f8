"""Whether a machine has room for more workers: on a CPU only where it has more cores than workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["has_free_cores"]


def has_free_cores(facts: Mapping[str, Any]) -> bool:
    """Return whether more workers on the same machines could be faster, by the facts of the start event.

    `facts` has `device`, `world`, `nodes` and `cores` (of the machine of rank 0). On a GPU the number of cores does not
    matter. Without `cores`, as in runs of earlier versions, nothing is known, and nothing is promised.
    """
    if not str(facts.get("device", "cpu")).startswith("cpu"):
        return True
    local_world = facts.get("world", 1) / facts.get("nodes", 1)
    return bool(facts.get("cores", 0) > local_world)
