"""Names in a run directory, for the packages that write, read or search for them: its files, and the run itself.

`launcher.run_dir.run_directory.RunDirectory` has the paths of one run.
"""

from __future__ import annotations

import re

__all__ = [
    "BEST_MODEL_FILE",
    "CHECKPOINTS_DIR",
    "DONE_FILE",
    "EVENTS_FILE",
    "LOGS_DIR",
    "METRICS_FILE",
    "MODEL_FILE",
    "PLAN_FILE",
    "PROFILE_FILE",
    "RUN_NAME_PATTERN",
    "RUN_YAML_FILE",
    "SLURM_FILE",
    "STOP_FILE",
    "TENSORBOARD_DIR",
    "WANDB_DIR",
]

RUN_YAML_FILE = "run.yaml"
PLAN_FILE = "plan.json"
PROFILE_FILE = "profile.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
DONE_FILE = "done.json"
STOP_FILE = "stop"
SLURM_FILE = "slurm.json"
MODEL_FILE = "model.safetensors"
BEST_MODEL_FILE = "best.safetensors"
CHECKPOINTS_DIR = "checkpoints"
LOGS_DIR = "logs"
WANDB_DIR = "wandb"
TENSORBOARD_DIR = "tensorboard"

#: The rule for run names: up to 64 letters, digits, '.', '_' and '-', the first a letter or digit.
RUN_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
