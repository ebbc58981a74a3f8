"""A checkpoint as a folder: its manifest, its hashes, how it comes to be, and which one to trust.

Written into a fresh folder beside the others, each file hashed while it is written and synced, the manifest last, then
renamed: a checkpoint is whole or not there. Nothing is read that the manifest's hashes do not vouch for.
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

from launcher.durable import private_folder, sync
from launcher.errors import RequestError

__all__ = [
    "DamagedError",
    "Found",
    "Manifest",
    "by_age",
    "named",
    "newest",
    "newest_in",
    "newest_of",
    "open_at",
    "prune",
    "publish",
    "unfinished",
    "verified",
]

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20
#: Names that stay inside a folder, and do not look like something unfinished.
NAME = re.compile(r"(?!tmp)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class DamagedError(ValueError):
    """A checkpoint that must not be used, and why."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    `files` maps a file to its size in bytes and its sha256; `tensors` a tensor to dtype, shape, aliases and its pieces:
    file, key, and the flat range of elements [start, stop) that this key holds, so that any number of writers and
    readers use one format. `sequence` counts the checkpoints of a folder in the order in which they were written.
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
        """With a hash of itself. Raises TypeError where something in it is no JSON."""
        body = {"format": FORMAT, **{part.name: getattr(self, part.name) for part in fields(self)}}
        body = json.loads(json.dumps(body))  # as it will be read: a key that is a number becomes text, a tuple a list
        return json.dumps(body | {"sha256": digest_of(body)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """
        Raises:
            DamagedError: it is no manifest, was altered, or is of another format.
        """
        try:
            body = json.loads(text)
            claimed = body.pop("sha256")
            if claimed != digest_of(body):
                raise DamagedError("its manifest was altered: the hash of itself does not hold")
            if body.pop("format") != FORMAT:
                raise DamagedError("it was written by another version's format")
            manifest = cls(**body)
            check_files(manifest)
            check_pieces(manifest)
        except DamagedError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise DamagedError(f"its manifest cannot be read: {type(problem).__name__}") from problem
        return manifest


def digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def check_files(manifest: Manifest) -> None:
    for name, facts in manifest.files.items():
        if not NAME.fullmatch(name) or name == MANIFEST:
            raise DamagedError(f"its manifest names {name!r}, which is no file of a checkpoint")
        if not isinstance(facts["size"], int) or not isinstance(facts["sha256"], str):
            raise DamagedError(f"its manifest says neither size nor hash of {name}")


def check_pieces(manifest: Manifest) -> None:
    """Every tensor's pieces lie in listed files and make up the whole of it, in order."""
    for name, facts in manifest.tensors.items():
        end = 0
        for file, _, start, stop in facts["pieces"]:
            if file not in manifest.files or start != end or stop < start:
                raise DamagedError(f"its manifest has a wrong piece of {name}")
            end = stop
        if not facts["pieces"] or end != math.prod(facts["shape"]):
            raise DamagedError(f"its manifest has only a part of {name}")


@dataclass(frozen=True)
class Found:
    """A checkpoint that holds, and the newer ones that were passed over, each with the reason."""

    path: Path
    manifest: Manifest
    passed_over: tuple[tuple[str, str], ...] = ()


# --- writing ------------------------------------------------------------------------------------------------------


@contextmanager
def publish(folder: Path, name: str, fault: Callable[[str], None], token: str | None = None) -> Iterator[Path]:
    """A fresh folder to write into; on leaving it takes its name, unless an error came up, then it is gone.

    `fault` is called before the rename, where tests do their worst. One writer at a time: the run's lock sees to it.
    With a `token` others write into the same folder, and may have begun.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a checkpoint")
    private_folder(folder)
    fresh = unfinished(folder, name, token or str(os.getpid()))
    sweep(folder, but=fresh if token else None)
    os.makedirs(fresh, 0o700, exist_ok=token is not None)
    try:
        yield fresh
        sync(fresh)
        fault("checkpoint-rename")
        take_name(fresh, folder / name)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def take_name(fresh: Path, place: Path) -> None:
    """Rename. Where the same update was saved before, that one goes only once the new one stands beside it."""
    if not os.path.lexists(place):
        os.rename(fresh, place)
        sync(place.parent)
        return
    beside = place.with_name(f"{place.name}.new")
    discard(beside)
    os.rename(fresh, beside)
    sync(place.parent)
    discard(place)
    os.rename(beside, place)
    sync(place.parent)


def unfinished(folder: Path, name: str, token: str) -> Path:
    """Where a checkpoint is before it takes its name."""
    return folder / f"tmp-{name}-{token}"


def sweep(folder: Path, but: Path | None = None) -> None:
    """Remove what a writer left behind that died."""
    for entry in folder.glob("tmp-*"):
        if entry != but:
            remove(entry)


def discard(path: Path) -> None:
    """Remove a checkpoint; killed on the way it is gone as well, never half there."""
    if os.path.lexists(path):
        doomed = path.with_name(f"tmp-old-{path.name}-{os.getpid()}")
        remove(doomed)
        os.rename(path, doomed)
        remove(doomed)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def prune(folder: Path, keep: int, protect: frozenset[str] = frozenset()) -> None:
    """Keep the newest `keep` and the protected ones. What cannot be read does not count as kept."""
    kept = 0
    for path in by_age(folder):
        if kept >= keep and path.name not in protect:
            discard(path)
        kept += sequence_of(path) is not None


def next_sequence(folder: Path) -> int:
    return max((sequence_of(path) or 0 for path in finished(folder)), default=0) + 1


# --- choosing -----------------------------------------------------------------------------------------------------


def finished(folder: Path) -> list[Path]:
    """The checkpoints that took their name, by name."""
    return sorted(Path(entry) for entry in visible(folder) if entry.is_dir(follow_symlinks=False))


def visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(("tmp", "."))]


def sequence_of(path: Path) -> int | None:
    """When among the checkpoints of its folder it was written; None where its manifest cannot be read."""
    try:
        return manifest_of(path).sequence
    except DamagedError:
        return None


def by_age(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first: the one written last, which need not be the one that trained longest.

    Who went back to an older checkpoint and trained on from there wants to go on from there, not from what was left.
    One that cannot say when it was written stands behind those whose names come before its own.
    """
    ages: dict[Path, float] = {}
    for path in finished(folder):
        sequence = sequence_of(path)
        ages[path] = max(ages.values(), default=0.0) + 0.5 if sequence is None else sequence
    return sorted(ages, key=lambda path: (ages[path], path.name), reverse=True)


def newest_in(folder: Path) -> Path | None:
    """The checkpoint that was written last, whatever it is worth; None where there is none."""
    return next(iter(by_age(folder)), None) if folder.is_dir() else None


def newest_of(folder: Path) -> str | None:
    """Names the checkpoint that was written last, and when: one of the same name written anew is another."""
    path = newest_in(folder)
    return None if path is None else f"{path.name} {path.stat().st_mtime_ns}"


def newest(folder: Path) -> Found | None:
    """The newest checkpoint whose manifest and hashes hold; None where there are none at all.

    Raises:
        RequestError: there are checkpoints and all are damaged: training from scratch would hide the loss.
    """
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir():
        raise RequestError(f"checkpoint.dir={folder} is no folder: name another one")
    passed = [(entry.name, why) for entry in visible(folder) if (why := strange(entry, stat.S_IFDIR, stat.S_IFREG))]
    for path in by_age(folder):
        found, why = tried(path)
        if found is not None:
            return Found(path, found, tuple(passed))
        passed.append((path.name, why))
    if passed:
        name, why = passed[0]
        raise RequestError(
            f"checkpoints in {folder} are all damaged ({name}: {why}): "
            f"mend them, or type resume=never to start a new run beside this one"
        )
    return None


def tried(path: Path) -> tuple[Manifest | None, str]:
    try:
        return verified(path), ""
    except DamagedError as damage:
        return None, str(damage)


def named(path: Path | str) -> Path:
    """The folder that `resume=PATH` names, which has the look of a checkpoint; whether it holds is not known yet.

    Raises:
        RequestError: it is none; where it is a run's folder, its newest checkpoint is named.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    around = [checkpoint for place in (path, path / "checkpoints") if place.is_dir() for checkpoint in by_age(place)]
    example = next((f", e.g. resume={checkpoint}" for checkpoint in around if (checkpoint / MANIFEST).is_file()), "")
    raise RequestError(
        f"resume={path} is no checkpoint: type auto, never, must, or a folder that holds {MANIFEST}{example}"
    )


def open_at(path: Path | str) -> Found:
    """The checkpoint that the user names.

    Raises:
        RequestError: it is none, or damaged.
    """
    path = named(path)
    try:
        return Found(path, verified(path))
    except DamagedError as damage:
        raise RequestError(f"resume={path} is damaged: {damage}; name another checkpoint") from damage


# --- trusting -----------------------------------------------------------------------------------------------------


def verified(path: Path) -> Manifest:
    """The manifest, once everything it vouches for was found as it says.

    Raises:
        DamagedError: names the file and what is wrong with it.
    """
    manifest = manifest_of(path)
    for name, facts in manifest.files.items():
        check_file(path / name, facts)
    return manifest


def manifest_of(path: Path) -> Manifest:
    """The manifest of a folder that holds nothing but files.

    Raises:
        DamagedError: it cannot be read or was altered, or there is a link, a pipe, a device or a folder beside it.
    """
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if why := strange(entry, stat.S_IFREG):
                    raise DamagedError(f"{entry.name} {why}")
        text = (path / MANIFEST).read_text()
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "it is no text"
        raise DamagedError(f"its {MANIFEST} cannot be read: {reason}") from problem
    return Manifest.from_json(text)


def strange(entry: os.DirEntry[str], *wanted: int) -> str:
    """What is wrong with an entry that is of none of the wanted kinds; links are not followed."""
    kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
    names = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return "" if kind in wanted else f"is {names.get(kind, 'a device')}, which is refused here"


def check_file(path: Path, facts: Mapping[str, Any]) -> None:
    digest = hashlib.sha256()
    try:
        if (size := path.stat().st_size) != facts["size"]:
            raise DamagedError(f"{path.name} has {size} bytes instead of {facts['size']}")
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as problem:
        raise DamagedError(f"{path.name} cannot be read: {problem.strerror}") from problem
    if digest.hexdigest() != facts["sha256"]:
        raise DamagedError(f"{path.name} is not what was written: its sha256 differs")
