"""Errors of loader processes: sent to the rank instead of being lost, and explained where a limit is the cause."""

from __future__ import annotations

import multiprocessing.queues
from collections.abc import Iterable, Iterator
from typing import Any

from torch._utils import ExceptionWrapper

from launcher.distributed.machine_limits import describe_loader_limit
from launcher.errors import UsageError

__all__ = ["iter_explaining_errors", "raise_explained", "send_errors_of_unsent_batches"]


def send_errors_of_unsent_batches() -> None:
    """In a loader process: if a batch cannot be sent, send the error in its place.

    The thread that sends a batch copies it to shared memory and pickles it. Its errors are only printed otherwise, and
    the rank waits for the batch forever.
    """

    def send_error(queue: Any, error: Exception, entry: Any) -> None:
        index = entry[0] if isinstance(entry, tuple) and entry else None
        exc_info = (type(error), error, error.__traceback__)
        queue.put((index, ExceptionWrapper(exc_info, where="in a loader process that sends a batch")))  # type: ignore[arg-type]

    multiprocessing.queues.Queue._on_queue_feeder_error = send_error  # type: ignore[attr-defined]


def raise_explained(error: Exception) -> None:
    """Raise the error of a loader as one line, if a sample cannot be read or a limit of the machine is reached.

    Raises:
        UsageError: the loader has failed for such a reason.
    """
    if isinstance(error, UsageError):  # a loader process prepends its traceback; the last line is the message
        raise UsageError(str(error).strip().rpartition("UsageError: ")[2]) from error
    why = describe_loader_limit(str(error))
    if why is not None:
        raise UsageError(why) from error


def iter_explaining_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader; its errors are explained as by `raise_explained`."""
    iterator = iter(batches)
    end = object()
    while True:
        try:
            batch = next(iterator, end)
        except (UsageError, RuntimeError, OSError) as error:
            raise_explained(error)
            raise
        if batch is end:
            return
        yield batch
