"""Messages to the user on stderr, with secrets masked."""

from __future__ import annotations

import sys
from contextlib import suppress

from launcher.system.redaction import mask_secrets

__all__ = ["print_over_progress_bar", "print_stderr"]


def print_stderr(text: str, *, multiline: bool = False) -> None:
    """Print a message on stderr: as one line, or with `multiline` (a traceback, a table) as it is."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # a closed terminal or pipe does not end the job
            print(mask_secrets(text if multiline else " ".join(text.split())), file=sys.stderr, flush=True)


def print_over_progress_bar(text: str) -> None:
    """Print one line to stderr, first clearing a progress bar that may be on the line."""
    with suppress(OSError, ValueError, AttributeError):
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
    print_stderr(text)
