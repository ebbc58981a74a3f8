"""Save and load checkpoints as safetensors and JSON: one format for all strategies and world sizes, without pickle."""

from __future__ import annotations

import errno
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from launcher.checkpoint.manifest import (
    MANIFEST,
    CorruptCheckpointError,
    Manifest,
    VerifiedCheckpoint,
    atomic_directory,
    find_next_sequence,
    prune,
)
from launcher.errors import UsageError
from launcher.system.atomic_files import HashedFile, atomic_write

__all__ = [
    "CHANGED_BUFFERS",
    "CheckpointError",
    "CheckpointState",
    "LazyTensors",
    "LoadedCheckpoint",
    "SaveOptions",
    "SaveResult",
    "ShardedWrite",
    "TensorIndex",
    "TensorReader",
    "export_safetensors",
    "export_tensors",
    "index_tensors",
    "is_of_model",
    "load_checkpoint",
    "raise_as_checkpoint_error",
    "save_checkpoint",
    "storage_key",
    "view_as_bytes",
    "write_groups",
]

TensorIndex = dict[str, dict[str, Any]]
CHANGED_BUFFERS = "launcher.changed_buffers"  # in the metadata of an exported model
#: The dtypes that safetensors supports, with its names for them.
DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(OSError):
    """A checkpoint could not be written; earlier checkpoints are untouched."""


@dataclass(frozen=True)
class CheckpointState:
    """The state to save: model tensors by state_dict name, optimizer tensors as `<parameter>/<slot>`, and JSON."""

    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    position: Mapping[str, int]
    plan: Mapping[str, Any]
    world: int
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class SaveOptions:
    """How to save: the newest `keep` checkpoints remain afterwards, and those whose names are in `protect`.

    `inject_fault` is called with the name of each phase, for tests.
    """

    keep: int
    protect: frozenset[str] = frozenset()
    inject_fault: Callable[[str], None] = lambda phase: None
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class ShardedWrite:
    """How several ranks write into one folder: `token` identifies the folder, `suffix` marks this rank's files.

    `merge` maps the unfinished folder, the index of this rank's files and the index of its tensors to the indexes of
    all ranks' files and tensors.
    """

    token: str
    suffix: str
    merge: Callable[[Path, TensorIndex, TensorIndex], tuple[TensorIndex, TensorIndex]]


@dataclass(frozen=True)
class SaveResult:
    """A checkpoint that was written, with its size in bytes and the duration in seconds."""

    name: str
    path: Path
    bytes: int
    seconds: float


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's lazily read tensors and its manifest."""

    model: LazyTensors
    optimizer: LazyTensors
    manifest: Manifest


# --- writing ------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, name: str, state: CheckpointState, options: SaveOptions, shards: ShardedWrite | None = None
) -> SaveResult:
    """Write `state` as `folder/name`, then delete all but the newest and the protected checkpoints.

    `shards` is needed if several ranks write into the folder; then this is rank 0.

    Raises:
        CheckpointError: the disk is full or not writable; existing checkpoints are unchanged.
        UsageError: the model's state holds something that is not a dense numeric tensor.
    """
    start = options.clock()
    token, suffix = (None, "") if shards is None else (shards.token, shards.suffix)
    with raise_as_checkpoint_error(f"checkpoint {name}", folder):
        with atomic_directory(folder, name, options.inject_fault, token) as tmp_dir:
            files, tensors = write_groups(tmp_dir, state, options.inject_fault, suffix)
            if shards is not None:
                files, tensors = shards.merge(tmp_dir, files, tensors)
            write_manifest(tmp_dir, folder, state, files, tensors)
        prune(folder, options.keep, options.protect | {name})
    size = sum(facts["size"] for facts in files.values())
    return SaveResult(name, folder / name, size, options.clock() - start)


