"""Atomic writes of private files, hashed while they are written and fsynced before they are renamed into place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["HashedFile", "private_folder", "sync", "whole", "write_whole"]


class HashedFile:
    """A new file (mode 0600), fsynced when its `with` block ends without an error; then `size_and_hash` is final.

    The hash covers the data passed to `write`, not what is read back, so a later check also detects disk errors.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    @property
    def facts(self) -> dict[str, Any]:
        return {"size": self._size, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            with suppress(OSError):  # a flush error was already raised above, or another error is in flight
                self._file.close()


@contextmanager
def whole(path: Path) -> Iterator[HashedFile]:
    """Write to a temporary file, fsync it and rename it over `path`; after an error the old file remains."""
    fresh = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        with HashedFile(fresh) as file:
            yield file
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Replace the file's text atomically."""
    with whole(path) as file:
        file.write(text.encode())


def private_folder(path: Path) -> None:
    """Create a folder and its missing parents with mode 0700; an existing folder is left unchanged."""
    if path.is_dir():
        return
    private_folder(path.parent)
    with suppress(FileExistsError):  # another process created it; if it is a file, the next write reports it
        path.mkdir(0o700)
        sync(path.parent)


def sync(folder: Path) -> None:
    """Fsync a folder, so that renames and new entries in it are durable."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
