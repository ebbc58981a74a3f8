"""Which Slurm job claimed a run directory."""

from __future__ import annotations

import json
import re
from typing import Any

from launcher.run_dir.run_directory import RunDirectory
from launcher.system.atomic_files import atomic_write_text

__all__ = ["JOB_ID", "read_claim", "write_claim"]

JOB_ID = re.compile(r"\d+(_\d+)?")


def read_claim(run_dir: RunDirectory) -> dict[str, Any] | None:
    """`job`, and `newest`: the newest checkpoint before the job. None if the directory belongs to no job."""
    try:
        claim = json.loads(run_dir.slurm_json.read_text())
    except (OSError, ValueError):
        return None
    is_valid = isinstance(claim, dict) and JOB_ID.fullmatch(str(claim.get("job")))
    return claim if is_valid else None


def write_claim(run_dir: RunDirectory, job: str, newest: str | None) -> None:
    """Assign the directory to the job. A later start of the same job keeps the recorded `newest`."""
    claim = read_claim(run_dir)
    if claim is not None and claim["job"] == job:
        newest = claim.get("newest")
    atomic_write_text(run_dir.slurm_json, json.dumps({"job": job, "newest": newest}) + "\n")
