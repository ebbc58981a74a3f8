"""Checkpoint folders: manifest and hashes, atomic writing, pruning, and selecting a valid checkpoint.

A checkpoint is written to a temporary folder next to the others. Each file is hashed while it is written and then
fsynced, the manifest last; then the folder is renamed. So a checkpoint is either complete or absent. Only data that
matches the hashes in the manifest is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.system.atomic_files import fsync_dir, make_durable_dir
from launcher.system.run_files import CHECKPOINTS_DIR

__all__ = [
    "CorruptCheckpointError",
    "Manifest",
    "VerifiedCheckpoint",
    "atomic_directory",
    "latest_id",
    "latest_path",
    "latest_valid",
    "newest_first",
    "open_checkpoint",
    "prune",
    "read_manifest",
    "resolve_checkpoint_path",
    "tmp_checkpoint_path",
    "verify_checkpoint",
]

MANIFEST_FORMAT = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20
#: Names without path separators that do not start with `tmp`, the prefix of unfinished checkpoints.
CHECKPOINT_NAME_PATTERN = re.compile(r"(?!tmp)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class CorruptCheckpointError(ValueError):
    """A checkpoint must not be used; the message gives the reason."""


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint.

    `files` maps each file to its size in bytes and its sha256. `tensors` maps each tensor to dtype, shape, aliases and
    pieces: file, key, and the flat element range [start, stop) stored under that key, so that any number of writers and
    readers can share one format. `sequence` numbers the checkpoints of a folder in the order of writing.
    """

    files: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, Any]]
    position: Mapping[str, int]
    plan: Mapping[str, Any]
    world: int
    versions: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    sequence: int = 0

    def to_json(self) -> str:
        """Serialise, including a hash of the content. Raises TypeError if a value is not JSON-serialisable."""
        body = {"format": MANIFEST_FORMAT, **{item.name: getattr(self, item.name) for item in fields(self)}}
        body = json.loads(json.dumps(body))  # as reading yields it: numeric keys become strings, tuples become lists
        return format_lines(body | {"sha256": compute_manifest_digest(body)})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            CorruptCheckpointError: the text is not a manifest, was altered, or has another format version.
        """
        try:
            body = json.loads(text)
            if body.pop("sha256") != compute_manifest_digest(body):
                raise CorruptCheckpointError("its manifest was altered: its sha256 does not match")
            if body.pop("format") != MANIFEST_FORMAT:
                raise CorruptCheckpointError("its manifest has the format of another version of the launcher")
            manifest = cls(**body)
            check_files(manifest)
            check_pieces(manifest)
        except CorruptCheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise CorruptCheckpointError(f"its manifest cannot be read: {type(problem).__name__}") from problem
        return manifest


def format_lines(body: Mapping[str, Any]) -> str:
    """JSON with one line per file and per tensor: `json` indents in Python, which is slow for many ranks' pieces."""
    entries = []
    for name, value in body.items():
        if name in ("files", "tensors") and value:
            lines = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(facts)}" for key, facts in value.items())
            entries.append(f"{json.dumps(name)}: {{\n  {lines}\n }}")
        else:
            entries.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(entries) + "\n}"


def compute_manifest_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def check_files(manifest: Manifest) -> None:
    for name, facts in manifest.files.items():
        if not CHECKPOINT_NAME_PATTERN.fullmatch(name) or name == MANIFEST:
            raise CorruptCheckpointError(f"its manifest lists {name!r}, which is not a valid file name in a checkpoint")
        if not isinstance(facts["size"], int) or not isinstance(facts["sha256"], str):
            raise CorruptCheckpointError(f"its manifest lacks a valid size or sha256 for {name}")


