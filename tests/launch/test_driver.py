"""The driver: how the exit of workers that recorded no failure is described."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.launch.driver import describe_killed

# --- failure messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"1": -9, "0": -15}, "rank 1 was killed by SIGKILL: out of memory?"),
        ({"0": -11}, "rank 0 was killed by SIGSEGV"),
        ({"3": 7}, "rank 3 exited with code 7"),
        (None, "torchrun ended without reporting an error"),
    ],
)
def test_silent_worker_is_described_by_exit_code(tmp_path: Path, codes: object, message: str) -> None:
    report = tmp_path / "failures.json"
    if codes is not None:
        report.write_text(json.dumps(codes))
    assert describe_killed(report) == message
