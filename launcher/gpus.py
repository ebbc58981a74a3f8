"""How many GPUs a job on this machine would see, without the seconds that importing torch takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["count_gpus"]

DRIVER = Path("/proc/driver/nvidia/gpus")


def count_gpus(env: Mapping[str, str] = os.environ, driver: Path = DRIVER) -> int:
    """GPUs that NVIDIA's driver lists, as far as CUDA_VISIBLE_DEVICES shows them.

    As CUDA reads it: a list of indices or UUIDs, up to the first one that is not there; empty shows none.
    """
    present = len(list(driver.iterdir())) if driver.is_dir() else 0
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    count = 0
    for entry in (entry.strip() for entry in visible.split(",")):
        if (entry.isdigit() and int(entry) >= present) or not entry or entry.startswith("-"):
            break
        count += 1
    return min(count, present)
