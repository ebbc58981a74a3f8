"""The torchrun and probe commands that start the processes of a job on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.distributed.worker_env import make_isolation_env

__all__ = ["AGENT_MODULE", "NPROC_FLAG", "UNLIMITED_RESTARTS", "Command", "make_probe_command", "make_torchrun_command"]


NPROC_FLAG = "--nproc-per-node="
AGENT_MODULE = "launcher.launch.torchrun_agent"


UNLIMITED_RESTARTS = 1_000_000  # the driver limits restarts itself: torchrun's count ignores checkpoints


@dataclass(frozen=True)
class Command:
    """A command to start: its argument list and its additions to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]

    def format_shell_line(self) -> str:
        """The command as a shell line."""
        return shlex.join([*(f"{name}={value}" for name, value in self.env.items()), *self.argv])


def make_torchrun_command(config: RunConfig, workers: int, handover: Path, report: Path) -> Command:
    """torchrun command for this machine, on the loopback; the `workers` processes read their job from `handover`."""
    argv = (
        sys.executable,
        "-m",
        AGENT_MODULE,
        f"--failures={report}",
        "--nnodes=1",
        f"{NPROC_FLAG}{workers}",
        f"--max-restarts={UNLIMITED_RESTARTS}",
        "--local-addr=127.0.0.1",
        "--monitor-interval=0.1",
        "-m",
        "launcher",
        "worker",
        str(handover),
    )
    return Command(argv, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **make_isolation_env(config, workers)})


def make_probe_command(config: RunConfig, workers: int, handover: Path) -> Command:
    """Command for a process that forks `workers` measuring processes, also on the loopback."""
    argv = (sys.executable, "-m", "launcher", "probe", f"{NPROC_FLAG}{workers}", str(handover))
    return Command(argv, make_isolation_env(config, workers))
