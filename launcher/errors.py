"""Exit statuses, and the errors for a wrong request and for training that cannot continue."""

from __future__ import annotations

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_RESTART",
    "EXIT_USAGE",
    "TrainingFailed",
    "UsageError",
    "format_named_error",
]

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RESTART = 75  # EX_TEMPFAIL: the worker has saved and requests a restart by its agent
EXIT_INTERRUPTED = 130


class UsageError(ValueError):
    """The request is wrong: configuration, plan, recipe or data. Exit status 2.

    The message is one line with the key, the value, what is wrong and what to type instead.
    """


class TrainingFailed(RuntimeError):
    """Training cannot continue, and a restart would fail again. Exit status 1."""


def format_named_error(name: str, message: str) -> str:
    """An error as `ValueError: no such label`; only its name if it has no message, as `raise KeyboardInterrupt`."""
    return f"{name}: {message}" if message.strip() else name
