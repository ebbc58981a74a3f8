"""Exit statuses, and the error for a wrong request."""

from __future__ import annotations

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_OK", "EXIT_RESTART", "EXIT_USAGE", "UsageError"]

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RESTART = 75  # EX_TEMPFAIL: the worker has saved and requests a restart by its agent
EXIT_INTERRUPTED = 130


class UsageError(ValueError):
    """The request is wrong: configuration, plan, recipe or data. Exit status 2.

    The message is one line with the key, the value, what is wrong and what to type instead.
    """
