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
from pathlib import Path
from typing import Any

from launcher.checkpoint.manifest import tmp_checkpoint_path
from launcher.checkpoint.tensor_io import (
    CheckpointError,
    CheckpointState,
    SaveOptions,
    SaveResult,
    ShardedWrite,
    TensorIndex,
    raise_as_checkpoint_error,
    save_checkpoint,
    write_groups,
)
from launcher.system.atomic_files import atomic_write_text, make_durable_dir

__all__ = ["ShardInfo", "TensorSlice", "save_shard", "save_sharded_checkpoint"]

SHARD_POLL_INTERVAL_S = 0.02


@dataclass(frozen=True)
class TensorSlice:
    """Start of a flat range within a tensor, and the shape of the whole tensor."""

    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class ShardInfo:
    """One rank's shard of a checkpoint.

    `slices` has an entry for each tensor of which this rank holds only a range; other tensors are whole. `token` is the
    same on all ranks and new at each start of the workers. `check_timeout` raises once it is clear that the notes of
    the other ranks will not arrive.
    """

    rank: int
    world: int
    token: str
    slices: Mapping[str, TensorSlice]
    check_timeout: Callable[[], None]

    @property
    def suffix(self) -> str:
        return f"-{self.rank + 1:05}-of-{self.world:05}"


def save_shard(
    folder: Path, name: str, state: CheckpointState, shard: ShardInfo, inject_fault: Callable[[str], None]
) -> None:
    """Write the shard of a rank other than 0. An error is written to the note, for rank 0 to raise, and raised here.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    make_durable_dir(folder)
    tmp_dir = tmp_checkpoint_path(folder, name, shard.token)
    note = tmp_dir / format_shard_index_name(shard.rank)
    with raise_as_checkpoint_error(f"checkpoint {name}", folder):
        os.makedirs(tmp_dir, exist_ok=True)
        try:
            files, tensors = write_groups(tmp_dir, state, inject_fault, shard.suffix)
        except OSError as problem:
            atomic_write_text(note, json.dumps({"error": problem.strerror or str(problem)}))
            raise
        facts = {"files": files, "tensors": as_global_slices(tensors, shard.slices)}
        atomic_write_text(note, json.dumps(facts))


def save_sharded_checkpoint(
    folder: Path, name: str, state: CheckpointState, shard: ShardInfo, options: SaveOptions
) -> SaveResult:
    """Write rank 0's own shard and the manifest of all shards, then rename and prune as `save_checkpoint` does.

    Raises:
        CheckpointError: a rank could not write its shard, or exited before it had.
    """

    def merge(tmp_dir: Path, files: TensorIndex, tensors: TensorIndex) -> tuple[TensorIndex, TensorIndex]:
        return merge_all_shards(tmp_dir, files, tensors, shard)

    return save_checkpoint(folder, name, state, options, ShardedWrite(shard.token, shard.suffix, merge))


def merge_all_shards(
    tmp_dir: Path, files: TensorIndex, tensors: TensorIndex, shard: ShardInfo
) -> tuple[TensorIndex, TensorIndex]:
    """Wait for the notes of all ranks and merge them."""
    notes: list[Mapping[str, Any]] = [{"files": files, "tensors": as_global_slices(tensors, shard.slices)}]
    notes += [
        wait_for_shard_index(tmp_dir / format_shard_index_name(rank), rank, shard.check_timeout)
        for rank in range(1, shard.world)
    ]
    all_files = {file: facts for note in notes for file, facts in note["files"].items()}
    return all_files, merge_tensor_index(note["tensors"] for note in notes)


def format_shard_index_name(rank: int) -> str:
    return f"part-{rank}.json"


def wait_for_shard_index(path: Path, rank: int, check_timeout: Callable[[], None]) -> Mapping[str, Any]:
    while not path.exists():
        check_timeout()
        time.sleep(SHARD_POLL_INTERVAL_S)
    note = json.loads(path.read_text())
    path.unlink()
    if "error" in note:
        raise CheckpointError(f"rank {rank} could not write its checkpoint files: {note['error']}")
    return note


def as_global_slices(tensors: TensorIndex, slices: Mapping[str, TensorSlice]) -> TensorIndex:
    """Rewrite a rank's tensor entries as ranges of the whole tensors."""
    return {name: shift_to_slice(facts, slices[name]) if name in slices else facts for name, facts in tensors.items()}


def shift_to_slice(facts: dict[str, Any], held: TensorSlice) -> dict[str, Any]:
    [[file, key, _, length]] = facts["pieces"]
    return {**facts, "shape": list(held.shape), "pieces": [[file, key, held.start, held.start + length]]}


def merge_tensor_index(indexes: Iterable[TensorIndex]) -> TensorIndex:
    """Merge the ranks' tensor entries, with the pieces of each tensor in order.

    Raises:
        CheckpointError: the ranges of a tensor do not cover it completely.
    """
    merged: TensorIndex = {}
    for tensors in indexes:
        for name, facts in tensors.items():
            merged.setdefault(name, {**facts, "pieces": []})["pieces"] += facts["pieces"]
    for name, facts in merged.items():
        facts["pieces"] = sort_pieces(name, facts)
    return merged


def sort_pieces(name: str, facts: Mapping[str, Any]) -> list[list[Any]]:
    pieces = sorted((p for p in facts["pieces"] if p[2] < p[3]), key=lambda piece: int(piece[2])) or facts["pieces"][:1]
    ends = [0, *(piece[3] for piece in pieces)]
    if [piece[2] for piece in pieces] != ends[:-1] or ends[-1] != math.prod(facts["shape"]):
        raise CheckpointError(f"the ranks' parts of {name} do not cover the whole tensor: {[p[2:] for p in pieces]}")
    return pieces