def check_pieces(manifest: Manifest) -> None:
    """Check that the pieces of every tensor are in listed files and cover the whole tensor, in order."""
    for name, facts in manifest.tensors.items():
        end = 0
        for file, _, start, stop in facts["pieces"]:
            if file not in manifest.files or start != end or stop < start:
                raise CorruptCheckpointError(f"its manifest has an invalid piece of {name}")
            end = stop
        if not facts["pieces"] or end != math.prod(facts["shape"]):
            raise CorruptCheckpointError(f"its manifest covers only a part of {name}")


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A verified checkpoint, and the newer checkpoints that were skipped, each with the reason."""

    path: Path
    manifest: Manifest
    skipped: tuple[tuple[str, str], ...] = ()


# --- writing ------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_directory(
    folder: Path, name: str, inject_fault: Callable[[str], None], token: str | None = None
) -> Iterator[Path]:
    """Yield a temporary folder to write into; on exit rename it to `name`, on an error delete it.

    `inject_fault` is called before the rename, for tests. The run's lock ensures that only one job writes at a time.
    With a `token`, other ranks write into the same folder, and it may already exist.
    """
    if not CHECKPOINT_NAME_PATTERN.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid checkpoint name")
    make_durable_dir(folder)
    tmp_dir = tmp_checkpoint_path(folder, name, token or str(os.getpid()))
    remove_stale_tmp(folder, keep=tmp_dir if token else None)
    os.makedirs(tmp_dir, exist_ok=token is not None)
    try:
        yield tmp_dir
        fsync_dir(tmp_dir)
        inject_fault("checkpoint-rename")
        rename_into_place(tmp_dir, folder / name)
    except BaseException:
        shutil.rmtree(tmp_dir, ignore_errors=True)
        raise


def rename_into_place(tmp_dir: Path, target: Path) -> None:
    """Rename the folder. An existing checkpoint of this name is deleted only after the new one is next to it."""
    if not os.path.lexists(target):
        os.rename(tmp_dir, target)
        fsync_dir(target.parent)
        return
    replacement = target.with_name(f"{target.name}.new")
    remove_atomically(replacement)
    os.rename(tmp_dir, replacement)
    fsync_dir(target.parent)
    remove_atomically(target)
    os.rename(replacement, target)
    fsync_dir(target.parent)


def tmp_checkpoint_path(folder: Path, name: str, token: str) -> Path:
    """The path of a checkpoint while it is being written."""
    return folder / f"tmp-{name}-{token}"


def remove_stale_tmp(folder: Path, keep: Path | None = None) -> None:
    """Remove unfinished checkpoints of writers that died."""
    for entry in folder.glob("tmp-*"):
        if entry != keep:
            remove_tree(entry)


def remove_atomically(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so an interrupted removal never leaves a partial checkpoint."""
    if os.path.lexists(path):
        removed = path.with_name(f"tmp-old-{path.name}-{os.getpid()}")
        remove_tree(removed)
        os.rename(path, removed)
        remove_tree(removed)


def remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def prune(folder: Path, keep: int, protect: frozenset[str] = frozenset()) -> None:
    """Keep the newest `keep` checkpoints and the protected ones. Unreadable ones do not count towards `keep`."""
    kept = 0
    for path in newest_first(folder):
        if kept >= keep and path.name not in protect:
            remove_atomically(path)
        kept += read_sequence(path) is not None


def find_next_sequence(folder: Path) -> int:
    return max((read_sequence(path) or 0 for path in list_complete(folder)), default=0) + 1


# --- choosing -----------------------------------------------------------------------------------------------------


def list_complete(folder: Path) -> list[Path]:
    """The complete checkpoints, sorted by name."""
    return sorted(Path(entry) for entry in list_visible_entries(folder) if entry.is_dir(follow_symlinks=False))


def list_visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(("tmp", "."))]


def read_sequence(path: Path) -> int | None:
    """Position of a checkpoint in the order of writing; None if its manifest cannot be read."""
    try:
        return read_manifest(path).sequence
    except CorruptCheckpointError:
        return None


def newest_first(folder: Path) -> list[Path]:
    """The complete checkpoints, last written first; the last written need not be the one that trained longest.

    After resuming from an older checkpoint, later restarts continue that branch, not the abandoned newer one.
    A checkpoint with an unreadable manifest counts as newer than all checkpoints whose names sort before its own.
    """
    order: dict[Path, float] = {}
    for path in list_complete(folder):
        sequence = read_sequence(path)
        order[path] = max(order.values(), default=0.0) + 0.5 if sequence is None else sequence
    return sorted(order, key=lambda path: (order[path], path.name), reverse=True)


def latest_path(folder: Path) -> Path | None:
    """The checkpoint that was written last, without verifying it; None if there is none."""
    return next(iter(newest_first(folder)), None) if folder.is_dir() else None


def latest_id(folder: Path) -> str | None:
    """Name and mtime of the last checkpoint, so that a rewritten checkpoint of the same name counts as different."""
    path = latest_path(folder)
    return None if path is None else f"{path.name} {path.stat().st_mtime_ns}"


