"""The log file of a rank is private: it has whatever the recipe prints."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

#: argv: the log file. Redirects the output of rank 1 and prints.
PROGRAM = """
import os, sys
from pathlib import Path
from launcher.launch.log_files import redirect_output

os.umask(0o022)
redirect_output(Path(sys.argv[1]), 1, debug=False)
print("token", flush=True)
"""


def test_log_is_private_whatever_the_umask(tmp_path: Path) -> None:
    log = tmp_path / "rank1-g1.log"
    subprocess.run([sys.executable, "-c", PROGRAM, str(log)], check=True)
    assert log.read_text() == "token\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    log, outside = tmp_path / "rank1-g1.log", tmp_path / "outside"
    log.symlink_to(outside)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(log)], capture_output=True, check=False)
    assert done.returncode != 0
    assert not outside.exists()