def write_groups(
    tmp_dir: Path, state: CheckpointState, inject_fault: Callable[[str], None], suffix: str = ""
) -> tuple[TensorIndex, TensorIndex]:
    """Write the model and optimizer tensors to one file each; return the file index and the tensor index."""
    groups = {f"model{suffix}.safetensors": state.model, f"optimizer{suffix}.safetensors": state.optimizer}
    indexed = {name: index_tensors(group, name) for name, group in groups.items()}
    files: TensorIndex = {}
    for name, (unique, index) in indexed.items():
        with HashedFile(tmp_dir / name) as file:
            write_tensors(file, index, unique.__getitem__)
        files[name] = file.size_and_hash
        inject_fault("checkpoint-write")
    return files, {name: facts for _, index in indexed.values() for name, facts in index.items()}


def write_manifest(
    tmp_dir: Path, folder: Path, state: CheckpointState, files: TensorIndex, tensors: TensorIndex
) -> None:
    manifest = Manifest(
        files=files,
        tensors=tensors,
        position=state.position,
        plan=state.plan,
        world=state.world,
        versions=collect_versions(),
        facts=state.facts,
        sequence=find_next_sequence(folder),
    )
    with HashedFile(tmp_dir / MANIFEST) as file:
        file.write(manifest.to_json().encode())


def export_safetensors(
    path: Path, model: LazyTensors, changed_buffers: Mapping[str, str | None] = {}, metadata: Mapping[str, str] = {}
) -> None:
    """Write the model as one file that `safetensors.torch.load_model` loads without this package.

    Tensors are written one at a time, so no process holds them all. `changed_buffers` differ in dtype or shape from
    those of the recipe's new model; `launcher.load` reads their names, and the rest of the `metadata`.

    Raises:
        CheckpointError: the disk is full or not writable; an existing file is unchanged.
    """
    write_export(path, model.index, model.__getitem__, changed_buffers, metadata)


def export_tensors(
    path: Path, model: Mapping[str, torch.Tensor], changed_buffers: Mapping[str, str | None] = {}
) -> None:
    """As `export_safetensors`, for a model that is in memory.

    Raises:
        CheckpointError: the disk is full or not writable; an existing file is unchanged.
    """
    unique, index = index_tensors(model, path.name)
    write_export(path, index, unique.__getitem__, changed_buffers)


def write_export(
    path: Path,
    index: Mapping[str, Mapping[str, Any]],
    get_tensor: Callable[[str], torch.Tensor],
    changed_buffers: Mapping[str, str | None],
    metadata: Mapping[str, str] = {},
) -> None:
    aliases = {alias: name for name, facts in index.items() for alias in facts["aliases"]}
    with raise_as_checkpoint_error(path.name, path.parent), atomic_write(path) as file:
        buffers = {CHANGED_BUFFERS: json.dumps(dict(changed_buffers))} if changed_buffers else {}
        write_tensors(file, index, get_tensor, {"format": "pt", **aliases, **buffers, **metadata})


@contextmanager
def raise_as_checkpoint_error(what: str, folder: Path) -> Iterator[None]:
    """Raise an OSError inside the block as CheckpointError with the reason."""
    try:
        yield
    except OSError as problem:
        reason = "the disk is full" if problem.errno in (errno.ENOSPC, errno.EDQUOT) else problem.strerror
        raise CheckpointError(f"{what} could not be written to {folder}: {reason or problem}") from problem


