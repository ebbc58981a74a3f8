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
    "alive",
    "descendants",
    "environment",
    "events",
    "furthest",
    "hearing",
    "kill_all",
    "rows",
    "training",
    "wait_for",
]

ENV = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; an incomplete last line is ignored."""
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1] if (run_dir / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().split("\n")[:-1]]
    return [event for event in found if event["event"] == name]


def furthest(one: Path, other: Path) -> float:
    """Return the largest difference between any two parameters of two finished runs."""
    from safetensors.torch import load_file

    a, b = (load_file(run_dir / "model.safetensors") for run_dir in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def descendants(pid: int) -> list[int]:
    return [one for child in list_child_pids(pid) for one in (child, *descendants(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_all(pid: int) -> None:
    """Return a process and its descendants that are still alive."""
    for one in (*descendants(pid), pid):
        if alive(one):
            os.kill(one, signal.SIGKILL)


def hearing() -> None:
    """Restore default Ctrl-C handling: a test suite in the background of a script inherits it as ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for(state: Callable[[], object], within_s: float = 300.0) -> None:
    """Poll with at most a fifth of one core, since the awaited processes need the rest."""
    begun_s = looked_s = time.monotonic()
    while not state():
        now_s = time.monotonic()
        assert now_s < begun_s + within_s, "it did not come to that"
        time.sleep(max(0.02, 4 * (now_s - looked_s)))
        looked_s = time.monotonic()


def training(run_dir: Path, update: int = 5) -> Callable[[], bool]:
    """Whether this many updates have been finished."""
    return lambda: len(rows(run_dir)) >= update


def environment(**more: str) -> dict[str, str]:
    """Return this environment without the user's wandb account settings."""
    return {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | ENV | more
