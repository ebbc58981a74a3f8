"""Sharded checkpoints: each rank writes its own ranges to its own files, and rank 0 writes the manifest.

Ranks write in the background during training, so they communicate only through the unfinished folder: after writing its
files, a rank leaves a JSON note that describes them, and rank 0 merges the notes once all are there.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.checkpoint import CheckpointError, Described, Report, Saved, refused, save, write_groups
from launcher.durable import private_folder, write_whole
from launcher.manifest import unfinished

__all__ = ["Part", "Place", "save_part", "save_together"]

LOOK_EVERY_S = 0.02


@dataclass(frozen=True)
class Place:
    """Start of a flat range within a tensor, and the shape of the whole tensor."""

    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Part:
    """One rank's part of a sharded checkpoint.

    `places` has an entry for each tensor of which this rank holds only a range; other tensors are whole. `token` is the
    same on all ranks and new at each start of the workers. `patience` raises once it is clear that the notes of the
    other ranks will not arrive.
    """

    rank: int
    world: int
    token: str
    places: Mapping[str, Place]
    patience: Callable[[], None]

    @property
    def suffix(self) -> str:
        return f"-{self.rank + 1:05}-of-{self.world:05}"


def save_part(folder: Path, name: str, saved: Saved, part: Part, fault: Callable[[str], None]) -> None:
    """Write the part of a rank other than 0. An error is written to the note, for rank 0 to raise, and raised here too.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    private_folder(folder)
    fresh = unfinished(folder, name, part.token)
    with refused(f"checkpoint {name}", folder):
        os.makedirs(fresh, 0o700, exist_ok=True)
        try:
            files, tensors = write_groups(fresh, saved, fault, part.suffix)
            note = {"files": files, "tensors": placed(tensors, part.places)}
        except OSError as problem:
            write_whole(fresh / note_of(part.rank), json.dumps({"error": problem.strerror or str(problem)}))
            raise
        write_whole(fresh / note_of(part.rank), json.dumps(note))


def save_together(
    folder: Path,
    name: str,
    saved: Saved,
    part: Part,
    keep: int,
    protect: frozenset[str] = frozenset(),
    fault: Callable[[str], None] = lambda phase: None,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Write rank 0's own part and the manifest of all parts, then rename and prune as `checkpoint.save` does.

    Raises:
        CheckpointError: a rank could not write its part, or exited before it had.
    """
    joined = partial(with_others, part=part)
    return save(folder, name, saved, keep, protect, fault, clock, token=part.token, suffix=part.suffix, joined=joined)


def with_others(fresh: Path, files: Described, tensors: Described, part: Part) -> tuple[Described, Described]:
    """Wait for the notes of all ranks and merge them."""
    notes: list[Mapping[str, Any]] = [{"files": files, "tensors": placed(tensors, part.places)}]
    notes += [awaited(fresh / note_of(rank), rank, part.patience) for rank in range(1, part.world)]
    together = {file: facts for note in notes for file, facts in note["files"].items()}
    return together, merged(note["tensors"] for note in notes)


def note_of(rank: int) -> str:
    return f"part-{rank}.json"


def awaited(path: Path, rank: int, patience: Callable[[], None]) -> Mapping[str, Any]:
    while not path.exists():
        patience()
        time.sleep(LOOK_EVERY_S)
    note = json.loads(path.read_text())
    path.unlink()
    if "error" in note:
        raise CheckpointError(f"rank {rank} could not write its checkpoint files: {note['error']}")
    return note


def placed(tensors: Described, places: Mapping[str, Place]) -> Described:
    """Rewrite a rank's tensor entries as ranges of the whole tensors."""
    return {name: ranged(facts, places[name]) if name in places else facts for name, facts in tensors.items()}


def ranged(facts: dict[str, Any], place: Place) -> dict[str, Any]:
    [[file, key, _, length]] = facts["pieces"]
    return {**facts, "shape": list(place.shape), "pieces": [[file, key, place.start, place.start + length]]}


def merged(notes: Iterable[Described]) -> Described:
    """Merge the ranks' tensor entries, with the pieces of each tensor in order.

    Raises:
        CheckpointError: the ranges of a tensor do not cover it completely.
    """
    together: Described = {}
    for tensors in notes:
        for name, facts in tensors.items():
            known = together.setdefault(name, {**facts, "pieces": []})
            known["pieces"] += facts["pieces"]
    for name, facts in together.items():
        facts["pieces"] = in_order(name, facts)
    return together


def in_order(name: str, facts: Mapping[str, Any]) -> list[list[Any]]:
    pieces = sorted((p for p in facts["pieces"] if p[2] < p[3]), key=lambda piece: int(piece[2])) or facts["pieces"][:1]
    ends = [0, *(piece[3] for piece in pieces)]
    if [piece[2] for piece in pieces] != ends[:-1] or ends[-1] != math.prod(facts["shape"]):
        raise CheckpointError(f"the ranks' parts of {name} do not cover the whole tensor: {[p[2:] for p in pieces]}")
    return pieces