def index_tensors(
    group: Mapping[str, torch.Tensor], file: str
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Return the tensors to write to `file`, tied ones once, and their manifest entries."""
    unique: dict[str, torch.Tensor] = {}
    owners: dict[tuple[Any, ...], str] = {}
    index: dict[str, dict[str, Any]] = {}
    for name, tensor in group.items():
        check_serializable(name, tensor)
        owner = owners.setdefault(storage_key(tensor), name) if tensor.numel() else name
        if owner != name:
            index[owner]["aliases"].append(name)
            continue
        unique[name] = tensor
        index[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "pieces": [[file, name, 0, tensor.numel()]],
            "aliases": [],
        }
    return unique, index


def storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A key that is equal for tensors that share the same memory, i.e. tied tensors."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def check_serializable(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{name} in the state_dict is a {type(tensor).__name__}: make it a tensor, e.g. a buffer")
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.is_meta:
        kind = f"{tensor.layout}, {tensor.dtype} on {tensor.device.type}"
        raise UsageError(f"{name} in the state_dict cannot be saved ({kind}): make it a dense numeric tensor")


def write_tensors(
    file: HashedFile,
    index: Mapping[str, Mapping[str, Any]],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file: header length, JSON header, then the tensors' bytes, widest dtypes first.

    `index` gives each tensor's dtype and shape, `read` returns the tensor itself.

    Written here, tensor by tensor, because the library's own writer either holds the whole file in memory or cannot be
    hashed while it writes. The header is padded to 8 bytes, so with this order every tensor is aligned to its dtype.
    Source: https://github.com/huggingface/safetensors#format
    """
    dtypes: dict[str, torch.dtype] = {name: getattr(torch, facts["dtype"]) for name, facts in index.items()}
    ordered = sorted(index, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in ordered:
        shape, dtype = index[name]["shape"], dtypes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        file.write(view_as_bytes(read(name)))


def view_as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements in row-major order as bytes; no copy if it is contiguous on the CPU."""
    on_cpu = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return on_cpu.reshape(-1).view(torch.uint8).numpy().data


def collect_versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "safetensors": safetensors.__version__}


# --- reading ------------------------------------------------------------------------------------------------------


def load_checkpoint(checkpoint: VerifiedCheckpoint) -> LoadedCheckpoint:
    """Open the tensors of a verified checkpoint."""
    read, tensors = TensorReader(checkpoint.path), checkpoint.manifest.tensors.items()
    model = {name: facts for name, facts in tensors if is_of_model(facts)}
    optimizer = {name: facts for name, facts in tensors if not is_of_model(facts)}
    return LoadedCheckpoint(LazyTensors(read, model), LazyTensors(read, optimizer), checkpoint.manifest)


class LazyTensors(Mapping[str, torch.Tensor]):
    """Checkpoint tensors by name or alias, assembled from their pieces on each access.

    Tensors are copies: a memory-mapped file would lose its pages if another process prunes the checkpoint. Reading
    raises CorruptCheckpointError if the files do not match the manifest. `read` is called as a `TensorReader` is.
    """

    def __init__(self, read: Callable[..., torch.Tensor], index: Mapping[str, Mapping[str, Any]]) -> None:
        self.index = index
        self._read = read
        self._facts = {alias: facts for name, facts in index.items() for alias in (name, *facts["aliases"])}

    def __getitem__(self, name: str) -> torch.Tensor:
        facts = self._facts[name]
        return self._read(facts).reshape(facts["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._facts[name]["shape"])

    def get_entry(self, name: str) -> Mapping[str, Any]:
        """The manifest's entry of a tensor: the same object for all names of tensors that shared their memory."""
        return self._facts[name]

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read only elements [start, stop) of the flattened tensor."""
        return self._read(self._facts[name], start, stop)


def is_of_model(facts: Mapping[str, Any]) -> bool:
    """Whether a tensor of the manifest is the model's, not the optimizer's."""
    return str(facts["pieces"][0][0]).startswith("model")


class TensorReader:
    """Reads tensors or element ranges as described by the manifest; opens each file once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}

    def __call__(self, facts: Mapping[str, Any], start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements [start, stop) of the flattened tensor as a copy; only the pieces that overlap are read."""
        stop = math.prod(facts["shape"]) if stop is None else stop
        pieces = [
            self._read_piece(file, key, last - first, facts["dtype"])[max(start - first, 0) : stop - first]
            for file, key, first, last in facts["pieces"]
            if first < stop and start < last
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=getattr(torch, facts["dtype"]))

    def _read_piece(self, file: str, key: str, numel: int, dtype: str) -> torch.Tensor:
        try:
            if file not in self._files:
                self._files[file] = safetensors.safe_open(self._folder / file, framework="pt")
            tensor: torch.Tensor = self._files[file].get_tensor(key)
        except (safetensors.SafetensorError, OSError) as problem:
            raise CorruptCheckpointError(f"{key} in {file} cannot be read: {problem}") from problem
        if tensor.numel() != numel or str(tensor.dtype) != f"torch.{dtype}":
            raise CorruptCheckpointError(f"{key} in {file} does not match the manifest: dtype or size differs")
        return tensor.reshape(-1)
