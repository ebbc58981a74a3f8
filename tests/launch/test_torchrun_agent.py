"""The torchrun wrapper: what it reports of workers that failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import EXIT_FAILED
from launcher.run_dir.silent_exits import read_exit_codes

#: One line per start: what rank 0 does, and what rank 1 does.
WORKERS = """
case $TORCHELASTIC_RESTART_COUNT-$RANK in
0-0) exit 1 ;;                              0-1) exec sleep 60 ;;
1-0) sleep 1; exit 1 ;;                     1-1) trap 'kill -KILL $$' TERM; while :; do sleep 0.1; done ;;
2-0) exec sleep 60 ;;                       2-1) kill -TERM $$ ;;
3-0) exec sleep 60 ;;                       3-1) kill -KILL $$ ;;
esac
"""


@pytest.mark.process
def test_ranks_that_torchrun_ended_itself_are_left_out(tmp_path: Path) -> None:
    """A signal that torchrun did not send is reported, even of a rank that torchrun was about to end."""
    (tmp_path / "workers.sh").write_text(WORKERS)
    report = tmp_path / "exit-codes.jsonl"
    torchrun = ["--nproc-per-node=2", "--max-restarts=3", "--monitor-interval=0.1", "--no-python"]
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "launcher.launch.torchrun_agent",
            f"--failures={report}",
            *torchrun,
            "bash",
            "workers.sh",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == EXIT_FAILED, ended.stderr
    assert read_exit_codes(report) == [{0: 1}, {0: 1, 1: -9}, {1: -15}, {1: -9}]