def latest_valid(folder: Path) -> VerifiedCheckpoint | None:
    """The newest checkpoint whose manifest and hashes are valid; None if there are no checkpoints.

    Raises:
        UsageError: there are checkpoints, but all are damaged: training from scratch would hide the loss.
    """
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir():
        raise UsageError(f"checkpoint.dir={folder} is not a folder: choose another path")
    skipped = [
        (entry.name, reason)
        for entry in list_visible_entries(folder)
        if (reason := describe_wrong_file_type(entry, stat.S_IFDIR, stat.S_IFREG))
    ]
    for path in newest_first(folder):
        manifest, reason = try_verify(path)
        if manifest is not None:
            return VerifiedCheckpoint(path, manifest, tuple(skipped))
        skipped.append((path.name, reason))
    if skipped:
        name, reason = skipped[0]
        raise UsageError(
            f"all checkpoints in {folder} are damaged ({name}: {reason}): "
            f"restore them from a copy, or type resume=never to start a new run beside this one"
        )
    return None


def try_verify(path: Path) -> tuple[Manifest | None, str]:
    try:
        return verify_checkpoint(path), ""
    except CorruptCheckpointError as damage:
        return None, str(damage)


def resolve_checkpoint_path(path: Path | str) -> Path:
    """The checkpoint folder that `resume=PATH` names; it has a manifest but is not verified yet.

    Raises:
        UsageError: the path is not a checkpoint; if it is a run directory, the message suggests its newest checkpoint.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    folders = [folder for folder in (path, path / CHECKPOINTS_DIR) if folder.is_dir()]
    candidates = (checkpoint for folder in folders for checkpoint in newest_first(folder))
    example = next((f", e.g. resume={each}" for each in candidates if (each / MANIFEST).is_file()), "")
    raise UsageError(
        f"resume={path} is not a checkpoint: type auto, never, must, or a folder that holds {MANIFEST}{example}"
    )


def open_checkpoint(path: Path | str) -> VerifiedCheckpoint:
    """Verify and return the checkpoint given by the user.

    Raises:
        UsageError: the path is not a checkpoint, or the checkpoint is damaged.
    """
    path = resolve_checkpoint_path(path)
    try:
        return VerifiedCheckpoint(path, verify_checkpoint(path))
    except CorruptCheckpointError as damage:
        raise UsageError(f"resume={path} is damaged: {damage}; choose another checkpoint") from damage


# --- verifying ----------------------------------------------------------------------------------------------------


def verify_checkpoint(path: Path) -> Manifest:
    """Check all files of a checkpoint against its manifest; return the manifest.

    Raises:
        CorruptCheckpointError: with the file and what is wrong with it.
    """
    manifest = read_manifest(path)
    for name, facts in manifest.files.items():
        check_file(path / name, facts)
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a folder, which must contain only regular files.

    Raises:
        CorruptCheckpointError: the manifest is unreadable or altered, or there is a link, pipe, device or folder.
    """
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if reason := describe_wrong_file_type(entry, stat.S_IFREG):
                    raise CorruptCheckpointError(f"{entry.name} {reason}")
        text = (path / MANIFEST).read_text()
    except (OSError, UnicodeDecodeError) as problem:
        detail = problem.strerror if isinstance(problem, OSError) else "it is not text"
        raise CorruptCheckpointError(f"its {MANIFEST} cannot be read: {detail}") from problem
    return Manifest.from_json(text)


def describe_wrong_file_type(entry: os.DirEntry[str], *allowed: int) -> str:
    """The reason to refuse an entry whose file type is not in `allowed`, else ""; links are not followed."""
    kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
    names = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return "" if kind in allowed else f"is {names.get(kind, 'a device')}, which is not allowed in a checkpoint folder"


def check_file(path: Path, facts: Mapping[str, Any]) -> None:
    digest = hashlib.sha256()
    try:
        if (size := path.stat().st_size) != facts["size"]:
            raise CorruptCheckpointError(f"{path.name} has {size} bytes instead of {facts['size']}")
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as problem:
        raise CorruptCheckpointError(f"{path.name} cannot be read: {problem.strerror}") from problem
    if digest.hexdigest() != facts["sha256"]:
        raise CorruptCheckpointError(f"{path.name} was changed after writing: its sha256 differs")
