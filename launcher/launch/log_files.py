"""Log files, one per rank and generation. Only rank 0 prints to the terminal; other ranks print to their files."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from launcher.system.atomic_files import PRIVATE_MODE

__all__ = ["redirect_output"]


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes log records; one that cannot be written, e.g. because the disk is full, is dropped without a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def redirect_output(log: Path, rank: int, *, debug: bool) -> TextIO:
    """Send log records, warnings and the stack of a crash to this rank's log, on ranks above 0 also stdout and stderr.

    Returns the terminal's stderr. With `debug`, rank 0 also prints log records to the terminal.
    """
    terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w", errors="backslashreplace")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    fd = os.open(log, flags, PRIVATE_MODE)  # it has what the recipe prints, with secrets unmasked
    stream = os.fdopen(os.dup(fd), "w", errors="backslashreplace")
    faulthandler.enable(stream, all_threads=False)
    handler = LogHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    if debug and rank == 0:
        root.addHandler(logging.StreamHandler(terminal))
    logging.captureWarnings(True)
    if rank != 0:
        sys.stdout.flush()
        os.dup2(fd, 1)
        os.dup2(fd, 2)
    os.close(fd)
    return terminal
