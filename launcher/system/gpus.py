"""Count the GPUs visible to a job on this machine without importing torch, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["count_gpus"]

NVIDIA_GPUS_DIR = Path("/proc/driver/nvidia/gpus")


def count_gpus(env: Mapping[str, str] = os.environ, driver: Path = NVIDIA_GPUS_DIR) -> int:
    """Count the GPUs that NVIDIA's driver lists and CUDA_VISIBLE_DEVICES makes visible.

    The variable is read as CUDA does: a list of indices or UUIDs that ends at the first invalid one; an empty value
    hides all GPUs.
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
