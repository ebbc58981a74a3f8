"""Errors of loader processes: sent to the rank instead of being lost, and explained where a limit is the cause."""

from __future__ import annotations

import multiprocessing.queues
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._utils import ExceptionWrapper

from launcher.distributed.machine_limits import describe_loader_limit
from launcher.errors import UsageError

__all__ = ["explained_loader_errors", "iter_explaining_errors", "send_errors_of_unsent_batches"]


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


@contextmanager
def explained_loader_errors() -> Iterator[None]:
    """Turn errors of a loader into one line each: a sample that cannot be read, or a limit of the machine.

    Raises:
        UsageError: the loader has failed for such a reason.
    """
    try:
        yield
    except UsageError as error:  # a loader process prepends its traceback; the last line is the message
        raise UsageError(str(error).strip().rpartition("UsageError: ")[2]) from error
    except (RuntimeError, OSError) as error:
        why = describe_loader_limit(str(error))
        if why is None:
            raise
        raise UsageError(why) from error


def iter_explaining_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader; its errors are explained as by `explained_loader_errors`."""
    iterator = iter(batches)
    end = object()
    while True:
        with explained_loader_errors():
            batch = next(iterator, end)
        if batch is end:
            return
        yield batch
