"""Real processes for tests: started in a folder, waited for by state, and killed with the test."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.system.processes import list_child_pids

__all__ = [
    "ENV",
    "has_trained",
    "is_alive",
    "kill_all",
    "list_descendants",
    "make_env",
    "max_parameter_difference",
    "read_events",
    "read_rows",
    "restore_default_signals",
    "wait_for",
]

ENV = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; an incomplete last line is ignored."""
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1] if (run_dir / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines]


def read_events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().split("\n")[:-1]]
    return [event for event in found if event["event"] == name]


def max_parameter_difference(one: Path, other: Path) -> float:
    """Return the largest difference between any two parameters of two finished runs."""
    from safetensors.torch import load_file

    a, b = (load_file(run_dir / "model.safetensors") for run_dir in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def list_descendants(pid: int) -> list[int]:
    return [one for child in list_child_pids(pid) for one in (child, *list_descendants(child))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_all(pid: int) -> None:
    """Kill a process and its descendants."""
    for one in (*list_descendants(pid), pid):
        if is_alive(one):
            os.kill(one, signal.SIGKILL)


def restore_default_signals() -> None:
    """Restore default Ctrl-C handling: a test suite in the background of a script inherits it as ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


#: A killed job ends well before the 30 s after which torchrun kills workers that ignore SIGTERM.
ENDS_WITHIN_S = 20


def wait_for(state: Callable[[], object], within_s: float = 300.0) -> None:
    """Poll with at most a fifth of one core, since the awaited processes need the rest."""
    started_s = checked_s = time.monotonic()
    while not state():
        now_s = time.monotonic()
        assert now_s < started_s + within_s, "the awaited state was not reached in time"
        time.sleep(max(0.02, 4 * (now_s - checked_s)))
        checked_s = time.monotonic()


def has_trained(run_dir: Path, update: int = 5) -> Callable[[], bool]:
    """Whether this many updates have been finished."""
    return lambda: len(read_rows(run_dir)) >= update


def make_env(**more: str) -> dict[str, str]:
    """Return this environment without the user's wandb account settings."""
    return {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | ENV | more
