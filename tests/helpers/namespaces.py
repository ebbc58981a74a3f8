"""Commands in namespaces of their own: a network without loopback, a small /dev/shm, another host name."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["run_in_namespace"]


def run_in_namespace(
    option: str, setup: str, argv: list[str], cwd: Path, timeout_s: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run `setup`, a shell command, and then `argv` in a new namespace (`unshare`'s option, e.g. `-n` for the network).

    Skips the test where the system does not allow it.
    """
    unshare = ["unshare", *(["-r"] if os.getuid() else []), option, "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, setup], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"unshare {option} is not allowed here")
    return subprocess.run(
        [*unshare, f'{setup} && exec "$@"', "sh", *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
