"""Atomic writes, hashed while they are written and fsynced before they are renamed into place.

Files and folders get the permissions that the user's umask leaves; PRIVATE_MODE is for files that may hold secrets.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = [
    "PRIVATE_MODE",
    "SHARED_MODE",
    "HashedFile",
    "atomic_write",
    "atomic_write_text",
    "fsync_dir",
    "make_durable_dir",
]

#: Modes of new files, before the umask: readable by whom the umask allows, and by the user alone.
SHARED_MODE = 0o666
PRIVATE_MODE = 0o600


class HashedFile:
    """A new file, fsynced when its `with` block ends without an error; then `size_and_hash` is final.

    The hash covers the data passed to `write`, not what is read back, so a later check also detects disk errors.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SHARED_MODE), "wb")
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    @property
    def size_and_hash(self) -> dict[str, Any]:
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
def atomic_write(path: Path) -> Iterator[HashedFile]:
    """Write to a temporary file, fsync it and rename it over `path`; after an error the old file remains."""
    tmp_file = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    tmp_file.unlink(missing_ok=True)
    try:
        with HashedFile(tmp_file) as file:
            yield file
        os.replace(tmp_file, path)
    except BaseException:
        tmp_file.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace the file's text atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def make_durable_dir(path: Path) -> None:
    """Create a folder and its missing parents, also after a crash; an existing folder is left unchanged."""
    if path.is_dir():
        return
    make_durable_dir(path.parent)
    with suppress(FileExistsError):  # another process created it; if it is a file, the next write reports it
        path.mkdir()
        fsync_dir(path.parent)


def fsync_dir(folder: Path) -> None:
    """Fsync a folder, so that renames and new entries in it are durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
