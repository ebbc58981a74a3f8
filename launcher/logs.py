"""One log file per rank and generation. The screen is rank 0's; what the others print goes into their files."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

__all__ = ["redirect"]


def redirect(log: Path, rank: int, *, debug: bool) -> TextIO:
    """Open this rank's log, and send warnings there; on ranks above 0 all output. Returns the screen's stderr.

    With `debug` rank 0's warnings stay on the screen as well.
    """
    screen = os.fdopen(os.dup(sys.stderr.fileno()), "w")
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    handler = logging.StreamHandler(os.fdopen(os.dup(number), "w"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    if debug and rank == 0:
        root.addHandler(logging.StreamHandler(screen))
    logging.captureWarnings(True)
    if rank != 0:
        sys.stdout.flush()
        os.dup2(number, 1)
        os.dup2(number, 2)
    os.close(number)
    return screen
