"""Files that are whole or not there: private to the user, hashed while they are written, on the disk once done."""

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
    """A new private file, on the disk once its `with` block ends without an error; `facts` are then what it holds.

    The hash is taken of what is given to be written, not of what is read back, so that it vouches for the disk too.
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
            with suppress(OSError):  # what it could not flush was raised above, or does not matter any more
                self._file.close()


@contextmanager
def whole(path: Path) -> Iterator[HashedFile]:
    """A file that takes its name once it is written; until then, and after an error, the old one stands."""
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
    """The whole new text or the old one, never half of it."""
    with whole(path) as file:
        file.write(text.encode())


def private_folder(path: Path) -> None:
    """Create a folder and what is missing above it, for this user alone; one that is there stays as it is."""
    if path.is_dir():
        return
    private_folder(path.parent)
    with suppress(FileExistsError):  # another process was faster; a file in its place is found by who writes into it
        path.mkdir(0o700)
        sync(path.parent)


def sync(folder: Path) -> None:
    """Put a folder's names on the disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
