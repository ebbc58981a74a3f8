"""The exact command lines of torchrun and of the probe."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from launcher.config.schema import LaunchConfig, RunConfig
from launcher.distributed.commands import make_probe_command, make_torchrun_command


def test_torchrun_command_is_exact() -> None:
    config = RunConfig(launch=LaunchConfig(threads=2, env={"OWN": "1"}))
    made = make_torchrun_command(config, 3, Path("/private/handover.json"), Path("/private/failures.json"))
    assert made.argv == (
        *(sys.executable, "-m", "launcher.launch.torchrun_agent", "--failures=/private/failures.json"),
        *("--nnodes=1", "--nproc-per-node=3", "--max-restarts=1000000"),
        *("--local-addr=127.0.0.1", "--monitor-interval=0.1"),
        *("-m", "launcher", "worker", "/private/handover.json"),
    )
    assert made.env == {
        "OMP_NUM_THREADS": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OWN": "1",
    }


def test_probe_command_is_exact() -> None:
    made = make_probe_command(RunConfig(launch=LaunchConfig(threads=2, env={"OWN": "1"})), 3, Path("HANDOVER.json"))
    assert made.format_shell_line() == (
        "OMP_NUM_THREADS=2 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo OWN=1 "
        f"{shlex.quote(sys.executable)} -m launcher probe --nproc-per-node=3 HANDOVER.json"
    )


def test_shell_line_is_quoted() -> None:
    made = make_torchrun_command(RunConfig(launch=LaunchConfig(env={"A": "b c"})), 1, Path("a b"), Path("f"))
    assert "'A=b c'" in made.format_shell_line()
    assert made.format_shell_line().endswith("launcher worker 'a b'")
