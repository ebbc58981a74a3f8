"""What wandb's own environment variables say about a run, for the modules that decide before wandb is imported.

wandb reads the others itself: WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES, WANDB_JOB_TYPE and so on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from launcher.system.run_files import WANDB_DIR

__all__ = ["get_wandb_group", "get_wandb_name", "get_wandb_project", "get_wandb_run_id", "resolve_wandb_dir"]

DEFAULT_PROJECT = "launcher"


def get_wandb_run_id(env: Mapping[str, str] = os.environ) -> str | None:
    """The id that the run must have in W&B: `wandb agent` sets it, and sets it again if W&B requeues the run."""
    return env.get("WANDB_RUN_ID") or None


def get_wandb_project(env: Mapping[str, str] = os.environ) -> str:
    """The project where no key names one. Under `wandb agent` wandb ignores it: the sweep's project applies."""
    return env.get("WANDB_PROJECT") or DEFAULT_PROJECT


def get_wandb_name(env: Mapping[str, str] = os.environ) -> str | None:
    """The display name in W&B; None if it is that of the run directory."""
    return env.get("WANDB_NAME") or None


def get_wandb_group(env: Mapping[str, str] = os.environ) -> str | None:
    return env.get("WANDB_RUN_GROUP") or None


def resolve_wandb_dir(run_folder: Path, env: Mapping[str, str] = os.environ) -> Path:
    """The folder of wandb's files: in the run directory, unless WANDB_DIR, which `wandb agent` sets, names another."""
    parent = env.get("WANDB_DIR")
    return Path(parent or run_folder) / WANDB_DIR
