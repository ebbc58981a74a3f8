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

from launcher.checkpoint.manifest import tmp_checkpoint_path
from launcher.checkpoint.tensor_io import (
    CheckpointError,
    CheckpointState,
    SaveResult,
    TensorIndex,
    raise_as_checkpoint_error,
    save,
    write_groups,
)
from launcher.system.atomic_files import atomic_write_text, make_private_dir

__all__ = ["ShardInfo", "TensorSlice", "save_shard", "save_sharded"]

SHARD_POLL_INTERVAL_S = 0.02


@dataclass(frozen=True)
class TensorSlice:
    """Start of a flat range within a tensor, and the shape of the whole tensor."""

    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class ShardInfo:
    """One rank's part of a sharded checkpoint.

    `places` has an entry for each tensor of which this rank holds only a range; other tensors are whole. `token` is the
    same on all ranks and new at each start of the workers. `patience` raises once it is clear that the notes of the
    other ranks will not arrive.
    """

    rank: int
    world: int
    token: str
    places: Mapping[str, TensorSlice]
    check_timeout: Callable[[], None]

    @property
    def suffix(self) -> str:
        return f"-{self.rank + 1:05}-of-{self.world:05}"


def save_shard(folder: Path, name: str, saved: CheckpointState, part: ShardInfo, fault: Callable[[str], None]) -> None:
    """Write the part of a rank other than 0. An error is written to the note, for rank 0 to raise, and raised here too.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    make_private_dir(folder)
    fresh = tmp_checkpoint_path(folder, name, part.token)
    with raise_as_checkpoint_error(f"checkpoint {name}", folder):
        os.makedirs(fresh, 0o700, exist_ok=True)
        try:
            files, tensors = write_groups(fresh, saved, fault, part.suffix)
            note = {"files": files, "tensors": as_global_slices(tensors, part.places)}
        except OSError as problem:
            atomic_write_text(
                fresh / format_shard_index_name(part.rank), json.dumps({"error": problem.strerror or str(problem)})
            )
            raise
        atomic_write_text(fresh / format_shard_index_name(part.rank), json.dumps(note))


def save_sharded(
    folder: Path,
    name: str,
    saved: CheckpointState,
    part: ShardInfo,
    keep: int,
    protect: frozenset[str] = frozenset(),
    fault: Callable[[str], None] = lambda phase: None,
    clock: Callable[[], float] = time.monotonic,
) -> SaveResult:
    """Write rank 0's own part and the manifest of all parts, then rename and prune as `checkpoint.save` does.

    Raises:
        CheckpointError: a rank could not write its part, or exited before it had.
    """
    joined = partial(merge_all_shards, part=part)
    return save(folder, name, saved, keep, protect, fault, clock, token=part.token, suffix=part.suffix, joined=joined)


def merge_all_shards(
    fresh: Path, files: TensorIndex, tensors: TensorIndex, part: ShardInfo
) -> tuple[TensorIndex, TensorIndex]:
    """Wait for the notes of all ranks and merge them."""
    notes: list[Mapping[str, Any]] = [{"files": files, "tensors": as_global_slices(tensors, part.places)}]
    notes += [
        wait_for_shard_index(fresh / format_shard_index_name(rank), rank, part.check_timeout)
        for rank in range(1, part.world)
    ]
    together = {file: facts for note in notes for file, facts in note["files"].items()}
    return together, merge_tensor_index(note["tensors"] for note in notes)


def format_shard_index_name(rank: int) -> str:
    return f"part-{rank}.json"


def wait_for_shard_index(path: Path, rank: int, patience: Callable[[], None]) -> Mapping[str, Any]:
    while not path.exists():
        patience()
        time.sleep(SHARD_POLL_INTERVAL_S)
    note = json.loads(path.read_text())
    path.unlink()
    if "error" in note:
        raise CheckpointError(f"rank {rank} could not write its checkpoint files: {note['error']}")
    return note


def as_global_slices(tensors: TensorIndex, places: Mapping[str, TensorSlice]) -> TensorIndex:
    """Rewrite a rank's tensor entries as ranges of the whole tensors."""
    return {name: shift_to_slice(facts, places[name]) if name in places else facts for name, facts in tensors.items()}


def shift_to_slice(facts: dict[str, Any], place: TensorSlice) -> dict[str, Any]:
    [[file, key, _, length]] = facts["pieces"]
    return {**facts, "shape": list(place.shape), "pieces": [[file, key, place.start, place.start + length]]}


def merge_tensor_index(notes: Iterable[TensorIndex]) -> TensorIndex:
    """Merge the ranks' tensor entries, with the pieces of each tensor in order.

    Raises:
        CheckpointError: the ranges of a tensor do not cover it completely.
    """
    together: TensorIndex = {}
    for tensors in notes:
        for name, facts in tensors.items():
            known = together.setdefault(name, {**facts, "pieces": []})
            known["pieces"] += facts["pieces"]
    for name, facts in together.items():
        facts["pieces"] = sorted_pieces(name, facts)
    return together


def sorted_pieces(name: str, facts: Mapping[str, Any]) -> list[list[Any]]:
    pieces = sorted((p for p in facts["pieces"] if p[2] < p[3]), key=lambda piece: int(piece[2])) or facts["pieces"][:1]
    ends = [0, *(piece[3] for piece in pieces)]
    if [piece[2] for piece in pieces] != ends[:-1] or ends[-1] != math.prod(facts["shape"]):
        raise CheckpointError(f"the ranks' parts of {name} do not cover the whole tensor: {[p[2:] for p in pieces]}")
    return pieces
