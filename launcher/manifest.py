"""A checkpoint as a folder: its manifest, its hashes, how it comes to be, and which one to trust.

Written into a fresh folder beside the others, each file hashed while it is written and synced, the manifest last, then
renamed: a checkpoint is whole or not there. Nothing is read that the manifest's hashes do not vouch for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import RequestError

__all__ = [
    "CheckpointDamaged",
    "Found",
    "Manifest",
    "newest",
    "open_at",
    "prune",
    "publish",
    "verified",
    "write_atomically",
]

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20


class CheckpointDamaged(ValueError):
    """A checkpoint that must not be used, and why."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    `files` maps a file to its size and sha256; `tensors` a tensor to dtype, shape, aliases and its pieces: file, key,
    and the flat range of elements that the key holds, so that any number of writers and readers use one format.
    """

    files: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, Any]]
    position: Mapping[str, int]
    plan: Mapping[str, Any]
    world: int
    versions: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        body = {"format": FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        return json.dumps(body | {"sha256": digest_of(body)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """
        Raises:
            CheckpointDamaged: it is no manifest, was altered, or is of another format.
        """
        try:
            body = json.loads(text)
            claimed = body.pop("sha256")
            if claimed != digest_of(body):
                raise CheckpointDamaged("its manifest was altered: the hash of itself does not hold")
            if body.pop("format") != FORMAT:
                raise CheckpointDamaged("it was written by another version's format")
            return cls(**body)
        except CheckpointDamaged:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise CheckpointDamaged(f"its manifest cannot be read: {type(problem).__name__}") from problem


def digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Found:
    """A checkpoint that holds, and the newer ones that were passed over with the reason."""

    path: Path
    manifest: Manifest
    passed_over: tuple[tuple[str, str], ...] = ()


class HashedFile:
    """A new private file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def close(self) -> dict[str, Any]:
        """Make it durable; its size and sha256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self._size, "sha256": self._hash.hexdigest()}


@contextmanager
def publish(folder: Path, name: str, fault: Callable[[str], None]) -> Iterator[Path]:
    """A fresh folder to write into; on leaving it takes its name, unless an error came up, then it is gone.

    `fault` is called before the rename, where tests do their worst.
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    sweep(folder)
    fresh = folder / f"tmp-{name}-{os.getpid()}"
    os.mkdir(fresh, 0o700)
    try:
        yield fresh
        sync(fresh)
        fault("checkpoint-rename")
        if (folder / name).exists():  # the same update, saved again after a restart from an older checkpoint
            os.rename(folder / name, folder / f"tmp-old-{name}-{os.getpid()}")
        os.rename(fresh, folder / name)
        sync(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove what a writer left behind; the run's lock sees to it that there is one writer."""
    for entry in folder.glob("tmp-*"):
        shutil.rmtree(entry, ignore_errors=True)


def sync(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomically(path: Path, data: bytes) -> None:
    """A whole private file or the old one, never half of it."""
    fresh = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    file = HashedFile(fresh)
    file.write(data)
    file.close()
    os.replace(fresh, path)
    sync(path.parent)


def prune(folder: Path, keep: int, protect: frozenset[str]) -> None:
    """Keep the newest `keep` and the protected ones."""
    for old in by_age(folder)[keep:]:
        if old.name not in protect:
            shutil.rmtree(old, ignore_errors=True)


def by_age(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first; their names count updates and so sort by age."""
    named = (p for p in folder.iterdir() if not p.name.startswith(("tmp", ".")) and p.is_dir() and not p.is_symlink())
    return sorted(named, key=lambda path: path.name, reverse=True)


def newest(folder: Path) -> Found | None:
    """The newest checkpoint whose manifest and hashes hold; None where there are none at all.

    Raises:
        RequestError: there are checkpoints and all are damaged: training from scratch would hide the loss.
    """
    if not folder.is_dir():
        return None
    passed: list[tuple[str, str]] = []
    for path in by_age(folder):
        try:
            return Found(path, verified(path), tuple(passed))
        except CheckpointDamaged as damage:
            passed.append((path.name, str(damage)))
    if passed:
        name, why = passed[0]
        raise RequestError(
            f"checkpoints in {folder} are all damaged ({name}: {why}): "
            f"mend them, or type resume=never to start a new run beside this one"
        )
    return None


def open_at(path: Path) -> Found:
    """The checkpoint that the user names.

    Raises:
        RequestError: it is none, or damaged.
    """
    if not (path / MANIFEST).exists():
        raise RequestError(f"resume={path} is no checkpoint: name a folder that holds {MANIFEST}")
    try:
        return Found(path, verified(path))
    except CheckpointDamaged as damage:
        raise RequestError(f"resume={path} is damaged: {damage}; name another checkpoint") from damage


def verified(path: Path) -> Manifest:
    """The manifest, once everything it vouches for was found as it says.

    Raises:
        CheckpointDamaged: names the file and what is wrong with it.
    """
    for entry in os.scandir(path):
        if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            raise CheckpointDamaged(f"{entry.name} is no regular file")
    try:
        manifest = Manifest.from_json((path / MANIFEST).read_text())
    except (OSError, UnicodeDecodeError) as problem:
        raise CheckpointDamaged(f"its {MANIFEST} cannot be read: {type(problem).__name__}") from problem
    for name, facts in manifest.files.items():
        if "/" in name or name.startswith("."):
            raise CheckpointDamaged(f"its manifest names {name}, outside the folder")
        check_file(path / name, facts)
    return manifest


def check_file(path: Path, facts: Mapping[str, Any]) -> None:
    digest = hashlib.sha256()
    try:
        if path.stat().st_size != facts["size"]:
            raise CheckpointDamaged(f"{path.name} has {path.stat().st_size} bytes instead of {facts['size']}")
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as problem:
        raise CheckpointDamaged(f"{path.name} cannot be read: {problem.strerror}") from problem
    if digest.hexdigest() != facts["sha256"]:
        raise CheckpointDamaged(f"{path.name} is not what was written: its sha256 differs")
