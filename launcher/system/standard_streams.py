"""Standard input, output and error of a process that was started without them, as by cron or a daemon."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

__all__ = ["ensure_standard_streams"]


def ensure_standard_streams() -> None:
    """Open /dev/null for each standard stream that is closed, and let stdout escape what its encoding lacks.

    Otherwise the next file that is opened gets the number of the closed stream, and is overwritten by what is printed
    there. Call it before anything else is opened.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (lives as long as the process)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        with suppress(OSError, ValueError):  # e.g. closed by the program that called launcher.run
            sys.stdout.reconfigure(errors="backslashreplace")
