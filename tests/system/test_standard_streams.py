"""A process that was started without standard streams; what stdout's encoding lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.system.stderr import print_over_progress_bar, print_stderr

OPEN_AND_PRINT = """
from launcher.system.standard_streams import ensure_standard_streams
ensure_standard_streams()
import os, sys
file = open(sys.argv[1], "w")
assert file.fileno() > 2, "it must not become a standard stream"
print("stdout"); print("stderr", file=sys.stderr); sys.stdout.flush(); sys.stderr.flush()
assert sys.stdin.read() == ""
os.system("echo child; echo child >&2")
file.write("content")
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_opened(tmp_path: Path, closed: str) -> None:
    """Otherwise the next file that is opened takes the number of the closed stream and gets what is printed."""
    command = ["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-c", OPEN_AND_PRINT, str(tmp_path / "file")]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_stdout_lacks_are_escaped(encoding: str) -> None:
    script = "from launcher.system.standard_streams import *\nensure_standard_streams()\nprint('\\u2192 done')"
    command = ["env", f"PYTHONIOENCODING={encoding}", sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "\\u2192 done\n"


class BrokenStream:
    """A stream whose terminal or reader has gone."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [None, BrokenStream()], ids=["none", "broken"])
def test_message_without_stderr_is_dropped(monkeypatch: pytest.MonkeyPatch, stream: object) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    print_stderr("note: nobody reads this")
    print_over_progress_bar("note: nor this")
